"""Figures from results, each a picture with the numbers behind it (CSV) beside it."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from probekit.storage import atomic_path, write_text

BASELINE_STYLES = {
    "prior": ("0.55", ":"),
    "bigram": ("#b35900", "--"),
    "planner": ("#7b3294", "-."),
    "ceiling (words)": ("black", "-"),
}
"""Colour and line of the readers that need no activation."""


def probe_heat_map(table: pd.DataFrame, variant: str, location: str, horizon: int = 1) -> Figure:
    """Accuracy of the probes of one location by layer and distance.

    Cells are annotated; those where the target's own action was injected carry a star, empty ones a dash.
    """
    cells = _probes(table, variant, location, horizon)
    accuracy = cells.pivot_table(index="layer", columns="distance", values="accuracy", dropna=False)
    marks = cells.assign(
        text=[
            "–" if pd.isna(row.accuracy) else f"{row.accuracy:.2f}{'*' if row.injected else ''}"
            for row in cells.itertuples()
        ]
    ).pivot(index="layer", columns="distance", values="text")
    accuracy, marks = (
        frame.sort_index(ascending=False).sort_index(axis=1, ascending=False) for frame in (accuracy, marks)
    )
    accuracy.index = accuracy.index.astype(int)
    figure = Figure(
        figsize=(1.8 + 0.75 * len(accuracy.columns), 1.6 + 0.45 * len(accuracy)), layout="constrained"
    )
    axes = figure.subplots()
    sns.heatmap(
        accuracy,
        annot=marks.reindex_like(accuracy.set_axis(marks.index)).to_numpy(),
        fmt="",
        cmap="viridis",
        vmin=0.0,
        ax=axes,
        cbar_kws={"label": "test accuracy"},
    )
    axes.set_xlabel("distance: tokens before the target sentence begins")
    axes.set_ylabel("layer")
    star = "   (* the target's own action is injected here)" if cells.injected.any() else ""
    axes.set_title(f"{variant}: {location}, horizon {horizon}{star}", fontsize=10)
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
            line.distance,
            line.accuracy,
            color=colour,
            marker="o",
            markersize=3.5,
            label=f"layer {int(layer)}",
        )
        axes.fill_between(
            line.distance, line.accuracy_low, line.accuracy_high, color=colour, alpha=0.15, linewidth=0
        )
    for reader, (colour, style) in BASELINE_STYLES.items():
        line = table[(table.reader == reader) & (table.horizon == horizon)].sort_values("distance")
        if len(line):
            axes.plot(line.distance, line.accuracy, color=colour, linestyle=style, label=reader)
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
