"""Softmax probes of a real LM's activations: probekit, every penalty in full, and scikit-learn.

    python benchmarks/fit_real.py --lm FOLDER --text FILE [--articles 200] [--kept FOLDER] [--measured 1]
                                  [--repeats 1] [--only actions] [--out FOLDER]

FILE holds JSON lines with the field `text`; activations are read once and kept in a folder. All contestants
have the default penalties and keep the best on validation examples. "every penalty" fits all of them to the
tolerance of the final fit. "half decades" has a finer grid on the default range, so it keeps other penalties.
scikit-learn fits the last `--measured` probes one by one at its default tolerance, and its time is scaled to
all. The control task is that of shuffled labels here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from contestants import Fit, cross_entropies, logistic_regression, one_by_one
from harness import REFERENCE, Contestant, Options, Row, compare, parse_options, race, run_workloads
from planted_activations import Data
from real_activations import Source, real_activations

from probekit.config import ProbeSettings
from probekit.probing.controls import SHARES, prequential_code
from probekit.probing.solvers import SoftmaxProbes

SETTINGS = ProbeSettings()
TOLERANCE = 1e-4
"""The default of probekit, and of scikit-learn in another unit."""
HALF_DECADES = tuple(10.0 ** (step / 2) for step in range(-8, 1))


def solve(data: Data, penalties: Sequence[float], control: torch.Tensor | None = None) -> SoftmaxProbes:
    """Fits the softmax probes of probekit with default settings."""
    solver, X, y = SoftmaxProbes(penalties, SETTINGS.max_iterations, TOLERANCE), data.X, data.y
    return solver.fit(X["probe"], y["probe"], data.classes, X["validation"], y["validation"], control)


def every_penalty(data: Data, penalties: Sequence[float]) -> SoftmaxProbes:
    """Fits every penalty in full, and keeps the best of each probe."""
    fits = [solve(data, [penalty]) for penalty in penalties]
    found = torch.cat([fit.validation_cross_entropy_ for fit in fits], 1)
    best, kept = (found.argmin(1), torch.arange(len(found))), fits[0]
    for name in ("coef_", "intercept_", "penalty_", "n_iter_", "converged_"):
        setattr(kept, name, torch.stack([getattr(fit, name) for fit in fits])[best])
    kept.validation_cross_entropy_ = found
    return kept


def with_controls(data: Data) -> SoftmaxProbes:
    """Fits probes as a grid does, with the control task and the code length."""
    y = data.y["probe"]
    found = solve(data, SETTINGS.l2, y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))])
    ends = sorted({max(1, round(share * len(y))) for share in SHARES})
    prequential_code(data.X["probe"], y, data.classes, found.penalty_, ends, SETTINGS.max_iterations)
    return found


def scikit_learn(data: Data, solver: str) -> Fit:
    """Fits probes one by one, at every penalty from scratch."""
    fit_one = partial(logistic_regression, solver=solver)
    return one_by_one(fit_one, data, tuple(SETTINGS.l2), TOLERANCE)


def measure(labels: str, data: Data, options: Options, measured: int) -> list[Row]:
    """Measures all contestants on one kind of labels."""
    ours: dict[str, Callable[[], SoftmaxProbes]] = {
        REFERENCE: partial(solve, data, SETTINGS.l2),
        "every penalty": partial(every_penalty, data, SETTINGS.l2),
        "half decades": partial(solve, data, HALF_DECADES),
        "with control and code": partial(with_controls, data),
    }
    outcomes = race(
        {name: Contestant(run, int) for name, run in ours.items()}, options.repeats, options.device
    )
    part = data.only(slice(-measured, None))
    theirs = {
        f"scikit-learn {solver}": Contestant(partial(scikit_learn, part, solver), int)
        for solver in ("lbfgs", "newton-cg")
    }
    outcomes |= race(theirs if measured else {}, 1, options.device)
    reference, full = outcomes[REFERENCE].result, outcomes["every penalty"].result
    losses = cross_entropies(_fit(reference), data)
    rows = []
    for name, outcome in outcomes.items():
        found, probes = outcome.result, len(data.X["test"])
        row = {"workload": labels, "contestant": name, "probes": probes, "classes": data.classes}
        row |= {"examples": len(data.y["probe"]), "width": data.X["probe"].shape[2]}
        if name in ours:
            row |= {"measured_probes": probes} | outcome.columns()
            row |= {"l2": found.penalty_.tolist(), "same_penalty": _share(found.penalty_ == full.penalty_)}
            row |= {"converged": _share(found.converged_), "iterations": float(found.n_iter_.double().mean())}
            row |= {"fitted": _share(found.validation_cross_entropy_.isfinite())}
            its, same = cross_entropies(_fit(found), data), losses
        else:
            row |= {"measured_probes": measured} | outcome.columns(probes / measured)
            row |= {"l2": found.penalty.tolist()}
            row |= {
                "same_penalty": _share(torch.isclose(found.penalty.double(), reference.penalty_[-measured:]))
            }
            its, same = cross_entropies(found, part), losses[-measured:]
        row |= {"cross_entropy": float(its.mean()), "difference": float((its / same - 1).abs().max())}
        rows.append(row)
    compare(rows)
    return rows


def _fit(probes: SoftmaxProbes) -> Fit:
    return Fit(probes.coef_, probes.intercept_, probes.penalty_, None)


def _share(flags: torch.Tensor) -> float:
    return float(flags.double().mean())


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Reads the activations, measures, prints and writes the results."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--lm", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--articles", type=int, default=200)
    parser.add_argument("--kept", type=Path, default=Path("runs/activations"))
    parser.add_argument("--measured", type=int, default=1)
    given, others = parser.parse_known_args(arguments)
    options = parse_options(__doc__, others)
    labels = real_activations(Source(given.lm, given.text, given.articles, given.kept))
    settings = {"lm": given.lm.name, "text": given.text.name, "articles": given.articles, "dtype": "float32"}
    settings |= {
        "l2": list(SETTINGS.l2),
        "tolerance": TOLERANCE,
        "ratio": f"seconds over those of {REFERENCE}",
    }
    return run_workloads("fit_real", options, labels, partial(measure, measured=given.measured), settings)


if __name__ == "__main__":
    main()
