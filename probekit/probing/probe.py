"""`probekit probe`: probes by variant, location, layer, distance and horizon, with baselines and controls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from probekit import distributed
from probekit.config import ConditioningSettings, ProbedName
from probekit.data.corpus import Corpus
from probekit.errors import ProbekitError
from probekit.io import atomic_folder, write_json, write_table
from probekit.models.conditioning import CONDITIONINGS
from probekit.models.language_model import OUTSIDE_BLOCKS, check_location
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import Activations, HookPoint, Reader
from probekit.probing.baselines import baseline_tallies
from probekit.probing.fitting import CLOSED_FORM, Work, control_question, document_numbers, fit, score
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON, Grid, make_grid
from probekit.probing.locations import BEFORE, per_layer
from probekit.probing.results import Row, Tally, table_of, weights_of, write_probes
from probekit.probing.store import Store, identity, write_store
from probekit.probing.targets import Examples, Target, find_target
from probekit.probing.unfinished import Probed, Unfinished, origin
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import Resampling

Weights = dict[tuple[ProbedName, int], dict[str, Tensor]]
"""Weights of linear probes by the names they are kept under, for every variant and seed."""


@dataclass(frozen=True)
class ProbeResults:
    """What probes and baselines read.

    Attributes:
        table: One row for each reader (probes, baselines, ceilings) and cell, see `results.COLUMNS`. Metrics
            are on test documents, with `_low` and `_high`: accuracy, top5, cross_entropy (nats), bits (gained
            over the prior), shortfall (bits below the ceiling, where one is known), selectivity (accuracy
            less that on the control task), gain (bits over the strongest model-free baseline, `gain_over`;
            its intervals hold for all cells together). `injected` marks cells where the target's own action
            had been added by the time of the reading. Cells with too few examples are empty.
        folder: Where it was written.
        notes: Lines to tell the user.
    """

    table: pd.DataFrame
    folder: Path
    notes: list[str] = field(default_factory=list)

    def best_cells(self) -> pd.DataFrame:
        """The best cell of each variant, location, solver and horizon, a row for each seed.

        Chosen by cross-entropy on validation documents, averaged over seeds. Cells where the target's own
        action was injected, and empty ones, take no part.
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
    """Fits the probe grid of a run and writes it into `probes/`, in place of what was there.

    What one that was stopped had done with the same settings is not done again.

    Probes are fitted on the documents of the split "probe", chosen on "validation" and measured on "test";
    the LM and the planner were trained on none of these.

    Args:
        run: The run or its folder; a corpus and an LM are enough.
        settings: Settings to replace, by dotted name, such as `probe.distances`.
        store: Keep activations in `activations/`, and read them from there where they are.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run lacks a stage, a location, layer or variant that is to be probed, or examples.
    """
    run = Run.at(run, settings)
    run.check_writable()
    run.require("lm")
    config = run.config.probe
    _check_variants(run)
    places = _places(run)
    target = find_target(run.corpus, config.target, config.labels)
    progress = Progress(quiet=quiet)
    grids = _grids(run, target)
    shared = next(iter(grids.values()))
    with progress.task("score baselines"):
        tallies = baseline_tallies(run, shared)
    notes = list(shared.notes)
    weights: Weights = {}
    unfinished = Unfinished(run)
    for seed, grid in grids.items():
        embedding = partial(_token_embedding, run, grid, seed, progress)
        tallies += unfinished.once(f"token-embedding-seed{seed}", "none", embedding)[0]
        for variant in config.variants:
            probed = partial(_probed, run, grid, variant, places, seed, progress, store=store)
            found, weights[variant, seed] = unfinished.once(f"{variant}-seed{seed}", variant, probed)
            tallies += found
    results = ProbeResults(
        table_of(
            tallies,
            np.bincount(document_numbers(shared.examples[TESTED_ON].document)),
            _empty_rows(run, shared, list(grids), places),
            Resampling(resamples=run.config.evaluation.resamples, seed=run.config.seed),
        ).assign(target=target.name),
        run.folder / "probes",
        [*notes, *_constant_note(tallies)],
    )
    if distributed.is_first():
        _write(run, results, grids, weights)
        unfinished.forget()
    distributed.wait()
    return results


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
    """The baseline that knows which token is there, and nothing before it: probes on its embedding.

    Softmax probes, unless none of the grid's own holds its examples: then it does not either.
    """
    solvers = run.config.probe.solvers
    solver = solvers[0] if CLOSED_FORM.issuperset(solvers) else "softmax"
    plain = {"probe.control": False, "probe.code_length": False, "probe.solvers": [solver]}
    alone = run.with_settings(plain)
    tallies, _ = _probed(alone, grid, "none", [("hook_embed", 0)], seed, progress, name="token embedding")
    for tally in tallies:
        tally.heads = [head | {"reader": "token embedding", "variant": None} for head in tally.heads]
    return tallies, {}


