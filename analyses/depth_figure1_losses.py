"""Figure 1 of arXiv 2410.13077: training losses of every late layer, without and with distillation.

    python analyses/depth_figure1_losses.py runs/depth
    python analyses/depth_figure1_losses.py --preset demo --seeds 3 --runs runs/depth

A folder is a single run, or a sweep whose seeds of each member are taken together. With `--preset` the sweep
is trained or continued in `RUNS/PRESET` first, with one member for each of `--tunings`. Lines are
moving averages over logged rows of the mean over seeds, thin lines are single seeds. A layer's loss is that
of its own norm and the LM's head on the batch of the step; no loss that is shown includes distillation.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from shared.depth import MEMBER_STYLES, draw_curve, draw_over_steps, layer_name, layer_style, training_curves
from shared.script import Groups, run_script

from probekit.config import MemberName
from probekit.errors import ProbekitError

PANELS: dict[MemberName, str] = {"ensemble": "without distillation", "distilled": "with distillation"}
REFERENCE: MemberName = "plain"


def curves(groups: Groups, window: int) -> pd.DataFrame:
    """Collects the losses of the members of all groups; see `training_curves`.

    Raises:
        ProbekitError: A run lacks a member.
    """
    parts = []
    for name, runs in groups.items():
        for run in runs:
            if missing := [member for member in PANELS if member not in run.config.depth.members]:
                raise ProbekitError(
                    f"{run.folder} has depth.members {', '.join(run.config.depth.members)}; "
                    f"{missing[0]} is needed too"
                )
        with_reference = [REFERENCE] if all(REFERENCE in run.members for run in runs) else []
        for member in (*with_reference, *PANELS):
            table = training_curves(runs, member, window)
            table = table[table.quantity.isin(["ensemble_loss", "layer_loss"])]
            parts.append(table.assign(runs=name, member=member))
    return pd.concat(parts, ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """Draws a row of two panels for each group."""
    groups = list(dict.fromkeys(table.runs))
    figure = Figure(figsize=(11, 3.4 * len(groups) + 0.4), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False, sharex=True, sharey="row")
    for row, group in zip(panels, groups, strict=True):
        for axes, (member, title) in zip(row, PANELS.items(), strict=True):
            own = table[(table.runs == group) & table.member.isin([member, REFERENCE])]
            ensemble = own[own.quantity == "ensemble_loss"]
            layers = own[(own.quantity == "layer_loss") & (own.member == member)]
            for layer, rows in layers.groupby("layer"):
                draw_curve(axes, rows, layer_name(int(str(layer))), layer_style(int(str(layer))))
            draw_curve(axes, ensemble[ensemble.member == member], "ensemble", MEMBER_STYLES["ensemble"])
            if len(reference := ensemble[ensemble.member == REFERENCE]):
                draw_curve(axes, reference, "plain (no ensemble)", MEMBER_STYLES[REFERENCE])
            axes.grid(color="0.92")
            axes.set_title(f"{group}: {title}" if len(groups) > 1 else title, fontsize=11)
        row[0].set_ylabel("training loss (nats per token)")
    for axes in panels[-1]:
        axes.set_xlabel("step")
    handles, labels = panels[0, 1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def main() -> None:
    """Trains what is missing, draws, saves."""
    draw_over_steps("depth_figure1_losses", __doc__, curves, draw)


if __name__ == "__main__":
    run_script(main)
