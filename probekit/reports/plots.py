"""Plots of results, for notebooks and the report: each function returns a matplotlib figure.

import probekit

run = probekit.load_run("runs/demo")
probekit.plot_training(run)
probekit.plot_perplexity(run)
probekit.plot_probes(run, variant=["none", "soft"], metric="gain")
probekit.plot_curve(run, location="attn.hook_z")
probekit.plot_sweep(sweep.table())
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from probekit.config import setting_names
from probekit.errors import ProbekitError
from probekit.io import atomic_path
from probekit.models.hook_points import label
from probekit.models.mixing import VARIANTS
from probekit.probing.over_training import TrainingProbes
from probekit.reports.describe import visible
from probekit.reports.figures import (
    BASELINE_STYLES,
    DISTANCE,
    INJECTED,
    METRICS,
    NotebookFigure,
    Panel,
    best_layer,
    colour_map,
    colour_scale,
    draw_baselines,
    draw_curve,
    draw_heat_map,
    draw_intervals,
    draw_line,
    extend_of,
    heat_map,
    mean_over_seeds,
    panels,
    set_distance_axis,
)
from probekit.run.run import Run

PREFERRED = {"location": "hook_resid_post", "solver": "softmax"}
"""What is drawn by default, if it was probed; else the first that was."""

BOUNDS = {"value_low": "low", "value_high": "high"}
"""Columns of an interval in tables of results, and their names in `draw_line`."""


# Training and perplexity

STAGES = {"lm": "LM", "planner": "planner", "adapter": "adapters", "depth": "depth ensemble"}
"""Titles of the kinds of training stages."""


def plot_training(run: Run) -> Figure:
    """Plots losses by step, a panel for each kind of stage; dots are losses on validation documents.

    Training losses are moving averages over a twentieth of the logged rows.

    Raises:
        ProbekitError: The run has no training losses.
    """
    metrics = run.metrics()
    if metrics.empty or "loss" not in metrics:
        raise ProbekitError(f"{run.folder} has no training losses; nothing in it was trained")
    metrics = metrics.assign(kind=metrics.stage.str.split("/").str[0])
    kinds = [kind for kind in STAGES if kind in set(metrics.kind)]
    figure, grid = _grid(len(kinds), 2, lambda rows, columns: (4.6 * columns + 1.2, 3.1 * rows))
    for axes, kind in zip(grid, kinds, strict=True):
        stages = [*metrics[metrics.kind == kind].groupby("stage", sort=False)]
        for (stage, rows), colour in zip(stages, sns.color_palette("husl", len(stages)), strict=True):
            losses = rows[rows.loss.notna()]
            smooth = losses.loss.rolling(max(1, len(losses) // 20), min_periods=1, center=True).mean()
            axes.plot(losses.step, smooth, color=colour, linewidth=1.3, label=str(stage).split("/")[-1])
            if "validation_loss" in rows:
                style = {"color": colour, "markersize": 3.5, "label": "_validation"}
                axes.plot(rows.step, rows.validation_loss, "o", **style)
        axes.set(xlabel="step", ylabel="loss (nats)")
        axes.set_title(STAGES[kind], fontsize=10)
        axes.grid(color="0.92")
        if len(stages) > 1:
            axes.legend(fontsize=7, frameon=False, ncols=2)
    return figure


def plot_perplexity(run: Run) -> Figure:
    """Plots the test perplexity of everything that was evaluated, with 95 % intervals.

    Raises:
        ProbekitError: The run was not evaluated.
    """
    table = pd.DataFrame(run.evaluation()["perplexity"])
    actions = " (" + table.actions + " actions)"
    names = table.variant + actions.where(table.variant == "oracle", "")
    values = table.rename(columns=lambda name: name.replace("perplexity", "value"))
    figure = NotebookFigure(figsize=(7.6, 0.8 + 0.32 * len(table)), layout="constrained")
    axes = figure.subplots()
    draw_intervals(axes, values.assign(name=names, seed=None), list(names))
    axes.set_xlabel(f"test perplexity, {table.documents.iloc[0]:,} documents (95 % intervals)")
    return figure


def _grid(count: int, columns: int, size: Any) -> tuple[Figure, list[Axes]]:
    """A figure with a number of panels; `size` gives its inches from the numbers of rows and columns."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = NotebookFigure(figsize=size(rows, columns), layout="constrained")
    axes = [*figure.subplots(rows, columns, squeeze=False).flat]
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


