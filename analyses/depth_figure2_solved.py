"""Figure 2 of arXiv 2410.13077: which multiple-choice questions do the layers of an ensemble solve?

    python analyses/depth_figure2_solved.py runs/depth
    python analyses/depth_figure2_solved.py --preset demo --seeds 3 --runs runs/depth

A folder is a single run, or a sweep whose seeds of each member are taken together. With `--preset` the sweep
is trained or continued in `RUNS/PRESET` first, with one member for each of `--tunings`. Two or
three layers are drawn as a Venn diagram, more as an UpSet diagram (Lex et al. 2014, "UpSet: Visualization of
Intersecting Sets", IEEE TVCG 20); counts are means over seeds. Intervals are at 95 %, from resampling
documents. The share that any layer solves is what choosing the right layer would yield, not what can be
chosen: a layer that guesses among four answers solves a quarter of the questions that the last one fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from shared.depth import depth_parser, depth_runs, layer_name, layer_style, members_of
from shared.script import Groups, run_script, save_figure

from probekit.config import MemberName
from probekit.errors import ProbekitError
from probekit.run.run import Run
from probekit.statistics import over_seeds

WHOLE, LAST = 0, -1
"""Columns of `solved`: the ensemble itself, and its last layer."""

SHARES: dict[str, Callable[[pd.DataFrame, pd.Series], pd.Series]] = {
    "the ensemble": lambda layers, whole: whole,
    "any layer": lambda layers, whole: layers.any(axis=1),
    "all layers": lambda layers, whole: layers.all(axis=1),
    "any layer but not the last one": lambda layers, whole: layers.any(axis=1) & ~layers[LAST],
    "any layer but not the ensemble": lambda layers, whole: layers.any(axis=1) & ~whole,
    "the ensemble but not the last layer": lambda layers, whole: whole & ~layers[LAST],
    "the last layer but not the ensemble": lambda layers, whole: layers[LAST] & ~whole,
}
"""Shares of the questions, from who solves them."""

CAPTION = ("any layer but not the last one", "the ensemble", "the ensemble but not the last layer")
"""Shares written under each diagram, after that of the last layer."""

VENN = 3
"""The largest number of sets in a Venn diagram."""

BARS = 24
"""The largest number of intersections in an UpSet diagram."""


def solved(run: Run, member: MemberName) -> pd.DataFrame:
    """Returns who solves which question: rows are questions and documents, columns layers from the end.

    Raises:
        ProbekitError: The run, or this member of it, is not evaluated.
    """
    choices = run.choices()
    own = choices[choices.member == member]
    if own.layer.isna().all():
        raise ProbekitError(
            f"{run.folder / 'choices.parquet'} has no layers of {member}; run "
            f"`probekit evaluate {run.folder}`"
        )
    numbers = (own.layer - own.layer.max() - 1).fillna(WHOLE).astype(int)
    if run.config.evaluation.questions_file is None:  # else documents are lines of the file
        own = run.corpus.by_group(own)
    table = own.assign(number=numbers).pivot_table(
        "solved", ["question", "document"], "number", aggfunc="first"
    )
    return table.astype(bool)


def shares(tables: dict[int, pd.DataFrame], resamples: int) -> pd.DataFrame:
    """Returns shares of questions, from `solved` of every seed; see `over_seeds`."""
    parts = []
    for seed, table in tables.items():
        layers, whole = table.drop(columns=WHOLE), table[WHOLE]
        solvers = {layer_name(int(number)): layers[number] for number in sorted(layers.columns, reverse=True)}
        solvers |= {name: of(layers, whole) for name, of in SHARES.items()}
        for name, one in solvers.items():
            sums = one.groupby("document").agg(["sum", "count"]).reset_index()
            parts.append(sums.assign(seed=seed, name=name, metric="share"))
    return over_seeds(pd.concat(parts), ["metric", "name"], {}, resamples=resamples, seed=0)


def overlaps(tables: dict[int, pd.DataFrame]) -> pd.DataFrame:
    """Counts questions solved by some layers and no other: means over seeds, which share the questions."""
    every = pd.concat([table.drop(columns=WHOLE) for table in tables.values()])
    counts = intersections(every[sorted(every.columns, reverse=True)])
    return counts.assign(count=counts["count"] / len(tables))


Measured = dict[tuple[str, MemberName], tuple[pd.DataFrame, pd.DataFrame]]
"""Shares and overlaps of members by the name of their group."""


def measured(groups: Groups) -> Measured:
    """Measures all ensembles of all groups."""
    found: Measured = {}
    for name, runs in groups.items():
        needed = "two layers or more: members ensemble or distilled, and depth.layers 2 or more"
        each = [members_of(run, reads=["late"], needed=needed) for run in runs]
        for member in each[0]:
            tables = {run.config.seed: solved(run, member) for run in runs}
            found[name, member] = shares(tables, runs[0].config.evaluation.resamples), overlaps(tables)
    return found


def numbers(found: Measured) -> pd.DataFrame:
    """Returns all numbers: shares, and counts of questions by the layers that solve them."""
    parts = []
    for (runs, member), (share, counts) in found.items():
        layers = counts.columns.drop("count")
        names = [
            " & ".join(layer_name(int(n)) for n, inside in zip(layers, row, strict=True) if inside) or "none"
            for row in counts[layers].to_numpy(bool)
        ]
        overlap = pd.DataFrame({"name": names, "value": counts["count"], "seeds": share.seeds.max()})
        for what, part in (("share", share.drop(columns="metric")), ("questions", overlap)):
            parts.append(part.assign(runs=runs, member=member, what=what))
    return pd.concat(parts, ignore_index=True)


def draw(found: Measured) -> Figure:
    """Draws a row for each group, a diagram for each member."""
    groups, members = (list(dict.fromkeys(key[part] for key in found)) for part in (0, 1))
    layers = max(len(counts.columns) - 1 for _, counts in found.values())
    width, height = (5.2, 4.6) if layers <= VENN else (8.0, 4.4 + 0.2 * layers)
    figure = Figure(figsize=(width * len(members), height * len(groups)), layout="constrained")
    parts = figure.subfigures(len(groups), len(members), squeeze=False, hspace=0.06)
    for (group, member), (share, counts) in found.items():
        part = parts[groups.index(group), members.index(member)]
        names = {number: layer_name(int(number)) for number in counts.columns.drop("count")}
        colours = {number: layer_style(int(number))["color"] for number in names}
        if len(names) <= VENN:
            draw_venn(part.subplots(), counts, [*names.values()], [*colours.values()])
        else:
            draw_upset(part, counts, names, colours)
        seeds = int(share.seeds.max())
        part.suptitle(f"{group}: {member}{f', mean of {seeds} seeds' if seeds > 1 else ''}", fontsize=11)
        whole = share[share.seed.isna()].set_index("name")
        lines = ["solved by"]
        for name in (layer_name(LAST), *CAPTION):
            value, low, high = 100 * whole.loc[name, ["value", "value_low", "value_high"]]
            lines.append(f"{name}: {value:.1f} % [{low:.1f}, {high:.1f}]")
        lines.append(f"95 % intervals, {int(whole.documents.max())} documents")
        part.supxlabel("\n".join(lines), fontsize=9)
    return figure


# Overlap of sets


def intersections(members: pd.DataFrame) -> pd.DataFrame:
    """Counts the things in some sets and no other.

    Args:
        members: One row for each thing, one column for each set, true where it is in the set.

    Returns:
        The same columns and `count`: a row for each intersection that is not empty, including that of no set,
        the largest first.
    """
    sets = list(members.columns)
    counts = members.astype(bool).groupby(sets, sort=True).size().rename("count").reset_index()
    return counts.sort_values("count", ascending=False, kind="stable", ignore_index=True)


def sizes(counts: pd.DataFrame) -> pd.Series:
    """Returns the size of each set, from `intersections`."""
    return counts.drop(columns="count").mul(counts["count"], axis=0).sum()


def draw_venn(axes: Axes, counts: pd.DataFrame, names: Sequence[str], colours: Sequence[str]) -> None:
    """Draws two or three circles whose areas and overlaps approximate the counts.

    Args:
        axes: Where to draw.
        counts: From `intersections`, of two or three sets; they may be means.
        names: Labels of the sets.
        colours: Their colours.
    """
    try:
        from matplotlib_venn import venn2, venn3  # type: ignore[import-untyped]
    except ImportError:
        raise ProbekitError("circles need the package matplotlib-venn: pip install -e '.[figures]'") from None

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
        subset_label_formatter=_written,
    )
    for text in [*diagram.set_labels, *diagram.subset_labels]:
        if text is not None:  # a region that is not there has none
            text.set_fontsize(10)
    axes.text(1.0, 0.0, f"none: {_written(outside)}", transform=axes.transAxes, ha="right")


def draw_upset(
    figure: Figure | SubFigure, counts: pd.DataFrame, names: Mapping[Any, str], colours: Mapping[Any, str]
) -> None:
    """Draws bars of the intersections above a matrix of their sets, and the sizes of sets at the left.

    Args:
        figure: Where to draw.
        counts: From `intersections`; they may be means.
        names: Labels of the sets, the first at the top.
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
            _written(count), (place, count), (0, 2), textcoords="offset points", ha="center", fontsize=8
        )
    for row, name in enumerate(sets):
        inside = shown[name].to_numpy(bool)
        places = np.arange(len(shown))
        matrix.scatter(places[~inside], np.full((~inside).sum(), row), s=36, color="0.85")
        matrix.scatter(places[inside], np.full(inside.sum(), row), s=36, color=colours[name], zorder=3)
    for place, inside in enumerate(shown[sets].to_numpy(bool)):
        rows = np.flatnonzero(inside)
        if len(rows):
            matrix.plot([place, place], [rows[0], rows[-1]], color="0.3", linewidth=1.2, zorder=2)
    size = sizes(counts)
    totals.barh(range(len(sets)), size[sets], color=[colours[name] for name in sets], height=0.6)
    for row, name in enumerate(sets):
        totals.annotate(
            _written(size[name]),
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
            f"{len(counts) - BARS} smaller ones, {_written(left_out)} in all, are left out", fontsize=8
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


def _written(count: float) -> str:
    """A count with one decimal, unless it is a whole number."""
    return f"{count:.1f}".removesuffix(".0")


def main() -> None:
    """Trains what is missing, counts, saves."""
    parser = depth_parser(__doc__, "depth_figure2_solved")
    given = parser.parse_args()
    groups = depth_runs(given, parser)
    found = measured(groups)
    table = numbers(found)
    shown = table[(table.what == "share") & table.seed.isna()].drop(columns=["what", "seed"])
    save_figure(draw(found), table, given.out, {"preset": given.preset}, [*chain(*groups.values())], shown)


if __name__ == "__main__":
    run_script(main)
