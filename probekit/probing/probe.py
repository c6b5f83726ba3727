"""`probekit probe`: fits and scores probes of a run.

Finished parts of an interrupted probing are kept, and not repeated while settings and weights are the same.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit import distributed
from probekit.config import ProbedName, ProbeSettings, SolverName, reading_order
from probekit.errors import ProbekitError
from probekit.io import atomic_folder, write_json, write_table, write_tensors
from probekit.models.conditioning import CONDITIONINGS, conditioned_location
from probekit.models.locations import BEFORE, at_layers
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import (
    ActivationReader,
    Activations,
    HookPoint,
    Placement,
    probing_windows,
    stacks_of,
    within_memory,
)
from probekit.probing.baselines import baseline_sums
from probekit.probing.fitting import CLOSED_FORM, FitJob, Fitted, control_task, fit, fit_sums, hold, score
from probekit.probing.geometry import GEOMETRY, check_enough, layer_geometry
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, LENSES, TESTED_ON, Grid, make_grid
from probekit.probing.labels import beyond_window, target_of
from probekit.probing.memory import HeldActivations
from probekit.probing.record import SETTINGS
from probekit.probing.results import DocumentSums, Facts, table_of, validation_loss, weights_file
from probekit.probing.resume import FinishedParts, Probed, origin
from probekit.probing.store import Store, write_store
from probekit.probing.targets import Target
from probekit.probing.transfer import TRANSFER, Values, find_values, transfer_table, transferred
from probekit.probing.vectors import PENALTIES
from probekit.progress import Meter, Progress, duration
from probekit.run.run import Run
from probekit.statistics import Resampling

CUT = (
    "the LM reads in both directions: each example is read by itself, on the text up to the position of the "
    "probe and no further, so that it has seen nothing that follows"
)
"""A note on a bidirectional LM."""


@dataclass(frozen=True)
class ProbeResults:
    """Results of probes and baselines.

    Attributes:
        table: One row for each reader (probes, baselines, ceilings) and cell, see `results.COLUMNS`. Metrics
            are on test documents, with `_low` and `_high`: accuracy, top5, cross_entropy (nats), bits (gained
            over the prior), shortfall (bits below the ceiling, where one is known), over_planner (bits, where
            there is one), selectivity (accuracy less that on the control task), gain (bits over the strongest
            model-free baseline, `gain_over`; its intervals hold for all cells together). `injected` marks
            cells where the target's own action had been added by the time of the reading. Cells with too few
            examples are empty.
        folder: Where it was written.
        notes: Lines to show the user.
        geometry: If `probe.geometry` is set, a row for each variant, seed, location, layer and position; see
            `geometry.layer_geometry`.
        transfer: If `probe.transfer` is set, what probes of each value read of the others; see
            `transfer.transfer_table`.
    """

    table: pd.DataFrame
    folder: Path
    notes: list[str] = field(default_factory=list)
    transfer: pd.DataFrame | None = None
    geometry: pd.DataFrame | None = None

    def best_cells(self) -> pd.DataFrame:
        """The best cell of each variant, location, solver and horizon, a row for each seed.

        It is chosen by cross-entropy on validation documents, averaged over seeds. Empty cells, and those
        where the target's own action was injected, are left out.
        """
        probes = self.table[(self.table.reader == "probe") & ~self.table.injected]
        probes = probes[validation_loss(probes).notna()]
        of = ["variant", "location", "solver", "horizon"]
        cell = [*of, "layer", "position"]
        means = (
            probes.assign(loss=validation_loss(probes)).groupby(cell, sort=False).loss.mean().reset_index()
        )
        best = means.loc[means.groupby(of, sort=False).loss.idxmin(), cell]
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
    the LM and the planner were trained on none of these. An interrupted probing continues after what
    it finished (closed-form or other probes of a variant and seed), if settings and weights are the same.

    Args:
        run: The run or its folder; a corpus and an LM are enough.
        settings: Settings to replace, by dotted name, such as `probe.positions`.
        store: Keep activations in `activations/`, and read them from there if they exist.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run lacks a stage, a location, layer or variant that is to be probed, or examples.
    """
    run = Run.at(run, settings)
    run.check_writable()
    run.require("lm")
    _check_variants(run)
    points = _hook_points(run)
    target = target_of(run.corpus, run.config)
    run = with_defaults(run, target)
    config = run.config.probe
    grids = _grids(run, target)
    values = _values(run, grids)
    _check_geometry(run, grids)
    progress = Progress(quiet=quiet)
    window, _, cut = probing_windows(run)
    beyond = beyond_window(run.corpus, target, window)
    of_labels = [*target.notes, *([beyond] if beyond else []), *([CUT] if cut else [])]
    for line in of_labels:
        progress.say(line)
    shared = next(iter(grids.values()))
    with progress.task("score baselines"):
        scored = baseline_sums(run, shared)
    meter = _announce(run, grids, points, progress)
    finished = FinishedParts(run)
    results = run.folder / "probes"
    resampling = run.config.resampling
    weights: dict[Path, dict[str, Tensor]] = {}
    beside: list[dict[str, pd.DataFrame]] = []
    for seed, grid in grids.items():
        embedding = _token_embedding(run, grid, seed, progress)
        scored += finished.read_or_make(f"token-embedding-seed{seed}", "none", embedding)[0]
        for variant in config.variants:
            probes = _VariantProbes(run, grid, variant, points, seed, progress, meter, store=store)
            sums, weights[weights_file(Path(), variant, seed)] = probes.fit_all(finished)
            scored += sums
            beside.append(probes.tables(values.get(seed), resampling))

    empty = _empty_cells(run, grids, points)
    table = table_of(scored, shared.tested(), empty, resampling).assign(target=target.name)
    documents_tested = len(np.unique(shared.examples[TESTED_ON].document))
    table["documents"] = table.documents.where(table.documents.isna(), documents_tested)
    of_values = dict.fromkeys(note for found in values.values() for note in found.notes)
    cautions = _grid_notes(grids)
    notes = [*of_labels, *cautions, *_context_note(run, shared), *of_values, *_constant_notes(scored)]
    tables = {name: pd.concat([own[name] for own in beside], ignore_index=True) for name in beside[0]}
    if distributed.is_first():
        _write(results, run, grids, table, tables, weights, {"notes": notes, "cautions": cautions})
        finished.forget()
    distributed.wait()
    if meter.tokens:
        progress.say(
            f"read {meter.tokens:,} tokens in {duration(meter.seconds)}, {meter.tokens / meter.seconds:,.0f} "
            f"a second; peak memory {_peak_memory(run.device)}"
        )
    return ProbeResults(table, results, notes, tables.get(TRANSFER), tables.get(GEOMETRY))


