"""Conditions and their controls: on the same boundaries, equally far, from and to the right actions."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from probekit.causal.changes import (
    NO_DONOR,
    Condition,
    Steering,
    along_gradient,
    along_vectors,
    draw_donors,
    draw_wrong,
    erasing,
    patching,
    replanning,
    steering,
)
from probekit.causal.erasure import Eraser, RandomErasers
from probekit.probing.results import LinearProbe
from probekit.probing.solvers import Moments

WIDTH, ACTION = 6, np.array([0, 1, 1, 2, 0, 1, 3])
BOUNDARIES: Any = SimpleNamespace(label=ACTION)
ALL = np.arange(len(ACTION))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def applied(conditions: list[Condition], x: torch.Tensor, distance: int = 1) -> dict[str, torch.Tensor]:
    return {c.name: c.change(x, ALL, distance) for c in conditions}


def by_gradient(seed: int) -> Steering:
    probe = LinearProbe(drawn(WIDTH, 4, seed=seed), drawn(4, seed=seed + 1))
    return along_gradient(probe, torch.tensor([1.0, 2.0, 3.0, 4.0]), 3)


def eraser(seed: int) -> Eraser:
    left = drawn(WIDTH, 2, seed=seed)
    return Eraser(left, torch.linalg.pinv(left), drawn(WIDTH, seed=seed + 1))


def random_erasers(seed: int) -> RandomErasers:
    moments = Moments.zeros(1, WIDTH, 2, dtype=torch.double)
    return RandomErasers(moments.add(drawn(1, 50, WIDTH, seed=seed).double(), torch.arange(50) % 2), 2)


def test_every_random_control_moves_as_far_as_its_condition():
    x = drawn(len(ACTION), WIDTH, seed=5)
    vectors = {d: along_vectors(drawn(4, WIDTH, seed=d)) for d in (1, 2)}
    groups = [
        erasing({1: eraser(0), 2: eraser(1)}, {1: random_erasers(2), 2: random_erasers(3)}, 0),
        patching({1: drawn(7, WIDTH, seed=8), 2: drawn(7, WIDTH, seed=9)}, BOUNDARIES, 0),
        steering(vectors, BOUNDARIES, np.arange(4), [2.5], 0),
        steering({d: by_gradient(d) for d in (1, 2)}, BOUNDARIES, np.arange(4), [2.5], 0),
        replanning(drawn(4, WIDTH, seed=4), BOUNDARIES, np.arange(4), 0),
    ]
    for conditions in groups:
        by_name = {c.name: c for c in conditions}
        for distance in (1, 2):
            after = applied(conditions, x, distance)
            moved = {name: (values - x).norm(dim=1) for name, values in after.items()}
            for condition in conditions:
                for name, called in condition.controls.items():
                    assert by_name[name].included is condition.included
                    if called == "random":
                        torch.testing.assert_close(moved[name], moved[condition.name])
                        assert not torch.allclose(after[name], after[condition.name])
                        assert by_name[name].target is condition.target


@pytest.mark.parametrize("control", [1, 2])
def test_random_directions_and_subspaces_are_drawn_per_boundary_and_distance(control: int):
    """So that resampling boundaries resamples them; the batch does not matter."""
    x = drawn(1, WIDTH, seed=5).expand(len(ACTION), -1)
    conditions = erasing({d: eraser(0) for d in (1, 2)}, {d: random_erasers(2) for d in (1, 2)}, 0)
    random = conditions[control].change
    once = random(x, ALL, 1)
    assert len(once.unique(dim=0)) == len(ACTION)
    torch.testing.assert_close(random(x[3:5], ALL[3:5], 1), once[3:5])
    assert not torch.allclose(once, random(x, ALL, 2))


def test_donors():
    others, same = (draw_donors(ACTION, same=is_same, seed=3) for is_same in (False, True))
    assert (ACTION[others] != ACTION).all()
    paired = same != NO_DONOR
    assert paired.tolist() == [True, True, True, False, True, True, False]
    assert (ACTION[same[paired]] == ACTION[paired]).all()
    assert (same[paired] != ALL[paired]).all()
    assert (draw_donors(np.zeros(3, int), same=False, seed=0) == NO_DONOR).all()


def test_patches_are_donated_where_there_are_both_donors():
    donated = {1: drawn(7, WIDTH, seed=8)}
    patch, random, same = patching(donated, BOUNDARIES, 0)
    assert patch.included.tolist() == [True, True, True, False, True, True, False]
    x = drawn(7, WIDTH, seed=1)
    for condition in (patch, same):
        after = condition.change(x, ALL, 1)
        for number in np.flatnonzero(patch.included):
            (donor,) = (donated[1] == after[number]).all(1).nonzero().tolist()
            assert ACTION[donor[0]] == condition.target[number]
            assert (ACTION[donor[0]] == ACTION[number]) == (condition is same)
            assert donor[0] != number
        # A batch of some boundaries gets the same donors.
        assert torch.equal(condition.change(x[4:6], ALL[4:6], 1), after[4:6])
    assert random.target is patch.target


def test_steering_adds_the_direction_of_the_target():
    directions, x = drawn(4, WIDTH, seed=2), drawn(7, WIDTH, seed=1)
    methods = {1: along_vectors(directions)}
    conditions = steering(methods, BOUNDARIES, np.array([0, 1, 3]), [1.0, 3.0], 0)
    assert [c.strength for c in conditions] == [1.0] * 4 + [3.0] * 4
    for condition in conditions:
        if condition.controls:
            expected = x + condition.strength * directions[condition.target]
            torch.testing.assert_close(condition.change(x, ALL, 1), expected)
    targets = {c.name: c.target for c in conditions}
    assert targets["true label"].tolist() == ACTION.tolist()
    assert (targets["wrong label"] != ACTION).all()


def test_wrong_actions_are_known_ones():
    wrong = draw_wrong(np.repeat(np.arange(4), 50), np.array([0, 1, 3]), 0)
    assert set(wrong) == {0, 1, 3}
    assert set(wrong[:50]) == {1, 3}
    assert draw_wrong(np.array([2, 2]), np.array([2]), 0).tolist() == [2, 2]


def test_replanning_gives_the_target_of_the_codebook():
    codebook, x = drawn(4, WIDTH, seed=2), drawn(7, WIDTH, seed=1)
    for condition in replanning(codebook, BOUNDARIES, np.arange(4), 0):
        assert condition.strength is None
        if condition.controls:
            assert torch.equal(condition.change(x, ALL, 1), codebook[condition.target])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_kept(dtype: torch.dtype):
    x = drawn(7, WIDTH, seed=1).to(dtype)
    for method in (along_vectors(drawn(4, WIDTH, seed=2)), by_gradient(2)):
        for condition in steering({1: method}, BOUNDARIES, np.arange(4), [1.0], 0):
            assert condition.change(x, ALL, 1).dtype == dtype
