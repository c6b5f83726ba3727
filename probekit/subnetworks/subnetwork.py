"""`probekit subnetwork`: which components of the LM the next action's information needs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.corpus.examples import Windows, chunks, cut_windows
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import prior_log_probabilities
from probekit.evaluation.perplexity import window_and_stride
from probekit.evaluation.statistics import Resampling
from probekit.interventions.readout import last_probe
from probekit.probe_record import read_probe_record
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON
from probekit.probing.saved import LinearProbe
from probekit.progress import Progress, Task
from probekit.run import Run
from probekit.storage import atomic_folder, write_json
from probekit.subnetworks.controls import draw_alike, first_alone, refitted, states_of
from probekit.subnetworks.learning import Candidate, choose, learn, objectives
from probekit.subnetworks.masked import MaskedLM, documents_of
from probekit.subnetworks.measures import Measured, Readout, Sums, measure, probe_values
from probekit.subnetworks.results import candidate_table, cautions, mask_table, results_table
from probekit.table_files import write_table

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
