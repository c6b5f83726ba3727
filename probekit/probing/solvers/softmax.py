"""Softmax probes: many multinomial logistic regressions at once, in batched torch, on a CPU or a GPU.

A probe minimises, over weights W [width, classes] and intercept b [classes],

    mean over examples of -log softmax(z W + b)[y]  +  l2 / 2 * ||W||_F^2        (nats)

where z are the features standardised by the probe's own training mean and deviation. The penalty is on the
weights of the *standardised* features, the intercept is free: scikit-learn's `C` is 1 / (examples * l2).

The solver is memoryless BFGS (L-BFGS with one pair of vectors; Nocedal and Wright, Numerical Optimization,
section 7.2), preconditioned by the exact Hessian of the model that knows only the class prior p,
(diag(p) - p p') (x) Z'Z / n + l2 I. The usual probe, of little signal, is a few steps away from that model.
One eigendecomposition of Z'Z inverts this Hessian for every penalty.

Penalties are compared on validation examples, from strong to weak, each from the solution of the last, at a
loose tolerance; the fit at the best is then completed. A probe leaves this path once a weaker penalty is
worse and still weaker ones promise no better (`_promised`): they overfit, and cost the most iterations.

A class without a training example would send its intercept to minus infinity. Such probes get one more
example, at the mean activation, with a label spread evenly over the absent classes, which together keep a
probability of about 1 / (n + 1) there. Probes that have seen every class are not affected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self, TypeVar

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

OF_ZERO, OF_START = 1e-3, 0.1
"""Shares of the gradient norm at zero weights, and at the start, below which penalties are compared."""

PROMISING, LENGTHS = 0.99, (1.0, 0.25)
"""The share of the prior's loss below which a step from it is promising; lengths of it that are tried."""

COMPACT = 0.75
"""The batch is rebuilt without its finished probes, at the cost of a copy, once this share is unfinished."""

P = TypeVar("P", bound=tuple[Any, ...])


