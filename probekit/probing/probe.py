"""`probekit probe`: a softmax probe for every variant, location, layer, distance and horizon, with its baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.config import VariantName
from probekit.corpus.examples import cut_windows
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import (
    ActionScores,
    fit_bigram,
    prior_log_probabilities,
    score_actions,
)
from probekit.evaluation.ceilings import ceiling_log_probabilities, has_ceiling
from probekit.evaluation.evaluate import METRICS, planner_log_probabilities, window_and_stride
from probekit.evaluation.statistics import Resampling, bootstrap_ratios
from probekit.models.language_model import check_location
from probekit.models.mixing import VARIANTS, Fixed
from probekit.probing.activations import Place, read_activations
from probekit.probing.solvers import SoftmaxProbes
from probekit.probing.targets import Targets, targets
from probekit.progress import Progress
from probekit.run import Run
from probekit.storage import atomic_path, write_json

FITTED_ON, CHOSEN_ON, TESTED_ON = "probe", "validation", "test"
"""The splits that probes use; none of them trained the LM or the planner."""

CELL = ["reader", "variant", "location", "layer", "distance", "horizon"]


@dataclass(frozen=True)
class ProbeResults:
    """What probes and baselines read.

    Attributes:
        table: One row for each reader (probe, prior, bigram, planner, ceilings) and cell; accuracy, top5,
            cross_entropy (nats) and bits (gained over the prior) on test documents, each with `_low` and `_high`.
            `injected` marks positions that carry the target's own action in a conditioned LM. Cells with too few
            examples are empty.
        folder: Where it was written.
    """

    table: pd.DataFrame
    folder: Path

    def best_cells(self) -> pd.DataFrame:
        """The best probe of each variant and location, chosen by cross-entropy on validation documents.

        Cells where the target's own action was injected, and empty ones, take no part.
        """
        probes = self.table[(self.table.reader == "probe") & ~self.table.injected]
        probes = probes[probes.validation_cross_entropy.notna()]
        return probes.loc[probes.groupby(["variant", "location"]).validation_cross_entropy.idxmin()]


def probe(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> ProbeResults:
    """Fits the probe grid of a run and writes it into `probes/`.

    Probes are fitted on the documents of the split "probe", their penalty is chosen on "validation", and they are
    measured on "test"; the LM and the planner were trained on none of these.

    Args:
        run: The run or its folder.
        settings: Settings to replace, by dotted name, such as `probe.distances`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run lacks a stage, or a location, layer or variant that is to be probed.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    run = Run(run.folder, run.config.override(settings or {}))
    run.require("planner")
    places = _places(run)
    progress = Progress(quiet=quiet)
    documents = {split: run.corpus.documents(split) for split in (CHOSEN_ON, TESTED_ON)}
    documents[FITTED_ON] = _enough(run, run.corpus.documents(FITTED_ON))
    grid = _Grid(run, documents)
    rows = list(grid.baselines())
    for variant in run.config.probe.variants:
        rows += grid.probes(variant, places, progress)
    table = pd.DataFrame(rows).sort_values(CELL, kind="stable", ignore_index=True)
    folder = run.folder / "probes"
    folder.mkdir(exist_ok=True)
    with atomic_path(folder / "results.parquet") as path:
        table.to_parquet(path, index=False)
    write_json(
        folder / "settings.json",
        run.config.model_dump(mode="json", include={"seed", "probe", "evaluation"})
        | {"documents": {split: len(numbers) for split, numbers in documents.items()}},
    )
    return ProbeResults(table, folder)


