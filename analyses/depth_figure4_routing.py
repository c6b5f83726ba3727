"""Figure 4 of arXiv 2410.13077: how sparse the routing gets in training, and what weight each layer has.

    python analyses/depth_figure4_routing.py runs/depth --window 15
    python analyses/depth_figure4_routing.py --preset demo --seeds 3 --runs runs/depth

A folder is a single run, or a sweep whose seeds of each member are taken together. With `--preset` the sweep
is trained or continued in `RUNS/PRESET` first, with one member for each of `--tunings`. Sparsity is
1 minus the entropy of a token's weights as a share of its maximum, averaged over tokens: 0 where all layers
have the same weight, 1 where one has all of it. Lines are moving averages over logged rows of the mean over
seeds, thin lines are single seeds.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shared.depth import (
    MEMBER_STYLES,
    draw_curve,
    draw_over_steps,
    layer_name,
    layer_style,
    members_of,
    training_curves,
)
from shared.script import Groups, run_script

COPIES = "repeated"
"""The member whose layers are all the last one."""


def routing(groups: Groups, window: int) -> pd.DataFrame:
    """Collects sparsity and weights of the members that have a router; see `training_curves`."""
    parts = []
    for name, runs in groups.items():
        needed = "a router, which members repeated, ensemble and distilled have from depth.layers 2 on"
        each = [members_of(run, reads=["repeated", "late"], needed=needed) for run in runs]
        for member in each[0]:
            table = training_curves(runs, member, window)
            table = table[table.quantity.isin(["sparsity", "weight"])]
            parts.append(table.assign(runs=name, member=member))
    return pd.concat(parts, ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """Draws a row for each group: sparsity of all members, then the weights of each."""
    groups, members = (list(dict.fromkeys(table[column])) for column in ("runs", "member"))
    size = (3.4 * (1 + len(members)) + 1.6, 3.0 * len(groups) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(groups), 1 + len(members), squeeze=False, sharex=True, sharey=True)
    for (first, *others), group in zip(panels, groups, strict=True):
        own = table[table.runs == group]
        for member, rows in own[own.quantity == "sparsity"].groupby("member", sort=False):
            draw_curve(first, rows, str(member), MEMBER_STYLES[str(member)])
        for axes, member in zip(others, members, strict=True):
            _draw_weights(axes, own[(own.member == member) & (own.quantity == "weight")], member)
        first.set_title("sparsity of the routing", fontsize=11)
        first.set_ylabel(group if len(groups) > 1 else "share", fontsize=11)
    for axes in panels.flat:
        axes.set_ylim(-0.03, 1.03)
        axes.grid(color="0.92")
        if axes.lines:
            axes.legend(fontsize=9, frameon=False)
    for axes in panels[-1]:
        axes.set_xlabel("step")
    return figure


def _draw_weights(axes: Axes, table: pd.DataFrame, member: str) -> None:
    for layer, rows in table.groupby("layer"):
        number = int(str(layer))
        if member == COPIES:
            dashes = (0, (2 * -number, 1.5)) if number < -1 else "-"
            draw_curve(axes, rows, f"copy {-number} of the last", layer_style(-1) | {"linestyle": dashes})
        else:
            draw_curve(axes, rows, layer_name(number), layer_style(number))
    axes.set_title(f"{member}: mean weight", fontsize=11)


def main() -> None:
    """Trains what is missing, draws, saves."""
    draw_over_steps("depth_figure4_routing", __doc__, routing, draw)


if __name__ == "__main__":
    run_script(main)
