"""Softmax probes: many multinomial logistic regressions at once, in batched torch, on a CPU or a GPU.

A probe minimises, over weights W [width, classes] and intercept b [classes],

    mean over examples of -log softmax(z W + b)[y]  +  l2 / 2 * ||W||_F^2        (nats)

where z are the features standardised by the probe's own training mean and deviation. The penalty is on the
weights of the *standardised* features, the intercept is free: scikit-learn's `C` is 1 / (examples * l2).

The solver is memoryless BFGS (L-BFGS with one pair of vectors; Nocedal and Wright, Numerical Optimization,
section 7.2), preconditioned by the exact Hessian of the model that knows only the class prior p,
(diag(p) - p p') (x) Z'Z / n + l2 I. The usual probe, of little signal, is a few steps away from that model.
One eigendecomposition of Z'Z inverts this Hessian for every penalty.

A class without a training example would send its intercept to minus infinity. Such probes get one more
example, at the mean activation, with a label spread evenly over the absent classes, which together keep a
probability of about 1 / (n + 1) there. Probes that have seen every class are not affected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

COMPACT = 0.75
"""The batch is rebuilt without its finished probes, at the cost of a copy, once this share is unfinished."""


class SoftmaxProbes:
    """A batch of softmax probes; each keeps the penalty that is best on its validation examples.

    Attributes:
        coef_: Weights on raw activations, [probes, width, classes].
        intercept_: Intercepts for raw activations, [probes, classes].
        n_iter_: Iterations at the kept penalty, from its warm start, [probes].
        converged_: Whether the kept fit met the tolerance, [probes], bool.
        l2_: The penalty kept, [probes].
        validation_cross_entropy_: In nats, [probes, penalties] in the order given; only after `fit`.
        classes_: Number of classes.
    """

    def __init__(self, l2: Sequence[float], max_iterations: int = 200, tolerance: float = 1e-4) -> None:
        """Sets the penalties to try and when the solver stops.

        Args:
            l2: Penalties, all positive; fitted from strong to weak, each from the solution of the last.
            max_iterations: Most evaluations of the gradient for each penalty.
            tolerance: A probe stops when its gradient norm is at most this share of that at zero weights.
        """
        if not l2 or min(l2) <= 0:
            raise ProbekitError(f"l2 is {list(l2)}; it must hold at least one penalty, all above 0")
        self.l2, self.max_iterations, self.tolerance = tuple(l2), max_iterations, tolerance

    def fit(self, X: Tensor, y: Tensor, classes: int, X_validation: Tensor, y_validation: Tensor) -> Self:
        """Fits all probes.

        Args:
            X: Activations, [probes, examples, width]; solved in float64 if they are that, else in float32.
            y: Classes, [probes, examples], or [examples] where the probes share them; int64.
            classes: Number of classes.
            X_validation: Activations on which the penalty is chosen, with examples of their own.
            y_validation: Their classes.

        Raises:
            ProbekitError: A shape, a class or an activation is wrong; for an activation it names the probe.
        """
        y, y_validation = expand_labels(X, y, classes), expand_labels(X_validation, y_validation, classes)
        order = sorted(range(len(self.l2)), key=lambda column: -self.l2[column])
        path = torch.tensor([self.l2[column] for column in order], dtype=torch.float64, device=X.device)
        best, validation = [], []
        for at in self._chunks(X, classes, X_validation.shape[1]):
            fits = list(self._solutions(at, X, y, classes, path[:, None].expand(-1, len(X))))
            found = [losses(X_validation[at], y_validation[at], *fitted[:2]).mean(1) for fitted in fits]
            validation.append(torch.stack(found, 1))
            rows = validation[-1].argmin(1), torch.arange(len(found[0]), device=X.device)
            best.append(_Fitted(*(torch.stack(parts)[rows] for parts in zip(*fits, strict=True))))
        self._keep(best)
        along_path = torch.cat(validation)
        check_validation(along_path)
        self.l2_, self.classes_ = path[along_path.argmin(1)], classes
        self.validation_cross_entropy_ = along_path[:, torch.tensor(order).argsort()]
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
        chunks = self._chunks(X, classes, 0)
        self._keep([next(self._solutions(at, X, y, classes, l2[None])) for at in chunks])
        self.l2_, self.classes_ = l2, classes
        return self

    def log_probabilities(self, X: Tensor) -> Tensor:
        """Log-probabilities [probes, examples, classes] in nats of activations [probes, examples, width]."""
        return log_softmax(X, self.coef_, self.intercept_)

    def _chunks(self, X: Tensor, classes: int, validation: int) -> list[slice]:
        examples, width = max(X.shape[1], validation), X.shape[2]
        elements = examples * (3 * width + 2 * classes) + (2 * len(self.l2) + 10) * width * classes
        return probe_slices(len(X), elements, X)

    def _solutions(self, at: slice, X: Tensor, y: Tensor, classes: int, path: Tensor) -> Iterator[_Fitted]:
        """The fits of a chunk of probes at each penalty of a path [penalties, probes], each from the last."""
        Z, mean, scale = standardised(X[at].to(solver_dtype(X)), at.start)
        problem, basis = _rotated(Z, y[at], classes)
        weights = torch.cat([basis.new_zeros(len(Z), Z.shape[2], classes), problem.prior.log()], 1)
        rounding = 8 * torch.finfo(Z.dtype).eps  # where no feature varies, the gradient is rounding alone
        threshold = (self.tolerance * _norm(problem.gradient(weights)[1])).clamp(min=rounding)
        for l2 in path[:, at, None, None].to(Z):
            weights, *status = _minimise(problem._replace(l2=l2), weights, threshold, self.max_iterations)
            coef = torch.bmm(basis, weights[:, :-1]) / scale.mT
            intercept = weights[:, -1] - weights[:, -1].mean(1, keepdim=True) - torch.bmm(mean, coef)[:, 0]
            yield _Fitted(coef, intercept, *status)

    def _keep(self, chunks: list[_Fitted]) -> None:
        results = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        self.coef_, self.intercept_, self.n_iter_, self.converged_ = results


class _Fitted(NamedTuple):
    """Results of a chunk of probes, as `SoftmaxProbes` lists them."""

    coef: Tensor
    intercept: Tensor
    n_iter: Tensor
    converged: Tensor


class _Problem(NamedTuple):
    """Probes in the eigenbasis of their standardised features; a last feature of 1 carries the intercept."""

    Z: Tensor  # [probes, examples, width + 1]
    y: Tensor  # [probes, examples, 1]
    spectrum: Tensor  # [probes, width + 1, 1]: mean square of each feature
    prior: Tensor  # [probes, 1, classes]: class shares, the added example included
    absent: Tensor  # [probes, 1, classes]: the added example's label, zeros where no class is absent
    l2: Tensor  # [probes, 1, 1]

    def gradient(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The objective [probes, 1, 1] and its gradient [probes, width + 1, classes]."""
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

    weights: Tensor  # [probes, width + 1, classes], as are gradient and direction
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
    problem: _Problem, start: Tensor, threshold: Tensor, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs each probe until its gradient norm is at most its threshold.

    Returns:
        Weights [probes, width + 1, classes], iterations [probes], and whether the probe converged [probes].
    """
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
        stopped = active[running & (_norm(state.gradient) <= threshold[active])]
        converged[stopped], iterations[stopped] = True, iteration
        running = ~converged[active]
        if not running.any():
            break
        if running.sum() <= COMPACT * len(active):
            active, problem = active[running], _Problem(*(part[running] for part in problem))
            state = _State(*(part[running] for part in state))
    return result, iterations, converged


def _rotated(Z: Tensor, y: Tensor, classes: int) -> tuple[_Problem, Tensor]:
    """The problem in the eigenbasis of the features, and that basis, [probes, width, width]."""
    probes, examples, _ = Z.shape
    spectrum, basis = _eigen(torch.bmm(Z.mT, Z) / examples)
    one = Z.new_ones(probes, 1, 1)
    spectrum = torch.cat([spectrum.clamp(min=0)[..., None], one], 1)
    Z = torch.cat([torch.bmm(Z, basis), one.expand(-1, examples, -1)], 2)
    counts = Z.new_zeros(probes, 1, classes).scatter_add_(2, y[:, None], one.expand(-1, -1, examples))
    absent = absent_classes(counts)
    prior = (counts + absent) / (counts + absent).sum(2, keepdim=True)
    return _Problem(Z, y[..., None], spectrum, prior, absent, torch.zeros_like(one)), basis


def _eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; in float64 where float32 does not converge."""
    try:
        found = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        found = torch.linalg.eigh(gram.double())
    return found[0].to(gram.dtype), found[1].to(gram.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((1, 2), keepdim=True)


def _norm(a: Tensor) -> Tensor:
    return a.flatten(1).norm(dim=1)