def _probed(
    run: Run,
    grid: Grid,
    variant: ProbedName,
    places: Sequence[HookPoint],
    seed: int,
    progress: Progress,
    *,
    name: str | None = None,
    store: bool = False,
) -> Probed:
    """Reads, fits and scores all places of a variant, in as few passes as the memory allows.

    Returns:
        What the probes got right, and the weights of those that are linear.
    """
    config, examples = run.config.probe, grid.examples
    source: Callable[[list[HookPoint]], Activations]
    source = partial(Reader, run, variant, distances=grid.distances, seed=seed)
    if store:
        folder = run.folder / "activations" / f"{variant}-seed{seed}"
        write_store(source(list(places)), examples, folder, identity(run, variant, seed, grid), progress)
        distributed.wait()
        source = partial(Store, folder, run.device)
    control = control_question(run.corpus, grid, seed) if config.control else None
    head: Row = {"reader": "probe", "variant": variant, "seed": seed}
    tallies: list[Tally] = []
    weights: dict[str, Tensor] = {}
    for group in _groups(run, grid, places):
        activations = source(group)
        work = Work(grid, config, control, seed, run.device, progress, name or variant)
        fitted = fit(activations, work)
        tallies += score(activations, work, fitted, head)
        weights |= weights_of(fitted, activations.stacks, grid.distances)
    _mark_injected(run, grid, variant, places, tallies)
    return tallies, weights


def _groups(run: Run, grid: Grid, places: Sequence[HookPoint]) -> Iterator[list[HookPoint]]:
    """Cuts places into groups whose held examples, or sums, stay within `probe.memory`."""
    config, widths = run.config.probe, run.locations
    examples = len(grid.examples[FITTED_ON]) + len(grid.examples[CHOSEN_ON])
    closed_form = CLOSED_FORM.issuperset(config.solvers)
    sums = grid.target.classes * (len(grid.horizons) + config.control)
    group: list[HookPoint] = []
    held = 0
    for place in places:
        width = widths[place[0].removesuffix(BEFORE)]
        # The sums are float64, and held once more by every solver.
        numbers = 2 * (1 + len(config.solvers)) * (width + sums) if closed_form else examples
        size = 4 * len(grid.distances) * width * numbers
        if group and held + size > config.memory * 1e9:
            yield group
            group, held = [], 0
        group.append(place)
        held += size
    yield group


def _mark_injected(
    run: Run, grid: Grid, variant: ProbedName, places: Sequence[HookPoint], tallies: Sequence[Tally]
) -> None:
    """Marks the rows whose readings had already been told of the target's own action.

    What is no sentence's own, such as a document's type, every action that was planned tells of.
    """
    told = variant in VARIANTS and VARIANTS[variant].evaluation.needs_scores
    changed = Reader(run, variant, places, grid.distances).changed_by_conditioning() if told else set()
    lag = CONDITIONINGS[run.config.conditioning.kind].lag
    test = grid.examples[TESTED_ON]
    for tally in tallies:
        for head in tally.heads:
            head["injected"] = False
            if (head["location"], head["layer"]) in changed:
                head["injected"] = grid.target.of_sentences is None or _carried(run.corpus, test, head, lag)