# Probes


def plot_probes(
    run: Run,
    variant: str | Sequence[str] = "none",
    location: str | None = None,
    metric: str = "accuracy",
    *,
    horizon: int | None = None,
    solver: str | None = None,
) -> Figure:
    """Plots heat maps of probes by layer and distance.

    Args:
        run: A probed run.
        variant: Whose activations; several are drawn side by side on one colour scale.
        location: Where they were read; None: the residual stream after each block, if it was probed.
        metric: One of accuracy, top5, bits, gain, selectivity, compression.
        horizon: Sentences ahead; None: the nearest that was probed.
        solver: How the probes were fitted; None: softmax, if such probes were fitted.

    Raises:
        ProbekitError: The run was not probed, or not in this way.
    """
    names = [variant] if isinstance(variant, str) else list(variant)
    table = run.probes()
    chosen = _chosen_panels(run, table, names, metric, location=location, horizon=horizon, solver=solver)
    cells = [panel.cells(table) for panel in chosen]
    means = [mean_over_seeds(one, metric) for one in cells]
    scale = colour_scale(means, metric)
    distances, layers = cells[0].distance.nunique(), cells[0].layer.nunique()
    wide, high = max(2.4, 0.42 * distances), max(1.1, 0.28 * layers)
    figure, grid = _grid(
        len(chosen), 3, lambda rows, columns: (1.6 + wide * columns, 1.0 + (high + 0.55) * rows)
    )
    with mpl.rc_context({"font.size": 7}):
        for axes, panel, own in zip(grid, chosen, cells, strict=True):
            draw_heat_map(axes, own, metric, scale=scale, numbers=distances <= 12, bar=False)
            axes.set(xlabel="", ylabel="")
            axes.set_title(panel.variant, fontsize=9)
            axes.tick_params(labelsize=8)
    figure.supxlabel(DISTANCE, fontsize=9)
    figure.supylabel("layer", fontsize=9)
    colours = ScalarMappable(scale, colour_map(metric))
    figure.colorbar(colours, ax=figure.axes, extend=extend_of(means, scale)).set_label(METRICS[metric])
    star = f"\n* {INJECTED}" if any(one.injected.any() for one in cells) else ""
    figure.suptitle(_title(chosen[0]) + star, fontsize=10, parse_math=False)
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
    """Plots a metric against distance: each variant at its best layer, beside baselines and ceilings.

    The best layer has the lowest cross-entropy on validation documents, averaged over distances.

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
    probed = table[(table.reader == "probe") & table.accuracy.notna()]
    names = [variant] if isinstance(variant, str) else list(variant or probed_variants(table))
    chosen = _chosen_panels(run, table, names, metric, location=location, horizon=horizon, solver=solver)
    figure = NotebookFigure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplots()
    draw_baselines(axes, chosen[0].baselines(table), metric)
    injected = False
    for panel, colour in zip(chosen, sns.color_palette("colorblind", len(chosen)), strict=True):
        cells = panel.cells(table)
        if (layer := best_layer(cells)) is not None:
            cells = cells[cells.layer == layer]
            injected = injected or bool(cells.injected.any())
            draw_curve(axes, cells, metric, f"{panel.variant}, layer {layer}", colour)
    set_distance_axis(axes, sorted(probed.distance.unique()), metric)
    hollow = f"; hollow: {INJECTED}" if injected else ""
    title = f"{_title(chosen[0])}\n{int(probed.documents.max()):,} test documents{hollow}"
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def probed_variants(table: pd.DataFrame) -> list[str]:
    """Returns the variants that a table has probes of, the LM itself first."""
    found = {panel.variant for panel in panels(table)}
    return [name for name in ("none", "random", *VARIANTS) if name in found]


def _chosen_panels(
    run: Run, table: pd.DataFrame, variants: Sequence[str], metric: str, **wanted: Any
) -> list[Panel]:
    """The panels of some variants at one location, horizon and solver."""

    def check(name: str, value: Any, known: Sequence[Any]) -> None:
        if value not in known:
            found = ", ".join(map(str, known)) or "none"
            raise ProbekitError(f"{run.folder} has no probes of {name} {value!r}; it has {found}")

    _check_metric(metric)
    left = panels(table)
    for name, value in wanted.items():
        known = list(dict.fromkeys(getattr(panel, name) for panel in left))
        if value is None:
            first = min(known) if name == "horizon" else next(iter(known), None)
            value = PREFERRED[name] if PREFERRED.get(name) in known else first
        check(name, value, known)
        left = [panel for panel in left if getattr(panel, name) == value]
    by_variant = {panel.variant: panel for panel in left}
    for variant in variants:
        check("variant", variant, list(by_variant))
    return [by_variant[variant] for variant in variants]


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise ProbekitError(f"metric is {metric!r}; it must be one of {', '.join(METRICS)}")


def _title(panel: Panel) -> str:
    return visible(f"{label(panel.location)}, {panel.target}, horizon {panel.horizon}, {panel.solver}")


# Sweeps


def plot_sweep(table: pd.DataFrame, metric: str = "perplexity") -> Figure:
    """Plots a metric against the setting that was swept, a line for each variant.

    Thick lines are means over seeds with 95 % intervals over documents, thin lines are single seeds. Of
    generated text, the longest is drawn.

    Args:
        table: A sweep's results, `sweep.table()`.
        metric: One of the table's metrics.

    Raises:
        ProbekitError: The sweep is not over one setting, or the metric was not measured.
    """
    settings = [name for name in table if name in setting_names() and name != "seed"]
    if len(settings) != 1:
        over = ", ".join(settings) or "nothing"
        raise ProbekitError(f"the sweep is over {over}; only a sweep over one setting can be plotted")
    (setting,) = settings
    known = list(dict.fromkeys(table.metric))
    if metric not in known:
        raise ProbekitError(f"metric is {metric!r}, but the sweep has {', '.join(known)}")
    rows = table[table.metric == metric].sort_values(setting, kind="stable").rename(columns=BOUNDS)
    rows = rows[rows.length == rows.groupby("texts").length.transform("max")]
    lines = [*rows.groupby(["variant", "actions", "texts"], sort=False)]
    figure = NotebookFigure(figsize=(7.6, 3.8), layout="constrained")
    axes = figure.subplots()
    palette = sns.color_palette("colorblind", len(lines))
    for ((variant, actions, texts), own), colour in zip(lines, palette, strict=True):
        seeds = [seed for _, seed in own[own.seed.notna()].groupby("seed")]
        for seed in seeds if len(seeds) > 1 else ():
            axes.plot(seed[setting], seed.value, color=colour, linewidth=0.6, alpha=0.6, label="_seed")
        name = f"{variant} ({actions} actions)" if variant == "oracle" else str(variant)
        name = name if metric == "perplexity" else f"{name}, {texts}"
        draw_line(axes, own[own.seed.isna()], setting, name, colour, marker="o", markersize=4)
    axes.set_title(f"{rows.documents.max():,} test documents, {rows.seed.nunique()} seeds", fontsize=10)
    axes.set_xlabel(setting)
    axes.set_ylabel(metric.replace("_", " "))
    axes.grid(color="0.92")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


# Interventions

PROBES = "read"
"""The panel of the probes; the others are kinds of interventions."""

PANELS = {
    PROBES: "read by a linear probe",
    "erase": "erased",
    "patch": "patched",
    "steer": "steered to a wrong action",
}
MAPPED = {"erase": "erase", "patch": "patch", "steer": "wrong action"}
"""The condition that the heat map of each kind shows, over its random control."""

LINES: dict[str, dict[str, tuple[str, str]]] = {
    PROBES: {
        "probe": ("#1f4e79", "-"),
        "fitted_accuracy": ("#5b9bd5", "--"),
        "refitted_accuracy": ("#b35900", "-"),
        "prior_accuracy": ("0.5", ":"),
    },
    "erase": {"erase": ("#1f4e79", "-"), "random subspace": ("#e08a2e", "--"), "random": ("0.5", ":")},
    "patch": {"patch": ("#1f4e79", "-"), "same action": ("#e08a2e", "--"), "random": ("0.5", ":")},
    "steer": {
        "wrong action": ("#1f4e79", "-"),
        "true action": ("#2e8b57", "-"),
        "random (wrong)": ("0.5", ":"),
        "random (true)": ("#9bc49b", ":"),
    },
}
"""The lines of each lower panel, with colour and style."""

LINE_LABELS = {
    "fitted_accuracy": "least squares",
    "refitted_accuracy": "least squares, erased",
    "prior_accuracy": "prior",
}


def plot_interventions(
    run: Run,
    variant: str | None = None,
    location: str = "hook_resid_post",
    strength: float | None = None,
) -> Figure:
    """Plots what probes read of the next action, and what the next sentence loses where that is changed.

    Above, by layer and distance, beyond an equally large random change; brackets mean that the 95 % interval
    contains 0. Below, at the nearest distance, with intervals and every control.

    Args:
        run: A run with probes and interventions.
        variant: Whose activations were changed; None: `none`, if they were, else the alphabetically first.
        location: Where.
        strength: Of steering; None: the smallest that was tried.

    Raises:
        ProbekitError: The run has no results for the variant, location or strength.
    """
    return draw_interventions(intervention_numbers(run, variant, location, strength))


def intervention_numbers(
    run: Run, variant: str | None, location: str, strength: float | None
) -> pd.DataFrame:
    """Collects the numbers of `plot_interventions`.

    Returns:
        A row for each panel, part (`map` or `line`), line, layer and distance.

    Raises:
        ProbekitError: The run has no results for the variant, location or strength.
    """
    effects, probes = run.interventions(), run.probes()
    variant = variant or min(effects.variant.unique(), key=lambda name: (name != "none", name))
    own = effects[(effects.variant == variant) & (effects.location == location)]
    if own.empty:
        known = effects[["variant", "location"]].drop_duplicates().agg(" at ".join, axis=1)
        raise ProbekitError(
            f"{run.folder} has no interventions on {variant} at {location}, but on {', '.join(known)}; run "
            f"`probekit intervene {run.folder} --intervene.variant {variant}`"
        )
    strengths = sorted(own.strength.dropna().unique())
    if strength is not None and strength not in strengths:
        tried = ", ".join(map("{:g}".format, strengths))
        raise ProbekitError(f"strength {strength:g} was not tried; {tried} were")
    chosen = strength if strength is not None else next(iter(strengths), None)
    own = own[own.strength.isna() | (own.strength == chosen)]

    read = Panel(variant, location).cells(probes)
    read = read[read.distance.isin(own.distance) & read.layer.isin(own.layer)]
    if read.empty:
        raise ProbekitError(f"no probe of {variant} at {location} reads where something was changed")
    read = read[read.seed == read.seed.min()].drop(columns="value", errors="ignore")
    read = read.rename(columns={f"accuracy{end}": f"value{end}" for end in ("", "_low", "_high")})

    def part(rows: pd.DataFrame, panel: str, part: str, line: str) -> pd.DataFrame:
        columns = ["layer", "distance", "value", *BOUNDS, "documents", "injected"]
        return rows[columns].assign(panel=panel, part=part, line=line)

    near = own[own.distance == own.distance.min()]
    at_near = read[read.distance == own.distance.min()]
    parts = [part(read, PROBES, "map", "probe"), part(at_near, PROBES, "line", "probe")]
    for kind, condition in MAPPED.items():
        over = own[(own.kind == kind) & (own.metric == "next_loss_over_random")]
        parts.append(part(over[over.condition == condition], kind, "map", condition))
        rows = near[(near.kind == kind) & (near.metric == "next_loss")]
        parts += [part(rows[rows.condition == line], kind, "line", line) for line in LINES[kind]]
    parts += [part(near[near.metric == line], PROBES, "line", line) for line in LINE_LABELS]
    return pd.concat(parts, ignore_index=True).assign(variant=variant, location=location, strength=chosen)


def draw_interventions(numbers: pd.DataFrame) -> Figure:
    """Draws `intervention_numbers`: heat maps above, lines against layers below."""
    shown = [panel for panel in PANELS if (numbers.panel == panel).any()]
    layers, distances = numbers.layer.nunique(), numbers.distance.nunique()
    size = (max(3.0, 1.4 + 0.6 * distances) * len(shown), 1.6 + 0.32 * max(layers, 3) + 3.2)
    figure = NotebookFigure(figsize=size, layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False, height_ratios=[size[1] - 3.0, 3.0])
    largest = numbers[(numbers.part == "map") & (numbers.panel != PROBES)].value.abs().max()
    for panel, above, below in zip(shown, *grid, strict=True):
        own = numbers[numbers.panel == panel]
        scale = {"cmap": "RdBu_r", "vmin": -largest, "vmax": largest}
        scale = {"cmap": "viridis", "vmin": 0.0} if panel == PROBES else scale
        _draw_intervention_map(above, own[own.part == "map"], scale)
        above.set_title(PANELS[panel], fontsize=9)
        _draw_intervention_lines(below, own[own.part == "line"], LINES[panel])
        below.set_ylabel("accuracy" if panel == PROBES else "next sentence's loss, nats a token", fontsize=8)
    near = numbers[numbers.part == "line"].distance.min()
    plus = ";  + the LM was conditioned on the action" if numbers.injected.any() else ""
    first = numbers.iloc[0]
    figure.suptitle(
        f"{first.variant}, {first.location}: above all distances, below distance {near}{plus}\n"
        f"{_sizes(numbers)}",
        fontsize=9,
        parse_math=False,
    )
    return figure


def _sizes(numbers: pd.DataFrame) -> str:
    """How many documents and sentence boundaries the numbers are from."""
    probed = int(numbers[(numbers.panel == PROBES) & (numbers.line == "probe")].documents.max())
    text = f"read on {probed:,} test documents"
    changed = numbers[numbers.panel != PROBES].groupby("panel").documents.max().to_dict()
    if len({*changed.values()}) == 1:
        return f"{text}, changed at {int(max(changed.values())):,} boundaries, one of each document"
    counts = [f"{name} at {int(changed[panel]):,}" for panel, name in PANELS.items() if panel in changed]
    return f"{text}; boundaries, one of each document: {', '.join(counts)}"


def _draw_intervention_map(axes: Axes, cells: pd.DataFrame, scale: Mapping[str, Any]) -> None:
    """A heat map with brackets where 0 is within the interval, and a plus where the action was injected."""
    close = (cells.value_low <= 0) & (cells.value_high >= 0)
    text = cells.value.map("{:.2f}".format).where(~close, cells.value.map("({:.2f})".format))
    text += cells.injected.astype(bool).map({True: "+", False: ""})
    heat_map(axes, cells.assign(text=text), ["value", "text"], annot_kws={"fontsize": 7}, **scale)
    axes.set_xlabel(DISTANCE, fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.tick_params(labelsize=7, rotation=0)


def _draw_intervention_lines(axes: Axes, rows: pd.DataFrame, lines: Mapping[str, tuple[str, str]]) -> None:
    """A line against layers for each condition."""
    for line, (colour, style) in lines.items():
        own = rows[rows.line == line].sort_values("layer").rename(columns=BOUNDS)
        if len(own):
            name = LINE_LABELS.get(line, line)
            draw_line(axes, own, "layer", name, colour, linestyle=style, marker="o", markersize=3)
    axes.axhline(0.0, color="0.4", linewidth=0.8)
    axes.set_xticks(np.unique(rows.layer.to_numpy(float)))
    axes.set_xlabel("layer", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)


# Probes over training

BESIDE = ("prior", "bigram", "ceiling (tokens read)")
"""Baselines drawn beside probes over training; they are the same at every step."""


def plot_over_training(
    run: Run, stage: str = "lm", metric: str = "accuracy", location: str | None = None
) -> Figure:
    """Plots a metric of probes against training steps.

    Left, by layer at the nearest distance; right, by distance at the best layer, which is chosen on
    validation documents at the last step. Bands are 95 % intervals from resampling documents. Below are the
    stage's losses. The bigram and the ceiling, which depend on the distance, are drawn on the left alone.

    Args:
        run: A run whose checkpoints were probed.
        stage: The stage of training.
        metric: One of accuracy, top5, bits, gain, selectivity, compression.
        location: Where; None: the residual stream after each block, if it was probed.

    Raises:
        ProbekitError: The checkpoints were not probed, or not in this way.
    """
    numbers = over_training_numbers(run.probes_over_training(stage), metric, location)
    return draw_over_training(numbers, run.losses_of(stage))


def save_over_training(results: TrainingProbes) -> Path:
    """Plots the accuracy at the first location beside the results; returns the picture's path."""
    figure = draw_over_training(over_training_numbers(results.table), results.losses)
    picture = results.path.with_suffix(".png")
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=150)
    return picture


