"""L1-penalised softmax probes: few features at a time, in batched torch, on a CPU or a GPU.

A probe minimises, over weights W [width, classes] and intercept b [classes],

    mean over examples of -log softmax(z W + b)[y]  +  l1 * sum |W|      (nats)

where z are the features standardised by the probe's own training mean and deviation. The intercept is free:
scikit-learn's `C` is 1 / (examples * l1), for two classes too.

The solver is FISTA (Beck and Teboulle 2009) with a line search and restarts (O'Donoghue and Candes 2015) on
the features that have weights or whose gradient exceeds the penalty, until no other feature's does. Penalties
are compared on validation examples from strong to weak, each from the solution of the last, at a loose
tolerance; the fit at the best is then completed. A probe leaves this path after two penalties in a row that
are worse than an earlier one.

Where a class has no training example, an example is added, as in `SoftmaxProbes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.probing.solvers.base import (
    absent_classes,
    check_validation,
    expand_labels,
    log_softmax,
    losses,
    probe_slices,
    solver_dtype,
    standardised,
)

ROUNDS = 20
"""Most times that features are added for a penalty."""

PATIENCE = 2
"""Weaker penalties with a worse validation loss after which a probe leaves the path."""

LOOSE = 0.1
"""The tolerance at which penalties are compared."""

GROW, SHRINK = 2.0, 0.95
"""Factors of the curvature that the line search assumes, after a step that it refuses and one it accepts."""


class L1Probes:
    """A batch of L1-penalised probes; each keeps the penalty that is best on its validation examples.

    Attributes:
        coef_: Weights on raw activations, [probes, width, classes].
        intercept_: Intercepts for raw activations, [probes, classes].
        nonzero_: Features with a weight that is not zero, [probes].
        n_iter_: Iterations at the kept penalty, from its warm start, [probes].
        converged_: Whether the kept fit met the tolerance, [probes], bool.
        l1_: The penalty kept, [probes].
        validation_cross_entropy_: In nats, [probes, penalties] in the order given; infinite at penalties that
            the probe did not reach.
        control_: The probes of the control task, at the penalties in `l1_`; None if `fit` got none.
        classes_: Number of classes.
    """

    control_: Self | None = None

    def __init__(self, l1: Sequence[float], max_iterations: int = 2000, tolerance: float = 1e-2) -> None:
        """Sets the penalties to try and when the solver stops.

        Args:
            l1: Penalties, all positive.
            max_iterations: Most evaluations of the gradient for a penalty, each time that features are added.
            tolerance: A probe stops when no element of its proximal gradient is above this share of l1.
        """
        if not l1 or min(l1) <= 0:
            raise ProbekitError(f"l1 is {list(l1)}; it must hold at least one penalty, all above 0")
        self.l1, self.max_iterations, self.tolerance = tuple(l1), max_iterations, tolerance

    def fit(
        self,
        X: Tensor,
        y: Tensor,
        classes: int,
        X_validation: Tensor,
        y_validation: Tensor,
        y_control: Tensor | None = None,
    ) -> Self:
        """Chooses a penalty for each probe, and fits all probes; arguments as in `SoftmaxProbes.fit`."""
        y, y_validation = expand_labels(X, y, classes), expand_labels(X_validation, y_validation, classes)
        elements = max(X.shape[1], X_validation.shape[1]) * (3 * X.shape[2] + 8 * classes)
        fitted, controls = [], []
        for at in probe_slices(len(X), elements, X):
            Z, mean, scale = standardised(X[at].to(solver_dtype(X)), at.start)
            problem = _Problem.of(Z, y[at], classes)
            l1, start, validation = self._follow_path(
                problem, mean, scale, X_validation[at], y_validation[at]
            )
            solved = self._minimise(problem, l1, start, self.tolerance)
            found = _Fitted(*_on_raw(solved, mean, scale), l1, validation)
            kept = losses(X_validation[at], y_validation[at], found.coef, found.intercept).mean(1)
            check_validation(kept, at.start)
            validation[torch.tensor(self.l1, dtype=l1.dtype, device=X.device) == l1[:, None]] = kept
            fitted.append(found)
            if y_control is not None:
                problem = _Problem.of(Z, expand_labels(X, y_control, classes)[at], classes)
                solved = self._minimise(problem, l1, problem.start(), self.tolerance)
                controls.append(_Fitted(*_on_raw(solved, mean, scale), l1, validation))
        self._keep(fitted, classes)
        if controls:
            self.control_ = type(self)(self.l1, self.max_iterations, self.tolerance)
            self.control_._keep(controls, classes)
        return self

    def log_probabilities(self, X: Tensor) -> Tensor:
        """Log-probabilities [probes, examples, classes] in nats of activations [probes, examples, width]."""
        return log_softmax(X, self.coef_, self.intercept_)

    def _follow_path(
        self, problem: _Problem, mean: Tensor, scale: Tensor, X: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weakens the penalty of each probe as long as its loss on validation examples falls.

        Returns:
            The best penalties [probes], weights fitted at these, and the losses [probes, penalties].
        """
        active, weights = torch.arange(len(X), device=X.device), problem.start()
        validation = weights.new_full((len(X), len(self.l1)), torch.inf)
        best, kept = validation.new_full((len(X),), max(self.l1)), weights.clone()
        least, waited = validation[:, 0].clone(), torch.zeros_like(active)
        for column in sorted(range(len(self.l1)), key=lambda column: -self.l1[column]):
            l1 = weights.new_full((len(active),), self.l1[column])
            solved = self._minimise(problem, l1, weights, max(LOOSE, self.tolerance))
            weights = solved.weights
            raw = _on_raw(solved, mean[active], scale[active])
            loss = losses(X[active], y[active], *raw[:2]).mean(1)
            validation[active, column] = loss
            better = loss < least[active]
            rows = active[better]
            best[rows], kept[rows], least[rows] = l1[better], weights[better], loss[better]
            waited[active] = torch.where(loss > least[active], waited[active] + 1, 0)
            stays = waited[active] < PATIENCE
            if not stays.any():
                break
            if not stays.all():
                active, weights, problem = active[stays], weights[stays], problem.rows(stays)
        return best, kept, validation

    def _minimise(self, problem: _Problem, l1: Tensor, weights: Tensor, tolerance: float) -> _Solved:
        """Solves each probe at its own penalty [probes], with more and more of the features."""
        threshold = (tolerance * l1).clamp(min=8 * torch.finfo(l1.dtype).eps)
        curvature, iterations = torch.ones_like(l1), torch.zeros_like(l1, dtype=torch.int64)
        for _ in range(ROUNDS):
            above = problem.gradient(weights).abs().amax(2) - l1[:, None]
            used = (weights != 0).any(2)
            used[:, -1] = True  # the intercept
            missing = ~used & (above > threshold[:, None])
            if iterations.any() and not missing.any():
                break
            # Probes that want fewer features than others get some that they do not use.
            wanted = used | (above > 0)
            index = wanted.sort(dim=1, descending=True, stable=True).indices[:, : int(wanted.sum(1).max())]
            penalty = torch.where(wanted, l1[:, None], torch.inf)
            penalty[:, -1] = 0.0
            found = _fista(
                problem.features(index),
                penalty.gather(1, index)[..., None],
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
        return _Solved(weights, iterations, converged & ~missing.any(1), curvature)

    def _keep(self, chunks: list[_Fitted], classes: int) -> None:
        kept = _Fitted(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))
        self.coef_, self.intercept_, self.n_iter_, self.converged_ = kept[:4]
        self.l1_, self.validation_cross_entropy_, self.classes_ = kept.l1, kept.validation, classes

    @property
    def nonzero_(self) -> Tensor:
        """Features with a weight that is not zero, [probes]."""
        return (self.coef_ != 0).any(2).sum(1)


