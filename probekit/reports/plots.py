"""Pictures of a run in one line each, for notebooks and for the report.

    import probekit

    run = probekit.load_run("runs/demo")
    probekit.plot_training(run)
    probekit.plot_perplexity(run)
    probekit.plot_probes(run, variant=["none", "soft"], metric="gain")
    probekit.plot_curve(run, location="attn.hook_z")
    probekit.plot_sweep(sweep)

Each takes a run, or a sweep, and returns a matplotlib figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.typing import ColorType

from probekit.errors import ProbekitError
from probekit.models.mixing import VARIANTS
from probekit.probing.locations import label
from probekit.reports.describe import visible
from probekit.reports.figures import (
    DISTANCE,
    METRICS,
    NotebookFigure,
    Panel,
    best_layer,
    beyond,
    colour_scale,
    colours,
    draw_baselines,
    draw_curve,
    draw_heat_map,
    draw_intervals,
    dress_distance_axis,
    mean_over_seeds,
    panels,
)
from probekit.run.run import Run
from probekit.sweeps import Sweep

PREFERRED = {"location": "hook_resid_post", "solver": "softmax"}
"""What is drawn where nothing is asked for, if it was probed; else the first that was."""

TITLES = {"lm": "LM", "planner": "planner", "adapter": "adapters", "depth": "depth ensemble"}
"""Kinds of stages that are trained, and what their panels are called."""

WIDEST = 3
"""Panels beside each other."""


def plot_training(run: Run) -> Figure:
    """Losses by step, a panel for each kind of stage; dots are losses on validation documents.

    Training losses are moving averages over a twentieth of the rows that were logged.

    Raises:
        ProbekitError: Nothing is trained yet.
    """
    metrics = run.metrics()
    if metrics.empty or "loss" not in metrics:
        raise ProbekitError(f"{run.folder} has no training losses; nothing in it was trained")
    metrics = metrics.assign(kind=metrics.stage.str.split("/").str[0])
    kinds = [kind for kind in TITLES if kind in set(metrics.kind)]
    columns = min(len(kinds), 2)
    rows = -(-len(kinds) // columns)
    figure = NotebookFigure(figsize=(4.6 * columns + 1.2, 3.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, kind in zip(grid.flat, kinds, strict=False):
        _draw_losses(axes, metrics[metrics.kind == kind])
        axes.set_title(TITLES[kind], fontsize=10)
    for axes in grid.flat[len(kinds) :]:
        axes.set_axis_off()
    return figure


def plot_perplexity(run: Run) -> Figure:
    """Test perplexity of everything that was evaluated, with 95 % intervals.

    Raises:
        ProbekitError: The run is not evaluated.
    """
    table = pd.DataFrame(run.evaluation()["perplexity"])
    conditioned_on = " (" + table.actions + " actions)"
    names = table.variant + conditioned_on.where(table.variant == "oracle", "")
    values = table.rename(columns=lambda name: name.replace("perplexity", "value")).assign(
        name=names, seed=None
    )
    figure = NotebookFigure(figsize=(7.6, 0.8 + 0.32 * len(table)), layout="constrained")
    axes = figure.subplots()
    draw_intervals(axes, values, list(names))
    axes.set_xlabel(f"test perplexity, {table.documents.iloc[0]:,} documents (95 % intervals)")
    return figure


def plot_probes(
    run: Run,
    variant: str | Sequence[str] = "none",
    location: str | None = None,
    metric: str = "accuracy",
    *,
    horizon: int | None = None,
    solver: str | None = None,
) -> Figure:
    """Heat maps of what probes read, by layer and distance.

    Args:
        run: A probed run.
        variant: Whose activations; several stand side by side, and have the same colours.
        location: Where; None: the residual stream behind each block, if it was probed.
        metric: One of accuracy, top5, bits, gain, selectivity, compression.
        horizon: Which sentence; None: the next.
        solver: Which probes; None: softmax, if these were fitted.

    Raises:
        ProbekitError: The run is not probed, or not so.
    """
    names = [variant] if isinstance(variant, str) else list(variant)
    table = run.probes()
    chosen = _panels(run, table, names, metric, location=location, horizon=horizon, solver=solver)
    cells = [panel.cells(table) for panel in chosen]
    scale = colour_scale([mean_over_seeds(one, metric) for one in cells], metric)
    columns = min(len(chosen), WIDEST)
    rows = -(-len(chosen) // columns)
    distances, layers = cells[0].distance.nunique(), cells[0].layer.nunique()
    wide, high = max(2.4, 0.42 * distances), max(1.1, 0.28 * layers)
    figure = NotebookFigure(figsize=(1.6 + wide * columns, 1.0 + (high + 0.55) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    with mpl.rc_context({"font.size": 7}):
        for axes, panel, own in zip(grid.flat, chosen, cells, strict=False):
            fits = distances <= 12
            draw_heat_map(axes, own, metric, scale=scale, numbers=fits, bar=False)
            axes.set(xlabel="", ylabel="")
            axes.set_title(panel.variant, fontsize=9)
            axes.tick_params(labelsize=8)
    for axes in grid.flat[len(chosen) :]:
        axes.set_axis_off()
    figure.supxlabel(DISTANCE, fontsize=9)
    figure.supylabel("layer", fontsize=9)
    means = [mean_over_seeds(one, metric) for one in cells]
    bar = figure.colorbar(ScalarMappable(scale, colours(metric)), ax=grid, extend=beyond(means, scale))
    bar.set_label(METRICS[metric])
    told = any(one.injected.any() for one in cells)
    figure.suptitle(
        _title(chosen[0]) + ("\n* the target's own action was added" if told else ""),
        fontsize=10,
        parse_math=False,
    )
    return figure


def plot_curve(
    run: Run,
    variant: str | Sequence[str] | None = None,
    location: str | None = None,
    metric: str = "accuracy",
    *,
    horizon: int | None = None,
    solver: str | None = None,
) -> Figure:
    """A score against distance, each variant at its best layer, between baselines and ceilings.

    The best layer is that of the lowest cross-entropy on validation documents, over all distances.

    Args:
        run: A probed run.
        variant: Whose activations; None: all that were probed.
        location: As `plot_probes` has it, and so are the others.
        metric: What is drawn.
        horizon: Which sentence.
        solver: Which probes.

    Raises:
        ProbekitError: The run is not probed, or not so.
    """
    table = run.probes()
    probed = table[(table.reader == "probe") & table.accuracy.notna()]
    names = [variant] if isinstance(variant, str) else list(variant or probed_variants(table))
    chosen = _panels(run, table, names, metric, location=location, horizon=horizon, solver=solver)
    figure = NotebookFigure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplots()
    draw_baselines(axes, chosen[0].baselines(table), metric)
    told = False
    for panel, colour in zip(chosen, sns.color_palette("colorblind", len(chosen)), strict=True):
        cells = panel.cells(table)
        if (layer := best_layer(cells)) is not None:
            cells = cells[cells.layer == layer]
            told = told or bool(cells.injected.any())
            draw_curve(axes, cells, metric, f"{panel.variant}, layer {layer}", colour)
    dress_distance_axis(axes, sorted(probed.distance.unique()), metric)
    hollow = "; hollow: the target's own action was added" if told else ""
    title = f"{_title(chosen[0])}\n{int(probed.documents.max()):,} test documents{hollow}"
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def plot_sweep(sweep: Sweep, metric: str = "perplexity") -> Figure:
    """A metric against the setting that was swept, a line for each variant; thin lines are single seeds.

    Thick lines are means over seeds with 95 % intervals over documents. Of generated text, the longest is
    drawn.

    Raises:
        ProbekitError: The sweep is not over one setting, or the metric was not measured.
    """
    if len(sweep.settings) != 1:
        over = ", ".join(sweep.settings) or "nothing"
        raise ProbekitError(f"{sweep.folder} sweeps over {over}; there is a curve only over one setting")
    (setting,) = sweep.settings
    table = sweep.table().sort_values(setting, kind="stable")
    there = list(dict.fromkeys(table.metric))
    if metric not in there:
        raise ProbekitError(f"metric is {metric!r}, but {sweep.folder} has {', '.join(there)}")
    rows = table[table.metric == metric]
    rows = rows[rows.length == rows.groupby("texts").length.transform("max")]
    lines = [*rows.groupby(["variant", "actions", "texts"], sort=False)]
    figure = NotebookFigure(figsize=(7.6, 3.8), layout="constrained")
    axes = figure.subplots()
    palette = sns.color_palette("colorblind", len(lines))
    for ((variant, actions, texts), own), colour in zip(lines, palette, strict=True):
        name = f"{variant} ({actions} actions)" if variant == "oracle" else str(variant)
        _draw_swept(axes, own, setting, name if metric == "perplexity" else f"{name}, {texts}", colour)
    axes.set_title(f"{rows.documents.max():,} test documents, {len(sweep.seeds)} seeds", fontsize=10)
    axes.set_xlabel(setting)
    axes.set_ylabel(metric.replace("_", " "))
    axes.grid(color="0.92")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _draw_swept(axes: Axes, table: pd.DataFrame, setting: str, name: str, colour: ColorType) -> None:
    """One variant's line: its mean over seeds with intervals, and its single seeds if there are several."""
    mean, single = table[table.seed.isna()], table[table.seed.notna()]
    seeds = [own for _, own in single.groupby("seed")]
    for own in seeds if len(seeds) > 1 else ():
        axes.plot(own[setting], own.value, color=colour, linewidth=0.6, alpha=0.6, label="_seed")
    axes.plot(mean[setting], mean.value, "o-", color=colour, markersize=4, linewidth=1.4, label=name)
    if mean.value_low.notna().any():  # what is of all texts at once has no interval
        axes.fill_between(
            mean[setting], mean.value_low, mean.value_high, color=colour, alpha=0.15, linewidth=0
        )


