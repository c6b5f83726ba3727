"""Ridge regressions on numbers, solved from moments: one eigendecomposition of a probe serves every penalty.

With z the standardised activations and y a number less its mean, the weights are

    (Z'Z / n + l2 I)^-1 Z'y / n

The penalty is per example, as in `RidgeProbes`: scikit-learn's `alpha` over n. An infinite penalty, which
predicts the mean of the examples fitted on, is a candidate too: numbers that cannot be read have an R2 of 0.
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
    weights: Tensor  # [probes, width, penalties], zeros at the infinite one, which comes last
    level: Tensor  # [probes, 1, 1], the mean of the numbers


class RegressionProbes(MomentProbes):
    """A batch of ridge regressions on a number; each keeps the penalty that is best on validation examples.

    The penalty is infinite where the mean was best.

    Attributes:
        validation_squared_error_: Mean squared error on validation examples, [probes, penalties + 1].
    """

    def __init__(self, l2: Sequence[float]) -> None:
        """Sets the penalties to try, all positive."""
        super().__init__(l2)
        self.penalties = (*self.penalties, float("inf"))

    def fit(self, X: Tensor, y: Tensor, X_validation: Tensor, y_validation: Tensor) -> Self:
        """Fits all probes.

        Args:
            X: Activations, [probes, examples, width].
            y: Numbers, [probes, examples] or [examples].
            X_validation: Activations on which each probe's penalty is chosen.
            y_validation: Their numbers.
        """
        moments = Moments.zeros(len(X), X.shape[2] + 1, 1, X.device, solver_dtype(X))
        moments.add_numbers(X, y.expand(X.shape[:2])[..., None])
        return self.fit_moments(moments).observe_validation(X_validation, y_validation).choose()

    def fit_moments(self, moments: Moments, targets: int = 1, target: int = 0) -> Self:
        """Solves all probes at every penalty.

        Args:
            moments: Those of activations and numbers, see `Moments.add_numbers`.
            targets: How many numbers each example has there.
            target: Which of them is predicted.

        Raises:
            ProbekitError: There is no example, or an activation or number was not finite; names the probe.
        """
        width = moments.mean.shape[1] - targets
        slices = probe_slices(len(moments.mean), 4 * width**2, moments.mean)
        self._solved = joined([self._solve(moments, at, width, width + target) for at in slices])
        self._expect(moments.mean.new_zeros(len(moments.mean), len(self.penalties)))
        return self

    def observe_validation(self, X: Tensor, y: Tensor) -> Self:
        """Adds examples to those on which the penalty is chosen; arguments as in `fit`."""
        y = y.expand(X.shape[:2])
        for at in pieces(X, 2 * X.shape[2] + 3 * len(self.penalties)):
            mean, basis, weights, level = (part[at[0]] for part in self._solved)
            centred = (y[at][..., None] - level).to(weights.dtype)
            predicted = torch.bmm(torch.bmm(X[at].to(basis.dtype) - mean, basis), weights)
            self._losses[at[0]] += (predicted - centred).double().square().sum(1)
        self._observed += X.shape[1]
        return self

    def choose(self) -> Self:
        """Keeps for each probe the penalty with the least squared error on validation examples.

        Those observed by other processes count too.

        Raises:
            ProbekitError: The error on them is not finite; names the probe.
        """
        found = self._mean_losses()
        best, each = found.argmin(1), torch.arange(len(found), device=found.device)
        self.validation_squared_error_, self.validation_loss_ = found, found.amin(1)
        self.penalty_ = found.new_tensor(self.penalties)[best]
        solved = self._solved
        self.coef_ = torch.bmm(solved.basis, solved.weights[each, :, best, None])
        self.intercept_ = (solved.level - torch.bmm(solved.mean, self.coef_).double())[:, 0]
        del self._solved
        return self

    def predict(self, X: Tensor) -> Tensor:
        """Numbers [probes, examples] of activations [probes, examples, width], in float64."""
        return torch.bmm(X.to(self.coef_.dtype), self.coef_)[..., 0].double() + self.intercept_

    def _solve(self, moments: Moments, at: slice, width: int, column: int) -> _Solved:
        """Some of the probes, at every penalty; the number is a column of the moments."""
        count, scatter = moments.count[at, None, None], moments.scatter[at]
        mean, level = moments.mean[at, None, :width], moments.mean[at, None, column, None]
        scale = moments.deviations(at)[..., :width]
        correlations = scatter[:, :width, :width] / count / (scale * scale.mT)
        spectrum, basis = eigh(correlations)
        target = torch.bmm(basis.mT, scatter[:, :width, column, None] / count / scale.mT)
        inverse = torch.stack([1 / (spectrum.clamp(min=0) + l2) for l2 in self.penalties], 2)
        mean, basis, weights = (part.to(moments.dtype) for part in (mean, basis / scale.mT, target * inverse))
        return _Solved(mean, basis, weights, level)
