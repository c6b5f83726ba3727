"""Code lengths against hand calculation and a loop with scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from probekit.errors import ProbekitError
from probekit.probing.controls import SHARES, block_ends, prequential_code


def test_blocks_end_with_documents():
    documents = np.array([7, 7, 7, 2, 2, 9, 9, 9, 9, 4])
    assert block_ends(documents, [0.1, 0.3, 0.4, 1.0]) == [3, 5, 10]
    assert block_ends(documents, [0.9, 1.0]) == [9, 10]
    assert block_ends(documents) == [3, 5, 10]
    assert block_ends(np.zeros(5), [0.5, 1.0]) == [5]


@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_each_block_is_the_shortest_that_holds_its_share(sizes: list[int]):
    documents = np.repeat(np.arange(len(sizes))[::-1], sizes)
    cuts = np.cumsum(sizes).tolist()
    expected = {min(cut for cut in cuts if cut >= share * sum(sizes) - 1e-9) for share in SHARES}
    assert block_ends(documents) == sorted(expected)


def test_by_hand_where_only_the_counts_can_be_read():
    """A probe without features tells shares of the labels so far; an absent class has one more example's."""
    X, y = torch.zeros(2, 5, 1), torch.tensor([[0, 0, 1, 0, 0], [1, 1, 1, 1, 1]])
    code = prequential_code(X, y, 2, torch.ones(2), [1, 2, 3, 5])
    first = [1.0, 1.0, math.log2(3), 2 * math.log2(3 / 2)]
    second = [1.0, 1.0, math.log2(3 / 2), 2 * math.log2(4 / 3)]
    bits = torch.tensor([first, second], dtype=torch.float64)
    assert torch.allclose(code.blocks * torch.tensor([1, 1, 1, 2]), bits, atol=1e-4)
    assert torch.allclose(code.total, bits.sum(1) / 5, atol=1e-4)


def test_equals_a_loop_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3, 300, 4, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 4)
    y = (X[0] / torch.logspace(-1, 1, 4) + torch.randn(300, 4, generator=generator)).argmax(1)
    l2, ends = torch.tensor([1e-3, 1e-2, 1e-1]), [40, 100, 300]
    code = prequential_code(X, y, 4, l2, ends, tolerance=1e-7)
    for probe in range(3):
        blocks = [40 * 2.0]
        for end, next_end in ((40, 100), (100, 300)):
            scaler = StandardScaler().fit(X[probe, :end].numpy())
            oracle = LogisticRegression(C=1 / (300 * float(l2[probe])), tol=1e-10, max_iter=10_000)
            oracle.fit(scaler.transform(X[probe, :end].numpy()), y[:end].numpy())
            log_p = oracle.predict_log_proba(scaler.transform(X[probe, end:next_end].numpy()))
            blocks.append(-log_p[np.arange(next_end - end), y[end:next_end]].sum() / math.log(2))
        assert code.blocks[probe].numpy() == pytest.approx(np.array(blocks) / [40, 60, 200], rel=1e-4)
        assert float(code.total[probe]) == pytest.approx(sum(blocks) / 300, rel=1e-4)


def test_bad_shares_documents_and_ends_are_refused():
    with pytest.raises(ProbekitError, match="increase from above 0 to 1"):
        block_ends(np.arange(5), [0.5, 0.2, 1.0])
    with pytest.raises(ProbekitError, match="2 documents come in 3 pieces"):
        block_ends(np.array([1, 1, 2, 1]))
    for ends in ([], [2, 5], [3, 3, 4]):
        with pytest.raises(ProbekitError, match="increase to the 4 examples"):
            prequential_code(torch.zeros(1, 4, 1), torch.zeros(4, dtype=torch.int64), 2, torch.ones(1), ends)