def _empty_cells(run: Run, grids: Mapping[int, Grid], points: Sequence[HookPoint]) -> list[Facts]:
    """The cells of which there are too few examples."""
    config, shared = run.config.probe, next(iter(grids.values()))
    return [
        {"reader": "probe", "solver": solver, "variant": variant, "seed": seed, "location": location}
        | {"layer": layer, "position": position, "horizon": horizon, "examples": count}
        for (position, horizon), count in shared.empty.items()
        for seed in grids
        for variant in config.variants
        for solver in config.solvers
        for location, layer in points
    ]


def _constant_notes(scored: Iterable[DocumentSums]) -> list[str]:
    """A note on each cell whose activations are all the same."""
    constant = {
        f"constant activations, which hold no information: {known['location']}, layer {known['layer']}, "
        f"position {known['position']} ({known['variant'] or known['reader']})"
        for sums in scored
        for known in sums.readers
        if known.get("constant")
    }
    return sorted(constant)


def _write(
    results: Path,
    run: Run,
    grids: Mapping[int, Grid],
    table: pd.DataFrame,
    tables: Mapping[str, pd.DataFrame],
    weights: Mapping[Path, Mapping[str, Tensor]],
    said: Mapping[str, Sequence[str]],
) -> None:
    """Writes all tables, the weights of linear probes and the record, in place of an earlier folder."""
    documents = {
        seed: {split: len(np.unique(e.document)) for split, e in grid.examples.items()}
        for seed, grid in grids.items()
    }
    with atomic_folder(results) as folder:
        for file, tensors in weights.items():
            if tensors:
                write_tensors(folder / file, tensors)
        write_table(folder / "results.parquet", table)
        for name, own in tables.items():
            write_table(folder / name, own)
        record = {**said, "of": origin(run), "documents": documents}
        record |= _label_facts(run, next(iter(grids.values())))
        write_json(folder / SETTINGS, run.config.model_dump(mode="json") | record)


