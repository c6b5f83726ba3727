"""What the planted corpus allows at best: exact posteriors, lined up with a built corpus.

Three readers know the planted model and differ in what of a document they have seen before they say which
action a later sentence has: "ceiling (actions)" the earlier sentences' true actions, "ceiling (words)" their
words, and "ceiling (tokens read)" all tokens up to a position, which may lie within a sentence or a word.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from probekit.config import Config, PlantedSettings
from probekit.corpus.planted import PlantedModel
from probekit.corpus.posteriors import posterior_at, posterior_given_actions, posterior_given_words
from probekit.corpus.store import Corpus
from probekit.errors import ProbekitError
from probekit.evaluation.planted_tokens import Forms, Layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    words = _words(model, corpus, documents)
    with np.errstate(divide="ignore"):
        return {
            "ceiling (actions)": np.log(np.concatenate(posterior_given_actions(model, actions, horizon))),
            "ceiling (words)": np.log(np.concatenate(posterior_given_words(model, words, horizon))),
        }


def position_ceiling(
    config: Config, corpus: Corpus, positions: np.ndarray, sentences: np.ndarray
) -> np.ndarray:
    """Exact log-posterior of a sentence's action given the tokens up to and including a position.

    It is told how many sentences ahead of the position the sentence is, but not how many tokens. A reader
    made for one distance knows that much more; where words have several tokens, a hundredth of a bit.

    A word of which only some tokens are read is evidence by the probability of all words whose tokens begin
    with those; so is one that is whole as long as no token after it is read. How many words a sentence has
    does not depend on its action, so neither does the full stop tell of it.

    Args:
        config: Settings of a planted corpus.
        corpus: The built corpus.
        positions: Where reading ends, in `corpus.tokens` `[rows]`. At a separator nothing is read.
        sentences: Numbers of the sentences whose actions are asked for `[rows]`, each of its position's
            document and none before the sentence that holds the position.

    Returns:
        Log-probabilities in nats, `[rows, actions]`.

    Raises:
        ProbekitError: A position is not in the sentence's document or lies behind the sentence, the planted
            settings are not those of the corpus, or the tokenizer does not cut words apart.
    """
    documents, document = np.unique(corpus.document_of(sentences), return_inverse=True)
    model, forms = _known(config.corpus.planted, corpus.tokenizer)
    words = _words(model, corpus, documents)
    layout = Layout.of(words, documents, forms, corpus)
    beginning = corpus.document_tokens[documents[document]] + 1
    unit = np.searchsorted(layout.start, np.maximum(positions, beginning), side="right") - 1
    read = positions - layout.start[unit] + 1  # tokens of the unit; none at the separator
    sentence = layout.sentence[unit]
    ahead = sentences - corpus.document_sentences[documents[document]] - sentence
    wrong = (positions < beginning - 1) | (layout.document[unit] != document) | (ahead < 0)
    if wrong.any():
        row = int(wrong.argmax())
        raise ProbekitError(
            f"position {positions[row]} is not in the document of sentence {sentences[row]} or behind that "
            "sentence; a ceiling is for positions within the sentence or before it"
        )
    log_likelihood = _log_likelihood(model, forms, layout, unit, read)
    with np.errstate(divide="ignore"):
        return np.log(posterior_at(model, words, document, sentence, log_likelihood, ahead))


@lru_cache(maxsize=2)
def _known(settings: PlantedSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[PlantedModel, Forms]:
    """The planted model, and its words as tokens; it is asked for anew for every few documents."""
    model = PlantedModel.draw(settings)
    return model, Forms.of(model, tokenizer)


def _log_likelihood(
    model: PlantedModel, forms: Forms, layout: Layout, unit: np.ndarray, read: np.ndarray
) -> np.ndarray:
    """Log-probability under each action of what is read of a sentence, `[rows, actions]`.

    Args:
        model: What the documents were drawn from.
        forms: The model's words as tokens.
        layout: The documents as words and full stops.
        unit: The word or full stop that is read last `[rows]`.
        read: How many of its tokens are read `[rows]`.
    """
    with np.errstate(divide="ignore"):
        log_emission = np.log(model.emission.T)
    log_likelihood = np.zeros((len(unit), len(model.emission)))
    first = layout.first[unit]
    for word in range(int((unit - first).max(initial=0))):
        rows = np.flatnonzero(first + word < unit)
        log_likelihood[rows] += log_emission[layout.form[first[rows] + word] % forms.vocabulary]
    last = np.flatnonzero((read > 0) & (layout.form[unit] != forms.stop))
    log_likelihood[last] += forms.log_likelihood(model.emission, layout.form[unit[last]], read[last])
    return log_likelihood


def _words(model: PlantedModel, corpus: Corpus, documents: np.ndarray) -> list[list[np.ndarray]]:
    """Word ids of the sentences of documents."""
    return [model.parse(corpus.texts.row(int(document))["text"]) for document in documents]
