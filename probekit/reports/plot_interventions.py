"""Plots of interventions: what probes read of the next action, and what changing it does to the LM."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from probekit.errors import ProbekitError
from probekit.reports.colours import COLOUR, colour_scale
from probekit.reports.display import decimals_for, number
from probekit.reports.drawing import BOUNDS, NotebookFigure, draw_line, heat_map
from probekit.reports.plot_probes import Panel
from probekit.run.run import Run

PROBES = "read"
"""The panel of the probes; the others are kinds of interventions."""

PANELS = {
    PROBES: "read by a linear probe",
    "erase": "erased",
    "patch": "patched",
    "steer": "steered to a wrong label",
}
MAPPED = {"erase": "erase", "patch": "patch", "steer": "wrong label"}
"""The condition that the heat map of each kind shows, over its random control."""

LINES: dict[str, dict[str, tuple[str, str]]] = {
    PROBES: {
        "probe": (COLOUR, "-"),
        "fitted_accuracy": ("#5b9bd5", "--"),
        "refitted_accuracy": ("#b35900", "-"),
        "prior_accuracy": ("0.5", ":"),
    },
    "erase": {"erase": (COLOUR, "-"), "random subspace": ("#e08a2e", "--"), "random": ("0.5", ":")},
    "patch": {"patch": (COLOUR, "-"), "same label": ("#e08a2e", "--"), "random": ("0.5", ":")},
    "steer": {
        "wrong label": (COLOUR, "-"),
        "true label": ("#2e8b57", "-"),
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
    size = (max(3.0, 1.4 + 0.6 * distances) * len(shown), 1.6 + 0.32 * max(layers, 3) + 3.9)
    figure = NotebookFigure(figsize=size, layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False, height_ratios=[size[1] - 3.7, 3.0])
    maps = numbers[numbers.part == "map"]
    changes = colour_scale(maps[maps.panel != PROBES].value, signed=True)
    for panel, above, below in zip(shown, *grid, strict=True):
        own, mapped = numbers[numbers.panel == panel], maps[maps.panel == panel]
        _draw_map(above, mapped, colour_scale(mapped.value) if panel == PROBES else changes)
        above.set_title(PANELS[panel], fontsize=9)
        _draw_lines(below, own[own.part == "line"], LINES[panel])
        below.set_ylabel(
            "accuracy" if panel == PROBES else "next sentence's loss, nats per token", fontsize=8
        )
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


def _draw_map(axes: Axes, cells: pd.DataFrame, scale: ScalarMappable) -> None:
    """A heat map with brackets where 0 is within the interval, and a plus where the action was injected."""
    close = (cells.value_low <= 0) & (cells.value_high >= 0)
    decimals = max(2, decimals_for(scale.get_clim()[1] or 0.0))
    text = cells.value.map(lambda value: number(value, decimals))
    text = text.where(~close, "(" + text + ")") + cells.injected.astype(bool).map({True: "+", False: ""})
    heat_map(
        axes,
        cells.assign(text=text, position=cells.distance.astype(str)),
        ["value", "text"],
        scale,
        annot_kws={"fontsize": 7},
        cbar_kws={"format": "{x:.3g}"},
    )
    axes.set_xlabel("distance: tokens before the target", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.tick_params(labelsize=7, rotation=0)
    if (bar := axes.collections[0].colorbar) is not None:
        bar.ax.tick_params(labelsize=7)


def _draw_lines(axes: Axes, rows: pd.DataFrame, lines: Mapping[str, tuple[str, str]]) -> None:
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
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25))
