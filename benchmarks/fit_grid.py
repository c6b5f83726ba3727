"""Fitting the grid of probes: probekit, all together, against scikit-learn and PyTorch, one by one.

    python benchmarks/fit_grid.py [--device cuda] [--quick] [--repeats 3] [--out FOLDER]

All contestants get the same activations, on the device, and the same penalties. Each alternative runs at the
loosest of its tolerances that comes within half a percent of probekit's quality, so that none works longer
than needed; where the results still differ by more than 1 %, there is no ratio. Contestants that fit one
probe after the other are timed on `measured_probes` of them, and the time is scaled to all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from contestants import QUALITIES, SOLVERS, Fit, Solver
from harness import (
    REFERENCE,
    SAME,
    Contestant,
    Options,
    Row,
    best_matrix_rate,
    compare,
    parse_options,
    peak_memory,
    race,
    run_workloads,
)
from planted_activations import Data, Size, plant

from probekit.config import ProbeSettings

PATHS = {kind: ProbeSettings().l2 for kind in SOLVERS} | {"lda": ProbeSettings().shrinkage}
"""Penalties of a grid with default settings, by kind of probe."""
ONE = {"softmax": (1e-3,), "ridge": (1e-2,), "lda": (0.1,)}
"""One penalty, so that all solve the same problem."""
ONE_OF_MANY = {"softmax": (1e-2,), "ridge": (1e-1,), "lda": (0.3,)}
"""The same for many classes with few examples of each."""


@dataclass(frozen=True)
class Workload:
    """A table of results."""

    name: str
    kind: str  # of probes: a name in `SOLVERS`
    sizes: tuple[Size, ...]  # of several, the growth of the time from one to the next is reported
    penalties: tuple[float, ...]  # L2, or shrinkages of LDA
    memory: bool = False  # whether peak memory is measured, in processes of their own


def workloads(size: Size, wide: Size, base: Size, doublings: int) -> list[Workload]:
    """Makes all workloads.

    Args:
        size: Of the main ones.
        wide: Many classes, wide activations.
        base: The smallest size of those that show growth.
        doublings: How often each axis of `base` is doubled.
    """
    fewer = replace(size, one_by_one=min(size.one_by_one, 6))  # five penalties take five times as long
    made = []
    for kind in SOLVERS:
        made.append(Workload(f"{kind}, one penalty", kind, (size,), ONE[kind], memory=True))
        made.append(Workload(f"{kind}, default penalties", kind, (fewer,), PATHS[kind]))
        made.append(Workload(f"{kind}, many classes", kind, (wide,), ONE_OF_MANY[kind], memory=True))
    for axis in ("examples", "layers", "distances", "classes"):
        sizes = tuple(replace(base, **{axis: getattr(base, axis) * 2**i}) for i in range(doublings + 1))
        made.append(Workload(f"growth with {axis}", "softmax", sizes, ONE["softmax"]))
    return made


SIZES = {
    "cpu": workloads(
        size=Size(layers=12, distances=4, examples=5_000, width=192, classes=32, one_by_one=48),
        wide=Size(layers=2, distances=1, examples=4_000, width=768, classes=1_024, one_by_one=1),
        base=Size(layers=3, distances=2, examples=2_000, width=192, classes=32, one_by_one=1),
        doublings=3,
    ),
    "cuda": workloads(
        size=Size(layers=12, distances=4, examples=5_000, width=192, classes=32, one_by_one=12),
        wide=Size(layers=13, distances=4, examples=20_000, width=768, classes=1_024, one_by_one=1),
        base=Size(layers=6, distances=4, examples=10_000, width=768, classes=128, one_by_one=1),
        doublings=3,
    ),
}
QUICK = workloads(
    size=Size(layers=2, distances=2, examples=300, width=12, classes=4, one_by_one=2),
    wide=Size(layers=2, distances=1, examples=300, width=16, classes=32, one_by_one=1),
    base=Size(layers=1, distances=1, examples=200, width=8, classes=4, one_by_one=1),
    doublings=1,
)
QUICK = [replace(workload, memory=workload.memory and number == 0) for number, workload in enumerate(QUICK)]


def measure(name: str, workload: Workload, options: Options) -> list[Row]:
    """Measures a workload, size by size."""
    rows: list[Row] = []
    for size in workload.sizes:
        before = rows[-len(SOLVERS[workload.kind]) :]
        found = _measure_size(workload, size, options)
        for row, smaller in zip(found, before, strict=bool(before)):
            same = row["tolerance"] == smaller["tolerance"]
            row["growth"] = row["seconds"] / smaller["seconds"] if same else None
        rows += found
    return rows


def _measure_size(workload: Workload, size: Size, options: Options) -> list[Row]:
    solvers, data = SOLVERS[workload.kind], plant(size, options.device)
    tolerances = _tolerances(workload, data, size)
    fits = {
        name: partial(_fit, solver, _share(solver, data, size), workload.penalties, tolerances[name])
        for name, solver in solvers.items()
    }
    contestants = {name: Contestant(partial(fit), partial(fit, first=1)) for name, fit in fits.items()}
    outcomes = race(contestants, options.repeats, options.device)
    rates = {
        device: best_matrix_rate(options, device, torch.float32, size.shape)
        for device in {options.device, torch.device("cpu")}
    }
    rows: list[Row] = []
    for name, solver in solvers.items():
        measured = size.one_by_one if solver.one_by_one else size.probes
        fit, scale = outcomes[name].result, size.probes / measured
        row = {"workload": workload.name, "probes": size.probes}
        row |= {axis: getattr(size, axis) for axis in ("layers", "distances", "examples", "width", "classes")}
        row |= {"penalties": list(workload.penalties), "contestant": name, "tolerance": tolerances[name]}
        row |= {"measured_probes": measured} | outcomes[name].columns(scale)
        row |= _quality(workload, fit, data.only(slice(size.one_by_one)))
        rate = rates[torch.device("cpu") if solver.on_cpu else options.device]
        row["matrix_rate_share"] = fit.flops * scale / row["seconds"] / rate if fit.flops else None
        if workload.memory and (name == REFERENCE or not options.quick):
            row |= peak_memory(
                prepare_fit,
                options.device,
                kind=workload.kind,
                size=asdict(replace(size, one_by_one=1)),  # one by one takes the memory of one
                penalties=list(workload.penalties),
                name=name,
                tolerance=tolerances[name],
            )
        rows.append(row)
    quality = next(iter(QUALITIES[workload.kind]))
    (reference,) = (row[quality] for row in rows if row["contestant"] == REFERENCE)
    for row in rows:
        row["difference"] = abs(row[quality] / reference - 1)
    compare(rows)
    return rows


def _fit(
    solver: Solver,
    data: Data,
    penalties: tuple[float, ...],
    tolerance: float | None,
    first: int | None = None,
) -> Fit:
    return solver.fit(data.only(slice(first)), penalties, tolerance)


def _share(solver: Solver, data: Data, size: Size) -> Data:
    """The part of the data on which a contestant is measured, on its device."""
    part = data.only(slice(size.one_by_one)) if solver.one_by_one else data
    return part.to("cpu") if solver.on_cpu else part


def _tolerances(workload: Workload, data: Data, size: Size) -> dict[str, float | None]:
    """Each contestant's loosest tolerance with the reference's quality on two probes, or its tightest."""
    part = data.only(slice(min(2, size.one_by_one)))
    # Solvers that choose different penalties minimise different objectives.
    same = list(QUALITIES[workload.kind])[: 1 if len(workload.penalties) > 1 else None]
    solvers = SOLVERS[workload.kind]
    chosen = {name: solver.tolerances[-1] for name, solver in solvers.items()}
    wanted = _quality(workload, solvers[REFERENCE].fit(part, workload.penalties, chosen[REFERENCE]), part)
    for name, solver in solvers.items():
        where = part.to("cpu") if solver.on_cpu else part
        for tolerance in solver.tolerances[:-1]:
            found = _quality(workload, solver.fit(where, workload.penalties, tolerance), part)
            if all(abs(found[key] / wanted[key] - 1) <= SAME / 2 for key in same):
                chosen[name] = tolerance
                break
    return chosen


def _quality(workload: Workload, fit: Fit, data: Data) -> Row:
    """Means over the probes of some data, the first that were fitted."""
    fit = fit.first(len(data.X["test"]), data.y["test"].device)
    return {key: float(of(fit, data).mean()) for key, of in QUALITIES[workload.kind].items()}


def prepare_fit(
    device: str,
    kind: str,
    size: dict[str, int],
    penalties: Sequence[float],
    name: str,
    tolerance: float | None,
) -> Callable[[], Any]:
    """Prepares the data of a workload; the call fits one contestant to it."""
    solver, planted = SOLVERS[kind][name], Size(**size)
    data = _share(solver, plant(planted, torch.device(device)), planted)
    tiny = _share(solver, plant(Size(1, 1, 50, 4, 2, 1), torch.device(device)), planted)
    _fit(solver, tiny, tuple(penalties), tolerance)  # libraries load code when they are first used
    return partial(_fit, solver, data, tuple(penalties), tolerance)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measures all workloads, prints and writes them."""
    options = parse_options(__doc__, arguments)
    wanted = {each.name: each for each in (QUICK if options.quick else SIZES[options.device.type])}
    settings = {"dtype": "float32", "same": SAME, "ratio": f"seconds over those of {REFERENCE}"}
    return run_workloads("fit_grid", options, wanted, measure, settings)


if __name__ == "__main__":
    main()