class SoftmaxProbes:
    """A batch of softmax probes; each keeps the penalty that is best on its validation examples.

    Attributes:
        coef_: Weights on raw activations, [probes, width, classes].
        intercept_: Intercepts for raw activations, [probes, classes].
        n_iter_: Iterations at the kept penalty, from its warm start, [probes].
        converged_: Whether the kept fit met the tolerance, [probes], bool.
        l2_: The penalty kept, [probes].
        validation_cross_entropy_: In nats, [probes, penalties] in the order given; NaN at penalties weaker
            than the one at which the probe left the path. Only after `fit`.
        control_: The probes of the control task, at the penalties in `l2_`; None if `fit` got none.
        classes_: Number of classes.
    """

    control_: Self | None = None

    def __init__(self, l2: Sequence[float], max_iterations: int = 200, tolerance: float = 1e-4) -> None:
        """Sets the penalties to try and when the solver stops.

        Args:
            l2: Penalties, all positive.
            max_iterations: Most evaluations of the gradient for a penalty on the path, and to complete a fit.
            tolerance: A probe stops when its gradient norm is at most this share of that at zero weights.
        """
        if not l2 or min(l2) <= 0:
            raise ProbekitError(f"l2 is {list(l2)}; it must hold at least one penalty, all above 0")
        self.l2, self.max_iterations, self.tolerance = tuple(l2), max_iterations, tolerance

    def fit(
        self,
        X: Tensor,
        y: Tensor,
        classes: int,
        X_validation: Tensor,
        y_validation: Tensor,
        y_control: Tensor | None = None,
    ) -> Self:
        """Chooses a penalty for each probe, and fits all probes.

        Args:
            X: Activations, [probes, examples, width]; solved in float64 if they are that, else in float32.
            y: Classes, [probes, examples], or [examples] where the probes share them; int64.
            classes: Number of classes.
            X_validation: Activations on which the penalty is chosen, with examples of their own.
            y_validation: Their classes.
            y_control: Classes of a control task for `X`; see `control_`.

        Raises:
            ProbekitError: A shape, a class or an activation is wrong; for an activation it names the probe.
        """
        y, y_validation = expand_labels(X, y, classes), expand_labels(X_validation, y_validation, classes)
        fitted, controls, chosen, validation = [], [], [], []
        for at in self._chunks(X, classes, X_validation.shape[1]):
            Z, basis = _rotated(X[at], at.start)
            problem = _Problem.of(Z, y[at], classes)
            path = self._follow_path(problem, basis, X_validation[at], y_validation[at])
            l2 = torch.tensor(self.l2, dtype=torch.float64, device=X.device)[path.column]
            found = self._complete(problem, basis, l2, path.weights)
            kept = losses(X_validation[at], y_validation[at], found.coef, found.intercept).mean(1)
            check_validation(kept, at.start)
            fitted.append(found._replace(n_iter=path.n_iter + found.n_iter))
            validation.append(path.validation.scatter(1, path.column[:, None], kept[:, None]))
            chosen.append(l2)
            if y_control is not None:
                problem = _Problem.of(Z, expand_labels(X, y_control, classes)[at], classes)
                controls.append(self._complete(problem, basis, l2, problem.start()))
        self._keep(fitted, torch.cat(chosen), classes)
        self.validation_cross_entropy_ = torch.cat(validation)
        if controls:
            self.control_ = type(self)(self.l2, self.max_iterations, self.tolerance)
            self.control_._keep(controls, self.l2_, classes)
        return self

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
        fitted = []
        for at in self._chunks(X, classes, 0):
            Z, basis = _rotated(X[at], at.start)
            problem = _Problem.of(Z, y[at], classes)
            fitted.append(self._complete(problem, basis, l2[at], problem.start()))
        self._keep(fitted, l2, classes)
        return self

    def log_probabilities(self, X: Tensor) -> Tensor:
        """Log-probabilities [probes, examples, classes] in nats of activations [probes, examples, width]."""
        return log_softmax(X, self.coef_, self.intercept_)

    def _chunks(self, X: Tensor, classes: int, validation: int) -> list[slice]:
        examples, width = max(X.shape[1], validation), X.shape[2]
        return probe_slices(len(X), examples * (3 * width + 2 * classes) + 12 * width * classes, X)

    def _follow_path(self, problem: _Problem, basis: _Basis, X: Tensor, y: Tensor) -> _Path:
        """Weakens the penalty of each probe as long as its loss on validation examples falls."""
        weights, active = problem.start(), torch.arange(len(X), device=X.device)
        order = sorted(range(len(self.l2)), key=lambda column: -self.l2[column])
        validation = weights.new_full((len(X), len(self.l2)), torch.nan)
        path = _Path(weights.clone(), torch.zeros_like(active), torch.zeros_like(active), validation)
        least = weights.new_full((len(X),), torch.inf)
        promised = _promised(problem, basis, X, y, [self.l2[column] for column in order])
        for step, column in enumerate(order):
            problem = problem._replace(l2=torch.full_like(problem.l2, self.l2[column]))
            weights, n_iter, _ = _minimise(problem, weights, self.tolerance, self.max_iterations, loose=True)
            found = losses(X[active], y[active], *basis.on_raw(weights)).mean(1)
            path.validation[active, column] = found
            better = found < least[active]
            rows = active[better]
            path.weights[rows], path.n_iter[rows], path.column[rows] = weights[better], n_iter[better], column
            least[rows] = found[better]
            stays = better | (promised[active, step] < least[active])
            if not stays.any():
                break
            if not stays.all():
                active, weights = active[stays], weights[stays]
                problem, basis = _rows(problem, stays), _rows(basis, stays)
        return path

    def _complete(self, problem: _Problem, basis: _Basis, l2: Tensor, start: Tensor) -> _Fitted:
        """Fits a chunk of probes, each at its own penalty [probes]."""
        problem = problem._replace(l2=l2[:, None, None].to(start))
        weights, n_iter, converged = _minimise(problem, start, self.tolerance, self.max_iterations)
        return _Fitted(*basis.on_raw(weights), n_iter, converged)

    def _keep(self, chunks: list[_Fitted], l2: Tensor, classes: int) -> None:
        results = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        self.coef_, self.intercept_, self.n_iter_, self.converged_ = results
        self.l2_, self.classes_ = l2, classes


class _Fitted(NamedTuple):
    """Results of a chunk of probes, as `SoftmaxProbes` lists them."""

    coef: Tensor
    intercept: Tensor
    n_iter: Tensor
    converged: Tensor


class _Path(NamedTuple):
    """The best penalty of each probe on its path."""

    weights: Tensor  # [probes, rank + 1, classes], as in `_Problem`
    n_iter: Tensor  # [probes]
    column: Tensor  # [probes], of the penalty
    validation: Tensor  # [probes, penalties], as in `SoftmaxProbes`


