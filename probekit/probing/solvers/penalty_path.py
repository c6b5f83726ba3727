"""The path of penalties: how iterative solvers choose a penalty for each probe on validation examples.

Closed-form solvers solve for every penalty at once, and choose in `closed_form.py` and `regression.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, NamedTuple, Self

import torch
from torch import Tensor

from probekit.probing.solvers.base import (
    P,
    check_validation,
    checked_penalties,
    expand_labels,
    joined,
    log_softmax,
    losses,
    rows_of,
)


class Basis(NamedTuple):
    """How the features that probes are solved on are made of activations: (x - mean) / scale @ vectors."""

    mean: Tensor  # [probes, 1, width], as is scale
    scale: Tensor
    vectors: Tensor | None = None  # [probes, width, rank], orthonormal columns; None: not rotated

    def on_raw(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [probes, width, classes] and intercepts [probes, classes] for raw activations."""
        coef = weights[:, :-1] if self.vectors is None else torch.bmm(self.vectors, weights[:, :-1])
        coef = coef / self.scale.mT
        intercept = weights[:, -1] - weights[:, -1].mean(1, keepdim=True)
        return coef, intercept - torch.bmm(self.mean, coef)[:, 0]


class Fit(NamedTuple):
    """Fits of a chunk of probes, each at its own penalty."""

    coef: Tensor  # [probes, width, classes], on raw activations
    intercept: Tensor  # [probes, classes]
    n_iter: Tensor  # [probes]
    converged: Tensor  # [probes]


class _Path(NamedTuple):
    """The best penalty of each probe on its path."""

    weights: Tensor  # [probes, features + 1, classes]
    n_iter: Tensor  # [probes]
    column: Tensor  # [probes], of the penalty
    validation: Tensor  # [probes, penalties]


