"""Interventions and what they are compared with: each a table of conditions that share norm or origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probekit.interventions.effects import Change
from probekit.interventions.erasure import Eraser
from probekit.interventions.scenes import Scenes

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
    """

    name: str
    change: Change
    target: np.ndarray | None = None
    strength: float | None = None
    scenes: np.ndarray | None = None


def erasing(erasers: Mapping[int, Eraser], seed: int) -> list[Condition]:
    """Erases what a linear probe can read, and, beside it, moves as far in a random direction.

    Args:
        erasers: By distance.
        seed: Of the directions.
    """

    def erase(activations: Tensor, scenes: np.ndarray, distance: int) -> Tensor:
        return erasers[distance](activations)

    return [Condition("erase", erase), Condition("random", _as_far(erase, seed))]


def patching(donated: Mapping[int, Tensor], scenes: Scenes, seed: int) -> list[Condition]:
    """Puts a donor's activation in place, of a scene whose next sentence has another action.

    Beside it stand a donor whose next sentence has the same action, and a random direction as far as the
    first donor's.

    Args:
        donated: What stands at the place in every scene, by distance `[scenes, width]`.
        scenes: The scenes.
        seed: Of the draw of donors.
    """
    conditions = []
    for name, same in (("patch", False), ("same action", True)):
        donor = draw_donors(scenes.action, same=same, seed=seed)

        def patch(
            activations: Tensor, numbers: np.ndarray, distance: int, donor: np.ndarray = donor
        ) -> Tensor:
            rows = torch.from_numpy(donor[numbers]).to(activations.device)
            given = donated[distance][rows.clamp(min=0)].to(activations.dtype)
            return torch.where((rows == NO_DONOR)[:, None], activations, given)

        there = donor != NO_DONOR
        target = np.where(there, scenes.action[donor], scenes.action)
        conditions.append(Condition(name, patch, target, scenes=there))
        if not same:
            conditions.append(Condition("random", _as_far(patch, seed), target, scenes=there))
    return conditions


def steering(
    directions: Mapping[int, Tensor], scenes: Scenes, strengths: Sequence[float], seed: int
) -> list[Condition]:
    """Adds the direction of an action: of a wrong one, of the true one, and a random one of the same length.

    Args:
        directions: By distance, the vector of every action `[actions, width]`, of strength 1.
        scenes: The scenes.
        strengths: By which vectors are multiplied.
        seed: Of wrong actions and of random directions.
    """
    actions = len(next(iter(directions.values())))
    shift = np.random.default_rng(seed).integers(1, actions, size=len(scenes))
    wrong = (scenes.action + shift) % actions
    conditions = []
    for strength in strengths:

        def toward(target: np.ndarray, strength: float = strength) -> Change:
            def steer(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
                vectors = directions[distance].to(activations)
                return activations + strength * vectors[torch.from_numpy(target[numbers]).to(vectors.device)]

            return steer

        conditions += [
            Condition("wrong action", toward(wrong), wrong, strength),
            Condition("true action", toward(scenes.action), scenes.action, strength),
            Condition("random", _as_far(toward(wrong), seed), wrong, strength),
        ]
    return conditions


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


def _as_far(change: Change, seed: int) -> Change:
    """Moves every activation as far as a change does, in a direction drawn for each scene and distance."""

    def move(activations: Tensor, scenes: np.ndarray, distance: int) -> Tensor:
        moved = (change(activations, scenes, distance) - activations).float().norm(dim=-1, keepdim=True)
        drawn = np.stack(
            [np.random.default_rng([seed, n, distance]).normal(size=activations.shape[1]) for n in scenes]
        )
        direction = torch.from_numpy(drawn).to(moved)
        return activations + (moved * direction / direction.norm(dim=-1, keepdim=True)).to(activations.dtype)

    return move
