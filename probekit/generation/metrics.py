"""Metrics of written text: ROUGE-2, MAUVE, and those of its sequence of actions; labelling its sentences.

Metrics by text are held as a sum and a count for each text, so that texts can be resampled.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from scipy.special import rel_entr, stdtrit
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from probekit.data.encoders import WORD
from probekit.data.sentences import complete_spans, sentence_spans
from probekit.data.tokenizer import decoded
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import NO_ACTION, Bigram, Integers
from probekit.progress import Task
from probekit.run.run import Run
from probekit.statistics import Floats, Interval, resample_weights


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, each cut at some number of tokens, and the actions of their sentences.

    Attributes:
        texts: Of each, the text of its first tokens.
        actions: Actions of the sentences that lie wholly within them `[sentences]`, one array of each. The
            last sentence of a text that was cut is left out, as it may be incomplete. Of a text without a
            whole sentence the first one counts, with all its text, beyond the cut too.
        merged: How many of the first sentences go on with the last one of the context, and so had no action
            planned: mostly 0, else 1 `[texts]`.
    """

    texts: list[str]
    actions: list[Integers]
    merged: list[int]

    @property
    def empty(self) -> np.ndarray:
        """Which texts are blank `[texts]`."""
        return np.array([not text.strip() for text in self.texts], dtype=bool)


class Labeller:
    """Labels the sentences of any text with their actions, as the corpus's own are with nearest centroids."""

    def __init__(self, run: Run) -> None:
        run.corpus.require_actions()
        self._corpus, self._encoder = run.corpus, run.encoder()
        self._language = run.config.corpus.language

    def cut(
        self,
        tokens: Sequence[np.ndarray],
        lengths: Sequence[int],
        contexts: Sequence[np.ndarray] | None = None,
    ) -> dict[int, LabelledTexts]:
        """Cuts texts at each length and labels what is left.

        A sentence is embedded once, from all its text within the longest length, and counts at every length
        that holds all of it; a first sentence counts at any length.

        Args:
            tokens: Each text's tokens; one of the longest length or more is taken to be cut off there.
            lengths: In tokens.
            contexts: Tokens that each text continues, without the separator; they are not embedded.
        """
        longest, tokenizer = max(lengths), self._corpus.tokenizer
        before = [[] for _ in tokens] if contexts is None else [context.tolist() for context in contexts]
        splits = [
            self._split(decoded(tokenizer, context), decoded(tokenizer, [*context, *ids[:longest].tolist()]))
            for context, ids in zip(before, tokens, strict=True)
        ]
        actions = self._actions([split.sentences for split in splits])
        cuts = {}
        for length in lengths:
            texts, kept = [], []
            for context, ids, split, own in zip(before, tokens, splits, actions, strict=True):
                text = decoded(tokenizer, [*context, *ids[:length].tolist()])[split.begin :]
                ends = split.ends[:-1] if len(ids) >= longest else split.ends
                whole = max(int((ends <= len(text)).sum()), min(1, len(split.ends)))
                texts.append(text)
                kept.append(own[:whole])
            cuts[length] = LabelledTexts(texts, kept, [split.merged for split in splits])
        return cuts

    def last_actions(self, texts: Sequence[str]) -> Integers:
        """The action of each text's last sentence `[texts]`, -1 for a blank text."""
        spans = [sentence_spans(text, self._language)[-1:] for text in texts]
        last = self._actions([_stripped(text, span) for text, span in zip(texts, spans, strict=True)])
        return np.array([int(own[0]) if len(own) else NO_ACTION for own in last], np.int64)

    def _split(self, context: str, whole: str) -> _Split:
        """Splits a text, which goes on from its context, together with it."""
        begin = len(context)
        spans = sentence_spans(whole, self._language)
        ends = np.array([len(whole[:end].rstrip()) for _, end in spans], np.int64) - begin
        own = int((ends <= 0).sum())
        if own < len(spans) and not WORD.search(whole[begin : spans[own, 1]]):
            own += 1  # punctuation that the context's last sentence lacked
        merged = max(len(complete_spans(context, self._language)) - own, 0) if own < len(spans) else 0
        return _Split(begin, _stripped(whole, np.maximum(spans[own:], begin)), ends[own:], merged)

    def _actions(self, sentences: Sequence[Sequence[str]]) -> list[Integers]:
        """The actions of each text's sentences."""
        together = [sentence for own in sentences for sentence in own]
        if not together:
            return [np.zeros(0, np.int64) for _ in sentences]
        labels = self._corpus.codebook.nearest(self._encoder.encode(together)).astype(np.int64)
        return np.split(labels, np.cumsum([len(own) for own in sentences])[:-1])


