"""The kinds of interventions, each with its controls; directions to steer along."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from probekit.causal.boundaries import Boundaries, Change
from probekit.causal.erasure import Eraser, RandomErasers
from probekit.errors import ProbekitError
from probekit.probing.results import LinearProbe
from probekit.probing.solvers import Moments

Steering = Callable[[Tensor, Tensor, float], Tensor]
"""Maps float32 activations `[boundaries, width]`, the label that each is steered to `[boundaries]` and a
strength to the moved activations."""


def class_mean_vectors(moments: Moments) -> Tensor:
    """From the mean of all activations to that of each class `[classes, width]`; 0 for absent classes."""
    counts = moments.class_counts[0][:, None]
    means = moments.class_sums[0] / counts.clamp(min=1) - moments.mean[0]
    return torch.where(counts > 0, means, 0.0).float()


def along_vectors(vectors: Tensor) -> Steering:
    """Adds the label's vector, given for strength 1 `[classes, width]`, whatever the activation."""

    def steer(activations: Tensor, target: Tensor, strength: float) -> Tensor:
        return activations + strength * vectors[target]

    return steer


def along_weights(probe: LinearProbe, lengths: Tensor) -> Steering:
    """Adds the probe's weights of the label, less the mean over labels, scaled to lengths `[classes]`."""
    weights = probe.coef.T - probe.coef.T.mean(dim=0)
    return along_vectors(_scaled(weights, lengths))


def along_gradient(probe: LinearProbe, lengths: Tensor, steps: int) -> Steering:
    """Follows the gradient of the probe's log-probability of the label (Dathathri et al. 2020).

    Args:
        probe: The probe of these activations.
        lengths: Length of the path to each label at strength 1 `[classes]`.
        steps: Number of steps, all equally long.
    """

    def steer(activations: Tensor, target: Tensor, strength: float) -> Tensor:
        step = strength * lengths[target] / steps
        for _ in range(steps):
            activations = activations + _scaled(log_odds_gradient(probe, activations, target), step)
        return activations

    return steer


def log_odds_gradient(probe: LinearProbe, activations: Tensor, target: Tensor) -> Tensor:
    """Gradient of the log-odds of targets `[boundaries]` by the activations `[boundaries, width]`.

    It has the direction of the log-probability's gradient, but does not vanish where the probe is certain of
    the target.
    """
    others = probe.log_probabilities(activations).scatter(1, target[:, None], -torch.inf).softmax(dim=1)
    return probe.coef.T[target] - others @ probe.coef.T


def _scaled(vectors: Tensor, lengths: Tensor) -> Tensor:
    """Vectors `[n, width]`, each scaled to a length `[n]`; zero vectors stay zero."""
    return torch.nn.functional.normalize(vectors, dim=1) * lengths[:, None]


NO_DONOR = -1
"""Stands for a boundary that no other one can donate to."""


@dataclass(frozen=True)
class Condition:
    """A change of activations, and what its effect is compared with.

    Attributes:
        name: Its name in the table.
        change: The change.
        target: The label that each boundary is moved to `[boundaries]`; None where there is no target.
        strength: Of steering, in units of the distance between the label's mean and the mean of all.
        included: Which boundaries take part, bool `[boundaries]`; None for all.
        controls: The conditions, by name, that it is compared with on the same boundaries, and the names of
            these comparisons in the table.
    """

    name: str
    change: Change
    target: np.ndarray | None = None
    strength: float | None = None
    included: np.ndarray | None = None
    controls: Mapping[str, str] = field(default_factory=dict)


