"""Confidence intervals of what random draws do on documents: both are samples.

Every draw, such as a random mask, is tried on the same documents. The mean over draws and documents is off
because other documents could have been there, and because others could have been drawn; a few draws, such
as five, are often the greater part of it. Resampling five draws would be too narrow: no resample is outside
them. The variances are known in closed form instead.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from probekit.errors import ProbekitError
from probekit.evaluation.statistics import Interval


def mean_over_draws(sums: ArrayLike, counts: ArrayLike, level: float = 0.95) -> Interval:
    """The mean over draws of `sum of sums / sum of counts`, and its interval over documents and draws.

    The variance is that of two crossed random effects, each document's share in the ratio linearised (Searle,
    Casella and McCulloch 1992, "Variance Components", chapter 4):

        of the mean over draws between documents + of the ratios between draws - of what is left of both,

    the last of which is in each of the first two; draws that differ by no more than chance add nothing. The
    interval is one of Student's t, with the degrees of freedom of Welch and Satterthwaite.

    Args:
        sums: A metric summed over each document's examples, [draws, documents].
        counts: Number of those examples, [documents].
        level: Probability that the interval is meant to cover.

    Returns:
        The bounds are NaN below two draws or two documents with examples.
    """
    sums, numbers = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    if sums.ndim != 2 or numbers.shape != sums.shape[1:] or not len(sums):
        raise ProbekitError(
            f"sums {sums.shape} must be [draws, documents] with at least one draw, and counts "
            f"{numbers.shape} [documents]"
        )
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
    left = spread * ((shares - mean) ** 2).sum() / (draws * (draws - 1))
    variance = of_documents + max(of_draws - left, 0.0)
    if not variance:
        return Interval(value, value, value, documents)
    freedom = variance**2 / (of_documents**2 / (documents - 1) + of_draws**2 / (draws - 1))
    half = float(stdtrit(freedom, 0.5 + level / 2) * np.sqrt(variance))
    return Interval(value, value - half, value + half, documents)
