"""Tallies against sums over every example, one after the other."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probekit.probing import results as tally
from probekit.probing.results import SCORES, Tally, row_slices


def random_case(readers: int, lengths: list[int], classes: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Documents of examples, log-probabilities and labels."""
    generator = np.random.default_rng(seed)
    document = np.repeat(np.arange(len(lengths)), lengths)
    logits = torch.from_numpy(generator.normal(size=(readers, len(document), classes)))
    return document, logits.log_softmax(-1).numpy(), generator.integers(classes, size=len(document))


def slow_sums(document: np.ndarray, log_p: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    sums = {score: np.zeros((document.max() + 1, len(log_p))) for score in SCORES}
    for reader, rows in enumerate(log_p):
        own = np.broadcast_to(labels, log_p.shape[:2])[reader]
        for row, (number, label) in enumerate(zip(document, own, strict=True)):
            rank = list(np.argsort(-rows[row])).index(label)
            sums["correct"][number, reader] += rank == 0
            sums["top5"][number, reader] += rank < 5
            sums["cross_entropy"][number, reader] -= rows[row, label]
    return sums


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    readers=st.integers(1, 3),
    cuts=st.lists(st.integers(0, 24), max_size=4),
    seed=st.integers(0, 99),
)
def test_parts_add_up_to_the_sums_of_each_document(
    lengths: list[int], readers: int, cuts: list[int], seed: int
):
    """However examples are cut into parts, within documents too."""
    document, log_p, labels = random_case(readers, lengths, 7, seed)
    found = Tally([{}] * readers, len(lengths))
    edges = sorted({0, len(document), *(cut for cut in cuts if cut < len(document))})
    for start, stop in itertools.pairwise(edges):
        found.add(document[start:stop], log_p[:, start:stop], labels[start:stop])
    for score, sums in slow_sums(document, log_p, labels).items():
        np.testing.assert_allclose(found.sums[score], sums, rtol=1e-12, atol=1e-12)


def test_readers_may_have_labels_of_their_own_and_tensors():
    document, log_p, _ = random_case(3, [2, 5, 1], 6)
    labels = np.random.default_rng(1).integers(6, size=(3, 8))
    found = Tally([{"a": i} for i in range(3)], 3)
    found.add(document, torch.from_numpy(log_p), torch.from_numpy(labels))
    for score, sums in slow_sums(document, log_p, labels).items():
        np.testing.assert_allclose(found.sums[score], sums)
    assert found.heads == [{"a": 0}, {"a": 1}, {"a": 2}]


def test_only_the_scores_that_are_asked_for():
    document, log_p, labels = random_case(1, [3], 4)
    found = Tally([{}], 1, ["correct"])
    found.add(document, log_p, labels)
    assert list(found.sums) == ["correct"]


@pytest.mark.parametrize(("readers", "examples", "classes"), [(1, 1, 1), (3, 100, 7), (50, 9, 10)])
def test_slices_cover_all_examples_and_stay_small(
    readers: int, examples: int, classes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tally, "ELEMENTS", 100)
    slices = row_slices(readers, examples, classes)
    assert np.concatenate([np.arange(examples)[part] for part in slices]).tolist() == list(range(examples))
    for part in slices[:-1]:
        size = part.stop - part.start
        assert size == 1 or size * readers * classes <= 100
        assert (size + 1) * readers * classes > 100
