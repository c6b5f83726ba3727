"""`probekit subnetwork`: which components of the LM the next action's information needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.causal.components import Component, MaskedLM, documents_of
from probekit.causal.intervene import last_probe
from probekit.causal.masks import (
    Candidate,
    Measured,
    Readout,
    Sums,
    choose,
    draw_alike,
    first_alone,
    learn,
    measure,
    objectives,
    probe_values,
    refitted,
    states_of,
)
from probekit.data.windows import Windows, chunks, cut_windows
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import prior_log_probabilities
from probekit.evaluation.perplexity import window_and_stride
from probekit.io import atomic_folder, write_json, write_table
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON
from probekit.probing.results import LinearProbe, read_probe_record
from probekit.progress import Progress, Task
from probekit.run.run import Run
from probekit.statistics import Interval, Resampling, bootstrap_ratios, mean_over_draws

WHOLE, SUBNETWORK, ALONE, RANDOM = "whole", "subnetwork", "alone", "random"
"""Conditions: nothing removed, the learned mask, as many components that are best removed alone, and as many
drawn at random in every layer."""

CONDITIONS = (WHOLE, SUBNETWORK, ALONE)
"""Those of one mask each, in the order of their masks; random ones come behind."""

PROBES = ("bits", "refitted_bits")
"""What the saved probe reads, and one that is fitted again."""

FEW_LOST = 0.5
"""A probe that is fitted again loses little if it loses less than this share of what the first one does,
each as a share of what it had."""


def results_table(sums: Sums, masks: np.ndarray, resampling: Resampling) -> pd.DataFrame:
    """A row for every condition, draw and metric.

    Args:
        sums: By metric; masks in the order of `CONDITIONS`, then one for each draw.
        masks: What they remove `[masks, components]`, bool.
        resampling: How intervals are made.
    """
    rows = [
        {"condition": name, "draw": draw, "metric": metric}
        | {"value": interval.value, "value_low": interval.low, "value_high": interval.high}
        | {"documents": interval.documents}
        for name, draw, metric, interval in _intervals(sums, resampling)
    ]
    table = pd.DataFrame(rows).astype({"draw": "Int64"})
    subnetwork = masks[CONDITIONS.index(SUBNETWORK)]
    # Equal in all draws, as the number of removed components is.
    number = {name: masks[n] for n, name in enumerate(CONDITIONS)} | {RANDOM: masks[-1]}
    shared = {name: (mask & subnetwork).sum() for name, mask in number.items()}
    shared[RANDOM] = (masks[len(CONDITIONS) :] & subnetwork).sum(1).mean()
    return table.assign(
        removed=table.condition.map({name: int(mask.sum()) for name, mask in number.items()}),
        shared=table.condition.map(shared).astype(float),
        components=masks.shape[1],
    )


def cautions(table: pd.DataFrame, masks: np.ndarray) -> list[str]:
    """What speaks against a subnetwork, from its rows and the masks that they are of."""
    subnetwork, drawn = masks[CONDITIONS.index(SUBNETWORK)], masks[len(CONDITIONS) :]
    if not subnetwork.any():
        return ["no mask was better than to remove nothing, on validation documents"]
    found = []
    forced = drawn.all(axis=0) & subnetwork
    if len(drawn) and 2 * forced.sum() >= subnetwork.sum():
        found.append(
            f"{forced.sum()} of the {subnetwork.sum()} components are in every random draw, too, for so few "
            "others are in their layers: over random there is little to see"
        )
    rows = table[table.condition == SUBNETWORK].set_index("metric")
    # As shares of what each had: one that is fitted on few documents has less to lose.
    lost, gone = (rows.value[f"{of}_change"] / (rows.value[f"{of}_change"] - rows.value[of]) for of in PROBES)
    if lost > 0 and gone < FEW_LOST * lost:
        found.append(
            f"the probe loses {lost:.0%} of its bits, but one that is fitted again only {gone:.0%} of its "
            "own: much of it has not gone, but moved"
        )
    over = rows.value_high["refitted_bits_over_random"]
    if np.isnan(over):
        found.append(
            f"over random there is no interval: it takes two draws and two documents, and of draws there are "
            f"{len(drawn)}"
        )
    elif over >= 0:
        found.append(
            "a probe that is fitted again does not lose more than with as many components removed at random "
            "in the same layers"
        )
    return found


def _intervals(sums: Sums, resampling: Resampling) -> Iterator[tuple[str, int | None, str, Interval]]:
    """Conditions, draws (none for the mean over draws), metrics and their values."""
    first, whole, own = (len(CONDITIONS), *(CONDITIONS.index(name) for name in (WHOLE, SUBNETWORK)))
    for metric, (values, counts) in sums.items():
        lines: list[tuple[str, int | None, np.ndarray]] = [
            *((name, None, values[number]) for number, name in enumerate(CONDITIONS)),
            *((RANDOM, draw, drawn) for draw, drawn in enumerate(values[first:])),
        ]
        cells = [(name, draw, metric, line) for name, draw, line in lines]
        cells += [
            (name, draw, f"{metric}_change", line - values[whole])
            for name, draw, line in lines
            if name != WHOLE
        ]
        found = bootstrap_ratios(np.stack([line for *_, line in cells], axis=1), counts, **resampling)
        for number, (name, draw, called, _) in enumerate(cells):
            yield name, draw, called, found[number]
        drawn = values[first:]
        yield RANDOM, None, metric, mean_over_draws(drawn, counts)
        yield RANDOM, None, f"{metric}_change", mean_over_draws(drawn - values[whole], counts)
        # Of the subnetwork alone: the numbers by layer are its own.
        yield SUBNETWORK, None, f"{metric}_over_random", mean_over_draws(values[own] - drawn, counts)


def mask_table(
    components: Sequence[Component], mask: Candidate, alone: Sums, resampling: Resampling
) -> pd.DataFrame:
    """A row for every component.

    Args:
        components: All of them.
        mask: The learned mask.
        alone: What is left when each is removed alone; the last one is of the whole LM.
        resampling: How intervals are made.
    """
    table = pd.DataFrame(
        [{"component": str(c), "kind": c.kind, "layer": c.layer, "head": c.head} for c in components]
    ).astype({"layer": "Int64", "head": "Int64"})
    table["gate"], table["removed"] = mask.gates, mask.removed
    for metric in ("information", "kept_kl"):
        values, counts = alone[metric]
        found = bootstrap_ratios((values[:-1] - values[-1]).T, counts, **resampling)
        name = f"alone_{metric}"
        table[name], table[f"{name}_low"], table[f"{name}_high"] = found.value, found.low, found.high
        table["documents"] = found.documents
    return table


def candidate_table(
    candidates: Sequence[Candidate], chosen: int, objective: np.ndarray, error: np.ndarray
) -> pd.DataFrame:
    """A row for every mask that was tried, with its objective and standard error `[candidates]`."""
    return pd.DataFrame(
        {
            "penalty": [candidate.penalty for candidate in candidates],
            "removed": [int(candidate.removed.sum()) for candidate in candidates],
            "objective": objective,
            "error": error,
            "chosen": np.arange(len(candidates)) == chosen,
        }
    ).astype({"penalty": "float64"})


ALONE_WINDOWS = 128
"""Windows on which every component is removed alone: one pass for each of them."""


@dataclass(frozen=True)
class SubnetworkResults:
    """A learned subnetwork and what it is compared with.

    Attributes:
        table: One row for each condition, draw and metric, with its 95 % interval from resampling test
            documents. Conditions: `whole`, nothing removed; `subnetwork`; `alone`, as many components, those
            that are best removed alone; `random`, as many drawn in every layer, each draw and their mean,
            which has no draw. Metrics: `first_loss`, `rest_loss` and `other_loss` (nats a token, of
            sentences' first tokens, of their others, and of documents' first sentences), `kept_kl` (nats a
            token, from the whole LM's next tokens but for sentences' first ones), and of the last layer's
            probe `information` (KL from the prior of what it tells, in nats), `bits` over the prior, the
            probability of the `true` action, and `accuracy`; `refitted_bits` and the like are those of a
            probe that is fitted again without the components. `_change` is the difference from `whole`,
            `_over_random` that from the mean of random draws; intervals of that mean are over draws and
            documents. `removed` of so many `components` are removed, `shared` of them with the subnetwork.
        mask: One row for each component: its `gate` (1 open), whether it is `removed`, and by how much
            `information` and `kept_kl` change when it is removed alone (on documents to learn on).
        candidates: One row for each penalty: components removed, the objective on validation documents and
            its standard error, and which one was chosen; the one without penalty removes nothing.
        folder: Where it was written.
        notes: What to know of all rows together.
    """

    table: pd.DataFrame
    mask: pd.DataFrame
    candidates: pd.DataFrame
    folder: Path
    notes: list[str]


def subnetwork(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> SubnetworkResults:
    """Learns which components to remove; writes `subnetworks/<variant>/`, in place of what was there.

    Masks are learned on the split "probe" and chosen on "validation"; what is told is of test documents.

    Args:
        run: The run or its folder; its probes are needed.
        settings: Settings to replace, by dotted name, such as `subnetwork.keep`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run has no probes that fit, or a setting does not fit the LM.
    """
    run = Run.at(run, settings)
    run.require("lm")
    chosen, progress = run.config.subnetwork, Progress(quiet=quiet)
    if chosen.variant not in (known := ("none", *run.variants)):
        raise ProbekitError(
            f"subnetwork.variant is {chosen.variant!r}, which this run has not trained; it has "
            f"{', '.join(known)}"
        )
    search = _Search(run, progress)
    candidates, at, value, error = search.learned()
    masks, alone = search.compared(candidates[at])
    sums = search.tested(masks)
    resampling: Resampling = {"resamples": run.config.evaluation.resamples, "seed": run.config.seed}
    table = results_table(sums, masks, resampling)
    mask = mask_table(search.masked.components.all, candidates[at], alone, resampling)
    results = SubnetworkResults(
        table.assign(variant=chosen.variant),
        mask.assign(variant=chosen.variant),
        candidate_table(candidates, at, value, error),
        run.folder / "subnetworks" / chosen.variant,
        cautions(table, masks),
    )
    with atomic_folder(results.folder) as folder:
        write_table(folder / "results.parquet", results.table)
        write_table(folder / "mask.parquet", results.mask)
        write_table(folder / "candidates.parquet", results.candidates)
        write_json(folder / "settings.json", run.config.model_dump(mode="json") | {"notes": results.notes})
    return results


class _Search:
    """The search for a subnetwork: what it is learned, chosen and measured on."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run, self._progress, self._settings = run, progress, run.config.subnetwork
        place, probe = last_probe(run, self._settings.variant)
        # Probes that are fitted again are fitted as that one was.
        self._probing = read_probe_record(run.folder).config.probe
        self.masked = MaskedLM(run, self._settings.variant, place)
        corpus, seed = run.corpus, run.config.seed
        window, stride = window_and_stride(run)
        documents = {
            split: documents_of(corpus, split, self._settings.documents, seed)
            for split in (FITTED_ON, CHOSEN_ON, TESTED_ON)
        }
        self._windows = {
            split: cut_windows(corpus, numbers, window, stride) for split, numbers in documents.items()
        }
        sentences = corpus.sentences(documents[FITTED_ON])
        # A document's first sentence is read nowhere.
        next_ones = np.setdiff1d(sentences, corpus.document_sentences[documents[FITTED_ON]])
        prior = prior_log_probabilities(corpus.actions[next_ones], corpus.k)
        self._readout = Readout(
            LinearProbe(probe.coef.to(run.device), probe.intercept.to(run.device)),
            torch.from_numpy(prior).float().to(run.device),
        )
        self.masked.measure_means(self._windows[FITTED_ON], run.config.evaluation.batch_size, progress)

    def learned(self) -> tuple[list[Candidate], int, np.ndarray, np.ndarray]:
        """All candidates, the number of the chosen one, and their objectives and standard errors."""
        settings, windows = self._settings, self._windows[FITTED_ON]
        candidates = [Candidate(None, np.ones(len(self.masked.components)))]
        with self._progress.task(
            f"{settings.variant}: learn masks", total=len(settings.penalties) * settings.steps
        ) as task:
            for penalty in settings.penalties:
                candidates.append(
                    learn(self.masked, windows, self._readout, settings, penalty, self._run.config.seed, task)
                )
        masks = np.stack([candidate.removed for candidate in candidates])
        measured = self._measured("choose", self._windows[CHOSEN_ON], masks)
        at = choose(candidates, measured, settings.keep)
        value, off = objectives(measured, settings.keep)
        return candidates, at, value, np.linalg.norm(off, axis=1)

    def compared(self, mask: Candidate) -> tuple[np.ndarray, Sums]:
        """All masks to measure, as `CONDITIONS` has them, and what is left without each component alone."""
        settings, seed = self._settings, self._run.config.seed
        windows, components = self._windows[FITTED_ON], self.masked.components.all
        rows = np.random.default_rng(seed).permutation(len(windows))[:ALONE_WINDOWS]
        each = np.concatenate([np.eye(len(components), dtype=bool), np.zeros((1, len(components)), bool)])
        alone = self._measured("remove each alone", windows[np.sort(rows)], each)
        best = first_alone(objectives(alone, settings.keep)[0][:-1], int(mask.removed.sum()))
        nothing = np.zeros_like(best)
        drawn = draw_alike(components, mask.removed, settings.draws, seed)
        return np.stack([nothing, mask.removed, best, *drawn]), alone.sums

    def tested(self, masks: np.ndarray) -> Sums:
        """Every metric on the test documents."""
        measured = self._measured("measure", self._windows[TESTED_ON], masks)
        told = self._refitted(masks, measured.states)
        true = torch.from_numpy(measured.actions)
        counts, documents = measured.sums["bits"][1], len(measured.sums["bits"][1])
        parts = [probe_values(one, true, self._readout.prior.cpu()) for one in told]
        refitted_sums: Sums = {
            f"refitted_{name}": (
                np.stack([np.bincount(measured.document, part[name].double(), documents) for part in parts]),
                counts,
            )
            for name in parts[0]
        }
        return measured.sums | refitted_sums

    def _measured(self, what: str, windows: Windows, masks: np.ndarray) -> Measured:
        with self._task(what, windows, masks) as task:
            return measure(self.masked, windows, self._tensor(masks), self._readout, self._size, task)

    def _refitted(self, masks: np.ndarray, asked: Tensor) -> Tensor:
        """Log-probabilities of probes fitted without the components `[masks, sentences, actions]`."""
        held: dict[str, tuple[Tensor, Tensor]] = {}
        for split in (FITTED_ON, CHOSEN_ON):
            with self._task(f"read the split {split!r}", self._windows[split], masks) as task:
                tensor = self._tensor(masks)
                held[split] = states_of(self.masked, self._windows[split], tensor, self._size, task)
        with self._progress.task(f"{self._settings.variant}: fit probes again", total=len(masks)) as task:
            told = refitted(self._probing, self._run.corpus.k, held[FITTED_ON], held[CHOSEN_ON], asked)
            task.advance(len(masks))
        return told

    def _task(self, what: str, windows: Windows, masks: np.ndarray) -> AbstractContextManager[Task]:
        passes = len(chunks(len(windows), self._size)) * len(masks)
        return self._progress.task(f"{self._settings.variant}: {what}", total=passes)

    @property
    def _size(self) -> int:
        return self._run.config.evaluation.batch_size

    def _tensor(self, masks: np.ndarray) -> Tensor:
        return torch.from_numpy(masks).float().to(self._run.device)
