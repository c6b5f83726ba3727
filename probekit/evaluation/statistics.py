"""Confidence intervals from resampling documents.

Every metric here is a ratio of sums over documents, such as the losses of a document's tokens over their
number. Documents are independent, sentences of one document are not: a resample draws as many documents as
there are, with replacement. Only sums change with it, so a resample is a row of weights, and a whole grid of
metrics (*cells*) costs one matrix product, [resamples, documents] x [documents, cells].

A difference that is linear in the sums, such as the bits a probe gains over the prior, is itself a ratio.
`paired_differences` is for what is not linear, such as a difference of perplexities.

The plain bootstrap is too narrow for few documents: its spread is that of the documents at hand about their
own mean, and its tails are those of the normal distribution. Intervals here are widened as a t interval is
(Hesterberg 2015, "What Teachers Should Know About the Bootstrap": the expanded percentile interval); from
a few hundred documents on it makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NotRequired, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtrit

from probekit.errors import ProbekitError

Floats = NDArray[np.float64]

CHUNK_DRAWS = 1 << 19
"""Documents drawn at once, counted over resamples, and resampled cells held at once: bounds the memory and
leaves the draws as they are."""

LEAST_ERROR = 0.3
"""The standard error of a resample is taken to be at least this share of that of all documents."""


@dataclass(frozen=True)
class Interval:
    """A metric and its confidence interval, which is NaN below two documents with examples."""

    value: float
    low: float
    high: float
    documents: int

    def to_dict(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Intervals:
    """The same for many cells: arrays [cells]."""

    value: Floats
    low: Floats
    high: Floats
    documents: NDArray[np.int64]

    def __getitem__(self, cell: int) -> Interval:
        value, low, high = (float(part[cell]) for part in (self.value, self.low, self.high))
        return Interval(value, low, high, int(self.documents[cell]))


class Resampling(TypedDict):
    """How to resample: the keyword arguments of every function here."""

    resamples: int
    """Number of resamples."""
    seed: int
    """Seed of the draws; equal seeds draw equal documents, whatever the cells."""
    transform: NotRequired[Callable[[Floats], Floats] | None]
    """Applied to each ratio, elementwise, such as `np.exp` for perplexity; none by default."""
    level: NotRequired[float]
    """Probability that the interval is meant to cover, 0.95 by default."""


def bootstrap_ratios(sums: ArrayLike, counts: ArrayLike, **resampling: Unpack[Resampling]) -> Intervals:
    """Percentile bootstrap over documents of `transform(sum of sums / sum of counts)`, for each cell.

    Args:
        sums: A metric summed over each document's examples, [documents, cells].
        counts: Number of those examples, [documents, cells], or [documents] where the cells share them; a
            document without any contributes nothing.
        **resampling: See `Resampling`.
    """
    return _intervals(np.asarray(sums)[None], counts, **resampling)


def simultaneous_ratios(
    sums: ArrayLike, counts: ArrayLike, *, resamples: int, seed: int, level: float = 0.95
) -> Intervals:
    """Intervals of `sum of sums / sum of counts` that cover the truth in all cells at once.

    Every interval is its cell's value give or take the same number of standard errors. That number is the
    quantile, over resamples, of the largest deviation of any cell in standard errors of the resample (the
    single-step studentised max-|t| bootstrap: Romano and Wolf 2005, Econometrica 73, 1237-1282): cells that
    vary together, such as the layers of a model, cost little. A cell that does not vary, or has fewer than
    two documents, has no part in it.

    Args:
        sums: As for `bootstrap_ratios`, [documents, cells].
        counts: As for `bootstrap_ratios`, [documents, cells] or [documents].
        resamples: Number of resamples.
        seed: Seed of the draws.
        level: Probability that all intervals are meant to cover together.
    """
    settings, numbers = _checked(np.asarray(sums)[None], counts)
    documents, cells = settings.shape[1:]
    total = np.broadcast_to(np.where(numbers.any(0), numbers.sum(0), np.nan), cells)
    value = settings[0].sum(0) / total
    error, largest = np.empty(cells), np.zeros(resamples)
    for chunk in _cell_chunks(cells, resamples):
        number = numbers if numbers.shape[1] == 1 else numbers[:, chunk]
        residual = np.nan_to_num(settings[0][:, chunk] - value[chunk] * number)
        found = np.sqrt((residual**2).sum(0)) / total[chunk]
        # What is left of a cell that does not vary is rounding.
        error[chunk] = np.where(found > 1e-12 * np.abs(value[chunk]), found, 0.0)
        deviations = (
            _deviations(weights, residual, number, error[chunk])
            for weights in resample_weights(documents, resamples, seed)
        )
        largest = np.maximum(largest, np.concatenate([part.max(1) for part in deviations]))
    present = np.broadcast_to((numbers > 0).sum(0), value.shape)
    half = np.where(present >= 2, np.quantile(largest, level) * error, np.nan)
    return Intervals(value, value - half, value + half, present.astype(np.int64))


def paired_differences(
    first: ArrayLike,
    second: ArrayLike,
    counts: ArrayLike,
    *,
    second_counts: ArrayLike | None = None,
    **resampling: Unpack[Resampling],
) -> Intervals:
    """The same of `transform(ratio of first) - transform(ratio of second)`, both over the same documents.

    Args:
        first: Sums of one setting, [documents, cells].
        second: Sums of the other over the same examples, [documents, cells].
        counts: Number of those examples, [documents, cells] or [documents].
        second_counts: The second's, in the shape of `counts`, where its examples are others.
        **resampling: See `Resampling`.
    """
    numbers = np.asarray(counts) if second_counts is None else np.stack([counts, second_counts])
    if second_counts is not None and numbers.ndim == 2:
        numbers = numbers[..., None]
    return _intervals(np.stack([first, second]), numbers, **resampling)


def bootstrap_ratio(sums: ArrayLike, counts: ArrayLike, **resampling: Unpack[Resampling]) -> Interval:
    """`bootstrap_ratios` of one cell: sums and counts are [documents]."""
    return bootstrap_ratios(np.asarray(sums)[:, None], counts, **resampling)[0]


def paired_difference(
    first: ArrayLike, second: ArrayLike, counts: ArrayLike, **resampling: Unpack[Resampling]
) -> Interval:
    """`paired_differences` of one cell: sums and counts are [documents]."""
    cells = np.asarray(first)[:, None], np.asarray(second)[:, None]
    return paired_differences(*cells, counts, **resampling)[0]


def _intervals(
    sums: NDArray,
    counts: ArrayLike,
    resamples: int,
    seed: int,
    transform: Callable[[Floats], Floats] | None = None,
    level: float = 0.95,
) -> Intervals:
    """Intervals of one setting's ratio, or of the difference of two; sums: [settings, documents, cells]."""
    sums, counts = _checked(sums, counts)
    documents, cells = sums.shape[1:]

    def statistic(weights: Floats, chunk: slice) -> Floats:
        numbers = weights @ (counts if counts.shape[-1] == 1 else counts[..., chunk])
        ratios = weights @ sums[..., chunk] / np.where(numbers > 0, numbers, np.nan)
        ratios = ratios if transform is None else transform(ratios)
        return ratios[0] if len(ratios) == 1 else ratios[0] - ratios[1]

    value = statistic(np.ones((1, documents)), slice(None))[0]
    present = np.broadcast_to((counts > 0).sum(-2), sums.shape[::2]).min(0).astype(np.int64)
    tail = _tail(0.5 - level / 2, present)
    bounds = np.empty((2, cells))
    for chunk in _cell_chunks(cells, resamples):
        draws = [statistic(weights, chunk) for weights in resample_weights(documents, resamples, seed)]
        bounds[:, chunk] = _quantiles(np.concatenate(draws), np.stack([tail, 1 - tail])[:, chunk])
    return Intervals(value, bounds[0], bounds[1], present)


