"""Plots of transfer: which value's probe reads which value, as a matrix, and by layer."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probekit.probing.results import main_metric
from probekit.probing.transfer import ALL
from probekit.reports.colours import colour_scale, colours_of_names
from probekit.reports.display import number, shortened, visible
from probekit.reports.drawing import NotebookFigure, save_png
from probekit.reports.plot_probes import METRIC_LABELS, Panel, panels
from probekit.reports.tables import transfer_cells

MOST_NUMBERS = 12
"""Matrices of more values than this have no numbers in them."""

LOWEST = -1.0
"""Colours go no lower: R² of another value can be far below zero."""


def draw_transfer(
    transfer: pd.DataFrame, panel: Panel, best: pd.DataFrame, metric: str | None = None
) -> Figure:
    """Draws what probes fitted on each value read of every other, at a panel's best cell and by layer.

    Args:
        transfer: The table of transfer.
        panel: Whose probes.
        best: The best cells of the table of probes.
        metric: One of `METRIC_LABELS`; None: AUROC of two classes, R² of numbers, else accuracy.
    """
    metric = metric or main_metric(transfer)
    cells = panel.cells(transfer.assign(reader="probe"))
    here = transfer_cells(cells, best)
    layers = cells[cells.position.isin(here.position)]
    count = here.tested_on.nunique()
    several = len(set(layers.layer)) > 1
    side = max(2.6, 0.5 * count + 1.6)
    figure = NotebookFigure(figsize=(side + 1 + 4.2 * several, side + 0.9), layout="constrained")
    axes = figure.subplots(1, 1 + several, squeeze=False)[0]
    _draw_matrix(axes[0], here, metric, numbers=count <= MOST_NUMBERS)
    if several:
        _draw_layers(axes[1], layers, metric)
    place = f"layer {int(here.layer.iloc[0])}, position {here.position.iloc[0]}"
    title = f"{panel.variant}: {panel.title}\n{place}; transfer over {visible(here.by.iloc[0])}"
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def _draw_matrix(axes: Axes, here: pd.DataFrame, metric: str, *, numbers: bool) -> None:
    """Rows are what probes were fitted on, columns what they were tested on; means over seeds."""
    values = list(dict.fromkeys(here.tested_on))
    matrix = here.pivot_table(metric, "fitted_on", "tested_on", dropna=False).loc[[*values, ALL], values]
    scale = colour_scale(here[metric].clip(lower=LOWEST))
    text = matrix.map(lambda value: number(value, 2)) if numbers else False
    with mpl.rc_context({"font.size": 8}):
        bar = {"label": METRIC_LABELS[metric]}
        sns.heatmap(matrix, annot=text, fmt="", ax=axes, cmap=scale.cmap, norm=scale.norm, cbar_kws=bar)
    axes.set(xlabel="tested on", ylabel="fitted on")
    for axis, names in ((axes.xaxis, values), (axes.yaxis, [*values, ALL])):
        axis.set_ticks(
            [place + 0.5 for place in range(len(names))],
            [visible(shortened(name, 24)) for name in names],
            parse_math=False,
        )
    axes.tick_params(axis="y", rotation=0)
    axes.tick_params(axis="x", rotation=90)


def _draw_layers(axes: Axes, layers: pd.DataFrame, metric: str) -> None:
    """Means over tested values, by what the probes were fitted on."""
    kinds = {
        "the same value": layers.fitted_on == layers.tested_on,
        "another value": (layers.fitted_on != layers.tested_on) & (layers.fitted_on != ALL),
        ALL: layers.fitted_on == ALL,
    }
    for (name, chosen), colour in zip(kinds.items(), colours_of_names(len(kinds)), strict=True):
        means = layers[chosen].groupby("layer")[metric].mean()
        axes.plot(
            means.index.to_numpy(int),
            means.to_numpy(float),
            marker="o",
            markersize=4,
            color=colour,
            label=name,
        )
    axes.set(xlabel="layer", ylabel=f"mean {METRIC_LABELS[metric]}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(title="fitted on", fontsize=8, frameon=False)


def save_transfer_figures(transfer: pd.DataFrame, best: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws every panel of a table of transfer into a folder; the numbers are in the table itself."""
    return [
        save_png(draw_transfer(transfer, panel, best), folder / f"transfer_{panel.name}.png")
        for panel in panels(transfer.assign(reader="probe"))
    ]
