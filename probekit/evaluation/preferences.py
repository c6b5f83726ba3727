"""How often, and by how much, choices are preferred: shares, margins and rank correlations with intervals.

A tie counts as a share, so that who tells nothing apart is right as often as chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from probekit.evaluation.items import ALL_KINDS, Item
from probekit.evaluation.metrics import rank_correlations
from probekit.statistics import (
    Floats,
    Intervals,
    Resampling,
    bootstrap_ratios,
    paired_differences,
    sum_groups,
)

Scoring = Literal["total", "mean"]
SCORINGS: tuple[Scoring, ...] = get_args(Scoring)
"""What choices are compared by: the log-probability of all of a choice's tokens, or its mean over them."""

LM, OVER_PRIOR, PRIOR = "LM", "LM over prior", "prior"
"""What chooses: the score after the context, that less the score without it, or the latter alone."""


@dataclass(frozen=True)
class LogProbabilities:
    """What an LM says of choices, `[items, choices]`.

    Attributes:
        own: Log-probability after the context in nats; minus infinity where an item has fewer choices.
        prior: The same without the context; where an item has none, as `own`.
        tokens: Number of tokens.
    """

    own: Floats
    prior: Floats
    tokens: NDArray[np.int64]

    def scores(self, scoring: Scoring) -> dict[str, Floats]:
        """The scores by reader; where no item has a context, the prior is the score, and is left out."""
        divisor = self.tokens if scoring == "mean" else 1
        own, prior = self.own / divisor, self.prior / divisor
        if np.array_equal(own, prior):
            return {LM: own}
        with np.errstate(invalid="ignore"):  # where there is no choice
            over = np.where(np.isfinite(own), own - prior, -np.inf)
        return {LM: own, OVER_PRIOR: over, PRIOR: prior}


def shares(scores: Floats, wanted: NDArray[np.int64]) -> Floats:
    """Whether the wanted choice of each item has the highest score; of a tie, its share `[items]`."""
    best = scores == scores.max(1, keepdims=True)
    return np.where(best[np.arange(len(scores)), wanted], 1 / best.sum(1), 0.0)


def margins(scores: Floats, wanted: NDArray[np.int64]) -> Floats:
    """The score of the wanted choice of each item less the highest of the others, in nats `[items]`."""
    rows, others = np.arange(len(scores)), scores.copy()
    others[rows, wanted] = -np.inf
    return scores[rows, wanted] - others.max(1)


def preference_table(
    items: Sequence[Item],
    found: Mapping[str | None, LogProbabilities],
    scoring: Scoring,
    **resampling: Unpack[Resampling],
) -> pd.DataFrame:
    """A row for each revision, kind of items and reader; intervals resample groups of items.

    Args:
        items: The items; all of them have an answer, or none.
        found: What each revision says of their choices.
        scoring: What choices are compared by.
        **resampling: See `Resampling`.

    Returns:
        `accuracy`, or where no choice is true `preference`, for the first one; `over_prior` and `over_first`,
        its paired differences to the prior alone and to the first revision; `margin`; `rank_correlation` of
        margins with the scores that items were given. Items without a context have no prior: where that is
        read, they are left out, and a kind of them alone has no row.
    """
    every, behind = (
        _Cells(items, there)
        for there in (np.full(len(items), True), np.array([bool(item.context) for item in items]))
    )
    first: dict[str, Floats] = {}
    rows = []
    for revision, read in found.items():
        scores = read.scores(scoring)
        right = {reader: shares(own, every.wanted) for reader, own in scores.items()}
        first = first or right
        measured = {}
        for reader, own in scores.items():
            cells = every if reader == LM else behind
            columns = cells.measured(own, right[reader], **resampling)
            for name, asked, other in (
                ("over_prior", behind, right.get(PRIOR)),
                ("over_first", cells, first.get(reader)),
            ):
                if other is not None and other is not right[reader]:
                    sums = asked.sums(right[reader]), asked.sums(other)
                    columns[name] = paired_differences(*sums, asked.counts, **resampling)
            measured[reader] = columns, [*cells.facts()]
        for cell in range(every.counts.shape[1]):
            for reader, (columns, facts) in measured.items():
                if not facts[cell]["items"]:
                    continue
                row = {"revision": revision, **facts[cell], "reader": reader, "scoring": scoring}
                for name, intervals in columns.items():
                    row |= intervals[cell].columns(name)
                rows.append(row)
    return pd.DataFrame(rows).drop(columns="documents")


class _Cells:
    """Kinds of items, and all kinds if there are several, as the cells of a table.

    Args:
        items: The items.
        there: Which of them are counted `[items]`.

    Attributes:
        wanted: The answer of each item, or its first choice `[items]`.
        counts: Items of each group and cell `[groups, cells]`.
    """

    def __init__(self, items: Sequence[Item], there: NDArray[np.bool]) -> None:
        number, kinds = pd.factorize(np.array([item.kind or ALL_KINDS for item in items], dtype=object))
        several = len(kinds) > 1
        self._kinds = [*kinds, ALL_KINDS] if several else [*kinds]
        self._member = number[:, None] == np.arange(len(kinds))
        if several:
            self._member = np.column_stack([self._member, np.ones(len(items), dtype=bool)])
        self._member &= there[:, None]
        self._group = pd.factorize(np.array([item.group for item in items], dtype=object))[0]
        self._metric = "preference" if items[0].answer is None else "accuracy"
        self._chance = np.array([1 / len(item.choices) for item in items])
        self._rating = np.array([item.score for item in items])
        self.wanted = np.array([item.answer or 0 for item in items])
        self.counts = self.sums(np.ones(len(items)))

    def sums(self, values: Floats) -> Floats:
        """Values of items, summed over groups and cells `[groups, cells]`."""
        return sum_groups(self._group, values[:, None] * self._member)

    def facts(self) -> Iterator[dict[str, Any]]:
        """What is known of each cell before anything is asked."""
        rated = np.isfinite(self._rating)
        groups = (self.counts > 0).sum(0)
        for kind, own, resampled in zip(self._kinds, self._member.T, groups, strict=True):
            known = {"kind": kind, "items": int(own.sum()), "groups": int(resampled)}
            known["chance"] = float(self._chance @ own / max(1, own.sum()))
            yield known | ({"rated": int((own & rated).sum())} if rated.any() else {})

    def measured(
        self, scores: Floats, right: Floats, **resampling: Unpack[Resampling]
    ) -> dict[str, Intervals]:
        """What is measured of scores `[items, choices]`, of which the shares `right` `[items]` are right."""
        margin = margins(scores, self.wanted)
        found = {
            self._metric: bootstrap_ratios(self.sums(right), self.counts, **resampling),
            "margin": bootstrap_ratios(self.sums(margin), self.counts, **resampling),
        }
        if np.isfinite(self._rating).any():
            found["rank_correlation"] = self._rank_correlations(margin, **resampling)
        return found

    def _rank_correlations(self, margin: Floats, **resampling: Unpack[Resampling]) -> Intervals:
        """Of margins and the scores that items were given, by cell; NaN where there is none."""
        ends = np.full((3, self._member.shape[1]), np.nan)
        for cell, own in enumerate(self._member.T):
            rated = own & np.isfinite(self._rating)
            if rated.any():
                group = pd.factorize(self._group[rated])[0]
                found = rank_correlations(margin[rated, None], self._rating[rated], group, **resampling)
                ends[:, cell] = found.value[0], found.low[0], found.high[0]
        value, low, high = ends
        return Intervals(value, low, high, (self.counts > 0).sum(0))
