"""Scores and counting baselines against hand-worked cases and brute force."""

import numpy as np
import pytest
import torch

from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import (
    bigram_of_counts,
    fit_bigram,
    pair_counts,
    prior_log_probabilities,
    score_actions,
)


def test_scores_equal_brute_force_with_ties():
    generator = np.random.default_rng(0)
    log_p = np.round(generator.normal(size=(3, 50, 9)), 1)
    actions = generator.integers(0, 9, size=50)
    scores = score_actions(torch.from_numpy(log_p), torch.from_numpy(actions))
    ranking = np.argsort(-log_p, axis=-1, kind="stable")
    assert np.array_equal(scores["correct"], ranking[..., 0] == actions)
    assert np.array_equal(scores["top5"], (ranking[..., :5] == actions[:, None]).any(-1))
    assert scores["cross_entropy"] == pytest.approx(-log_p[:, np.arange(50), actions])


def test_a_constant_distribution_is_right_about_one_action_only():
    k = 8
    scores = score_actions(np.full((k, k), -np.log(k)), np.arange(k))
    assert scores["correct"].tolist() == [True] + [False] * 7
    assert scores["top5"].tolist() == [True] * 5 + [False] * 3


def test_prior_adds_half_an_example_to_each_action():
    log_p = prior_log_probabilities([0, 0, 2], 4)
    assert np.exp(log_p) == pytest.approx(np.array([2.5, 0.5, 1.5, 0.5]) / 5)


def test_counts_of_parts_add_up():
    generator = np.random.default_rng(3)
    previous, target = generator.integers(-1, 5, 100), generator.integers(-1, 5, 100)
    parts = [pair_counts(previous[part], target[part], 5) for part in (slice(0, 37), slice(37, 100))]
    np.testing.assert_array_equal(sum(parts), pair_counts(previous, target, 5))
    labelled = target >= 0
    one = fit_bigram(previous, target, 5, (previous[:50], target[:50]))
    other = bigram_of_counts(sum(parts), pair_counts(previous[:50], target[:50], 5))
    np.testing.assert_array_equal(one.table, other.table)
    without = fit_bigram(previous[labelled], target[labelled], 5, (previous[:50], target[:50]))
    np.testing.assert_array_equal(one.table, without.table)


def test_bigram_equals_brute_force_and_keeps_the_best_strength():
    generator = np.random.default_rng(1)
    k, strengths = 5, [0.1, 1.0, 10.0, 100.0]
    previous, target = generator.integers(-1, k, 60), generator.integers(0, k, 60)
    held_out = generator.integers(-1, k, 40), generator.integers(0, k, 40)
    prior = np.exp(prior_log_probabilities(target, k))

    def probability(before: int, after: int, strength: float) -> float:
        matches = sum(b == before and a == after for b, a in zip(previous, target, strict=True))
        return (matches + strength * prior[after]) / (sum(previous == before) + strength)

    losses = [
        -np.mean([np.log(probability(*pair, s)) for pair in zip(*held_out, strict=True)]) for s in strengths
    ]
    bigram = fit_bigram(previous, target, k, held_out, strengths)
    assert bigram.strength == strengths[int(np.argmin(losses))]
    expected = [[probability(b, a, bigram.strength) for a in range(k)] for b in range(-1, k)]
    assert np.exp(bigram.log_probabilities(range(-1, k))) == pytest.approx(np.array(expected))


def test_bigram_approaches_a_planted_chain():
    generator = np.random.default_rng(2)
    chain = generator.dirichlet(np.full(6, 0.3), size=6)
    documents = []
    for _ in range(400):
        actions = [int(generator.integers(6))]
        while len(actions) < 15:
            actions.append(int(generator.choice(6, p=chain[actions[-1]])))
        documents.append(actions)
    for horizon in (1, 2):
        pairs = [(d[j], d[j + horizon]) for d in documents for j in range(15 - horizon)]
        previous, target = np.array(pairs).T
        fit, held_out = (slice(None, 4000), slice(4000, None))
        bigram = fit_bigram(previous[fit], target[fit], 6, (previous[held_out], target[held_out]))
        learnt = np.exp(bigram.log_probabilities(np.arange(6)))
        assert learnt == pytest.approx(np.linalg.matrix_power(chain, horizon), abs=0.07)


def test_bad_actions_are_refused():
    with pytest.raises(ProbekitError, match="run from 0 to 4"):
        prior_log_probabilities([0, 4], 4)
    with pytest.raises(ProbekitError, match=r"-2 to -2, not from -1 \(none\) to 3"):
        fit_bigram([-2], [0], 4, ([0], [0]))
    with pytest.raises(ProbekitError, match="validation"):
        fit_bigram([0], [0], 4, ([], []))