class _Split(NamedTuple):
    """The sentences of a text after its context.

    Attributes:
        begin: Characters of the context.
        sentences: The text's own sentences, or its part of them, without surrounding white space.
        ends: Where each ends, in characters of the text `[sentences]`.
        merged: How many of them continue a sentence that was complete at the end of the context.
    """

    begin: int
    sentences: list[str]
    ends: np.ndarray
    merged: int


def _stripped(text: str, spans: np.ndarray) -> list[str]:
    return [text[start:end].strip() for start, end in spans]


class MetricSums(NamedTuple):
    """A metric by text: its value is the ratio of the two sums over texts.

    Attributes:
        sums: `[texts]`.
        counts: What the sums are over, such as sentences `[texts]`; a text without any does not count.
    """

    sums: Floats
    counts: Floats


def edit_distances(true: Sequence[Integers], generated: Sequence[Integers]) -> MetricSums:
    """Levenshtein distance of each pair of sequences: insertions, deletions and substitutions, 1 each."""
    distances = [Levenshtein.distance(a.tolist(), b.tolist()) for a, b in zip(true, generated, strict=True)]
    return MetricSums(np.array(distances, np.float64), np.ones(len(distances)))


def normalised_edit_distances(true: Sequence[Integers], generated: Sequence[Integers]) -> MetricSums:
    """`edit_distances` as a share of the longer sequence's length; 0 where both are empty."""
    distances, counts = edit_distances(true, generated)
    longer = [max(len(a), len(b), 1) for a, b in zip(true, generated, strict=True)]
    return MetricSums(distances / np.array(longer), counts)


def latent_losses(bigram: Bigram, sequences: Sequence[Integers], previous: Integers) -> MetricSums:
    """Negative log-probability of sequences under a bigram; exp of the ratio is the latent perplexity.

    Args:
        bigram: Fitted on true sequences.
        sequences: The sequences.
        previous: The action before the first of each, -1 where there is none `[texts]`.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    text = np.repeat(np.arange(len(lengths)), lengths)
    nothing = np.zeros(0, np.int64)
    actions = np.concatenate([nothing, *sequences])
    shifted = (np.append(first, own)[:-1] for first, own in zip(previous, sequences, strict=True))
    before = np.concatenate([nothing, *shifted]).astype(np.int64)
    losses = -bigram.table[before, actions]  # NO_ACTION, -1, is the table's last row
    sums = np.bincount(text, weights=losses, minlength=len(lengths))
    return MetricSums(sums.astype(np.float64), lengths.astype(np.float64))


def plans_followed(plans: Sequence[Integers], sequences: Sequence[Integers]) -> MetricSums:
    """How many sentences have the action that was planned for them.

    Sentences beyond the plan, and planned ones that were not written, do not count.
    """
    pairs = _paired(plans, sequences)
    hits = np.array([(plan == actions).sum() for plan, actions in pairs], np.float64)
    return MetricSums(hits, np.array([len(plan) for plan, _ in pairs], np.float64))


def plans_followed_by_chance(
    plans: Sequence[Integers], sequences: Sequence[Integers], prior: Floats
) -> MetricSums:
    """`plans_followed` as expected of sentences whose actions are drawn from a prior `[actions]`."""
    planned = [plan for plan, _ in _paired(plans, sequences)]
    hits = np.array([prior[plan].sum() for plan in planned])
    return MetricSums(hits, np.array([len(plan) for plan in planned], np.float64))


def _paired(plans: Sequence[Integers], sequences: Sequence[Integers]) -> list[tuple[Integers, Integers]]:
    pairs = zip(plans, sequences, strict=True)
    return [(plan[: len(actions)], actions[: len(plan)]) for plan, actions in pairs]


# MAUVE (Pillutla et al. 2021, arXiv 2102.01454)
SCALING = 5.0
"""The constant c, by which divergences are multiplied."""
MIXTURE_WEIGHTS = np.linspace(1e-6, 1 - 1e-6, 25)
"""The weights w; at 0 and 1 a divergence may be infinite."""
VARIANCE_KEPT = 0.9
"""Share of the features' variance that the principal components keep."""
TEXTS_PER_CLUSTER = 10
"""Texts of a sample for each cluster."""
CLUSTERINGS = 5
"""Runs of k-means whose MAUVE is averaged; the authors keep the tightest of five."""
LEAST_TEXTS = 50
"""Fewest texts of a sample: five clusters. In simulations, distributions of MAUVE 0.63 (standard deviation
0.04) by 500 texts get 0.85 (0.09) by 50, and equal ones 0.97 (0.03)."""
FEW_TEXTS = 500
"""With fewer texts of a sample, MAUVE cannot tell variants apart."""


