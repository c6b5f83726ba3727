"""Ceilings line up with the sentences of a built corpus: against posteriors straight from the generator."""

import itertools

import numpy as np
import pytest

from probekit.corpus.planted import generate, posterior_given_actions, posterior_given_words
from probekit.evaluation.action_metrics import score_actions
from probekit.evaluation.ceilings import ceiling_log_probabilities, has_ceiling
from probekit.run import Run


@pytest.mark.parametrize("horizon", [1, 2])
def test_rows_are_the_generators_posteriors(tiny_run: Run, horizon: int):
    corpus = tiny_run.corpus
    documents = np.concatenate([corpus.documents("test"), corpus.documents("probe")[:5]])
    found = ceiling_log_probabilities(tiny_run.config, corpus, documents, horizon)
    truth = generate(tiny_run.config.corpus.planted)
    row = 0
    for document in documents:
        first, last = truth.document_starts[document : document + 2]
        actions = truth.actions[first:last]
        bounds = truth.sentence_starts[first : last + 1]
        words = [truth.words[start:stop] for start, stop in itertools.pairwise(bounds)]
        given_actions = posterior_given_actions(truth.model, [actions], horizon)[0]
        given_words = posterior_given_words(truth.model, [words], horizon)[0]
        rows = slice(row, row + len(actions))
        np.testing.assert_allclose(np.exp(found["ceiling (actions)"][rows]), given_actions, atol=1e-12)
        np.testing.assert_allclose(np.exp(found["ceiling (words)"][rows]), given_words, atol=1e-12)
        row += len(actions)
    assert {len(values) for values in found.values()} == {row}


def test_the_truth_is_as_probable_as_a_ceiling_says(tiny_run: Run):
    """Calibration: over all sentences the probability of the best guess is how often it is right."""
    documents, actions = np.arange(160), np.array(tiny_run.corpus.actions)
    for log_probabilities in ceiling_log_probabilities(tiny_run.config, tiny_run.corpus, documents).values():
        correct = score_actions(log_probabilities, actions).correct
        said = np.exp(log_probabilities.max(axis=1))
        # Given what came before, the errors of a true posterior are uncorrelated: 4 standard deviations.
        spread = np.sqrt((said * (1 - said)).sum())
        assert abs(correct.sum() - said.sum()) < 4 * spread
        # Lined up a sentence too late or too early it would be right far less often.
        assert score_actions(log_probabilities[1:], actions[:-1]).correct.mean() < correct.mean() - 0.1
        assert score_actions(log_probabilities[:-1], actions[1:]).correct.mean() < correct.mean() - 0.1


def test_only_planted_labels_have_a_ceiling(tiny_run: Run):
    assert has_ceiling(tiny_run.config)
    assert not has_ceiling(tiny_run.config.override({"actions.labels": "clusters"}))
