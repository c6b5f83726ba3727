"""Solvers for a grid of linear probes: probekit's, all together, and what a user would use instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from planted_activations import Data
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from probekit.probing.solvers import LDAProbes, RidgeProbes, SoftmaxProbes
from probekit.probing.solvers.closed_form import TEMPERATURES

MAX_ITERATIONS = 2000
"""High enough that every contestant stops by its tolerance."""
LADDER = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Tolerances of the alternatives; scikit-learn's default is 1e-4."""


class Fit(NamedTuple):
    """Fitted probes, on raw activations.

    Attributes:
        coef: Weights `[probes, width, classes]`.
        intercept: Intercepts `[probes, classes]`.
        penalty: The penalty that was kept `[probes]`.
        flops: Floating-point operations of the matrix products, by formula; None where they are not known.
    """

    coef: Tensor
    intercept: Tensor
    penalty: Tensor
    flops: float | None

    def first(self, probes: int, device: torch.device) -> Fit:
        """The first probes alone, on a device."""
        coef, intercept, penalty = (part[:probes].to(device) for part in self[:3])
        return Fit(coef, intercept, penalty, self.flops)


FitAll = Callable[[Data, tuple[float, ...], float | None], Fit]
"""Fits all probes to a tolerance in the solver's unit; each keeps the penalty that is best on validation."""
FitOne = Callable[[Data, float, float | None], Fit]
"""Fits the one probe of some data with one penalty."""


class Solver(NamedTuple):
    """A contestant."""

    fit: FitAll
    tolerances: tuple[float | None, ...] = (None,)  # loosest first; None where the solution is exact
    one_by_one: bool = True  # whether probes are fitted separately, so that the time scales with their number
    on_cpu: bool = False  # whether it always computes on the CPU


# All together


def softmax_together(data: Data, penalties: tuple[float, ...], tolerance: float | None) -> Fit:
    """The softmax probes of probekit."""
    assert tolerance is not None  # noqa: S101 - the solver iterates
    probes = SoftmaxProbes(penalties, MAX_ITERATIONS, tolerance).fit(*_arguments(data))
    count, rows, width = data.X["probe"].shape
    # An evaluation is two products (scores, gradient), one evaluation more than iterations; before them come
    # the Gram matrix and the rotation into its basis. Iterations of penalties not kept are not known.
    evaluations = float(probes.n_iter_.sum()) + count
    flops = 4.0 * rows * (width + 1) * data.classes * evaluations + 4.0 * rows * width**2 * count
    return Fit(probes.coef_, probes.intercept_, probes.penalty_, flops if len(penalties) == 1 else None)


def closed_together(
    solver: type[RidgeProbes | LDAProbes], data: Data, penalties: tuple[float, ...], tolerance: float | None
) -> Fit:
    """The closed-form probes of probekit."""
    probes = solver(penalties).fit(*_arguments(data))
    count, rows, width = data.X["probe"].shape
    chosen_on = data.X["validation"].shape[1]
    # The scatter, validation activations in the eigenbasis, their scores for every penalty.
    flops = 2.0 * count * width * ((rows + chosen_on) * width + len(penalties) * chosen_on * data.classes)
    return Fit(probes.coef_, probes.intercept_, probes.penalty_, flops)


def _arguments(data: Data) -> tuple[Tensor, Tensor, int, Tensor, Tensor]:
    X, y = data.X, data.y
    return X["probe"], y["probe"], data.classes, X["validation"], y["validation"]


# One by one


def one_by_one(fit_one: FitOne, data: Data, penalties: tuple[float, ...], tolerance: float | None) -> Fit:
    """Fits one probe after the other, one penalty after the other."""
    fits = []
    for probe in range(len(data.X["probe"])):
        part = data.only(slice(probe, probe + 1))
        alone = [fit_one(part, penalty, tolerance) for penalty in penalties]
        best = alone[0]
        if len(alone) > 1:
            best = min(alone, key=lambda fit: cross_entropies(fit, part, "validation").item())
        fits.append(best._replace(flops=sum(fit.flops or 0.0 for fit in alone)))
    coef, intercept, penalty, flops = zip(*fits, strict=True)
    return Fit(torch.cat(coef), torch.cat(intercept), torch.cat(penalty), sum(flops))


