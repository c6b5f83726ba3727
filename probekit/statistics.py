"""Confidence intervals from resampling documents, of ratios of sums, such as perplexity.

Metrics are held as a sum and a count for each document. Beside single intervals there are paired differences,
intervals that hold for many cells at once, and means over seeds and over random draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NotRequired, TypedDict, Unpack

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtrit

from probekit.errors import ProbekitError

Floats = NDArray[np.float64]

CHUNK_DRAWS = 1 << 19
"""Documents drawn at once, counted over resamples, and resampled cells held at once: bounds the memory and
leaves the draws as they are."""

BLOCKS = 20
"""Most blocks of documents that a jackknife leaves out in turn."""

LEAST_ERROR = 0.3
"""The standard error of a resample is taken to be at least this share of that of all documents."""


class Interval(NamedTuple):
    """A metric and its confidence interval, which is NaN below two documents with examples."""

    value: float
    low: float
    high: float
    documents: int

    def columns(self, name: str = "value") -> dict[str, Any]:
        """The metric and its bounds by columns of a table."""
        bounds = {f"{name}_low": self.low, f"{name}_high": self.high}
        return {name: self.value, **bounds, "documents": self.documents}


@dataclass(frozen=True)
class Intervals:
    """The intervals of many cells: arrays `[cells]`."""

    value: Floats
    low: Floats
    high: Floats
    documents: NDArray[np.int64]

    def __getitem__(self, cell: int) -> Interval:
        value, low, high = (float(part[cell]) for part in (self.value, self.low, self.high))
        return Interval(value, low, high, int(self.documents[cell]))


class Resampling(TypedDict):
    """How to resample: the keyword arguments of the functions below."""

    resamples: int
    """Number of resamples."""
    seed: int
    """Seed of the draws; equal seeds draw equal documents, whatever the cells."""
    transform: NotRequired[Callable[[Floats], Floats] | None]
    """Applied to each ratio, elementwise, such as `np.exp` for perplexity; none by default."""
    level: NotRequired[float]
    """Probability that the interval is meant to cover, 0.95 by default."""


def bootstrap_ratios(
    sums: ArrayLike, counts: ArrayLike, *, examples: ArrayLike | None = None, **resampling: Unpack[Resampling]
) -> Intervals:
    """Percentile bootstrap over documents of `transform(sum of sums / sum of counts)`, for each cell.

    Args:
        sums: A metric summed over each document's examples, [documents, cells].
        counts: Number of those examples, [documents, cells], or [documents] where the cells share them; a
            document without any contributes nothing.
        examples: Number of examples, [documents], where `counts` are denominators of another kind, which may
            be 0 for a document with examples; None: `counts`.
        **resampling: See `Resampling`.
    """
    return _intervals(np.asarray(sums)[None], counts, examples, **resampling)


def sum_groups(group: ArrayLike, values: ArrayLike) -> NDArray:
    """Sums of documents `[documents, ...]` over those of each group, which are what is resampled.

    Groups are in the order in which they appear; where each is one document, nothing changes.

    Args:
        group: Number of each document's group `[documents]`.
        values: Sums or counts of the documents.
    """
    number, found = pd.factorize(np.asarray(group))
    summed = np.zeros((len(found), *np.shape(values)[1:]), np.asarray(values).dtype)
    np.add.at(summed, number, np.asarray(values))
    return summed


def simultaneous_ratios(
    sums: ArrayLike,
    counts: ArrayLike,
    *,
    resamples: int,
    seed: int,
    level: float = 0.95,
    examples: ArrayLike | None = None,
) -> Intervals:
    """Intervals of `sum of sums / sum of counts` that cover the truth in all cells at once.

    Every interval is its cell's value give or take the same number of standard errors. That number is the
    quantile, over resamples, of the largest deviation of any cell in standard errors of the resample (the
    single-step studentised max-|t| bootstrap: Romano and Wolf 2005, Econometrica 73, 1237-1282), so that
    correlated cells, such as the layers of a model, widen the intervals little. A cell that does not vary, or
    has fewer than two documents, does not widen the others.

    Args:
        sums: As for `bootstrap_ratios`, [documents, cells].
        counts: As for `bootstrap_ratios`, [documents, cells] or [documents].
        resamples: Number of resamples.
        seed: Seed of the draws.
        level: Probability that all intervals are meant to cover together.
        examples: As for `bootstrap_ratios`.
    """
    (values,), numbers, there = _checked(np.asarray(sums)[None], counts, examples)
    documents, cells = values.shape
    total = np.broadcast_to(np.where(numbers.any(0), numbers.sum(0), np.nan), cells)
    value = values.sum(0) / total
    error, largest = np.empty(cells), np.zeros(resamples)
    for chunk in _cell_chunks(cells, resamples):
        number = numbers if numbers.shape[1] == 1 else numbers[:, chunk]
        residual = np.nan_to_num(values[:, chunk] - value[chunk] * number)
        found = np.sqrt((residual**2).sum(0)) / total[chunk]
        # The residuals of a cell that does not vary are rounding errors.
        error[chunk] = np.where(found > 1e-12 * np.abs(value[chunk]), found, 0.0)
        deviations = (
            _deviations(weights, residual, number, error[chunk])
            for weights in resample_weights(documents, resamples, seed)
        )
        largest = np.maximum(largest, np.concatenate([part.max(1) for part in deviations]))
    present = np.broadcast_to(there.sum(0), value.shape)
    half = np.where(present >= 2, np.quantile(largest, level) * error, np.nan)
    return Intervals(value, value - half, value + half, present.astype(np.int64))


def paired_differences(
    first: ArrayLike,
    second: ArrayLike,
    counts: ArrayLike,
    *,
    second_counts: ArrayLike | None = None,
    examples: ArrayLike | None = None,
    **resampling: Unpack[Resampling],
) -> Intervals:
    """Percentile bootstrap of `transform(ratio of first) - transform(ratio of second)` over documents.

    Args:
        first: Sums of one setting, [documents, cells].
        second: Sums of the other over the same examples, [documents, cells].
        counts: Number of those examples, [documents, cells] or [documents].
        second_counts: Number of the second's examples, shaped as `counts`, if they differ.
        examples: As for `bootstrap_ratios`.
        **resampling: See `Resampling`.
    """
    numbers = np.asarray(counts) if second_counts is None else np.stack([counts, second_counts])
    if second_counts is not None and numbers.ndim == 2:
        numbers = numbers[..., None]
    return _intervals(np.stack([first, second]), numbers, examples, **resampling)


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
    examples: ArrayLike | None,
    resamples: int,
    seed: int,
    transform: Callable[[Floats], Floats] | None = None,
    level: float = 0.95,
) -> Intervals:
    """Intervals of one setting's ratio, or of the difference of two; sums `[settings, documents, cells]`."""
    sums, counts, there = _checked(sums, counts, examples)
    documents = sums.shape[1]

    def statistic(weights: Floats, chunk: slice) -> Floats:
        numbers = weights @ (counts if counts.shape[-1] == 1 else counts[..., chunk])
        ratios = weights @ sums[..., chunk] / np.where(numbers > 0, numbers, np.nan)
        ratios = ratios if transform is None else transform(ratios)
        return ratios[0] if len(ratios) == 1 else ratios[0] - ratios[1]

    value = statistic(np.ones((1, documents)), slice(None))[0]
    present = np.broadcast_to(there.sum(-2), sums.shape[::2]).min(0).astype(np.int64)
    bounds = np.empty((2, len(value)))
    for chunk in _cell_chunks(len(value), resamples):
        draws = [statistic(weights, chunk) for weights in resample_weights(documents, resamples, seed)]
        bounds[:, chunk] = percentile_bounds(np.concatenate(draws), present[chunk], level)
    return Intervals(value, bounds[0], bounds[1], present)


