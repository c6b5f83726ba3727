"""Plots of the probe grid: panels of layers by positions, heat maps, curves by position, baselines.

Several seeds are drawn as their mean: value and interval are means over seeds, thin lines are single seeds.
Intervals describe other test documents, not other seeds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import ColorType

from probekit.config import as_position, reading_order
from probekit.errors import ProbekitError
from probekit.io import write_text
from probekit.models.locations import label, per_layer
from probekit.models.mixing import VARIANTS
from probekit.probing.results import LAST_BAG, main_metric, validation_loss
from probekit.reports.colours import colour_bar, colour_scale, colours_in_order, colours_of_names
from probekit.reports.display import number, visible
from probekit.reports.drawing import NotebookFigure, draw_line, heat_map, outer_legend, panel_grid, save_png
from probekit.run.run import Run

PREFERRED = {"location": "hook_resid_post", "solver": "softmax"}
"""What is drawn by default, if it was probed; else the first that was."""

METRIC_LABELS = {
    "accuracy": "test accuracy",
    "balanced_accuracy": "test balanced accuracy",
    "auroc": "test AUROC",
    "average_precision": "test average precision",
    "r2": "test R²",
    "rank_correlation": "test rank correlation",
    "cosine": "test cosine",
    "reciprocal_rank": "test mean reciprocal rank",
    "first_percent": "test share in the first 1 %",
    "top5": "test top-5 accuracy",
    "bits": "bits over the prior",
    "gain": "bits (numbers, vectors: R²) over\nthe strongest model-free baseline",
    "selectivity": "selectivity (accuracy; numbers,\nvectors: R²; over the control task)",
    "compression": "compression",
}
"""Metrics that can be drawn, with their axis labels; higher is better for all of them."""

SIGNED = ("gain", "selectivity")
"""Metrics that are drawn with diverging colours around zero."""

BASELINE_STYLES = {
    "prior": ("0.55", ":"),
    "mean": ("0.55", "--"),
    "previous number": ("#e08a2e", "--"),
    "previous vector": ("#e08a2e", ":"),
    "bag of words": ("#1b7837", "--"),
    LAST_BAG: ("#1b7837", ":"),
    "bigram": ("#b35900", "--"),
    "bigram (current action)": ("#e08a2e", "-."),
    "skip n-gram": ("#b35900", ":"),
    "token embedding": ("#8c6d31", "-."),
    "planner": ("#7b3294", "-."),
    "planner after joint": ("#7b3294", ":"),
    "planner after gumbel": ("#af8dc3", "--"),
    "planner after straight-through": ("#af8dc3", ":"),
    "ceiling (tokens read)": ("black", "-."),
    "ceiling (words)": ("black", "--"),
    "ceiling (actions)": ("black", "-"),
}
"""Colour and line style of the baselines and ceilings."""

POSITION = "position: tokens before the target"
INJECTED = "the target's own action was added"


# Panels of the probe grid


class Panel(NamedTuple):
    """One picture's part of the probe grid: all layers and positions of a variant at a location."""

    variant: str
    location: str
    horizon: int = 1
    solver: str = "softmax"
    target: str = "action"

    def cells(self, table: pd.DataFrame) -> pd.DataFrame:
        """The panel's probes."""
        wanted = [table[name] == value for name, value in self._asdict().items()]
        return table[np.logical_and.reduce(wanted, axis=0) & (table.reader == "probe")]

    def baselines(self, table: pd.DataFrame) -> pd.DataFrame:
        """The baselines and ceilings of the panel's target and horizon."""
        same = (table.target == self.target) & (table.horizon == self.horizon)
        return table[same & (table.reader != "probe")]

    @property
    def title(self) -> str:
        """A title for figures, without the variant."""
        return visible(f"{label(self.location)}, {self.target}, horizon {self.horizon}, {self.solver}")

    @property
    def name(self) -> str:
        """A name for files."""
        words = [self.variant, self.location, self.target, self.solver, f"h{self.horizon}"]
        return "_".join(re.sub(r"[^\w-]+", "_", word) for word in words)


