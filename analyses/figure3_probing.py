"""Figure 3: what linear probes read of the next action, by variant, location, layer and distance.

    python analyses/figure3_probing.py runs/demo
    python analyses/figure3_probing.py runs/seed0 runs/seed1 --variants none soft random --metric bits

Above, a heat map for each variant (column) and location (row), layers over distances, all on one scale of
colours, which spans the cells that are not injected. A star marks injected cells, where the target's own
action has been added at or below the place that is read, a dash those with too few examples.

Below, for each location the score against distance: a line for each variant, at the layer that is best on
validation documents (lowest mean cross-entropy over the distances at which no layer is injected), or a line
for each layer if there is one variant. Bands are 95 % intervals from resampling test documents, hollow points
are injected, the variant with random weights is dashed, lines without points are baselines and ceilings.

Runs that differ in their seed alone, and several seeds of a run, are averaged: the mean value, the mean of
the bounds of the intervals, and a thin line for each seed. The CSV has them one by one. Other runs stand side
by side; all have to be of the same corpus, or their scores could not be compared.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from manifest import save_figure
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure

import probekit
from probekit.errors import ProbekitError
from probekit.models.mixing import VARIANTS
from probekit.probing.locations import LOCATIONS, label, per_layer
from probekit.reports.figures import (
    DISTANCE,
    METRICS,
    Panel,
    best_layer,
    colour_map,
    colour_scale,
    draw_baselines,
    draw_curve,
    draw_heat_map,
    draw_layers,
    extend_of,
    mean_over_seeds,
    set_distance_axis,
)

RUN_APART = {"seed", "device", "probe", "evaluation"}
"""Settings that runs may differ in and still be repetitions of one another."""


def read(runs: Sequence[probekit.Run]) -> pd.DataFrame:
    """The results of all runs.

    Returns:
        The tables, one under the other, with the columns `run`, the run's folder, and `kind`: empty if the
        runs are repetitions of one another, and else the folder of the first run of the kind.

    Raises:
        ProbekitError: The runs cannot be told apart, or not be compared.
    """
    names = [run.folder.name for run in runs]
    if len(set(names)) < len(names):
        raise ProbekitError(f"the runs' folders need names of their own, and not {', '.join(names)}")
    if len({run.corpus.facts["fingerprint"] for run in runs}) > 1:
        raise ProbekitError("the runs have different corpora: their probes cannot be compared in one figure")
    settings = [run.config.model_dump(mode="json", exclude=RUN_APART) for run in runs]
    kinds = [names[settings.index(one)] for one in settings]
    kinds = kinds if len(set(kinds)) > 1 else [""] * len(runs)
    tables = [run.probes().assign(run=run.folder.name) for run in runs]
    return pd.concat([table.assign(kind=kind) for table, kind in zip(tables, kinds, strict=True)])


def choose(table: pd.DataFrame, arguments: argparse.Namespace) -> pd.DataFrame:
    """The rows of the figure: probes of what was asked for, and the baselines beside them.

    Raises:
        ProbekitError: Something asked for is not in the runs.
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
    """For each location (row) a panel for each variant (column), in the order asked for or the usual one."""
    probes = table[table.reader == "probe"]
    variants = ordered(probes.variant.unique(), arguments.variants or ("none", "random", *VARIANTS))
    locations = ordered(probes.location.unique(), arguments.locations or LOCATIONS)
    rest = {"horizon": arguments.horizon, "solver": arguments.solver, "target": arguments.target}
    return [[Panel(variant, location, **rest) for variant in variants] for location in locations]


def ordered(values: Iterable[str], known: Iterable[str]) -> list[str]:
    """Values in the order of known ones, others behind them; a run's name before a variant does not count."""
    rank = {name: number for number, name in enumerate(known)}
    return sorted(values, key=lambda value: rank.get(value.rpartition(": ")[2], len(rank)))


