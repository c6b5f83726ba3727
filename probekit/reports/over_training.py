"""What probes read against training steps: when a plan appears, by layer and by distance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probekit.errors import ProbekitError
from probekit.io import atomic_path
from probekit.probing.locations import label
from probekit.probing.over_training import TrainingProbes
from probekit.reports.figures import BASELINE_STYLES, METRICS, panels
from probekit.reports.plots import PREFERRED
from probekit.run.run import Run

BASELINES = ("prior", "bigram", "ceiling (tokens read)")
"""Readers that are the same at every step, as far as they are known."""

HEIGHT = 3.4
"""Inches that a panel is high."""


def over_training(
    table: pd.DataFrame, metric: str = "accuracy", location: str | None = None, solver: str | None = None
) -> pd.DataFrame:
    """What is drawn of a table of `probe_checkpoints`.

    Returns:
        A row for every step, reader, layer and distance: means over seeds of `value`, `low`, `high`,
        `validation_cross_entropy` and `documents`.

    Raises:
        ProbekitError: The metric or location is not there.
    """
    if metric not in METRICS:
        raise ProbekitError(f"metric is {metric!r}; it can be {', '.join(METRICS)}")
    there = [panel for panel in panels(table) if solver in (None, panel.solver)]
    asked = [panel for panel in there if location in (None, panel.location)]
    if not asked:
        known = ", ".join(sorted({f"{panel.location} ({panel.solver})" for panel in there}))
        raise ProbekitError(
            f"nothing was probed at {location!r} with {solver or 'any solver'}; there is {known}"
        )
    chosen = min(asked, key=lambda panel: (panel.location != PREFERRED["location"], panel.horizon))
    beside = chosen.baselines(table)
    rows = pd.concat([chosen.cells(table), beside[beside.reader.isin(BASELINES)]])
    bounds = {"value": metric, "low": f"{metric}_low", "high": f"{metric}_high"}
    bounds |= {"validation_cross_entropy": "validation_cross_entropy"}
    parts = rows.assign(**{name: rows.get(column, np.nan) for name, column in bounds.items()})
    cell = parts.groupby(["step", "reader", "layer", "distance"], dropna=False, sort=True)
    means = cell[[*bounds, "documents"]].mean().reset_index()
    return means.assign(metric=metric, variant=chosen.variant, location=chosen.location, solver=chosen.solver)


def plot_over_training(
    run: Run, stage: str = "lm", metric: str = "accuracy", location: str | None = None
) -> Figure:
    """A metric of probes against training steps.

    By layer at the nearest distance, and by distance at the best layer, which is chosen on validation
    documents at the last step. Bands are 95 % intervals from resampling documents. Below stand the stage's
    losses. The bigram and the ceiling, which know less the farther they are, stand on the left alone.

    Args:
        run: A run whose checkpoints were probed.
        stage: Of which stage.
        metric: One of accuracy, top5, bits, gain, selectivity, compression.
        location: Where; None: the residual stream behind each block, if it was probed.

    Raises:
        ProbekitError: The checkpoints were not probed, or not so.
    """
    numbers = over_training(run.probes_over_training(stage), metric, location)
    return draw_over_training(numbers, run.losses_of(stage))


def save_over_training(results: TrainingProbes) -> Path:
    """Draws the accuracy at the first location beside the results; returns the picture's path."""
    numbers = over_training(results.table)
    picture = results.path.with_suffix(".png")
    with atomic_path(picture) as temporary:
        draw_over_training(numbers, results.losses).savefig(temporary, dpi=150)
    return picture


def draw_over_training(numbers: pd.DataFrame, losses: pd.DataFrame) -> Figure:
    """The figure of `plot_over_training`.

    Args:
        numbers: Rows of `over_training`.
        losses: Losses of the stage by step.
    """
    probes = numbers[(numbers.reader == "probe") & numbers.value.notna()]
    near, last = probes.distance.min(), probes[probes.step == probes.step.max()]
    best = last.loc[last[last.distance == near].validation_cross_entropy.idxmin()].layer
    figure = Figure(figsize=(10.4, HEIGHT + 2.0), layout="constrained")
    above = figure.subplots(2, 2, sharex=True, height_ratios=[HEIGHT, 1.6])
    for axes, below, split, own, title in (
        (*above[:, 0], "layer", probes[probes.distance == near], f"by layer, distance {near}"),
        (*above[:, 1], "distance", probes[probes.layer == best], f"by distance, layer {int(best)}"),
    ):
        steps = _lines(axes, own, split)
        known = numbers[(numbers.reader != "probe") & (numbers.distance == near)]
        if split == "distance":  # others know less the farther they are
            known = known[known.reader == "prior"]
        _baselines(axes, known[known.step == known.step.max()])
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(METRICS[numbers.metric.iloc[0]])
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
        axes.legend(fontsize=7, frameon=False, ncols=3, loc="upper left")
        _losses(below, losses)
        below.set_xscale("symlog", linthresh=1, linscale=0.5)
        below.set_xlim(0, steps.max())
        below.set_xlabel("training steps")
    one = numbers.iloc[0]
    figure.suptitle(
        f"{one.variant}: {label(one.location)}, {one.solver}, {int(probes.documents.max()):,} test documents",
        fontsize=10,
        parse_math=False,
    )
    return figure


def _lines(axes: Axes, rows: pd.DataFrame, split: str) -> np.ndarray:
    """A line for each value of a column; returns the steps."""
    values = sorted(rows[split].unique())
    for value, colour in zip(values, sns.color_palette("viridis", len(values)), strict=True):
        own = rows[rows[split] == value].sort_values("step")
        axes.plot(own.step, own.value, "-o", markersize=3, color=colour, label=f"{split} {int(value)}")
        axes.fill_between(own.step, own.low, own.high, color=colour, alpha=0.15, linewidth=0)
    return rows.step.to_numpy(float)


def _baselines(axes: Axes, rows: pd.DataFrame) -> None:
    for reader, value in rows.dropna(subset="value").set_index("reader").value.items():
        colour, style = BASELINE_STYLES[str(reader)]
        axes.axhline(value, color=colour, linestyle=style, linewidth=1, label=str(reader))


def _losses(axes: Axes, losses: pd.DataFrame) -> None:
    trained, validated = losses[losses.loss.notna()], losses[losses.validation_loss.notna()]
    axes.plot(trained.step, trained.loss, color="0.6", linewidth=1, label="training")
    axes.plot(validated.step, validated.validation_loss, "ko", markersize=3, label="validation")
    axes.set_ylabel("loss (nats)")
    axes.legend(fontsize=7, frameon=False)