def _cell_chunks(cells: int, resamples: int) -> Iterator[slice]:
    """The cells, a few at a time."""
    size = max(1, CHUNK_DRAWS // resamples)
    return (slice(start, start + size) for start in range(0, cells, size))


def _deviations(weights: Floats, residuals: Floats, counts: Floats, errors: Floats) -> Floats:
    """How many of its own standard errors each resample's ratio is off, [resamples, cells].

    Args:
        weights: How often each resample draws each document, [resamples, documents].
        residuals: Sums less the ratio of all documents times counts, [documents, cells].
        counts: [documents, cells or 1].
        errors: Standard errors of the ratios of all documents, [cells]; at 0 there is no deviation.
    """
    numbers = weights @ counts
    numbers = np.where(numbers > 0, numbers, np.inf)  # without documents there is no deviation
    off = weights @ residuals / numbers
    squares = weights @ residuals**2 - 2 * off * (weights @ (residuals * counts))
    squares += off**2 * (weights @ counts**2)
    own = np.sqrt(np.maximum(squares, 0.0)) / numbers
    # Few documents may be drawn that happen to agree, as those of a rare event do: no error is that small.
    own = np.maximum(own, LEAST_ERROR * errors)
    return np.where(errors > 0, np.abs(off) / np.where(errors > 0, own, 1.0), 0.0)


def _tail(share: float, documents: NDArray[np.int64]) -> Floats:
    """What share of the resamples is to lie beyond a bound that `share` of the truth lies beyond, [cells].

    In standard deviations of the resamples the bound is the quantile of Student's t, with one degree of
    freedom less than documents, times sqrt(n / (n - 1)), as those deviations divide by n. NaN below two.
    """
    n = np.where(documents >= 2, documents, np.nan)
    return ndtr(stdtrit(n - 1, share) * np.sqrt(n / (n - 1)))


def _quantiles(draws: Floats, levels: Floats) -> Floats:
    """Quantiles of draws [resamples, cells], at each cell's own levels [levels, cells]; NaN are left out."""
    ordered = np.sort(draws, axis=0)  # NaN comes last
    last = np.maximum((~np.isnan(draws)).sum(0) - 1, 0)
    place = levels * last
    below = np.where(np.isnan(place), 0.0, place).astype(np.int64)
    low, high = (np.take_along_axis(ordered, at, 0) for at in (below, np.minimum(below + 1, last)))
    return low + (place - below) * (high - low)


def resample_weights(documents: int, resamples: int, seed: int | Sequence[int]) -> Iterator[Floats]:
    """How often each resample draws each document, a chunk of resamples at a time [resamples, documents]."""
    generator = np.random.default_rng(seed)
    size = max(1, CHUNK_DRAWS // documents)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = generator.integers(documents, size=(rows, documents))
        drawn += documents * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * documents)
        yield times.reshape(rows, documents).astype(np.float64)


def _checked(sums: NDArray, counts: ArrayLike) -> tuple[Floats, Floats]:
    """Sums [settings, documents, cells] and counts [documents, cells or 1], or those of every setting."""
    sums, numbers = sums.astype(np.float64), np.asarray(counts, np.float64)
    numbers = numbers[:, None] if numbers.ndim == 1 else numbers
    shapes = {
        (*settings, sums.shape[1], cells)
        for settings in ((), sums.shape[:1])
        for cells in {1, sums.shape[-1]}
    }
    if sums.ndim != 3 or not sums.shape[1] or numbers.shape not in shapes:
        raise ProbekitError(
            f"sums {sums.shape[1:]} must be [documents, cells] with at least one document, and "
            f"counts {numbers.shape} the same or [documents]"
        )
    sums = np.where(numbers > 0, sums, 0.0)
    whole = (np.isfinite(numbers) & (numbers >= 0)).all(-1)
    broken = ~(np.isfinite(sums).all((0, 2)) & (whole if whole.ndim == 1 else whole.all(0)))
    if broken.any():
        raise ProbekitError(
            f"document {broken.argmax()}: sums and counts must be finite, counts not negative"
        )
    return sums, numbers