def _cell_chunks(cells: int, resamples: int) -> Iterator[slice]:
    size = max(1, CHUNK_DRAWS // resamples)
    return (slice(start, start + size) for start in range(0, cells, size))


def _deviations(weights: Floats, residuals: Floats, counts: Floats, errors: Floats) -> Floats:
    """Each resample's deviation from the ratio of all documents, in its own standard errors.

    Args:
        weights: How often each resample draws each document `[resamples, documents]`.
        residuals: Sums less the ratio of all documents times counts `[documents, cells]`.
        counts: `[documents, cells or 1]`.
        errors: Standard errors of the ratios of all documents `[cells]`; at 0 there is no deviation.

    Returns:
        `[resamples, cells]`.
    """
    numbers = weights @ counts
    numbers = np.where(numbers > 0, numbers, np.inf)  # without documents there is no deviation
    off = weights @ residuals / numbers
    squares = weights @ residuals**2 - 2 * off * (weights @ (residuals * counts))
    squares += off**2 * (weights @ counts**2)
    own = np.sqrt(np.maximum(squares, 0.0)) / numbers
    # The few documents drawn may happen to agree, as those of a rare event do, with hardly any error.
    own = np.maximum(own, LEAST_ERROR * errors)
    return np.where(errors > 0, np.abs(off) / np.where(errors > 0, own, 1.0), 0.0)


def _tail(share: float, documents: NDArray[np.int64]) -> Floats:
    """Level of the resamples' quantile that bounds an interval `[cells]`; NaN below two documents.

    The expanded percentile interval: in standard deviations of the resamples, the bound lies at the `share`
    quantile of Student's t with n - 1 degrees of freedom, times sqrt(n / (n - 1)) for n documents, because
    those deviations divide by n.
    """
    n = np.where(documents >= 2, documents, np.nan)
    return ndtr(stdtrit(n - 1, share) * np.sqrt(n / (n - 1)))


def percentile_bounds(draws: Floats, documents: NDArray[np.int64], level: float) -> Floats:
    """Both ends of intervals `[2, cells]`, from draws `[resamples, cells]`."""
    tail = _tail(0.5 - level / 2, documents)
    return _quantiles(draws, np.stack([tail, 1 - tail]))


def _quantiles(draws: Floats, levels: Floats) -> Floats:
    """Quantiles of draws `[resamples, cells]` at each cell's own levels `[levels, cells]`, without NaN."""
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


def _checked(
    sums: NDArray, counts: ArrayLike, examples: ArrayLike | None
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Sums [settings, documents, cells], 0 without examples; counts, and where there are examples."""
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
    there = numbers > 0 if examples is None else np.asarray(examples)[:, None] > 0
    sums = np.where(there, sums, 0.0)
    whole = (np.isfinite(numbers) & (numbers >= 0)).all(-1)
    broken = ~(np.isfinite(sums).all((0, 2)) & (whole if whole.ndim == 1 else whole.all(0)))
    if broken.any():
        raise ProbekitError(
            f"document {broken.argmax()}: sums and counts must be finite, counts not negative"
        )
    return sums, numbers, there


def jackknife_blocks(group: ArrayLike) -> list[NDArray[np.int64]]:
    """The rows of each of at most `BLOCKS` blocks of whole groups, of about as many rows each.

    Args:
        group: The document or group of each row `[rows]`.
    """
    number, found = pd.factorize(np.asarray(group))
    size = np.bincount(number)
    middle = np.cumsum(size) - size / 2
    block = np.floor(middle / size.sum() * min(BLOCKS, len(found))).astype(np.int64)
    return [np.flatnonzero(block[number] == one) for one in np.unique(block)]


def jackknife(
    value: ArrayLike, left_out: ArrayLike, documents: int, *, corrected: bool = False, level: float = 0.95
) -> Intervals:
    """Intervals of Student's t from leaving out a block of documents at a time (Shao and Tu 1995, chapter 2).

    Args:
        value: A statistic of all documents `[cells]`.
        left_out: The same without each block `[blocks, cells]`.
        documents: Number of documents.
        corrected: Subtract the bias, of the order of one over the number of examples (Quenouille 1956).
        level: Probability that an interval is meant to cover.
    """
    value, left_out = np.asarray(value, np.float64), np.asarray(left_out, np.float64)
    blocks, mean = len(left_out), left_out.mean(0)
    error = np.sqrt((blocks - 1) / blocks * ((left_out - mean) ** 2).sum(0))
    half = stdtrit(blocks - 1, 0.5 + level / 2) * error
    centre = blocks * value - (blocks - 1) * mean if corrected else value
    return Intervals(centre, centre - half, centre + half, np.full(value.shape, documents))


def mean_over_draws(sums: ArrayLike, counts: ArrayLike) -> Interval:
    """The mean over draws of `sum of sums / sum of counts`, and its 95 % interval over documents and draws.

    The variance is that of two crossed random effects, each document's share in the ratio linearised (Searle,
    Casella and McCulloch 1992, "Variance Components", chapter 4):

        variance of the mean over draws between documents + that of the ratios between draws - residual,

    as the residual is contained in each of the first two; draws that differ no more than by chance add
    nothing. The interval is one of Student's t, with Welch-Satterthwaite degrees of freedom.

    Args:
        sums: A metric summed over each document's examples, [draws, documents].
        counts: Number of those examples, [documents].

    Returns:
        The bounds are NaN below two draws or two documents with examples.
    """
    sums, numbers = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    sums, draws, total = np.where(numbers > 0, sums, 0.0), len(sums), numbers.sum()
    documents = int((numbers > 0).sum())
    if not documents:
        return Interval(np.nan, np.nan, np.nan, 0)
    ratios = sums.sum(1) / total
    value = float(ratios.mean())
    if draws < 2 or documents < 2:
        return Interval(value, np.nan, np.nan, documents)
    shares = (sums - ratios[:, None] * numbers) / total
    mean = shares.mean(axis=0)
    spread = documents / (documents - 1)
    of_documents = spread * (mean**2).sum()
    of_draws = ratios.var(ddof=1) / draws
    residual = spread * ((shares - mean) ** 2).sum() / (draws * (draws - 1))
    variance = of_documents + max(of_draws - residual, 0.0)
    if not variance:
        return Interval(value, value, value, documents)
    freedom = variance**2 / (of_documents**2 / (documents - 1) + of_draws**2 / (draws - 1))
    half = float(stdtrit(freedom, 0.975) * np.sqrt(variance))
    return Interval(value, value - half, value + half, documents)


def over_seeds(
    values: pd.DataFrame,
    keys: Sequence[str],
    transforms: Mapping[str, Callable[[Floats], Floats]],
    *,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    """Metrics of each seed and of their mean, for runs that differ in their seed.

    The mean over seeds is that of each document's sums and counts. Its interval, from resampling documents,
    covers the choice of documents; the spread covers the choice of seeds.

    Args:
        values: Columns `seed`, `document`, `sum` and `count`, and `keys`, of which `metric` is one.
        keys: Columns that identify a metric.
        transforms: Applied to a metric's ratio, such as `np.exp` to perplexity's, by the metric's name.
        resamples: Number of resamples of documents.
        seed: Seed of their draws, which are the same for all metrics on as many documents.

    Returns:
        One row for each key and seed, and one over all seeds, where `seed` is missing: the keys, `seed`,
        `value` with its 95 % interval (`value_low`, `value_high`), `seed_spread`, the standard deviation of
        the seeds' values (divided by seeds - 1; missing for one seed), `seeds` and `documents`.
    """
    parts = []
    for names, rows in values.groupby([*keys], sort=False, dropna=False):
        key = dict(zip(keys, names, strict=True))
        tables = rows.pivot_table(index="document", columns="seed", values=["sum", "count"], aggfunc="sum")
        sums, counts = (tables[name].fillna(0).to_numpy(float) for name in ("sum", "count"))
        with_mean = (np.column_stack([part, part.mean(1)]) for part in (sums, counts))
        transform = transforms.get(str(key["metric"]))
        found = bootstrap_ratios(*with_mean, resamples=resamples, seed=seed, transform=transform)
        parts.append(seed_rows(key, tables["sum"].columns, found))
    return pd.concat(parts, ignore_index=True)


def seed_rows(key: Mapping[str, object], seeds: Iterable[Any], found: Intervals) -> pd.DataFrame:
    """A row for each seed and one for their mean, of intervals in that order."""
    each = found.value[:-1]
    spread = np.std(each, ddof=1) if len(each) > 1 else np.nan
    return pd.DataFrame(dict(key), index=range(len(each) + 1)).assign(
        seed=pd.array([*seeds, None], dtype="Int64"),
        value=found.value,
        value_low=found.low,
        value_high=found.high,
        seed_spread=[*[np.nan] * len(each), spread],
        seeds=[*[1] * len(each), len(each)],
        documents=found.documents,
    )
