"""Confidence intervals from resampling documents.

Every metric here is a ratio of sums over documents, such as the losses of a document's tokens over their
number. Documents are independent, sentences of one document are not: a resample draws as many documents as
there are, with replacement. Only sums change with it, so a resample is a row of weights, and a whole grid of
metrics (*cells*) costs one matrix product, [resamples, documents] x [documents, cells].

A difference that is linear in the sums, such as the bits a probe gains over the prior, is itself a ratio.
`paired_differences` is for what is not linear, such as a difference of perplexities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NotRequired, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probekit.errors import ProbekitError

Floats = NDArray[np.float64]

CHUNK_DRAWS = 1 << 22
"""Documents drawn at once, counted over resamples: bounds the memory and leaves the draws as they are."""


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


def paired_differences(
    first: ArrayLike, second: ArrayLike, counts: ArrayLike, **resampling: Unpack[Resampling]
) -> Intervals:
    """The same of `transform(ratio of first) - transform(ratio of second)`, both over the same documents.

    Args:
        first: Sums of one setting, [documents, cells].
        second: Sums of the other over the same examples, [documents, cells].
        counts: Number of those examples, [documents, cells] or [documents].
        **resampling: See `Resampling`.
    """
    return _intervals(np.stack([first, second]), counts, **resampling)


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
    documents = sums.shape[1]

    def statistic(weights: Floats) -> Floats:
        numbers = weights @ counts
        ratios = weights @ sums / np.where(numbers > 0, numbers, np.nan)
        ratios = ratios if transform is None else transform(ratios)
        return ratios[0] if len(ratios) == 1 else ratios[0] - ratios[1]

    value = statistic(np.ones((1, documents)))[0]
    draws = np.concatenate([statistic(weights) for weights in _weights(documents, resamples, seed)])
    tails = [0.5 - level / 2, 0.5 + level / 2]
    bounds = np.quantile(draws, tails, axis=0)
    present = np.broadcast_to((counts > 0).sum(0), value.shape)
    # Resamples that drew no document of a cell are left out; nanquantile is slow, so only where some did.
    for cell in np.flatnonzero(np.isnan(bounds[0]) & (present >= 2)):
        bounds[:, cell] = np.nanquantile(draws[:, cell], tails)
    bounds[:, present < 2] = np.nan
    return Intervals(value, bounds[0], bounds[1], present.astype(np.int64))


def _weights(documents: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each resample draws each document, [resamples of a chunk, documents]."""
    generator = np.random.default_rng(seed)
    size = max(1, CHUNK_DRAWS // documents)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = generator.integers(documents, size=(rows, documents))
        drawn += documents * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * documents)
        yield times.reshape(rows, documents).astype(np.float64)


def _checked(sums: NDArray, counts: ArrayLike) -> tuple[Floats, Floats]:
    """Sums [settings, documents, cells] and counts [documents, cells or 1]."""
    sums, numbers = sums.astype(np.float64), np.asarray(counts, np.float64)
    numbers = numbers[:, None] if numbers.ndim == 1 else numbers
    if sums.ndim != 3 or not sums.shape[1] or numbers.shape not in (sums.shape[1:], (sums.shape[1], 1)):
        raise ProbekitError(
            f"sums {sums.shape[1:]} must be [documents, cells] with at least one document, and "
            f"counts {numbers.shape} the same or [documents]"
        )
    sums = np.where(numbers > 0, sums, 0.0)
    broken = ~(np.isfinite(sums).all((0, 2)) & (np.isfinite(numbers) & (numbers >= 0)).all(1))
    if broken.any():
        raise ProbekitError(
            f"document {broken.argmax()}: sums and counts must be finite, counts not negative"
        )
    return sums, numbers