class _Words:
    """ROUGE's words, but in every script: lower-case runs of letters and digits, not stemmed."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower().replace("_", " "))


_SCORER = RougeScorer(["rouge2"], tokenizer=_Words())


def rouge2(true: str, generated: str) -> float:
    """ROUGE-2 (Lin 2004): F-measure of the bigrams of words that two texts share; 0 without any.

    On ASCII text it equals the library's own, whose words have only the letters a to z.
    """
    return float(_SCORER.score(true, generated)["rouge2"].fmeasure)


@dataclass(frozen=True)
class Clustered:
    """Two samples of texts, clustered together several times.

    Attributes:
        first: Cluster of each text of one sample `[clusterings, texts]`.
        second: The same of the other.
        clusters: Number of clusters.
    """

    first: Integers
    second: Integers
    clusters: int

    @property
    def mauve(self) -> float:
        """MAUVE of the two samples, averaged over clusterings."""
        weights = (np.ones((1, sample.shape[1])) for sample in (self.first, self.second))
        return float(self.weighted_mauve(*weights)[0])

    def weighted_mauve(self, first: Floats, second: Floats) -> Floats:
        """MAUVE `[resamples]` with every text counted as often as its weight `[resamples, texts]`."""
        each = [
            mauve_of_histograms(first @ np.eye(self.clusters)[a], second @ np.eye(self.clusters)[b])
            for a, b in zip(self.first, self.second, strict=True)
        ]
        return np.mean(each, axis=0)


def cluster_texts(first: Floats, second: Floats, seed: int) -> Clustered:
    """Clusters two samples of texts by their features.

    Args:
        first: Features of one sample `[texts, features]`.
        second: Features of the other, of any number of texts.
        seed: Seed of k-means.

    Raises:
        ProbekitError: A sample is too small.
    """
    least = min(len(first), len(second))
    if least < LEAST_TEXTS:
        raise ProbekitError(f"MAUVE needs {LEAST_TEXTS} texts on either side, and there are {least}")
    together = np.concatenate([first, second]).astype(np.float64)
    norms = np.linalg.norm(together, axis=1, keepdims=True)
    clusters = round(least / TEXTS_PER_CLUSTER)
    seeds = np.random.default_rng(seed).integers(2**31, size=CLUSTERINGS)
    # Several threads add partial sums in no fixed order; one gives the same bits every time.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct texts than clusters
        reduced = principal_components(together / np.where(norms > 0, norms, 1.0))
        found = [KMeans(clusters, max_iter=500, random_state=int(s)).fit_predict(reduced) for s in seeds]
    labels = np.stack(found).astype(np.int64)
    return Clustered(labels[:, : len(first)], labels[:, len(first) :], clusters)


def principal_components(features: Floats) -> Floats:
    """The fewest principal components with `VARIANCE_KEPT` of the variance `[texts, components]`."""
    centred = features - features.mean(axis=0)
    _, scale, directions = np.linalg.svd(centred, full_matrices=False)
    held = np.cumsum(scale**2)
    kept = int(np.searchsorted(held, VARIANCE_KEPT * held[-1])) + 1
    return centred @ directions[:kept].T


def mauve_of_histograms(first: ArrayLike, second: ArrayLike) -> Floats:
    """Area under the divergence curve of two histograms `[..., clusters]`, each of any positive sum."""
    p, q = (np.asarray(h, np.float64) / np.sum(h, axis=-1, keepdims=True) for h in (first, second))
    x, y = [np.ones(p.shape[:-1])], [np.zeros(p.shape[:-1])]
    for weight in MIXTURE_WEIGHTS:
        mixture = weight * p + (1 - weight) * q
        x.append(np.exp(-SCALING * rel_entr(q, mixture).sum(axis=-1)))
        y.append(np.exp(-SCALING * rel_entr(p, mixture).sum(axis=-1)))
    x.append(np.zeros(p.shape[:-1]))
    y.append(np.ones(p.shape[:-1]))
    # The curve from (1, 0) to (0, 1) forms a polygon with the origin: the shoelace formula.
    x_points, y_points = np.stack(x), np.stack(y)
    return 0.5 * (x_points[:-1] * y_points[1:] - x_points[1:] * y_points[:-1]).sum(axis=0)


def mauve_interval(
    clustered: Sequence[Clustered],
    groups: tuple[Integers, Integers] | None = None,
    *,
    resamples: int,
    seed: int,
) -> Interval:
    """The mean MAUVE of several samples against the same true texts, and its 95 % interval.

    Texts of both sides are resampled, each keeping its cluster. Resampling lowers MAUVE as drawing the sample
    did, so that the resamples' quantiles lie too low; only their spread is used: the interval is the value
    give or take Student's t times their standard deviation, within 0 and 1. In simulations it covers the mean
    MAUVE of samples of this size in 88 to 100 % of cases, in 75 to 83 % where MAUVE is below 0.1.

    Args:
        clustered: Generated texts (first), clustered with the true ones (second), for every seed.
        groups: Number of the group of each generated and each true text, which are drawn together; None: each
            text on its own.
        resamples: Number of resamples.
        seed: Seed of the draws.
    """
    sizes = clustered[0].first.shape[1], clustered[0].second.shape[1]
    numbers = [pd.factorize(own)[0] for own in groups or map(np.arange, sizes)]

    def drawn_texts(side: int, seeds: list[int]) -> Floats:
        weights = resample_weights(int(numbers[side].max()) + 1, resamples, seeds)
        return np.concatenate(list(weights)).take(numbers[side], 1)

    # The true texts drawn are the same for all samples.
    true = drawn_texts(1, [seed, 0])
    drawn = [one.weighted_mauve(drawn_texts(0, [seed, 1 + n]), true) for n, one in enumerate(clustered)]
    value = float(np.mean([one.mauve for one in clustered]))
    documents = int(min(own.max() for own in numbers)) + 1
    half = -stdtrit(documents - 1, 0.025) * float(np.std(np.mean(drawn, axis=0), ddof=1))
    return Interval(value, max(value - half, 0.0), min(value + half, 1.0), documents)


LOCATION = "ln_final.hook_out"
FEATURES = "last hidden state of the run's base LM (after the last normalisation), mean over tokens"
"""What MAUVE compares texts by, as it is recorded."""


def text_features(run: Run, texts: Sequence[np.ndarray], window: int, task: Task) -> np.ndarray:
    """Features of texts `[texts, width]`: the mean of the base LM's last hidden states over a text's tokens.

    A text is read in windows that do not overlap, with the separator where the LM reads it. Of a text without
    tokens, the separator is read.

    Args:
        run: Its base LM reads.
        texts: Tokens of each text, without the separator.
        window: Tokens that the LM reads at once.
        task: Advanced by each text.
    """
    backend, size = run.backend_for((LOCATION,)), run.config.evaluation.batch_size
    separator, bos = torch.tensor([run.corpus.separator]), run.corpus.bos_rule
    sums, counts = np.zeros((len(texts), run.locations[LOCATION])), np.zeros(len(texts))
    for start in range(0, len(texts), size):
        part = texts[start : start + size]
        rows: list[int] = []
        windows: list[Tensor] = []
        for row, ids in enumerate(part, start):
            own = torch.tensor(ids.tolist(), dtype=torch.long)
            if bos == "every-window":
                windows += [torch.cat([separator, part]) for part in own.split(window - 1)]
            else:
                windows += (own if bos == "none" and len(own) else torch.cat([separator, own])).split(window)
            rows += [row] * (len(windows) - len(rows))
        # Padded at the end, which a causal LM's earlier states do not see.
        tokens = pad_sequence(windows, batch_first=True, padding_value=run.corpus.separator)
        there = torch.arange(tokens.shape[1]) < torch.tensor([[len(ids)] for ids in windows])
        seen: list[Tensor] = []
        with torch.no_grad(), run.autocast():
            backend(tokens.to(run.device), [(LOCATION, seen.append)], 1)
        np.add.at(counts, rows, there.sum(dim=1).numpy())
        np.add.at(sums, rows, (seen[0].float().cpu() * there[..., None]).sum(dim=1).double().numpy())
        task.advance(len(part))
    return sums / counts[:, None]
