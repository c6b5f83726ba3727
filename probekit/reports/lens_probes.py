"""Which of a run's probes the lens reads with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from probekit.config import Position, ProbedName, as_position, reading_order
from probekit.errors import ProbekitError
from probekit.models.locations import BEFORE, per_layer
from probekit.probing.activations import HookPoint
from probekit.probing.record import ProbeRecord, read_probe_record
from probekit.probing.results import (
    LINEAR_SOLVERS,
    Cell,
    LinearProbe,
    SavedProbes,
    main_metric,
    validation_loss,
)
from probekit.run.run import Run


@dataclass(frozen=True)
class KeptProbes:
    """A run's linear probes of one variant, seed, solver and horizon.

    Attributes:
        variant: Whose activations they read.
        seed: Seed of the documents drawn to fit on.
        solver: How they were fitted.
        horizon: Sentences (or tokens) ahead that they predict.
        points: Locations and layers, those of a location together.
        positions: Where they read: numbers of tokens before the range, ascending, then named ones. Every
            point has all of them.
        record: How they were made.
        metric: What they are judged by.
        quality: Their rows of the table of results, in the order of the cells.
        baselines: Rows of baselines by name, in the order of the positions.
        best: Number of the cell that is best on validation documents, among those that are not injected.
        saved: Their weights.
    """

    variant: ProbedName
    seed: int
    solver: str
    horizon: int
    points: list[HookPoint]
    positions: list[Position]
    record: ProbeRecord
    metric: str
    quality: pd.DataFrame
    baselines: dict[str, pd.DataFrame]
    best: int
    saved: SavedProbes

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; none of numbers."""
        return self.record.classes

    @property
    def of_actions(self) -> bool:
        """Whether they read a sentence's action."""
        return self.record.config.probe.target == "action" and self.record.config.probe.labels is None

    @property
    def of_embeddings(self) -> bool:
        """Whether they predict a sentence's embedding."""
        return self.record.config.probe.target == "embedding" and self.record.config.probe.labels is None

    @property
    def labels_sentences(self) -> bool:
        """Whether they read the label of the very sentence that they read at or before."""
        return self.record.extent == "sentences" and self.horizon == 1

    def at(self, point: HookPoint) -> LinearProbe:
        """Returns the probes of a point for all positions: `coef` `[positions, width, outputs]`."""
        return self.saved.stacked([Cell(*point, p, self.horizon, self.solver) for p in self.positions])


def kept_probes(
    run: Run,
    variant: str | None = None,
    locations: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> KeptProbes:
    """Finds the probes of a run that the lens reads with: of the first seed and the nearest horizon.

    Args:
        run: The run.
        variant: Whose; None: the first that was probed.
        locations: Only these.
        layers: Only these, at locations that every layer has.

    Raises:
        ProbekitError: The run has no such probes; the message names the command that makes them.
    """
    folder = run.folder / "probes"
    seeds: dict[str, int] = {}
    for path in folder.glob("*-seed*.safetensors"):
        name, _, number = path.stem.rpartition("-seed")
        seeds[name] = min(int(number), seeds.get(name, int(number)))
    if not seeds:
        raise ProbekitError(f"{run.folder} keeps no linear probes; run `probekit probe {run.folder}`")
    record = read_probe_record(run.folder)
    known = [name for name in record.config.probe.variants if name in seeds]
    variant = known[0] if variant is None else variant
    if not isinstance(variant, str) or variant not in known:
        raise ProbekitError(
            f"--variant is {variant!r}, of which {folder} keeps no linear probes; it has {', '.join(known)}; "
            f"for others run `probekit probe {run.folder} --probe.variants ...`"
        )
    saved, seed = SavedProbes(folder, variant, seeds[variant]), seeds[variant]
    horizon = min(cell.horizon for cell in saved.cells)
    solver = next(name for name in LINEAR_SOLVERS if name in {cell.solver for cell in saved.cells})
    cells = [cell for cell in saved.cells if (cell.horizon, cell.solver) == (horizon, solver)]
    found = sorted({(cell.location, cell.layer) for cell in cells})
    for option, asked, there in (
        ("--locations", locations, sorted({location for location, _ in found})),
        ("--layers", layers, sorted({layer for _, layer in found})),
    ):
        for value in () if asked is None else asked:
            if value not in there:
                known_ones = ", ".join(map(str, there))
                raise ProbekitError(f"{option} has {value!r}, where no probe reads; there are {known_ones}")
    points = [
        (location, layer)
        for each in dict.fromkeys([*record.config.probe.locations, *(location for location, _ in found)])
        for location, layer in found
        if location == each and (locations is None or location in locations)
        if layers is None or layer in layers or not per_layer(location)
    ]
    if not points:
        raise ProbekitError("--locations and --layers together leave no point that a probe reads; give one")

    every = {cell.position for cell in cells}
    numbers = sorted(position for position in every if isinstance(position, int))
    named = reading_order(position for position in every if isinstance(position, str))
    positions = [*numbers, *map(as_position, named)]
    names = [str(position) for position in positions]
    rows = run.probes().query("horizon == @horizon")
    own = rows.query("reader == 'probe' and variant == @variant and solver == @solver and seed == @seed")
    own = own.set_index(["location", "layer", "position"])
    own = own.loc[[(*point, name) for point in points for name in names]]
    metric = main_metric(rows)
    width, outputs = saved[Cell(*points[0], positions[0], horizon, solver)].coef.shape
    settings = record.config.probe
    shown = (settings.target == "embedding" and settings.labels is None) or outputs == max(
        1, len(record.classes)
    )
    if width != run.locations[points[0][0].removesuffix(BEFORE)] or not shown:
        raise ProbekitError(
            f"the probes of {run.folder} read pairs of spans, or vectors of a table, which the lens does not "
            "show; probe classes or numbers of sentences, texts or spans, or the target embedding"
        )
    others = rows[(rows.reader != "probe") & (rows.seed.isna() | (rows.seed == seed)) & rows[metric].notna()]
    return KeptProbes(
        variant,
        seed,
        solver,
        horizon,
        points,
        positions,
        record,
        metric,
        own,
        {str(name): by.set_index("position").reindex(names) for name, by in others.groupby("reader")},
        int(validation_loss(own).where(~own.injected).fillna(float("inf")).to_numpy().argmin()),
        saved,
    )
