"""Targets against walking through every sentence of every document."""

import numpy as np
import pytest

from probekit.probing.targets import targets
from probekit.run import Run


def slow_targets(run: Run, documents: np.ndarray, distance: int, horizon: int) -> list[tuple[int, ...]]:
    """Document, anchor, position and action of every example, in order."""
    corpus, found = run.corpus, []
    for document in documents.tolist():
        sentences = list(range(*corpus.document_sentences[document : document + 2].tolist()))
        text = range(int(corpus.document_tokens[document]) + 1, int(corpus.document_tokens[document + 1]))
        for j, anchor in enumerate(sentences):
            position = int(corpus.first_token[anchor]) - distance
            target = j + horizon - 1
            if j > 0 and position in text and target < len(sentences):
                found.append((document, anchor, position, int(corpus.actions[sentences[target]])))
    return found


@pytest.mark.parametrize("distance", [1, 2, 9, 40, 90, 1000])
@pytest.mark.parametrize("horizon", [1, 2, 15, 100])
def test_targets_equal_the_walk(tiny_run: Run, distance: int, horizon: int):
    documents = np.array([3, 8, 40, 41, 159])
    found = targets(tiny_run.corpus, documents, distance, horizon)
    expected = slow_targets(tiny_run, documents, distance, horizon)
    rows = zip(found.document, found.anchor, found.position, found.action, strict=True)
    assert [tuple(int(value) for value in row) for row in rows] == expected
    assert len(found) == len(expected)
    assert found.action.dtype == np.int64


def test_the_walk_meets_every_edge(tiny_run: Run):
    """The cases above hold examples that each of the rules leaves out, and some that none does."""
    documents = np.array([3, 8, 40, 41, 159])
    counts = {
        (distance, horizon): len(slow_targets(tiny_run, documents, distance, horizon))
        for distance in (1, 40, 1000)
        for horizon in (1, 2, 100)
    }
    sentences = len(tiny_run.corpus.sentences(documents))
    assert counts[1, 1] == sentences - len(documents)  # all but the first ones
    assert counts[1, 2] == sentences - 2 * len(documents)  # and the last ones, which nothing follows
    assert 0 < counts[40, 1] < counts[1, 1]
    assert counts[1000, 1] == counts[1, 100] == 0


def test_no_documents_no_targets(tiny_run: Run):
    found = targets(tiny_run.corpus, np.array([], dtype=np.int64), 1, 1)
    assert len(found) == len(found.document) == len(found.anchor) == len(found.position) == 0


def test_the_first_token_of_a_document_is_read_but_not_its_separator(tiny_run: Run):
    corpus = tiny_run.corpus
    second = corpus.first_token[corpus.document_sentences[20] + 1]
    length = int(second - corpus.document_tokens[20] - 1)  # tokens of the first sentence
    document = np.array([20])
    assert targets(corpus, document, length, 1).position[0] == corpus.document_tokens[20] + 1
    assert second - length - 1 not in targets(corpus, document, length + 1, 1).position
