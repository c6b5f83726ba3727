"""Readers of the next action that need no activation: prior, bigram, planners, and ceilings where known."""

from __future__ import annotations

import numpy as np
import torch

from probekit.corpus.examples import document_batch
from probekit.corpus.store import Corpus
from probekit.evaluation.action_metrics import fit_bigram, prior_log_probabilities
from probekit.evaluation.ceilings import ceiling_log_probabilities, has_ceiling
from probekit.models.mixing import VARIANTS
from probekit.models.planner import Planner
from probekit.run import Run


def baselines(run: Run, documents: np.ndarray, horizon: int) -> dict[str, np.ndarray]:
    """Log-probabilities of all sentences of some documents, in nats `[sentences, actions]`, by who says so.

    Row j is about the action of sentence j + horizon - 1, given what comes before sentence j. Planners plan
    only the next sentence, and ceilings are known only for planted actions.
    """
    corpus = run.corpus
    sentences = corpus.sentences(documents)
    readers = {
        "prior": np.tile(action_prior(corpus, horizon), (len(sentences), 1)),
        "bigram": _bigram(corpus, sentences, horizon),
    }
    if horizon == 1:
        readers["planner"] = planner_log_probabilities(run.planner(), corpus, documents)
        for variant in run.variants:
            if VARIANTS[variant].joint:
                planner = run.planner(variant)
                readers[f"planner after {variant}"] = planner_log_probabilities(planner, corpus, documents)
    if has_ceiling(run.config):
        readers |= ceiling_log_probabilities(run.config, corpus, documents, horizon)
    return readers


def action_prior(corpus: Corpus, horizon: int) -> np.ndarray:
    """Log share of each action among the targets of the training documents, in nats `[actions]`.

    A document's first sentence is nobody's target, and may well be of another kind than the others.
    """
    previous, target = _pairs(corpus, "train", horizon)
    return prior_log_probabilities(target[previous >= 0], corpus.k)


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


def _bigram(corpus: Corpus, sentences: np.ndarray, horizon: int) -> np.ndarray:
    """The best that the action before alone can tell, fitted on all training documents."""
    bigram = fit_bigram(*_pairs(corpus, "train", horizon), corpus.k, _pairs(corpus, "validation", horizon))
    return bigram.log_probabilities(corpus.previous_actions(sentences))


def _pairs(corpus: Corpus, split: str, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """The action before each sentence of a split, and the one `horizon` sentences later `[pairs]`."""
    sentences = corpus.sentences(corpus.documents(split))
    last = corpus.document_sentences[corpus.document_of(sentences) + 1]
    sentences = sentences[sentences + horizon - 1 < last]
    return corpus.previous_actions(sentences), corpus.actions[sentences + horizon - 1]
