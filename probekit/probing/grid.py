"""The probe grid: probes and baselines of every distance and horizon, measured on the same test documents."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.config import VariantName
from probekit.corpus.examples import cut_windows
from probekit.evaluation.action_metrics import score_actions
from probekit.evaluation.baselines import action_prior, baselines
from probekit.evaluation.evaluate import METRICS, window_and_stride
from probekit.evaluation.statistics import Resampling, bootstrap_ratios
from probekit.models.mixing import VARIANTS, Fixed
from probekit.probing.activations import Activations, Place, read_activations
from probekit.probing.solvers import SoftmaxProbes
from probekit.probing.targets import Targets, targets
from probekit.progress import Progress
from probekit.run import Run

FITTED_ON, CHOSEN_ON, TESTED_ON = "probe", "validation", "test"
"""The splits that probes use; none of them trained the LM or the planner."""

MINIMUM_EXAMPLES = 20
"""A cell with fewer examples in any of its splits stays empty."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """The examples of one distance and horizon, by split."""

    distance: int
    horizon: int
    examples: dict[str, Targets]

    @property
    def empty(self) -> bool:
        """Whether any of its splits has too few examples for a probe."""
        return min(map(len, self.examples.values())) < MINIMUM_EXAMPLES


@dataclass(frozen=True)
class Grid:
    """The cells that share documents.

    Attributes:
        run: The run, with the settings of the grid.
        documents: The documents of each split that probes use.
    """

    run: Run
    documents: dict[str, np.ndarray]

    @cached_property
    def cells(self) -> list[Cell]:
        """Every distance and horizon of the settings."""
        settings = self.run.config.probe
        return [
            Cell(
                distance,
                horizon,
                {
                    split: targets(self.run.corpus, numbers, distance, horizon)
                    for split, numbers in self.documents.items()
                },
            )
            for distance in settings.distances
            for horizon in settings.horizons
        ]

    def baseline_rows(self) -> Iterator[Row]:
        """Rows of the readers that need no activation, on each cell's own test examples."""
        documents = self.documents[TESTED_ON]
        sentences = self.run.corpus.sentences(documents)
        readers = {
            horizon: baselines(self.run, documents, horizon) for horizon in self.run.config.probe.horizons
        }
        for cell in self.cells:
            examples = np.searchsorted(sentences, cell.examples[TESTED_ON].anchor)
            for reader, log_probabilities in readers[cell.horizon].items():
                head = {"reader": reader, "injected": False}
                yield from self._rows(cell, [head], log_probabilities[None, examples])

    def probe_rows(self, variant: VariantName, places: list[Place], progress: Progress) -> Iterator[Row]:
        """Rows of the probes of one variant at all places."""
        activations = self._read(variant, places, progress)
        # Probes of one cell and one width are fitted as one batch.
        batches = list(itertools.product(self.cells, activations.by_width()))
        with progress.task(f"fit probes on {variant}", total=len(self.cells) * len(places)) as task:
            for cell, batch in batches:
                heads = [
                    {
                        "reader": "probe",
                        "variant": variant,
                        "location": location,
                        "layer": layer,
                        "injected": self._injected(variant, layer, cell),
                    }
                    for location, layer in batch
                ]
                if cell.empty:
                    yield from self._rows(cell, heads, None)
                else:
                    yield from self._fitted(cell, heads, activations, batch)
                task.advance(len(batch))

    def _fitted(
        self, cell: Cell, heads: list[Row], activations: Activations, places: list[Place]
    ) -> Iterator[Row]:
        settings, device = self.run.config.probe, self.run.device
        X = {split: activations.at(places, part.position).to(device) for split, part in cell.examples.items()}
        y = {split: torch.from_numpy(part.action).to(device) for split, part in cell.examples.items()}
        probes = SoftmaxProbes(settings.l2, settings.max_iterations, settings.tolerance).fit(
            X[FITTED_ON], y[FITTED_ON], self.run.corpus.k, X[CHOSEN_ON], y[CHOSEN_ON]
        )
        facts = [
            {
                "l2": float(probes.l2_[i]),
                "iterations": int(probes.n_iter_[i]),
                "converged": bool(probes.converged_[i]),
                "validation_cross_entropy": float(probes.validation_cross_entropy_[i].min()),
                "fitted_on": len(cell.examples[FITTED_ON]),
            }
            for i in range(len(heads))
        ]
        heads = [head | fact for head, fact in zip(heads, facts, strict=True)]
        return self._rows(cell, heads, probes.log_probabilities(X[TESTED_ON]))

    def _rows(
        self, cell: Cell, heads: list[Row], log_probabilities: Tensor | np.ndarray | None
    ) -> Iterator[Row]:
        """Completes the heads of rows with the cell, and with metrics where there are predictions.

        Args:
            cell: The cell.
            heads: What is told already of every reader `[readers]`.
            log_probabilities: Of the test examples `[readers, examples, actions]`; None leaves it empty.
        """
        test = cell.examples[TESTED_ON]
        place = {"distance": cell.distance, "horizon": cell.horizon, "examples": len(test)}
        columns = {} if log_probabilities is None else self._metrics(cell, log_probabilities)
        for i, head in enumerate(heads):
            yield head | place | {name: column[i] for name, column in columns.items()}

    def _metrics(self, cell: Cell, log_probabilities: Tensor | np.ndarray) -> dict[str, np.ndarray]:
        """Metrics with their intervals, each `[readers]`."""
        test = cell.examples[TESTED_ON]
        scores = score_actions(log_probabilities, test.action)
        values = {name: getattr(scores, field) for field, name in METRICS.items()}
        values["bits"] = (-self._priors[cell.horizon][test.action] - values["cross_entropy"]) / np.log(2)
        document = np.searchsorted(self.documents[TESTED_ON], test.document)
        counts = np.bincount(document, minlength=len(self.documents[TESTED_ON]))
        options: Resampling = {
            "resamples": self.run.config.evaluation.resamples,
            "seed": self.run.config.seed,
        }
        # All metrics of all readers in one call: they share the resamples, which are drawn once.
        each = itertools.chain.from_iterable(values.values())
        sums = [np.bincount(document, weights=value, minlength=len(counts)) for value in each]
        found = bootstrap_ratios(np.stack(sums, axis=1), counts, **options)
        columns: dict[str, np.ndarray] = {}
        for suffix, bounds in (("", found.value), ("_low", found.low), ("_high", found.high)):
            parts = np.split(bounds, len(values))
            columns |= {f"{name}{suffix}": part for name, part in zip(values, parts, strict=True)}
        return columns | {"documents": np.split(found.documents, len(values))[0]}

    def _injected(self, variant: VariantName, layer: int, cell: Cell) -> bool:
        """Whether the variant adds its action for the target where the cell reads, in this layer or below."""
        if variant not in VARIANTS or not VARIANTS[variant].evaluation.needs_scores:
            return False
        conditioned = layer >= self.run.config.conditioning.skip_layers
        return conditioned and cell.distance == 1 and cell.horizon == 1

    @cached_property
    def _priors(self) -> dict[int, np.ndarray]:
        """The prior of every horizon."""
        horizons = self.run.config.probe.horizons
        return {horizon: action_prior(self.run.corpus, horizon) for horizon in horizons}

    def _read(self, variant: VariantName, places: list[Place], progress: Progress) -> Activations:
        """Activations at every position that a cell needs."""
        documents = np.sort(np.concatenate(list(self.documents.values())))
        windows = cut_windows(self.run.corpus, documents, *window_and_stride(self.run))
        positions = [part.position for cell in self.cells for part in cell.examples.values()]
        with progress.task(f"read activations of {variant}", total=len(windows)) as task:
            return read_activations(
                self.run.model(variant),
                VARIANTS[variant].evaluation if variant in VARIANTS else Fixed(),
                self.run.corpus,
                windows,
                np.unique(np.concatenate(positions)),
                places,
                batch_size=self.run.config.evaluation.batch_size,
                precision=self.run.config.training.precision,
                task=task,
            )
