"""Overlap of sets, such as the questions that layers solve: counted, and drawn as a Venn or an UpSet diagram.

UpSet: Lex et al. 2014, "UpSet: Visualization of Intersecting Sets" (IEEE TVCG 20).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

VENN = 3
"""Up to so many sets a Venn diagram can be read."""

BARS = 24
"""An UpSet diagram shows so many intersections, the largest ones."""

EMPTY = "0.85"
"""Colour of what is not in an intersection."""


def intersections(members: pd.DataFrame) -> pd.DataFrame:
    """How many things are in some sets and in no other.

    Args:
        members: One row for each thing, one column for each set, true where it is in the set.

    Returns:
        The same columns and `count`: one row for each intersection that something is in, that of no set
        included, the largest first.
    """
    sets = list(members.columns)
    counts = members.astype(bool).groupby(sets, sort=True).size().rename("count").reset_index()
    return counts.sort_values("count", ascending=False, kind="stable", ignore_index=True)


def sizes(counts: pd.DataFrame) -> pd.Series:
    """The size of each set, from `intersections`."""
    return counts.drop(columns="count").mul(counts["count"], axis=0).sum()


def draw_venn(axes: Axes, counts: pd.DataFrame, names: Sequence[str], colours: Sequence[str]) -> None:
    """Two or three circles, whose areas and overlaps are as near to the counts as circles can be.

    Args:
        axes: Where.
        counts: Of `intersections`, of two or three sets; they may be means, and not whole numbers.
        names: What the sets are called.
        colours: Their colours.
    """
    from matplotlib_venn import venn2, venn3  # type: ignore[import-untyped]

    sets = list(counts.columns.drop("count"))
    codes = counts[sets].apply(lambda row: "".join("01"[int(inside)] for inside in row), axis=1)
    found = dict(zip(codes, counts["count"], strict=True))
    outside = found.pop("0" * len(sets), 0)
    diagram = {2: venn2, 3: venn3}[len(sets)](
        found,
        set_labels=names,
        set_colors=colours,
        alpha=0.45,
        ax=axes,
        subset_label_formatter=number,
    )
    for text in [*diagram.set_labels, *diagram.subset_labels]:
        if text is not None:  # a region that is not there has none
            text.set_fontsize(10)
    axes.text(1.0, 0.0, f"none: {number(outside)}", transform=axes.transAxes, ha="right")


def draw_upset(
    figure: Figure | SubFigure, counts: pd.DataFrame, names: Mapping[Any, str], colours: Mapping[Any, str]
) -> None:
    """Bars of the intersections over a matrix of the sets that each is of; the sizes of sets at the left.

    Args:
        figure: Where.
        counts: Of `intersections`; they may be means, and not whole numbers.
        names: What the sets are called, the first at the top.
        colours: Their colours.
    """
    sets, shown = list(names), counts[:BARS]
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 3), height_ratios=(2, 0.35 * len(sets) + 0.3))
    bars = figure.add_subplot(grid[0, 1])
    matrix = figure.add_subplot(grid[1, 1], sharex=bars)
    totals = figure.add_subplot(grid[1, 0], sharey=matrix)
    for place, count in enumerate(shown["count"]):
        bars.bar(place, count, color="0.3", width=0.7)
        bars.annotate(
            number(count), (place, count), (0, 2), textcoords="offset points", ha="center", fontsize=8
        )
    for row, name in enumerate(sets):
        inside = shown[name].to_numpy(bool)
        places = np.arange(len(shown))
        matrix.scatter(places[~inside], np.full((~inside).sum(), row), s=36, color=EMPTY)
        matrix.scatter(places[inside], np.full(inside.sum(), row), s=36, color=colours[name], zorder=3)
    for place, inside in enumerate(shown[sets].to_numpy(bool)):
        rows = np.flatnonzero(inside)
        if len(rows):
            matrix.plot([place, place], [rows[0], rows[-1]], color="0.3", linewidth=1.2, zorder=2)
    size = sizes(counts)
    totals.barh(range(len(sets)), size[sets], color=[colours[name] for name in sets], height=0.6)
    for row, name in enumerate(sets):
        totals.annotate(
            number(size[name]),
            (size[name], row),
            (-3, 0),
            textcoords="offset points",
            va="center",
            ha="right",
            fontsize=8,
        )
    _dress(bars, matrix, totals, [names[name] for name in sets])
    if left_out := counts["count"][BARS:].sum():
        bars.set_title(
            f"{len(counts) - BARS} smaller ones, {number(left_out)} in all, are left out", fontsize=8
        )


def _dress(bars: Axes, matrix: Axes, totals: Axes, names: Sequence[str]) -> None:
    bars.set_ylabel("in these sets alone")
    bars.tick_params(axis="x", bottom=False, labelbottom=False)
    matrix.set_yticks(range(len(names)), names)
    matrix.set_ylim(len(names) - 0.5, -0.5)
    matrix.tick_params(left=False, bottom=False, labelbottom=False)
    totals.invert_xaxis()
    totals.set_xlabel("in the set")
    totals.tick_params(axis="y", left=False, labelleft=False)
    for axes in (bars, matrix, totals):
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(axes is bars and side == "left")
    matrix.spines["bottom"].set_visible(False)


def number(count: float) -> str:
    """A count as it is written: with a decimal only where a mean is no whole number."""
    return f"{count:.1f}".removesuffix(".0")