def _label_facts(run: Run, grid: Grid) -> dict[str, Any]:
    """What the record says of labels: names of classes, what a label is of, and the range of numbers."""
    target = grid.target
    classes = [target.name_of(label) for label in range(target.classes)]
    numbers = grid.examples[FITTED_ON].labels
    ends = [float(numbers.min()), float(numbers.max())] if target.kind == "numbers" else None
    return {"classes": classes, "extent": target.extent(run.corpus), "range": ends}


def with_defaults(run: Run, target: Target) -> Run:
    """The run with the solver and penalties of the target's kind, where none were set."""
    return run.with_settings(defaults_of(target.kind, run.config.probe))


def defaults_of(kind: str, settings: ProbeSettings) -> dict[str, Any]:
    """The settings that take the place of the usual ones for a kind of target."""
    usual, own = ProbeSettings(), dict[str, Any]()
    if kind != "classes" and settings.solvers == usual.solvers:
        own["probe.solvers"] = ["ridge"]
    if kind == "vectors" and settings.l2 == usual.l2:
        own["probe.l2"] = PENALTIES
    return own


def _check_variants(run: Run) -> None:
    known = ["none", "random", *run.variants]
    for variant in run.config.probe.variants:
        if variant not in known:
            raise ProbekitError(
                f"probe.variants has {variant!r}, which this run has not trained; it has {', '.join(known)}"
            )


def _announce(run: Run, grids: Mapping[int, Grid], points: Sequence[HookPoint], progress: Progress) -> Meter:
    """Says how large the grid is; the meter says how long it will take, once it knows."""
    config, windows = run.config.probe, probing_windows(run)
    cells = len(points) * len(config.solvers) * len(config.variants)
    tokens = 0
    for seed, grid in grids.items():
        examples = grid.examples
        once = sum(
            Placement.of(run.corpus, part, grid.positions, *windows).tokens for part in examples.values()
        )
        probes = cells * len(grid.positions) * len(grid.horizons)
        documents = sum(len(np.unique(part.document)) for part in examples.values())
        progress.say(
            f"grid of seed {seed}: {probes:,} probes; {len(examples[FITTED_ON]):,} examples to fit on, "
            f"{len(examples[CHOSEN_ON]):,} to choose on, {len(examples[TESTED_ON]):,} to test on; "
            f"{documents:,} documents, of which each variant reads {once:,} tokens in windows of up to "
            f"{windows[0]:,}"
        )
        tokens += once * len(config.variants)
    slow = {
        "fewer probe.layers": len(points) > 2 * len(config.locations),
        "probe.solvers ridge": not CLOSED_FORM.issuperset(config.solvers),
        "lm.dtype bfloat16": run.dtype == torch.float32 and run.config.lm.name is not None,
        "probe.variants none": len(config.variants) > 1,
        "a GPU": run.device.type == "cpu",
    }
    faster = ", ".join(way for way, helps in slow.items() if helps)
    fitting = "" if CLOSED_FORM.issuperset(config.solvers) else "; fitting comes on top"
    return Meter(progress, tokens, f"{fitting}; faster with {faster}" if faster else fitting)


def _solver_parts(solvers: Sequence[SolverName]) -> dict[str, list[SolverName]]:
    """The solvers that are fitted and scored together, in this order: closed-form ones give results first."""
    parts = {
        "closed-form": [solver for solver in solvers if solver in CLOSED_FORM],
        "iterative": [solver for solver in solvers if solver not in CLOSED_FORM],
    }
    return {name: part for name, part in parts.items() if part}


def _closed_form_table(variant: str, scored: Sequence[DocumentSums], examples: int) -> str:
    """Cross-entropy by layer and position, to be read while other solvers are fitted."""
    rows = pd.DataFrame([reader for part in scored for reader in part.readers]).astype({"position": str})
    rows["position"] = pd.Categorical(rows.position, reading_order(rows.position), ordered=True)
    rows["nats"] = np.concatenate([part.sums["cross_entropy"].sum(0) for part in scored]) / examples
    table = rows.pivot_table("nats", ["solver", "location", "layer"], ["horizon", "position"], observed=True)
    shown = table.to_string(float_format="%.3f")
    return f"{variant}: test cross-entropy of closed-form probes, in nats\n{shown}"


