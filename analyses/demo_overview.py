"""Draws the demo in one picture: perplexity of every variant, and where the next action is read.

    python analyses/demo_overview.py runs/demo

The run has to be evaluated and probed, as `probekit demo` leaves it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from manifest import save_figure
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import probekit
from probekit.reports.figures import Panel, draw_heat_map


def draw_perplexity(axes: Axes, table: pd.DataFrame) -> None:
    """A dot with its interval for every variant, worst on top."""
    table = table.sort_values("perplexity").reset_index(drop=True)
    names = [
        f"{row.variant}\n({row.actions} actions)" if row.variant == "oracle" else row.variant
        for row in table.itertuples()
    ]
    errors = [table.perplexity - table.perplexity_low, table.perplexity_high - table.perplexity]
    axes.errorbar(table.perplexity, table.index, xerr=errors, fmt="o", color="#1f4e79", capsize=3)
    axes.set_yticks(table.index, names)
    axes.set_xlabel("test perplexity, 95 % interval")
    axes.set_title(f"{table.documents.iloc[0]} test documents", fontsize=10)
    axes.grid(axis="x", alpha=0.3)


def main() -> None:
    """Reads the run, draws, saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="an evaluated and probed run")
    parser.add_argument("--variant", default="none", help="whose activations the heat map shows (none)")
    parser.add_argument("--out", default="figures/demo_overview.png", type=Path)
    arguments = parser.parse_args()
    run = probekit.load_run(arguments.run)
    perplexity = pd.DataFrame(run.evaluation()["perplexity"])
    panel = Panel(arguments.variant, "hook_resid_post")
    cells = panel.cells(run.probes())
    if cells.empty:
        parser.error(f"{arguments.run} has no probes of {panel.title}")
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    draw_perplexity(left, perplexity)
    draw_heat_map(right, cells)
    star = "\n* the target's own action was added" if cells.injected.any() else ""
    right.set_title(panel.title + star, fontsize=10)
    numbers = pd.concat([perplexity.assign(panel="perplexity"), cells.assign(panel="probes")])
    path = save_figure(
        figure,
        numbers,
        arguments.out,
        script="analyses/demo_overview.py",
        settings={"variant": arguments.variant},
        runs=[run],
    )
    print(path)  # noqa: T201 - a script tells what it wrote


if __name__ == "__main__":
    main()
