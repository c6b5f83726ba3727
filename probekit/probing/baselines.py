"""What probes are held against: readers that need no activation."""

from __future__ import annotations

import numpy as np

from probekit.corpus.store import Corpus
from probekit.evaluation.action_metrics import fit_bigram, prior_log_probabilities
from probekit.evaluation.ceilings import ceiling_log_probabilities, has_ceiling
from probekit.evaluation.evaluate import planner_log_probabilities
from probekit.probing.targets import targets
from probekit.run import Run


def action_prior(corpus: Corpus) -> np.ndarray:
    """Log share of each action in the training documents, in nats `[actions]`."""
    train = corpus.sentences(corpus.documents("train"))
    return prior_log_probabilities(corpus.actions[train], corpus.k)


def baselines(run: Run, documents: np.ndarray, horizon: int) -> dict[str, np.ndarray]:
    """Log-probabilities of all sentences of some documents, in nats `[sentences, actions]`, by who says so.

    Row j is about the action of sentence j + horizon - 1, given what comes before sentence j. The planner
    plans only the next sentence, and a ceiling is known only for planted actions.
    """
    sentences = run.corpus.sentences(documents)
    readers = {
        "prior": np.tile(action_prior(run.corpus), (len(sentences), 1)),
        "bigram": _bigram(run.corpus, sentences, horizon),
    }
    if horizon == 1:
        readers["planner"] = planner_log_probabilities(run.planner(), run.corpus, documents)
    if has_ceiling(run.config):
        readers |= ceiling_log_probabilities(run.config, run.corpus, documents, horizon)
    return readers


def _bigram(corpus: Corpus, sentences: np.ndarray, horizon: int) -> np.ndarray:
    """The best that the action before alone can tell, fitted on all training documents."""
    fitted, chosen = (
        targets(corpus, corpus.documents(split), 1, horizon) for split in ("train", "validation")
    )
    before = corpus.previous_actions
    bigram = fit_bigram(
        before(fitted.anchor), fitted.action, corpus.k, (before(chosen.anchor), chosen.action)
    )
    return bigram.log_probabilities(before(sentences))
