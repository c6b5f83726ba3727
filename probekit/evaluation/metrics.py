"""Metrics that are no ratios of sums, such as AUROC, with intervals from resampling documents or groups.

They are computed anew from weighted examples in every resample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from probekit.statistics import Floats, Intervals, Resampling, percentile_bounds, resample_weights

CHUNK_WEIGHTS = 1 << 15
"""Weights of examples held at once, counted over resamples: they should stay in the cache."""

CELL_WEIGHTS = 1 << 22
"""Examples whose order is held at once, counted over cells."""

CALIBRATION_BINS = 10
"""Bins of equal width into which the calibration error sorts probabilities."""

Statistic = Callable[[Floats], Floats]
"""From the weights of examples `[resamples, examples]` to metrics `[resamples, metrics]`."""


def two_class_metrics(
    scores: ArrayLike, positive: ArrayLike, document: ArrayLike, rate: float, **resampling: Unpack[Resampling]
) -> dict[str, Intervals]:
    """Metrics of two classes, for each cell, by percentile bootstrap over documents.

    Args:
        scores: Log-odds of the positive class in nats, [examples, cells].
        positive: Whether each example has that class, [examples].
        document: Number of each example's document (or group) from 0, [examples].
        rate: The false-positive rate of `recall`.
        **resampling: See `Resampling`; there is no transform.

    Returns:
        `auroc`; `average_precision`, the mean of the precision over positive examples; `recall`, the largest
        share of positive examples found with a false-positive rate of at most `rate`; `calibration_error`,
        the mean gap between probability and frequency in `CALIBRATION_BINS` bins of the positive class's
        probability (Naeini, Cooper and Hauskrecht 2015), corrected for the gaps that chance alone leaves, by
        the bootstrap. Equal scores are one threshold, as in scikit-learn.
    """
    found, truth, number = np.asarray(scores), np.asarray(positive, bool), np.asarray(document)
    both = min(len(np.unique(number[truth])), len(np.unique(number[~truth])))

    def make(cell: int) -> Statistic:
        return _two_class_statistic(found[:, cell], truth, rate)

    documents = [both, both, both, len(np.unique(number))]
    ends, means, counts = _of_examples(make, found.shape[1], number, documents, **resampling)
    # By chance alone gaps are above zero, in resamples once more: their squares are corrected for this bias.
    bias = means[:, 3] - ends[0][:, 3]
    for end, times in zip(ends, (1, 2, 2), strict=True):
        end[:, 3] = np.sqrt(np.maximum(end[:, 3] - times * bias, 0.0))
    names = "auroc", "average_precision", "recall", "calibration_error"
    return {name: _metric(ends, counts, metric) for metric, name in enumerate(names)}


def rank_correlations(
    predicted: ArrayLike, truth: ArrayLike, document: ArrayLike, **resampling: Unpack[Resampling]
) -> Intervals:
    """Spearman's rank correlation for each cell, by percentile bootstrap over documents.

    Args:
        predicted: Predicted numbers, [examples, cells].
        truth: True numbers, [examples].
        document: Number of each example's document (or group) from 0, [examples].
        **resampling: See `Resampling`; there is no transform.

    Returns:
        NaN where a cell predicts one number for all.
    """
    found, true, number = np.asarray(predicted), np.asarray(truth), np.asarray(document)
    true_order = np.argsort(true, kind="stable")
    true_ranks, place = _ranks(true, true_order), np.argsort(true_order)

    def prepare(weights: Floats) -> tuple[Floats, Floats, Floats]:
        ranks = true_ranks(weights.take(true_order, 1)).take(place, 1)
        weighted = weights * ranks
        return weights, weighted, np.einsum("ij,ij->i", weighted, ranks)

    def make(cell: int) -> Callable[[tuple[Floats, Floats, Floats]], Floats]:
        order = np.argsort(found[:, cell], kind="stable")
        own_ranks = _ranks(found[:, cell], order)

        def statistic(prepared: tuple[Floats, Floats, Floats]) -> Floats:
            weights, other = prepared[0].take(order, 1), prepared[1].take(order, 1)
            ranks = own_ranks(weights)
            product = np.einsum("ij,ij->i", other, ranks)
            own = np.einsum("ij,ij,ij->i", weights, ranks, ranks)
            with np.errstate(invalid="ignore", divide="ignore"):
                return (product / np.sqrt(own * prepared[2]))[:, None]

        return statistic

    ends, _, counts = _of_examples(
        make, found.shape[1], number, [len(np.unique(number))], prepare, **resampling
    )
    return _metric(ends, counts, 0)


def balanced_accuracies(
    correct: ArrayLike,
    counts: ArrayLike,
    label: ArrayLike,
    document: ArrayLike,
    **resampling: Unpack[Resampling],
) -> Intervals:
    """The mean over classes of the accuracy on each, for each cell, by percentile bootstrap over documents.

    Args:
        correct: Correct predictions among the examples of a document that have one class, [rows, cells].
        counts: Number of those examples, [rows].
        label: The class, [rows].
        document: The document's number from 0, [rows].
        **resampling: See `Resampling`; there is no transform.
    """
    hits, number = np.asarray(correct, np.float64), np.asarray(document)
    _, which = np.unique(np.asarray(label), return_inverse=True)
    order = np.argsort(which, kind="stable")
    starts = np.flatnonzero(np.diff(which[order], prepend=-1))
    sizes = np.asarray(counts, np.float64)[order]

    def statistic(weights: Floats) -> Floats:
        totals = np.add.reduceat(weights.take(order, 1) * sizes, starts, axis=1)
        shares = np.divide(1.0, totals, out=np.zeros_like(totals), where=totals > 0)
        return (weights * shares.take(which, 1)) @ hits / (totals > 0).sum(1)[:, None]

    documents = [len(np.unique(number))] * hits.shape[1]
    ends, _, present = _of_examples(lambda _: statistic, 1, number, documents, **resampling)
    return Intervals(ends[0][0], ends[1][0], ends[2][0], present[0])


def _metric(ends: Sequence[Floats], documents: NDArray[np.int64], metric: int) -> Intervals:
    """The intervals of one metric of `_of_examples`."""
    value, low, high = (end[:, metric] for end in ends)
    return Intervals(value, low, high, documents[:, metric])


def _two_class_statistic(scores: NDArray, positive: NDArray[np.bool_], rate: float) -> Statistic:
    """The metrics of `two_class_metrics` of one cell."""
    order = np.argsort(-scores, kind="stable")
    falling, hit = -scores[order], positive[order]
    where = np.flatnonzero(hit)
    # For each positive example: how many examples, and how many positive ones, have a higher score than it,
    # and how many have at least its score.
    above, least = (np.searchsorted(falling, falling[where], side) for side in ("left", "right"))
    above_hit, least_hit = np.searchsorted(where, above), np.searchsorted(where, least)
    p = expit(scores[order].astype(np.float64))
    bins = np.minimum((p * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    starts, off = np.flatnonzero(np.diff(bins, prepend=-1)), p - hit

    def statistic(weights: Floats) -> Floats:
        weights = weights.take(order, 1)
        own, every = weights.take(where, 1), _summed_up(weights)
        hits, total = _summed_up(own), every[:, -1]
        with np.errstate(invalid="ignore", divide="ignore"):  # NaN without examples of both classes
            positives, negatives = 1 / hits[:, -1], total - hits[:, -1]
            found, found_hits = every.take(least, 1), hits.take(least_hit, 1)
            false = found - found_hits
            lower = false + every.take(above, 1) - hits.take(above_hit, 1)
            auroc = 1 - 0.5 * np.einsum("ij,ij->i", own, lower) / (hits[:, -1] * negatives)
            precision = np.einsum("ij,ij->i", own, found_hits / np.maximum(found, 1)) * positives
            few = false <= (1 + 1e-12) * rate * negatives[:, None]
            recall = np.where(negatives > 0, np.einsum("ij,ij->i", own, few) * positives, np.nan)
        gaps = np.abs(np.add.reduceat(weights * off, starts, axis=1)).sum(1) / total
        return np.stack([auroc, precision, recall, gaps**2], 1)

    return statistic


def _ranks(values: NDArray, order: NDArray[np.int64]) -> Statistic:
    """From weights in the order of values to their mean ranks, less the mean of all."""
    below, up_to = (np.searchsorted(values[order], values[order], side) for side in ("left", "right"))
    tied = len(order) > 0 and bool((up_to - below > 1).any())

    def ranks(weights: Floats) -> Floats:
        every = _summed_up(weights)
        both = every.take(below, 1) + every.take(up_to, 1) if tied else every[:, :-1] + every[:, 1:]
        return 0.5 * (both - every[:, -1:])

    return ranks


def _summed_up(weights: Floats) -> Floats:
    """Sums of the first 0, 1, ... columns."""
    sums = np.zeros((len(weights), weights.shape[1] + 1))
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


def _of_examples(
    make: Callable[[int], Callable[[Any], Floats]],
    cells: int,
    document: NDArray[np.int64],
    documents: Sequence[int],
    prepare: Callable[[Floats], Any] = lambda weights: weights,
    **resampling: Unpack[Resampling],
) -> tuple[list[Floats], Floats, NDArray[np.int64]]:
    """Metrics of weighted examples in all resamples.

    Args:
        make: Makes the statistic of a cell, from what is prepared to metrics `[resamples, metrics]`.
        cells: Number of cells.
        document: Number of each example's document from 0 `[examples]`.
        documents: Number of documents that count, by metric.
        prepare: What all cells share, from weights of examples `[resamples, examples]`.
        **resampling: See `Resampling`.

    Returns:
        Value, low and high `[cells, metrics]`, means over resamples, and the documents.
    """
    value, low, high, mean = np.empty((4, cells, len(documents)))
    at_once = max(1, CELL_WEIGHTS // len(document))
    rows = max(1, CHUNK_WEIGHTS // len(document))
    present, drawn = np.array(documents, np.int64), int(document.max()) + 1
    whole = prepare(np.ones((1, len(document))))
    for start in range(0, cells, at_once):
        statistics = [make(cell) for cell in range(start, min(start + at_once, cells))]
        draws: list[list[Floats]] = [[] for _ in statistics]
        for weights in resample_weights(drawn, resampling["resamples"], resampling["seed"]):
            for row in range(0, len(weights), rows):
                of_examples = prepare(weights[row : row + rows].take(document, 1))
                for statistic, found in zip(statistics, draws, strict=True):
                    found.append(statistic(of_examples))
        for cell, (statistic, found) in enumerate(zip(statistics, draws, strict=True), start=start):
            each = np.concatenate(found)
            value[cell], mean[cell] = statistic(whole)[0], each.mean(0)
            low[cell], high[cell] = percentile_bounds(each, present, resampling.get("level", 0.95))
    return [value, low, high], mean, np.broadcast_to(present, value.shape)