def draw(table: pd.DataFrame, panels: list[list[Panel]], metric: str) -> Figure:
    """The whole figure: heat maps above, lines below.

    Args:
        table: Rows of `choose`.
        panels: For each location (row) one for each variant (column).
        metric: One of `METRICS`.
    """
    probes = table[table.reader == "probe"]
    layers = [probes[probes.location == row[0].location].layer.nunique() for row in panels]
    heights = [max(count, 1.5) for count in layers]
    columns = min(3, len(panels))
    width = max(7.2, 1.6 + len(panels[0]) * max(1.1, 0.1 + 0.17 * probes.distance.nunique()))
    above = 0.7 + 0.2 * sum(heights) + 0.15 * len(heights)
    below = 1.0 + 2.5 * -(-len(panels) // columns)
    figure = Figure(figsize=(width, above + below), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[above, below])
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
    """A heat map for each panel, on one scale of colours."""
    grid = part.subplots(len(panels), len(panels[0]), squeeze=False, height_ratios=heights)
    cells = [[panel.cells(table) for panel in row] for row in panels]
    means = [mean_over_seeds(one, metric) for row in cells for one in row]
    scale = colour_scale(means, metric)
    for (i, j), axes in np.ndenumerate(grid):
        if cells[i][j].empty:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "not probed", ha="center", va="center", fontsize=7, transform=axes.transAxes)
        else:
            draw_heat_map(axes, cells[i][j], metric, scale=scale, numbers=False, bar=False)
        axes.tick_params(labelsize=6.5, length=2, labelbottom=i == len(panels) - 1, labelleft=j == 0)
        axes.set(xlabel="", ylabel="")
        if i == 0:
            axes.set_title(panels[i][j].variant, fontsize=8)
        if j == 0:
            axes.set_ylabel(
                label(panels[i][j].location), fontsize=7.5, rotation=0, ha="right", va="center", labelpad=9
            )
    part.supxlabel(DISTANCE + "   (* target's own action was added;  – too few examples)", fontsize=7.5)
    part.supylabel("layer", fontsize=7.5)
    colour = ScalarMappable(scale, colour_map(metric))
    bar = part.colorbar(colour, ax=grid, extend=extend_of(means, scale), aspect=30, pad=0.01)
    bar.set_label(METRICS[metric], fontsize=7.5)
    bar.ax.tick_params(labelsize=6.5)


def draw_lines(axes: Axes, table: pd.DataFrame, row: list[Panel], metric: str) -> None:
    """The score at one location against distance, and the baselines."""
    draw_baselines(axes, row[0].baselines(table), metric)
    layers = []
    if len(row) == 1:
        draw_layers(axes, row[0].cells(table), metric)
    for panel, colour in zip(row, sns.color_palette("colorblind", len(row)), strict=True):
        cells = panel.cells(table)
        layer = best_layer(cells)
        if len(row) > 1 and layer is not None:
            chance = panel.variant.endswith("random")
            shade, style = ("0.3", (0, (4, 2))) if chance else (colour, "-")
            draw_curve(axes, cells[cells.layer == layer], metric, panel.variant, shade, style)
            layers.append(f"{panel.variant} {layer}")
    location = row[0].location
    said = (
        "\n" + textwrap.fill(f"best layer: {', '.join(layers)}", 50) if layers and per_layer(location) else ""
    )
    axes.set_title(label(location) + said, fontsize=7.5)
    set_distance_axis(axes, sorted(table.distance[table.reader == "probe"].unique()), metric)
    axes.tick_params(labelsize=6.5)
    axes.xaxis.label.set_size(7)
    axes.yaxis.label.set_size(7)


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="probed runs")
    parser.add_argument("--variants", nargs="+", help="which variants, in this order (all)")
    parser.add_argument("--locations", nargs="+", help="which locations, in this order (all)")
    parser.add_argument("--metric", choices=METRICS, default="accuracy", help="what is shown (accuracy)")
    parser.add_argument("--horizon", type=int, default=1, help="sentences ahead (1)")
    parser.add_argument("--solver", default="softmax", help="how the probes were fitted (softmax)")
    parser.add_argument("--target", default="action", help="what the probes read (action)")
    parser.add_argument("--out", type=Path, default=Path("figures/figure3_probing.png"))
    return parser, parser.parse_args()


def main() -> None:
    """Reads the runs, draws, saves."""
    parser, arguments = parse()
    try:
        runs = [probekit.load_run(run) for run in arguments.runs]
        table = choose(read(runs), arguments)
    except ProbekitError as error:
        parser.error(str(error))
    settings = {name: value for name, value in vars(arguments).items() if name not in ("runs", "out")}
    path = save_figure(
        draw(table, panels_of(table, arguments), arguments.metric),
        table,
        arguments.out,
        script="analyses/figure3_probing.py",
        settings=settings,
        runs=runs,
    )
    print(path)  # noqa: T201 - a script tells what it wrote


if __name__ == "__main__":
    main()
