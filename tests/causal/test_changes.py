"""Conditions and their controls: on the same scenes, as far, from and to what they say."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from probekit.causal.changes import (
    NO_DONOR,
    Condition,
    Way,
    along_gradient,
    draw_donors,
    draw_wrong,
    erasing,
    patching,
    replanning,
    steering,
    straight,
)
from probekit.causal.erasure import Eraser, RandomErasers
from probekit.probing.results import LinearProbe
from probekit.probing.solvers import Moments

WIDTH, ACTION = 6, np.array([0, 1, 1, 2, 0, 1, 3])
SCENES: Any = SimpleNamespace(action=ACTION)
ALL = np.arange(len(ACTION))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def applied(conditions: list[Condition], x: torch.Tensor, distance: int = 1) -> dict[str, torch.Tensor]:
    return {c.name: c.change(x, ALL, distance) for c in conditions}


def moved(after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return (after - before).norm(dim=1)


def ways(directions: dict[int, torch.Tensor]) -> dict[int, Way]:
    return {distance: straight(vectors) for distance, vectors in directions.items()}


def climbing(seed: int) -> Way:
    probe = LinearProbe(drawn(WIDTH, 4, seed=seed), drawn(4, seed=seed + 1))
    return along_gradient(probe, torch.tensor([1.0, 2.0, 3.0, 4.0]), 3)


def eraser(seed: int) -> Eraser:
    left = drawn(WIDTH, 2, seed=seed)
    return Eraser(left, torch.linalg.pinv(left), drawn(WIDTH, seed=seed + 1))


def random_erasers(seed: int) -> RandomErasers:
    moments = Moments.zeros(1, WIDTH, 2, dtype=torch.double)
    return RandomErasers(moments.add(drawn(1, 50, WIDTH, seed=seed).double(), torch.arange(50) % 2), 2)


def test_every_random_control_moves_as_far_as_what_it_stands_beside():
    x = drawn(len(ACTION), WIDTH, seed=5)
    directions = {d: drawn(4, WIDTH, seed=d) for d in (1, 2)}
    groups = [
        erasing({1: eraser(0), 2: eraser(1)}, {1: random_erasers(2), 2: random_erasers(3)}, 0),
        patching(directions | {1: drawn(7, WIDTH, seed=8), 2: drawn(7, WIDTH, seed=9)}, SCENES, 0),
        steering(ways(directions), SCENES, np.arange(4), [2.5], 0),
        steering({d: climbing(d) for d in (1, 2)}, SCENES, np.arange(4), [2.5], 0),
        replanning(drawn(4, WIDTH, seed=4), SCENES, np.arange(4), 0),
    ]
    for conditions in groups:
        by_name = {c.name: c for c in conditions}
        for distance in (1, 2):
            after = applied(conditions, x, distance)
            for condition in conditions:
                for name, called in condition.beside.items():
                    assert by_name[name].scenes is condition.scenes
                    if called == "random":
                        far = moved(after[condition.name], x)
                        torch.testing.assert_close(moved(after[name], x), far)
                        assert not torch.allclose(after[name], after[condition.name])
                        assert by_name[name].target is condition.target


def test_random_directions_are_the_scenes_own():
    """Whatever the batch; and another one at every distance."""
    x = drawn(len(ACTION), WIDTH, seed=5)
    random = erasing({d: eraser(0) for d in (1, 2)}, {}, 0)[1].change
    torch.testing.assert_close(random(x[3:5], ALL[3:5], 1), random(x, ALL, 1)[3:5])
    assert not torch.allclose(random(x, ALL, 1), random(x, ALL, 2))


def test_random_subspaces_are_the_scenes_own():
    """So that resampling scenes resamples them; whatever the batch, and another one at every distance."""
    x = drawn(1, WIDTH, seed=5).expand(len(ACTION), -1)
    random = erasing({}, {d: random_erasers(2) for d in (1, 2)}, 0)[2].change
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


def test_patches_put_the_donor_in_place_of_scenes_that_have_both():
    donated = {1: drawn(7, WIDTH, seed=8)}
    patch, random, same = patching(donated, SCENES, 0)
    assert patch.scenes.tolist() == [True, True, True, False, True, True, False]
    x = drawn(7, WIDTH, seed=1)
    for condition in (patch, same):
        after = condition.change(x, ALL, 1)
        for scene in np.flatnonzero(patch.scenes):
            (donor,) = (donated[1] == after[scene]).all(1).nonzero().tolist()
            assert ACTION[donor[0]] == condition.target[scene]
            assert (ACTION[donor[0]] == ACTION[scene]) == (condition is same)
            assert donor[0] != scene
        # A batch of some scenes gets the same donors.
        assert torch.equal(condition.change(x[4:6], ALL[4:6], 1), after[4:6])
    assert random.target is patch.target


def test_steering_adds_the_direction_of_the_target():
    directions, x = {1: drawn(4, WIDTH, seed=2)}, drawn(7, WIDTH, seed=1)
    conditions = steering(ways(directions), SCENES, np.array([0, 1, 3]), [1.0, 3.0], 0)
    assert [c.strength for c in conditions] == [1.0] * 4 + [3.0] * 4
    for condition in conditions:
        if condition.beside:
            expected = x + condition.strength * directions[1][condition.target]
            torch.testing.assert_close(condition.change(x, ALL, 1), expected)
    targets = {c.name: c.target for c in conditions}
    assert targets["true action"].tolist() == ACTION.tolist()
    assert (targets["wrong action"] != ACTION).all()


def test_wrong_actions_are_known_ones():
    wrong = draw_wrong(np.repeat(np.arange(4), 50), np.array([0, 1, 3]), 0)
    assert set(wrong) == {0, 1, 3}
    assert set(wrong[:50]) == {1, 3}
    assert draw_wrong(np.array([2, 2]), np.array([2]), 0).tolist() == [2, 2]


def test_replanning_gives_the_embedding_of_the_target():
    codebook, x = drawn(4, WIDTH, seed=2), drawn(7, WIDTH, seed=1)
    for condition in replanning(codebook, SCENES, np.arange(4), 0):
        if condition.beside:
            assert torch.equal(condition.change(x, ALL, 1), codebook[condition.target])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_kept(dtype: torch.dtype):
    x = drawn(7, WIDTH, seed=1).to(dtype)
    for way in (straight(drawn(4, WIDTH, seed=2)), climbing(2)):
        for condition in steering({1: way}, SCENES, np.arange(4), [1.0], 0):
            assert condition.change(x, ALL, 1).dtype == dtype
