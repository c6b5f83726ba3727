"""Figures from results, each a picture with the numbers behind it (CSV) beside it."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probekit.storage import atomic_path, write_text

BASELINE_STYLES = {
    "prior": ("0.55", ":"),
    "bigram": ("#b35900", "--"),
    "planner": ("#7b3294", "-."),
    "ceiling (words)": ("black", "-"),
}
"""Colour and line of the readers that need no activation."""


def draw_heat_map(axes: Axes, table: pd.DataFrame, variant: str, location: str, horizon: int = 1) -> None:
    """Accuracy of the probes of one location by layer and distance.

    Cells are annotated; those where the target's own action was injected carry a star, empty ones a dash.
    """
    cells = _probes(table, variant, location, horizon)
    stars = cells.injected.map({True: "*", False: ""})
    cells = cells.assign(text=cells.accuracy.map("{:.2f}".format) + stars)
    accuracy, text = (
        cells.pivot_table(
            index="layer", columns="distance", values=values, aggfunc="first", dropna=False
        ).iloc[::-1, ::-1]
        for values in ("accuracy", "text")
    )
    bar = {"label": "test accuracy"}
    sns.heatmap(accuracy, annot=text, fmt="", cmap="viridis", vmin=0.0, ax=axes, cbar_kws=bar)
    for row, column in np.argwhere(accuracy.isna().to_numpy()):
        axes.text(column + 0.5, row + 0.5, "–", ha="center", va="center")
    axes.set_xlabel("distance: tokens before the target sentence begins")
    axes.set_ylabel("layer")
    axes.tick_params(axis="y", rotation=0)
    star = "   (* already conditioned on the target sentence)" if cells.injected.any() else ""
    axes.set_title(f"{variant}: {location}, horizon {horizon}{star}", fontsize=10)


def probe_heat_map(table: pd.DataFrame, variant: str, location: str, horizon: int = 1) -> Figure:
    """`draw_heat_map` on a figure of its own, as large as its cells need."""
    cells = _probes(table, variant, location, horizon)
    size = (1.8 + 0.75 * cells.distance.nunique(), 1.6 + 0.45 * cells.layer.nunique())
    figure = Figure(figsize=size, layout="constrained")
    draw_heat_map(figure.subplots(), table, variant, location, horizon)
    return figure


def probe_lines(table: pd.DataFrame, variant: str, location: str, horizon: int = 1) -> Figure:
    """Accuracy against distance, a line for each layer with its 95 % interval, between the baselines."""
    cells = _probes(table, variant, location, horizon)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    layers = sorted(cells.layer.unique())
    colours = mpl.colormaps["viridis"]
    for i, layer in enumerate(layers):
        line = cells[cells.layer == layer].sort_values("distance")
        colour = colours(0.9 * i / max(1, len(layers) - 1))
        axes.plot(
            line.distance, line.accuracy, color=colour, marker="o", markersize=3.5, label=f"layer {layer}"
        )
        axes.fill_between(
            line.distance, line.accuracy_low, line.accuracy_high, color=colour, alpha=0.15, linewidth=0
        )
    for reader, (shade, style) in BASELINE_STYLES.items():
        line = table[(table.reader == reader) & (table.horizon == horizon)].sort_values("distance")
        if len(line):
            axes.plot(line.distance, line.accuracy, color=shade, linestyle=style, label=reader)
    axes.set_xticks(sorted(cells.distance.unique()))
    axes.invert_xaxis()
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("distance: tokens before the target sentence begins")
    axes.set_ylabel("test accuracy")
    axes.set_title(
        f"{variant}: {location}, horizon {horizon}, {int(cells.documents.max())} test documents", fontsize=10
    )
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def save_probe_figures(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws every variant, location and horizon into a folder, each with its CSV.

    Returns:
        The pictures.
    """
    probes = table[table.reader == "probe"]
    pictures = []
    for variant, location, horizon in probes[["variant", "location", "horizon"]].drop_duplicates().to_numpy():
        cells = _probes(table, variant, location, horizon)
        if cells.accuracy.isna().all():
            continue
        name = f"{variant}_{location.replace('.', '_')}_h{horizon}"
        for kind, draw in {"heatmap": probe_heat_map, "lines": probe_lines}.items():
            path = folder / f"{kind}_{name}.png"
            with atomic_path(path) as temporary:
                draw(table, variant, location, horizon).savefig(temporary, dpi=150)
            pictures.append(path)
        baselines = table[(table.reader != "probe") & (table.horizon == horizon)]
        write_text(folder / f"{name}.csv", pd.concat([cells, baselines]).to_csv(index=False))
    return pictures


def _probes(table: pd.DataFrame, variant: str, location: str, horizon: int) -> pd.DataFrame:
    return table[
        (table.reader == "probe")
        & (table.variant == variant)
        & (table.location == location)
        & (table.horizon == horizon)
    ]
