"""Linear erasure from sums over activations: LEACE, INLP, random subspaces, and refitted probes.

All of it is float64. The variances of an LM's activations span eight orders of magnitude, and whitening
divides by the smallest: from float32 sums, a LEACE projection of SmolLM2's embeddings was 5 % off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probekit.config import Position, ProbedName
from probekit.evaluation.perplexity import window_and_stride
from probekit.probing.activations import ActivationReader, HookPoint
from probekit.probing.grid import FITTED_ON, Grid
from probekit.probing.solvers import Moments
from probekit.progress import Progress
from probekit.run.run import Run

RANK_TOLERANCE = 1e-8
"""Singular values below this share of the largest are rounding errors."""

VARIANCE_TOLERANCE = 1e-11
"""So are variances: those of float32 activations are rounded to about 1e-14 of the largest."""

PENALTY = 1e-3
"""Ridge penalty as a share of the mean variance before erasure: what rounding leaves over must not count."""


@dataclass(frozen=True)
class Eraser:
    """The affine map x - left right (x - mean), in float64.

    Attributes:
        left: `[width, rank]`.
        right: `[rank, width]`.
        mean: Mean of the activations that it was fitted on, which it keeps `[width]`.
    """

    left: Tensor
    right: Tensor
    mean: Tensor

    @property
    def rank(self) -> int:
        """Number of erased dimensions."""
        return self.left.shape[1]

    def __call__(self, activations: Tensor) -> Tensor:
        """Activations `[..., width]` without what a linear probe can read."""
        centred = activations.to(self.mean) - self.mean
        return (activations.to(self.mean) - centred @ self.right.T @ self.left.T).to(activations.dtype)


def leace(moments: Moments) -> Eraser:
    """The LEACE eraser (Belrose et al. 2023): of all that erase, the one that changes activations least.

    It is fitted to one probe's sums; classes without examples play no part.
    """
    mean, covariance, cross = _covariances(moments)
    whiten, colour = _whitening(covariance)
    basis = _range(whiten @ cross)
    return Eraser(colour @ basis, basis.T @ whiten, mean)


def inlp(moments: Moments, rounds: int) -> Eraser:
    """Iterative null-space projection (Ravfogel et al. 2020) with least-squares probes.

    In every round a probe is fitted to what is left, and its weights are projected out.
    """
    mean, covariance, cross = _covariances(moments)
    removed = covariance.new_zeros(len(covariance), 0)
    for _ in range(rounds):
        left = torch.eye(len(covariance)).to(covariance) - removed @ removed.T
        inverse = torch.linalg.pinv(left @ covariance @ left, rtol=VARIANCE_TOLERANCE, hermitian=True)
        weights = inverse @ left @ cross
        removed = torch.linalg.qr(torch.cat([removed, _range(left @ weights)], dim=1)).Q
    return Eraser(removed, removed.T, mean)


class RandomErasers:
    """The control of LEACE: erases equally many random dimensions of the whitened activations.

    Every activation has a random subspace of its own, among the dimensions that vary, so that a mean over
    many activations is one over draws too. The subspace itself is never made: the projection of a vector z
    onto a random subspace of r of m dimensions has the distribution of b z + sqrt(b (1 - b)) |z| u, where b
    is Beta(r / 2, (m - r) / 2) and u a random unit vector orthogonal to z.

    Args:
        moments: Sums over the examples to fit on, of one probe.
        rank: How many dimensions to erase.
    """

    def __init__(self, moments: Moments, rank: int) -> None:
        self._mean, covariance, _ = _covariances(moments)
        self._whiten, self._colour = _whitening(covariance)
        self._varying = self._whiten @ self._colour
        self.dimensions = round(self._varying.trace().item())
        self.rank = min(rank, self.dimensions)

    def __call__(self, activations: Tensor, generators: Sequence[np.random.Generator]) -> Tensor:
        """Activations `[activations, width]` without random dimensions, each drawn by its own generator."""
        z = (activations.to(self._mean) - self._mean) @ self._whiten
        drawn = [(self._draw_share(own), own.normal(size=z.shape[1])) for own in generators]
        share = torch.tensor([b for b, _ in drawn]).to(z)[:, None]
        direction = torch.from_numpy(np.stack([normal for _, normal in drawn])).to(z) @ self._varying
        length, tiny = z.norm(dim=1, keepdim=True), torch.finfo(z.dtype).tiny
        along = z / length.clamp(min=tiny)
        across = direction - (direction * along).sum(1, keepdim=True) * along
        across /= across.norm(dim=1, keepdim=True).clamp(min=tiny)
        lost = share * z + (share * (1 - share)).sqrt() * length * across
        return (activations.to(self._mean) - lost @ self._colour).to(activations.dtype)

    def _draw_share(self, generator: np.random.Generator) -> float:
        """The share of a vector's squared length that its projection has."""
        if not 0 < self.rank < self.dimensions:
            return float(self.rank > 0)
        return float(generator.beta(self.rank / 2, (self.dimensions - self.rank) / 2))


