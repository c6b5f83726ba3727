"""Softmax probes: many multinomial logistic regressions at once, in batched torch, on a CPU or a GPU.

A probe minimises, over weights W [width, classes] and intercept b [classes],

    mean over examples of -log softmax(z W + b)[y]  +  l2 / 2 * ||W||_F^2        (nats)

where z are the features standardised by the probe's own training mean and deviation. The penalty is on the
weights of the *standardised* features, the intercept is free: scikit-learn's `C` is 1 / (examples * l2).

The solver is memoryless BFGS (L-BFGS with one pair of vectors; Nocedal and Wright, Numerical Optimization,
section 7.2), preconditioned by the exact Hessian of the model that knows only the class prior p,
(diag(p) - p p') (x) Z'Z / n + l2 I. The usual probe, of little signal, is a few steps away from that model.
One eigendecomposition of Z'Z inverts this Hessian for every penalty.

A probe leaves the path of penalties (`penalty_path`) once a weaker penalty is worse and still weaker ones
promise no better (`_promised`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.probing.solvers.base import (
    absent_classes,
    eigh,
    expand_labels,
    losses,
    probe_slices,
    rows_of,
    solver_dtype,
    standardised,
)
from probekit.probing.solvers.penalty_path import Basis, PathProbes

OF_ZERO, OF_START = 1e-3, 0.1
"""Shares of the gradient norm at zero weights, and at the start, below which penalties are compared."""

PROMISING, LENGTHS = 0.99, (1.0, 0.25)
"""The share of the prior's loss below which a step from it is promising; lengths of it that are tried."""

COMPACT = 0.75
"""The batch is rebuilt without its finished probes, at the cost of a copy, once this share is unfinished."""


