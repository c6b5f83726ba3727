"""Windows and batches against slow references, on random corpora made of numbers alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.config import BosRule
from probekit.data.codebook import Codebook
from probekit.data.corpus import Corpus
from probekit.data.windows import (
    IGNORE,
    Windows,
    beginnings,
    collate,
    cut_windows,
    document_batch,
    input_tokens,
)

Documents = list[list[int]]
"""Lengths of each sentence in tokens, for each document."""


def corpus_of(documents: Documents, bos: BosRule = "document") -> Corpus:
    """A corpus whose token at index i has the id 1000 + i, or 7 where it is a separator."""
    rng = np.random.default_rng(0)
    lengths = [sum(sentences) for sentences in documents]
    document_tokens = np.cumsum([0, *(length + 1 for length in lengths)])
    tokens = 1000 + np.arange(document_tokens[-1])
    tokens[document_tokens[:-1]] = 7
    first_token = [
        begin + 1 + offset
        for begin, sentences in zip(document_tokens, documents, strict=False)
        for offset in np.cumsum([0, *sentences])[:-1]
    ]
    sentences = len(first_token)
    return Corpus(
        folder=Path(),
        tokens=tokens.astype(np.uint16),
        document_tokens=document_tokens,
        document_sentences=np.cumsum([0, *map(len, documents)]),
        first_token=np.array(first_token, dtype=np.int64),
        spans=np.zeros((sentences, 2), dtype=np.int64),
        split=np.zeros(len(documents), dtype=np.uint8),
        group=np.arange(len(documents)),
        embeddings=rng.normal(size=(sentences, 3)).astype(np.float32),
        actions=rng.integers(9, size=sentences).astype(np.int32),
        codebook=Codebook(np.zeros((9, 3), dtype=np.float32)),
        facts={"bos": bos},
    )


def sentence_of(corpus: Corpus, token: int) -> int:
    """The sentence that holds a token, found by walking."""
    return max(s for s, first in enumerate(corpus.first_token.tolist()) if first <= token)


SENTENCES = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@st.composite
def cuts(
    draw, documents: st.SearchStrategy[list[int]] = SENTENCES
) -> tuple[Corpus, np.ndarray, Windows, int, int]:
    """A corpus, some of its documents, and the windows cut from them at a window and a stride."""
    corpus = corpus_of(draw(st.lists(documents, min_size=1, max_size=5)))
    count = len(corpus.split)
    chosen = np.array(sorted(draw(st.sets(st.integers(0, count - 1), min_size=1))))
    window = draw(st.integers(1, 12))
    stride = draw(st.integers(1, window))
    return corpus, chosen, cut_windows(corpus, chosen, window, stride), window, stride


@settings(max_examples=300)
@given(cuts(documents=st.just([]) | SENTENCES))
def test_windows_score_every_token_once_in_order_with_the_context_there_is(cut):
    corpus, chosen, windows, window, stride = cut
    scored = []
    for document, start, length, count in zip(
        windows.document, windows.start, windows.length, windows.scored, strict=True
    ):
        first, stop = corpus.document_tokens[document], corpus.document_tokens[document + 1]
        assert 1 <= count <= length <= window
        assert first <= start
        assert start + length < stop  # the last target is a token of the document
        for target in range(start + length - count + 1, start + length + 1):
            scored.append(target)
            assert target - start >= min(target - first, window - stride + 1)
    tokens = [
        token
        for document in chosen
        for token in range(corpus.document_tokens[document] + 1, corpus.document_tokens[document + 1])
    ]
    assert scored == tokens
    assert (np.diff(windows.start + windows.length) > 0).all()


@settings(max_examples=100)
@given(cuts())
def test_whole_windows_advance_by_the_stride(cut):
    corpus, chosen, windows, window, stride = cut
    for document in chosen:
        own = windows[windows.document == document]
        targets = corpus.document_tokens[document + 1] - corpus.document_tokens[document] - 1
        assert own.scored[0] == min(window, targets)
        assert (own.scored[1:-1] == stride).all()
        assert (own.length[:-1] == window).all()
        starts = corpus.document_tokens[document] + stride * np.arange(len(own))
        assert own.start.tolist() == starts.tolist(), "no position of a window tells where the document ends"
        # One window more would have nothing left to score.
        assert len(own) == (1 if targets <= window else 1 + -(-(targets - window) // stride))


@settings(max_examples=200)
@given(st.lists(st.just([]) | SENTENCES, min_size=1, max_size=4), st.integers(2, 9), st.data())
def test_the_separator_is_read_where_the_rule_says(documents: Documents, window: int, data: st.DataObject):
    stride = data.draw(st.integers(1, window))
    for bos in ("document", "every-window", "none"):
        corpus = corpus_of(documents, bos)
        windows = cut_windows(corpus, np.arange(len(documents)), window, stride)
        if not len(windows):
            continue
        batch, inputs = collate(corpus, windows), input_tokens(corpus, windows)
        assert torch.equal(batch.tokens, inputs)
        begin = corpus.document_tokens[windows.document]
        first = windows.start == begin + (bos == "none")
        separators = {"document": first, "every-window": np.ones_like(first), "none": np.zeros_like(first)}
        assert (inputs[:, 0] == 7).tolist() == separators[bos].tolist()
        assert (inputs[:, 1:][batch.targets[:, 1:] != IGNORE] != 7).all()
        # Every token is scored once, but the first of a document before which nothing is read; and what was
        # replaced was not asked for its next token.
        scored = batch.targets[batch.targets != IGNORE].tolist()
        wanted = [
            1000 + index
            for start, stop in itertools.pairwise(corpus.document_tokens.tolist())
            for index in range(start + 1 + (bos == "none"), stop)
        ]
        assert sorted(scored) == wanted
        if bos == "every-window":
            assert (batch.targets[~torch.from_numpy(first), 0] == IGNORE).all()


def test_inputs_by_hand():
    corpus = corpus_of([[4, 3], [2]])  # document 0 is tokens 0 to 7, document 1 tokens 8 to 10
    windows = cut_windows(corpus, np.array([1, 0]), window=4, stride=4)
    found = input_tokens(corpus, windows)
    assert found.dtype == torch.int64
    assert windows.length.tolist() == [2, 4, 3]  # the last token of a document is only predicted
    inside = [row[:length].tolist() for row, length in zip(found, windows.length, strict=True)]
    assert inside == [[7, 1009], [7, 1001, 1002, 1003], [1004, 1005, 1006]]


def test_windows_by_hand():
    corpus = corpus_of([[4, 3], [2]])  # document 0 is tokens 0 to 7, document 1 tokens 8 to 10
    windows = cut_windows(corpus, np.array([0, 1]), window=4, stride=2)
    assert windows.document.tolist() == [0, 0, 0, 1]
    assert windows.start.tolist() == [0, 2, 4, 8]
    assert windows.length.tolist() == [4, 4, 3, 2]
    assert windows.scored.tolist() == [4, 2, 1, 2]
    assert beginnings(corpus, windows).tolist() == [1, 1, 0, 1]


@settings(max_examples=200)
@given(cuts(), st.data())
def test_a_batch_is_what_a_slow_reading_gives(cut, data):
    corpus, _, windows, *_ = cut
    rows = np.array(
        data.draw(st.lists(st.integers(0, len(windows) - 1), min_size=1, max_size=4, unique=True))
    )
    windows = windows[rows]
    batch = collate(corpus, windows)
    assert batch.tokens.shape == (len(rows), windows.length.max())
    assert torch.equal(input_tokens(corpus, windows), batch.tokens)
    assert batch.document is windows.document

    touched = set()
    begun = set()
    for row, (start, length, scored) in enumerate(
        zip(windows.start, windows.length, windows.scored, strict=True)
    ):
        for position in range(batch.tokens.shape[1]):
            target = start + position + 1
            if position >= length:
                assert batch.targets[row, position] == IGNORE
                continue
            assert batch.tokens[row, position] == corpus.tokens[start + position]
            counts = position >= length - scored
            assert batch.targets[row, position] == (corpus.tokens[target] if counts else IGNORE)
            sentence = sentence_of(corpus, target)
            touched.add(sentence)
            if counts and corpus.first_token[sentence] == target:
                begun.add(sentence)
            carried = batch.touched[batch.sentence[row, position]]
            torch.testing.assert_close(
                batch.context.flatten(0, 1)[carried], torch.from_numpy(corpus.embeddings[sentence])
            )
            assert batch.actions[batch.sentence[row, position]] == corpus.actions[sentence]

    order = sorted(touched)
    assert batch.actions.tolist() == corpus.actions[order].tolist()
    assert batch.begins.tolist() == [sentence in begun for sentence in order]
    documents = sorted({int(corpus.document_of(np.array([sentence]))[0]) for sentence in order})
    expected = torch.zeros_like(batch.context)
    for row, document in enumerate(documents):
        begin, stop = corpus.document_sentences[document : document + 2]
        last = max(sentence for sentence in order if begin <= sentence < stop)
        expected[row, : last + 1 - begin] = torch.from_numpy(corpus.embeddings[begin : last + 1])
    torch.testing.assert_close(batch.context, expected, rtol=0, atol=0)


@settings(max_examples=100)
@given(cuts(), st.integers(1, 4))
def test_every_sentence_is_begun_in_one_window(cut, batch_size):
    corpus, chosen, windows, *_ = cut
    sentences = len(corpus.sentences(chosen))
    assert beginnings(corpus, windows).sum() == sentences
    each = [int(collate(corpus, windows[np.array([n])]).begins.sum()) for n in range(len(windows))]
    assert each == beginnings(corpus, windows).tolist()
    batches = [slice(n, n + batch_size) for n in range(0, len(windows), batch_size)]
    assert sum(int(collate(corpus, windows[rows]).begins.sum()) for rows in batches) == sentences


@settings(max_examples=100)
@given(st.lists(SENTENCES, min_size=1, max_size=5), st.data())
def test_document_batches(documents: Documents, data):
    corpus = corpus_of(documents)
    chosen = np.array(
        data.draw(st.lists(st.integers(0, len(documents) - 1), min_size=1, max_size=4, unique=True))
    )
    embeddings, actions = document_batch(corpus, chosen)
    longest = max(len(documents[document]) for document in chosen)
    assert embeddings.shape == (len(chosen), longest, 3)
    assert actions.shape == (len(chosen), longest)
    for row, document in enumerate(chosen):
        own = slice(*corpus.document_sentences[document : document + 2])
        count = len(documents[document])
        assert actions[row].tolist() == [*corpus.actions[own].tolist(), *[IGNORE] * (longest - count)]
        np.testing.assert_array_equal(embeddings[row, :count], corpus.embeddings[own])
        assert not embeddings[row, count:].any()


def test_a_batch_moves_whole_to_a_device():
    corpus = corpus_of([[4, 3], [2]])
    batch = collate(corpus, cut_windows(corpus, np.array([0, 1]), 4, 2)).to(torch.device("meta"))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    assert all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize("rows", [slice(1, 3), np.array([2, 0]), np.array([True, False, True, False])])
def test_rows_of_windows(rows):
    corpus = corpus_of([[4, 3], [2]])
    windows = cut_windows(corpus, np.array([0, 1]), 4, 2)
    for name, values in vars(windows[rows]).items():
        assert values.tolist() == getattr(windows, name)[rows].tolist()
    assert len(windows[rows]) == 2
