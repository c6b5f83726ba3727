"""What interventions and subnetworks share: the LM run with hooks, the final-layer probe, result files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from probekit.config import VariantName
from probekit.data.windows import Batch, Windows, collate
from probekit.errors import ProbekitError
from probekit.io import atomic_folder, write_json, write_table
from probekit.models.backends import Hook
from probekit.models.conditioning import Conditioned
from probekit.models.locations import hook_name
from probekit.models.mixing import evaluation_mixing
from probekit.probing.activations import HookPoint
from probekit.probing.label_table import labels_digest
from probekit.probing.labels import target_of
from probekit.probing.record import read_probe_record
from probekit.probing.results import Cell, LinearProbe, SavedProbes
from probekit.probing.targets import Target
from probekit.run.run import Run

FINAL_LOCATION = "hook_resid_post"
"""The location that the final-layer probe reads."""

SumsByMetric = dict[str, tuple[np.ndarray, np.ndarray]]
"""By metric, its sums `[..., documents]` and the number of tokens or sentences in them `[documents]`."""


def open_run(
    run: Run | str | Path, settings: Mapping[str, Any] | None, section: Literal["intervene", "subnetwork"]
) -> Run:
    """Opens a run with replaced settings.

    Raises:
        ProbekitError: The run has no LM, or the section names a variant that it has not trained.
    """
    run = Run.at(run, settings)
    run.require_causal()
    run.check_writable()
    variant, known = getattr(run.config, section).variant, ("none", *run.variants)
    if variant not in known:
        raise ProbekitError(
            f"{section}.variant is {variant!r}, which this run has not trained; it has {', '.join(known)}"
        )
    return run


FinalProbe = tuple[HookPoint, LinearProbe, Target]
"""Where a probe reads, the probe, and what it reads."""


def final_layer_probe(run: Run, variant: VariantName) -> FinalProbe:
    """The saved probe in the final layer, right before a sentence.

    Raises:
        ProbekitError: The run has no such probe, its probes read no label of the next sentence, or
            the labels have changed.
    """
    folder, point = run.folder / "probes", (FINAL_LOCATION, run.frozen_lm().layers - 1)
    saved = SavedProbes(folder, variant, run.config.seed)
    record = read_probe_record(run.folder)
    config = record.config
    if record.origin.get("labels") != labels_digest(config):
        raise ProbekitError(
            f"probe.labels {config.probe.labels} has changed since {folder} was made of it; run "
            f"`probekit probe {run.folder}` again"
        )
    target = target_of(run.corpus, config)
    if target.kind != "classes" or target.of_sentences is None or config.probe.anchors != "start":
        raise ProbekitError(
            f"{folder} holds probes of {target.name!r} ({target.kind}, probe.anchors "
            f"{config.probe.anchors}), but causal tests need a class of every next sentence; run "
            "`probekit probe` with the target action, or with classes of sentences"
        )
    probe = saved[Cell(*point, 1)]
    return point, probe.to(run.device), target


class VariantLM:
    """A variant of a run's LM, run with hooks, and the final-layer probe of the next sentence's label.

    Subclasses call `use_hooks` before the first forward pass. `labels` are those of all sentences of the
    corpus: actions, or the labels that were probed.

    Args:
        run: The run; it needs probes of the variant.
        variant: `none`, or a trained variant, conditioned as in evaluation.
        final: Its final-layer probe, if that has been read.

    Raises:
        ProbekitError: The run has no such probe.
    """

    def __init__(self, run: Run, variant: VariantName, final: FinalProbe | None = None) -> None:
        self.run, self.variant, self.device = run, variant, run.device
        self.model, self.mixing = run.model(variant), evaluation_mixing(variant)
        self.corpus = run.corpus_of(variant)
        point, self.probe, target = final or final_layer_probe(run, variant)
        assert target.of_sentences is not None  # noqa: S101 - refused before
        self.target, self.labels = target, target.of_sentences
        self.probe_hook = hook_name(*point)

    def use_hooks(self, names: Sequence[str]) -> None:
        """Prepares forward passes with hooks of these full TransformerLens names."""
        every = dict.fromkeys([*names, *self.model.names, self.probe_hook])
        self.backend = self.run.backend_for([*every], self.variant)

    def read(self, windows: Windows) -> Batch:
        """Windows of the corpus as the variant reads them."""
        return collate(self.corpus, windows).to(self.device)

    def logits(self, read: Conditioned, hooks: Sequence[Hook]) -> Tensor:
        """Next-token logits `[windows, positions, vocabulary]` of a forward pass with hooks."""
        with self.run.autocast():
            logits = self.backend.logits(read.tokens, hooks, read.positions)
        return logits if read.slots is None else read.slots.predictions(logits)

    def run_hooks(self, read: Conditioned, hooks: Sequence[Hook], reads: int) -> None:
        """Runs a forward pass up to the last of the `reads` hooks that change nothing; makes no logits."""
        with self.run.autocast():
            self.backend(read.tokens, hooks, reads, read.positions)


def write_results(folder: Path, tables: Mapping[str, pd.DataFrame], run: Run, notes: list[str]) -> None:
    """Writes tables, and the settings and notes that they come with, in place of an earlier folder."""
    with atomic_folder(folder) as made:
        for name, table in tables.items():
            write_table(made / f"{name}.parquet", table)
        write_json(made / "settings.json", run.config.model_dump(mode="json") | {"notes": notes})