def erasing(
    erasers: Mapping[int, Eraser], random_erasers: Mapping[int, RandomErasers], seed: int
) -> list[Condition]:
    """Erases what a linear probe can read.

    The controls are a norm-matched change in a random direction, and the erasure of equally many random
    dimensions. Both are drawn for each boundary, so that intervals from resampling boundaries include the
    variation of the draws. Erasers are given by distance.
    """

    def erase(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
        return erasers[distance](activations)

    def erase_random(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
        # The 1 keeps these draws apart from those of random directions.
        generators = [np.random.default_rng([seed, n, distance, 1]) for n in numbers]
        return random_erasers[distance](activations, generators)

    return [
        Condition("erase", erase, controls={name: name for name in ("random", "random subspace")}),
        Condition("random", norm_matched(erase, seed)),
        Condition("random subspace", erase_random),
    ]


def draw_patches(boundaries: Boundaries, seed: int) -> tuple[dict[bool, np.ndarray], np.ndarray]:
    """A donor for each boundary whose label is the same, or another; and which boundaries have both.

    Raises:
        ProbekitError: None has both.
    """
    donors = {same: draw_donors(boundaries.label, same=same, seed=seed) for same in (False, True)}
    included = (donors[False] != NO_DONOR) & (donors[True] != NO_DONOR)
    if not included.any():
        raise ProbekitError(
            f"intervene.kinds has patch, but of {len(boundaries)} boundaries none has both a donor whose "
            "next sentence has the same label and one whose has another; raise intervene.boundaries where "
            "there are more test documents, or leave patch out of intervene.kinds"
        )
    return donors, included


def patching(donated: Mapping[int, Tensor], boundaries: Boundaries, seed: int) -> list[Condition]:
    """Replaces activations by those of a donor, a boundary whose next sentence has another label.

    The controls are a norm-matched change in a random direction, and a donor whose next sentence has the same
    label. Only boundaries with both donors take part.

    Args:
        donated: The activations before every boundary, by distance `[boundaries, width]`.
        boundaries: The boundaries.
        seed: Of the donors and directions.
    """
    donors, included = draw_patches(boundaries, seed)

    def replace_by(donor: np.ndarray) -> Change:
        source = np.where(included, donor, np.arange(len(donor)))

        def patch(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
            rows = torch.from_numpy(source[numbers]).to(activations.device)
            return donated[distance][rows].to(activations)

        return patch

    target = np.where(included, boundaries.label[donors[False]], boundaries.label)
    patch, same_label = replace_by(donors[False]), replace_by(donors[True])
    controls = {name: name for name in ("random", "same label")}
    return [
        Condition("patch", patch, target, included=included, controls=controls),
        Condition("random", norm_matched(patch, seed), target, included=included),
        Condition("same label", same_label, boundaries.label, included=included),
    ]


def steering(
    methods: Mapping[int, Steering],
    boundaries: Boundaries,
    known: np.ndarray,
    strengths: Sequence[float],
    seed: int,
) -> list[Condition]:
    """Steers toward a wrong label, of those `known`, and toward the true one, by methods given by distance.

    Each has a norm-matched random control.
    """

    def toward(strength: float, target: np.ndarray) -> Change:
        def steer(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
            labels = torch.from_numpy(target[numbers]).to(activations.device)
            return methods[distance](activations.float(), labels, strength).to(activations.dtype)

        return steer

    return [
        condition
        for strength in strengths
        for condition in _to_labels(partial(toward, strength), boundaries, known, strength, seed)
    ]


def replanning(codebook: Tensor, boundaries: Boundaries, known: np.ndarray, seed: int) -> list[Condition]:
    """Replaces the embedding that conditions the next sentence by a wrong action's and by the true one's.

    Each has a norm-matched random control; embeddings are of the codebook `[actions, dimensions]`.
    """

    def toward(target: np.ndarray) -> Change:
        def replace(embeddings: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
            return codebook[torch.from_numpy(target[numbers]).to(codebook.device)].to(embeddings)

        return replace

    return _to_labels(toward, boundaries, known, None, seed)


def _to_labels(
    toward: Callable[[np.ndarray], Change],
    boundaries: Boundaries,
    known: np.ndarray,
    strength: float | None,
    seed: int,
) -> list[Condition]:
    """Changes toward a wrong label and toward the true one, each with its norm-matched random control."""
    targets = {"wrong": draw_wrong(boundaries.label, known, seed), "true": boundaries.label}
    conditions = []
    for name, target in targets.items():
        change, random = toward(target), f"random ({name})"
        controls = {random: "random"}
        conditions.append(Condition(f"{name} label", change, target, strength, controls=controls))
        conditions.append(Condition(random, norm_matched(change, seed), target, strength))
    return conditions


def norm_matched(change: Change, seed: int) -> Change:
    """Moves every activation as far as a change does, in a direction drawn for each boundary and distance."""

    def move(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
        before = activations.float()
        moved = (change(activations, numbers, distance).float() - before).norm(dim=-1, keepdim=True)
        drawn = [np.random.default_rng([seed, n, distance]).normal(size=before.shape[1]) for n in numbers]
        direction = torch.from_numpy(np.stack(drawn)).to(before)
        return (before + moved * direction / direction.norm(dim=-1, keepdim=True)).to(activations.dtype)

    return move


def draw_wrong(label: np.ndarray, known: np.ndarray, seed: int) -> np.ndarray:
    """For every boundary one of the known labels other than its own `[boundaries]`; its own if none."""
    generator = np.random.default_rng(seed)
    wrong = []
    for own in label:
        others = known[known != own]
        wrong.append(generator.choice(others) if len(others) else own)
    return np.array(wrong)


def draw_donors(label: np.ndarray, *, same: bool, seed: int) -> np.ndarray:
    """For every boundary the number of another one with the same label, or with another; or `NO_DONOR`."""
    generator = np.random.default_rng(seed)
    donors = np.full(len(label), NO_DONOR)
    for number, own in enumerate(label):
        suitable = np.flatnonzero((label == own) == same)
        suitable = suitable[suitable != number]
        if len(suitable):
            donors[number] = generator.choice(suitable)
    return donors
