"""`probekit subnetwork`: which components of the LM carry the information about the next action?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.causal.components import Component, MaskedLM
from probekit.causal.masks import (
    Candidate,
    Measured,
    best_removed_alone,
    choose,
    draw_random_masks,
    learn,
    masked_states,
    measure,
    objectives,
    probe_metrics,
    refit_probes,
)
from probekit.causal.variant_lm import SumsByMetric, open_run, write_results
from probekit.data.windows import Windows, chunks, cut_windows
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import prior_log_probabilities
from probekit.evaluation.perplexity import window_and_stride
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON
from probekit.probing.record import read_probe_record
from probekit.probing.targets import NO_LABEL
from probekit.progress import Progress, Task
from probekit.run.run import Run
from probekit.statistics import Resampling, bootstrap_ratios, mean_over_draws

WHOLE, SUBNETWORK, ALONE, RANDOM = "whole", "subnetwork", "alone", "random"
"""Conditions: nothing removed, the learned mask, as many components that are best removed alone, and as many
drawn at random in every layer."""

CONDITIONS = (WHOLE, SUBNETWORK, ALONE)
"""Conditions of one mask each, in the order of their masks; the masks of random draws follow."""

ALONE_WINDOWS = 128
"""Windows on which every component is removed alone, which takes a forward pass for each component."""

SMALL_LOSS = 0.5
"""A refitted probe loses little if its relative loss of bits is below this share of the saved probe's."""


@dataclass(frozen=True)
class SubnetworkResults:
    """A learned subnetwork and what it is compared with.

    Attributes:
        table: One row for each condition, draw and metric, with its 95 % interval from resampling test
            documents. Conditions: `whole`, nothing removed; `subnetwork`; `alone`, as many components, those
            that are best removed alone; `random`, as many drawn in every layer: each draw, and their mean,
            which has no draw. Metrics: `first_loss`, `rest_loss` and `other_loss` (nats per token, of
            sentences' first tokens, of their others, and of documents' first sentences), `kept_kl` (nats a
            token, from the whole LM's next tokens, except sentences' first ones), and of the final-layer
            probe `information` (KL from the prior to its prediction, in nats), `bits` over the prior, the
            probability of the `true` label, and `accuracy`; `refitted_bits` and the like are those of a
            probe fitted again without the components. `_change` is the difference from `whole`,
            `_over_random` that from the mean of random draws; intervals of that mean are over draws and
            documents. `removed` of `components` are removed, `shared` of them with the subnetwork.
        mask: One row for each component: its `gate` (1 is open), whether it is `removed`, and by how much
            `information` and `kept_kl` change when it is removed alone (on documents to learn on).
        candidates: One row for each penalty: components removed, the objective on validation documents and
            its standard error, and which one was chosen; the one without penalty removes nothing.
        folder: Where it was written.
        notes: Remarks on all rows together.
    """

    table: pd.DataFrame
    mask: pd.DataFrame
    candidates: pd.DataFrame
    folder: Path
    notes: list[str]


