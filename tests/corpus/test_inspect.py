"""What a corpus looks like, against counting by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from probekit.corpus.inspect import action_table, sentence_lengths, sizes
from probekit.corpus.store import SPLITS
from probekit.run import Run


def lengths_of(run: Run, documents: list[int]) -> list[list[int]]:
    """Lengths of every document's sentences, in tokens."""
    corpus = run.corpus
    found = []
    for document in documents:
        starts = corpus.first_token[slice(*corpus.document_sentences[document : document + 2])].tolist()
        edges = [*starts, int(corpus.document_tokens[document + 1])]
        found.append([stop - start for start, stop in itertools.pairwise(edges)])
    return found


def test_sizes(tiny_run: Run):
    table = sizes(tiny_run.corpus)
    assert table.index.tolist() == list(SPLITS)
    for split in SPLITS:
        lengths = lengths_of(tiny_run, np.flatnonzero(tiny_run.corpus.split == SPLITS.index(split)).tolist())
        sentences = list(itertools.chain(*lengths))
        assert table.loc[split].tolist() == [len(lengths), len(sentences), sum(sentences)]
    assert table.sum().tolist() == [tiny_run.corpus.facts[name] for name in table.columns]


def test_sentence_lengths(tiny_run: Run):
    lengths = list(itertools.chain(*lengths_of(tiny_run, list(range(160)))))
    quantiles = sentence_lengths(tiny_run.corpus)
    assert quantiles[0.0] == min(lengths)
    assert quantiles[1.0] == max(lengths)
    assert quantiles[0.5] == np.median(lengths)
    assert quantiles.tolist() == np.quantile(lengths, quantiles.index).tolist()
    assert np.mean(np.array(lengths) <= quantiles[0.95]) >= 0.95


def test_a_sentence_ends_before_the_next_documents_separator(tiny_run: Run):
    corpus = replace(
        tiny_run.corpus,
        document_tokens=np.array([0, 4, 5, 13]),  # sentences of 3 tokens, of none, of 5 and 2
        document_sentences=np.array([0, 1, 1, 3]),
        first_token=np.array([1, 6, 11]),
    )
    assert (
        sentence_lengths(corpus).tolist() == np.quantile([3, 5, 2], sentence_lengths(corpus).index).tolist()
    )


def test_action_table(tiny_run: Run):
    corpus = tiny_run.corpus
    table = action_table(corpus, nearest=3)
    train = [
        action
        for n in corpus.documents("train")
        for action in corpus.actions[corpus.sentences(np.array([n]))]
    ]
    for action, row in table.iterrows():
        assert row.sentences == train.count(action)
        assert row.share == pytest.approx(train.count(action) / len(train))
        own = np.flatnonzero(corpus.actions == action)
        distances = np.linalg.norm(corpus.embeddings[own] - corpus.codebook.centroids[action], axis=1)
        shown = [text.lower() for text in row.nearest]
        assert len(shown) == 3
        limit = np.sort(distances)[2] + 1e-6
        near = {text.lower() for text in corpus.sentence_texts(own[distances <= limit])}
        assert set(shown) <= near
    assert sorted(table.index) == list(range(8))
    assert table.sentences.is_monotonic_decreasing
    assert table.share.sum() == pytest.approx(1)
