"""Predictions of the next action without activations: n-grams, planners, and ceilings where known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

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
UNSEEN = -1
"""Number of a context that no training example has."""


def contexts(corpus: Corpus, positions: np.ndarray, order: int) -> Integers:
    """The last tokens up to and including positions, nearest first.

    Args:
        corpus: The corpus, whose tokens may be memory-mapped.
        positions: Indices into `corpus.tokens` `[rows]`.
        order: How many tokens.

    Returns:
        Tokens `[rows, order]`, -1 where a document has none so early; its first one is the separator.
    """
    positions = np.asarray(positions, np.int64)
    document = np.searchsorted(corpus.document_tokens, positions, side="right") - 1
    wanted = positions[:, None] - np.arange(order)
    inside = wanted >= corpus.document_tokens[document][:, None]
    tokens = corpus.tokens[np.where(inside, wanted, positions[:, None])].astype(np.int64)
    return np.where(inside, tokens, NO_TOKEN)


@dataclass(frozen=True)
class ContextCounts:
    """Counts of one order of a skip n-gram. A context has a number: its index among its order's sorted ones.

    Attributes:
        base: The largest token of the training examples plus two.
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
    def of(cls, number: Integers, tokens: Integers, labels: Integers, classes: int) -> Self:
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
        known = (number != UNSEEN) & (tokens + 1 < self.base) & (self.keys[at] == key)
        return np.where(known, at, UNSEEN)

    def mixed(self, p: Floats, number: Integers, labels: Integers) -> Floats:
        """Probability of one label in each context, given that by the order below; all are `[rows]`."""
        pair = number * self.classes + labels
        at = np.minimum(np.searchsorted(self.pairs, pair), len(self.pairs) - 1)
        count = np.where((number != UNSEEN) & (self.pairs[at] == pair), self.counts[at], 0)
        return (count + self.strength * p) / (self._totals(number) + self.strength)

    def mix(self, p: Floats, number: Integers) -> None:
        """Turns probabilities by the order below into this order's, in place `[rows, classes]`."""
        weight = 1 / (self._totals(number) + self.strength)
        p *= (self.strength * weight)[:, None]
        row = np.flatnonzero(number != UNSEEN)
        first, last = self.starts[number[row]], self.starts[number[row] + 1]
        pair, row = ranges(first, last), np.repeat(row, last - first)
        p[row, self.pairs[pair] % self.classes] += self.counts[pair] * weight[row]

    def _totals(self, number: Integers) -> Integers:
        """How often each context occurred `[rows]`."""
        return np.where(number == UNSEEN, 0, self._occurred[number])

    @cached_property
    def _occurred(self) -> Integers:
        return np.add.reduceat(self.counts, self.starts[:-1])


@dataclass(frozen=True)
class SkipNgram:
    """P(label | last n tokens), every order n shrunk towards the order below, order 0 being the prior.

    P_n(label | context) = (count(context, label) + s_n * P_{n-1}(label)) / (count(context) + s_n)

    Attributes:
        prior: Order 0, log-probabilities in nats `[classes]`.
        levels: Orders 1, 2, ..., up to the one with the lowest validation cross-entropy.
        validation_cross_entropy: In nats.
    """

    prior: Floats
    levels: tuple[ContextCounts, ...]
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
        """Counts, and chooses a strength for each order, and the order, by validation cross-entropy.

        Args:
            tokens_context: Last tokens of the training examples, nearest first, -1 for none `[rows, orders]`.
            labels: Their labels; an example without one, -1, does not count `[rows]`.
            classes: Number of classes.
            validation: Last tokens and labels of the validation examples.
            strengths: Strengths to try, in pseudo-counts, all positive.

        Raises:
            ProbekitError: There is no validation example, or a label is none of the classes.
        """
        prior = prior_log_probabilities(labels, classes)
        prior_log_probabilities(validation[1], classes)  # refuses labels that are none of the classes
        tokens, labels = _labelled(tokens_context, labels)
        held_out, truth = _labelled(*validation)
        if not len(truth):
            raise ProbekitError("the skip n-gram's validation examples are empty; they choose its order")
        p = np.exp(prior)[truth]  # of the true label, by the orders so far
        losses, levels = [-np.log(p).mean()], []
        number, held_out_number = np.zeros(len(tokens), np.int64), np.zeros(len(truth), np.int64)
        for n in range(tokens.shape[1] if len(labels) else 0):
            level = ContextCounts.of(number, tokens[:, n], labels, classes)
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

    def log_probabilities(self, tokens_context: np.ndarray) -> Floats:
        """Log-probabilities in nats, `[rows, classes]`, given the last tokens `[rows, orders]`.

        A row does not depend on the others: large arrays can be asked for a few rows at a time.
        """
        # Frequent contexts have the most labels: each distinct one is computed once.
        distinct, row = np.unique(tokens_context[:, : len(self.levels)], axis=0, return_inverse=True)
        p = np.tile(np.exp(self.prior), (len(distinct), 1))
        number = np.zeros(len(p), np.int64)
        for n, level in enumerate(self.levels):
            number = level.extend(number, distinct[:, n])
            level.mix(p, number)
        return np.log(p)[row]


