"""What subnetworks are compared with: as many in every layer, the best alone, probes fitted again."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression

from probekit.causal.components import Component
from probekit.causal.masks import Candidate, Measured, choose, draw_alike, first_alone, objectives, refitted
from probekit.causal.subnetwork import cautions, results_table
from probekit.config import ProbeSettings, SubnetworkSettings

COMPONENTS = [
    *(Component("head", 0, head) for head in range(4)),
    *(Component("head", 1, head) for head in range(4)),
    *(Component("adapter", 1, head) for head in range(4)),
]


def test_random_masks_have_as_many_of_every_kind_in_every_layer():
    removed = np.array([1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0], dtype=bool)
    masks = draw_alike(COMPONENTS, removed, 300, 0)
    assert masks.shape == (300, 12)
    for first, count in ((0, 1), (4, 3), (8, 0)):
        assert (masks[:, first : first + 4].sum(1) == count).all()
        # Each as often as the others.
        np.testing.assert_allclose(masks[:, first : first + 4].mean(0), count / 4, atol=0.1)
    np.testing.assert_array_equal(masks, draw_alike(COMPONENTS, removed, 300, 0))
    assert not np.array_equal(masks, draw_alike(COMPONENTS, removed, 300, 1))


def test_those_best_removed_alone_leave_least():
    assert first_alone(np.array([3.0, 1.0, 2.0, 0.5]), 2).tolist() == [False, True, False, True]
    assert not first_alone(np.array([3.0, 1.0]), 0).any()


def test_probes_fitted_again_are_regressions_of_their_own():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2, 900, 5, generator=generator)
    y = X[0, :, :3].argmax(1)  # the second mask's states tell nothing
    parts = [(X[:, at], y[at]) for at in (slice(0, 400), slice(400, 600))]
    settings = ProbeSettings(l2=(0.01,), max_iterations=300)
    told = refitted(settings, 3, *parts, X[:, 600:])
    assert told.shape == (2, 300, 3)
    right = (told.argmax(2) == y[600:]).float().mean(1)
    assert right[0] > 0.9
    assert right[1] < 0.45
    Z = X[0, :400]
    mean, scale = Z.mean(0), Z.std(0, unbiased=False)
    oracle = LogisticRegression(C=1 / (400 * 0.01), tol=1e-8, max_iter=1000).fit((Z - mean) / scale, y[:400])
    expected = oracle.predict_log_proba((X[0, 600:] - mean) / scale)
    np.testing.assert_allclose(told[0].numpy(), expected, atol=5e-3)


def measured(information: list[list[float]], kept: list[list[float]]) -> Measured:
    """Of masks by documents, each with two sentences and ten tokens."""
    documents = len(information[0])
    sums = {
        "information": (np.array(information), np.full(documents, 2.0)),
        "kept_kl": (np.array(kept), np.full(documents, 10.0)),
    }
    return Measured(sums, torch.zeros(0), np.zeros(0), np.zeros(0))


def candidate(removed: int) -> Candidate:
    return Candidate(0.1, np.where(np.arange(6) < removed, 0.0, 1.0))


def test_objectives_and_their_errors():
    found = measured([[2.0, 4.0, 6.0]], [[10.0, 0.0, 5.0]])
    value, off = objectives(found, 0.5)
    assert value[0] == pytest.approx(12 / 6 + 0.5 * 15 / 30)
    each = np.array([2 / 2 + 0.5 * 10 / 10, 4 / 2 + 0, 6 / 2 + 0.5 * 5 / 10])
    assert np.linalg.norm(off[0]) == pytest.approx(each.std() / np.sqrt(3))
    assert SubnetworkSettings().keep == 1.0


@pytest.mark.parametrize(
    ("removed", "levels", "expected"),
    [
        ((0, 5, 2), (9.0, 1.0, 1.001), 2),  # as good as the best, and smaller
        ((0, 5, 2), (9.0, 1.0, 3.0), 1),
        ((0, 5, 2), (1.0, 1.0, 1.0), 0),
        ((3, 3, 3), (1.002, 1.0, 1.001), 1),  # of equal size, the better one
    ],
)
def test_the_smallest_mask_within_one_error_of_the_best_is_chosen(removed, levels, expected):
    noise = np.random.default_rng(0).normal(scale=0.1, size=(3, 50))
    noise -= noise.mean(axis=1, keepdims=True)
    shared = np.random.default_rng(1).normal(size=50)  # how hard documents are tells masks not apart
    found = measured(
        [(level + n + shared).tolist() for level, n in zip(levels, noise, strict=True)], [[0.0] * 50] * 3
    )
    assert choose([candidate(count) for count in removed], found, 1.0) == expected


def table_of(bits: list[float], refitted: list[float]) -> tuple[pd.DataFrame, np.ndarray]:
    """Of the whole LM, a subnetwork of two, those best alone, and two draws; twelve documents, all alike."""
    each = np.ones(12)
    sums = {
        name: (np.array(values)[:, None] * each, each)
        for name, values in {"bits": bits, "refitted_bits": refitted}.items()
    }
    masks = np.zeros((5, 12), dtype=bool)
    masks[1, [0, 4]] = masks[2, [0, 5]] = masks[3, [1, 5]] = masks[4, [0, 6]] = True
    return results_table(sums, masks, {"resamples": 100, "seed": 0}), masks


def test_a_row_counts_what_it_shares_with_the_subnetwork():
    table, _ = table_of([2, 1, 1, 1, 1], [2, 1, 1, 1, 1])
    counts = table.groupby("condition")[["removed", "shared"]].first()
    assert counts.T.to_dict("list") == {
        "whole": [0, 0],
        "subnetwork": [2, 2],
        "alone": [2, 1],
        "random": [2, 0.5],
    }
    assert (table.components == 12).all()


@pytest.mark.parametrize(
    ("refitted", "said"),
    [
        ([2, 0.5, 1, 1.5, 1.5], []),
        ([2, 1.9, 1, 2, 2], ["but moved"]),
        ([2, 0.5, 1, 0.5, 0.5], ["at random"]),
        ([2, 1.9, 1, 1.5, 1.5], ["but moved", "at random"]),
    ],
)
def test_cautions(refitted: list[float], said: list[str]):
    found = cautions(*table_of([2, 0.4, 1, 1, 1], refitted))
    assert len(found) == len(said)
    for note, part in zip(found, said, strict=True):
        assert part in note


def test_there_are_cautions_where_nothing_is_compared():
    table, masks = table_of([2, 0.4, 1, 1, 1], [2, 0.5, 1, 1.5, 1.5])
    assert (
        "2 of the 2 components are in every random draw"
        in cautions(table, np.repeat(masks[1:2], 5, axis=0))[0]
    )
    assert cautions(table, np.zeros_like(masks)) == [
        "no mask was better than to remove nothing, on validation documents"
    ]


def test_intervals_over_random_carry_how_much_draws_vary():
    """Documents are all alike: what is not known is what other draws would have done."""
    table, _ = table_of([2, 0.4, 1, 0.9, 1.3], [2, 0.5, 1, 1.5, 1.5])
    rows = table[(table.metric.str.startswith("bits")) & table.draw.isna()].set_index(["condition", "metric"])
    half = stats.t.ppf(0.975, 1) * 0.2  # the mean of two draws is off by half of their difference
    for name in (("random", "bits"), ("random", "bits_change"), ("subnetwork", "bits_over_random")):
        row = rows.loc[name]
        assert row.value_high - row.value == pytest.approx(half)
        assert row.value - row.value_low == pytest.approx(half)
    assert rows.loc[("subnetwork", "bits_over_random")].value == pytest.approx(0.4 - 1.1)
    # What one mask does is known of all documents.
    assert rows.loc[("subnetwork", "bits_change")].value_high == pytest.approx(-1.6)


def test_one_draw_tells_no_interval_over_random():
    each = np.ones(12)
    sums = {name: (np.array([2, 0.4, 1, 1.0])[:, None] * each, each) for name in ("bits", "refitted_bits")}
    masks = np.zeros((4, 12), dtype=bool)
    masks[1, [0, 4]] = masks[2, [0, 5]] = masks[3, [1, 5]] = True
    table = results_table(sums, masks, {"resamples": 100, "seed": 0})
    assert table[table.metric == "bits_over_random"].value_high.isna().all()
    assert ["no interval" in note for note in cautions(table, masks)] == [True]
