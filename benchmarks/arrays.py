"""Probes of two classes on the same activations: difference of means, logistic regression and L1.

    python benchmarks/arrays.py [--lm FOLDER --text FILE [--articles 200] [--kept FOLDER]] [--only l1]
                                [--measured 2] [--out FOLDER]

probekit fits all probes together, scikit-learn the first `--measured` one after the other, its time scaled to
all. Each has one penalty, so that the area under the ROC curve on test examples must be the same; where it
differs by more than 1 %, no ratio is given. With an LM the activations are real (`real_activations.py`), and
the classes are whether the token read is the most frequent one, and whether the sentence's action is one of
the first half; else activations are random. PyPI's probekit is another project, and not measured here.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import REFERENCE, Contestant, Options, Row, compare, parse_options, race, run_workloads
from planted_activations import Data, Size, plant
from real_activations import Source, real_activations
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from probekit.probing.solvers import L1Probes, MeanDifferenceProbes, SoftmaxProbes

L2, L1 = 0.1, 0.01
TOLERANCE, ITERATIONS = 1e-4, 2000
PROBES: dict[str, Callable[[], Any]] = {
    "mean-difference": MeanDifferenceProbes,
    "softmax": lambda: SoftmaxProbes([L2], ITERATIONS, TOLERANCE),
    "l1": lambda: L1Probes([L1]),
}
"""Those of probekit, by kind."""


def fit_together(kind: str, data: Data) -> np.ndarray:
    """Fits all probes of probekit; scores of test examples `[probes, examples]`."""
    probes = PROBES[kind]().fit(
        data.X["probe"], data.y["probe"], 2, data.X["validation"], data.y["validation"]
    )
    log_p = probes.log_probabilities(data.X["test"])
    return (log_p[..., 1] - log_p[..., 0]).cpu().numpy()


def fit_one_by_one(kind: str, solver: str, data: Data) -> np.ndarray:
    """Fits probes by scikit-learn; scores of test examples `[probes, examples]`."""
    y = data.y["probe"].numpy()
    found = []
    for X, X_test in zip(data.X["probe"].numpy(), data.X["test"].numpy(), strict=True):
        scaler = StandardScaler().fit(X)
        Z, Z_test = scaler.transform(X), scaler.transform(X_test)
        if kind == "mean-difference":
            first, second = NearestCentroid().fit(Z, y).centroids_
            found.append(Z_test @ (second - first))
            continue
        # Two classes halve the weights, and with them the L2 penalty, but not the L1 penalty.
        options = {"C": 2 / (len(y) * L2)} if kind == "softmax" else {"C": 1 / (len(y) * L1), "l1_ratio": 1.0}
        model = LogisticRegression(**options, solver=solver, tol=TOLERANCE, max_iter=ITERATIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # liblinear may not reach the tolerance
            found.append(model.fit(Z, y).decision_function(Z_test))
    return np.stack(found)


SOLVERS = {"mean-difference": ("NearestCentroid",), "softmax": ("lbfgs",), "l1": ("liblinear",)}
"""Those of scikit-learn, by kind of probe; saga takes minutes for one probe of real activations."""


def measure(name: str, data: Data, options: Options, measured: int) -> list[Row]:
    """Measures the contestants of one kind of probes on one kind of labels."""
    kind = name.partition(", ")[0]
    part = data.only(slice(0, measured))
    contestants = {REFERENCE: Contestant(partial(fit_together, kind, data.to(options.device)))}
    for solver in SOLVERS[kind]:
        contestants[f"scikit-learn {solver}"] = Contestant(partial(fit_one_by_one, kind, solver, part), int)
    outcomes = race(contestants, options.repeats, options.device)
    probes, truth = len(data.X["test"]), data.y["test"].numpy()
    areas = {
        contestant: np.array([roc_auc_score(truth, scores) for scores in outcome.result])
        for contestant, outcome in outcomes.items()
    }
    rows = []
    for contestant, outcome in outcomes.items():
        own, timed = areas[contestant], len(areas[contestant])
        row: Row = {"workload": name, "contestant": contestant, "probes": probes, "measured_probes": timed}
        row |= {"examples": len(data.y["probe"]), "width": data.X["probe"].shape[2]}
        row |= outcome.columns(probes / timed) | {"auroc": float(own[:measured].mean())}
        row["difference"] = float(np.abs(own / areas[REFERENCE][:timed] - 1).max())
        rows.append(row)
    compare(rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Reads or draws the activations, measures, prints and writes the results."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--lm", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--articles", type=int, default=200)
    parser.add_argument("--kept", type=Path, default=Path("runs/activations"))
    parser.add_argument("--measured", type=int, default=2)
    given, others = parser.parse_known_args(arguments)
    options = parse_options(__doc__, others)
    if given.lm is None:
        examples, width = (300, 16) if options.quick else (4000, 256)
        drawn = plant(Size(2, 2, examples, width, 4, given.measured), torch.device("cpu"))
        labelled = {"random": (drawn, lambda y: y >= 2)}
    else:
        real = real_activations(Source(given.lm, given.text, given.articles, given.kept))
        labelled = {
            "token read": (real["token read"], lambda y: y == 0),
            "action": (real["64 actions"], lambda y: y < real["64 actions"].classes // 2),
        }
    workloads = {
        f"{kind}, {label}": replace(
            data, y={split: second(y).long() for split, y in data.y.items()}, classes=2
        )
        for kind in PROBES
        for label, (data, second) in labelled.items()
    }
    settings = {"l2": L2, "l1": L1, "tolerance": TOLERANCE, "ratio": f"seconds over those of {REFERENCE}"}
    settings |= {"lm": given.lm and given.lm.name, "text": given.text and given.text.name}
    return run_workloads("arrays", options, workloads, partial(measure, measured=given.measured), settings)


if __name__ == "__main__":
    main()
