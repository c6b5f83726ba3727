"""Readers of the next action that need no activation: prior, bigram, planners, and ceilings where known.

What is counted is counted over memory-mapped arrays a few documents at a time, and planners and ceilings look
only at the documents whose sentences are asked for, so memory does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from probekit.data.corpus import Corpus, ranges
from probekit.data.windows import document_batch
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import (
    NO_ACTION,
    STRENGTHS,
    Floats,
    bigram_of_counts,
    log_shares,
    pair_counts,
    prior_log_probabilities,
)
from probekit.models.mixing import VARIANTS
from probekit.models.planner import Planner
from probekit.planted.ceilings import ceiling_log_probabilities, has_ceiling
from probekit.run.run import Run

Integers = NDArray[np.int64]

NO_TOKEN = -1
"""Stands for a token before a document's beginning."""
NEVER = -1
"""Number of a context that no training example has."""


def contexts(corpus: Corpus, positions: np.ndarray, order: int) -> Integers:
    """The last tokens up to and including positions, nearest first.

    Args:
        corpus: The corpus, whose tokens may be memory-mapped.
        positions: Where, in `corpus.tokens` `[rows]`.
        order: How many tokens.

    Returns:
        Tokens `[rows, order]`, -1 where a document has none so early; its first one is the separator.
    """
    positions = np.asarray(positions, np.int64)
    document = np.searchsorted(corpus.document_tokens, positions, side="right") - 1
    places = positions[:, None] - np.arange(order)
    inside = places >= corpus.document_tokens[document][:, None]
    tokens = corpus.tokens[np.where(inside, places, positions[:, None])].astype(np.int64)
    return np.where(inside, tokens, NO_TOKEN)


@dataclass(frozen=True)
class Level:
    """What one order counted. A context has a number, its position among the sorted ones of its order.

    Attributes:
        base: More than any token of the training examples, plus one.
        keys: `number of the context that is one token shorter * base + token + 1`, sorted `[contexts]`.
        classes: Number of classes.
        pairs: `number of the context * classes + label` of what occurred, sorted `[pairs]`.
        counts: How often it did `[pairs]`.
        starts: Context c's pairs are `starts[c]` to `starts[c + 1]` `[contexts + 1]`.
        strength: Pseudo-counts of the order below.
    """

    base: int
    keys: Integers
    classes: int
    pairs: Integers
    counts: Integers
    starts: Integers
    strength: float = 1.0

    @classmethod
    def count(cls, number: Integers, tokens: Integers, labels: Integers, classes: int) -> Self:
        """Counts examples, given the numbers of their contexts without the last token, and that `[rows]`."""
        base = int(tokens.max()) + 2
        keys, context = np.unique(number * base + tokens + 1, return_inverse=True)
        pairs, counts = np.unique(context * classes + labels, return_counts=True)
        starts = np.searchsorted(pairs, np.arange(len(keys) + 1) * classes)
        return cls(base, keys, classes, pairs, counts, starts)

    def extend(self, number: Integers, tokens: Integers) -> Integers:
        """Numbers of contexts, given those without the last token, and that token `[rows]`."""
        key = number * self.base + tokens + 1
        at = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        known = (number != NEVER) & (tokens + 1 < self.base) & (self.keys[at] == key)
        return np.where(known, at, NEVER)

    def mixed(self, p: Floats, number: Integers, labels: Integers) -> Floats:
        """Probability of one label in each context, given that by the order below; all are `[rows]`."""
        pair = number * self.classes + labels
        at = np.minimum(np.searchsorted(self.pairs, pair), len(self.pairs) - 1)
        count = np.where((number != NEVER) & (self.pairs[at] == pair), self.counts[at], 0)
        return (count + self.strength * p) / (self._totals(number) + self.strength)

    def mix(self, p: Floats, number: Integers) -> None:
        """Makes probabilities by the order below into this order's, in place `[rows, classes]`."""
        weight = 1 / (self._totals(number) + self.strength)
        p *= (self.strength * weight)[:, None]
        row = np.flatnonzero(number != NEVER)
        first, last = self.starts[number[row]], self.starts[number[row] + 1]
        pair, row = ranges(first, last), np.repeat(row, last - first)
        p[row, self.pairs[pair] % self.classes] += self.counts[pair] * weight[row]

    def _totals(self, number: Integers) -> Integers:
        """How often each context occurred `[rows]`."""
        return np.where(number == NEVER, 0, self._occurred[number])

    @cached_property
    def _occurred(self) -> Integers:
        """How often each context occurred, by its number `[contexts]`."""
        return np.add.reduceat(self.counts, self.starts[:-1])