class _Grid:
    """The cells that share documents: examples, baselines and probes of each distance and horizon."""

    def __init__(self, run: Run, documents: dict[str, np.ndarray]) -> None:
        self.run, self.corpus, self.documents = run, run.corpus, documents
        self.cells = {
            (distance, horizon): {
                split: targets(self.corpus, numbers, distance, horizon)
                for split, numbers in documents.items()
            }
            for distance in run.config.probe.distances
            for horizon in run.config.probe.horizons
        }
        train = self.corpus.sentences(self.corpus.documents("train"))
        self.prior = prior_log_probabilities(self.corpus.actions[train], self.corpus.k)

    def baselines(self) -> Iterator[dict[str, Any]]:
        """Rows of the readers that need no activation, on each cell's own test examples."""
        sentences = self.corpus.sentences(self.documents[TESTED_ON])
        planner = planner_log_probabilities(self.run.planner(), self.corpus, self.documents[TESTED_ON])
        for (distance, horizon), examples in self.cells.items():
            test = examples[TESTED_ON]
            row = np.searchsorted(sentences, test.anchor)
            readers = {
                "prior": np.tile(self.prior, (len(row), 1)),
                "bigram": self._bigram(horizon, test),
            }
            if horizon == 1:
                readers["planner"] = planner[row]
            if has_ceiling(self.run.config):
                ceilings = ceiling_log_probabilities(
                    self.run.config, self.corpus, self.documents[TESTED_ON], horizon
                )
                readers |= {name: values[row] for name, values in ceilings.items()}
            for reader, log_probabilities in readers.items():
                scores = score_actions(log_probabilities, test.action)
                yield from self._rows([{"reader": reader}], [scores], distance, horizon)

    def probes(self, variant: VariantName, places: list[Place], progress: Progress) -> list[dict[str, Any]]:
        """Rows of the probes of one variant at all places."""
        activations, index = self._activations(variant, places, progress)
        settings = self.run.config.probe
        rows = []
        with progress.task(f"fit probes on {variant}", total=len(self.cells) * len(places)) as task:
            for (distance, horizon), examples in self.cells.items():
                # Width and location go together: places of one width are solved as one batch.
                for width in sorted({values.shape[1] for values in activations.values()}):
                    batch = [place for place in places if activations[place].shape[1] == width]
                    rows += self._fit(
                        variant, batch, activations, index, distance, horizon, examples, settings
                    )
                    task.advance(len(batch))
        return rows

    def _fit(
        self,
        variant: VariantName,
        places: list[Place],
        activations: dict[Place, Tensor],
        index: np.ndarray,
        distance: int,
        horizon: int,
        examples: dict[str, Targets],
        settings: Any,
    ) -> list[dict[str, Any]]:
        heads = [{"reader": "probe", "variant": variant, "location": name, "layer": n} for name, n in places]
        if min(len(part.action) for part in examples.values()) < MINIMUM_EXAMPLES:
            return list(self._rows(heads, None, distance, horizon))
        X = {
            split: torch.stack(
                [activations[place][np.searchsorted(index, part.position)] for place in places]
            ).to(self.run.device)
            for split, part in examples.items()
        }
        y = {split: torch.from_numpy(part.action).to(self.run.device) for split, part in examples.items()}
        probes = SoftmaxProbes(settings.l2, settings.max_iterations, settings.tolerance).fit(
            X[FITTED_ON], y[FITTED_ON], self.corpus.k, X[CHOSEN_ON], y[CHOSEN_ON]
        )
        scores = score_actions(probes.log_probabilities(X[TESTED_ON]), y[TESTED_ON])
        for i, head in enumerate(heads):
            head |= {
                "l2": float(probes.l2_[i]),
                "iterations": int(probes.n_iter_[i]),
                "converged": bool(probes.converged_[i]),
                "validation_cross_entropy": float(probes.validation_cross_entropy_[i].min()),
                "fitted_on": len(examples[FITTED_ON].action),
            }
        each = [
            ActionScores(scores.correct[i], scores.top5[i], scores.cross_entropy[i])
            for i in range(len(heads))
        ]
        return list(self._rows(heads, each, distance, horizon))

    def _rows(
        self, heads: list[dict[str, Any]], scores: list[ActionScores] | None, distance: int, horizon: int
    ) -> Iterator[dict[str, Any]]:
        """Adds the cell, the metrics and their intervals to the heads of rows; no scores make an empty cell."""
        test = self.cells[distance, horizon][TESTED_ON]
        cell = {"distance": distance, "horizon": horizon, "examples": len(test.action)}
        columns: dict[str, Any] = {}
        if scores is not None:
            document = np.searchsorted(self.documents[TESTED_ON], test.document)
            counts = np.bincount(document, minlength=len(self.documents[TESTED_ON]))
            prior = -self.prior[test.action]
            values = {METRICS[name]: np.stack([getattr(s, name) for s in scores]) for name in METRICS}
            values["bits"] = (prior - values["cross_entropy"]) / np.log(2)
            options: Resampling = {
                "resamples": self.run.config.evaluation.resamples,
                "seed": self.run.config.seed,
            }
            for metric, value in values.items():
                sums = np.stack(
                    [np.bincount(document, weights=v, minlength=len(counts)) for v in value], axis=1
                )
                intervals = bootstrap_ratios(sums, counts, **options)
                columns |= {
                    metric: intervals.value,
                    f"{metric}_low": intervals.low,
                    f"{metric}_high": intervals.high,
                }
                columns["documents"] = intervals.documents
        for i, head in enumerate(heads):
            conditioned = VARIANTS.get(head.get("variant", "none")) is not None
            yield (
                {"variant": None, "location": None, "layer": None}
                | head
                | cell
                | {"injected": conditioned and distance == 1 and horizon == 1}
                | {name: column[i] for name, column in columns.items()}
            )

    def _bigram(self, horizon: int, test: Targets) -> np.ndarray:
        """The best that the current action alone can tell, fitted on all training documents."""
        fitted, chosen = (
            targets(self.corpus, self.corpus.documents(split), 1, horizon)
            for split in ("train", "validation")
        )
        previous = self.corpus.previous_actions
        return fit_bigram(
            previous(fitted.anchor), fitted.action, self.corpus.k, (previous(chosen.anchor), chosen.action)
        ).log_probabilities(previous(test.anchor))

    def _activations(
        self, variant: VariantName, places: list[Place], progress: Progress
    ) -> tuple[dict[Place, Tensor], np.ndarray]:
        """Activations at every position that a cell needs, and those positions, sorted."""
        window, stride = window_and_stride(self.run)
        documents = np.sort(np.concatenate(list(self.documents.values())))
        windows = cut_windows(self.corpus, documents, window, stride)
        positions = np.unique(
            np.concatenate([part.position for cell in self.cells.values() for part in cell.values()])
        )
        mixing = VARIANTS[variant].evaluation if variant in VARIANTS else Fixed()
        with progress.task(f"read activations of {variant}", total=len(windows)) as task:
            activations = read_activations(
                self.run.model(variant),
                mixing,
                self.corpus,
                windows,
                positions,
                places,
                batch_size=self.run.config.evaluation.batch_size,
                precision=self.run.config.training.precision,
                task=task,
            )
        return activations, positions


MINIMUM_EXAMPLES = 20
"""A cell with fewer examples in any of its splits stays empty."""


def _places(run: Run) -> list[Place]:
    settings, layers = run.config.probe, run.bridged.cfg.n_layers
    for location in settings.locations:
        check_location(run.bridged, location, "probe.locations")
    for layer in settings.layers or ():
        if layer >= layers:
            raise ProbekitError(f"probe.layers has {layer}, but the LM's layers are 0 to {layers - 1}")
    for variant in settings.variants:
        if variant != "none" and variant not in run.variants:
            raise ProbekitError(
                f"probe.variants has {variant!r}, which this run has not trained; it has "
                f"{', '.join(['none', *run.variants])}"
            )
    return [(name, layer) for name in settings.locations for layer in settings.layers or range(layers)]


def _enough(run: Run, documents: np.ndarray) -> np.ndarray:
    """Whole documents, drawn at random, until they hold `probe.max_examples` examples."""
    order = np.random.default_rng(run.config.seed).permutation(documents)
    sentences = run.corpus.document_sentences
    before = np.cumsum(sentences[order + 1] - sentences[order] - 1) - (
        sentences[order + 1] - sentences[order] - 1
    )
    return np.sort(order[before < run.config.probe.max_examples])