def _carried(corpus: Corpus, examples: Examples, head: Row, lag: int) -> bool:
    """Whether some example reads where the LM was told the action of the very sentence that it asks about."""
    asked = examples.sentence + head["horizon"] - 1
    return bool((examples.anchor - head["distance"] >= corpus.first_token[asked] - 1 + lag).any())


def _empty_rows(run: Run, grid: Grid, seeds: list[int], places: Sequence[HookPoint]) -> list[Row]:
    """Rows of the cells that have too few examples."""
    return [
        {"reader": "probe", "solver": solver, "variant": variant, "seed": seed, "location": location}
        | {"layer": layer, "distance": distance, "horizon": horizon, "examples": count}
        for (distance, horizon), count in grid.empty.items()
        for seed in seeds
        for variant in run.config.probe.variants
        for solver in run.config.probe.solvers
        for location, layer in places
    ]


def _constant_note(tallies: Sequence[Tally]) -> list[str]:
    heads = [head for tally in tallies for head in tally.heads if head.get("constant")]
    cells = {
        f"{head['location']}, layer {head['layer']}, distance {head['distance']} "
        f"({head['variant'] or head['reader']})"
        for head in heads
    }
    return [f"constant activations, which tell nothing: {cell}" for cell in sorted(cells)]


def _write(run: Run, results: ProbeResults, grids: Mapping[int, Grid], weights: Weights) -> None:
    with atomic_folder(results.folder) as folder:
        for (variant, seed), tensors in weights.items():
            if tensors:
                write_probes(folder, variant, seed, tensors)
        write_table(folder / "results.parquet", results.table)
        write_json(
            folder / "settings.json",
            run.config.model_dump(mode="json")
            | {"notes": results.notes, "of": origin(run)}
            | {
                "documents": {
                    seed: {split: len(np.unique(e.document)) for split, e in grid.examples.items()}
                    for seed, grid in grids.items()
                }
            },
        )


def _check_variants(run: Run) -> None:
    known = ["none", "random", *run.variants]
    for variant in run.config.probe.variants:
        if variant not in known:
            raise ProbekitError(
                f"probe.variants has {variant!r}, which this run has not trained; it has {', '.join(known)}"
            )


def _places(run: Run) -> list[HookPoint]:
    """Every location at every layer of the settings; one outside the blocks at the layer beside it."""
    settings, layers = run.config.probe, run.base_lm().layers
    for location in settings.locations:
        check_location(run.locations, location.removesuffix(BEFORE), "probe.locations")
        if location.endswith(BEFORE):
            _check_before(run.config.conditioning, location)
    for layer in settings.layers or ():
        if layer >= layers:
            raise ProbekitError(f"probe.layers has {layer}, but the LM's layers are 0 to {layers - 1}")
    beside = dict(zip(OUTSIDE_BLOCKS, (0, layers - 1), strict=True))
    return [
        (location, layer)
        for location in settings.locations
        for layer in (
            settings.layers or range(layers)
            if per_layer(location)
            else [beside[location.removesuffix(BEFORE)]]
        )
    ]


def _check_before(settings: ConditioningSettings, location: str) -> None:
    conditioned = CONDITIONINGS[settings.kind].location(settings)
    if conditioned is None:
        raise ProbekitError(
            f"probe.locations has {location!r}, but with conditioning.kind {settings.kind!r} nothing is "
            f"added to activations; give it without {BEFORE!r}"
        )
    if location != conditioned + BEFORE:
        raise ProbekitError(
            f"probe.locations has {location!r}, but actions are added at {conditioned!r} "
            f"(conditioning); only {conditioned + BEFORE!r} differs from its hook"
        )
