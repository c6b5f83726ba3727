"""Control labels on documents small enough to label by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.data.tokenizer import train_tokenizer
from probekit.errors import ProbekitError
from probekit.probing.controls import control_labels, word_like_tokens

TEXTS = ["Balu rori. Tano 42!", "... Balu", "rori (balu)."]
PRIOR = np.full(1000, 1e-3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory):
    """Three documents behind separators; words are single tokens."""
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


@settings(max_examples=25, deadline=None)
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


@pytest.mark.parametrize("prior", [np.log([0.5, 0.5]), [0.5, 0.4], [1.5, -0.5], [[1.0]]])
def test_a_prior_that_is_no_distribution_is_refused(corpus, prior):
    with pytest.raises(ProbekitError, match="must hold the probability of each class"):
        control_labels(corpus, np.array([1]), prior, 0)
