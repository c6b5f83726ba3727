"""Figures from the probe grid, each a picture with the numbers behind it (CSV) beside it.

Probes of several seeds are drawn as their mean: value and interval are means over seeds. The interval tells
of other test documents; of other seeds tell the thin lines, one for each.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.typing import ColorType, LineStyleType

from probekit.io import atomic_path, write_text
from probekit.probing.locations import label, per_layer


class NotebookFigure(Figure):
    """A figure that notebooks show, also where nobody has set up pyplot."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png")
        return picture.getvalue()


def svg_of(figure: Figure) -> bytes:
    """A figure as SVG, letters as outlines: it looks the same whatever fonts there are."""
    buffer = BytesIO()
    with mpl.rc_context({"svg.hashsalt": "probekit", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


COLOUR, SEED_COLOUR = "#1f4e79", "#9bb8d3"


def draw_intervals(
    axes: Axes, table: pd.DataFrame, names: Sequence[str], labels: Mapping[str, str] | None = None
) -> None:
    """Draws a line for each name, the first at the top.

    Args:
        axes: Where.
        table: Columns `name`, `seed` (missing over all seeds), `value`, `value_low` and `value_high`.
        names: Which lines, in their order; one that the table has not stays empty.
        labels: What names are called, if not by themselves.
    """
    for y, name in enumerate(names):
        rows = table[table.name == name]
        seeds, whole = rows[rows.seed.notna()], rows[rows.seed.isna()]
        axes.plot(seeds.value, [y] * len(seeds), "|", color=SEED_COLOUR, markersize=9, markeredgewidth=1.4)
        for value, low, high in whole[["value", "value_low", "value_high"]].to_numpy(float):
            errors = [[value - low], [high - value]]
            axes.errorbar([value], [y], xerr=errors, fmt="o", color=COLOUR, markersize=4.5, capsize=3)
            place = axes.get_yaxis_transform()
            axes.text(1.02, y, _numbers(value, low, high), transform=place, va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [(labels or {}).get(name, name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _numbers(value: float, low: float, high: float) -> str:
    """A value and its interval, if it has one, to the digits that the interval's width leaves a meaning."""
    if math.isnan(low):
        return f"{value:.3g}".replace("-", "−")
    digits = 3 if high - low < 0.3 else 2 if high - low < 10 else 0
    shown = (f"{number:.{digits}f}".replace("-", "−") for number in (value, low, high))
    return "{} [{}, {}]".format(*shown)


METRICS = {
    "accuracy": "test accuracy",
    "top5": "test top-5 accuracy",
    "bits": "bits over the prior",
    "gain": "bits over the strongest\nmodel-free baseline",
    "selectivity": "selectivity (accuracy\nover the control task)",
    "compression": "compression",
}
"""What can be drawn, all of it the higher the better, and how axes call it."""

SIGNED = ("gain", "selectivity")
"""Metrics whose sign matters: their colours part at zero."""

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
"""Colour and line of the readers that need no activation."""

DISTANCE = "distance: tokens before the target"


@dataclass(frozen=True)
class Panel:
    """What one picture shows of the grid: all layers and distances of a variant at a location."""

    variant: str
    location: str
    horizon: int = 1
    solver: str = "softmax"
    target: str = "action"

    def cells(self, table: pd.DataFrame) -> pd.DataFrame:
        """The probes of the panel."""
        wanted = [table[field.name] == getattr(self, field.name) for field in fields(self)]
        return table[np.logical_and.reduce(wanted, axis=0) & (table.reader == "probe")]

    def baselines(self, table: pd.DataFrame) -> pd.DataFrame:
        """The other readers of the panel's target and horizon."""
        return table[
            (table.reader != "probe") & (table.target == self.target) & (table.horizon == self.horizon)
        ]

    @property
    def title(self) -> str:
        """What is shown, in words."""
        return f"{self.variant}: {label(self.location)}, {self.target}, horizon {self.horizon}, {self.solver}"

    @property
    def name(self) -> str:
        """What is shown, as part of a file's name."""
        words = [self.variant, self.location, self.target, self.solver, f"h{self.horizon}"]
        return "_".join(re.sub(r"[^\w-]+", "_", word) for word in words)


def panels(table: pd.DataFrame) -> list[Panel]:
    """Every panel of a table that has a cell that is not empty."""
    probes = table[(table.reader == "probe") & table.accuracy.notna()]
    return [Panel(*row) for row in probes[[f.name for f in fields(Panel)]].drop_duplicates().to_numpy()]


def mean_over_seeds(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A metric of cells by layer and distance, with its interval.

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
    """The layer with the lowest mean cross-entropy on validation documents; None if all cells are empty.

    The mean is over the distances at which no layer is injected, and over all if there is none.
    """
    read = cells[cells.validation_cross_entropy.notna()]
    injected = read.groupby("distance").injected.transform("any").astype(bool)
    read = read if injected.all() else read[~injected]
    means = read.groupby("layer").validation_cross_entropy.mean()
    return None if means.empty else int(means.index[int(means.argmin())])


def colour_scale(means: Sequence[pd.DataFrame], metric: str) -> Normalize:
    """A scale of colours for several heat maps.

    It spans the cells that are not injected, if there are any: injected ones read what was put there, and
    would leave all others one colour.
    """
    cells = pd.concat(means)
    shown = cells.value[~cells.injected & cells.value.notna()]
    shown = shown if len(shown) else cells.value.dropna()
    low, high = (min(0.0, shown.min()), max(0.0, shown.max())) if len(shown) else (0.0, 1.0)
    if metric in SIGNED:
        low, high = -max(-low, high), max(-low, high)
    return Normalize(low, high)


def draw_heat_map(
    axes: Axes,
    cells: pd.DataFrame,
    metric: str = "accuracy",
    *,
    scale: Normalize | None = None,
    numbers: bool = True,
    bar: bool = True,
) -> None:
    """A metric of the probes of one panel by layer and distance.

    Cells where the target's own action was injected carry a star, empty ones a dash. Injected cells have no
    gain, for they are compared with no baseline: the star is all that is shown.

    Args:
        axes: Where.
        cells: Probes of one panel, of one seed or several.
        metric: One of `METRICS`.
        scale: Colours shared with other heat maps; None: its own.
        numbers: Whether values are written into cells.
        bar: Whether a bar beside it explains the colours.
    """
    means = mean_over_seeds(cells, metric)
    stars = means.injected.map({True: "*", False: ""})
    written = means.value.map("{:.2f}".format) + stars if numbers else stars
    table = means.assign(text=written, star=stars)
    value, text, star = (
        table.pivot_table(column, "layer", "distance", aggfunc="first", dropna=False).iloc[::-1, ::-1]
        for column in ("value", "text", "star")
    )
    own = scale or colour_scale([means], metric)
    sns.heatmap(
        value.astype(float),
        annot=text,
        fmt="",
        cmap=colours(metric),
        norm=own,
        cbar=bar,
        cbar_kws={"label": METRICS[metric], "extend": beyond([means], own)},
        ax=axes,
    )
    for row, column in np.argwhere(value.isna().to_numpy()):
        mark = "*" if star.iloc[row, column] == "*" else "–"
        axes.text(column + 0.5, row + 0.5, mark, ha="center", va="center")
    axes.set_xlabel(DISTANCE)
    axes.set_ylabel("layer")
    axes.tick_params(axis="y", rotation=0)


def colours(metric: str) -> str:
    """The colour map of a metric."""
    return "RdBu_r" if metric in SIGNED else "viridis"


def beyond(means: Sequence[pd.DataFrame], scale: Normalize) -> str:
    """On which ends of a colour scale values lie beyond it, in matplotlib's word."""
    values = pd.concat(means).value.dropna()
    below, above = bool((values < scale.vmin).any()), bool((values > scale.vmax).any())
    return {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]


def draw_curve(
    axes: Axes, cells: pd.DataFrame, metric: str, name: str, colour: ColorType, style: LineStyleType = "-"
) -> None:
    """A metric of the probes of one layer against distance, with its 95 % interval.

    Points where the target's own action was injected are hollow. With several seeds, each is a thin line.
    """
    means = mean_over_seeds(cells, metric).sort_values("distance")
    seeds = [seed.sort_values("distance") for _, seed in cells.groupby(_replicate(cells))]
    for seed in seeds if len(seeds) > 1 else ():
        axes.plot(seed.distance, seed[metric], color=colour, linewidth=0.5, alpha=0.6, label="_seed")
    axes.plot(means.distance, means.value, color=colour, linestyle=style, linewidth=1.4, label=name)
    for injected, points in means.groupby("injected"):
        face = "white" if injected else colour
        axes.scatter(points.distance, points.value, s=16, facecolors=[face], edgecolors=[colour], zorder=3)
    if means.low.notna().any():
        axes.fill_between(means.distance, means.low, means.high, color=colour, alpha=0.15, linewidth=0)


def draw_baselines(axes: Axes, baselines: pd.DataFrame, metric: str) -> None:
    """A line for each reader that needs no activation and has the metric; its mean over runs and seeds."""
    for reader, (shade, style) in BASELINE_STYLES.items():
        line = baselines[baselines.reader == reader].groupby("distance")[metric].mean().dropna()
        if len(line):
            axes.plot(line.index, line, color=shade, linestyle=style, linewidth=1.2, label=reader)


def dress_distance_axis(axes: Axes, distances: Sequence[int], metric: str) -> None:
    """Distance from far to near, on a log scale; the metric with its zero in sight."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(distances, map(str, distances))
    axes.set_xticks([], minor=True)
    axes.invert_xaxis()
    axes.axhline(0.0, color="0.4", linewidth=0.8, label="_zero")
    axes.set_xlabel(DISTANCE)
    axes.set_ylabel(METRICS[metric])


def probe_heat_map(table: pd.DataFrame, panel: Panel, metric: str = "accuracy") -> Figure:
    """`draw_heat_map` on a figure of its own; all panels of a table have the same colours."""
    cells = panel.cells(table)
    scale = colour_scale([mean_over_seeds(each.cells(table), metric) for each in panels(table)], metric)
    size = (2.4 + 0.75 * cells.distance.nunique(), 1.6 + 0.45 * cells.layer.nunique())
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw_heat_map(axes, cells, metric, scale=scale)
    star = "\n* the target's own action was added" if cells.injected.any() else ""
    figure.suptitle(panel.title + star, fontsize=10, parse_math=False)
    return figure


def probe_lines(table: pd.DataFrame, panel: Panel, metric: str = "accuracy") -> Figure:
    """A metric against distance, a line for each layer with its 95 % interval, between the baselines."""
    cells = panel.cells(table)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    draw_layers(axes, cells, metric)
    draw_baselines(axes, panel.baselines(table), metric)
    dress_distance_axis(axes, sorted(cells.distance.unique()), metric)
    hollow = "; hollow: the target's own action was added" if cells.injected.any() else ""
    axes.set_title(
        f"{panel.title}\n{int(cells.documents.max())} test documents{hollow}", fontsize=9, parse_math=False
    )
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def draw_layers(axes: Axes, cells: pd.DataFrame, metric: str) -> None:
    """`draw_curve` for each layer of one panel."""
    layers = sorted(cells.layer.unique())
    for i, layer in enumerate(layers):
        colour = mpl.colormaps["viridis"](0.9 * i / max(1, len(layers) - 1))
        location = cells.location.iloc[0]
        name = f"layer {layer}" if per_layer(location) else label(location)
        draw_curve(axes, cells[cells.layer == layer], metric, name, colour)


def save_probe_figures(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws every variant, location, horizon, solver and target into a folder, each with its CSV.

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


def _replicate(cells: pd.DataFrame) -> list[str]:
    """The columns that tell repetitions of a cell apart: the seed, and the run where there are several."""
    return [column for column in ("run", "seed") if column in cells]
