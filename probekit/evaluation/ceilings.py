"""What the planted corpus allows at best: exact posteriors, lined up with the sentences of a built corpus."""

from __future__ import annotations

import numpy as np

from probekit.config import Config
from probekit.corpus.planted import PlantedModel, posterior_given_actions, posterior_given_words
from probekit.corpus.store import Corpus


def has_ceiling(config: Config) -> bool:
    """Whether the actions are planted, so that the best possible prediction is known."""
    return config.actions.labels == "planted"


def ceiling_log_probabilities(
    config: Config, corpus: Corpus, documents: np.ndarray, horizon: int = 1
) -> dict[str, np.ndarray]:
    """Exact log-posteriors of every sentence's action given all that comes before some documents' sentences.

    Args:
        config: Settings of a planted corpus.
        corpus: The built corpus.
        documents: Which documents.
        horizon: 1 for the next sentence's action, 2 for that of the one after it.

    Returns:
        For "ceiling (actions)", which knows the earlier sentences' true actions, and "ceiling (words)", which
        knows their words alone: `[sentences, actions]` for all sentences of the documents in order. Row j is
        about sentence j + horizon - 1 given the sentences before j.
    """
    model = PlantedModel.draw(config.corpus.planted)
    bounds = zip(corpus.document_sentences[documents], corpus.document_sentences[documents + 1], strict=True)
    actions = [np.asarray(corpus.actions[start:stop]) for start, stop in bounds]
    words = [model.parse(corpus.texts.row(int(document))["text"]) for document in documents]
    with np.errstate(divide="ignore"):
        return {
            "ceiling (actions)": np.log(np.concatenate(posterior_given_actions(model, actions, horizon))),
            "ceiling (words)": np.log(np.concatenate(posterior_given_words(model, words, horizon))),
        }
