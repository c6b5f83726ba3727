"""Plots of `probekit compare`: how similar every pair of layers is, and what probes read of the second LM."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probekit.probing.compare import READINGS, Comparison
from probekit.probing.results import main_metric
from probekit.reports.colours import colour_bar, colour_scale, colours_of_names
from probekit.reports.display import visible
from probekit.reports.drawing import NotebookFigure, draw_line
from probekit.reports.plot_probes import METRIC_LABELS

SHOWN = {"cka": "CKA", "procrustes": "Procrustes residual"}


def plot_comparison(comparison: Comparison) -> Figure:
    """Draws CKA and Procrustes residual of every pair of layers, and what probes read by layer.

    Args:
        comparison: What `probekit.compare` found.
    """
    panels = len(SHOWN) + (comparison.probes is not None)
    figure = NotebookFigure(figsize=(4.4 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels)
    for own, (metric, title) in zip(axes, SHOWN.items(), strict=False):
        draw_similarity(figure, own, comparison.similarity, metric)
        own.set_title(
            f"{title} (documents permuted: {comparison.similarity[f'{metric}_null'].mean():.2f})", fontsize=9
        )
        first, second = (visible(name) for name in comparison.names)
        own.set_xlabel(f"layer of {second}", parse_math=False)
        own.set_ylabel(f"layer of {first}", parse_math=False)
    if comparison.probes is not None:
        draw_readings(axes[-1], comparison.probes)
    rows = comparison.similarity.iloc[0]
    figure.suptitle(
        f"{rows.examples:,.0f} examples of {rows.documents:,.0f} documents or groups", fontsize=10
    )
    return figure


def draw_similarity(figure: Figure, axes: Axes, similarity: pd.DataFrame, metric: str) -> None:
    """Draws a measure of every pair of layers as a heat map, with crosses where it may be chance."""
    # A layer that does not vary keeps its place, empty.
    matrix = similarity.pivot_table(metric, "layer", "second_layer", dropna=False)
    scale = colour_scale(pd.Series([0.0, 1.0]))
    axes.pcolormesh(matrix.columns, matrix.index, matrix, cmap=scale.cmap, vmin=0, vmax=1)
    unclear = similarity[similarity[f"{metric}_p"] > 0.05]
    crosses = "; ×: as if documents were permuted" if len(unclear) else ""
    colour_bar(figure, axes, scale, similarity[metric], SHOWN[metric] + crosses)
    axes.plot(unclear.second_layer, unclear.layer, "x", color="0.7", markersize=3, label="_chance")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


def draw_readings(axes: Axes, probes: pd.DataFrame) -> None:
    """Draws what each reading tells of the labels by layer, of the first solver and horizon."""
    metric = main_metric(probes)
    cell = probes[(probes.solver == probes.solver.iloc[0]) & (probes.horizon == probes.horizon.iloc[0])]
    for name, colour in zip(READINGS, colours_of_names(len(READINGS)), strict=True):
        rows = cell[cell.reading == name].sort_values("layer")
        columns = {metric: "value", f"{metric}_low": "low", f"{metric}_high": "high"}
        draw_line(axes, rows.rename(columns=columns), "layer", name, colour, marker="o", markersize=3)
    axes.set(xlabel="layer of the first LM", ylabel=METRIC_LABELS[metric])
    axes.set_title(f"probes of {visible(probes.target.iloc[0])}", fontsize=9, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=False)
