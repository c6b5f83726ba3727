"""Moments: the sums that ridge and LDA probes are solved from, exact to merge over chunks and folds.

Examples are read once and forgotten. What stays of a batch of probes are counts and sums by class and the
scatter of the activations about their mean, merged by the update of Chan, Golub and LeVeque (1979). Products
within a chunk are those of centred activations in float32. Totals are float64: they are added to thousands
of times, and a weak penalty all but inverts the scatter, which magnifies rounding. For 78 probes of width
768 and 1,024 classes they take 0.86 GB, and as much again for each further fold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from probekit import processes
from probekit.errors import ProbekitError
from probekit.probing.solvers.batch import labels, pieces


@dataclass
class Moments:
    """Sufficient statistics of a batch of probes.

    Attributes:
        class_counts: Examples of each class, [probes, classes].
        class_sums: Their activations, summed, [probes, classes, width].
        mean: Of all activations, [probes, width].
        scatter: Sum of (x - mean)(x - mean)', [probes, width, width].
        dtype: Of the products within a chunk and of what is solved from the moments; float32, or float64
            where the activations are that.
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
    ) -> Self:
        """The moments of no example."""
        shapes = (probes, classes), (probes, classes, width), (probes, width), (probes, width, width)
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
        y = labels(X, y, classes)
        for at in pieces(X, 4 * width):
            self._add_piece(at[0], X[at], y[at])
        return self

    def relabelled(self) -> Self:
        """Moments of the same activations, whose mean and scatter they share, under labels of their own.

        What is added to these moments is part of those too, but for its labels, which `add_labels` adds.
        """
        own = torch.zeros_like(self.class_counts), torch.zeros_like(self.class_sums)
        return type(self)(*own, self.mean, self.scatter, self.dtype)

    def add_labels(self, X: Tensor, y: Tensor) -> Self:
        """Adds labels of examples that were added to the moments of which these are `relabelled`."""
        y = labels(X, y, self.class_counts.shape[1])
        for at in pieces(X, 4 * X.shape[2]):
            self._add_classes(at[0], X[at].double(), y[at])
        return self

    def merge(self, other: Self) -> Self:
        """Adds the examples of other moments of the same shape."""
        shapes = [list(moments.class_sums.shape) for moments in (self, other)]
        if shapes[0] != shapes[1]:
            raise ProbekitError(f"moments [probes, classes, width] differ: {shapes[0]} and {shapes[1]}")
        self._move_mean(slice(None), other.count, other.mean)
        self.scatter += other.scatter
        self.class_counts += other.class_counts
        self.class_sums += other.class_sums
        return self

    def over_processes(self, *, labels_alone: bool = False) -> Self:
        """Takes in the examples of all processes.

        Args:
            labels_alone: Mean and scatter are those of the moments of which these are `relabelled`, which
                have taken them in already.
        """
        own, means = self.count, self.mean * self.count[:, None]
        processes.add_up([self.class_counts, self.class_sums])
        if not labels_alone:
            processes.add_up([means])
            mean = means / self.count[:, None].clamp(min=1)
            self.scatter += _outer(self.mean - mean) * own[:, None, None]
            processes.add_up([self.scatter])
            self.mean.copy_(mean)
        return self

    def _add_piece(self, probes: slice, X: Tensor, y: Tensor) -> None:
        """Adds examples [some probes, examples, width] that are few enough to be copied."""
        n = X.shape[1]
        exact = X.double()
        mean = exact.mean(1)
        centre = mean.to(self.dtype)  # rounded: its distance from the mean is made good below
        centred = X.to(self.dtype) - centre[:, None]
        offset = mean - centre
        self._move_mean(probes, torch.full_like(mean[:, 0], n), mean)
        self.scatter[probes] += torch.bmm(centred.mT, centred)
        self.scatter[probes] -= n * _outer(offset)
        self._add_classes(probes, exact, y)

    def _add_classes(self, probes: slice, X: Tensor, y: Tensor) -> None:
        """Adds float64 examples [some probes, examples, width] to the sums of their classes."""
        classes = self.class_counts.shape[1]
        # Measured on a CPU, ns an example of width 768: 140 at 24 classes, 440 at 1,024 (a product with
        # one-hot classes: 260 and 9,000) against 6,200 for the scatter. There is no speed left to win here.
        row = (classes * torch.arange(len(y), device=y.device)[:, None] + y).flatten()
        self.class_sums[probes].flatten(0, 1).index_add_(0, row, X.flatten(0, 1))
        counts = torch.bincount(row, minlength=len(y) * classes)
        self.class_counts[probes] += counts.view(len(y), classes)

    def _move_mean(self, probes: slice, count: Tensor, mean: Tensor) -> None:
        """Moves the mean, before the counts are added, to that with further examples of a given mean."""
        before = self.class_counts[probes].sum(1)
        share = (count / (before + count).clamp(min=1))[:, None]
        delta = mean - self.mean[probes]
        self.scatter[probes] += _outer(delta) * (before[:, None] * share)[..., None]
        self.mean[probes] += delta * share


def leave_one_out(folds: Sequence[Moments]) -> Iterator[tuple[Moments, Moments]]:
    """For each fold the moments of all others together, and its own."""
    for left_out, fold in enumerate(folds):
        probes, classes, width = fold.class_sums.shape
        rest = Moments.zeros(probes, width, classes, fold.mean.device, fold.dtype)
        for other in (*folds[:left_out], *folds[left_out + 1 :]):
            rest.merge(other)
        yield rest, fold


def _outer(a: Tensor) -> Tensor:
    return a[:, :, None] * a[:, None, :]
