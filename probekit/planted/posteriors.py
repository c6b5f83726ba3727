"""Exact posteriors of the planted corpus: the best possible prediction of its later actions.

The forward algorithm gives the distribution of a later action given the earlier actions
(`posterior_given_actions`), the earlier words alone (`posterior_given_words`), or any evidence about the
sentence that is being read (`posterior_at`). Where a document holds several examples, the chain starts anew
in each, and what is known of the type carries over. No planner or probe that reads only this can have a lower
expected cross-entropy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np

from probekit.errors import ProbekitError
from probekit.planted.corpus import FloatArray, IntArray, PlantedModel

Ids = Sequence[int] | IntArray

BATCH = 256
"""Documents filtered at once; bounds the memory of the arrays [types, documents, actions]."""


def posterior_given_actions(
    model: PlantedModel, documents: Sequence[Ids], horizon: int = 1
) -> list[FloatArray]:
    """Exact distribution of a later action given the actions of the earlier sentences.

    Args:
        model: What the documents were drawn from.
        documents: The sentences' actions, for each document.
        horizon: Sentences ahead; 1 is the next sentence.

    Returns:
        An array [sentences, actions] for each document: row j is the distribution of the action of sentence
        j + horizon - 1 given sentences 0 to j - 1, and row 0 is the prior.

    Raises:
        ProbekitError: A document is impossible under the model, or the horizon is below 1.
    """
    # A sentence with a known action is a sentence of one word that only this action can emit.
    shown = [[(action,) for action in actions] for actions in documents]
    seen = replace(model, emission=np.eye(len(model.emission)))
    return posterior_given_words(seen, shown, horizon)


def posterior_given_words(
    model: PlantedModel, documents: Sequence[Sequence[Ids]], horizon: int = 1
) -> list[FloatArray]:
    """Exact distribution of a later action given the words of the earlier sentences.

    Args:
        model: What the documents were drawn from.
        documents: The sentences' word ids (`PlantedModel.parse`), for each document. A sentence may hold only
            those of its words that were read; an empty one is no evidence.
        horizon: Sentences ahead; 1 is the next sentence.

    Returns:
        Arrays like those of `posterior_given_actions`.

    Raises:
        ProbekitError: A document is impossible under the model, or the horizon is below 1.
    """
    if horizon < 1:
        raise ProbekitError(f"horizon is {horizon}: it must be at least 1, the next sentence")
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    starts = np.concatenate([[0], lengths.cumsum()])
    document = np.repeat(np.arange(len(lengths)), lengths)
    sentence = np.arange(starts[-1]) - starts[document]
    nothing = np.broadcast_to(0.0, (len(sentence), len(model.emission)))
    ahead = np.full(len(sentence), horizon - 1)
    rows = posterior_at(model, documents, document, sentence, nothing, ahead)
    return [rows[start:stop] for start, stop in itertools.pairwise(starts.tolist())]


def posterior_at(
    model: PlantedModel,
    documents: Sequence[Sequence[Ids]],
    document: IntArray,
    sentence: IntArray,
    log_likelihood: FloatArray,
    ahead: IntArray,
) -> FloatArray:
    """Exact distribution of an action given the words of the sentences before one that is partly read.

    Args:
        model: What the documents were drawn from.
        documents: The sentences' word ids, for each document.
        document: Position in `documents`, for each row, [rows].
        sentence: The sentence that is partly read, counted from 0 in its document, [rows].
        log_likelihood: Of what was read of that sentence under each action, in nats, [rows, actions]; with
            what was read after it, under each type too, [types, rows, actions].
        ahead: Sentences from that one to the one whose action is predicted, 0 for its own, [rows].

    Returns:
        Probabilities, [rows, actions].

    Raises:
        ProbekitError: A document, or what was read, is impossible under the model.
    """
    steps = cache(partial(_steps, model))
    posterior = np.full((len(document), len(model.emission)), np.nan)
    for first in range(0, len(documents), BATCH):
        batch = np.flatnonzero(document // BATCH == first // BATCH)
        for j, log_joint in enumerate(_filtered(model, documents, first)):
            here = batch[sentence[batch] == j]
            for n in np.unique(ahead[here]).tolist():
                rows, place = here[ahead[here] == n], j % model.example_length if model.example_length else 0
                for part in np.split(rows, range(BATCH, len(rows), BATCH)):
                    joint = log_joint[:, document[part] - first] + log_likelihood[..., part, :]
                    _check_possible(joint, j, document[part])
                    posterior[part] = _marginal(joint, steps(place, n))
    return posterior


def log_joint_by_type(model: PlantedModel, examples: Sequence[Sequence[Ids]]) -> FloatArray:
    """The forward algorithm on single examples, under each type.

    Args:
        model: What the examples were drawn from.
        examples: The sentences' word ids, for each example; all have as many sentences.

    Returns:
        Log-probability, given the type, of sentence j's action jointly with all words of the sentences before
        it, in nats, [examples, sentences + 1, types, actions]. Summed over actions, the last one is that of
        all words.

    Raises:
        ProbekitError: An example is impossible under the model.
    """
    followed = [[*example, ()] for example in examples]
    parts = [
        np.stack([*_filtered(model, followed, first)]).transpose(2, 0, 1, 3)
        for first in range(0, len(followed), BATCH)
    ]
    return np.concatenate(parts) - np.log(model.prior)[:, None]


def _filtered(model: PlantedModel, documents: Sequence[Sequence[Ids]], first: int) -> Iterator[FloatArray]:
    """The forward algorithm over (type, action) on a batch of documents from `first` on.

    Yields:
        For sentence j = 0, 1, ...: [types, documents, actions], the log-probability of a type and sentence
        j's action, jointly with all words of the sentences before.
    """
    batch = documents[first : first + BATCH]
    symbols = _padded(batch)
    with np.errstate(divide="ignore"):
        start = np.log(model.prior)[:, None, None] + np.log(model.initial)[:, None, :]
        # [words + 1, actions]; the last row, which padding (-1) selects, is no evidence.
        evidence = np.log(np.vstack([model.emission.T, np.ones(len(model.emission))]))
    log_joint = np.repeat(start, len(batch), axis=1)
    for j in range(symbols.shape[1]):
        yield log_joint
        log_joint = log_joint + evidence[symbols[:, j]].sum(axis=1)
        _check_possible(log_joint, j, first + np.arange(len(batch)))
        log_joint = _advance(log_joint, model.step(j))


def _steps(model: PlantedModel, sentence: int, ahead: int) -> FloatArray:
    """Probability of the action some sentences after one, given that one's, [types, actions, actions]."""
    steps = np.broadcast_to(np.eye(len(model.emission)), model.transition.shape)
    for j in range(sentence, sentence + ahead):
        steps = steps @ model.step(j)
    return steps


