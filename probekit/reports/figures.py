"""Drawing: intervals, heat maps and curves of the probe grid, and the pictures saved beside its results.

Several seeds are drawn as their mean: value and interval are means over seeds, thin lines are single seeds.
Intervals describe other test documents, not other seeds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.typing import ColorType

from probekit.io import atomic_path, write_text
from probekit.models.hook_points import label, per_layer

COLOUR, SEED_COLOUR = "#1f4e79", "#9bb8d3"

METRICS = {
    "accuracy": "test accuracy",
    "top5": "test top-5 accuracy",
    "bits": "bits over the prior",
    "gain": "bits over the strongest\nmodel-free baseline",
    "selectivity": "selectivity (accuracy\nover the control task)",
    "compression": "compression",
}
"""Metrics that can be drawn, with their axis labels; higher is better for all of them."""

SIGNED = ("gain", "selectivity")
"""Metrics that are drawn with diverging colours around zero."""

BASELINE_STYLES = {
    "prior": ("0.55", ":"),
    "bigram": ("#b35900", "--"),
    "bigram (current action)": ("#e08a2e", "-."),
    "skip n-gram": ("#b35900", ":"),
    "token embedding": ("#8c6d31", "-."),
    "planner": ("#7b3294", "-."),
    "planner after joint": ("#7b3294", ":"),
    "planner after gumbel": ("#af8dc3", "--"),
    "planner after straight-through": ("#af8dc3", ":"),
    "ceiling (tokens read)": ("black", "-."),
    "ceiling (words)": ("black", "--"),
    "ceiling (actions)": ("black", "-"),
}
"""Colour and line style of the baselines and ceilings."""

DISTANCE = "distance: tokens before the target"
INJECTED = "the target's own action was added"


class NotebookFigure(Figure):
    """A figure that notebooks display even where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        picture = BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def svg_of(figure: Figure) -> bytes:
    """Renders a figure as SVG with text as outlines, so that it does not depend on installed fonts."""
    buffer = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "probekit", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


# Points and lines with intervals


