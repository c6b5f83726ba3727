"""Readers of the next action that need no activation: prior, bigram, planners, and ceilings where known.

What is counted is counted over memory-mapped arrays a few documents at a time, and planners and ceilings look
only at the documents whose sentences are asked for, so memory does not grow with the corpus.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from probekit.corpus.examples import document_batch
from probekit.corpus.store import Corpus
from probekit.evaluation.action_metrics import NO_ACTION, Floats, bigram_of_counts, log_shares, pair_counts
from probekit.evaluation.ceilings import ceiling_log_probabilities, has_ceiling
from probekit.models.mixing import VARIANTS
from probekit.models.planner import Planner
from probekit.run import Run

DOCUMENTS_AT_ONCE = 4096
"""Documents whose labels are counted at once: it bounds the memory and leaves the counts as they are."""


class SentenceBaselines:
    """The baselines of one horizon, fitted on the training documents once and asked as often as need be."""

    def __init__(self, run: Run, horizon: int) -> None:
        """Counts the training documents and loads the planners.

        Args:
            run: The run; it needs a corpus, and may lack a planner.
            horizon: 1 for the action of the sentence itself, 2 for that of the one after it.
        """
        corpus = run.corpus
        train, validation = (
            count_labels(corpus, corpus.documents(split), corpus.actions, corpus.k, horizon)
            for split in ("train", "validation")
        )
        self._run, self._horizon = run, horizon
        self._prior = log_shares(train.later)
        self._bigram = bigram_of_counts(train.pairs, validation.pairs)
        self._planners = planners(run) if horizon == 1 else {}

    def log_probabilities(self, sentences: np.ndarray) -> dict[str, np.ndarray]:
        """What each reader says of sentences, in nats `[sentences, actions]`, by its name.

        Row j is about the action of the sentence `horizon - 1` after `sentences[j]`, given what comes before
        that one. Planners plan only the next sentence, and ceilings are known only for planted actions.
        """
        corpus = self._run.corpus
        readers = {
            "prior": np.tile(self._prior, (len(sentences), 1)),
            "bigram": self._bigram.log_probabilities(corpus.previous_actions(sentences)),
        }
        documents = np.unique(corpus.document_of(sentences))
        rows = np.searchsorted(corpus.sentences(documents), sentences)
        for name, (planner, read) in self._planners.items():
            readers[name] = planner_log_probabilities(planner, read, documents)[rows]
        if has_ceiling(self._run.config):
            ceilings = ceiling_log_probabilities(self._run.config, corpus, documents, self._horizon)
            readers |= {name: log_probabilities[rows] for name, log_probabilities in ceilings.items()}
        return readers


def baselines(run: Run, documents: np.ndarray, horizon: int) -> dict[str, np.ndarray]:
    """What each reader says of all sentences of some documents, in order; see `SentenceBaselines`."""
    return SentenceBaselines(run, horizon).log_probabilities(run.corpus.sentences(documents))


class LabelCounts(NamedTuple):
    """Counts over sentences.

    Attributes:
        pairs: As `pair_counts` makes them: the label before a sentence, and the one `horizon` sentences after
            that `[classes + 1, classes]`.
        later: The second labels alone, without those of documents' first sentences `[classes]`. A first
            sentence is nobody's target, and may well be of another kind than the others.
    """

    pairs: Floats
    later: Floats


def count_labels(
    corpus: Corpus, documents: np.ndarray, labels: np.ndarray, classes: int, horizon: int
) -> LabelCounts:
    """Counts labels and pairs of them within documents.

    Args:
        corpus: The corpus.
        documents: Which documents, in order.
        labels: A label for each sentence of the corpus, -1 for none `[sentences]`; may be memory-mapped.
        classes: Number of classes.
        horizon: Sentences from the first label of a pair to the second.
    """
    pairs, later = np.zeros((classes + 1, classes)), np.zeros(classes)
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        sentences = corpus.sentences(documents[start : start + DOCUMENTS_AT_ONCE])
        document = corpus.document_of(sentences)
        inside = sentences + horizon - 1 < corpus.document_sentences[document + 1]
        sentences, document = sentences[inside], document[inside]
        first = sentences == corpus.document_sentences[document]
        previous = np.where(first, NO_ACTION, labels[np.maximum(sentences - 1, 0)])
        target = np.asarray(labels[sentences + horizon - 1])
        pairs += pair_counts(previous, target, classes)
        later += pair_counts(previous[~first], target[~first], classes).sum(0)
    return LabelCounts(pairs, later)


def planner_log_probabilities(
    planner: Planner, corpus: Corpus, documents: np.ndarray, batch_size: int = 32
) -> np.ndarray:
    """The planner's log-probabilities for all sentences of documents, in order `[sentences, actions]`."""
    device = planner.start.device
    parts = []
    for start in range(0, len(documents), batch_size):
        batch = documents[start : start + batch_size]
        embeddings, actions = document_batch(corpus, batch)
        with torch.no_grad():
            scores = planner(embeddings.to(device)).cpu()
        parts.append(scores[actions >= 0].log_softmax(dim=-1).double().numpy())
    return np.concatenate(parts)


def planners(run: Run) -> dict[str, tuple[Planner, Corpus]]:
    """The run's planner and those of joint variants, with the corpus as each reads it; none if untrained."""
    if not run.finished("planner"):
        return {}
    joint = [variant for variant in run.variants if VARIANTS[variant].joint]
    return {"planner": (run.planner(), run.corpus)} | {
        f"planner after {name}": (run.planner(name), run.corpus_of(name)) for name in joint
    }