def _labelled(tokens_context: np.ndarray, labels: np.ndarray) -> tuple[Integers, Integers]:
    tokens, known = np.asarray(tokens_context, np.int64), np.asarray(labels, np.int64)
    return tokens[known != NO_ACTION], known[known != NO_ACTION]


DOCUMENTS_AT_ONCE = 4096
"""Documents whose labels are counted at once, which bounds the memory."""


def count_labels(
    corpus: Corpus, documents: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[Floats, Floats]:
    """Counts the labels of sentences, and pairs of neighbours within documents.

    Args:
        corpus: The corpus.
        documents: Which documents, in order.
        labels: A label for each sentence of the corpus, -1 for none `[sentences]`; may be memory-mapped.
        classes: Number of classes.

    Returns:
        `pair_counts` of a sentence's label and the one before `[classes + 1, classes]`, and the labels'
        counts without documents' first sentences `[classes]`: these are never predicted, and may well be of
        another kind.
    """
    pairs, later = np.zeros((classes + 1, classes)), np.zeros(classes)
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        sentences = corpus.sentences(documents[start : start + DOCUMENTS_AT_ONCE])
        first = sentences == corpus.document_sentences[corpus.document_of(sentences)]
        previous = np.where(first, NO_ACTION, labels[np.maximum(sentences - 1, 0)])
        target = np.asarray(labels[sentences])
        pairs += pair_counts(previous, target, classes)
        later += pair_counts(previous[~first], target[~first], classes).sum(0)
    return pairs, later


def action_predictions(run: Run, documents: np.ndarray) -> dict[str, np.ndarray]:
    """What readers that need no activations predict for all sentences of documents, in order.

    These are the prior and the bigram, counted on training documents, the trained planners, and the ceilings
    of planted actions. Each knows only the sentences before the one that it predicts.

    Returns:
        Log-probabilities in nats `[sentences, actions]`, by the reader's name.
    """
    corpus = run.corpus
    sentences = corpus.sentences(documents)
    (pairs, later), (validation, _) = (
        count_labels(corpus, corpus.documents(split), corpus.known_actions, corpus.k)
        for split in ("train", "validation")
    )
    bigram = bigram_of_counts(pairs, validation)
    readers = {
        "prior": np.tile(log_shares(later), (len(sentences), 1)),
        "bigram": bigram.log_probabilities(corpus.previous_actions(sentences)),
    }
    for name, (planner, read) in planners(run).items():
        readers[name] = planner_log_probabilities(planner, read, documents)
    if has_ceiling(run.config):
        readers |= ceiling_log_probabilities(run.config, corpus, documents)
    return readers


def planner_log_probabilities(
    planner: Planner, corpus: Corpus, documents: np.ndarray, batch_size: int = 32
) -> np.ndarray:
    """The planner's log-probabilities for all sentences of documents, in order `[sentences, actions]`."""
    device = planner.start.device
    parts = []
    for start in range(0, len(documents), batch_size):
        batch = documents[start : start + batch_size]
        embeddings, _ = document_batch(corpus, batch)
        lengths = torch.from_numpy(corpus.document_sentences[batch + 1] - corpus.document_sentences[batch])
        with torch.no_grad():
            scores = planner(embeddings.to(device)).cpu()
        own = torch.arange(scores.shape[1]) < lengths[:, None]
        parts.append(scores[own].log_softmax(dim=-1).double().numpy())
    return np.concatenate(parts)


def planners(run: Run) -> dict[str, tuple[Planner, Corpus]]:
    """The trained planner and those of joint variants, by name, with the corpus as each reads it."""
    if not run.finished("planner"):
        return {}
    joint = [variant for variant in run.variants if VARIANTS[variant].joint]
    return {"planner": (run.planner(), run.corpus)} | {
        f"planner after {name}": (run.planner(name), run.corpus_of(name)) for name in joint
    }
