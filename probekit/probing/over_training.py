"""`probekit probe --checkpoints`: the same grid at every checkpoint, to see when a plan can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from probekit import distributed
from probekit.errors import ProbekitError
from probekit.io import read_json, write_table
from probekit.probing.probe import ProbeResults, probe
from probekit.probing.results import SETTINGS, read_probe_record
from probekit.probing.unfinished import origin
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.run.stages import stages_of


@dataclass(frozen=True)
class TrainingProbes:
    """What probes read at every checkpoint of a stage.

    Attributes:
        table: The rows of `ProbeResults.table`, with the stage's `step` behind which they were read.
        stage: The stage.
        path: Where the table was written.
        losses: The stage's losses in training, by step.
        notes: Lines to tell the user.
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
    same settings is not probed again. Examples are the same at every step, and so are seeds.

    Args:
        run: The run or its folder.
        settings: Settings to replace, by dotted name. Without `probe.variants`, what the stage trains is
            read: `none` of the stage `lm`, the variant of an adapter's.
        stage: `lm`, or `adapter/` and a variant; None: the first one that keeps checkpoints.
        quiet: Show no progress.

    Raises:
        ProbekitError: No such checkpoints are kept, or as `probe` raises.
    """
    run = Run.at(run)
    stage = _stage(run, stage)
    wanted = {"probe.variants": ["none" if stage == "lm" else stage.removeprefix("adapter/")]}
    wanted |= settings or {}
    progress, kept = Progress(quiet=quiet), run.checkpoints(stage)
    tables, notes = [], dict[str, None]()
    with progress.task(f"probe checkpoints of {stage}", total=len(kept)) as task:
        for step, folder in kept.items():
            found = _probed(Run.at(folder, wanted))
            tables.append(found.table.assign(step=step))
            notes |= dict.fromkeys(found.notes)
            task.advance(note=f"step {step:,}")
    table = pd.concat(tables, ignore_index=True)
    results = TrainingProbes(table, stage, run.probes_file(stage), run.losses_of(stage), [*notes])
    if distributed.is_first():
        write_table(results.path, results.table)
    return results


def _probed(run: Run) -> ProbeResults:
    """The results of a checkpoint, as they are if they are those of its settings."""
    folder = run.folder / "probes"
    if (folder / SETTINGS).exists():
        record, recorded = read_probe_record(run.folder), read_json(folder / SETTINGS)
        wanted = run.config.model_dump(mode="json") | {"of": origin(run)}
        if all(recorded.get(name) == value for name, value in wanted.items()):
            return ProbeResults(run.probes(), folder, record.notes)
    return probe(run, quiet=True)


def _stage(run: Run, stage: str | None) -> str:
    """The stage whose checkpoints are probed."""
    read = [name for name in stages_of(run.config) if name == "lm" or name.startswith("adapter/")]
    kept = [name for name in read if run.checkpoints(name)]
    if not kept:
        raise ProbekitError(
            f"{run.folder} keeps no checkpoints; train a run that does, with --training.lm.checkpoints 10 or "
            "--training.adapter.checkpoints 10"
        )
    if stage is not None and stage not in kept:
        raise ProbekitError(
            f"--stage is {stage!r}, of which no checkpoints are kept; there are {', '.join(kept)}"
        )
    return stage or kept[0]