class PathProbes(ABC, Generic[P]):
    """Base of iterative solvers, of probes whose penalty is chosen on validation examples.

    Penalties are compared from strong to weak, each from the solution of the last, at a loose tolerance; the
    fit at the best is then completed. A probe leaves this path after `patience` penalties in a row that are
    worse than an earlier one, unless weaker ones promise to be better: they overfit, and cost the most
    iterations.

    A class without a training example would send its intercept to minus infinity. Such probes get one more
    example, at the mean activation, with a label spread evenly over the absent classes, which together keep a
    probability of about 1 / (n + 1) there. Probes that have seen every class are not affected.

    Attributes:
        coef_: Weights on raw activations, [probes, width, classes].
        intercept_: Intercepts for raw activations, [probes, classes].
        n_iter_: Iterations at the kept penalty, from its warm start, [probes].
        converged_: Whether the kept fit met the tolerance, [probes], bool.
        penalty_: The penalty kept, [probes]; `penalty_name` says which it is.
        validation_cross_entropy_: In nats, [probes, penalties] in the order given; NaN at penalties that the
            probe did not reach. Only after `fit`, as is `validation_loss_`.
        validation_loss_: The same at the penalty kept, [probes].
        control_: The probes of the control task, at the penalties in `penalty_`; None if `fit` got none.
        classes_: Number of classes.
    """

    penalty_name: str
    patience = 1
    control_: Self | None = None

    def __init__(self, penalties: Sequence[float], max_iterations: int, tolerance: float) -> None:
        self.penalties = checked_penalties(self.penalty_name, penalties)
        self.max_iterations, self.tolerance = max_iterations, tolerance

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
        y_control = None if y_control is None else expand_labels(X, y_control, classes)
        penalties = torch.tensor(self.penalties, dtype=torch.float64, device=X.device)
        fits, controls, chosen, validation, kept = [], [], [], [], []
        for at in self._chunks(X, classes, X_validation.shape[1]):
            Z, basis = self._features(X[at], at.start)
            problem = self._problem(Z, y[at], classes)
            path = self._follow_path(problem, basis, X_validation[at], y_validation[at])
            chosen.append(penalties[path.column])
            found = self._complete(problem, basis, chosen[-1], path.weights)
            kept.append(losses(X_validation[at], y_validation[at], found.coef, found.intercept).mean(1))
            check_validation(kept[-1], at.start)
            fits.append(found._replace(n_iter=path.n_iter + found.n_iter))
            validation.append(path.validation.scatter(1, path.column[:, None], kept[-1][:, None]))
            if y_control is not None:
                problem = self._problem(Z, y_control[at], classes)
                controls.append(self._complete(problem, basis, chosen[-1], self._start(problem)))
        self._keep(fits, torch.cat(chosen), classes)
        self.validation_cross_entropy_, self.validation_loss_ = torch.cat(validation), torch.cat(kept)
        if controls:
            self.control_ = type(self)(self.penalties, self.max_iterations, self.tolerance)
            self.control_._keep(controls, self.penalty_, classes)
        return self

    def log_probabilities(self, X: Tensor) -> Tensor:
        """Log-probabilities [probes, examples, classes] in nats of activations [probes, examples, width]."""
        return log_softmax(X, self.coef_, self.intercept_)

    def _follow_path(self, problem: P, basis: Basis, X: Tensor, y: Tensor) -> _Path:
        """Weakens the penalty of each probe as long as its loss on validation examples falls."""
        order = sorted(range(len(self.penalties)), key=lambda column: -self.penalties[column])
        weights, active = self._start(problem), torch.arange(len(X), device=X.device)
        validation = weights.new_full((len(X), len(order)), torch.nan)
        path = _Path(weights.clone(), torch.zeros_like(active), torch.full_like(active, order[0]), validation)
        least, waited = weights.new_full((len(X),), torch.inf), torch.zeros_like(active)
        promised = self._promised(problem, basis, X, y, [self.penalties[column] for column in order])
        for step, column in enumerate(order):
            penalty = weights.new_full((len(active),), self.penalties[column])
            weights, n_iter, _ = self._minimise(problem, penalty, weights, loose=True)
            found = losses(X[active], y[active], *basis.on_raw(weights)).mean(1)
            validation[active, column] = found
            better = found < least[active]
            rows = active[better]
            path.weights[rows], path.n_iter[rows], path.column[rows] = weights[better], n_iter[better], column
            least[rows] = found[better]
            waited[active] = torch.where(found > least[active], waited[active] + 1, 0)
            stays = (waited[active] < self.patience) | (promised[active, step] < least[active])
            if not stays.any():
                break
            if not stays.all():
                active, weights = active[stays], weights[stays]
                problem, basis = rows_of(problem, stays), rows_of(basis, stays)
        return path

    def _complete(self, problem: P, basis: Basis, penalty: Tensor, start: Tensor) -> Fit:
        """Fits a chunk of probes, each at its own penalty [probes]."""
        weights, n_iter, converged = self._minimise(problem, penalty.to(start), start)
        return Fit(*basis.on_raw(weights), n_iter, converged)

    def _keep(self, chunks: Sequence[Fit], penalty: Tensor, classes: int) -> None:
        self.coef_, self.intercept_, self.n_iter_, self.converged_ = joined(chunks)
        self.penalty_, self.classes_ = penalty, classes

    def _promised(self, problem: P, basis: Basis, X: Tensor, y: Tensor, penalties: Sequence[float]) -> Tensor:
        """The validation loss that penalties weaker than each of a path promise, [probes, penalties]."""
        return torch.full((len(X), len(penalties)), torch.inf, device=X.device)

    @abstractmethod
    def _chunks(self, X: Tensor, classes: int, validation: int) -> list[slice]:
        """Slices of probes whose working memory stays within bounds; `validation` counts examples."""

    @abstractmethod
    def _features(self, X: Tensor, first: int) -> tuple[Tensor, Basis]:
        """The features [probes, examples, ...] of the probes from `first` on, and their basis."""

    @abstractmethod
    def _problem(self, Z: Tensor, y: Tensor, classes: int) -> P:
        """The problem of features and classes [probes, examples]."""

    @abstractmethod
    def _start(self, problem: P) -> Tensor:
        """The weights of the model that knows only the class prior, [probes, features + 1, classes]."""

    @abstractmethod
    def _minimise(
        self, problem: P, penalty: Tensor, weights: Tensor, *, loose: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Solves each probe at its own penalty [probes], from given weights.

        Returns:
            Weights [probes, features + 1, classes], iterations [probes], and whether each probe converged.
        """
