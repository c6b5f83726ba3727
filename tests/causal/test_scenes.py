"""Scenes of made-up corpora: the columns are those of the sentence that is told."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.causal.scenes import draw_scenes
from probekit.errors import ProbekitError

DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=8), min_size=1, max_size=12).filter(
    lambda documents: any(documents)
)


def corpus_of(documents: list[list[int]]) -> Any:
    """A corpus whose documents have sentences of these lengths, each behind a separator."""
    sizes = [1 + sum(lengths) for lengths in documents]
    begins = np.concatenate([[0], np.cumsum(sizes)])
    first = [
        begin + 1 + sum(lengths[:n])
        for begin, lengths in zip(begins[:-1], documents, strict=True)
        for n in range(len(lengths))
    ]
    return SimpleNamespace(
        document_tokens=begins,
        document_sentences=np.concatenate([[0], np.cumsum([len(lengths) for lengths in documents])]),
        first_token=np.array(first, dtype=np.int64),
        actions=np.arange(len(first), dtype=np.int16),
    )


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, st.integers(2, 12), st.integers(1, 12), st.integers(1, 15), st.integers(0, 5))
def test_columns_are_right(documents: list[list[int]], window: int, reach: int, count: int, seed: int):
    corpus = corpus_of(documents)
    numbers = np.arange(len(documents))
    possible = [
        any(1 + sum(lengths[:n]) - reach > 0 for n in range(1, len(lengths))) for lengths in documents
    ]
    if reach > window or not any(possible):
        with pytest.raises(ProbekitError, match=r"intervene\.distances"):
            draw_scenes(corpus, numbers, count, window, reach, seed)
        return
    scenes = draw_scenes(corpus, numbers, count, window, reach, seed)
    assert len(scenes) == min(count, sum(possible))
    assert len(set(scenes.windows.document)) == len(scenes)
    for n in range(len(scenes)):
        document, sentence = scenes.windows.document[n], scenes.sentence[n]
        begin, end = corpus.document_tokens[document : document + 2]
        start, length = scenes.windows.start[n], scenes.windows.length[n]
        column, last = scenes.column[n], scenes.last[n]
        of_document = range(*corpus.document_sentences[document : document + 2])
        assert sentence in of_document[1:]
        assert scenes.action[n] == corpus.actions[sentence]
        # Inputs and their targets are tokens of the document, in one window.
        assert begin <= start
        assert start + length <= end - 1
        assert length <= window
        assert scenes.windows.scored[n] == length
        # The token behind the column is the sentence's first.
        anchor = start + column + 1
        assert anchor == corpus.first_token[sentence]
        assert column < length
        # Every distance reads a token in the window that is not the separator.
        assert column - (reach - 1) >= 0
        assert start + column - (reach - 1) > begin
        # The last predicted token is the sentence's last one, or the window's.
        behind = corpus.first_token[sentence + 1] if sentence + 1 in of_document else end
        assert anchor <= start + last + 1 < behind
        assert last == length - 1 or start + last + 2 == behind


def test_one_boundary_is_all_there_is():
    scenes = draw_scenes(corpus_of([[3, 4], [5], []]), np.arange(3), 9, 8, 2, 0)
    assert (scenes.windows.document.tolist(), scenes.sentence.tolist()) == ([0], [1])
    assert scenes.windows.start[0] == 0
    assert scenes.column[0] == 3
    assert scenes.last[0] == scenes.windows.length[0] - 1 == 6
