"""Ridge regressions on numbers, solved from moments: one eigendecomposition of a probe serves every penalty.

With z the standardised activations and y a number less its mean, or a vector of several, the weights are

    (Z'Z / n + l2 I)^-1 Z'y / n

The penalty is per example, as in `RidgeProbes`: scikit-learn's `alpha` over n. An infinite penalty, which
predicts the mean of the examples fitted on, is a candidate too: numbers that cannot be read have an R2 of 0.
All numbers of a vector have one penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from probekit.probing.solvers.base import eigh, joined, pieces, probe_slices, solver_dtype
from probekit.probing.solvers.closed_form import MomentProbes, Moments


class _Solved(NamedTuple):
    """Probes whose penalty is not chosen yet, in the eigenbasis of their correlations."""

    mean: Tensor  # [probes, 1, width], of the activations
    basis: Tensor  # [probes, width, width]: rotates centred activations, their scale folded in
    targets: Tensor  # [probes, width, outputs], float64
    inverse: Tensor  # [probes, width, penalties]: inverse spectrum, 0 at the infinite one, which comes last
    level: Tensor  # [probes, 1, outputs], the mean of the numbers

    def weights(self, penalty: int | Tensor) -> Tensor:
        """The weights of rotated activations at a penalty, or at one for each probe `[probes]`."""
        if isinstance(penalty, int):
            inverse = self.inverse[:, :, penalty, None]
        else:
            inverse = self.inverse.gather(2, penalty[:, None, None].expand(-1, self.inverse.shape[1], 1))
        return (self.targets * inverse).to(self.basis.dtype)


class RegressionProbes(MomentProbes):
    """A batch of ridge regressions, each of which keeps the penalty that is best on validation examples.

    The penalty is infinite where the mean was best.

    Attributes:
        validation_squared_error_: Squared error on validation examples, summed over outputs and averaged over
            examples, [probes, penalties + 1].
    """

    def __init__(self, l2: Sequence[float], outputs: int | None = None) -> None:
        """Sets what is fitted.

        Args:
            l2: The penalties to try, all positive.
            outputs: Length of the vector that is predicted of each example; None: a single number.
        """
        super().__init__(l2)
        self.penalties, self.outputs = (*self.penalties, float("inf")), outputs

    def fit(self, X: Tensor, y: Tensor, X_validation: Tensor, y_validation: Tensor) -> Self:
        """Fits all probes.

        Args:
            X: Activations, [probes, examples, width].
            y: Numbers, [probes, examples] or [examples]; vectors have a further axis, `outputs` long.
            X_validation: Activations on which each probe's penalty is chosen.
            y_validation: Their numbers.
        """
        y = self._in_vectors(X, y)
        numbers = y.shape[2]
        moments = Moments.zeros(len(X), X.shape[2], 1, X.device, solver_dtype(X), numbers=numbers)
        self.fit_moments(moments.add_numbers(X, y))
        return self.observe_validation(X_validation, y_validation).choose()

    def fit_moments(self, moments: Moments, target: int = 0) -> Self:
        """Solves all probes at every penalty.

        Args:
            moments: Those of activations and numbers, see `Moments.add_numbers`.
            target: Which of the numbers, or vectors of as many outputs, is predicted.

        Raises:
            ProbekitError: There is no example, or an activation or number was not finite; names the probe.
        """
        probes, width, _ = moments.scatter.shape
        outputs = self.outputs or 1
        columns = slice(width + target * outputs, width + (target + 1) * outputs)
        slices = probe_slices(probes, 4 * width * (width + outputs), moments.mean)
        self._solved = joined([self._solve(moments, at, columns) for at in slices])
        self._expect(moments.mean.new_zeros(probes, len(self.penalties)))
        return self

    def observe_validation(self, X: Tensor, y: Tensor) -> Self:
        """Adds examples to those on which the penalty is chosen; arguments as in `fit`."""
        y = self._in_vectors(X, y)
        for at in pieces(X, 2 * X.shape[2] + 3 * y.shape[2]):
            solved = _Solved(*(part[at[0]] for part in self._solved))
            rotated = torch.bmm(X[at].to(solved.basis.dtype) - solved.mean, solved.basis)
            centred = (y[at] - solved.level).to(rotated.dtype)
            for penalty in range(len(self.penalties)):
                error = torch.bmm(rotated, solved.weights(penalty)) - centred
                self._losses[at[0], penalty] += error.double().square().sum((1, 2))
        self._observed += X.shape[1]
        return self

    def choose(self) -> Self:
        """Keeps for each probe the penalty with the least squared error on validation examples.

        Those observed by other processes count too.

        Raises:
            ProbekitError: The error on them is not finite; names the probe.
        """
        found = self._mean_losses()
        best = found.argmin(1)
        self.validation_squared_error_, self.validation_loss_ = found, found.amin(1)
        self.penalty_ = found.new_tensor(self.penalties)[best]
        solved = self._solved
        self.coef_ = torch.bmm(solved.basis, solved.weights(best))
        self.intercept_ = (solved.level - torch.bmm(solved.mean, self.coef_).double())[:, 0]
        del self._solved
        return self

    def predict(self, X: Tensor) -> Tensor:
        """Numbers [probes, examples] of activations [probes, examples, width], in float64; or vectors."""
        found = torch.bmm(X.to(self.coef_.dtype), self.coef_).double() + self.intercept_[:, None]
        return found[..., 0] if self.outputs is None else found

    def _in_vectors(self, X: Tensor, y: Tensor) -> Tensor:
        """Numbers or vectors as [probes, examples, outputs]."""
        return (y[..., None] if self.outputs is None else y).expand(*X.shape[:2], -1)

    def _solve(self, moments: Moments, at: slice, columns: slice) -> _Solved:
        """Some of the probes, at every penalty; their numbers are columns of the moments."""
        count, scatter = moments.count[at, None, None], moments.scatter[at]
        width = scatter.shape[1]
        mean, level = moments.mean[at, None, :width], moments.mean[at, None, columns]
        scale = moments.deviations(at)
        correlations = scatter[:, :, :width] / count / (scale * scale.mT)
        spectrum, basis = eigh(correlations)
        targets = torch.bmm(basis.mT, scatter[:, :, columns] / count / scale.mT)
        inverse = torch.stack([1 / (spectrum.clamp(min=0) + l2) for l2 in self.penalties], 2)
        mean, basis = (part.to(moments.dtype) for part in (mean, basis / scale.mT))
        return _Solved(mean, basis, targets, inverse, level)