def _check_possible(log_joint: FloatArray, sentence: int, documents: IntArray) -> None:
    """Refuses log_joint [types, documents, actions] where a document has no probability left."""
    impossible = np.isneginf(log_joint.max(axis=(0, 2)))
    if impossible.any():
        raise ProbekitError(
            f"sentence {sentence} of document {documents[impossible.argmax()]} is impossible under this "
            "planted model: use the corpus.planted settings that generated it; where these did, and its "
            "sentences stand in another order, give a larger corpus.planted.concentration"
        )


def _marginal(log_joint: FloatArray, ahead: FloatArray) -> FloatArray:
    """[documents, actions] from log_joint [types, documents, actions] and the transitions `ahead`."""
    joint = np.exp(log_joint - log_joint.max(axis=(0, 2), keepdims=True))
    weights = (joint @ ahead).sum(axis=0)
    return weights / weights.sum(axis=1, keepdims=True)


def _advance(log_joint: FloatArray, transition: FloatArray) -> FloatArray:
    """The next sentence: the logarithm of exp(log_joint) @ transition, [types, documents, actions]."""
    # Scaled by each type's own peak, so that an unlikely type survives for later sentences to confirm.
    peak = log_joint.max(axis=2, keepdims=True)
    peak[np.isneginf(peak)] = 0.0
    with np.errstate(divide="ignore"):
        return np.log(np.exp(log_joint - peak) @ transition) + peak


def _padded(documents: Sequence[Sequence[Ids]]) -> IntArray:
    """[documents, sentences, symbols], -1 where a shorter sentence or document has no symbol."""
    most_sentences = max(map(len, documents))
    most_symbols = max((len(sentence) for document in documents for sentence in document), default=0)
    padded = np.full((len(documents), most_sentences, most_symbols), -1)
    for d, document in enumerate(documents):
        for s, sentence in enumerate(document):
            padded[d, s, : len(sentence)] = sentence
    return padded