def over_training_numbers(
    table: pd.DataFrame, metric: str = "accuracy", location: str | None = None, solver: str | None = None
) -> pd.DataFrame:
    """Collects the numbers of `plot_over_training` from a table of `probe_checkpoints`.

    Returns:
        A row for each step, reader, layer and distance: means over seeds of `value`, `low`, `high`,
        `validation_cross_entropy` and `documents`.

    Raises:
        ProbekitError: The metric or location was not probed.
    """
    _check_metric(metric)
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
    columns |= {"validation_cross_entropy": "validation_cross_entropy"}
    rows = rows.assign(**{name: rows.get(column, np.nan) for name, column in columns.items()})
    cell = rows.groupby(["step", "reader", "layer", "distance"], dropna=False, sort=True)
    means = cell[[*columns, "documents"]].mean().reset_index()
    return means.assign(metric=metric, variant=chosen.variant, location=chosen.location, solver=chosen.solver)


def draw_over_training(numbers: pd.DataFrame, losses: pd.DataFrame) -> Figure:
    """Draws `over_training_numbers` above the losses of the stage by step."""
    probes = numbers[(numbers.reader == "probe") & numbers.value.notna()]
    near, last = probes.distance.min(), probes[probes.step == probes.step.max()]
    best = last.loc[last[last.distance == near].validation_cross_entropy.idxmin()].layer
    figure = Figure(figsize=(10.4, 5.4), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, height_ratios=[3.4, 1.6])
    for axes, below, by, own, title in (
        (*grid[:, 0], "layer", probes[probes.distance == near], f"by layer, distance {near}"),
        (*grid[:, 1], "distance", probes[probes.layer == best], f"by distance, layer {int(best)}"),
    ):
        lines = [*own.groupby(by)]
        for (value, rows), colour in zip(lines, sns.color_palette("viridis", len(lines)), strict=True):
            rows, name = rows.sort_values("step"), f"{by} {int(str(value))}"
            draw_line(axes, rows, "step", name, colour, marker="o", markersize=3)
        readers = numbers[(numbers.distance == near) & (numbers.step == numbers.step.max())]
        # On the right, distances differ: only the prior does not depend on them.
        readers = readers[readers.reader.isin(BESIDE if by == "layer" else ["prior"])]
        for reader, value in readers.dropna(subset="value").set_index("reader").value.items():
            colour, style = BASELINE_STYLES[str(reader)]
            axes.axhline(value, color=colour, linestyle=style, linewidth=1, label=str(reader))
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(METRICS[numbers.metric.iloc[0]])
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
        axes.legend(fontsize=7, frameon=False, ncols=3, loc="upper left")

        trained, validated = losses[losses.loss.notna()], losses[losses.validation_loss.notna()]
        below.plot(trained.step, trained.loss, color="0.6", linewidth=1, label="training")
        below.plot(validated.step, validated.validation_loss, "ko", markersize=3, label="validation")
        below.legend(fontsize=7, frameon=False)
        below.set_xscale("symlog", linthresh=1, linscale=0.5)
        below.set_xlim(0, own.step.max())
        below.set(xlabel="training steps", ylabel="loss (nats)")
    one = numbers.iloc[0]
    title = (
        f"{one.variant}: {label(one.location)}, {one.solver}, {int(probes.documents.max()):,} test documents"
    )
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
