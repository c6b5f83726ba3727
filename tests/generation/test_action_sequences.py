"""Metrics of action sequences against recursion, a chain whose entropy is known, and cases by hand."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.evaluation.action_metrics import Bigram, bigram_of_counts, pair_counts
from probekit.generation.metrics import (
    edit_distances,
    latent_losses,
    normalised_edit_distances,
    plans_followed,
    plans_followed_by_chance,
)

SEQUENCES = st.lists(st.integers(0, 3), max_size=7)


def arrays(*sequences: list[int]) -> list[np.ndarray]:
    return [np.array(sequence, dtype=np.int64) for sequence in sequences]


def by_recursion(first: list[int], second: list[int]) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = first[i - 1] == second[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (not same))

    return distance(len(first), len(second))


@given(SEQUENCES, SEQUENCES)
def test_edit_distance_by_recursion(first: list[int], second: list[int]):
    expected = by_recursion(first, second)
    found, normalised = (
        f(arrays(first), arrays(second)) for f in (edit_distances, normalised_edit_distances)
    )
    assert found.sums.tolist() == [expected]
    assert normalised.sums.tolist() == [expected / max(len(first), len(second), 1)]
    assert found.counts.tolist() == normalised.counts.tolist() == [1.0]


def test_an_empty_continuation_is_as_far_as_the_true_one_is_long():
    true, empty = arrays([1, 2, 3], []), arrays([], [])
    assert edit_distances(true, empty).sums.tolist() == [3.0, 0.0]
    assert normalised_edit_distances(true, empty).sums.tolist() == [1.0, 0.0]


# A chain of two actions, each followed by the other with probability 0.8.
STAY = 0.2
TABLE = np.log([[STAY, 1 - STAY], [1 - STAY, STAY], [0.5, 0.5]])


def chain(length: int, seed: int) -> np.ndarray:
    moves = np.random.default_rng(seed).random(length) > STAY
    return np.cumsum(moves).astype(np.int64) % 2


def test_latent_losses_by_hand():
    found = latent_losses(Bigram(TABLE, 1.0), arrays([0, 1, 1], [], [1]), np.array([-1, 0, 1]))
    assert found.sums == pytest.approx([-np.log(0.5) - np.log(0.8) - np.log(0.2), 0.0, -np.log(0.2)])
    assert found.counts.tolist() == [3.0, 0.0, 1.0]


def test_latent_perplexity_of_a_chain_is_exp_of_its_entropy_rate():
    train, validation, fresh = chain(20_000, 0), chain(2_000, 1), chain(20_000, 2)
    counts, chosen = (pair_counts(c[:-1], c[1:], 2) for c in (train, validation))
    found = latent_losses(bigram_of_counts(counts, chosen), [fresh[1:]], fresh[:1])
    entropy = -(STAY * np.log(STAY) + (1 - STAY) * np.log(1 - STAY))
    assert np.exp(found.sums / found.counts) == pytest.approx(np.exp(entropy), rel=0.02)
    # Shuffled, every pair is as frequent: the cross-entropy of a half and a half.
    shuffled = np.random.default_rng(0).permutation(fresh)
    worse = latent_losses(bigram_of_counts(counts, chosen), [shuffled[1:]], shuffled[:1])
    expected = -(np.log(STAY) + np.log(1 - STAY)) / 2
    assert worse.sums / worse.counts == pytest.approx(expected, rel=0.02)


def test_no_sequence_has_no_loss():
    found = latent_losses(Bigram(TABLE, 1.0), arrays([], []), np.array([-1, 1]))
    assert found.sums.tolist() == found.counts.tolist() == [0.0, 0.0]


def test_plans_by_hand():
    plans, actions = arrays([1, 2, 3], [0, 0], [], [2, 2]), arrays([1, 0, 3, 3], [0], [1, 1], [])
    found = plans_followed(plans, actions)
    assert found.sums.tolist() == [2.0, 1.0, 0.0, 0.0]
    assert found.counts.tolist() == [3.0, 1.0, 0.0, 0.0]
    prior = np.array([0.1, 0.2, 0.3, 0.4])
    chance = plans_followed_by_chance(plans, actions, prior)
    assert chance.sums == pytest.approx([0.9, 0.1, 0.0, 0.0])
    assert chance.counts.tolist() == found.counts.tolist()


def test_chance_is_what_random_actions_follow():
    generator = np.random.default_rng(0)
    prior = np.array([0.6, 0.3, 0.1])
    plans, actions = ([generator.choice(3, 10, p=p) for _ in range(3000)] for p in ([0.2, 0.3, 0.5], prior))
    followed, chance = plans_followed(plans, actions), plans_followed_by_chance(plans, actions, prior)
    assert followed.sums.sum() / followed.counts.sum() == pytest.approx(0.26, abs=0.01)
    assert chance.sums.sum() / chance.counts.sum() == pytest.approx(0.26, abs=0.01)
