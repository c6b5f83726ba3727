"""The picture of the geometry of activations: by layer, and by position where there are several."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probekit.reports.colours import colours_of_names
from probekit.reports.display import described
from probekit.reports.drawing import draw_line, panel_grid
from probekit.reports.tables_compare import at_nearest, line_name, lines_of

DRAWN = ("effective_rank", "participation_ratio", "anisotropy", "anisotropy_without", "norm", "rogue_share")
"""What has a panel."""


def plot_geometry(table: pd.DataFrame) -> Figure:
    """Draws every measure of a table of geometry by layer; thin lines are positions but the nearest.

    Args:
        table: What `probekit.geometry` returns, or `geometry` of the results of probes.
    """
    figure, panels = panel_grid(len(DRAWN), 3, 3.4, 2.7)
    lines = [*table.groupby(lines_of(table), sort=False)]
    for axes, measure in zip(panels, DRAWN, strict=True):
        columns = {measure: "value", f"{measure}_low": "low", f"{measure}_high": "high"}
        for (names, rows), colour in zip(lines, colours_of_names(len(lines)), strict=True):
            here = at_nearest(rows).rename(columns=columns).sort_values("layer")
            name = line_name(names, here) if axes is panels[0] else "_again"
            draw_line(axes, here, "layer", name, colour, marker="o", markersize=3)
            for _, other in rows.drop(here.index).groupby("position") if "position" in rows else ():
                ordered = other.sort_values("layer")
                axes.plot(ordered.layer, ordered[measure], color=colour, linewidth=0.6, alpha=0.6)
        axes.set_title(described(measure).label, fontsize=9)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for measure in ("effective_rank", "participation_ratio", "norm"):
        panels[DRAWN.index(measure)].set_yscale("log")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    one = table.iloc[0]
    title = f"{one.examples:,} examples of {one.groups:,} documents or groups, width {one.width:,}"
    figure.suptitle(title, fontsize=10)
    return figure
