"""Control labels on documents small enough to label by hand; code lengths by hand and with scikit-learn."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from probekit.data.tokenizer import train_tokenizer
from probekit.errors import ProbekitError
from probekit.probing.controls import SHARES, block_ends, control_labels, prequential_code, word_like_tokens

TEXTS = ["Balu rori. Tano 42!", "... Balu", "rori (balu)."]
PRIOR = np.full(1000, 1e-3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory):
    """Three documents after separators; words are single tokens."""
    folder: Path = tmp_path_factory.mktemp("control")
    tokenizer = train_tokenizer(TEXTS * 20, 400, folder / "tokenizer")
    ids = [[tokenizer.bos_token_id, *tokenizer(text).input_ids] for text in TEXTS]
    document_tokens = np.cumsum([0, *map(len, ids)])
    return SimpleNamespace(
        tokens=np.concatenate(ids).astype(np.uint16), document_tokens=document_tokens, tokenizer=tokenizer
    )


def test_words_and_numbers_are_word_like_and_nothing_else_is(corpus):
    word_like = word_like_tokens(corpus.tokenizer)
    decoded = {corpus.tokenizer.decode([token]): bool(word_like[token]) for token in corpus.tokens}
    assert decoded == {
        "<|endoftext|>": False, "Balu": True, " rori": True, ".": False, " Tano": True, " 42": True,
        "!": False, "...": False, " Balu": True, "rori": True, " (": False, "balu": True, ").": False,
    }  # fmt: skip


def test_labels_are_those_of_the_last_word(corpus):
    texts = [corpus.tokenizer.decode([token]) for token in corpus.tokens]
    found = control_labels(corpus, np.arange(len(texts)), PRIOR, seed=1)
    # <s> Balu rori . Tano 42 ! | <s> ... Balu | <s> rori ( balu ).
    source = [0, 1, 2, 2, 4, 5, 5, 7, 8, 9, 10, 11, 11, 13, 13]
    assert [texts[place] for place in (3, 6, 8, 12)] == [".", "!", "...", " ("]
    of_token: dict[str, int] = {}
    for label, place in zip(found.tolist(), source, strict=True):
        assert of_token.setdefault(texts[place], label) == label
    # A thousand even classes: different tokens have different labels, or a label of something else was read.
    assert len(set(of_token.values())) == len(of_token) == 9
    assert found.dtype == np.int64


@settings(max_examples=25)
@given(places=st.lists(st.integers(0, 14), min_size=1, max_size=20), seed=st.integers(0, 5))
def test_a_label_does_not_depend_on_what_else_is_asked(corpus, places, seed):
    whole = control_labels(corpus, np.arange(15), PRIOR, seed)
    np.testing.assert_array_equal(control_labels(corpus, np.array(places), PRIOR, seed), whole[places])


def test_seeds_differ(corpus):
    labels = [control_labels(corpus, np.arange(15), PRIOR, seed) for seed in (0, 1)]
    assert (labels[0] != labels[1]).mean() > 0.8


def test_labels_are_drawn_from_the_prior(corpus):
    """Over many seeds, and never a class of probability zero."""
    prior = np.array([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    labels = np.array([control_labels(corpus, np.array([1]), prior, seed)[0] for seed in range(2000)])
    shares = np.bincount(labels, minlength=6) / 2000
    np.testing.assert_allclose(shares, prior, atol=0.05)
    assert not shares[prior == 0].any()


def test_no_positions_no_labels(corpus):
    assert len(control_labels(corpus, np.array([], np.int64), PRIOR, 0)) == 0


# Code length


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


def bits_of_blocks(X, y, classes, l2, ends, **options):
    """Bits of each block `[probes, blocks]`: what the labels up to its end take beyond those before it."""
    sent = [
        end
        * prequential_code(X[:, :end], y[..., :end], classes, l2 * X.shape[1] / end, ends[:count], **options)
        for count, end in enumerate(ends, 1)
    ]
    return torch.stack(sent, 1).diff(dim=1, prepend=torch.zeros(len(X), 1, dtype=sent[0].dtype))


def test_by_hand_where_only_the_counts_can_be_read():
    """A probe without features predicts the shares of the labels so far; absent classes share one more."""
    X, y = torch.zeros(2, 5, 1), torch.tensor([[0, 0, 1, 0, 0], [1, 1, 1, 1, 1]])
    code = prequential_code(X, y, 2, torch.ones(2), [1, 2, 3, 5])
    first = [1.0, 1.0, math.log2(3), 2 * math.log2(3 / 2)]
    second = [1.0, 1.0, math.log2(3 / 2), 2 * math.log2(4 / 3)]
    bits = torch.tensor([first, second], dtype=torch.float64)
    assert torch.allclose(bits_of_blocks(X, y, 2, torch.ones(2), [1, 2, 3, 5]), bits, atol=1e-4)
    assert torch.allclose(code, bits.sum(1) / 5, atol=1e-4)


def test_equals_a_loop_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3, 300, 4, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 4)
    y = (X[0] / torch.logspace(-1, 1, 4) + torch.randn(300, 4, generator=generator)).argmax(1)
    l2, ends = torch.tensor([1e-3, 1e-2, 1e-1]), [40, 100, 300]
    code = prequential_code(X, y, 4, l2, ends, tolerance=1e-7)
    found = bits_of_blocks(X, y, 4, l2, ends, tolerance=1e-7)
    for probe in range(3):
        blocks = [40 * 2.0]
        for end, next_end in ((40, 100), (100, 300)):
            scaler = StandardScaler().fit(X[probe, :end].numpy())
            oracle = LogisticRegression(C=1 / (300 * float(l2[probe])), tol=1e-10, max_iter=10_000)
            oracle.fit(scaler.transform(X[probe, :end].numpy()), y[:end].numpy())
            log_p = oracle.predict_log_proba(scaler.transform(X[probe, end:next_end].numpy()))
            blocks.append(-log_p[np.arange(next_end - end), y[end:next_end]].sum() / math.log(2))
        assert found[probe].numpy() == pytest.approx(np.array(blocks), rel=1e-4)
        assert float(code[probe]) == pytest.approx(sum(blocks) / 300, rel=1e-4)


def test_bad_documents_and_ends_are_refused():
    with pytest.raises(ProbekitError, match="2 documents come in 3 pieces"):
        block_ends(np.array([1, 1, 2, 1]))
    for ends in ([], [2, 5], [3, 3, 4]):
        with pytest.raises(ProbekitError, match="increase to the 4 examples"):
            prequential_code(torch.zeros(1, 4, 1), torch.zeros(4, dtype=torch.int64), 2, torch.ones(1), ends)
