"""`probekit probe`: fits and scores probes of a run, and repeats the grid at every checkpoint of a training.

Finished parts of an interrupted probing are kept, and not repeated while settings and weights are the same.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit import distributed
from probekit.config import ProbedName
from probekit.errors import ProbekitError
from probekit.io import atomic_folder, read_metadata, read_tensors, write_json, write_table, write_tensors
from probekit.models.conditioning import CONDITIONINGS, conditioned_location
from probekit.models.hook_points import BEFORE, OUTSIDE_BLOCKS, per_layer
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import Activations, HookPoint, Reader, Store, stacks_of, write_store
from probekit.probing.baselines import baseline_sums
from probekit.probing.grid import (
    CHOSEN_ON,
    CLOSED_FORM,
    FITTED_ON,
    TESTED_ON,
    FitJob,
    Grid,
    control_task,
    document_numbers,
    fit,
    make_grid,
    score,
)
from probekit.probing.results import SETTINGS, DocumentSums, Facts, probes_file, read_probe_record, table_of
from probekit.probing.targets import Target, find_target
from probekit.progress import Progress
from probekit.run.folder import digest_of
from probekit.run.run import Run
from probekit.run.stages import stages_of
from probekit.statistics import Resampling

Probed = tuple[list[DocumentSums], dict[str, Tensor]]
"""Scores of probes, and the weights of those that are linear by the names they are saved under."""


@dataclass(frozen=True)
class ProbeResults:
    """Results of probes and baselines.

    Attributes:
        table: One row for each reader (probes, baselines, ceilings) and cell, see `results.COLUMNS`. Metrics
            are on test documents, with `_low` and `_high`: accuracy, top5, cross_entropy (nats), bits (gained
            over the prior), shortfall (bits below the ceiling, where one is known), selectivity (accuracy
            less that on the control task), gain (bits over the strongest model-free baseline, `gain_over`;
            its intervals hold for all cells together). `injected` marks cells where the target's own action
            had been added by the time of the reading. Cells with too few examples are empty.
        folder: Where it was written.
        notes: Lines to show the user.
    """

    table: pd.DataFrame
    folder: Path
    notes: list[str] = field(default_factory=list)

    def best_cells(self) -> pd.DataFrame:
        """The best cell of each variant, location, solver and horizon, a row for each seed.

        It is chosen by cross-entropy on validation documents, averaged over seeds. Empty cells, and those
        where the target's own action was injected, are left out.
        """
        probes = self.table[(self.table.reader == "probe") & ~self.table.injected]
        probes = probes[probes.validation_cross_entropy.notna()]
        of = ["variant", "location", "solver", "horizon"]
        cell = [*of, "layer", "distance"]
        means = probes.groupby(cell, sort=False).validation_cross_entropy.mean().reset_index()
        best = means.loc[means.groupby(of, sort=False).validation_cross_entropy.idxmin(), cell]
        return probes.merge(best, on=cell)


def probe(
    run: Run | str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    store: bool = False,
    quiet: bool = False,
) -> ProbeResults:
    """Fits the probe grid of a run and writes it into `probes/`, replacing what was there.

    Probes are fitted on the documents of the split "probe", chosen on "validation" and measured on "test";
    the LM and the planner were trained on none of these. An interrupted probing continues after the last
    variant and seed that it finished, if settings and weights are the same.

    Args:
        run: The run or its folder; a corpus and an LM are enough.
        settings: Settings to replace, by dotted name, such as `probe.distances`.
        store: Keep activations in `activations/`, and read them from there if they exist.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run lacks a stage, a location, layer or variant that is to be probed, or examples.
    """
    run = Run.at(run, settings)
    run.check_writable()
    run.require("lm")
    config = run.config.probe
    known = ["none", "random", *run.variants]
    for variant in config.variants:
        if variant not in known:
            raise ProbekitError(
                f"probe.variants has {variant!r}, which this run has not trained; it has {', '.join(known)}"
            )
    points = _hook_points(run)
    target = find_target(run.corpus, config.target, config.labels)
    grids = _grids(run, target)
    progress = Progress(quiet=quiet)
    shared = next(iter(grids.values()))
    with progress.task("score baselines"):
        scored = baseline_sums(run, shared)
    weights: dict[Path, dict[str, Tensor]] = {}
    finished = _FinishedParts(run)
    results = run.folder / "probes"
    for seed, grid in grids.items():
        embedding = partial(_token_embedding, run, grid, seed, progress)
        scored += finished.once(f"token-embedding-seed{seed}", "none", embedding)[0]
        for variant in config.variants:
            probed = partial(_probed, run, grid, variant, points, seed, progress, store=store)
            sums, kept = finished.once(f"{variant}-seed{seed}", variant, probed)
            scored += sums
            weights[probes_file(Path(), variant, seed)] = kept

    empty: list[Facts] = [
        {"reader": "probe", "solver": solver, "variant": variant, "seed": seed, "location": location}
        | {"layer": layer, "distance": distance, "horizon": horizon, "examples": count}
        for (distance, horizon), count in shared.empty.items()
        for seed in grids
        for variant in config.variants
        for solver in config.solvers
        for location, layer in points
    ]
    counts = np.bincount(document_numbers(shared.examples[TESTED_ON].document))
    resampling = Resampling(resamples=run.config.evaluation.resamples, seed=run.config.seed)
    table = table_of(scored, counts, empty, resampling).assign(target=target.name)
    constant = {
        f"constant activations, which hold no information: {known['location']}, layer {known['layer']}, "
        f"distance {known['distance']} ({known['variant'] or known['reader']})"
        for sums in scored
        for known in sums.readers
        if known.get("constant")
    }
    notes = [*shared.notes, *sorted(constant)]
    if distributed.is_first():
        documents = {
            seed: {split: len(np.unique(e.document)) for split, e in grid.examples.items()}
            for seed, grid in grids.items()
        }
        with atomic_folder(results) as folder:
            for file, tensors in weights.items():
                if tensors:
                    write_tensors(folder / file, tensors)
            write_table(folder / "results.parquet", table)
            record = {"notes": notes, "of": origin(run), "documents": documents}
            write_json(folder / SETTINGS, run.config.model_dump(mode="json") | record)
        finished.forget()
    distributed.wait()
    return ProbeResults(table, results, notes)


def _hook_points(run: Run) -> list[HookPoint]:
    """Every location at every layer of the settings; one outside the blocks at the nearest layer."""
    settings, layers = run.config.probe, run.frozen_lm().layers
    conditioning = run.config.conditioning
    conditioned = conditioned_location(conditioning)
    for location in settings.locations:
        run.frozen_lm().architecture.check(location.removesuffix(BEFORE), "probe.locations")
        if location.endswith(BEFORE) and conditioned is None:
            raise ProbekitError(
                f"probe.locations has {location!r}, but with conditioning.kind {conditioning.kind!r} nothing "
                f"is added to activations; give it without {BEFORE!r}"
            )
        if location.endswith(BEFORE) and location != f"{conditioned}{BEFORE}":
            raise ProbekitError(
                f"probe.locations has {location!r}, but actions are added at {conditioned!r} "
                f"(conditioning); only {conditioned}{BEFORE} differs from its hook"
            )
    for layer in settings.layers or ():
        if layer >= layers:
            raise ProbekitError(f"probe.layers has {layer}, but the LM's layers are 0 to {layers - 1}")
    nearest = dict(zip(OUTSIDE_BLOCKS, (0, layers - 1), strict=True))
    return [
        (location, layer)
        for location in settings.locations
        for layer in (
            settings.layers or range(layers)
            if per_layer(location)
            else [nearest[location.removesuffix(BEFORE)]]
        )
    ]


def _grids(run: Run, target: Target) -> dict[int, Grid]:
    """A grid for every seed; they differ in the documents drawn to fit on and to choose on."""
    config = run.config.probe
    seeds = config.seeds or (run.config.seed,)
    grids = {seed: make_grid(run.corpus, config, target, seed) for seed in seeds}
    if len({(grid.distances, grid.horizons) for grid in grids.values()}) > 1:
        raise ProbekitError(
            f"probe.max_examples is {config.max_examples}, so few that distances and horizons are empty for "
            "some of probe.seeds and not for others; raise it, or lower probe.distances and probe.horizons"
        )
    return grids


def _token_embedding(run: Run, grid: Grid, seed: int, progress: Progress) -> Probed:
    """The baseline that knows the token at the position and nothing before it: probes on its embedding."""
    solvers = run.config.probe.solvers
    # Softmax probes, unless no solver of the grid holds its examples: then they are not held here either.
    solver = solvers[0] if CLOSED_FORM.issuperset(solvers) else "softmax"
    plain = {"probe.control": False, "probe.code_length": False, "probe.solvers": [solver]}
    points, name = [("hook_embed", 0)], "token embedding"
    scored, _ = _probed(run.with_settings(plain), grid, "none", points, seed, progress, name=name)
    for sums in scored:
        sums.readers = [known | {"reader": name, "variant": None} for known in sums.readers]
    return scored, {}


def _probed(
    run: Run,
    grid: Grid,
    variant: ProbedName,
    points: Sequence[HookPoint],
    seed: int,
    progress: Progress,
    *,
    name: str | None = None,
    store: bool = False,
) -> Probed:
    """Reads, fits and scores all hook points of a variant, in as few passes as memory allows."""
    config = run.config.probe
    folder = run.folder / "activations" / f"{variant}-seed{seed}"
    if store:
        write_store(Reader(run, variant, points, grid.distances, seed), grid.examples, folder, progress)
    control = control_task(run.corpus, grid, seed) if config.control else None
    facts: Facts = {"reader": "probe", "variant": variant, "seed": seed}
    scored: list[DocumentSums] = []
    weights: dict[str, Tensor] = {}
    for group in _groups(run, grid, points):
        activations: Activations
        if store:
            activations = Store(folder, stacks_of(group, run.locations), run.device)
        else:
            activations = Reader(run, variant, group, grid.distances, seed)
        job = FitJob(grid, config, control, seed, run.device, progress, name or variant)
        fitted = fit(activations, job)
        scored += score(activations, job, fitted, facts)
        for batch in fitted:
            weights |= batch.weights(activations.stacks, grid)
    _mark_injected(run, grid, variant, points, scored)
    return scored, weights


def _groups(run: Run, grid: Grid, points: Sequence[HookPoint]) -> Iterator[list[HookPoint]]:
    """Hook points that are read together: their examples, or sums, stay within `probe.memory`."""
    config = run.config.probe
    examples = len(grid.examples[FITTED_ON]) + len(grid.examples[CHOSEN_ON])
    closed_form = CLOSED_FORM.issuperset(config.solvers)
    sums = grid.target.classes * (len(grid.horizons) + config.control)
    group: list[HookPoint] = []
    held = 0
    for point in points:
        width = run.locations[point[0].removesuffix(BEFORE)]
        # The sums are float64, and held once more by every solver.
        numbers = 2 * (1 + len(config.solvers)) * (width + sums) if closed_form else examples
        size = 4 * len(grid.distances) * width * numbers
        if group and held + size > config.memory * 1e9:
            yield group
            group, held = [], 0
        group.append(point)
        held += size
    yield group


def _mark_injected(
    run: Run, grid: Grid, variant: ProbedName, points: Sequence[HookPoint], scored: Sequence[DocumentSums]
) -> None:
    """Marks the rows of probes whose activations already depended on the target's own action.

    Where the target is no sentence's own, such as a document's type, any planned action can reveal it.
    """
    changed: set[HookPoint] = set()
    if variant in VARIANTS and VARIANTS[variant].evaluation.needs_scores:
        changed = Reader(run, variant, points, grid.distances).changed_by_conditioning()
    lag = CONDITIONINGS[run.config.conditioning.kind].lag
    test = grid.examples[TESTED_ON]
    for known in (known for sums in scored for known in sums.readers):
        known["injected"] = (known["location"], known["layer"]) in changed
        if known["injected"] and grid.target.of_sentences is not None:
            first = run.corpus.first_token[test.sentence + known["horizon"] - 1]
            known["injected"] = bool((test.positions(known["distance"]) >= first - 1 + lag).any())


def origin(run: Run) -> dict[str, Any]:
    """What results depend on beside settings and weights; a file of labels may have been edited."""
    labels = run.config.probe.labels
    return {
        "version": version("probekit-lm"),
        "corpus": run.corpus.facts["fingerprint"],
        "device": run.device.type,
        "labels": None if labels is None else digest_of([Path(labels).expanduser()]),
    }


class _FinishedParts:
    """Finished parts of a grid, a file for each, kept until the whole grid is written."""

    def __init__(self, run: Run) -> None:
        self._run, self._folder = run, run.folder / "checkpoints" / "probe"
        self._identity = origin(run) | {"settings": run.config.model_dump(mode="json")}

    def once(self, name: str, variant: str, probed: Callable[[], Probed]) -> Probed:
        """Reads a part that is finished, or makes it and keeps it."""
        path = self._folder / f"{name}.safetensors"
        identity = json.dumps(self._identity | {"weights": self._run.weights_digest(variant)})
        kept = path.exists() and read_metadata(path).get("identity") == identity
        # All processes look before one writes. They must decide the same, or they would deadlock.
        if distributed.total(float(kept), self._run.device) == distributed.count():
            scored = [DocumentSums(readers, 0, ()) for readers in json.loads(read_metadata(path)["readers"])]
            weights = {}
            for key, tensor in read_tensors(path).items():
                kind, _, rest = key.partition("|")
                if kind == "weights":
                    weights[rest] = tensor
                else:
                    number, _, of = rest.partition("|")
                    scored[int(number)].sums[of] = tensor.numpy()
            return scored, weights
        scored, weights = probed()
        if distributed.is_first():
            tensors = {f"weights|{key}": tensor for key, tensor in weights.items()} | {
                f"sums|{number}|{of}": torch.from_numpy(values)
                for number, part in enumerate(scored)
                for of, values in part.sums.items()
            }
            readers = json.dumps([part.readers for part in scored])
            write_tensors(path, tensors, {"identity": identity, "readers": readers})
        return scored, weights

    def forget(self) -> None:
        """Removes all parts."""
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class TrainingProbes:
    """Results of probes at every checkpoint of a stage.

    Attributes:
        table: The rows of `ProbeResults.table`, with the stage's `step` of their checkpoint.
        stage: The stage.
        path: Where the table was written.
        losses: The stage's losses in training, by step.
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
    same settings is not probed again. Examples are the same at every step, and so are seeds.

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
    wanted = {"probe.variants": ["none" if stage == "lm" else stage.removeprefix("adapter/")]}
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
        if (record.config, record.origin) == (run.config, origin(run)):
            return ProbeResults(run.probes(), run.folder / "probes", record.notes)
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
