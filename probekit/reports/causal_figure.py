"""Where the plan can be read, and where it is used: heat maps of probes and of interventions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probekit.errors import ProbekitError
from probekit.reports.figures import DISTANCE, NotebookFigure
from probekit.run.run import Run

READ = "read"
"""The panel of the probes; the others are called by their kind."""

PANELS = {
    READ: "read by a linear probe",
    "erase": "erased",
    "patch": "patched",
    "steer": "steered to a wrong action",
}
MAIN = {"erase": "erase", "patch": "patch", "steer": "wrong action"}
"""The condition that the heat map of each kind shows, over its random control."""

LINES: dict[str, dict[str, tuple[str, str]]] = {
    READ: {
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
"""The lines of each panel below: colour and style."""

NAMES = {
    "fitted_accuracy": "least squares",
    "refitted_accuracy": "least squares, erased",
    "prior_accuracy": "prior",
}
COLUMNS = ["layer", "distance", "value", "value_low", "value_high", "documents", "injected"]


def plot_interventions(
    run: Run,
    variant: str | None = None,
    location: str = "hook_resid_post",
    strength: float | None = None,
) -> Figure:
    """What probes read of the next sentence's action, and what the next sentence loses where that is changed.

    Above, by layer and distance, over as large a random change; brackets: 0 is within the 95 % interval.
    Below, at the nearest distance with intervals, and every control on its own.

    Args:
        run: A run with probes and interventions.
        variant: Whose activations were changed; None: `none`, if they were, else the first in the alphabet.
        location: Where.
        strength: Of steering; None: the least that was tried.

    Raises:
        ProbekitError: The run has nothing of the variant, the location or the strength.
    """
    return draw_causal(causal_numbers(run, variant, location, strength))


def causal_numbers(run: Run, variant: str | None, location: str, strength: float | None) -> pd.DataFrame:
    """All that is drawn: a row for each panel, part (`map` or `line`), line, layer and distance.

    Args:
        run: The run.
        variant: As `plot_interventions` has it.
        location: The same.
        strength: The same.

    Raises:
        ProbekitError: The run has nothing of the variant, the location or the strength.
    """
    effects, probes = run.interventions(), run.probes()
    known = sorted(effects.variant.unique(), key=lambda name: (name != "none", name))
    variant = variant or known[0]
    own = effects[(effects.variant == variant) & (effects.location == location)]
    if own.empty:
        there = effects[["variant", "location"]].drop_duplicates().agg(" at ".join, axis=1)
        raise ProbekitError(
            f"nothing was changed of {variant} at {location}, but of {', '.join(there)}; run "
            f"`probekit intervene {run.folder} --intervene.variant {variant}`"
        )
    strengths = sorted(own.strength.dropna().unique())
    chosen = strength if strength is not None else next(iter(strengths), None)
    if strength is not None and strength not in strengths:
        raise ProbekitError(
            f"strength {strength:g} was not tried; {', '.join(map('{:g}'.format, strengths))} were"
        )
    own = own[own.strength.isna() | (own.strength == chosen)]
    read = probes[(probes.reader == "probe") & (probes.variant == variant) & (probes.location == location)]
    read = read[(read.horizon == 1) & (read.solver == "softmax") & (read.target == "action")]
    read = read[read.distance.isin(own.distance) & read.layer.isin(own.layer)]
    if read.empty:
        raise ProbekitError(f"no probe of {variant} at {location} reads where something was changed")
    read = read[read.seed == read.seed.min()]
    read = read.drop(columns=["value"], errors="ignore").rename(
        columns={f"accuracy{end}": f"value{end}" for end in ("", "_low", "_high")}
    )
    near = own.distance.min()
    parts = [_part(read, READ, "map", "probe"), _part(read[read.distance == near], READ, "line", "probe")]
    for kind, condition in MAIN.items():
        over = own[(own.kind == kind) & (own.metric == "next_loss_over_random")]
        parts.append(_part(over[over.condition == condition], kind, "map", condition))
        rows = own[(own.kind == kind) & (own.metric == "next_loss") & (own.distance == near)]
        parts += [_part(rows[rows.condition == line], kind, "line", line) for line in LINES[kind]]
    again = own[own.metric.isin(LINES[READ]) & (own.distance == near)]
    parts += [_part(again[again.metric == line], READ, "line", line) for line in NAMES]
    return pd.concat(parts, ignore_index=True).assign(variant=variant, location=location, strength=chosen)


def _part(rows: pd.DataFrame, panel: str, part: str, line: str) -> pd.DataFrame:
    return rows[COLUMNS].assign(panel=panel, part=part, line=line)


def draw_causal(numbers: pd.DataFrame) -> Figure:
    """The whole figure.

    Args:
        numbers: Rows of `causal_numbers`.
    """
    panels = [panel for panel in PANELS if (numbers.panel == panel).any()]
    layers, distances = numbers.layer.nunique(), numbers.distance.nunique()
    size = (max(3.0, 1.4 + 0.6 * distances) * len(panels), 1.6 + 0.32 * max(layers, 3) + 3.2)
    figure = NotebookFigure(figsize=size, layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False, height_ratios=[size[1] - 3.0, 3.0])
    losses = numbers[(numbers.part == "map") & (numbers.panel != READ)].value.abs().max()
    for panel, above, below in zip(panels, *grid, strict=True):
        own = numbers[numbers.panel == panel]
        _draw_map(above, own[own.part == "map"], None if panel == READ else losses)
        above.set_title(PANELS[panel], fontsize=9)
        _draw_lines(below, own[own.part == "line"], LINES[panel])
        below.set_ylabel("accuracy" if panel == READ else "next sentence's loss, nats a token", fontsize=8)
    near = numbers[numbers.part == "line"].distance.min()
    told = ";  + the LM had been told" if numbers.injected.any() else ""
    figure.suptitle(
        f"{numbers.variant.iloc[0]}, {numbers.location.iloc[0]}: above all distances, below distance "
        f"{near}{told}\n{_counted(numbers)}",
        fontsize=9,
        parse_math=False,
    )
    return figure


def _counted(numbers: pd.DataFrame) -> str:
    """What the numbers are of."""
    read = (numbers.panel == READ) & (numbers.line == "probe")
    probed = int(numbers[read].documents.max())
    told = f"read on {probed:,} test documents"
    changed = numbers[numbers.panel != READ].groupby("panel").documents.max().to_dict()
    if len({*changed.values()}) == 1:
        return f"{told}, changed in {int(max(changed.values())):,} scenes, one of each document"
    scenes = [f"{called} in {int(changed[panel]):,}" for panel, called in PANELS.items() if panel in changed]
    return f"{told}; scenes, one of each document: {', '.join(scenes)}"


def _draw_map(axes: Axes, cells: pd.DataFrame, most: float | None) -> None:
    """One heat map; `most` is the end of a scale around 0, None for a scale of accuracies."""
    close = (cells.value_low <= 0) & (cells.value_high >= 0)
    text = cells.value.map("{:.2f}".format).where(~close, cells.value.map("({:.2f})".format))
    shown = cells.assign(text=text + cells.injected.astype(bool).map({True: "+", False: ""}))
    values, texts = (
        shown.pivot_table(column, "layer", "distance", aggfunc="first").iloc[::-1, ::-1]
        for column in ("value", "text")
    )
    signed: Mapping[str, object] = {"cmap": "RdBu_r", "vmin": -(most or 0), "vmax": most}
    scale = {"cmap": "viridis", "vmin": 0.0} if most is None else signed
    sns.heatmap(values.astype(float), annot=texts, fmt="", annot_kws={"fontsize": 7}, ax=axes, **scale)
    axes.set_xlabel(DISTANCE, fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.tick_params(labelsize=7, rotation=0)


def _draw_lines(axes: Axes, rows: pd.DataFrame, lines: Mapping[str, tuple[str, str]]) -> None:
    """A line for each condition against layers, with its interval."""
    for line, (colour, style) in lines.items():
        own = rows[rows.line == line].sort_values("layer")
        if len(own):
            x = own.layer.to_numpy(float)
            axes.plot(
                x, own.value, style, color=colour, marker="o", markersize=3, label=NAMES.get(line, line)
            )
            axes.fill_between(x, own.value_low, own.value_high, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0.0, color="0.4", linewidth=0.8)
    axes.set_xticks(np.unique(rows.layer.to_numpy(float)))
    axes.set_xlabel("layer", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
