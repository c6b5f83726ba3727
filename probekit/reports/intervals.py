"""Values with their intervals, a line for each: drawn and written, and the values of single seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes

COLOUR, SEED_COLOUR = "#1f4e79", "#9bb8d3"


def draw_intervals(
    axes: Axes, table: pd.DataFrame, names: Sequence[str], labels: Mapping[str, str] | None = None
) -> None:
    """Draws a line for each name, the first at the top.

    Args:
        axes: Where.
        table: Columns `name`, `seed` (missing over all seeds), `value`, `value_low` and `value_high`.
        names: Which lines, in their order; one that the table has not stays empty.
        labels: What names are called, if not by themselves.
    """
    for y, name in enumerate(names):
        rows = table[table.name == name]
        seeds, whole = rows[rows.seed.notna()], rows[rows.seed.isna()]
        axes.plot(seeds.value, [y] * len(seeds), "|", color=SEED_COLOUR, markersize=9, markeredgewidth=1.4)
        for value, low, high in whole[["value", "value_low", "value_high"]].to_numpy(float):
            errors = [[value - low], [high - value]]
            axes.errorbar([value], [y], xerr=errors, fmt="o", color=COLOUR, markersize=4.5, capsize=3)
            place = axes.get_yaxis_transform()
            axes.text(1.02, y, _numbers(value, low, high), transform=place, va="center", fontsize=8)
    axes.set_yticks(range(len(names)), [(labels or {}).get(name, name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _numbers(value: float, low: float, high: float) -> str:
    """A value and its interval, if it has one, to the digits that the interval's width leaves a meaning."""
    if math.isnan(low):
        return f"{value:.3g}".replace("-", "−")
    digits = 3 if high - low < 0.3 else 2 if high - low < 10 else 0
    shown = (f"{number:.{digits}f}".replace("-", "−") for number in (value, low, high))
    return "{} [{}, {}]".format(*shown)