@dataclass(frozen=True)
class SkipNgram:
    """P(label | last n tokens), every order n shrunk towards the order below, order 0 being the prior.

    P_n(label | context) = (count(context, label) + s_n * P_{n-1}(label)) / (count(context) + s_n)

    Attributes:
        prior: Order 0, log-probabilities in nats `[classes]`.
        levels: Orders 1, 2, ..., as many as did validation examples good.
        validation_cross_entropy: In nats.
    """

    prior: Floats
    levels: tuple[Level, ...]
    validation_cross_entropy: float

    @classmethod
    def fit(
        cls,
        tokens_context: np.ndarray,
        labels: np.ndarray,
        classes: int,
        validation: tuple[np.ndarray, np.ndarray],
        strengths: Sequence[float] = STRENGTHS,
    ) -> Self:
        """Counts, and chooses a strength for each order, and the order, by cross-entropy on validation.

        Args:
            tokens_context: Last tokens of the training examples, nearest first, -1 for none `[rows, orders]`.
            labels: Their labels; an example without one, -1, does not count `[rows]`.
            classes: Number of classes.
            validation: Last tokens and labels of the examples on which is chosen.
            strengths: Strengths to try, in pseudo-counts, all positive.

        Raises:
            ProbekitError: There is no validation example, or a label is none of the classes.
        """
        prior = prior_log_probabilities(labels, classes)
        prior_log_probabilities(validation[1], classes)  # refuses labels that are none of the classes
        tokens, labels = _labelled(tokens_context, labels)
        held_out, truth = _labelled(*validation)
        if not len(truth):
            raise ProbekitError(
                "the skip n-gram's validation examples are empty; its order is chosen on them"
            )
        p = np.exp(prior)[truth]  # of the true label, by the orders so far
        losses, levels = [-np.log(p).mean()], []
        number, held_out_number = np.zeros(len(tokens), np.int64), np.zeros(len(truth), np.int64)
        for n in range(tokens.shape[1] if len(labels) else 0):
            level = Level.count(number, tokens[:, n], labels, classes)
            number = level.extend(number, tokens[:, n])
            held_out_number = level.extend(held_out_number, held_out[:, n])
            tried = [replace(level, strength=strength) for strength in strengths]
            found = [each.mixed(p, held_out_number, truth) for each in tried]
            loss = [-np.log(each).mean() for each in found]
            best = int(np.argmin(loss))
            p = found[best]
            losses.append(loss[best])
            levels.append(tried[best])
        order = int(np.argmin(losses))
        return cls(prior, tuple(levels[:order]), float(losses[order]))

    @property
    def order(self) -> int:
        """How many tokens it looks at."""
        return len(self.levels)

    def log_probabilities(self, tokens_context: np.ndarray) -> Floats:
        """Log-probabilities in nats, `[rows, classes]`, given the last tokens `[rows, orders]`.

        A row does not depend on the others: large arrays can be asked for a few rows at a time.
        """
        # The more often a context recurs, the more labels it has: each is worked out once.
        distinct, row = np.unique(tokens_context[:, : self.order], axis=0, return_inverse=True)
        p = np.tile(np.exp(self.prior), (len(distinct), 1))
        number = np.zeros(len(p), np.int64)
        for n, level in enumerate(self.levels):
            number = level.extend(number, distinct[:, n])
            level.mix(p, number)
        return np.log(p)[row]


def _labelled(tokens_context: np.ndarray, labels: np.ndarray) -> tuple[Integers, Integers]:
    """The examples that have a label."""
    tokens, known = np.asarray(tokens_context, np.int64), np.asarray(labels, np.int64)
    return tokens[known != NO_ACTION], known[known != NO_ACTION]


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
