"""What solvers share: batches of probes, pieces of them that bound the memory, the path of penalties."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from probekit.errors import ProbekitError

P = TypeVar("P", bound=tuple[Any, ...])

CHUNK_BYTES = defaultdict(lambda: 1 << 30, cpu=1 << 25)
"""Working memory of a piece of a batch, by device type; on a CPU a piece should stay in the cache."""


def checked_penalties(name: str, penalties: Sequence[float]) -> tuple[float, ...]:
    """Penalties to try, of which there must be one at least, all above 0, and shrinkage at most 1."""
    most = 1.0 if name == "shrinkage" else float("inf")
    if not penalties or min(penalties) <= 0 or max(penalties) > most:
        above = "all above 0 and at most 1" if most == 1.0 else "all above 0"
        raise ProbekitError(f"{name} is {list(penalties)}; it must hold at least one penalty, {above}")
    return tuple(penalties)


def expand_labels(X: Tensor, y: Tensor, classes: int) -> Tensor:
    """The classes `y` of activations `X` [probes, examples, width] as [probes, examples], checked."""
    if X.ndim != 3 or not X.numel() or y.shape not in (X.shape[:2], X.shape[1:2]):
        raise ProbekitError(
            f"activations {list(X.shape)} must be [probes, examples, width], none of them 0, "
            f"and their classes {list(y.shape)} [probes, examples] or [examples]"
        )
    if y.min() < 0 or y.max() >= classes:
        raise ProbekitError(f"classes run from {y.min()} to {y.max()}; they must be 0 to {classes - 1}")
    return y.expand(X.shape[:2])


def solver_dtype(X: Tensor) -> torch.dtype:
    """The type in which activations are solved: float64 if they are float64, else float32."""
    return torch.float64 if X.dtype == torch.float64 else torch.float32


def probe_slices(probes: int, elements: int, like: Tensor) -> list[slice]:
    """Slices of probes whose working memory stays within bounds.

    Args:
        probes: Number of probes.
        elements: Numbers of working memory that one probe needs.
        like: A tensor on the device; the numbers are of its `solver_dtype`.
    """
    size = max(1, CHUNK_BYTES[like.device.type] // (elements * solver_dtype(like).itemsize))
    return [slice(first, first + size) for first in range(0, probes, size)]


def pieces(X: Tensor, elements: int) -> Iterator[tuple[slice, slice]]:
    """Slices of probes and of examples that cover activations [probes, examples, width].

    Args:
        X: The activations.
        elements: Numbers of working memory that one example of a probe needs.
    """
    probes, examples, _ = X.shape
    size = max(1, CHUNK_BYTES[X.device.type] // (elements * solver_dtype(X).itemsize))
    rows = min(size, examples)
    for first in range(0, probes, size // rows):
        for start in range(0, examples, rows):
            yield slice(first, first + size // rows), slice(start, start + rows)


def rows_of(parts: P, rows: Tensor) -> P:
    """A named tuple of some of the probes; what is None stays so."""
    chosen: list[Any] = [None if part is None else part[rows] for part in parts]
    return type(parts)(*chosen)


def joined(chunks: Sequence[P]) -> P:
    """The named tuple of all probes, from those of its chunks."""
    return type(chunks[0])(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [probes, width] and eigenvectors [probes, width, width] of symmetric matrices."""
    try:
        spectrum, basis = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # divide and conquer can fail where many eigenvalues are equal
        found = [scipy.linalg.eigh(one.cpu().numpy(), driver="ev") for one in matrix]
        spectrum, basis = (torch.from_numpy(np.stack(part)).to(matrix) for part in zip(*found, strict=True))
    return spectrum, basis


def log_softmax(X: Tensor, coef: Tensor, intercept: Tensor) -> Tensor:
    """Log-probabilities [probes, examples, classes] of linear probes, in the type of their weights."""
    return torch.log_softmax(torch.baddbmm(intercept[:, None], X.to(coef.dtype), coef), -1)


def losses(X: Tensor, y: Tensor, coef: Tensor, intercept: Tensor) -> Tensor:
    """Cross-entropy [probes, examples] in nats of linear probes at classes `y` [probes, examples]."""
    found = coef.new_empty(y.shape)
    for at in pieces(X, X.shape[2] + 2 * coef.shape[2]):
        log_p = log_softmax(X[at], coef[at[0]], intercept[at[0]])
        found[at] = -log_p.gather(2, y[at][..., None])[..., 0]
    return found


def check_validation(losses: Tensor, first: int = 0) -> None:
    """Refuses validation losses [probes, ...] that are not finite; names the probe, numbered from `first`."""
    if len(broken := (~losses.isfinite()).nonzero()):
        raise ProbekitError(f"probe {first + int(broken[0, 0])}: its validation loss is not finite")


def standardised(X: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standardises activations by each probe's own means and deviations.

    Args:
        X: Activations, [probes, examples, width].
        first: Number of the first of these probes, for the error.

    Returns:
        The standardised activations, the means and the scales they were divided by, [probes, 1, width].

    Raises:
        ProbekitError: An activation is not finite; names the probe.
    """
    mean = X.mean(1, keepdim=True)
    Z = X - mean
    scale = Z.square().mean(1, keepdim=True).sqrt()
    if len(broken := (~scale.isfinite()).nonzero()):
        raise ProbekitError(f"probe {first + int(broken[0, 0])}: its activations are not all finite")
    # A constant feature deviates from its mean by rounding, which must not be scaled up to a deviation of 1.
    # With an infinite scale it is exactly zero, and so are its weights.
    scale = torch.where(scale <= 16 * torch.finfo(X.dtype).eps * mean.abs(), torch.inf, scale)
    return Z.div_(scale), mean, scale


def absent_classes(counts: Tensor) -> Tensor:
    """The label of one more example, spread evenly over the classes without any; zeros where there are none.

    Args:
        counts: Examples of each class, [..., classes].
    """
    absent = (counts == 0).to(counts.dtype)
    return absent / absent.sum(-1, keepdim=True).clamp(min=1)


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
