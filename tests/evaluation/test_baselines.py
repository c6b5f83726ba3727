"""Baselines that count, against counting sentence by sentence; planners and ceilings on any sentences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.config import Config
from probekit.data.build import write_corpus
from probekit.evaluation import baselines as module
from probekit.evaluation.action_metrics import bigram_of_counts
from probekit.evaluation.baselines import SentenceBaselines, baselines, count_labels
from probekit.planted.ceilings import ceiling_log_probabilities
from probekit.progress import Progress
from probekit.run.run import Run


@pytest.fixture(scope="module")
def untrained(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of which only the corpus is there."""
    run = Run.begin(tmp_path_factory.mktemp("runs") / "corpus only", tiny_config)
    write_corpus(tiny_config, run.folder / "corpus", Progress(quiet=True))
    run.mark_finished("corpus", {})
    return run


def counted(run: Run, documents, labels: np.ndarray, classes: int, horizon: int):
    """Pairs and later labels, one sentence at a time."""
    corpus = run.corpus
    pairs, later = np.zeros((classes + 1, classes)), np.zeros(classes)
    for document in documents:
        first, last = corpus.document_sentences[document : document + 2].tolist()
        for sentence in range(first, last - horizon + 1):
            label = labels[sentence + horizon - 1]
            if label >= 0:
                pairs[labels[sentence - 1] if sentence > first else -1, label] += 1
                later[label] += sentence > first
    return pairs, later


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    horizon=st.sampled_from([1, 2, 9, 40]),
    at_once=st.sampled_from([1, 7, 4096]),
)
def test_counts_equal_a_walk_over_the_sentences(untrained: Run, seed: int, horizon: int, at_once: int):
    """Of labels of any kind, some missing, a few documents at a time."""
    corpus, generator = untrained.corpus, np.random.default_rng(seed)
    labels = generator.integers(-1, 5, len(corpus.first_token))
    documents = np.sort(generator.choice(160, 30, replace=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DOCUMENTS_AT_ONCE", at_once)
        found = count_labels(corpus, documents, labels, 5, horizon)
    pairs, later = counted(untrained, documents, labels, 5, horizon)
    np.testing.assert_array_equal(found.pairs, pairs)
    np.testing.assert_array_equal(found.later, later)


@pytest.mark.parametrize("horizon", [1, 2])
def test_prior_and_bigram_count_the_training_documents(untrained: Run, horizon: int):
    corpus = untrained.corpus
    train, validation = (
        counted(untrained, corpus.documents(split), corpus.actions, 8, horizon)
        for split in ("train", "validation")
    )
    shares = (train[1] + 0.5) / (train[1].sum() + 4)
    sentences = np.random.default_rng(0).permutation(corpus.sentences(corpus.documents("test")))[:50]
    found = SentenceBaselines(untrained, horizon).log_probabilities(sentences)
    np.testing.assert_allclose(np.exp(found["prior"]), np.tile(shares, (50, 1)))
    bigram = bigram_of_counts(train[0], validation[0])
    for sentence, row in zip(sentences, found["bigram"], strict=True):
        first = sentence in corpus.document_sentences
        np.testing.assert_allclose(row, bigram.table[-1 if first else corpus.actions[sentence - 1]])


def test_a_run_without_a_planner_has_the_other_readers(untrained: Run):
    sentences = untrained.corpus.sentences(untrained.corpus.documents("test"))
    found = SentenceBaselines(untrained, 1).log_probabilities(sentences)
    assert list(found) == ["prior", "bigram", "ceiling (actions)", "ceiling (words)"]
    assert {values.shape for values in found.values()} == {(len(sentences), 8)}


def test_only_planted_actions_have_ceilings(untrained: Run):
    clusters = Run(untrained.folder, untrained.config.override({"actions.labels": "clusters"}))
    assert list(SentenceBaselines(clusters, 1).log_probabilities(np.array([0]))) == ["prior", "bigram"]


def test_any_sentences_in_any_chunks(tiny_run: Run):
    """As many rows as asked for, in their order, as if all sentences of all documents had been asked for."""
    corpus = tiny_run.corpus
    whole = baselines(tiny_run, np.arange(160), horizon=1)
    assert {"planner", "planner after joint"} < set(whole)
    ceilings = ceiling_log_probabilities(tiny_run.config, corpus, np.arange(160))
    np.testing.assert_array_equal(whole["ceiling (words)"], ceilings["ceiling (words)"])
    sentences = np.random.default_rng(1).permutation(len(corpus.first_token))[:200]
    readers = SentenceBaselines(tiny_run, 1)
    for part in np.array_split(sentences, 7):
        for name, values in readers.log_probabilities(part).items():
            np.testing.assert_allclose(np.exp(values), np.exp(whole[name][part]), atol=1e-6)


def test_planners_plan_only_the_next_sentence(tiny_run: Run):
    found = SentenceBaselines(tiny_run, 2).log_probabilities(np.array([5]))
    assert list(found) == ["prior", "bigram", "ceiling (actions)", "ceiling (words)"]


def test_only_the_documents_asked_for_are_looked_at(tiny_run: Run, monkeypatch):
    """Counting aside: neither a planner nor a ceiling sees another document."""
    readers, corpus = SentenceBaselines(tiny_run, 1), tiny_run.corpus
    seen: list[int] = []
    for name in ("planner_log_probabilities", "ceiling_log_probabilities"):
        inner = getattr(module, name)

        def spy(first, corpus, documents, *rest, inner=inner):
            seen.extend(documents.tolist())
            return inner(first, corpus, documents, *rest)

        monkeypatch.setattr(module, name, spy)
    readers.log_probabilities(corpus.document_sentences[[30, 7, 30]] + 1)
    assert set(seen) == {7, 30}