def subnetwork(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> SubnetworkResults:
    """Learns which components to remove; writes `subnetworks/<variant>/`, in place of earlier results.

    Masks are learned on the split "probe", chosen on "validation" and measured on "test".

    Args:
        run: The run or its folder; it needs probes of the variant.
        settings: Settings to replace, by dotted name, such as `subnetwork.keep`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run has no suitable probes, or a setting does not fit the LM.
    """
    run = open_run(run, settings, "subnetwork")
    variant = run.config.subnetwork.variant
    search = _Search(run, Progress(quiet=quiet))
    candidates, chosen, objective, error = search.learn()
    masks, alone = search.compared_masks(candidates[chosen])
    resampling = run.config.resampling
    table = results_table(search.test(masks), masks, resampling)
    candidate_table = pd.DataFrame(
        {
            "penalty": [candidate.penalty for candidate in candidates],
            "removed": [int(candidate.removed.sum()) for candidate in candidates],
            "objective": objective,
            "error": error,
            "chosen": np.arange(len(candidates)) == chosen,
        }
    ).astype({"penalty": "float64"})
    tables = {
        "results": table.assign(variant=variant),
        "mask": mask_table(search.components, candidates[chosen], alone, resampling).assign(variant=variant),
        "candidates": candidate_table,
    }
    folder, notes = run.folder / "subnetworks" / variant, checks(table, masks)
    write_results(folder, tables, run, notes)
    return SubnetworkResults(tables["results"], tables["mask"], candidate_table, folder, notes)


class _Search:
    """Learns masks, chooses one, and measures it beside its controls."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run, self._progress, self._settings = run, progress, run.config.subnetwork
        self._masked = MaskedLM(run, self._settings.variant)
        self.components = self._masked.components.all
        corpus, (window, stride) = run.corpus, window_and_stride(run)
        documents = {split: self._draw_documents(split) for split in (FITTED_ON, CHOSEN_ON, TESTED_ON)}
        self._windows = {
            split: cut_windows(corpus, numbers, window, stride) for split, numbers in documents.items()
        }
        # Documents' first sentences are not predicted.
        first = corpus.document_sentences[documents[FITTED_ON]]
        sentences = np.setdiff1d(corpus.sentences(documents[FITTED_ON]), first)
        labels, classes = self._masked.labels[sentences], self._masked.target.classes
        prior = prior_log_probabilities(labels[labels != NO_LABEL], classes)
        self._prior = torch.from_numpy(prior).float().to(run.device)
        self._batch_size = run.config.evaluation.batch_size
        self._masked.measure_means(self._windows[FITTED_ON], self._batch_size, progress)

    def _draw_documents(self, split: str) -> np.ndarray:
        """At most `subnetwork.documents` documents of a split, in order."""
        documents = self._run.corpus.documents(split)
        if not len(documents):
            raise ProbekitError(
                f"the corpus has no documents in the split {split!r}; build it with a "
                f"corpus.{split}_fraction above 0"
            )
        drawn = np.random.default_rng(self._run.config.seed).permutation(documents)
        return np.sort(drawn[: self._settings.documents])

    def learn(self) -> tuple[list[Candidate], int, np.ndarray, np.ndarray]:
        """All candidates, the number of the chosen one, their objectives and the standard errors of these."""
        settings, seed = self._settings, self._run.config.seed
        candidates = [Candidate(None, np.ones(len(self.components)))]
        total = len(settings.penalties) * settings.steps
        with self._progress.task(f"{settings.variant}: learn masks", total=total) as task:
            for penalty in settings.penalties:
                windows = self._windows[FITTED_ON]
                found = learn(self._masked, windows, self._prior, settings, penalty, seed, task)
                candidates.append(found)
        masks = np.stack([candidate.removed for candidate in candidates])
        sums = self._measure("choose", self._windows[CHOSEN_ON], masks).sums
        objective, deviation = objectives(sums, settings.keep)
        chosen = choose(candidates, sums, settings.keep)
        return candidates, chosen, objective, np.linalg.norm(deviation, axis=1)

    def compared_masks(self, mask: Candidate) -> tuple[np.ndarray, SumsByMetric]:
        """All masks to measure, in the order of `CONDITIONS`, and metrics without each component alone."""
        settings, seed, count = self._settings, self._run.config.seed, len(self.components)
        windows = self._windows[FITTED_ON]
        rows = np.sort(np.random.default_rng(seed).permutation(len(windows))[:ALONE_WINDOWS])
        each = np.concatenate([np.eye(count, dtype=bool), np.zeros((1, count), bool)])
        alone = self._measure("remove each alone", windows[rows], each).sums
        objective, _ = objectives(alone, settings.keep)
        best = best_removed_alone(objective[:-1], int(mask.removed.sum()))
        random = draw_random_masks(self.components, mask.removed, settings.draws, seed)
        return np.stack([np.zeros_like(best), mask.removed, best, *random]), alone

    def test(self, masks: np.ndarray) -> SumsByMetric:
        """Every metric on the test documents; probes are fitted again as the saved ones were."""
        measured = self._measure("measure", self._windows[TESTED_ON], masks)
        states: dict[str, tuple[Tensor, Tensor]] = {}
        for split in (FITTED_ON, CHOSEN_ON):
            with self._task(f"read the split {split!r}", self._windows[split], masks) as task:
                states[split] = masked_states(
                    self._masked, self._windows[split], self._tensor(masks), self._batch_size, task
                )
        probing = read_probe_record(self._run.folder).config.probe
        with self._progress.task(f"{self._settings.variant}: fit probes again", total=len(masks)) as task:
            classes = self._masked.target.classes
            log_p = refit_probes(probing, classes, states[FITTED_ON], states[CHOSEN_ON], measured.states)
            task.advance(len(masks))
        labels, prior = torch.from_numpy(measured.labels), self._prior.cpu()
        by_mask = [probe_metrics(own, labels, prior) for own in log_p]
        sums, (_, counts) = dict(measured.sums), measured.sums["bits"]
        for name in by_mask[0]:
            totals = [
                np.bincount(measured.document, values[name].double(), len(counts)) for values in by_mask
            ]
            sums[f"refitted_{name}"] = np.stack(totals), counts
        return sums

    def _measure(self, what: str, windows: Windows, masks: np.ndarray) -> Measured:
        with self._task(what, windows, masks) as task:
            return measure(self._masked, windows, self._tensor(masks), self._prior, self._batch_size, task)

    def _task(self, what: str, windows: Windows, masks: np.ndarray) -> AbstractContextManager[Task]:
        passes = len(chunks(len(windows), self._batch_size)) * len(masks)
        return self._progress.task(f"{self._settings.variant}: {what}", total=passes)

    def _tensor(self, masks: np.ndarray) -> Tensor:
        return torch.from_numpy(masks).float().to(self._run.device)


def results_table(sums: SumsByMetric, masks: np.ndarray, resampling: Resampling) -> pd.DataFrame:
    """A row for every condition, draw and metric, from masks in the order of `CONDITIONS`, then of draws.

    Masks are what is removed `[masks, components]`, bool.
    """
    rows: list[dict[str, Any]] = []
    for metric, (values, counts) in sums.items():
        whole, own, drawn = values[0], values[CONDITIONS.index(SUBNETWORK)], values[len(CONDITIONS) :]
        lines: list[tuple[str, int | None, np.ndarray]] = [
            *((name, None, values[number]) for number, name in enumerate(CONDITIONS)),
            *((RANDOM, draw, line) for draw, line in enumerate(drawn)),
        ]
        cells = [(name, draw, metric, line) for name, draw, line in lines]
        cells += [(name, draw, f"{metric}_change", line - whole) for name, draw, line in lines[1:]]
        found = bootstrap_ratios(np.stack([line for *_, line in cells], axis=1), counts, **resampling)
        intervals = [(*cell[:3], found[number]) for number, cell in enumerate(cells)]
        over_draws = [
            (RANDOM, metric, drawn),
            (RANDOM, f"{metric}_change", drawn - whole),
            # Of the subnetwork alone, whose numbers of components by layer the draws have.
            (SUBNETWORK, f"{metric}_over_random", own - drawn),
        ]
        intervals += [
            (name, None, called, mean_over_draws(line, counts)) for name, called, line in over_draws
        ]
        rows += [
            {"condition": name, "draw": draw, "metric": called, **interval.columns()}
            for name, draw, called, interval in intervals
        ]
    table = pd.DataFrame(rows).astype({"draw": "Int64"})
    subnetwork, random = masks[CONDITIONS.index(SUBNETWORK)], masks[len(CONDITIONS) :]
    by_condition = {name: masks[n] for n, name in enumerate(CONDITIONS)}
    # All draws remove equally many.
    removed = {name: int(mask.sum()) for name, mask in (by_condition | {RANDOM: random[-1]}).items()}
    shared = {name: float((mask & subnetwork).sum()) for name, mask in by_condition.items()}
    shared[RANDOM] = float((random & subnetwork).sum(1).mean())
    return table.assign(
        removed=table.condition.map(removed),
        shared=table.condition.map(shared),
        components=masks.shape[1],
    )


def mask_table(
    components: Sequence[Component], mask: Candidate, alone: SumsByMetric, resampling: Resampling
) -> pd.DataFrame:
    """A row for every component; `alone` has metrics without each one alone, and last the whole LM's."""
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


def checks(table: pd.DataFrame, masks: np.ndarray) -> list[str]:
    """Notes on what speaks against a subnetwork, from its table and masks."""
    subnetwork, drawn = masks[CONDITIONS.index(SUBNETWORK)], masks[len(CONDITIONS) :]
    if not subnetwork.any():
        return ["no mask was better than to remove nothing, on validation documents"]
    notes = []
    forced = drawn.all(axis=0) & subnetwork
    if 2 * forced.sum() >= subnetwork.sum():
        notes.append(
            f"{forced.sum()} of the {subnetwork.sum()} components are in every random draw too, because "
            "their layers have few others: the comparison with random masks shows little"
        )
    rows = table[table.condition == SUBNETWORK].set_index("metric")
    # Relative losses, since a probe that is fitted on few documents has less to lose.
    lost, lost_again = (
        rows.value[f"{name}_change"] / (rows.value[f"{name}_change"] - rows.value[name])
        for name in ("bits", "refitted_bits")
    )
    if lost > 0 and lost_again < SMALL_LOSS * lost:
        notes.append(
            f"the probe loses {lost:.0%} of its bits, but one that is fitted again only {lost_again:.0%}: "
            "much of the information is not gone, but moved"
        )
    over = rows.value_high["refitted_bits_over_random"]
    if np.isnan(over):
        notes.append(
            "the comparison with random masks has no interval, which needs two draws and two documents; "
            f"subnetwork.draws is {len(drawn)}"
        )
    elif over >= 0:
        notes.append(
            "a probe that is fitted again does not lose more than with as many components removed at random "
            "in the same layers"
        )
    return notes
