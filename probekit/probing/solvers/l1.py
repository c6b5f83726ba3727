"""L1-penalised softmax probes: few features at a time, in batched torch, on a CPU or a GPU.

A probe minimises, over weights W [width, classes] and intercept b [classes],

    mean over examples of -log softmax(z W + b)[y]  +  l1 * sum |W|      (nats)

where z are the features standardised by the probe's own training mean and deviation. The intercept is free:
scikit-learn's `C` is 1 / (examples * l1), for two classes too.

The solver is FISTA (Beck and Teboulle 2009) with a line search and restarts (O'Donoghue and Candes 2015) on
the features that have weights or whose gradient exceeds the penalty, until no other feature's does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probekit.probing.solvers.base import (
    absent_classes,
    probe_slices,
    rows_of,
    solver_dtype,
    standardised,
)
from probekit.probing.solvers.penalty_path import Basis, PathProbes

ROUNDS = 20
"""Most times that features are added for a penalty."""

LOOSE = 0.1
"""The tolerance at which penalties are compared."""

GROW, SHRINK = 2.0, 0.95
"""Factors of the curvature that the line search assumes, after a step that it refuses and one it accepts."""


class L1Probes(PathProbes["_Problem"]):
    """A batch of L1-penalised probes; each keeps the penalty that is best on its validation examples.

    Attributes:
        nonzero_: Features with a weight that is not zero, [probes].
    """

    penalty_name, patience = "l1", 2

    def __init__(self, l1: Sequence[float], max_iterations: int = 2000, tolerance: float = 1e-2) -> None:
        """Sets the penalties to try and when the solver stops.

        Args:
            l1: Penalties, all positive.
            max_iterations: Most evaluations of the gradient for a penalty, each time that features are added.
            tolerance: A probe stops when no element of its proximal gradient is above this share of l1.
        """
        super().__init__(l1, max_iterations, tolerance)

    @property
    def nonzero_(self) -> Tensor:
        """Features with a weight that is not zero, [probes]."""
        return (self.coef_ != 0).any(2).sum(1)

    def _chunks(self, X: Tensor, classes: int, validation: int) -> list[slice]:
        return probe_slices(len(X), max(X.shape[1], validation) * (3 * X.shape[2] + 8 * classes), X)

    def _features(self, X: Tensor, first: int) -> tuple[Tensor, Basis]:
        Z, mean, scale = standardised(X.to(solver_dtype(X)), first)
        return Z, Basis(mean, scale)

    def _problem(self, Z: Tensor, y: Tensor, classes: int) -> _Problem:
        probes, examples, _ = Z.shape
        Y = Z.new_zeros(probes, examples + 1, classes).scatter_(2, y[..., None], 1.0)
        Y[:, -1:] = absent_classes(Y.sum(1, keepdim=True))
        Z = torch.nn.functional.pad(torch.nn.functional.pad(Z, (0, 0, 0, 1)), (0, 1), value=1.0)
        return _Problem(Z, Y / examples)

    def _start(self, problem: _Problem) -> Tensor:
        weights = problem.Y.new_zeros(len(problem.Z), problem.Z.shape[2], problem.Y.shape[2])
        shares = problem.Y.sum(1)
        weights[:, -1] = (shares / shares.sum(1, keepdim=True)).log()
        return weights

    def _minimise(
        self, problem: _Problem, penalty: Tensor, weights: Tensor, *, loose: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solves each probe with more and more of the features."""
        tolerance = max(LOOSE, self.tolerance) if loose else self.tolerance
        threshold = (tolerance * penalty).clamp(min=8 * torch.finfo(penalty.dtype).eps)
        curvature, iterations = torch.ones_like(penalty), torch.zeros_like(penalty, dtype=torch.int64)
        for _ in range(ROUNDS):
            above = problem.gradient(weights).abs().amax(2) - penalty[:, None]
            used = (weights != 0).any(2)
            used[:, -1] = True  # the intercept
            missing = ~used & (above > threshold[:, None])
            if iterations.any() and not missing.any():
                break
            # Probes that want fewer features than others get some that they do not use.
            wanted = used | (above > 0)
            index = wanted.sort(dim=1, descending=True, stable=True).indices[:, : int(wanted.sum(1).max())]
            of_feature = torch.where(wanted, penalty[:, None], torch.inf)
            of_feature[:, -1] = 0.0
            found = _fista(
                problem.features(index),
                of_feature.gather(1, index)[..., None],
                weights.gather(1, index[..., None].expand(-1, -1, weights.shape[2])),
                curvature,
                threshold,
                self.max_iterations,
            )
            weights = torch.zeros_like(weights).scatter_(
                1, index[..., None].expand_as(found.weights), found.weights
            )
            curvature, converged = found.curvature, found.converged
            iterations += found.n_iter
        return weights, iterations, converged & ~missing.any(1)