def probed_variants(table: pd.DataFrame) -> list[str]:
    """The variants that a table has probes of, the LM itself first."""
    there = {panel.variant for panel in panels(table)}
    return [name for name in ("none", "random", *VARIANTS) if name in there]


def _draw_losses(axes: Axes, metrics: pd.DataFrame) -> None:
    stages = list(metrics.stage.unique())
    for stage, colour in zip(stages, sns.color_palette("husl", len(stages)), strict=True):
        rows = metrics[metrics.stage == stage]
        losses = rows[rows.loss.notna()]
        smooth = losses.loss.rolling(max(1, len(losses) // 20), min_periods=1, center=True).mean()
        name = stage.split("/")[-1]
        axes.plot(losses.step, smooth, color=colour, linewidth=1.3, label=name)
        if "validation_loss" in rows:
            axes.plot(rows.step, rows.validation_loss, "o", color=colour, markersize=3.5, label="_validation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.grid(color="0.92")
    if len(stages) > 1:
        axes.legend(fontsize=7, frameon=False, ncols=2)


def _panels(
    run: Run, table: pd.DataFrame, variants: Sequence[str], metric: str, **wanted: Any
) -> list[Panel]:
    """The panels of some variants at one location, horizon and solver.

    Raises:
        ProbekitError: There is no such metric, or no such panel.
    """
    if metric not in METRICS:
        raise ProbekitError(f"metric is {metric!r}; it must be one of {', '.join(METRICS)}")
    known = panels(table)
    for name, value in wanted.items():
        there = list(dict.fromkeys(getattr(panel, name) for panel in known))
        if value is None:
            first = min(there) if name == "horizon" else next(iter(there), None)
            value = PREFERRED[name] if PREFERRED.get(name) in there else first
        _check(run, name, value, there)
        known = [panel for panel in known if getattr(panel, name) == value]
    by_variant = {panel.variant: panel for panel in known}
    for variant in variants:
        _check(run, "variant", variant, list(by_variant))
    return [by_variant[variant] for variant in variants]


def _check(run: Run, name: str, value: Any, there: Sequence[Any]) -> None:
    if value not in there:
        raise ProbekitError(
            f"{run.folder} has no probes of {name} {value!r}; it has {', '.join(map(str, there)) or 'none'}"
        )


def _title(panel: Panel) -> str:
    return visible(f"{label(panel.location)}, {panel.target}, horizon {panel.horizon}, {panel.solver}")