def erased_moments(moments: Moments, eraser: Eraser) -> Moments:
    """The sums of one probe over the same examples after their activations are erased."""
    kept = torch.eye(len(eraser.mean)).to(eraser.mean) - eraser.left @ eraser.right
    shift = eraser.mean - kept @ eraser.mean
    return Moments(
        moments.class_counts,
        moments.class_sums @ kept.T + moments.class_counts[..., None] * shift,
        moments.mean @ kept.T + shift,
        kept @ moments.scatter @ kept.T,
        moments.dtype,
    )


def least_squares_predictions(moments: Moments, activations: Tensor, ridge: Tensor) -> np.ndarray:
    """The classes that a least-squares probe predicts for activations `[examples, width]`: `[examples]`."""
    shares = moments.class_counts[0] / moments.count[0]
    mean, covariance, cross = _covariances(moments)
    weights = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance)).to(covariance), cross)
    scores = shares + (activations.to(covariance) - mean) @ weights
    return scores.argmax(dim=-1).cpu().numpy()


def erasure_accuracies(
    moments: Moments, eraser: Eraser, activations: Tensor, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Whether least-squares probes predict examples correctly before and after erasure.

    Args:
        moments: Sums to fit on, of one probe.
        eraser: The eraser.
        activations: Of the examples, before erasure `[examples, width]`.
        labels: Their classes `[examples]`.

    Returns:
        `fitted_accuracy` of a probe of the activations, `refitted_accuracy` of one that is fitted to erased
        activations, and `prior_accuracy` of the most frequent class, each 0 or 1 `[examples]`.
    """
    activations = activations.to(moments.mean)  # the erased ones must not be rounded
    variances = moments.scatter[0].diagonal() / moments.count[0]
    ridge = PENALTY * variances.mean().clamp(min=1e-30)
    erased = erased_moments(moments, eraser)
    predicted = {
        "fitted_accuracy": least_squares_predictions(moments, activations, ridge),
        "refitted_accuracy": least_squares_predictions(erased, eraser(activations), ridge),
        "prior_accuracy": np.full(len(labels), int(moments.class_counts[0].argmax())),
    }
    return {name: (classes == labels).astype(float) for name, classes in predicted.items()}


def read_moments(
    run: Run, variant: ProbedName, points: Sequence[HookPoint], grid: Grid, progress: Progress
) -> dict[tuple[HookPoint, Position], Moments]:
    """Sums over the activations that probes are fitted on, by hook point and position."""
    reader = ActivationReader(run, variant, points, grid.positions, windows=window_and_stride(run))
    positions, classes = len(grid.positions), grid.target.classes
    sums = [
        Moments.zeros(len(block.points) * positions, block.width, classes, run.device, torch.float64)
        for block in reader.stacks
    ]
    examples, labels = grid.examples[FITTED_ON], torch.from_numpy(grid.labels(FITTED_ON, 1)).to(run.device)
    with progress.task(
        f"{variant}: read the split {FITTED_ON!r}", total=reader.size(examples), unit="tokens"
    ) as task:
        for rows, blocks in reader.chunks(examples, task.advance):
            for moments, values in zip(sums, blocks, strict=True):
                moments.add(values.flatten(0, 1), labels[rows])
    return {
        (point, position): _select(moments, positions * p + n)
        for block, moments in zip(reader.stacks, sums, strict=True)
        for p, point in enumerate(block.points)
        for n, position in enumerate(grid.positions)
    }


def _select(moments: Moments, probe: int) -> Moments:
    """The sums of one probe of a batch."""
    totals = moments.class_counts, moments.class_sums, moments.mean, moments.scatter
    counts, sums, mean, scatter = (total[probe : probe + 1] for total in totals)
    return Moments(counts, sums, mean, scatter, moments.dtype)


def _covariances(moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """One probe's mean, covariance, and covariance with one-hot classes, in float64."""
    count, shares = moments.count[0], moments.class_counts[0, :, None]
    centred = moments.class_sums[0] - shares * moments.mean[0]
    return moments.mean[0], moments.scatter[0] / count, centred.mT / count


def _whitening(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The pseudo-inverse of the covariance's square root, and the root; constant directions are 0 in both."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = values.clamp(min=0).sqrt()
    whiten = vectors * torch.where(kept, 1.0 / roots, 0.0) @ vectors.T
    return whiten, vectors * torch.where(kept, roots, 0.0) @ vectors.T


def _range(matrix: Tensor) -> Tensor:
    """An orthonormal basis of a matrix's columns `[rows, rank]`."""
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, values > RANK_TOLERANCE * values.max().clamp(min=1e-300)]
