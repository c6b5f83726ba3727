"""`probekit probe --checkpoints`: repeats a grid of probes at every checkpoint of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from probekit import distributed
from probekit.config import setting_names, setting_value
from probekit.errors import ProbekitError
from probekit.io import write_table
from probekit.probing.probe import ProbeResults, defaults_of, origin, probe
from probekit.probing.record import SETTINGS, read_probe_record
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.run.stages import stages_of


@dataclass(frozen=True)
class TrainingProbes:
    """Results of probes at every checkpoint of a stage.

    Attributes:
        table: The rows of `ProbeResults.table`, with the stage's `step` of their checkpoint.
        stage: The stage.
        path: Where the table was written.
        losses: The stage's losses in training, by step; none of published checkpoints.
        notes: Lines to show the user.
    """

    table: pd.DataFrame
    stage: str
    path: Path
    losses: pd.DataFrame
    notes: list[str]


def probe_checkpoints(
    run: Run | str | Path,
    settings: Mapping[str, Any] | None = None,
    stage: str | None = None,
    *,
    quiet: bool = False,
) -> TrainingProbes:
    """Probes every checkpoint of a stage with one grid, and gathers the results.

    Each checkpoint is a run of its own and keeps its own results in `probes/`; one that was probed with the
    same settings is not probed again. Examples are the same at every step, and so are seeds; of published
    checkpoints (`prepare`), those with another tokenizer have the same documents alone.

    Args:
        run: The run or its folder.
        settings: Settings to replace, by dotted name. `probe.variants` defaults to what the stage trains:
            `none` for the stage `lm`, the variant for that of an adapter.
        stage: `lm`, or `adapter/` and a variant; None: the first one that keeps checkpoints.
        quiet: Show no progress.

    Raises:
        ProbekitError: No such checkpoints are kept, or as `probe` raises.
    """
    run = Run.at(run)
    stage = _stage(run, stage)
    # The run's settings of today, and not those of when its checkpoints were made.
    own = (name for name in setting_names() if name.split(".")[0] in ("device", "evaluation", "probe"))
    wanted = {name: setting_value(run.config, name) for name in own}
    wanted["probe.variants"] = ["none" if stage == "lm" else stage.removeprefix("adapter/")]
    wanted |= settings or {}
    progress, kept = Progress(quiet=quiet), run.checkpoints(stage)
    tables, notes = [], dict[str, None]()
    with progress.task(f"probe checkpoints of {stage}", total=len(kept)) as task:
        for step, folder in kept.items():
            found = _probed_checkpoint(Run.at(folder, wanted))
            tables.append(found.table.assign(step=step))
            notes |= dict.fromkeys(found.notes)
            task.advance(note=f"step {step:,}")
    table = pd.concat(tables, ignore_index=True)
    results = TrainingProbes(table, stage, run.probes_file(stage), run.losses_of(stage), [*notes])
    if distributed.is_first():
        write_table(results.path, results.table)
    return results


def _probed_checkpoint(run: Run) -> ProbeResults:
    """The results of a checkpoint; those that exist are used if they have the same settings and origin."""
    if (run.folder / "probes" / SETTINGS).exists():
        record = read_probe_record(run.folder)
        wanted = run.config.override(defaults_of(record.kind, run.config.probe))
        if (record.config, record.origin) == (wanted, origin(run)):
            return ProbeResults(run.probes(), run.folder / "probes", record.notes)
    return probe(run, quiet=True)


def _stage(run: Run, stage: str | None) -> str:
    """The stage whose checkpoints are probed."""
    read = [name for name in stages_of(run.config) if name == "lm" or name.startswith("adapter/")]
    kept = [name for name in read if run.checkpoints(name)]
    if not kept:
        raise ProbekitError(
            f"{run.folder} keeps no checkpoints; train a run that does, with --training.lm.checkpoints 10 or "
            "--training.adapter.checkpoints 10, or give published ones of --model as --revisions"
        )
    if stage is not None and stage not in kept:
        raise ProbekitError(
            f"--stage is {stage!r}, of which no checkpoints are kept; there are {', '.join(kept)}"
        )
    return stage or kept[0]
