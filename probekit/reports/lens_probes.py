"""The probes that the lens reads with: which are kept, and how good each is on test documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from probekit.config import Config, ProbedName, ProbeSettings
from probekit.errors import ProbekitError
from probekit.probe_record import SplitDocuments, read_probe_record
from probekit.probing.activations import Place
from probekit.probing.locations import per_layer
from probekit.probing.saved import KEPT, Cell, LinearProbe, SavedProbes
from probekit.run import Run

BASELINES = ("prior", "bigram", "planner")
"""Readers that stand beside a probe's accuracy."""


@dataclass(frozen=True)
class Quality:
    """How good a reader is on test documents.

    Attributes:
        accuracy: Share of sentences whose action it names, with its 95 % interval.
        documents: Test documents that were resampled.
        examples: Sentences.
        injected: Whether the readings had been told of the target's own action.
    """

    accuracy: tuple[float, float, float]
    documents: int
    examples: int
    injected: bool = False


@dataclass(frozen=True)
class KeptProbes:
    """Probes for the next sentence's action, of one variant, seed and solver.

    Attributes:
        variant: Whose activations they read.
        seed: Of the documents drawn to fit on.
        solver: How they were fitted.
        places: Locations and layers, those of a location together.
        distances: Tokens before the sentence begins, rising; every place has all.
        config: Settings that they were fitted with.
        documents: Documents of each split that they were fitted on, chosen on and tested on.
        quality: Of every cell, in the order of `cells`.
        baselines: By name, of every distance.
        best: Number of the cell that is best on validation documents, among those that nothing was told.
    """

    variant: ProbedName
    seed: int
    solver: str
    places: list[Place]
    distances: list[int]
    config: Config
    documents: SplitDocuments
    quality: list[Quality]
    baselines: dict[str, list[Quality]]
    best: int
    _saved: SavedProbes

    def at(self, place: Place) -> LinearProbe:
        """The probes of a place for all distances: `coef` `[distances, width, actions]`."""
        location, layer = place
        return self._saved.stacked(
            [Cell(location, layer, distance, 1, self.solver) for distance in self.distances]
        )


def kept_probes(
    run: Run,
    variant: str | None = None,
    locations: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> KeptProbes:
    """The probes of a run that the lens reads with: those for the next sentence, of the first seed.

    Args:
        run: The run.
        variant: Whose; None: the first one that was probed.
        locations: Only these.
        layers: Only these, at locations that every layer has.

    Raises:
        ProbekitError: The run has none, or none of that variant, location or layer; it says which command
            makes them.
    """
    folder = run.folder / "probes"
    seeds = _kept_seeds(run)
    record = read_probe_record(run.folder)
    probed = record.config.probe
    _check_target(run, probed)
    known = [name for name in probed.variants if name in seeds and str(seeds[name]) in record.documents]
    if not known:
        raise ProbekitError(
            f"{folder} keeps probes of {', '.join(sorted(seeds))}, of which its settings.json does not tell; "
            f"run `probekit probe {run.folder}`"
        )
    variant = known[0] if variant is None else variant
    if variant not in known:
        raise ProbekitError(
            f"--variant is {variant!r}, of which {folder} keeps no linear probes; it has {', '.join(known)}; "
            f"for others run `probekit probe {run.folder} --probe.variants ...`"
        )
    saved, seed = SavedProbes(folder, variant, seeds[variant]), seeds[variant]
    cells = [cell for cell in saved.cells if cell.horizon == 1]
    solver = next((solver for solver in KEPT if solver in {cell.solver for cell in cells}), None)
    if solver is None:
        raise ProbekitError(
            f"the probes in {folder} have no horizon 1; run `probekit probe {run.folder} --probe.horizons 1`"
        )
    found = sorted({(cell.location, cell.layer) for cell in cells})
    order = dict.fromkeys([*probed.locations, *(location for location, _ in found)])
    there = [place for location in order for place in found if place[0] == location]
    places = _chosen(there, locations, layers)
    distances = sorted({cell.distance for cell in cells})
    rows = run.probes().query("horizon == 1")
    own = rows.query("reader == 'probe' and variant == @variant and solver == @solver and seed == @seed")
    own = own.set_index(["location", "layer", "distance"])
    own = own.loc[[(*place, distance) for place in places for distance in distances]]
    untold = own.validation_cross_entropy.where(~own.injected).fillna(float("inf")).to_numpy()
    return KeptProbes(
        variant,
        seed,
        solver,
        places,
        distances,
        record.config,
        record.documents[str(seed)],
        _qualities(own),
        {
            name: _qualities(baseline.set_index("distance").loc[distances])
            for name in BASELINES
            if len(baseline := rows[rows.reader == name])
        },
        int(untold.argmin()),
        saved,
    )


def _kept_seeds(run: Run) -> dict[str, int]:
    """The lowest seed of each variant whose linear probes are kept."""
    seeds: dict[str, int] = {}
    for path in (run.folder / "probes").glob("*-seed*.safetensors"):
        variant, _, seed = path.stem.rpartition("-seed")
        seeds[variant] = min(int(seed), seeds.get(variant, int(seed)))
    if not seeds:
        raise ProbekitError(f"{run.folder} keeps no linear probes; run `probekit probe {run.folder}`")
    return seeds


def _check_target(run: Run, probed: ProbeSettings) -> None:
    if (probed.target, probed.labels, probed.anchors) != ("action", None, "sentence"):
        raise ProbekitError(
            f"the probes of {run.folder} read {probed.target!r} at every {probed.anchors}, but the "
            "lens shows what is read of the next sentence's action; run "
            f"`probekit probe {run.folder} --probe.target action --probe.anchors sentence`"
        )


def _chosen(there: list[Place], locations: Sequence[str] | None, layers: Sequence[int] | None) -> list[Place]:
    """The places that are asked for."""
    _check_known("--locations", locations, sorted({location for location, _ in there}))
    _check_known("--layers", layers, sorted({layer for _, layer in there}))
    chosen = [
        (location, layer)
        for location, layer in there
        if (locations is None or location in locations)
        and (layers is None or layer in layers or not per_layer(location))
    ]
    if not chosen:
        raise ProbekitError("--locations and --layers together leave no place that a probe reads; give one")
    return chosen


def _check_known(option: str, asked: Sequence[Any] | None, known: Sequence[Any]) -> None:
    if unknown := [value for value in asked or () if value not in known]:
        there = ", ".join(map(str, known))
        raise ProbekitError(f"{option} has {unknown[0]!r}, where no probe reads; there are {there}")


def _qualities(rows: pd.DataFrame) -> list[Quality]:
    accuracy = rows[["accuracy", "accuracy_low", "accuracy_high"]].to_numpy().tolist()
    others = (rows[name].tolist() for name in ("documents", "examples", "injected"))
    return [Quality(tuple(triple), *more) for triple, *more in zip(accuracy, *others, strict=True)]