class _Solved(NamedTuple):
    """The solution of a batch of problems."""

    weights: Tensor  # [probes, width + 1, classes]
    n_iter: Tensor  # [probes]
    converged: Tensor  # [probes]
    curvature: Tensor  # [probes], the last that the line search assumed


class _Problem(NamedTuple):
    """Probes on standardised features; a last feature of 1 carries the intercept, a last example is added."""

    Z: Tensor  # [probes, examples + 1, width + 1]
    Y: Tensor  # [probes, examples + 1, classes]: labels over the number of examples; zeros: takes no part

    def gradient(self, weights: Tensor) -> Tensor:
        """The gradient of the mean loss, [probes, width + 1, classes]."""
        p = torch.softmax(torch.bmm(self.Z, weights), -1)
        return torch.bmm(self.Z.mT, p * self.Y.sum(2, keepdim=True) - self.Y)

    def features(self, index: Tensor) -> _Problem:
        """The same with some features [probes, some] alone."""
        return self._replace(Z=self.Z.gather(2, index[:, None].expand(-1, self.Z.shape[1], -1)))


class _State(NamedTuple):
    """The state of the search; every probe has a line search and restarts of its own."""

    weights: Tensor  # [probes, features, classes]
    scores: Tensor  # [probes, examples + 1, classes], of these weights
    last: Tensor  # the weights before
    last_scores: Tensor
    pace: Tensor  # [probes, 1, 1], grows with the momentum, 1 where there is none
    momentum: Tensor
    curvature: Tensor  # [probes, 1, 1]


def _fista(
    problem: _Problem,
    penalty: Tensor,
    weights: Tensor,
    curvature: Tensor,
    threshold: Tensor,
    max_iterations: int,
) -> _Solved:
    """Runs each probe until no element of its proximal gradient is above its threshold [probes].

    Args:
        problem: The problems.
        penalty: L1 penalty of each feature, infinite for one that takes no part, [probes, features, 1].
        weights: Where to start, [probes, features, classes].
        curvature: Curvatures to begin with, [probes].
        threshold: When to stop, [probes].
        max_iterations: Most evaluations of the gradient.
    """
    scores, one = torch.bmm(problem.Z, weights), torch.ones_like(curvature)[:, None, None]
    state = _State(weights, scores, weights, scores, one, 0 * one, curvature[:, None, None])
    active = torch.arange(len(weights), device=weights.device)
    solved = _Solved(weights.clone(), torch.full_like(active, max_iterations), active < 0, curvature.clone())
    for iteration in range(1, max_iterations + 1):
        used = state.curvature
        state, accepted, largest = _advance(problem, penalty, state)
        solved.weights[active] = state.weights
        solved.curvature[active] = used[:, 0, 0]
        stopped = accepted & (largest <= threshold[active])
        solved.converged[active[stopped]], solved.n_iter[active[stopped]] = True, iteration
        if stopped.all():
            break
        if stopped.any():
            rows = ~stopped
            active, problem, penalty = active[rows], rows_of(problem, rows), penalty[rows]
            state = rows_of(state, rows)
    return solved


def _advance(problem: _Problem, penalty: Tensor, at: _State) -> tuple[_State, Tensor, Tensor]:
    """One step of every probe, whether it was accepted, and the largest element of its proximal gradient."""
    point = at.weights + at.momentum * (at.weights - at.last)
    log_p = torch.log_softmax(at.scores + at.momentum * (at.scores - at.last_scores), -1)
    weighed = log_p.exp() * problem.Y.sum(2, keepdim=True)
    step = point - torch.bmm(problem.Z.mT, weighed - problem.Y) / at.curvature
    moved = step.sign() * (step.abs() - penalty / at.curvature).clamp(min=0)
    scores, move = torch.bmm(problem.Z, moved), moved - point
    # How far the loss is above its tangent: the divergence between predictions, exact where both are close.
    above = (weighed * (log_p - torch.log_softmax(scores, -1))).sum((1, 2), keepdim=True)
    rounding = 4 * torch.finfo(move.dtype).eps
    accepted = above <= at.curvature / 2 * _dot(move, move) + rounding
    largest = (at.curvature * move).abs().amax((1, 2))

    back = _dot(move, moved - at.weights) < 0  # the momentum points uphill
    pace = torch.where(back, 1.0, (1 + (1 + 4 * at.pace.square()).sqrt()) / 2)
    momentum = torch.where(back, 0.0, (at.pace - 1) / pace)
    new = _State(moved, scores, at.weights, at.scores, pace, momentum, SHRINK * at.curvature)
    old = at._replace(curvature=GROW * at.curvature)
    state = _State(*(torch.where(accepted, *parts) for parts in zip(new, old, strict=True)))
    return state, accepted[:, 0, 0], largest


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)
