"""Moments against sums taken over all examples at once, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.probing.solvers import Moments
from probekit.probing.solvers import base as batch

PROBES, WIDTH, CLASSES = 2, 4, 5
FIELDS = ("class_counts", "class_sums", "mean", "scatter")


def examples(n: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Activations of uneven scale, far from 0, and classes of which the last never comes."""
    generator = torch.Generator().manual_seed(seed)
    X = (torch.randn(PROBES, n, WIDTH, generator=generator) + 20) * torch.logspace(-2, 2, WIDTH)
    return X.to(dtype), torch.randint(0, CLASSES - 1, (PROBES, n), generator=generator)


def at_once(X: Tensor, y: Tensor) -> Moments:
    X = X.double()
    centred = X - X.mean(1, keepdim=True)
    one_hot = torch.nn.functional.one_hot(y, CLASSES).double()
    return Moments(one_hot.sum(1), one_hot.mT @ X, X.mean(1), centred.mT @ centred, torch.float64)


def empty(dtype: torch.dtype = torch.float64) -> Moments:
    return Moments.zeros(PROBES, WIDTH, CLASSES, dtype=dtype)


def assert_equal(found: Moments, expected: Moments, tolerance: float) -> None:
    spread = (expected.scatter.diagonal(dim1=1, dim2=2) / expected.count[:, None].clamp(min=1)).sqrt()
    units = {
        "class_counts": torch.ones(()),
        "class_sums": spread[:, None],
        "mean": spread,
        "scatter": spread[:, :, None] * spread[:, None] * expected.count[:, None, None],
    }
    for name in FIELDS:
        difference = (getattr(found, name) - getattr(expected, name)).abs()
        assert (difference <= tolerance * units[name] + 1e-12).all(), name


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_chunks_add_up(sizes: list[int], dtype: torch.dtype, seed: int):
    X, y = examples(sum(sizes), seed, dtype)
    found = empty(torch.float64 if dtype == torch.float64 else torch.float32)
    for part, labels in zip(X.split(sizes, 1), y.split(sizes, 1), strict=True):
        found.add(part, labels)
    assert_equal(found, at_once(X, y), 1e-9 if dtype == torch.float64 else 2e-6)


@settings(max_examples=20)
@given(sizes=st.permutations([1, 2, 30, 31]), order=st.permutations(range(4)), seed=st.integers(0, 1000))
def test_the_order_of_chunks_changes_nothing(sizes: list[int], order: list[int], seed: int):
    X, y = examples(sum(sizes), seed)
    found, chunks = empty(), [*zip(X.split(sizes, 1), y.split(sizes, 1), strict=True)]
    for number in order:
        found.add(*chunks[number])
    assert_equal(found, at_once(X, y), 1e-9)


@pytest.mark.parametrize("limit", [1, 1000])
def test_pieces_in_memory_change_nothing(limit, monkeypatch):
    X, y = examples(50, 2)
    monkeypatch.setitem(batch.PIECE_BYTES, "cpu", limit)
    assert_equal(empty().add(X, y[0]), at_once(X, y[:1].expand(2, -1)), 1e-9)


def test_an_offset_far_above_the_deviation_does_no_harm():
    """The mean lies between two numbers that float32 knows, and so do the deviations from it."""
    steps = torch.randint(0, 3, (PROBES, 500, WIDTH), generator=torch.Generator().manual_seed(0))
    X, y = 2.0**20 + steps / 8, examples(500, 0)[1]
    assert len(X.unique()) == 3
    assert_equal(empty(torch.float32).add(X, y), at_once(X, y), 1e-6)


def test_what_does_not_fit_is_refused():
    X, y = examples(10, 0)
    with pytest.raises(ProbekitError, match="do not fit moments of 2 probes, width 4"):
        empty().add(X[:1], y[:1])
    with pytest.raises(ProbekitError, match="run from 0 to 5"):
        empty().add(X, torch.full_like(y, 5).fill_diagonal_(0))


@settings(max_examples=10)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_moments_under_other_labels_share_the_scatter(sizes: list[int], seed: int):
    X, y = examples(sum(sizes), seed)
    others = torch.randint(0, CLASSES, y.shape, generator=torch.Generator().manual_seed(seed + 1))
    found = empty()
    relabelled = found.relabelled()
    for part, own, other in zip(X.split(sizes, 1), y.split(sizes, 1), others.split(sizes, 1), strict=True):
        found.add(part, own)
        relabelled.add_labels(part, other)
    assert relabelled.scatter is found.scatter
    assert_equal(found, at_once(X, y), 1e-9)
    assert_equal(relabelled, at_once(X, others), 1e-9)
