"""Sums over activations of the split that probes are fitted on, at every place and distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probekit.config import ProbedName
from probekit.probing.activations import HookPoint, Reader
from probekit.probing.grid import FITTED_ON, Grid
from probekit.probing.solvers import Moments
from probekit.progress import Progress
from probekit.run.run import Run

RANK_TOLERANCE = 1e-8
"""Singular values below this share of the largest are rounding."""


@dataclass(frozen=True)
class Eraser:
    """An affine map x - left right (x - mean).

    Attributes:
        left: `[width, rank]`.
        right: `[rank, width]`.
        mean: Of the activations it was fitted on, which it leaves where they are `[width]`.
    """

    left: Tensor
    right: Tensor
    mean: Tensor

    @property
    def rank(self) -> int:
        """Dimensions that are taken away."""
        return self.left.shape[1]

    def __call__(self, activations: Tensor) -> Tensor:
        """Activations `[..., width]` without what a linear probe can read."""
        centred = activations.to(self.mean) - self.mean
        return (activations.to(self.mean) - centred @ self.right.T @ self.left.T).to(activations.dtype)


def leace(moments: Moments) -> list[Eraser]:
    """The LEACE eraser of every probe of a batch.

    Args:
        moments: Sums over the examples to fit on; classes without examples take no part.
    """
    erasers = []
    for mean, covariance, cross in _covariances(moments):
        whiten, colour = _whitening(covariance)
        basis = _range(whiten @ cross)
        erasers.append(Eraser((colour @ basis).float(), (basis.T @ whiten).float(), mean.float()))
    return erasers


class RandomErasers:
    """LEACE's maps of a probe with a random projection in place of Q: what it costs to lose some dimensions.

    Every activation loses dimensions of its own, drawn among those that vary, so that the mean over many is
    that over draws too. What a vector z loses to a random subspace of r of m dimensions is drawn without the
    subspace: b z + sqrt(b (1 - b)) |z| u, with b from the Beta distribution (r / 2, (m - r) / 2) and u a
    random direction at a right angle to z.

    Args:
        moments: Sums over the examples to fit on, of one probe.
        rank: How many dimensions are taken away.
    """

    def __init__(self, moments: Moments, rank: int) -> None:
        ((self._mean, covariance, _),) = _covariances(moments)
        self._whiten, self._colour = _whitening(covariance)
        self._varying = self._whiten @ self._colour
        self.dimensions = round(self._varying.trace().item())
        self.rank = min(rank, self.dimensions)

    def __call__(self, activations: Tensor, generators: Sequence[np.random.Generator]) -> Tensor:
        """Activations `[activations, width]` without some dimensions, each drawn by its own generator."""
        z = (activations.to(self._mean) - self._mean) @ self._whiten
        drawn = [(self._share(own), own.normal(size=z.shape[1])) for own in generators]
        share = torch.tensor([b for b, _ in drawn]).to(z)[:, None]
        direction = torch.from_numpy(np.stack([normal for _, normal in drawn])).to(z) @ self._varying
        length, tiny = z.norm(dim=1, keepdim=True), torch.finfo(z.dtype).tiny
        along = z / length.clamp(min=tiny)
        across = direction - (direction * along).sum(1, keepdim=True) * along
        across /= across.norm(dim=1, keepdim=True).clamp(min=tiny)
        lost = share * z + (share * (1 - share)).sqrt() * length * across
        return (activations.to(self._mean) - lost @ self._colour).to(activations.dtype)

    def _share(self, generator: np.random.Generator) -> float:
        """Of a vector's squared length, what it loses."""
        if not 0 < self.rank < self.dimensions:
            return float(self.rank > 0)
        return float(generator.beta(self.rank / 2, (self.dimensions - self.rank) / 2))


def inlp(moments: Moments, rounds: int) -> list[Eraser]:
    """Iterative null-space projection for every probe of a batch, with least-squares probes.

    Args:
        moments: Sums over the examples to fit on.
        rounds: How often a probe is fitted on what is left, and its weights are projected out.
    """
    erasers = []
    for mean, covariance, cross in _covariances(moments):
        removed = covariance.new_zeros(len(covariance), 0)
        for _ in range(rounds):
            left = torch.eye(len(covariance)).to(covariance) - removed @ removed.T
            weights = torch.linalg.pinv(left @ covariance @ left, rtol=1e-7, hermitian=True) @ left @ cross
            fresh = _range(left @ weights)
            removed = torch.linalg.qr(torch.cat([removed, fresh], dim=1)).Q
        erasers.append(Eraser(removed.float(), removed.T.float(), mean.float()))
    return erasers