class _Basis(NamedTuple):
    """How features of problems are made of raw activations: z = (x - mean) / scale @ vectors."""

    vectors: Tensor  # [probes, width, rank], orthonormal columns
    mean: Tensor  # [probes, 1, width], as is scale
    scale: Tensor

    def on_raw(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [probes, width, classes] and intercepts [probes, classes] for raw activations."""
        coef = torch.bmm(self.vectors, weights[:, :-1]) / self.scale.mT
        intercept = weights[:, -1] - weights[:, -1].mean(1, keepdim=True)
        return coef, intercept - torch.bmm(self.mean, coef)[:, 0]


class _Problem(NamedTuple):
    """Probes in the eigenbasis of their standardised features; a last feature of 1 carries the intercept."""

    Z: Tensor  # [probes, examples, rank + 1]
    y: Tensor  # [probes, examples, 1]
    spectrum: Tensor  # [probes, rank + 1, 1]: mean square of each feature
    prior: Tensor  # [probes, 1, classes]: class shares, the added example included
    absent: Tensor  # [probes, 1, classes]: the added example's label, zeros where no class is absent
    size: Tensor  # [probes]: norm of the gradient at zero weights
    l2: Tensor  # [probes, 1, 1]

    @classmethod
    def of(cls, Z: Tensor, y: Tensor, classes: int) -> Self:
        """The problem of rotated features and classes [probes, examples]; its penalty is not set."""
        probes, examples, rank = Z.shape
        ones = Z.new_ones(probes, 1, examples)
        counts = Z.new_zeros(probes, 1, classes).scatter_add_(2, y[:, None], ones)
        absent = absent_classes(counts)
        prior = (counts + absent) / (counts + absent).sum(2, keepdim=True)
        # At zero weights the gradient is minus the sum of the features, which are centred, over each class.
        sums = Z.new_zeros(probes, classes, rank).scatter_add_(1, y[..., None].expand_as(Z), Z)
        size = _norm(sums[..., :-1]) / examples
        spectrum = Z.square().mean(1)[..., None]
        return cls(Z, y[..., None], spectrum, prior, absent, size, torch.zeros_like(Z[:, :1, :1]))

    def start(self) -> Tensor:
        """The weights of the model that knows only the prior, [probes, rank + 1, classes]."""
        weights = self.prior.new_zeros(len(self.Z), self.Z.shape[2], self.prior.shape[2])
        weights[:, -1:] = self.prior.log()
        return weights

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


def _minimise(
    problem: _Problem, start: Tensor, tolerance: float, max_iterations: int, *, loose: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs each probe until its gradient norm is at most a share of that at zero weights.

    Returns:
        Weights [probes, rank + 1, classes], iterations [probes], and whether the probe converged [probes].
    """
    rounding = 8 * torch.finfo(start.dtype).eps  # where no feature varies, the gradient is rounding alone
    threshold = (tolerance * problem.size).clamp(min=rounding)
    # A step of zero from an infinite objective: the first call of _advance evaluates the start.
    zero, infinite = torch.zeros_like(start), start.new_full((len(start), 1, 1), torch.inf)
    state = _State(start, infinite, zero, zero, torch.zeros_like(infinite))
    result, iterations = start.clone(), torch.full_like(threshold, max_iterations, dtype=torch.int64)
    converged = torch.zeros_like(iterations, dtype=torch.bool)
    active = torch.arange(len(start), device=start.device)
    for iteration in range(max_iterations + 1):
        state = _advance(problem, state)
        running = ~converged[active]
        result[active[running]] = state.weights[running]
        if loose and iteration == 0:
            threshold = threshold.maximum((OF_START * _norm(state.gradient)).minimum(OF_ZERO * problem.size))
        stopped = active[running & (_norm(state.gradient) <= threshold[active])]
        converged[stopped], iterations[stopped] = True, iteration
        running = ~converged[active]
        if not running.any():
            break
        if running.sum() <= COMPACT * len(active):
            active, problem, state = active[running], _rows(problem, running), _rows(state, running)
    return result, iterations, converged


def _rotated(X: Tensor, first: int) -> tuple[Tensor, _Basis]:
    """The features [probes, examples, rank + 1] of problems, and their basis; see `standardised`."""
    Z, mean, scale = standardised(X.to(solver_dtype(X)), first)
    probes, examples, width = Z.shape
    span = None
    if examples < width:  # the penalty keeps the weights in the span of the examples
        span = torch.linalg.qr(Z.mT).Q
        Z = torch.bmm(Z, span)
    vectors = _eigenvectors(torch.bmm(Z.mT, Z) / examples)
    Z = torch.cat([torch.bmm(Z, vectors), Z.new_ones(probes, examples, 1)], 2)
    return Z, _Basis(vectors if span is None else torch.bmm(span, vectors), mean, scale)


def _promised(problem: _Problem, basis: _Basis, X: Tensor, y: Tensor, path: Sequence[float]) -> Tensor:
    """The validation loss that penalties weaker than each of a path promise, [probes, penalties].

    It is that of one preconditioned step from the class prior, if that gains enough; infinite otherwise.
    Where classes differ in directions of small variance alone, the loss first rises, and falls later.
    """
    start = problem.start()
    gradient = problem.gradient(start)[1]
    prior, promised = losses(X, y, *basis.on_raw(start)).mean(1), []
    for l2 in path[1:]:
        step = problem._replace(l2=torch.full_like(problem.l2, l2)).precondition(gradient)
        tried = [losses(X, y, *basis.on_raw(start - length * step)).mean(1) for length in LENGTHS]
        promised.append(torch.stack(tried).amin(0))
    promised.append(torch.full_like(prior, torch.inf))
    least = torch.stack(promised, 1).flip(1).cummin(1).values.flip(1)
    return torch.where(least < PROMISING * prior[:, None], least, torch.inf)


def _rows(parts: P, rows: Tensor) -> P:
    """The same for some of the probes."""
    return type(parts)(*(part[rows] for part in parts))


def _eigenvectors(gram: Tensor) -> Tensor:
    """Eigenvectors of symmetric matrices; found in float64 where float32 does not converge."""
    try:
        return torch.linalg.eigh(gram)[1]
    except torch.linalg.LinAlgError:
        return torch.linalg.eigh(gram.double())[1].to(gram.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def _norm(a: Tensor) -> Tensor:
    return a.flatten(1).norm(dim=1)
