"""What all figures are drawn with: panels, points and lines with intervals, heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.typing import ColorType

from probekit.config import reading_order
from probekit.io import atomic_path
from probekit.reports.colours import COLOUR, SEED_COLOUR
from probekit.reports.display import with_interval

BOUNDS = {"value_low": "low", "value_high": "high"}
"""Columns of an interval in tables of results, and their names in `draw_line`."""


def save_png(figure: Figure, path: Path) -> Path:
    """Writes a figure as a PNG picture; returns its path."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return path


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


def panel_grid(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a number of panels, each of a width and height in inches."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = NotebookFigure(figsize=(width * columns + 1.6, height * rows + 1.0), layout="constrained")
    axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def outer_legend(figure: Figure) -> None:
    """A legend of all lines, beside the panels."""
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)


# Points, lines and maps


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
        for value, low, high in overall[["value", *BOUNDS]].to_numpy(float):
            errors = [[value - low], [high - value]]
            axes.errorbar([value], [y], xerr=errors, fmt="o", color=COLOUR, markersize=4.5, capsize=3)
            text = with_interval(value, low, high, decimals=0).replace("-", "−")
            axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [(labels or {}).get(name, name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    sns.despine(ax=axes, left=True)
    axes.tick_params(axis="y", length=0)


def draw_line(axes: Axes, rows: pd.DataFrame, x: str, name: str, colour: ColorType, **style: Any) -> None:
    """Draws `value` against a column, with a band from `low` to `high` where there are intervals."""
    at = rows[x].to_numpy()
    axes.plot(at, rows.value, color=colour, label=name, **{"linewidth": 1.4} | style)
    if rows.low.notna().any():
        axes.fill_between(at, rows.low, rows.high, color=colour, alpha=0.15, linewidth=0)


def heat_map(
    axes: Axes, cells: pd.DataFrame, columns: Sequence[str], scale: ScalarMappable, **style: Any
) -> list[pd.DataFrame]:
    """Draws the first column by layer (upwards) and position (in reading order), annotated with the second.

    Returns:
        Each column as a table of layers and positions, in the order in which they are drawn.
    """
    order = reading_order(cells.position)
    tables = [
        cells.pivot_table(column, "layer", "position", aggfunc="first", dropna=False).iloc[::-1][order]
        for column in columns
    ]
    colours = {"cmap": scale.cmap, "norm": scale.norm}
    sns.heatmap(tables[0].astype(float), annot=tables[1], fmt="", ax=axes, **colours, **style)
    return tables