def panels(table: pd.DataFrame) -> list[Panel]:
    """Returns every panel of a table with at least one cell that is not empty."""
    probes = table[(table.reader == "probe") & table[main_metric(table)].notna()]
    return [Panel(*row) for row in probes[list(Panel._fields)].drop_duplicates().to_numpy()]


def mean_over_seeds(cells: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Averages a metric and its interval over seeds, by layer and position.

    Returns:
        Columns `layer`, `position`, `value`, `low`, `high` (NaN where the metric has no interval) and
        `injected`. A cell that is empty for one seed is empty.
    """
    bounds = {"value": metric, "low": f"{metric}_low", "high": f"{metric}_high"}
    parts = pd.DataFrame(
        {
            "layer": cells.layer.astype("Int64"),
            "position": cells.position,
            **{name: cells.get(column, np.nan) for name, column in bounds.items()},
            "injected": cells.injected.astype(bool),
        }
    )
    parts["missing"] = parts.value.isna()
    cell = parts.groupby(["layer", "position"])
    means = cell[list(bounds)].mean().join(cell[["injected", "missing"]].any()).reset_index()
    means.loc[means.pop("missing"), list(bounds)] = np.nan
    return means


def best_layer(cells: pd.DataFrame) -> int | None:
    """Returns the layer with the lowest mean cross-entropy on validation documents; None if all are empty.

    The mean is over the positions at which no layer is injected, or over all if there is no such position.
    """
    fitted = cells.assign(loss=validation_loss(cells)).dropna(subset="loss")
    injected = fitted.groupby("position").injected.transform("any").astype(bool)
    fitted = fitted if injected.all() else fitted[~injected]
    means = fitted.groupby("layer").loss.mean()
    return None if means.empty else int(means.index[int(means.argmin())])


# Heat maps


def probe_scale(means: Sequence[pd.DataFrame], metric: str) -> ScalarMappable:
    """Returns the colour scale for several heat maps, from their `mean_over_seeds`.

    It spans the cells that are not injected, if there are any: injected ones recover the action that was put
    there, and would leave all others one colour.
    """
    cells = pd.concat(means)
    shown = cells.value[~cells.injected & cells.value.notna()]
    return colour_scale(shown if len(shown) else cells.value, signed=metric in SIGNED)


def draw_heat_map(
    axes: Axes, cells: pd.DataFrame, metric: str, scale: ScalarMappable, *, numbers: bool = True
) -> None:
    """Draws a metric of one panel's probes by layer and position.

    A star marks cells where the target's own action was injected, a dash empty cells. Injected cells have no
    gain, since they are compared with no baseline: they show the star alone.

    Args:
        axes: Where to draw.
        cells: Probes of one panel, of one seed or several.
        metric: One of `METRIC_LABELS`.
        scale: The colours, see `probe_scale`.
        numbers: Write the values into the cells.
    """
    means = mean_over_seeds(cells, metric)
    star = means.injected.map({True: "*", False: ""})
    text = means.value.map(lambda value: number(value, 2)) + star if numbers else star
    columns = ["value", "text", "star"]
    values, _, stars = heat_map(axes, means.assign(text=text, star=star), columns, scale, cbar=False)
    for row, column in np.argwhere(values.isna().to_numpy()):
        mark = "*" if stars.iloc[row, column] == "*" else "–"
        axes.text(column + 0.5, row + 0.5, mark, ha="center", va="center")
    axes.set(xlabel=POSITION, ylabel="layer")
    axes.tick_params(axis="y", rotation=0)


def draw_heat_maps(
    table: pd.DataFrame, chosen: Sequence[Panel], metric: str, scale: ScalarMappable | None = None
) -> Figure:
    """Draws panels that differ in their variant side by side on one colour scale; None: their own."""
    cells = [panel.cells(table) for panel in chosen]
    means = [mean_over_seeds(one, metric) for one in cells]
    scale = scale or probe_scale(means, metric)
    positions, layers = cells[0].position.nunique(), cells[0].layer.nunique()
    figure, grid = panel_grid(len(chosen), 3, max(2.4, 0.42 * positions), max(1.1, 0.28 * layers) + 0.55)
    with mpl.rc_context({"font.size": 7}):
        for axes, panel, own in zip(grid, chosen, cells, strict=True):
            draw_heat_map(axes, own, metric, scale, numbers=positions <= 12)
            axes.set(xlabel="", ylabel="")
            axes.set_title(panel.variant, fontsize=9)
            axes.tick_params(labelsize=8)
    figure.supxlabel(POSITION, fontsize=9)
    figure.supylabel("layer", fontsize=9)
    colour_bar(figure, grid, scale, pd.concat(means).value, METRIC_LABELS[metric])
    star = f"\n* {INJECTED}" if any(one.injected.any() for one in cells) else ""
    figure.suptitle(chosen[0].title + star, fontsize=10, parse_math=False)
    return figure


# Curves by position


def draw_curve(
    axes: Axes, cells: pd.DataFrame, metric: str, name: str, colour: ColorType, style: Any = "-"
) -> None:
    """Draws a metric of one layer's probes by position, with its 95 % interval, on axes of `position_axis`.

    Numbers of tokens are joined by a line, named positions are not. Points where the target's own action was
    injected are hollow. Several seeds are thin lines, too.
    """
    repetitions = [column for column in ("run", "seed") if column in cells]
    seeds = [_joined(seed) for _, seed in cells.groupby(repetitions)]
    for seed in seeds if len(seeds) > 1 else ():
        axes.plot(seed.position, seed[metric], color=colour, linewidth=0.5, alpha=0.6, label="_seed")
    means = mean_over_seeds(cells, metric)
    draw_line(axes, _joined(means), "position", name, colour, linestyle=style)
    named = means[~_numeric(means)]
    axes.vlines(named.position, named.low, named.high, color=colour, alpha=0.5)
    for injected, points in means.groupby("injected"):
        face = "white" if injected else colour
        axes.scatter(points.position, points.value, s=16, facecolors=[face], edgecolors=[colour], zorder=3)


def _joined(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of numeric positions, far before near."""
    return rows[_numeric(rows)].sort_values("position", key=lambda names: -names.astype(int))


def _numeric(rows: pd.DataFrame) -> pd.Series:
    """Whether the position of each row is a number of tokens."""
    return rows.position.map(lambda name: isinstance(as_position(name), int)).astype(bool)


def draw_layers(axes: Axes, cells: pd.DataFrame, metric: str) -> None:
    """Draws a curve for each layer of one panel."""
    layers = sorted(cells.layer.unique())
    for layer, colour in zip(layers, colours_in_order(len(layers)), strict=True):
        location = cells.location.iloc[0]
        name = f"layer {layer}" if per_layer(location) else label(location)
        draw_curve(axes, cells[cells.layer == layer], metric, name, colour)


def draw_baselines(axes: Axes, baselines: pd.DataFrame, metric: str) -> None:
    """Draws a line for each baseline or ceiling that has the metric, averaged over runs and seeds."""
    for reader, (shade, style) in BASELINE_STYLES.items():
        means = (
            baselines[baselines.reader == reader].groupby("position")[metric].mean().dropna().reset_index()
        )
        if len(means):
            line, named = _joined(means), means[~_numeric(means)]
            axes.plot(line.position, line[metric], style, color=shade, linewidth=1.2, label=reader)
            axes.plot(named.position, named[metric], "_", color=shade, markersize=10, label="_named")


def position_axis(axes: Axes, positions: Iterable[str], metric: str) -> None:
    """Prepares the axes of curves: positions in reading order, evenly spaced, and the metric."""
    axes.xaxis.update_units(reading_order(positions))
    axes.axhline(0.0, color="0.4", linewidth=0.8, label="_zero")
    axes.set_xlabel(POSITION)
    axes.set_ylabel(METRIC_LABELS[metric])


def draw_curves(
    table: pd.DataFrame, panel: Panel, metric: str, draw: Callable[[Axes], bool], title: str
) -> Figure:
    """Draws curves by position beside the baselines and ceilings of a panel.

    Args:
        table: The results.
        panel: Whose baselines.
        metric: One of `METRIC_LABELS`.
        draw: Draws the curves, and returns whether a point of them is injected.
        title: What they are of.
    """
    figure = NotebookFigure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplots()
    probed = table[(table.reader == "probe") & table[main_metric(table)].notna()]
    position_axis(axes, probed.position, metric)
    draw_baselines(axes, panel.baselines(table), metric)
    injected = draw(axes)
    hollow = f"; hollow: {INJECTED}" if injected else ""
    documents = f"{int(probed.documents.max()):,} test documents"
    axes.set_title(f"{title}\n{documents}{hollow}", fontsize=10, parse_math=False)
    outer_legend(figure)
    return figure


def draw_layer_curves(table: pd.DataFrame, chosen: Sequence[Panel], metric: str) -> Figure:
    """Draws a metric at the only position by layer, a curve for each variant, beside the baselines."""
    figure = NotebookFigure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for panel, colour in zip(chosen, colours_of_names(len(chosen)), strict=True):
        means = mean_over_seeds(panel.cells(table), metric)
        draw_line(axes, means.sort_values("layer"), "layer", panel.variant, colour)
        axes.scatter(means.layer, means.value, s=16, color=[colour], zorder=3)
    baselines = panel.baselines(table)
    for reader, (shade, style) in BASELINE_STYLES.items():
        value = baselines[baselines.reader == reader][metric].mean()
        if np.isfinite(value):
            axes.axhline(value, color=shade, linestyle=style, linewidth=1.2, label=reader)
    axes.set(xlabel="layer", ylabel=METRIC_LABELS[metric])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    (position,) = chosen[0].cells(table).position.unique()
    documents = f"{int(table.documents.max()):,} test documents"
    axes.set_title(f"{chosen[0].title}, position {position}\n{documents}", fontsize=10, parse_math=False)
    outer_legend(figure)
    return figure


# Plots of a run


def plot_probes(
    run: Run,
    variant: str | Sequence[str] = "none",
    location: str | None = None,
    metric: str | None = None,
    *,
    horizon: int | None = None,
    solver: str | None = None,
) -> Figure:
    """Plots heat maps of probes by layer and position.

    Args:
        run: A probed run.
        variant: Whose activations; several are drawn side by side on one colour scale.
        location: Where they were read; None: the residual stream after each block, if it was probed.
        metric: One of `METRIC_LABELS`; None: AUROC of two classes, R² of numbers, else accuracy.
        horizon: Sentences ahead; None: the nearest that was probed.
        solver: How the probes were fitted; None: softmax, if such probes were fitted.

    Raises:
        ProbekitError: The run was not probed, or not in this way.
    """
    table = run.probes()
    metric = metric or main_metric(table)
    chosen = _chosen_panels(run, table, variant, metric, location=location, horizon=horizon, solver=solver)
    return draw_heat_maps(table, chosen, metric)


def plot_curve(
    run: Run,
    variant: str | Sequence[str] | None = None,
    location: str | None = None,
    metric: str | None = None,
    *,
    horizon: int | None = None,
    solver: str | None = None,
) -> Figure:
    """Plots a metric by position: each variant at its best layer, beside baselines and ceilings.

    Where one position was probed, the metric is drawn by layer. The best layer has the lowest cross-entropy
    on validation documents, averaged over positions.

    Args:
        run: A probed run.
        variant: Whose activations; None: all that were probed.
        location: As in `plot_probes`, like the others.
        metric: What is drawn.
        horizon: Sentences ahead.
        solver: How the probes were fitted.

    Raises:
        ProbekitError: The run was not probed, or not in this way.
    """
    table = run.probes()
    metric = metric or main_metric(table)
    names = variant or probed_variants(table)
    chosen = _chosen_panels(run, table, names, metric, location=location, horizon=horizon, solver=solver)
    if chosen[0].cells(table).position.nunique() == 1 < chosen[0].cells(table).layer.nunique():
        return draw_layer_curves(table, chosen, metric)

    def draw(axes: Axes) -> bool:
        injected = False
        for panel, colour in zip(chosen, colours_of_names(len(chosen)), strict=True):
            cells = panel.cells(table)
            if (layer := best_layer(cells)) is not None:
                cells = cells[cells.layer == layer]
                injected = injected or bool(cells.injected.any())
                draw_curve(axes, cells, metric, f"{panel.variant}, layer {layer}", colour)
        return injected

    return draw_curves(table, chosen[0], metric, draw, chosen[0].title)


def probed_variants(table: pd.DataFrame) -> list[str]:
    """Returns the variants that a table has probes of, the LM itself first."""
    found = {panel.variant for panel in panels(table)}
    return [name for name in ("none", "random", *VARIANTS) if name in found]


def _chosen_panels(
    run: Run, table: pd.DataFrame, variants: str | Sequence[str], metric: str, **wanted: Any
) -> list[Panel]:
    """The panels of some variants at one location, horizon and solver."""

    def check(name: str, value: Any, known: Sequence[Any]) -> None:
        if value not in known:
            found = ", ".join(map(str, known)) or "none"
            raise ProbekitError(f"{run.folder} has no probes of {name} {value!r}; it has {found}")

    check_metric(metric, table)
    left = panels(table)
    for name, value in wanted.items():
        known = list(dict.fromkeys(getattr(panel, name) for panel in left))
        if value is None:
            first = min(known) if name == "horizon" else next(iter(known), None)
            value = PREFERRED[name] if PREFERRED.get(name) in known else first
        check(name, value, known)
        left = [panel for panel in left if getattr(panel, name) == value]
    by_variant = {panel.variant: panel for panel in left}
    variants = [variants] if isinstance(variants, str) else list(variants)
    for variant in variants:
        check("variant", variant, list(by_variant))
    return [by_variant[variant] for variant in variants]


def check_metric(metric: str, table: pd.DataFrame) -> None:
    """Refuses a metric that cannot be drawn, or that a table's target does not have."""
    known = [name for name in METRIC_LABELS if name in table and table[name].notna().any()]
    if metric not in known:
        raise ProbekitError(f"metric is {metric!r}; it must be one of {', '.join(known)}")


# Pictures beside the results of `probekit probe`


def probe_heat_map(table: pd.DataFrame, panel: Panel, metric: str | None = None) -> Figure:
    """Draws a panel's heat map; all panels of a table share one colour scale."""
    metric = metric or main_metric(table)
    scale = probe_scale([mean_over_seeds(each.cells(table), metric) for each in panels(table)], metric)
    return draw_heat_maps(table, [panel], metric, scale)


def probe_lines(table: pd.DataFrame, panel: Panel, metric: str | None = None) -> Figure:
    """Draws a panel's curves by position, one for each layer, or by layer at one position; and baselines."""
    metric = metric or main_metric(table)
    cells = panel.cells(table)
    if cells.position.nunique() == 1 < cells.layer.nunique():
        return draw_layer_curves(table, [panel], metric)

    def draw(axes: Axes) -> bool:
        draw_layers(axes, cells, metric)
        return bool(cells.injected.any())

    return draw_curves(table, panel, metric, draw, f"{panel.variant}: {panel.title}")


def save_probe_figures(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draws every panel of a table into a folder, with the numbers as CSV beside it.

    Returns:
        The pictures.
    """
    pictures = []
    for panel in panels(table):
        for kind, draw in {"heatmap": probe_heat_map, "lines": probe_lines}.items():
            pictures.append(save_png(draw(table, panel), folder / f"{kind}_{panel.name}.png"))
        numbers = pd.concat([panel.cells(table), panel.baselines(table)])
        write_text(folder / f"{panel.name}.csv", numbers.to_csv(index=False))
    return pictures
