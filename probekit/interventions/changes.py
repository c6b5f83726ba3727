"""Interventions and what they are compared with: each a table of conditions that share norm or origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.interventions.effects import Change
from probekit.interventions.erasure import Eraser, RandomErasers
from probekit.interventions.scenes import Scenes
from probekit.interventions.ways import Way

NO_DONOR = -1
"""Stands for a scene that no other one can be a donor of."""


@dataclass(frozen=True)
class Condition:
    """One way of changing activations.

    Attributes:
        name: What it is called in the table.
        change: The change.
        target: The action that each scene is moved to `[scenes]`; None where it is moved to none.
        strength: Of steering, in distances of the action's mean from the mean of all.
        scenes: Which scenes take part, bool `[scenes]`; None for all.
        beside: The conditions, by name, that it is compared with on the same scenes, and what they are
            called then.
    """

    name: str
    change: Change
    target: np.ndarray | None = None
    strength: float | None = None
    scenes: np.ndarray | None = None
    beside: Mapping[str, str] = field(default_factory=dict)


def erasing(erasers: Mapping[int, Eraser], others: Mapping[int, RandomErasers], seed: int) -> list[Condition]:
    """Erases what a linear probe can read.

    Beside it stand a random direction, in which activations are moved as far, and the erasure of as many
    dimensions that tell nothing in particular. Both are drawn for each scene: intervals that come from
    resampling scenes carry the draws' variation too.

    Args:
        erasers: By distance.
        others: The same of random dimensions.
        seed: Of the directions and dimensions.
    """

    def erase(activations: Tensor, scenes: np.ndarray, distance: int) -> Tensor:
        return erasers[distance](activations)

    def erase_other(activations: Tensor, scenes: np.ndarray, distance: int) -> Tensor:
        # Another sequence than that of the directions.
        return others[distance](activations, [np.random.default_rng([seed, n, distance, 1]) for n in scenes])

    beside = {name: name for name in ("random", "random subspace")}
    return [
        Condition("erase", erase, beside=beside),
        Condition("random", _as_far(erase, seed)),
        Condition("random subspace", erase_other),
    ]


def patching(donated: Mapping[int, Tensor], scenes: Scenes, seed: int) -> list[Condition]:
    """Puts a donor's activation in place, of a scene whose next sentence has another action.

    Beside it stand a random direction as far as that, and a donor whose next sentence has the same action.
    Scenes take part that have both donors.

    Args:
        donated: What stands at the place in every scene, by distance `[scenes, width]`.
        scenes: The scenes.
        seed: Of the draw of donors.

    Raises:
        ProbekitError: No scene has both.
    """
    donors = {same: draw_donors(scenes.action, same=same, seed=seed) for same in (False, True)}
    there = np.logical_and.reduce([donor != NO_DONOR for donor in donors.values()])
    if not there.any():
        raise ProbekitError(
            f"intervene.kinds has patch, but of {len(scenes)} scenes none has both a donor whose next "
            "sentence has the same action and one whose has another; raise intervene.scenes"
        )

    def given_by(donor: np.ndarray) -> Change:
        def patch(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
            rows = torch.from_numpy(np.where(there, donor, np.arange(len(donor)))[numbers])
            return donated[distance][rows.to(activations.device)].to(activations)

        return patch

    target = np.where(there, scenes.action[donors[False]], scenes.action)
    patch, same = (given_by(donors[same]) for same in (False, True))
    beside = {"random": "random", "same action": "same action"}
    return [
        Condition("patch", patch, target, scenes=there, beside=beside),
        Condition("random", _as_far(patch, seed), target, scenes=there),
        Condition("same action", same, scenes.action, scenes=there),
    ]


def steering(
    ways: Mapping[int, Way],
    scenes: Scenes,
    known: np.ndarray,
    strengths: Sequence[float],
    seed: int,
) -> list[Condition]:
    """Moves toward an action, a wrong one and the true one; each beside a random direction as far.

    Args:
        ways: By distance, how activations are moved.
        scenes: The scenes.
        known: The actions that have a direction.
        strengths: By which lengths are multiplied.
        seed: Of wrong actions and of random directions.
    """

    def toward(strength: float, target: np.ndarray) -> Change:
        def steer(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
            actions = torch.from_numpy(target[numbers]).to(activations.device)
            return ways[distance](activations.float(), actions, strength).to(activations.dtype)

        return steer

    targets = {"wrong": draw_wrong(scenes.action, known, seed), "true": scenes.action}
    return [
        condition
        for strength in strengths
        for condition in _targeted(targets, partial(toward, strength), strength, seed)
    ]


def replanning(codebook: Tensor, scenes: Scenes, known: np.ndarray, seed: int) -> list[Condition]:
    """Replaces the plan that a conditioned LM is given for the next sentence by an action's embedding.

    A wrong action's or the true one's; each beside a random direction as far from the plan.

    Args:
        codebook: The adapter's embeddings `[actions, dimensions]`.
        scenes: The scenes.
        known: Actions that sentences have.
        seed: Of wrong actions and of random directions.
    """

    def toward(target: np.ndarray) -> Change:
        def replace(embeddings: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
            return codebook[torch.from_numpy(target[numbers]).to(codebook.device)].to(embeddings)

        return replace

    targets = {"wrong": draw_wrong(scenes.action, known, seed), "true": scenes.action}
    return _targeted(targets, toward, None, seed)


def draw_wrong(action: np.ndarray, known: np.ndarray, seed: int) -> np.ndarray:
    """For every scene one of the known actions that is not its own `[scenes]`; its own if there is none."""
    generator = np.random.default_rng(seed)
    others = (known[known != own] for own in action)
    return np.array(
        [generator.choice(other) if len(other) else own for own, other in zip(action, others, strict=True)]
    )


def draw_donors(action: np.ndarray, *, same: bool, seed: int) -> np.ndarray:
    """For every scene the number of another with the same action, or another one; or `NO_DONOR`."""
    generator = np.random.default_rng(seed)
    donors = np.full(len(action), NO_DONOR)
    for scene, own in enumerate(action):
        fitting = np.flatnonzero((action == own) == same)
        fitting = fitting[fitting != scene]
        if len(fitting):
            donors[scene] = generator.choice(fitting)
    return donors


def _targeted(
    targets: Mapping[str, np.ndarray],
    toward: Callable[[np.ndarray], Change],
    strength: float | None,
    seed: int,
) -> list[Condition]:
    """Each target's condition, and beside it a random direction as far."""
    conditions = []
    for name, target in targets.items():
        change, random = toward(target), f"random ({name})"
        conditions.append(Condition(f"{name} action", change, target, strength, beside={random: "random"}))
        conditions.append(Condition(random, _as_far(change, seed), target, strength))
    return conditions


def _as_far(change: Change, seed: int) -> Change:
    """Moves every activation as far as a change does, in a direction drawn for each scene and distance."""

    def move(activations: Tensor, scenes: np.ndarray, distance: int) -> Tensor:
        before = activations.float()
        moved = (change(activations, scenes, distance).float() - before).norm(dim=-1, keepdim=True)
        drawn = np.stack(
            [np.random.default_rng([seed, n, distance]).normal(size=before.shape[1]) for n in scenes]
        )
        direction = torch.from_numpy(drawn).to(before)
        return (before + moved * direction / direction.norm(dim=-1, keepdim=True)).to(activations.dtype)

    return move
