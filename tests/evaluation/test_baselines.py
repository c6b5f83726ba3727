"""Baselines against counting sentence by sentence and by dictionaries, and against a planted dependency."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.config import Config
from probekit.data.build import write_corpus
from probekit.errors import ProbekitError
from probekit.evaluation import baselines as module
from probekit.evaluation.action_metrics import prior_log_probabilities
from probekit.evaluation.baselines import SkipNgram, action_predictions, contexts, count_labels
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


def counted(run: Run, documents, labels: np.ndarray, classes: int):
    """Pairs and later labels, one sentence at a time."""
    corpus = run.corpus
    pairs, later = np.zeros((classes + 1, classes)), np.zeros(classes)
    for document in documents:
        first, last = corpus.document_sentences[document : document + 2].tolist()
        for sentence in range(first, last):
            label = labels[sentence]
            if label >= 0:
                pairs[labels[sentence - 1] if sentence > first else -1, label] += 1
                later[label] += sentence > first
    return pairs, later


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), at_once=st.sampled_from([1, 7, 4096]))
def test_counts_equal_a_walk_over_the_sentences(untrained: Run, seed: int, at_once: int):
    """Of labels of any kind, some missing, a few documents at a time."""
    corpus, generator = untrained.corpus, np.random.default_rng(seed)
    labels = generator.integers(-1, 5, len(corpus.first_token))
    documents = np.sort(generator.choice(160, 30, replace=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "DOCUMENTS_AT_ONCE", at_once)
        found = count_labels(corpus, documents, labels, 5)
    for counts, expected in zip(found, counted(untrained, documents, labels, 5), strict=True):
        np.testing.assert_array_equal(counts, expected)


def test_documents_alone_are_predicted_as_among_all(tiny_run: Run):
    corpus = tiny_run.corpus
    whole = action_predictions(tiny_run, np.arange(160))
    assert {"planner", "planner after joint"} < set(whole)
    ceilings = ceiling_log_probabilities(tiny_run.config, corpus, np.arange(160))
    np.testing.assert_array_equal(whole["ceiling (words)"], ceilings["ceiling (words)"])
    documents = np.array([7, 30, 120])
    for name, values in action_predictions(tiny_run, documents).items():
        np.testing.assert_allclose(
            np.exp(values), np.exp(whole[name][corpus.sentences(documents)]), atol=1e-6
        )


# The skip n-gram


def drawn(seed: int, rows: int, tokens: int = 4, orders: int = 3, classes: int = 5):
    generator = np.random.default_rng(seed)
    return generator.integers(-1, tokens, (rows, orders)), generator.integers(0, classes, rows)


def by_dictionaries(training, labels, classes, strengths, query):
    """Distributions [rows, classes] of as many orders as there are strengths."""
    p = np.tile(np.exp(prior_log_probabilities(labels, classes)), (len(query), 1))
    for order, strength in enumerate(strengths, 1):
        pairs = Counter(
            (tuple(row[:order]), label) for row, label in zip(training.tolist(), labels.tolist(), strict=True)
        )
        totals = Counter(tuple(row[:order]) for row in training.tolist())
        for i, row in enumerate(query.tolist()):
            counts = np.array([pairs[tuple(row[:order]), label] for label in range(classes)])
            p[i] = (counts + strength * p[i]) / (totals[tuple(row[:order])] + strength)
    return p


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 80), tokens=st.sampled_from([1, 4, 100_000]))
def test_equals_dictionaries_and_chooses_on_validation(seed, rows, tokens):
    training, labels = drawn(seed, rows, tokens)
    held_out, truth = drawn(seed + 1, 40, tokens + 2)  # holds tokens that training does not
    strengths = [0.5, 5.0, 50.0]
    found = SkipNgram.fit(training, labels, 5, (held_out, truth), strengths)

    def loss(path):
        p = by_dictionaries(training, labels, 5, path, held_out)
        return -np.log(p[np.arange(len(truth)), truth]).mean()

    # An order's strength is the best one given those of the orders below.
    path = []
    losses = [loss([])]
    for _ in range(3):
        path.append(min(strengths, key=lambda strength: loss([*path, strength])))
        losses.append(loss(path))
    chosen = [level.strength for level in found.levels]
    assert loss(chosen) == pytest.approx(min(losses))
    assert found.validation_cross_entropy == pytest.approx(min(losses))
    query = np.vstack([held_out, training])
    p = np.exp(found.log_probabilities(query))
    np.testing.assert_allclose(p, by_dictionaries(training, labels, 5, chosen, query))
    np.testing.assert_allclose(p.sum(1), 1.0)
    parts = [found.log_probabilities(part) for part in np.array_split(query, 7)]
    np.testing.assert_array_equal(np.exp(np.concatenate(parts)), p)


def test_a_case_worked_by_hand():
    training, labels = np.array([[7], [7], [8], [9]]), np.array([0, 0, 1, -1])
    found = SkipNgram.fit(training, labels, 2, (np.array([[7], [8]]), np.array([0, 1])), [2.0])
    prior = np.array([2.5, 1.5]) / 4
    expected = [(np.array([2, 0]) + 2 * prior) / 4, (np.array([0, 1]) + 2 * prior) / 3, prior]
    np.testing.assert_allclose(np.exp(found.log_probabilities(np.array([[7], [8], [9]]))), expected)


def test_finds_the_order_that_matters():
    """The label is often the sum of two tokens: one alone tells nothing, a third only thins the counts."""
    tokens, noise = drawn(0, 4000, tokens=6, classes=7)
    labels = (tokens[:, 0] + tokens[:, 1] + 2) % 7
    noisy = np.random.default_rng(1).random(4000) < 0.4
    labels = np.where(noisy, noise, labels)
    found = SkipNgram.fit(tokens[:3000], labels[:3000], 7, (tokens[3000:], labels[3000:]))
    # A third token may be let in by chance, but is then hardly listened to.
    strengths = [level.strength for level in found.levels]
    assert len(strengths) >= 2
    assert strengths[1] <= 10
    assert all(strength >= 30 for strength in strengths[2:])
    right = found.log_probabilities(tokens[3000:]).argmax(1) == labels[3000:]
    assert right[~noisy[3000:]].all()


def test_contexts_stay_within_their_document():
    corpus = SimpleNamespace(
        tokens=np.array([99, 1, 2, 3, 99, 4, 99, 5], np.uint16), document_tokens=np.array([0, 4, 6, 8])
    )
    found = contexts(corpus, np.array([3, 1, 5, 7, 6]), 3)
    assert found.tolist() == [[3, 2, 1], [1, 99, -1], [4, 99, -1], [5, 99, -1], [99, -1, -1]]
    assert found.dtype == np.int64


def test_without_training_labels_it_knows_nothing():
    tokens, labels = drawn(4, 10)
    found = SkipNgram.fit(tokens, np.full(10, -1), 5, (tokens, labels))
    np.testing.assert_allclose(np.exp(found.log_probabilities(tokens)), 0.2)


def test_bad_input_is_refused():
    tokens, labels = drawn(5, 10)
    with pytest.raises(ProbekitError, match="validation examples are empty"):
        SkipNgram.fit(tokens, labels, 5, (tokens, np.full(10, -1)))
    with pytest.raises(ProbekitError, match="not from -1"):
        SkipNgram.fit(tokens, labels, 3, (tokens, labels % 3))
    with pytest.raises(ProbekitError, match="not from -1"):
        SkipNgram.fit(tokens, labels % 3, 3, (tokens, labels))