def draw_intervals(
    axes: Axes, table: pd.DataFrame, names: Sequence[str], labels: Mapping[str, str] | None = None
) -> None:
    """Draws a row with a point and its interval for each name, the first at the top.

    Args:
        axes: Where to draw.
        table: Columns `name`, `seed` (missing over all seeds), `value`, `value_low` and `value_high`.
        names: The rows, in order; a name that the table lacks leaves an empty row.
        labels: Tick labels of names that are not labelled by themselves.
    """
    for y, name in enumerate(names):
        rows = table[table.name == name]
        seeds, overall = rows[rows.seed.notna()], rows[rows.seed.isna()]
        axes.plot(seeds.value, [y] * len(seeds), "|", color=SEED_COLOUR, markersize=9, markeredgewidth=1.4)
        for value, low, high in overall[["value", "value_low", "value_high"]].to_numpy(float):
            errors = [[value - low], [high - value]]
            axes.errorbar([value], [y], xerr=errors, fmt="o", color=COLOUR, markersize=4.5, capsize=3)
            text = _value_with_interval(value, low, high)
            axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [(labels or {}).get(name, name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _value_with_interval(value: float, low: float, high: float) -> str:
    """The value and its interval, with as many digits as the interval's width justifies."""
    if math.isnan(low):
        return f"{value:.3g}".replace("-", "−")
    digits = 3 if high - low < 0.3 else 2 if high - low < 10 else 0
    number = f"{{:.{digits}f}}"
    return f"{number} [{number}, {number}]".format(value, low, high).replace("-", "−")


def draw_line(axes: Axes, rows: pd.DataFrame, x: str, name: str, colour: ColorType, **style: Any) -> None:
    """Draws `value` against a column, with a band from `low` to `high` where there are intervals."""
    style = {"linewidth": 1.4} | style
    at = rows[x].to_numpy()
    axes.plot(at, rows.value, color=colour, label=name, **style)
    if rows.low.notna().any():
        axes.fill_between(at, rows.low, rows.high, color=colour, alpha=0.15, linewidth=0)


# Panels of the probe grid


class Panel(NamedTuple):
    """One picture's part of the probe grid: all layers and distances of a variant at a location."""

    variant: str
    location: str
    horizon: int = 1
    solver: str = "softmax"
    target: str = "action"

    def cells(self, table: pd.DataFrame) -> pd.DataFrame:
        """The panel's probes."""
        wanted = [table[name] == value for name, value in self._asdict().items()]
        return table[np.logical_and.reduce(wanted, axis=0) & (table.reader == "probe")]

    def baselines(self, table: pd.DataFrame) -> pd.DataFrame:
        """The baselines and ceilings of the panel's target and horizon."""
        same = (table.target == self.target) & (table.horizon == self.horizon)
        return table[same & (table.reader != "probe")]

    @property
    def title(self) -> str:
        """A title for figures."""
        return f"{self.variant}: {label(self.location)}, {self.target}, horizon {self.horizon}, {self.solver}"

    @property
    def name(self) -> str:
        """A name for files."""
        words = [self.variant, self.location, self.target, self.solver, f"h{self.horizon}"]
        return "_".join(re.sub(r"[^\w-]+", "_", word) for word in words)


def panels(table: pd.DataFrame) -> list[Panel]:
    """Returns every panel of a table with at least one cell that is not empty."""
    probes = table[(table.reader == "probe") & table.accuracy.notna()]
    return [Panel(*row) for row in probes[list(Panel._fields)].drop_duplicates().to_numpy()]


def mean_over_seeds(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Averages a metric and its interval over seeds, by layer and distance.

    Returns:
        Columns `layer`, `distance`, `value`, `low`, `high` (NaN where the metric has no interval) and
        `injected`. A cell that is empty for one seed is empty.
    """
    bounds = {"value": metric, "low": f"{metric}_low", "high": f"{metric}_high"}
    parts = pd.DataFrame(
        {
            "layer": cells.layer.astype("Int64"),
            "distance": cells.distance,
            **{name: cells.get(column, np.nan) for name, column in bounds.items()},
            "injected": cells.injected.astype(bool),
        }
    )
    parts["missing"] = parts.value.isna()
    cell = parts.groupby(["layer", "distance"])
    means = cell[list(bounds)].mean().join(cell[["injected", "missing"]].any()).reset_index()
    means.loc[means.pop("missing"), list(bounds)] = np.nan
    return means


def best_layer(cells: pd.DataFrame) -> int | None:
    """Returns the layer with the lowest mean cross-entropy on validation documents; None if all are empty.

    The mean is over the distances at which no layer is injected, or over all if there is no such distance.
    """
    fitted = cells[cells.validation_cross_entropy.notna()]
    injected = fitted.groupby("distance").injected.transform("any").astype(bool)
    fitted = fitted if injected.all() else fitted[~injected]
    means = fitted.groupby("layer").validation_cross_entropy.mean()
    return None if means.empty else int(means.index[int(means.argmin())])


# Heat maps


def colour_map(metric: str) -> str:
    """Returns the name of the colour map of a metric."""
    return "RdBu_r" if metric in SIGNED else "viridis"


def colour_scale(means: Sequence[pd.DataFrame], metric: str) -> Normalize:
    """Returns the colour scale for several heat maps, from their `mean_over_seeds`.

    It spans the cells that are not injected, if there are any: injected ones recover the action that was put
    there, and would leave all others one colour.
    """
    cells = pd.concat(means)
    shown = cells.value[~cells.injected & cells.value.notna()]
    shown = shown if len(shown) else cells.value.dropna()
    low, high = (min(0.0, shown.min()), max(0.0, shown.max())) if len(shown) else (0.0, 1.0)
    if metric in SIGNED:
        low, high = -max(-low, high), max(-low, high)
    return Normalize(low, high)


def extend_of(means: Sequence[pd.DataFrame], scale: Normalize) -> str:
    """Returns the ends of a colour scale that values exceed, as matplotlib's `extend`."""
    values = pd.concat(means).value.dropna()
    below, above = bool((values < scale.vmin).any()), bool((values > scale.vmax).any())
    return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]


def draw_heat_map(
    axes: Axes,
    cells: pd.DataFrame,
    metric: str = "accuracy",
    *,
    scale: Normalize | None = None,
    numbers: bool = True,
    bar: bool = True,
) -> None:
    """Draws a metric of one panel's probes by layer and distance.

    A star marks cells where the target's own action was injected, a dash empty cells. Injected cells have no
    gain, since they are compared with no baseline: they show the star alone.

    Args:
        axes: Where to draw.
        cells: Probes of one panel, of one seed or several.
        metric: One of `METRICS`.
        scale: A colour scale shared with other heat maps; None: its own.
        numbers: Write the values into the cells.
        bar: Draw a colour bar.
    """
    means = mean_over_seeds(cells, metric)
    star = means.injected.map({True: "*", False: ""})
    text = means.value.map("{:.2f}".format) + star if numbers else star
    scale = scale or colour_scale([means], metric)
    values, _, stars = heat_map(
        axes,
        means.assign(text=text, star=star),
        ["value", "text", "star"],
        cmap=colour_map(metric),
        norm=scale,
        cbar=bar,
        cbar_kws={"label": METRICS[metric], "extend": extend_of([means], scale)},
    )
    for row, column in np.argwhere(values.isna().to_numpy()):
        mark = "*" if stars.iloc[row, column] == "*" else "–"
        axes.text(column + 0.5, row + 0.5, mark, ha="center", va="center")
    axes.set_xlabel(DISTANCE)
    axes.set_ylabel("layer")
    axes.tick_params(axis="y", rotation=0)


def heat_map(axes: Axes, cells: pd.DataFrame, columns: Sequence[str], **style: Any) -> list[pd.DataFrame]:
    """Draws the first column by layer (upwards) and distance (leftwards), annotated with the second.

    Returns:
        Each column as a table of layers and distances, in the order in which they are drawn.
    """
    tables = [
        cells.pivot_table(column, "layer", "distance", aggfunc="first", dropna=False).iloc[::-1, ::-1]
        for column in columns
    ]
    sns.heatmap(tables[0].astype(float), annot=tables[1], fmt="", ax=axes, **style)
    return tables


# Curves against distance


def draw_curve(
    axes: Axes, cells: pd.DataFrame, metric: str, name: str, colour: ColorType, style: Any = "-"
) -> None:
    """Draws a metric of one layer's probes against distance, with its 95 % interval.

    Points where the target's own action was injected are hollow. Several seeds are thin lines, too.
    """
    repetitions = [column for column in ("run", "seed") if column in cells]
    seeds = [seed.sort_values("distance") for _, seed in cells.groupby(repetitions)]
    for seed in seeds if len(seeds) > 1 else ():
        axes.plot(seed.distance, seed[metric], color=colour, linewidth=0.5, alpha=0.6, label="_seed")
    means = mean_over_seeds(cells, metric).sort_values("distance")
    draw_line(axes, means, "distance", name, colour, linestyle=style)
    for injected, points in means.groupby("injected"):
        face = "white" if injected else colour
        axes.scatter(points.distance, points.value, s=16, facecolors=[face], edgecolors=[colour], zorder=3)


def draw_layers(axes: Axes, cells: pd.DataFrame, metric: str) -> None:
    """Draws a curve for each layer of one panel."""
    layers = sorted(cells.layer.unique())
    for i, layer in enumerate(layers):
        colour = mpl.colormaps["viridis"](0.9 * i / max(1, len(layers) - 1))
        location = cells.location.iloc[0]
        name = f"layer {layer}" if per_layer(location) else label(location)
        draw_curve(axes, cells[cells.layer == layer], metric, name, colour)


def draw_baselines(axes: Axes, baselines: pd.DataFrame, metric: str) -> None:
    """Draws a line for each baseline or ceiling that has the metric, averaged over runs and seeds."""
    for reader, (shade, style) in BASELINE_STYLES.items():
        line = baselines[baselines.reader == reader].groupby("distance")[metric].mean().dropna()
        if len(line):
            axes.plot(line.index, line, color=shade, linestyle=style, linewidth=1.2, label=reader)


def set_distance_axis(axes: Axes, distances: Sequence[int], metric: str) -> None:
    """Labels the axes of curves: distance from far to near on a log scale, and the metric."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(distances, map(str, distances))
    axes.set_xticks([], minor=True)
    axes.invert_xaxis()
    axes.axhline(0.0, color="0.4", linewidth=0.8, label="_zero")
    axes.set_xlabel(DISTANCE)
    axes.set_ylabel(METRICS[metric])


# Pictures beside the results of `probekit probe`


def probe_heat_map(table: pd.DataFrame, panel: Panel, metric: str = "accuracy") -> Figure:
    """Draws a panel's heat map; all panels of a table share one colour scale."""
    cells = panel.cells(table)
    scale = colour_scale([mean_over_seeds(each.cells(table), metric) for each in panels(table)], metric)
    size = (2.4 + 0.75 * cells.distance.nunique(), 1.6 + 0.45 * cells.layer.nunique())
    figure = Figure(figsize=size, layout="constrained")
    draw_heat_map(figure.subplots(), cells, metric, scale=scale)
    star = f"\n* {INJECTED}" if cells.injected.any() else ""
    figure.suptitle(panel.title + star, fontsize=10, parse_math=False)
    return figure


def probe_lines(table: pd.DataFrame, panel: Panel, metric: str = "accuracy") -> Figure:
    """Draws a panel's curves against distance, one for each layer, and the baselines."""
    cells = panel.cells(table)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_layers(axes, cells, metric)
    draw_baselines(axes, panel.baselines(table), metric)
    set_distance_axis(axes, sorted(cells.distance.unique()), metric)
    hollow = f"; hollow: {INJECTED}" if cells.injected.any() else ""
    title = f"{panel.title}\n{int(cells.documents.max())} test documents{hollow}"
    axes.set_title(title, fontsize=9, parse_math=False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def save_probe_figures(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws every panel of a table into a folder, with the numbers as CSV beside it.

    Returns:
        The pictures.
    """
    pictures = []
    for panel in panels(table):
        for kind, draw in {"heatmap": probe_heat_map, "lines": probe_lines}.items():
            path = folder / f"{kind}_{panel.name}.png"
            with atomic_path(path) as temporary:
                draw(table, panel).savefig(temporary, dpi=150)
            pictures.append(path)
        numbers = pd.concat([panel.cells(table), panel.baselines(table)])
        write_text(folder / f"{panel.name}.csv", numbers.to_csv(index=False))
    return pictures
