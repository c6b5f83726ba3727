"""Intervals over documents and draws, against drawn data whose truth is known, and closed forms."""

import numpy as np
import pytest
from scipy import stats

from probekit.errors import ProbekitError
from probekit.statistics import bootstrap_ratio, mean_over_draws


@pytest.mark.parametrize(
    ("documents", "draws", "spreads"),
    [
        (40, 5, (1.0, 0.3, 0.3)),
        (40, 5, (0.1, 1.0, 0.3)),
        (40, 5, (1.0, 0.0, 1.0)),
        (200, 5, (1.0, 0.3, 1.0)),
        (10, 3, (1.0, 0.5, 1.0)),
    ],
)
def test_intervals_cover_the_truth_as_often_as_they_say(
    documents: int, draws: int, spreads: tuple[float, float, float]
):
    """Spreads of documents, of draws and of both together; documents' lengths are not alike."""
    generator, tried = np.random.default_rng(1), 1000
    covered, exact = 0, 0
    for _ in range(tried):
        counts = generator.integers(5, 30, documents).astype(float)
        values = sum(
            spread * generator.normal(size=size)
            for spread, size in zip(spreads, ((1, documents), (draws, 1), (draws, documents)), strict=True)
        )
        found = mean_over_draws(values * counts, counts)
        covered += found.low <= 0 <= found.high
        # The same with draws taken for all there are.
        error = np.std(values.mean(0), ddof=1) / np.sqrt(documents)
        exact += abs(values.mean()) < 2 * error
    assert 0.92 < covered / tried < 0.98
    assert spreads[1] == 0 or exact / tried < 0.9


def test_draws_that_are_all_alike_add_nothing():
    generator = np.random.default_rng(0)
    counts, one = generator.integers(1, 9, 300).astype(float), generator.normal(size=300)
    found = mean_over_draws(np.stack([one * counts] * 4), counts)
    alone = bootstrap_ratio(one * counts, counts, resamples=20_000, seed=0)
    assert found.value == pytest.approx(alone.value)
    assert (found.low, found.high) == pytest.approx(
        (alone.low, alone.high), abs=0.05 * (alone.high - alone.low)
    )
    assert found.documents == alone.documents == 300


def test_documents_that_are_all_alike_leave_the_interval_of_the_draws():
    draws = np.array([0.3, 1.0, 0.1, -0.4, 0.9])
    counts = np.arange(1.0, 13.0)
    found = mean_over_draws(draws[:, None] * counts, counts, level=0.9)
    half = stats.sem(draws) * stats.t.ppf(0.95, 4)
    assert (found.low, found.high) == pytest.approx((draws.mean() - half, draws.mean() + half))


def test_documents_without_examples_take_no_part():
    sums = np.random.default_rng(0).normal(size=(3, 6))
    found = mean_over_draws(sums, np.ones(6))
    more = mean_over_draws(np.pad(sums, ((0, 0), (0, 2)), constant_values=np.nan), [1.0] * 6 + [0.0] * 2)
    assert more.documents == found.documents == 6
    assert (more.value, more.low, more.high) == pytest.approx((found.value, found.low, found.high))


@pytest.mark.parametrize(("shape", "documents"), [((1, 5), 5), ((4, 1), 1)])
def test_one_draw_or_one_document_tells_no_interval(shape: tuple[int, int], documents: int):
    found = mean_over_draws(np.ones(shape), np.ones(shape[1]))
    assert (found.value, found.documents) == (1.0, documents)
    assert np.isnan([found.low, found.high]).all()


def test_nothing_at_all():
    found = mean_over_draws(np.ones((2, 3)), np.zeros(3))
    assert found.documents == 0
    assert np.isnan([found.value, found.low, found.high]).all()
    assert mean_over_draws(np.zeros((2, 3)), np.ones(3)).high == 0


@pytest.mark.parametrize(("sums", "counts"), [((3,), (3,)), ((2, 3), (2,)), ((0, 3), (3,))])
def test_other_shapes_are_refused(sums: tuple[int, ...], counts: tuple[int, ...]):
    with pytest.raises(ProbekitError, match=r"\[draws, documents\]"):
        mean_over_draws(np.ones(sums), np.ones(counts))