class SoftmaxProbes(PathProbes["_Problem"]):
    """A batch of softmax probes; each keeps the penalty that is best on its validation examples."""

    penalty_name = "l2"

    def __init__(self, l2: Sequence[float], max_iterations: int = 200, tolerance: float = 1e-4) -> None:
        """Sets the penalties to try and when the solver stops.

        Args:
            l2: Penalties, all positive.
            max_iterations: Most evaluations of the gradient for a penalty on the path, and to complete a fit.
            tolerance: A probe stops when its gradient norm is at most this share of that at zero weights.
        """
        super().__init__(l2, max_iterations, tolerance)

    def fit_at(self, X: Tensor, y: Tensor, classes: int, l2: Tensor) -> Self:
        """Fits all probes, each at one given penalty.

        Args:
            X: Activations, [probes, examples, width].
            y: Classes, [probes, examples] or [examples]; int64.
            classes: Number of classes.
            l2: The penalties, [probes].

        Raises:
            ProbekitError: A shape, a class, a penalty or an activation is wrong.
        """
        y = expand_labels(X, y, classes)
        if l2.shape != X.shape[:1] or not l2.min() > 0:
            raise ProbekitError(f"l2 {l2.tolist()} must be a penalty above 0 for each of {len(X)} probes")
        fits = []
        for at in self._chunks(X, classes, 0):
            Z, basis = self._features(X[at], at.start)
            problem = self._problem(Z, y[at], classes)
            fits.append(self._complete(problem, basis, l2[at], self._start(problem)))
        self._keep(fits, l2, classes)
        return self

    def _chunks(self, X: Tensor, classes: int, validation: int) -> list[slice]:
        examples, width = max(X.shape[1], validation), X.shape[2]
        return probe_slices(len(X), examples * (3 * width + 2 * classes) + 12 * width * classes, X)

    def _features(self, X: Tensor, first: int) -> tuple[Tensor, Basis]:
        """Features in the eigenbasis of their products; a last one of 1 is the intercept's."""
        Z, mean, scale = standardised(X.to(solver_dtype(X)), first)
        probes, examples, width = Z.shape
        span = None
        if examples < width:  # the penalty keeps the weights in the span of the examples
            span = torch.linalg.qr(Z.mT).Q
            Z = torch.bmm(Z, span)
        vectors = eigh(torch.bmm(Z.mT, Z) / examples)[1]
        Z = torch.cat([torch.bmm(Z, vectors), Z.new_ones(probes, examples, 1)], 2)
        return Z, Basis(mean, scale, vectors if span is None else torch.bmm(span, vectors))

    def _problem(self, Z: Tensor, y: Tensor, classes: int) -> _Problem:
        """The problem of rotated features and classes; its penalty is not set."""
        probes, examples, rank = Z.shape
        ones = Z.new_ones(probes, 1, examples)
        counts = Z.new_zeros(probes, 1, classes).scatter_add_(2, y[:, None], ones)
        absent = absent_classes(counts)
        prior = (counts + absent) / (counts + absent).sum(2, keepdim=True)
        # At zero weights the gradient is minus the sum of the features, which are centred, over each class.
        sums = Z.new_zeros(probes, classes, rank).scatter_add_(1, y[..., None].expand_as(Z), Z)
        size = _norm(sums[..., :-1]) / examples
        spectrum = Z.square().mean(1)[..., None]
        return _Problem(Z, y[..., None], spectrum, prior, absent, size, torch.zeros_like(Z[:, :1, :1]))

    def _start(self, problem: _Problem) -> Tensor:
        weights = problem.prior.new_zeros(len(problem.Z), problem.Z.shape[2], problem.prior.shape[2])
        weights[:, -1:] = problem.prior.log()
        return weights

    def _minimise(
        self, problem: _Problem, penalty: Tensor, weights: Tensor, *, loose: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs each probe until its gradient norm is at most a share of that at zero weights."""
        problem = problem._replace(l2=penalty[:, None, None])
        rounding = 8 * torch.finfo(weights.dtype).eps  # the gradient where no feature varies
        threshold = (self.tolerance * problem.size).clamp(min=rounding)
        # A step of zero from an infinite objective: the first call of _advance evaluates the start.
        zero, infinite = torch.zeros_like(weights), weights.new_full((len(weights), 1, 1), torch.inf)
        state = _State(weights, infinite, zero, zero, torch.zeros_like(infinite))
        result = weights.clone()
        iterations = torch.full_like(threshold, self.max_iterations, dtype=torch.int64)
        converged = torch.zeros_like(iterations, dtype=torch.bool)
        active = torch.arange(len(weights), device=weights.device)
        for iteration in range(self.max_iterations + 1):
            state = _advance(problem, state)
            running = ~converged[active]
            result[active[running]] = state.weights[running]
            if loose and iteration == 0:
                of_start = OF_START * _norm(state.gradient)
                threshold = threshold.maximum(of_start.minimum(OF_ZERO * problem.size))
            stopped = active[running & (_norm(state.gradient) <= threshold[active])]
            converged[stopped], iterations[stopped] = True, iteration
            running = ~converged[active]
            if not running.any():
                break
            if running.sum() <= COMPACT * len(active):
                active, problem, state = active[running], rows_of(problem, running), rows_of(state, running)
        return result, iterations, converged

    def _promised(
        self, problem: _Problem, basis: Basis, X: Tensor, y: Tensor, penalties: Sequence[float]
    ) -> Tensor:
        """The loss of one preconditioned step from the class prior if that gains enough, else infinite.

        Where classes differ in directions of small variance alone, the loss first rises, and falls later.
        """
        start = self._start(problem)
        gradient = problem.gradient(start)[1]
        prior, promised = losses(X, y, *basis.on_raw(start)).mean(1), []
        for l2 in penalties[1:]:
            step = problem._replace(l2=torch.full_like(problem.l2, l2)).precondition(gradient)
            tried = [losses(X, y, *basis.on_raw(start - length * step)).mean(1) for length in LENGTHS]
            promised.append(torch.stack(tried).amin(0))
        promised.append(torch.full_like(prior, torch.inf))
        least = torch.stack(promised, 1).flip(1).cummin(1).values.flip(1)
        return torch.where(least < PROMISING * prior[:, None], least, torch.inf)


class _Problem(NamedTuple):
    """Probes in the eigenbasis of their standardised features; a last feature of 1 carries the intercept."""

    Z: Tensor  # [probes, examples, rank + 1]
    y: Tensor  # [probes, examples, 1]
    spectrum: Tensor  # [probes, rank + 1, 1]: mean square of each feature
    prior: Tensor  # [probes, 1, classes]: class shares, the added example included
    absent: Tensor  # [probes, 1, classes]: the added example's label, zeros where no class is absent
    size: Tensor  # [probes]: norm of the gradient at zero weights
    l2: Tensor  # [probes, 1, 1]

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The objective [probes, 1, 1] and its gradient [probes, rank + 1, classes]."""
        examples = self.Z.shape[1]
        log_p = torch.log_softmax(torch.bmm(self.Z, weights), -1)
        objective = -log_p.gather(2, self.y).mean((1, 2), keepdim=True)
        objective += 0.5 * self.l2 * _dot(weights[:, :-1], weights[:, :-1])
        residual = log_p.exp_().scatter_add_(2, self.y, -torch.ones_like(self.y, dtype=log_p.dtype))
        gradient = torch.bmm(self.Z.mT, residual).div_(examples)
        gradient[:, :-1] += self.l2 * weights[:, :-1]
        log_p = torch.log_softmax(weights[:, -1:], -1)  # of the added example
        objective -= _dot(self.absent, log_p) / examples
        gradient[:, -1:] += (self.absent.sum(2, keepdim=True) * log_p.exp() - self.absent) / examples
        return objective, gradient

    def precondition(self, gradient: Tensor) -> Tensor:
        """Multiplies by the inverse Hessian at the prior's weights (rank one part: Sherman and Morrison)."""
        penalty = self.l2.expand_as(self.spectrum).clone()
        penalty[:, -1] = 0.0
        diagonal = self.spectrum * self.prior + penalty
        share = self.prior / diagonal
        # The intercept's block is singular along equal shifts of all classes, where its gradient has no part.
        rank_one = torch.where(penalty > 0, self.spectrum / (penalty * share.sum(2, keepdim=True)), 0.0)
        return gradient / diagonal + rank_one * share * (share * gradient).sum(2, keepdim=True)


class _State(NamedTuple):
    """The state of the search; every probe has a line search of its own."""

    weights: Tensor  # [probes, rank + 1, classes], as are gradient and direction
    objective: Tensor  # [probes, 1, 1], as is step
    gradient: Tensor
    direction: Tensor
    step: Tensor


def _advance(problem: _Problem, at: _State) -> _State:
    """Evaluates every probe once; it moves if its objective fell enough, otherwise its step shrinks."""
    move = at.step * at.direction
    objective, gradient = problem.gradient(at.weights + move)
    eps = torch.finfo(move.dtype).eps
    # Close to the optimum the decrease drowns in rounding, hence the slack.
    fell = objective <= at.objective + 1e-4 * _dot(at.gradient, move) + 16 * eps * (1 + at.objective)
    change = gradient - at.gradient
    curvature = _dot(move, change)
    usable = curvature > eps * (_dot(move, move) * _dot(change, change)).sqrt()
    inverse = torch.where(usable, 1 / curvature, 0.0)
    scale = torch.where(usable, curvature / _dot(change, problem.precondition(change)), 1.0)
    along = inverse * _dot(move, gradient)
    direction = scale * problem.precondition(gradient - along * change)
    direction = (inverse * _dot(change, direction) - along) * move - direction

    moved = (at.weights + move, objective, gradient, direction, torch.ones_like(at.step))
    stayed = at._replace(step=0.4 * at.step)
    return _State(*(torch.where(fell, new, old) for new, old in zip(moved, stayed, strict=True)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def _norm(a: Tensor) -> Tensor:
    return a.flatten(1).norm(dim=1)
