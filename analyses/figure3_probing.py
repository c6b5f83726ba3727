"""Figure 3: what linear probes read of the next action, by variant, location, layer and position.

    python analyses/figure3_probing.py runs/demo
    python analyses/figure3_probing.py runs/seed0 runs/seed1 --variants none soft random --metric bits

Above, a heat map for each variant (column) and location (row), layers by positions, all on one colour scale
that spans the cells that are not injected. A star marks injected cells, where the target's own action was
added at or below the point that is read, a dash those with too few examples.

Below, for each location the metric by position: a line for each variant at the layer that is best on
validation documents (lowest mean cross-entropy over the positions at which no layer is injected), or a line
for each layer if there is one variant. Bands are 95 % intervals from resampling test documents, hollow points
are injected, the variant with random weights is dashed, lines without points are baselines and ceilings.

Runs that differ only in their seed, and several seeds of a run, are averaged: the mean value, the mean of the
bounds of the intervals, and a thin line for each seed. The CSV has them one by one. Other runs are drawn side
by side; all must have the same corpus, since their scores could not be compared otherwise.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from shared.script import run_script, save_figure, script_parser

import probekit
from probekit.errors import ProbekitError
from probekit.models.locations import LABELS, label, per_layer
from probekit.models.mixing import VARIANTS
from probekit.reports.colours import colour_bar, colours_of_names
from probekit.reports.plot_probes import (
    METRIC_LABELS,
    POSITION,
    Panel,
    best_layer,
    draw_baselines,
    draw_curve,
    draw_heat_map,
    draw_layers,
    mean_over_seeds,
    position_axis,
    probe_scale,
)
from probekit.run.run import Run

RUN_APART = {"seed", "device", "probe", "evaluation"}
"""Settings in which repetitions of a run may differ."""


def read(runs: Sequence[Run]) -> pd.DataFrame:
    """Reads the results of all runs.

    Returns:
        The tables, concatenated, with the columns `run`, the run's folder, and `kind`: empty if the runs are
        repetitions of one another, else the folder of the first of its repetitions.

    Raises:
        ProbekitError: The runs have the same name, or different corpora.
    """
    names = [run.folder.name for run in runs]
    if len(set(names)) < len(names):
        raise ProbekitError(f"the runs' folders need names of their own, not {', '.join(names)}")
    if len({run.corpus.facts["fingerprint"] for run in runs}) > 1:
        raise ProbekitError("the runs have different corpora: their probes cannot be compared in one figure")
    settings = [run.config.model_dump(mode="json", exclude=RUN_APART) for run in runs]
    kinds = [names[settings.index(one)] for one in settings]
    kinds = kinds if len(set(kinds)) > 1 else [""] * len(runs)
    tables = [run.probes().assign(run=run.folder.name) for run in runs]
    return pd.concat([table.assign(kind=kind) for table, kind in zip(tables, kinds, strict=True)])


def choose(table: pd.DataFrame, arguments: argparse.Namespace) -> pd.DataFrame:
    """Selects the rows of the figure: the probes asked for, and the baselines beside them.

    Raises:
        ProbekitError: The runs have no such probes.
    """
    wanted = {"target": [arguments.target], "horizon": [arguments.horizon], "solver": [arguments.solver]}
    wanted |= {"variant": arguments.variants, "location": arguments.locations}
    probes = table[table.reader == "probe"]
    for column, values in wanted.items():
        there = sorted(probes[column].unique())
        if missing := [str(value) for value in values or () if value not in there]:
            raise ProbekitError(f"{column} {missing[0]} is not probed; {', '.join(map(str, there))} are")
        probes = probes[probes[column].isin(values or there)]
    beside = table[(table.target == arguments.target) & (table.horizon == arguments.horizon)]
    chosen = pd.concat([probes, beside[beside.reader != "probe"]], ignore_index=True)
    apart = chosen.kind + ": " + chosen.variant
    return chosen.assign(variant=chosen.variant.where(chosen.kind == "", apart)).drop(columns="kind")


def panels_of(table: pd.DataFrame, arguments: argparse.Namespace) -> list[list[Panel]]:
    """Returns a panel for each location (row) and variant (column), in the order asked for or the default."""
    probes = table[table.reader == "probe"]
    variants = ordered(probes.variant.unique(), arguments.variants or ("none", "random", *VARIANTS))
    locations = ordered(probes.location.unique(), arguments.locations or LABELS)
    rest = {"horizon": arguments.horizon, "solver": arguments.solver, "target": arguments.target}
    return [[Panel(variant, location, **rest) for variant in variants] for location in locations]


def ordered(values: Iterable[str], known: Iterable[str]) -> list[str]:
    """Sorts values like the known ones, others last; a run's name before a variant is ignored."""
    rank = {name: number for number, name in enumerate(known)}
    return sorted(values, key=lambda value: rank.get(value.rpartition(": ")[2], len(rank)))