def erased(moments: Moments, eraser: Eraser) -> Moments:
    """The sums of one probe over the same examples, their activations erased."""
    left, right, mean = (part.to(moments.mean) for part in (eraser.left, eraser.right, eraser.mean))
    kept = torch.eye(len(mean)).to(mean) - left @ right
    shift = mean - kept @ mean
    return Moments(
        moments.class_counts,
        moments.class_sums @ kept.T + moments.class_counts[..., None] * shift,
        moments.mean @ kept.T + shift,
        kept @ moments.scatter @ kept.T,
        moments.dtype,
    )


def _whitening(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The square root's pseudo-inverse and the square root; what does not vary is 0 in both."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = values.clamp(min=0).sqrt()
    whiten = vectors * torch.where(kept, 1.0 / roots, 0.0) @ vectors.T
    return whiten, vectors * torch.where(kept, roots, 0.0) @ vectors.T


def _covariances(moments: Moments) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of every probe the mean, the covariance, and the covariance with one-hot classes, in float64."""
    count = moments.count[:, None, None]
    shares = moments.class_counts[..., None]
    centred = moments.class_sums - shares * moments.mean[:, None]
    return list(zip(moments.mean, moments.scatter / count, centred.mT / count, strict=True))


def _range(matrix: Tensor) -> Tensor:
    """An orthonormal basis of a matrix's columns `[rows, rank]`."""
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, values > RANK_TOLERANCE * values.max().clamp(min=1e-300)]


PENALTY = 1e-3
"""On weights, as a share of the mean variance: what was erased is zero but for rounding."""


def predictions(moments: Moments, activations: Tensor) -> np.ndarray:
    """The class that a least-squares probe tells for activations `[examples, width]`: `[examples]`."""
    count = moments.count[0]
    shares = moments.class_counts[0] / count
    covariance = moments.scatter[0] / count
    cross = (moments.class_sums[0] / count - shares[:, None] * moments.mean[0]).mT
    ridge = PENALTY * covariance.diagonal().mean().clamp(min=1e-30)
    weights = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance)).to(covariance), cross)
    scores = shares + (activations.to(covariance) - moments.mean[0]) @ weights
    return scores.argmax(dim=-1).cpu().numpy()


def accuracies(
    moments: Moments, eraser: Eraser, activations: Tensor, true: np.ndarray
) -> dict[str, np.ndarray]:
    """Which of some examples are told right, by metric `[examples]`.

    Args:
        moments: Sums to fit on, of one probe.
        eraser: What is taken away.
        activations: Of the examples, as they are `[examples, width]`.
        true: Their classes `[examples]`.

    Returns:
        `fitted_accuracy` of a probe on activations as they are, `refitted_accuracy` of one on erased ones,
        and `prior_accuracy` of the most frequent class.
    """
    told = {
        "fitted_accuracy": predictions(moments, activations),
        "refitted_accuracy": predictions(erased(moments, eraser), eraser(activations)),
        "prior_accuracy": np.full(len(true), int(moments.class_counts[0].argmax())),
    }
    return {name: (classes == true).astype(float) for name, classes in told.items()}


def moments_at(
    run: Run, variant: ProbedName, places: Sequence[HookPoint], grid: Grid, progress: Progress
) -> dict[tuple[HookPoint, int], Moments]:
    """The sums of one probe each, by place and distance, in one forward pass over the examples.

    Args:
        run: The run.
        variant: Whose activations.
        places: Where.
        grid: The examples, with the action of the sentence at their anchor, and the distances.
        progress: Shows how far it is.
    """
    reader = Reader(run, variant, places, grid.distances)
    distances, classes = len(grid.distances), grid.target.classes
    sums = [
        Moments.zeros(len(block.points) * distances, block.width, classes, run.device)
        for block in reader.stacks
    ]
    examples, labels = grid.examples[FITTED_ON], torch.from_numpy(grid.labels(FITTED_ON, 1)).to(run.device)
    with progress.task(f"{variant}: read the split {FITTED_ON!r}", total=len(examples)) as task:
        for rows, blocks in reader.chunks(examples):
            for moments, values in zip(sums, blocks, strict=True):
                moments.add(values.flatten(0, 1), labels[rows])
            task.advance(rows.stop - rows.start)
    return {
        (place, distance): _one(moments, distances * p + d)
        for block, moments in zip(reader.stacks, sums, strict=True)
        for p, place in enumerate(block.points)
        for d, distance in enumerate(grid.distances)
    }


def _one(moments: Moments, probe: int) -> Moments:
    """The sums of one probe of a batch, as a batch of its own."""
    at = slice(probe, probe + 1)
    return Moments(
        moments.class_counts[at],
        moments.class_sums[at],
        moments.mean[at],
        moments.scatter[at],
        moments.dtype,
    )