def _grid_notes(grids: Mapping[int, Grid]) -> list[str]:
    """The notes of all grids; one that not all seeds have names its seed."""
    notes = dict.fromkeys(note for grid in grids.values() for note in grid.notes)
    having = {note: [seed for seed, grid in grids.items() if note in grid.notes] for note in notes}
    return [
        note if len(seeds) == len(grids) else f"{note} (seed {', '.join(map(str, seeds))})"
        for note, seeds in having.items()
    ]


def _context_note(run: Run, grid: Grid) -> list[str]:
    """How much the LM has read where positions count from an example: early ones have little context."""
    if not any(isinstance(position, int) for position in grid.positions):
        return []
    test = grid.examples[TESTED_ON]
    read = Placement.of(run.corpus, test, grid.positions, *probing_windows(run)).tokens_read.max(axis=0)
    tenth, half = np.quantile(read, (0.1, 0.5), method="lower")
    return [
        f"context: the LM has read {tenth:,} tokens or fewer at a tenth of the test examples, {half:,} or "
        "fewer at half of them (tokens_read: the median at each position)"
    ]


def _peak_memory(device: torch.device) -> str:
    """The most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = f"{unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9:.1f} GB"
    if device.type == "cuda":
        peak += f", on the GPU {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
    return peak


def _hook_points(run: Run) -> list[HookPoint]:
    """Every location at every layer of the settings; a few random layers show which locations there are."""
    settings, conditioning = run.config.probe, run.config.conditioning
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
    if LENSES.intersection(settings.solvers):
        run.require_causal()
    last = run.frozen_lm().layers - 1
    if "tuned-lens" in settings.solvers and (
        last not in (settings.layers or [last]) or "hook_resid_post" not in settings.locations
    ):
        raise ProbekitError(
            f"probe.solvers has tuned-lens, which learns from the last layer; give {last} in probe.layers, "
            "and hook_resid_post in probe.locations"
        )
    return at_layers(settings.locations, settings.layers, run.frozen_lm().layers, "probe.layers")


def _grids(run: Run, target: Target) -> dict[int, Grid]:
    """A grid for every seed; they differ in the documents drawn to fit on and to choose on."""
    config = run.config.probe
    seeds = config.seeds or (run.config.seed,)
    grids = {seed: make_grid(run.corpus, config, target, seed) for seed in seeds}
    if len({(grid.positions, grid.horizons) for grid in grids.values()}) > 1:
        raise ProbekitError(
            f"probe.max_examples is {config.max_examples}, so few that positions and horizons are empty for "
            "some of probe.seeds and not for others; raise it, or give nearer probe.positions and "
            "probe.horizons"
        )
    return grids


def _values(run: Run, grids: Mapping[int, Grid]) -> dict[int, Values]:
    """For every grid the values between which probes are transferred; none if `probe.transfer` is unset."""
    if run.config.probe.transfer is None:
        return {}
    return {seed: find_values(run.corpus, grid, run.config) for seed, grid in grids.items()}


def _check_geometry(run: Run, grids: Mapping[int, Grid]) -> None:
    """Refuses too few examples for the geometry of the widest location, if it is to be measured."""
    if not run.config.probe.geometry:
        return
    width = max(run.locations[name.removesuffix(BEFORE)] for name in run.config.probe.locations)
    for grid in grids.values():
        group = _fitted_and_chosen(grid)
        try:
            check_enough(len(group), grid.target.spans * width, group)
        except ProbekitError as error:
            raise ProbekitError(f"probe.geometry: {error}; or probe without it") from None


def _fitted_and_chosen(grid: Grid) -> np.ndarray:
    """The group of each example that probes are fitted and chosen on."""
    return np.concatenate([grid.examples[split].group for split in (FITTED_ON, CHOSEN_ON)])


def _token_embedding(run: Run, grid: Grid, seed: int, progress: Progress) -> Callable[[], Probed]:
    """The baseline that knows the token at the position and nothing before it: probes on its embedding."""
    solvers = [name for name in run.config.probe.solvers if name not in LENSES] or ["ridge"]
    # Softmax probes, unless no solver of the grid holds its examples: then they are not held here either.
    solver: SolverName = solvers[0] if CLOSED_FORM.issuperset(solvers) else "softmax"
    fewer = {"probe.control": False, "probe.code_length": False, "probe.transfer": None}
    plain = run.with_settings(fewer | {"probe.solvers": [solver]})
    points, name = [("hook_embed", 0)], "token embedding"

    def probed() -> Probed:
        probes = _VariantProbes(plain, grid, "none", points, seed, progress, Meter(progress), name=name)
        scored, _ = probes.fit_and_score([solver])
        for sums in scored:
            sums.readers = [known | {"reader": name, "variant": None} for known in sums.readers]
        return scored, {}

    return probed


class _VariantProbes:
    """The probes of a variant and seed; activations are read once, however the probes are fitted."""

    def __init__(
        self,
        run: Run,
        grid: Grid,
        variant: ProbedName,
        points: Sequence[HookPoint],
        seed: int,
        progress: Progress,
        meter: Meter,
        *,
        name: str | None = None,
        store: bool = False,
    ) -> None:
        self._run, self._grid, self._variant = run, grid, variant
        self._points, self._seed, self._store = points, seed, store
        self._progress, self._meter, self._name = progress, meter, name or variant
        self._folder = run.folder / "activations" / f"{variant}-seed{seed}"

    def fit_all(self, finished: FinishedParts) -> Probed:
        """Fits and scores all solvers, but for those that are finished; closed-form ones come first."""
        if self._store:  # even if all are finished: an interrupted probing may not have stored anything
            splits = self._grid.examples
            write_store(self._reader(self._points), splits, self._folder, self._progress, self._meter)
        scored: list[DocumentSums] = []
        weights: dict[str, Tensor] = {}
        parts = _solver_parts(self._run.config.probe.solvers)
        for name, solvers in parts.items():
            part = f"{self._variant}-seed{self._seed}-{name}"
            sums, kept = finished.read_or_make(part, self._variant, partial(self.fit_and_score, solvers))
            scored, weights = scored + sums, weights | kept
            if name == "closed-form" and len(parts) > 1:
                examples = len(self._grid.examples[TESTED_ON])
                self._progress.say(_closed_form_table(self._variant, sums, examples))
        return scored, weights

    def fit_and_score(self, solvers: Sequence[SolverName]) -> Probed:
        """Fits and scores some of the solvers of the settings, which are all closed form or none is."""
        scored: list[DocumentSums] = []
        weights: dict[str, Tensor] = {}

        def add(source: Activations, batches: list[Fitted]) -> None:
            scored.extend(score(source, self._job, batches))
            for batch in batches:
                weights.update(batch.weights(source.stacks, self._grid))

        config = self._run.config.probe
        # Not `solvers`: where others follow, activations are held for them anyway.
        if CLOSED_FORM.issuperset(config.solvers) and not config.transfer:
            for points in _groups(self._run, self._grid, self._points):
                source = self._source(points)
                add(source, fit_sums(source, self._job, solvers))
        else:
            tested = self._held if self._test_held else self._source(self._points)
            add(tested, fit(self._held, self._job, solvers))
        _mark_injected(self._run, self._grid, self._variant, self._points, scored)
        return scored, weights

    def tables(self, values: Values | None, resampling: Resampling) -> dict[str, pd.DataFrame]:
        """The tables that are asked for beside that of probes, by the name of their file."""
        found = {} if values is None else {TRANSFER: self._transfer(values, resampling)}
        return found | ({GEOMETRY: self._geometry()} if self._run.config.probe.geometry else {})

    def _transfer(self, values: Values, resampling: Resampling) -> pd.DataFrame:
        """The table of probes of every value of a column, tested on those of every other."""
        scored = transferred(self._held, self._job, values)
        for sums in scored.values():
            _mark_injected(self._run, self._grid, self._variant, self._points, sums)
        return transfer_table(scored, self._grid, values, resampling)

    def _geometry(self) -> pd.DataFrame:
        """The geometry of the activations that probes are fitted and chosen on, a row for each cell."""
        held, positions, group = self._held, self._grid.positions, _fitted_and_chosen(self._grid)
        rows = []
        total = len(self._points) * len(positions)
        with self._progress.task(f"{self._name}: geometry", total=total, unit="cells") as task:
            for stack, part in held.groups():
                cells = [(*point, position) for point in held.stacks[stack].points for position in positions]
                splits = [held.load(split, stack, part) for split in (FITTED_ON, CHOSEN_ON)]
                for number, (location, layer, position) in enumerate(task.track(cells[part])):
                    cell = {"variant": self._variant, "seed": self._seed, "location": location}
                    cell |= {"layer": layer, "position": str(position)}
                    activations = torch.cat([values[number] for values in splits])
                    rows.append(cell | layer_geometry(activations, group))
        return pd.DataFrame(rows)

    @property
    def _test_held(self) -> bool:
        """Whether test examples are scored again: closed-form solvers come first, transfer last."""
        config = self._run.config.probe
        return len(_solver_parts(config.solvers)) > 1 or config.transfer is not None

    @cached_property
    def _held(self) -> HeldActivations:
        """The activations that solvers need at once; those of the test split too if they are scored twice."""
        splits = [FITTED_ON, CHOSEN_ON, *([TESTED_ON] if self._test_held else [])]
        return hold(self._source(self._points), self._job, splits)

    @cached_property
    def _job(self) -> FitJob:
        run, grid, tokens = self._run, self._grid, self._grid.target.tokens
        config = run.config.probe
        lenses = LENSES.intersection(config.solvers)
        place = Placement.of(run.corpus, grid.examples[TESTED_ON], grid.positions, *probing_windows(run))
        return FitJob(
            grid,
            config,
            control_task(run.corpus, grid, self._seed) if config.control else None,
            self._seed,
            run.device,
            self._progress,
            self._name,
            run.folder,
            dict(zip(grid.positions, np.median(place.tokens_read, axis=1).astype(int).tolist(), strict=True)),
            self._variant,
            self._meter,
            None if tokens is None or not lenses else self._reader(self._points).logit_lens(tokens),
        )

    def _reader(self, points: Sequence[HookPoint]) -> ActivationReader:
        spans = self._grid.target.spans
        return ActivationReader(
            self._run, self._variant, points, self._grid.positions, self._seed, spans=spans
        )

    def _source(self, points: Sequence[HookPoint]) -> Activations:
        if self._store:
            stacks = stacks_of(points, self._run.locations, self._grid.target.spans)
            return Store(self._folder, stacks, self._run.device)
        return self._reader(points)


def _groups(run: Run, grid: Grid, points: Sequence[HookPoint]) -> Iterator[list[HookPoint]]:
    """Hook points whose sums stay within `probe.memory`, for solvers that are all closed form."""
    config = run.config.probe
    tasks = len(grid.horizons) + config.control
    sums = grid.target.outputs * tasks
    shared = grid.target.kind == "classes"
    solutions = sum(1 if shared and solver == "ridge" else tasks for solver in config.solvers)
    sizes = []
    for location, _ in points:
        width = grid.target.spans * run.locations[location.removesuffix(BEFORE)]
        # The sums are float64, and as they are let go solutions in float32 take their place: those of ridge
        # probes of classes once, of others for every task.
        sizes.append(4 * len(grid.positions) * width * max(2, solutions) * (width + sums))
    return within_memory(points, sizes, config.memory)


def _mark_injected(
    run: Run, grid: Grid, variant: ProbedName, points: Sequence[HookPoint], scored: Sequence[DocumentSums]
) -> None:
    """Marks the rows of probes whose activations already depended on the target's own action.

    Where the target is no sentence's own, such as a document's type, any planned action can reveal it.
    """
    changed: set[HookPoint] = set()
    if variant in VARIANTS and VARIANTS[variant].evaluation.needs_scores:
        changed = ActivationReader(run, variant, points, grid.positions).changed_by_conditioning()
    lag = CONDITIONINGS[run.config.conditioning.kind].lag
    test = grid.examples[TESTED_ON]
    for known in (known for sums in scored for known in sums.readers):
        known["injected"] = (known["location"], known["layer"]) in changed
        if known["injected"] and grid.target.of_sentences is not None:
            first = run.corpus.first_token[test.sentence + known["horizon"] - 1]
            known["injected"] = bool((test.last_read(known["position"]) >= first - 1 + lag).any())
