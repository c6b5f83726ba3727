"""Draws the demo in one picture: perplexity of every variant, and where the next action can be read.

    python analyses/demo_overview.py runs/demo

The run has to be evaluated and probed, as after `probekit demo`.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shared.script import run_script, save_figure, script_parser

import probekit
from probekit.errors import ProbekitError
from probekit.reports.colours import COLOUR, colour_bar
from probekit.reports.plot_probes import (
    INJECTED,
    METRIC_LABELS,
    Panel,
    draw_heat_map,
    mean_over_seeds,
    probe_scale,
)


def draw_perplexity(axes: Axes, table: pd.DataFrame) -> None:
    """Draws a dot with its interval for every variant, the worst at the top."""
    table = table.sort_values("perplexity").reset_index(drop=True)
    oracle = table.variant + "\n(" + table.actions + " actions)"
    names = table.variant.where(table.variant != "oracle", oracle).tolist()
    errors = [table.perplexity - table.perplexity_low, table.perplexity_high - table.perplexity]
    axes.errorbar(table.perplexity, table.index, xerr=errors, fmt="o", color=COLOUR, capsize=3)
    axes.set_yticks(table.index, names)
    axes.set_xlabel("test perplexity, 95 % interval")
    axes.set_title(f"{table.documents.iloc[0]} test documents", fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def main() -> None:
    """Reads the run, draws, saves."""
    parser = script_parser(__doc__, "figures/demo_overview.png")
    parser.add_argument("run", help="an evaluated and probed run")
    parser.add_argument("--variant", default="none", help="whose activations the heat map shows (none)")
    given = parser.parse_args()
    run = probekit.load_run(given.run)
    perplexity = pd.DataFrame(run.evaluation()["perplexity"])
    panel = Panel(given.variant, "hook_resid_post")
    cells = panel.cells(run.probes())
    if cells.empty:
        raise ProbekitError(f"{given.run} has no probes of {panel.variant}: {panel.title}")
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    draw_perplexity(left, perplexity)
    means = mean_over_seeds(cells, "accuracy")
    scale = probe_scale([means], "accuracy")
    draw_heat_map(right, cells, "accuracy", scale)
    colour_bar(figure, right, scale, means.value, METRIC_LABELS["accuracy"])
    title = f"{panel.variant}: {panel.title}"
    right.set_title(title + (f"\n* {INJECTED}" if cells.injected.any() else ""), fontsize=10)
    numbers = pd.concat([perplexity.assign(panel="perplexity"), cells.assign(panel="probes")])
    save_figure(figure, numbers, given.out, {"variant": given.variant}, [run])


if __name__ == "__main__":
    run_script(main)
