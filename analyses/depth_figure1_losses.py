"""Figure 1 of arXiv 2410.13077: training losses of every late layer, without and with distillation.

    python analyses/depth_figure1_losses.py runs/depth
    python analyses/depth_figure1_losses.py --preset demo --seeds 3 --runs runs/depth

A folder is a single run, or a sweep, of which the seeds of each member are taken together. With `--preset`
the sweep is trained first, into `RUNS/PRESET`, or gone on with: one member for each of `--tunings`. Lines are
moving averages over logged rows of the mean over seeds, thin lines are single seeds. A layer's loss is by its
own norm and the LM's head, on the batch of the step; distillation is no part of any loss that is shown.
"""

from __future__ import annotations

import pandas as pd
from late_layers import (
    MEMBER_STYLES,
    Groups,
    draw_line,
    draw_over_steps,
    layer_name,
    layer_style,
    require_members,
    training_curves,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scripts import run_script

from probekit.config import MemberName

PANELS: dict[MemberName, str] = {"ensemble": "without distillation", "distilled": "with distillation"}
REFERENCE: MemberName = "plain"


def curves(groups: Groups, window: int) -> pd.DataFrame:
    """Losses of the members of all groups; columns `runs` and `member` tell them apart."""
    parts = []
    for name, runs in groups.items():
        for run in runs:
            require_members(run, [*PANELS])
        with_reference = [REFERENCE] if all(REFERENCE in run.members for run in runs) else []
        for member in (*with_reference, *PANELS):
            table = training_curves(runs, member, window)
            table = table[table.quantity.isin(["ensemble_loss", "layer_loss"])]
            parts.append(table.assign(runs=name, member=member))
    return pd.concat(parts, ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """A row of two panels for each group."""
    groups = list(dict.fromkeys(table.runs))
    figure = Figure(figsize=(11, 3.4 * len(groups) + 0.4), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False, sharex=True, sharey="row")
    for row, group in zip(panels, groups, strict=True):
        own = table[table.runs == group]
        for axes, (member, title) in zip(row, PANELS.items(), strict=True):
            _draw_panel(axes, own, member)
            axes.set_title(f"{group}: {title}" if len(groups) > 1 else title, fontsize=11)
        row[0].set_ylabel("training loss (nats per token)")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    handles, labels = panels[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def _draw_panel(axes: Axes, table: pd.DataFrame, member: str) -> None:
    own = table[table.member == member]
    for layer, rows in own[own.quantity == "layer_loss"].groupby("layer"):
        number = int(str(layer))
        draw_line(axes, rows, layer_name(number), layer_style(number))
    draw_line(axes, own[own.quantity == "ensemble_loss"], "ensemble", MEMBER_STYLES["ensemble"])
    reference = table[(table.member == REFERENCE) & (table.quantity == "ensemble_loss")]
    if len(reference):
        draw_line(axes, reference, "plain (no ensemble)", MEMBER_STYLES[REFERENCE])
    axes.grid(color="0.92")


def main() -> None:
    """Trains what is missing, draws, saves."""
    draw_over_steps("depth_figure1_losses", __doc__, curves, draw)


if __name__ == "__main__":
    run_script(main)