class _Fitted(NamedTuple):
    """Results of a chunk of probes, as `L1Probes` lists them."""

    coef: Tensor
    intercept: Tensor
    n_iter: Tensor
    converged: Tensor
    l1: Tensor
    validation: Tensor


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

    @classmethod
    def of(cls, Z: Tensor, y: Tensor, classes: int) -> Self:
        """The problem of standardised features and classes [probes, examples]."""
        probes, examples, _ = Z.shape
        Y = Z.new_zeros(probes, examples + 1, classes).scatter_(2, y[..., None], 1.0)
        Y[:, -1:] = absent_classes(Y.sum(1, keepdim=True))
        Z = torch.nn.functional.pad(torch.nn.functional.pad(Z, (0, 0, 0, 1)), (0, 1), value=1.0)
        return cls(Z, Y / examples)

    def start(self) -> Tensor:
        """The weights of the model that knows only the prior, [probes, width + 1, classes]."""
        weights = self.Y.new_zeros(len(self.Z), self.Z.shape[2], self.Y.shape[2])
        shares = self.Y.sum(1)
        weights[:, -1] = (shares / shares.sum(1, keepdim=True)).log()
        return weights

    def gradient(self, weights: Tensor) -> Tensor:
        """The gradient of the mean loss, [probes, width + 1, classes]."""
        p = torch.softmax(torch.bmm(self.Z, weights), -1)
        return torch.bmm(self.Z.mT, p * self.Y.sum(2, keepdim=True) - self.Y)

    def features(self, index: Tensor) -> _Problem:
        """The same with some features [probes, some] alone."""
        return self._replace(Z=self.Z.gather(2, index[:, None].expand(-1, self.Z.shape[1], -1)))

    def rows(self, chosen: Tensor) -> _Problem:
        """The same of some probes."""
        return _Problem(*(part[chosen] for part in self))


class _State(NamedTuple):
    """The state of the search; every probe has a line search and restarts of its own."""

    weights: Tensor  # [probes, features, classes]
    scores: Tensor  # [probes, examples + 1, classes], of these weights
    last: Tensor  # the weights before
    last_scores: Tensor
    pace: Tensor  # [probes, 1, 1], grows with the momentum, 1 where there is none; as is curvature
    momentum: Tensor
    curvature: Tensor


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
            active, problem, penalty = active[rows], problem.rows(rows), penalty[rows]
            state = _State(*(part[rows] for part in state))
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


def _on_raw(solved: _Solved, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first fields of `_Fitted`: the solution for activations that are not standardised."""
    coef = solved.weights[:, :-1] / scale.mT
    intercept = solved.weights[:, -1] - solved.weights[:, -1].mean(1, keepdim=True)
    return coef, intercept - torch.bmm(mean, coef)[:, 0], solved.n_iter, solved.converged


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)
