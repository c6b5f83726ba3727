"""Plots of probes over training: a metric against the steps of the checkpoints, above the losses."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from probekit.config import nearest, reading_order
from probekit.errors import ProbekitError
from probekit.models.locations import label
from probekit.probing.results import main_metric, validation_loss
from probekit.reports.colours import colours_in_order
from probekit.reports.drawing import NotebookFigure, draw_line
from probekit.reports.plot_probes import BASELINE_STYLES, METRIC_LABELS, PREFERRED, check_metric, panels
from probekit.run.run import Run

BESIDE = ("prior", "bigram", "ceiling (tokens read)")
"""Baselines drawn beside probes over training; they are the same at every step."""


def plot_over_training(
    run: Run, stage: str = "lm", metric: str | None = None, location: str | None = None
) -> Figure:
    """Plots a metric of probes against training steps.

    Left, by layer at the nearest position; right, by position at the best layer, which is chosen on
    validation documents at the last step. Bands are 95 % intervals from resampling documents. Below are the
    stage's losses, if it was trained here. The bigram and the ceiling, which depend on the position, are
    drawn on the left alone.

    Args:
        run: A run whose checkpoints were probed.
        stage: The stage of training.
        metric: As in `plot_probes`.
        location: Where; None: the residual stream after each block, if it was probed.

    Raises:
        ProbekitError: The checkpoints were not probed, or not in this way.
    """
    numbers = over_training_numbers(run.probes_over_training(stage), metric, location)
    return draw_over_training(numbers, run.losses_of(stage))


def over_training_numbers(
    table: pd.DataFrame, metric: str | None = None, location: str | None = None, solver: str | None = None
) -> pd.DataFrame:
    """Collects the numbers of `plot_over_training` from a table of `probe_checkpoints`.

    Returns:
        A row for each step, reader, layer and position: means over seeds of `value`, `low`, `high`,
        `validation_loss` and `documents`.

    Raises:
        ProbekitError: The metric or location was not probed.
    """
    metric = metric or main_metric(table)
    check_metric(metric, table)
    known = [panel for panel in panels(table) if solver in (None, panel.solver)]
    asked = [panel for panel in known if location in (None, panel.location)]
    if not asked:
        found = ", ".join(sorted({f"{panel.location} ({panel.solver})" for panel in known}))
        raise ProbekitError(
            f"nothing was probed at {location!r} with {solver or 'any solver'}; there is {found}"
        )
    chosen = min(asked, key=lambda panel: (panel.location != PREFERRED["location"], panel.horizon))
    baselines = chosen.baselines(table)
    rows = pd.concat([chosen.cells(table), baselines[baselines.reader.isin(BESIDE)]])
    columns = {"value": metric, "low": f"{metric}_low", "high": f"{metric}_high"}
    rows = rows.assign(**{name: rows.get(column, np.nan) for name, column in columns.items()})
    rows["validation_loss"] = validation_loss(rows)
    cell = rows.groupby(["step", "reader", "layer", "position"], dropna=False, sort=True)
    means = cell[[*columns, "validation_loss", "documents"]].mean().reset_index()
    return means.assign(metric=metric, variant=chosen.variant, location=chosen.location, solver=chosen.solver)


def draw_over_training(numbers: pd.DataFrame, losses: pd.DataFrame) -> Figure:
    """Draws `over_training_numbers` above the losses of the stage by step, if there are any."""
    probes = numbers[(numbers.reader == "probe") & numbers.value.notna()]
    near, last = nearest(probes.position), probes[probes.step == probes.step.max()]
    best = last.loc[last[last.position == near].validation_loss.idxmin()].layer
    heights = [3.4, 1.6][: 2 if len(losses) else 1]
    figure = NotebookFigure(figsize=(10.4, 0.4 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), 2, sharex=True, height_ratios=heights, squeeze=False)
    for (axes, *below), by, own, title in (
        (grid[:, 0], "layer", probes[probes.position == near], f"by layer, position {near}"),
        (grid[:, 1], "position", probes[probes.layer == best], f"by position, layer {int(best)}"),
    ):
        values = sorted(own.layer.unique()) if by == "layer" else reading_order(own.position)[::-1]
        for value, colour in zip(values, colours_in_order(len(values)), strict=True):
            rows = own[own[by] == value].sort_values("step")
            draw_line(axes, rows, "step", f"{by} {value}", colour, marker="o", markersize=3)
        readers = numbers[(numbers.position == near) & (numbers.step == numbers.step.max())]
        # On the right, positions differ: only the prior does not depend on them.
        readers = readers[readers.reader.isin(BESIDE if by == "layer" else ["prior", "mean"])]
        for reader, value in readers.dropna(subset="value").set_index("reader").value.items():
            colour, style = BASELINE_STYLES[str(reader)]
            axes.axhline(value, color=colour, linestyle=style, linewidth=1, label=str(reader))
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(METRIC_LABELS[numbers.metric.iloc[0]])
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
        axes.legend(fontsize=7, frameon=False, ncols=3, loc="upper left")

        for lower in below:
            trained, validated = losses[losses.loss.notna()], losses[losses.validation_loss.notna()]
            lower.plot(trained.step, trained.loss, color="0.6", linewidth=1, label="training")
            lower.plot(validated.step, validated.validation_loss, "ko", markersize=3, label="validation")
            lower.legend(fontsize=7, frameon=False)
            lower.set_ylabel("loss (nats)")
        lowest = below[-1] if below else axes
        lowest.set_xscale("symlog", linthresh=1, linscale=0.5)
        first, final = own.step.min(), own.step.max()
        lowest.set_xlim(first if first < final else 0, max(1, final))
        lowest.set_xlabel("training steps")
    one = numbers.iloc[0]
    title = (
        f"{one.variant}: {label(one.location)}, {one.solver}, {int(probes.documents.max()):,} test documents"
    )
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