def draw(table: pd.DataFrame, panels: list[list[Panel]], metric: str) -> Figure:
    """Draws heat maps above, lines below.

    Args:
        table: Rows from `choose`.
        panels: For each location (row) a panel for each variant (column).
        metric: One of `METRIC_LABELS`.
    """
    probes = table[table.reader == "probe"]
    layers = [probes[probes.location == row[0].location].layer.nunique() for row in panels]
    heights = [max(count, 1.5) for count in layers]
    columns = min(3, len(panels))
    width = max(7.2, 1.6 + len(panels[0]) * max(1.1, 0.1 + 0.17 * probes.position.nunique()))
    above = 0.7 + 0.2 * sum(heights) + 0.15 * len(heights)
    below = 1.0 + 2.5 * -(-len(panels) // columns)
    figure = Figure(figsize=(width, above + below), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[above, below]).flat
    draw_heat_maps(top, table, panels, metric, heights)
    grid = bottom.subplots(-(-len(panels) // columns), columns, squeeze=False, sharey=True)
    for axes, row in zip(grid.flat, panels, strict=False):
        draw_lines(axes, table, row, metric)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[:, 1:].flat:
        axes.set_ylabel("")
    handles = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid.flat)
    entries = {name: line for pairs in handles for line, name in pairs}
    names = list(entries)
    bottom.legend(entries.values(), names, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    return figure


def draw_heat_maps(
    part: SubFigure, table: pd.DataFrame, panels: list[list[Panel]], metric: str, heights: list[float]
) -> None:
    """Draws a heat map for each panel, on one colour scale."""
    grid = part.subplots(len(panels), len(panels[0]), squeeze=False, height_ratios=heights)
    cells = [[panel.cells(table) for panel in row] for row in panels]
    means = [mean_over_seeds(one, metric) for row in cells for one in row]
    scale = probe_scale(means, metric)
    for (i, j), axes in np.ndenumerate(grid):
        if cells[i][j].empty:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "not probed", ha="center", va="center", fontsize=7, transform=axes.transAxes)
        else:
            draw_heat_map(axes, cells[i][j], metric, scale, numbers=False)
        axes.tick_params(labelsize=6.5, length=2, labelbottom=i == len(panels) - 1, labelleft=j == 0)
        axes.set(xlabel="", ylabel="")
        if i == 0:
            axes.set_title(panels[i][j].variant, fontsize=8)
        if j == 0:
            axes.set_ylabel(
                label(panels[i][j].location), fontsize=7.5, rotation=0, ha="right", va="center", labelpad=9
            )
    part.supxlabel(POSITION + "   (* target's own action was added;  – too few examples)", fontsize=7.5)
    part.supylabel("layer", fontsize=7.5)
    values = pd.concat(means).value
    bar = colour_bar(part, grid, scale, values, METRIC_LABELS[metric], aspect=30, pad=0.01)
    bar.yaxis.label.set_fontsize(7.5)
    bar.tick_params(labelsize=6.5)


def draw_lines(axes: Axes, table: pd.DataFrame, row: list[Panel], metric: str) -> None:
    """Draws the metric at one location by position, and the baselines."""
    position_axis(axes, table.position[table.reader == "probe"], metric)
    draw_baselines(axes, row[0].baselines(table), metric)
    layers = []
    if len(row) == 1:
        draw_layers(axes, row[0].cells(table), metric)
    for panel, colour in zip(row, colours_of_names(len(row)), strict=True):
        cells = panel.cells(table)
        layer = best_layer(cells)
        if len(row) > 1 and layer is not None:
            random = panel.variant.endswith("random")
            shade, style = ("0.3", (0, (4, 2))) if random else (colour, "-")
            draw_curve(axes, cells[cells.layer == layer], metric, panel.variant, shade, style)
            layers.append(f"{panel.variant} {layer}")
    title = label(row[0].location)
    if layers and per_layer(row[0].location):
        title += "\n" + textwrap.fill(f"best layer: {', '.join(layers)}", 50)
    axes.set_title(title, fontsize=7.5)
    axes.tick_params(labelsize=6.5)
    axes.xaxis.label.set_fontsize(7)
    axes.yaxis.label.set_fontsize(7)


def main() -> None:
    """Reads the runs, draws, saves."""
    parser = script_parser(__doc__, "figures/figure3_probing.png")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="probed runs")
    parser.add_argument("--variants", nargs="+", help="which variants, in this order (all)")
    parser.add_argument("--locations", nargs="+", help="which locations, in this order (all)")
    parser.add_argument(
        "--metric", choices=METRIC_LABELS, default="accuracy", help="what is shown (accuracy)"
    )
    parser.add_argument("--horizon", type=int, default=1, help="sentences ahead (1)")
    parser.add_argument("--solver", default="softmax", help="how the probes were fitted (softmax)")
    parser.add_argument("--target", default="action", help="what the probes read (action)")
    given = parser.parse_args()
    runs = [probekit.load_run(run) for run in given.runs]
    table = choose(read(runs), given)
    figure = draw(table, panels_of(table, given), given.metric)
    settings = {name: value for name, value in vars(given).items() if name not in ("runs", "out")}
    save_figure(figure, table, given.out, settings, runs)


if __name__ == "__main__":
    run_script(main)
