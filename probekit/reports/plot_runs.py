"""Plots of what was trained and evaluated: losses by step, perplexities, sweeps over a setting."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from probekit.config import setting_names
from probekit.errors import ProbekitError
from probekit.reports.colours import colours_of_names
from probekit.reports.drawing import (
    BOUNDS,
    NotebookFigure,
    draw_intervals,
    draw_line,
    outer_legend,
    panel_grid,
)
from probekit.run.run import Run

STAGES = {"lm": "LM", "planner": "planner", "adapter": "adapters", "depth": "depth ensemble"}
"""Titles of the kinds of training stages."""


def plot_training(run: Run) -> Figure:
    """Plots losses by step, a panel for each kind of stage; dots are losses on validation documents.

    Training losses are moving averages over a twentieth of the logged rows.

    Raises:
        ProbekitError: The run has no training losses.
    """
    metrics = run.metrics()
    if metrics.empty or "loss" not in metrics:
        raise ProbekitError(f"{run.folder} has no training losses; nothing in it was trained")
    metrics = metrics.assign(kind=metrics.stage.str.split("/").str[0])
    kinds = [kind for kind in STAGES if kind in set(metrics.kind)]
    figure, grid = panel_grid(len(kinds), 2, 4.6, 2.7)
    for axes, kind in zip(grid, kinds, strict=True):
        stages = [*metrics[metrics.kind == kind].groupby("stage", sort=False)]
        for (stage, rows), colour in zip(stages, colours_of_names(len(stages)), strict=True):
            losses = rows[rows.loss.notna()]
            smooth = losses.loss.rolling(max(1, len(losses) // 20), min_periods=1, center=True).mean()
            axes.plot(losses.step, smooth, color=colour, linewidth=1.3, label=str(stage).split("/")[-1])
            if "validation_loss" in rows:
                steps, losses = rows.step, rows.validation_loss
                axes.plot(steps, losses, "o", color=colour, markersize=3.5, label="_validation")
        axes.set(xlabel="step", ylabel="loss (nats)")
        axes.set_title(STAGES[kind], fontsize=10)
        axes.grid(color="0.92")
        if len(stages) > 1:
            axes.legend(fontsize=7, frameon=False, ncols=2)
    return figure


def plot_perplexity(run: Run) -> Figure:
    """Plots the test perplexity of everything that was evaluated, with 95 % intervals.

    Raises:
        ProbekitError: The run was not evaluated.
    """
    table = pd.DataFrame(run.evaluation()["perplexity"])
    actions = " (" + table.actions + " actions)"
    names = table.variant + actions.where(table.variant == "oracle", "")
    values = table.rename(columns=lambda name: name.replace("perplexity", "value"))
    figure = NotebookFigure(figsize=(7.6, 0.8 + 0.32 * len(table)), layout="constrained")
    axes = figure.subplots()
    draw_intervals(axes, values.assign(name=names, seed=None), list(names))
    axes.set_xlabel(f"test perplexity, {table.documents.iloc[0]:,} documents (95 % intervals)")
    return figure


def plot_sweep(table: pd.DataFrame, metric: str = "perplexity") -> Figure:
    """Plots a metric against the setting that was swept, a line for each variant.

    Thick lines are means over seeds with 95 % intervals over documents, thin lines are single seeds. Of
    generated text, the longest is drawn.

    Args:
        table: A sweep's results, `sweep.table()`.
        metric: One of the table's metrics.

    Raises:
        ProbekitError: The sweep is not over one setting, or the metric was not measured.
    """
    settings = [name for name in table if name in setting_names() and name != "seed"]
    if len(settings) != 1:
        over = ", ".join(settings) or "nothing"
        raise ProbekitError(f"the sweep is over {over}; only a sweep over one setting can be plotted")
    (setting,) = settings
    known = list(dict.fromkeys(table.metric))
    if metric not in known:
        raise ProbekitError(f"metric is {metric!r}, but the sweep has {', '.join(known)}")
    rows = table[table.metric == metric].sort_values(setting, kind="stable").rename(columns=BOUNDS)
    rows = rows[rows.length == rows.groupby("texts").length.transform("max")]
    lines = [*rows.groupby(["variant", "actions", "texts"], sort=False)]
    figure = NotebookFigure(figsize=(7.6, 3.8), layout="constrained")
    axes = figure.subplots()
    palette = colours_of_names(len(lines))
    for ((variant, actions, texts), own), colour in zip(lines, palette, strict=True):
        seeds = [seed for _, seed in own[own.seed.notna()].groupby("seed")]
        for seed in seeds if len(seeds) > 1 else ():
            axes.plot(seed[setting], seed.value, color=colour, linewidth=0.6, alpha=0.6, label="_seed")
        name = f"{variant} ({actions} actions)" if variant == "oracle" else str(variant)
        name = name if metric == "perplexity" else f"{name}, {texts}"
        draw_line(axes, own[own.seed.isna()], setting, name, colour, marker="o", markersize=4)
    axes.set_title(f"{rows.documents.max():,} test documents, {rows.seed.nunique()} seeds", fontsize=10)
    axes.set_xlabel(setting)
    axes.set_ylabel(metric.replace("_", " "))
    axes.grid(color="0.92")
    outer_legend(figure)
    return figure
