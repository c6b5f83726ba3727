"""Ridge, LDA and mean-difference probes, solved from moments: one eigendecomposition serves every penalty.

With z the standardised activations, z_c their mean over class c of K and p_c the class's share of the
examples, the score of class c is linear in z, with weights

    ridge   (Z'Z / n + l2 I)^-1 sqrt(K p_c) z_c         regression on one-hot labels times sqrt(K / p_c)
    LDA     ((1 - s) V + s tr(V) / width I)^-1 z_c      V the covariance within classes, s the shrinkage
    means   z_c / v                                     v the mean variance within classes along the z_c

The ridge penalty is per example, as in `SoftmaxProbes`: scikit-learn's `alpha` over n. The shrinkage is that
of scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr")`. Mean-difference probes predict the class whose
mean is nearest, weighed by the prior; for two classes their direction is the difference of the means. Scores
become probabilities by

    log p(c | z) = log p_c + score_c(z) / T + constant

at a temperature T chosen for each probe, with its penalty, on validation examples. An infinite T, the class
prior, is a candidate, but not for mean-difference probes. Of several maps from a regression's scores to
probabilities, this one came closest to a softmax probe, and LDA at T = 1 is far overconfident (LOG.md).
Classes without examples have no score: together they get the probability 1 / (n + 1) at every activation, the
others share the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from probekit import distributed
from probekit.errors import ProbekitError
from probekit.probing.solvers.base import (
    absent_classes,
    check_validation,
    checked_penalties,
    eigh,
    expand_labels,
    log_softmax,
    pieces,
    probe_slices,
    solver_dtype,
)

TEMPERATURES = (float("inf"), *(2.0 ** (step / 2) for step in range(12, -7, -1)))
"""Candidates. Steps of sqrt(2) cost up to 0.005 nats against finer ones, steps of 2 up to 0.03."""

CONSTANT = 1e-9
"""A feature that deviates from its mean by at most this share of it is constant and takes no part."""


@dataclass
class Moments:
    """Sufficient statistics of a batch of closed-form probes, in float64.

    Means and scatter are updated as in Chan, Golub and LeVeque (1979), which avoids cancellation.

    Attributes:
        class_counts: Examples of each class, [probes, classes].
        class_sums: Sum of their activations, [probes, classes, width].
        mean: Mean of all activations, [probes, width].
        scatter: Sum of (x - mean)(x - mean)', [probes, width, width]. Where numbers take the place of
            classes, activations are followed by these: `class_sums` and `mean` are width + numbers wide, and
            so is the scatter, [probes, width, width + numbers], without products of two numbers.
        dtype: Type of the products within a chunk, and of the solutions: float32, or float64 for activations
            in float64.
    """

    class_counts: Tensor
    class_sums: Tensor
    mean: Tensor
    scatter: Tensor
    dtype: torch.dtype

    @classmethod
    def zeros(
        cls,
        probes: int,
        width: int,
        classes: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        numbers: int = 0,
    ) -> Self:
        """The moments of no example, with classes or with several numbers, of which `classes` is 1."""
        both = width + numbers
        shapes = (probes, classes), (probes, classes, both), (probes, both), (probes, width, both)
        totals = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]
        return cls(totals[0], totals[1], totals[2], totals[3], dtype)

    @property
    def count(self) -> Tensor:
        """Examples, [probes]."""
        return self.class_counts.sum(1)

    def add(self, X: Tensor, y: Tensor) -> Self:
        """Adds examples.

        Args:
            X: Activations of any floating type, [probes, examples, width].
            y: Classes, [probes, examples], or [examples] where the probes share them; int64.

        Raises:
            ProbekitError: A shape or a class is wrong.
        """
        probes, classes, width = self.class_sums.shape
        if X.shape[::2] != (probes, width):
            raise ProbekitError(
                f"activations {list(X.shape)} do not fit moments of {probes} probes, width {width}"
            )
        y = expand_labels(X, y, classes)
        for at in pieces(X, 4 * width):
            self._add_piece(at[0], X[at], y[at])
        return self

    def add_numbers(self, X: Tensor, y: Tensor) -> Self:
        """Adds examples with numbers in place of classes.

        Args:
            X: Activations of any floating type, [probes, examples, width].
            y: Numbers of each example, [probes, examples, numbers].
        """
        for at in pieces(X, 8 * (X.shape[2] + y.shape[2])):
            joined = torch.cat([X[at].double(), y[at].double()], 2)
            self._add_piece(at[0], joined, joined.new_zeros(joined.shape[:2], dtype=torch.int64))
        return self

    def relabelled(self) -> Self:
        """Moments of the same activations under other labels; they share mean and scatter.

        Examples added to these moments count in those too, except for their labels: see `add_labels`.
        """
        own = torch.zeros_like(self.class_counts), torch.zeros_like(self.class_sums)
        return type(self)(*own, self.mean, self.scatter, self.dtype)

    def add_labels(self, X: Tensor, y: Tensor) -> Self:
        """Adds labels of examples whose activations were added to the moments that were `relabelled`."""
        y = expand_labels(X, y, self.class_counts.shape[1])
        for at in pieces(X, 4 * X.shape[2]):
            self._add_classes(at[0], X[at].double(), y[at])
        return self

    def deviations(self, at: slice) -> Tensor:
        """Standard deviations of the features of some probes, [probes, 1, width]; infinite where constant.

        Raises:
            ProbekitError: There is no example, or a value was not finite; names the probe.
        """
        variance = self.scatter[at].diagonal(dim1=1, dim2=2)[:, None] / self.count[at, None, None]
        scale = variance.clamp(min=0).sqrt()
        known = scale.isfinite().all(2) & self.mean[at, None].isfinite().all(2)
        if len(broken := (~known).nonzero()):
            probe = at.start + int(broken[0, 0])
            raise ProbekitError(f"probe {probe}: it has no examples, or values that are not all finite")
        mean = self.mean[at, None, : scale.shape[2]]
        return torch.where(scale <= CONSTANT * mean.abs(), torch.inf, scale)

    def over_processes(self, *, labels_alone: bool = False) -> Self:
        """Adds up the moments of all processes.

        Args:
            labels_alone: Leave mean and scatter, which are shared with moments that are added up already.
        """
        if distributed.count() == 1:
            return self
        own, means = self.count, self.mean * self.count[:, None]
        distributed.add_up([self.class_counts, self.class_sums])
        if not labels_alone:
            distributed.add_up([means])
            mean = means / self.count[:, None].clamp(min=1)
            for scatter, delta, count in zip(self.scatter, self.mean - mean, own, strict=True):
                # One probe at a time: they are large.
                scatter += count * torch.outer(delta[: len(scatter)], delta)
            distributed.add_up([self.scatter])
            self.mean.copy_(mean)
        return self

    def _add_piece(self, probes: slice, X: Tensor, y: Tensor) -> None:
        """Adds examples [some probes, examples, width] that are few enough to be copied."""
        n = X.shape[1]
        exact = X.double()
        mean = exact.mean(1)
        # Rounded, unless activations are exact; the scatter is corrected for its offset from the mean.
        centre = mean.to(X.dtype if X.dtype == torch.float64 else self.dtype)
        centred = (X.to(centre.dtype) - centre[:, None]).to(self.dtype)
        offset = mean - centre
        self._move_mean(probes, n, mean)
        width = self.scatter.shape[1]
        self.scatter[probes] += torch.bmm(centred[..., :width].mT, centred)
        self._add_outer(probes, offset, torch.full_like(mean[:, 0], -n))
        self._add_classes(probes, exact, y)

    def _add_classes(self, probes: slice, X: Tensor, y: Tensor) -> None:
        """Adds float64 examples [some probes, examples, width] to the sums of their classes."""
        classes = self.class_counts.shape[1]
        # Measured on a CPU, ns an example of width 768: 140 at 24 classes, 440 at 1,024 (a product with
        # one-hot classes: 260 and 9,000), against 6,200 for the scatter.
        row = (classes * torch.arange(len(y), device=y.device)[:, None] + y).flatten()
        self.class_sums[probes].flatten(0, 1).index_add_(0, row, X.flatten(0, 1))
        counts = torch.bincount(row, minlength=len(y) * classes)
        self.class_counts[probes] += counts.view(len(y), classes)

    def _move_mean(self, probes: slice, n: int, mean: Tensor) -> None:
        """Updates mean and scatter for n further examples of a given mean, before they are counted."""
        before = self.class_counts[probes].sum(1)
        share = (n / (before + n))[:, None]
        delta = mean - self.mean[probes]
        self._add_outer(probes, delta, before * share[:, 0])
        self.mean[probes] += delta * share

    def _add_outer(self, probes: slice, a: Tensor, times: Tensor) -> None:
        """Adds a multiple [some probes] of the products of means or offsets with themselves, in place."""
        left = (times[:, None] * a[:, : self.scatter.shape[1]])[..., None]
        self.scatter[probes].baddbmm_(left, a[:, None])


Eigen = tuple[Tensor, Tensor]
"""Eigenvalues [probes, width] and eigenvectors [probes, width, width]."""


class _Solved(NamedTuple):
    """Probes whose penalty is not chosen yet, in the eigenbasis of the matrix that their weights invert."""

    mean: Tensor  # [probes, 1, width], of the activations
    basis: Tensor  # [probes, width, width]: rotates centred activations, their scale folded in
    targets: Tensor  # [probes, width, classes]
    inverse: Tensor  # [probes, penalties, width]: inverse spectrum
    base: Tensor  # [probes, penalties, classes]: scores at the mean activation
    prior: Tensor  # [probes, 1, classes]: class shares, those of classes without examples included
    absent: Tensor  # [probes, 1, classes]: the part of the prior that classes without examples have


class MomentProbes(ABC):
    """Base of solvers that read moments, of probes whose penalty is chosen on validation examples.

    `fit` calls `fit_moments`, `observe_validation` and `choose`. Where memory is too small for all examples,
    call `observe_validation` with one part of the validation examples after the other.

    Attributes:
        coef_: Weights on raw activations, [probes, width, classes or numbers].
        intercept_: Intercepts, [probes, classes or numbers].
        penalty_: The penalty or shrinkage kept, [probes]; `penalty_name` says which it is.
        validation_loss_: The least mean loss on validation examples, [probes].
    """

    penalty_name = "l2"
    coef_: Tensor
    intercept_: Tensor
    penalty_: Tensor
    validation_loss_: Tensor

    def __init__(self, penalties: Sequence[float]) -> None:
        """Sets the penalties to try."""
        self.penalties = checked_penalties(self.penalty_name, penalties)

    def _expect(self, losses: Tensor) -> None:
        """Begins with zero losses on validation examples, [probes, ...]."""
        self._losses, self._observed = losses, 0

    def _mean_losses(self) -> Tensor:
        """The mean losses [probes, ...], those that other processes have observed included.

        Raises:
            ProbekitError: One is not finite; names the probe.
        """
        distributed.add_up([self._losses])
        found = self._losses / distributed.total(self._observed, self._losses.device)
        check_validation(found)
        del self._losses
        return found


class ClosedFormProbes(MomentProbes):
    """Base of ridge, LDA and mean-difference probes.

    Attributes:
        coef_: Weights on raw activations, temperature included, [probes, width, classes].
        intercept_: Intercepts, likewise, [probes, classes]; minus infinity for a class without examples.
        absent_: Probability of each class without examples, 0 for the others, [probes, classes].
        temperature_: What scores were divided by, [probes]; infinite where the class prior was best.
        validation_cross_entropy_: In nats, at the best temperature, [probes, penalties].
        classes_: Number of classes.
    """

    may_be_prior = True
    """Whether an infinite temperature is a candidate."""

    reads_labels = True
    """Whether the matrix to invert depends on labels."""

    classes_: int
    _solved: _Solved

    def fit(self, X: Tensor, y: Tensor, classes: int, X_validation: Tensor, y_validation: Tensor) -> Self:
        """Fits all probes; the arguments are those of `SoftmaxProbes.fit`."""
        y = expand_labels(X, y, classes)
        moments = Moments.zeros(len(X), X.shape[2], classes, X.device, solver_dtype(X)).add(X, y)
        return self.fit_moments(moments).observe_validation(X_validation, y_validation).choose()

    def fit_moments(self, moments: Moments) -> Self:
        """Solves all probes at every penalty.

        Raises:
            ProbekitError: There is no example, or an activation was not finite; names the probe.
        """
        fit_together([self], [moments])
        return self

    def observe_validation(self, X: Tensor, y: Tensor) -> Self:
        """Adds examples to those on which penalty and temperature are chosen; arguments as in `Moments.add`.

        Raises:
            ProbekitError: A shape or a class is wrong.
        """
        solved, y = self._solved, expand_labels(X, y, self.classes_)
        for at in pieces(X, 2 * X.shape[2] + 3 * self.classes_):
            mean, basis, targets = (part[at[0]] for part in solved[:3])
            prior, absent = solved.prior[at[0]], solved.absent[at[0]]
            rotated = torch.bmm(X[at].to(basis.dtype) - mean, basis)
            for penalty in range(len(self.penalties)):
                inverse, base = solved.inverse[at[0], penalty, None], solved.base[at[0], penalty, None]
                scores = torch.baddbmm(base, rotated * inverse, targets)
                self._losses[at[0], penalty] += _losses(scores, y[at][..., None], prior, absent)
        self._observed += X.shape[1]
        return self

    def choose(self) -> Self:
        """Keeps for each probe the penalty and temperature with the least loss on validation examples.

        Those observed by other processes count too.

        Raises:
            ProbekitError: The loss on them is not finite; names the probe.
        """
        found = self._mean_losses()  # [probes, penalties, temperatures]
        if not self.may_be_prior:
            found[..., torch.tensor(TEMPERATURES).isinf().to(found.device)] = torch.inf
        best, each = found.flatten(1).argmin(1), torch.arange(len(found), device=found.device)
        penalty, temperature = best // len(TEMPERATURES), best % len(TEMPERATURES)
        self.validation_cross_entropy_, self.validation_loss_ = found.amin(2), found.amin((1, 2))
        self.penalty_ = found.new_tensor(self.penalties)[penalty]
        self.temperature_ = found.new_tensor(TEMPERATURES)[temperature]
        solved, divisor = self._solved, self.temperature_[:, None, None].to(self._solved.basis)
        inverse, base = solved.inverse[each, penalty, None], solved.base[each, penalty, None]
        self.coef_ = torch.bmm(solved.basis * inverse, solved.targets) / divisor
        intercept = (solved.prior - solved.absent).log() + base / divisor
        self.intercept_ = (intercept - torch.bmm(solved.mean, self.coef_))[:, 0]
        self.absent_ = solved.absent[:, 0]
        del self._solved  # as large as the moments
        return self

    def log_probabilities(self, X: Tensor) -> Tensor:
        """Log-probabilities [probes, examples, classes] in nats of activations [probes, examples, width]."""
        absent = self.absent_[:, None]
        present = log_softmax(X, self.coef_, self.intercept_) + torch.log1p(-absent.sum(2, keepdim=True))
        return torch.where(absent > 0, absent.log(), present)

    def _solve(self, moments: Moments, at: slice, known: Eigen | None) -> tuple[_Solved, Eigen]:
        """Some of the probes, at every penalty, and their decomposition if it is not known yet."""
        count, counts = moments.count[at, None, None], moments.class_counts[at, :, None]
        mean, scatter, scale = moments.mean[at, None], moments.scatter[at], moments.deviations(at)
        means = (moments.class_sums[at] / counts.clamp(min=1) - mean) / scale
        means = torch.where(counts > 0, means, 0.0)
        matrix, targets = self._system(scatter / count / (scale * scale.mT), means, counts / count)
        spectrum, basis = eigen = known or self._eigh(matrix)
        targets = torch.bmm(basis.mT, targets)
        inverse = self._inverse(spectrum.clamp(min=0))
        weighed = counts.mT + absent_classes(counts.mT)
        prior = weighed / weighed.sum(2, keepdim=True)
        absent = torch.where(counts.mT == 0, prior, 0.0)
        solved = mean, basis / scale.mT, targets, inverse, self._base(targets, inverse), prior, absent
        return _Solved(*(part.to(moments.dtype) for part in solved)), eigen

    @abstractmethod
    def _system(self, covariance: Tensor, means: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        """The symmetric matrix to invert [probes, width, width] and its right side [probes, width, classes].

        Args:
            covariance: Of the standardised activations, [probes, width, width].
            means: Of each class, standardised, [probes, classes, width].
            shares: Of each class, [probes, classes, 1].
        """

    def _eigh(self, matrix: Tensor) -> Eigen:
        """Eigenvalues [probes, width] and eigenvectors [probes, width, width] of the matrix to invert."""
        return eigh(matrix)

    @abstractmethod
    def _inverse(self, spectrum: Tensor) -> Tensor:
        """The inverse spectrum at every penalty, [probes, penalties, width]; spectrum: [probes, width]."""

    @abstractmethod
    def _base(self, targets: Tensor, inverse: Tensor) -> Tensor:
        """The scores at the mean activation, [probes, penalties, classes], from targets in the eigenbasis."""


class RidgeProbes(ClosedFormProbes):
    """A batch of ridge regressions on one-hot labels; each keeps the penalty that is best on validation."""

    reads_labels = False

    def _system(self, covariance: Tensor, means: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        return covariance, ((shares * means.shape[1]).sqrt() * means).mT

    def _inverse(self, spectrum: Tensor) -> Tensor:
        return torch.stack([1 / (spectrum + l2) for l2 in self.penalties], 1)

    def _base(self, targets: Tensor, inverse: Tensor) -> Tensor:
        return targets.new_zeros(len(targets), inverse.shape[1], targets.shape[2])


class LDAProbes(ClosedFormProbes):
    """A batch of linear discriminant analyses; each keeps the shrinkage that is best on validation."""

    penalty_name = "shrinkage"

    def _system(self, covariance: Tensor, means: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        return covariance - torch.bmm(means.mT, shares * means), means.mT

    def _inverse(self, spectrum: Tensor) -> Tensor:
        even = spectrum.mean(1, keepdim=True)
        shrunk = torch.stack([(1 - s) * spectrum + s * even for s in self.penalties], 1)
        # No feature varies within classes where all are constant, or determine the class.
        return 1 / shrunk.clamp(min=torch.finfo(torch.float32).eps)

    def _base(self, targets: Tensor, inverse: Tensor) -> Tensor:
        return -0.5 * torch.bmm(inverse, targets.square())


class MeanDifferenceProbes(LDAProbes):
    """A batch of classifiers by the nearest class mean: LDA with a multiple of the identity as covariance.

    They keep their directions, which order examples, where on validation examples the prior is better.
    """

    may_be_prior = False

    def __init__(self) -> None:
        super().__init__([1.0])

    def _system(self, covariance: Tensor, means: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
        weighed = shares * means
        within = covariance - torch.bmm(means.mT, weighed)
        along = (torch.bmm(weighed, within) * means).sum((1, 2)) / (weighed * means).sum((1, 2)).clamp(
            min=1e-30
        )
        return along[:, None, None] * torch.eye(means.shape[2]).to(means), means.mT

    def _eigh(self, matrix: Tensor) -> Eigen:
        return matrix.diagonal(dim1=1, dim2=2), torch.eye(matrix.shape[1]).to(matrix).expand_as(matrix)


def fit_together(batches: Sequence[ClosedFormProbes], moments: Sequence[Moments]) -> None:
    """`fit_moments` of batches of one kind and its moments, which share mean and scatter (`relabelled`).

    Where the matrix to invert depends on no labels it is decomposed once, and its basis held once.

    Raises:
        ProbekitError: There is no example, or an activation was not finite; names the probe.
    """
    probes, classes, width = moments[0].class_sums.shape
    for at in probe_slices(probes, 4 * width * (width + classes), moments[0].mean):
        eigen: Eigen | None = None
        for batch, own in zip(batches, moments, strict=True):
            parts, found = batch._solve(own, at, eigen)
            eigen = None if batch.reads_labels else found
            if at.start == 0:
                batch._solved = _Solved(*(part.new_empty(probes, *part.shape[1:]) for part in parts))
                if eigen is not None:
                    first = batches[0]._solved
                    batch._solved = batch._solved._replace(
                        mean=first.mean, basis=first.basis, inverse=first.inverse
                    )
            for whole, part in zip(batch._solved, parts, strict=True):
                whole[at] = part
    for batch in batches:
        batch._expect(moments[0].mean.new_zeros(probes, len(batch.penalties), len(TEMPERATURES)))
        batch.classes_ = classes


def _losses(scores: Tensor, y: Tensor, prior: Tensor, absent: Tensor) -> Tensor:
    """Cross-entropies in nats, summed over examples, at every temperature: [probes, temperatures].

    Args:
        scores: [probes, examples, classes]; overwritten.
        y: Classes, [probes, examples, 1].
        prior: Class shares, [probes, 1, classes].
        absent: The part of them that classes without examples have, [probes, 1, classes].
    """
    # Scores of absent classes are not used, but must be finite for an infinite temperature.
    scores.masked_fill_(absent > 0, torch.finfo(scores.dtype).min)
    scores -= scores.amax(2, keepdim=True)
    own, scored = scores.gather(2, y), absent.expand_as(scores).gather(2, y) == 0
    of_prior = prior.expand_as(scores).gather(2, y).log()
    shares = ((prior - absent) / (1 - absent.sum(2, keepdim=True))).mT
    found = []
    for temperature in TEMPERATURES:
        # The best class has score 0 and at least the share of one example, so the sum is not 0. The clamp
        # avoids subnormal numbers, which are several times as slow.
        total = torch.bmm((scores / temperature).clamp_(min=-60).exp_(), shares)
        above_prior = torch.where(scored, own / temperature - total.log(), 0.0)
        found.append(-(above_prior + of_prior).double().sum((1, 2)))
    return torch.stack(found, 1)