def logistic_regression(data: Data, penalty: float, tolerance: float | None, solver: str = "lbfgs") -> Fit:
    """scikit-learn's LogisticRegression."""
    scaler, Z, y = _standardised(data)
    C = 1 / (len(y) * penalty)
    model = LogisticRegression(C=C, tol=tolerance, max_iter=MAX_ITERATIONS, solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # float32 cannot reach tight tolerances
        model.fit(Z, y)
    # Two products an evaluation, and at least one evaluation an iteration.
    flops = 4.0 * Z.size * data.classes * float(model.n_iter_.sum())
    return _on_raw(scaler, model.coef_.T, model.intercept_, penalty, flops)


def lbfgs(data: Data, penalty: float, tolerance: float | None) -> Fit:
    """torch.optim.LBFGS and autograd, as a user of PyTorch would write it."""
    X, y = data.X["probe"][0], data.y["probe"]
    mean, scale = X.mean(0), X.std(0, correction=0)
    Z = (X - mean) / scale
    W = torch.zeros(X.shape[1], data.classes, device=X.device, requires_grad=True)
    b = torch.zeros(data.classes, device=X.device, requires_grad=True)
    assert tolerance is not None  # noqa: S101 - the solver iterates
    optimiser = torch.optim.LBFGS(
        [W, b],
        max_iter=MAX_ITERATIONS,
        max_eval=2 * MAX_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=10,
        line_search_fn="strong_wolfe",
    )
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(torch.addmm(b, Z, W), y) + penalty / 2 * W.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    coef = W.detach() / scale[:, None]
    intercept = b.detach() - mean @ coef
    flops = 4.0 * Z.numel() * data.classes * evaluations
    return Fit(coef[None], intercept[None], X.new_tensor([penalty]), flops)


def ridge(data: Data, penalty: float, tolerance: float | None) -> Fit:
    """scikit-learn's Ridge on one-hot labels, scaled and calibrated as probekit's are."""
    scaler, Z, y = _standardised(data)
    one_hot = np.eye(data.classes, dtype=Z.dtype)[y]
    model = Ridge(alpha=len(y) * penalty).fit(Z, one_hot)
    coef = model.coef_.T * np.sqrt(data.classes / one_hot.mean(0))
    # The Gram matrix, and its product with the solution's right side.
    flops = 2.0 * Z.size * (Z.shape[1] + data.classes)
    return _calibrated(data, _on_raw(scaler, coef, np.zeros(data.classes), penalty, flops))


def lda(data: Data, penalty: float, tolerance: float | None) -> Fit:
    """scikit-learn's LinearDiscriminantAnalysis with shrinkage, calibrated as probekit's is."""
    scaler, Z, y = _standardised(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about classes with one example
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=penalty).fit(Z, y)
    base = model.intercept_ - np.log(model.priors_)
    flops = 2.0 * Z.size * Z.shape[1]  # the covariance within classes
    return _calibrated(data, _on_raw(scaler, model.coef_.T, base, penalty, flops))


def _standardised(data: Data) -> tuple[StandardScaler, np.ndarray, np.ndarray]:
    scaler = StandardScaler()
    return scaler, scaler.fit_transform(data.X["probe"][0].numpy()), data.y["probe"].numpy()


def _on_raw(
    scaler: StandardScaler, coef: np.ndarray, intercept: np.ndarray, penalty: float, flops: float
) -> Fit:
    """A probe on raw activations, from weights `[width, classes]` on standardised ones."""
    coef = coef / scaler.scale_[:, None]
    intercept = intercept - scaler.mean_ @ coef
    weights, offset = (torch.from_numpy(part.astype(np.float32))[None] for part in (coef, intercept))
    return Fit(weights, offset, torch.tensor([penalty]), flops)


def _calibrated(data: Data, scores: Fit) -> Fit:
    """Log prior plus scores over the temperature that is best on validation examples."""
    counts = torch.bincount(data.y["probe"], minlength=data.classes)
    prior = (counts / counts.sum()).log()
    raw = torch.addmm(scores.intercept, data.X["validation"][0], scores.coef[0])
    y = data.y["validation"]
    best = min(TEMPERATURES, key=lambda t: torch.nn.functional.cross_entropy(prior + raw / t, y).item())
    return scores._replace(coef=scores.coef / best, intercept=prior + scores.intercept / best)


# Quality


def cross_entropies(fit: Fit, data: Data, split: str = "test") -> Tensor:
    """Cross-entropy of each probe in nats `[probes]`; one probe at a time, to save memory."""
    each = zip(data.X[split], fit.coef, fit.intercept, strict=True)
    return torch.stack(
        [
            torch.nn.functional.cross_entropy(torch.addmm(intercept, X, coef), data.y[split])
            for X, coef, intercept in each
        ]
    )


def objectives(fit: Fit, data: Data) -> Tensor:
    """The objective of softmax probes, at the penalty that each chose `[probes]`."""
    standardised = fit.coef * data.X["probe"].std(1, correction=0)[..., None]
    return cross_entropies(fit, data, "probe") + fit.penalty / 2 * standardised.square().sum((1, 2))


SOLVERS: dict[str, dict[str, Solver]] = {
    "softmax": {
        "probekit": Solver(softmax_together, (1e-4,), one_by_one=False),
        "scikit-learn": Solver(partial(one_by_one, logistic_regression), LADDER, on_cpu=True),
        "torch.optim.LBFGS": Solver(partial(one_by_one, lbfgs), LADDER),
    },
    "ridge": {
        "probekit": Solver(partial(closed_together, RidgeProbes), one_by_one=False),
        "scikit-learn": Solver(partial(one_by_one, ridge), on_cpu=True),
    },
    "lda": {
        "probekit": Solver(partial(closed_together, LDAProbes), one_by_one=False),
        "scikit-learn": Solver(partial(one_by_one, lda), on_cpu=True),
    },
}
"""Contestants by kind of probe; probekit runs at its default tolerance."""

QUALITIES: dict[str, dict[str, Callable[[Fit, Data], Tensor]]] = {
    "softmax": {"cross_entropy": cross_entropies, "objective": objectives},
    "ridge": {"cross_entropy": cross_entropies},
    "lda": {"cross_entropy": cross_entropies},
}
"""By kind of probe the qualities that must agree, `[probes]`; ratios are refused by the first."""
