"""Figure 4 of arXiv 2410.12492: training with a share f of predicted actions, the others true.

    python analyses/figure4_mixing_fraction.py --preset demo --seeds 3 --generation --runs runs/fractions
    python analyses/figure4_mixing_fraction.py --runs runs/fractions

With a preset, what is missing in the folder is trained and measured; without, what exists is drawn. For
every metric: the improvement over training on true actions alone (f = 0), in percent of its value there; the
sign is reversed where less is better, so that up is always better. In evaluation all actions are the
planner's. The line is the mean over seeds of a document's losses, with its interval from resampling
documents (MAUVE, of all texts together, has none); the band spans the worst and the best seed. Of generated
text, the longest is drawn.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shared.script import add_training_options, run_script, save_figure, script_parser, training_config

import probekit
from probekit.errors import ProbekitError
from probekit.generation.evaluate import TRANSFORMS
from probekit.reports.colours import COLOUR
from probekit.statistics import paired_differences
from probekit.sweeps import grid

SETTING, SHARES, VARIANT = "mixing.fraction", (0, 0.25, 0.5, 0.75, 1), "mixed"

# What is drawn where it was measured, and whether more of it is better.
METRICS = {
    "perplexity": False,
    "rouge2": True,
    "mauve": True,
    "levenshtein": False,
    "latent_perplexity": False,
    "plan_following": True,
}
LOGARITHMS = {"perplexity", *TRANSFORMS}
"""Metrics that are the exponential of a ratio of sums; the others are the ratio itself."""

KEYS = ["metric", "texts", "length"]
RESAMPLES = 5000
COLUMNS = 3


def swept(given: argparse.Namespace) -> probekit.Sweep:
    """Returns the sweep in the folder; with a preset, trains what is missing first."""
    if given.preset is None:
        return probekit.Sweep.open(given.runs)
    config, seeds = training_config(given)
    config = config.override({"mixing.variants": [VARIANT]})
    members = grid(config, {SETTING: given.values})
    return probekit.sweep(config, members, seeds, given.runs, generation=given.generation)


def improvements(sweep: probekit.Sweep) -> pd.DataFrame:
    """Measures a row for each metric, share and seed, and one for the mean over seeds.

    Raises:
        ProbekitError: The sweep is over something else, or has no run with f = 0.
    """
    if sweep.settings != [SETTING]:
        over = ", ".join(sweep.settings) or "nothing"
        raise ProbekitError(f"{sweep.folder} sweeps over {over}, not over {SETTING} alone")
    shares = {member: settings[SETTING] for member, settings in sweep.members.items()}
    drawn = f"variant == '{VARIANT}' and actions == 'planner' and metric in {[*METRICS]}"
    values, table = (
        part.assign(fraction=part.member.map(shares)).query(drawn) for part in (sweep.values(), sweep.table())
    )
    seeds = {*table[table.fraction == 0.0].seed.dropna()}
    if not seeds:
        raise ProbekitError(
            f"{sweep.folder} has no finished run with {SETTING} 0, with which the others are compared"
        )
    rows = []
    longest = table.length == table.groupby(["metric", "texts"]).length.transform("max")
    for (metric, texts, length), own in table[longest & table.seed.isin(seeds)].groupby(KEYS, sort=False):
        sums = values.query("metric == @metric and texts == @texts and length == @length")
        for fraction, each in own.groupby("fraction"):
            for seed, of in [*((str(one), [one]) for one in each.seed), ("mean", [*each.seed])]:
                row = {"metric": metric, "texts": texts, "length": length, "fraction": fraction, "seed": seed}
                measured, reference = (
                    part[(part.fraction == share) & part.seed.isin(of)]
                    for share in (fraction, 0.0)
                    for part in [sums if len(sums) else own]
                )
                compare = _from_sums if len(sums) else _from_values
                rows.append(row | {"seeds": len(of)} | compare(str(metric), measured, reference))
    return pd.DataFrame(rows)


def _from_sums(metric: str, measured: pd.DataFrame, reference: pd.DataFrame) -> dict[str, Any]:
    """Improvement of a metric with sums for each document, with its interval."""
    tables = [part.groupby("document")[["sum", "count"]].sum() for part in (measured, reference)]
    documents = tables[0].index.union(tables[1].index)
    first, second = (part.reindex(documents, fill_value=0) for part in tables)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_logarithms = paired_differences(
            first[["sum"]],
            second[["sum"]],
            first[["count"]],
            second_counts=second[["count"]],
            resamples=RESAMPLES,
            seed=0,
            transform=None if metric in LOGARITHMS else np.log,
        )[0]
        ratio = first["sum"].sum() / first["count"].sum()
    bounds = [_percent(metric, np.exp(end)) for end in (of_logarithms.low, of_logarithms.high)]
    return {
        "value": np.exp(ratio) if metric in LOGARITHMS else ratio,
        "improvement": _percent(metric, np.exp(of_logarithms.value)),
        "low": min(bounds),
        "high": max(bounds),
        "documents": of_logarithms.documents,
    }


def _from_values(metric: str, measured: pd.DataFrame, reference: pd.DataFrame) -> dict[str, Any]:
    """Improvement of a metric of all texts together."""
    value = measured.value.mean()
    return {
        "value": value,
        "improvement": _percent(metric, value / reference.value.mean()),
        "low": np.nan,
        "high": np.nan,
        "documents": measured.documents.max(),
    }


def _percent(metric: str, ratio: float) -> float:
    """The improvement in percent, from a ratio to the reference."""
    return 100.0 * (ratio - 1.0 if METRICS[metric] else 1.0 - ratio)


def draw(table: pd.DataFrame) -> Figure:
    """Draws a panel for each metric."""
    panels = [*table.groupby(KEYS, sort=False)]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(6.0, 4.2 * columns), max(3.6, 3.2 * rows)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, ((metric, texts, length), own) in zip(axes, panels, strict=False):
        _draw_panel(panel, own)
        of = f"{texts}, {length:,} tokens" if length else texts
        panel.set_title(f"{metric.replace('_', ' ')} ({of})", fontsize=9)
    for panel in axes[len(panels) :]:
        panel.remove()
    axes[0].legend(fontsize=7)
    figure.supxlabel("share f of the planner's actions in training (0: oracle, 1: predicted)", fontsize=9)
    figure.supylabel("improvement over f = 0 in % (up is better)", fontsize=9)
    return figure


def _draw_panel(axes: Axes, table: pd.DataFrame) -> None:
    mean, single = table[table.seed == "mean"], table[table.seed != "mean"]
    spread = single.groupby("fraction").improvement.agg(["min", "max"])
    if mean.seeds.max() > 1:
        axes.fill_between(
            spread.index,
            spread["min"],
            spread["max"],
            color=COLOUR,
            alpha=0.18,
            linewidth=0,
            label="worst to best seed",
        )
    errors = np.nan_to_num([mean.improvement - mean.low, mean.high - mean.improvement])
    axes.errorbar(
        mean.fraction,
        mean.improvement,
        yerr=errors,
        fmt="o-",
        color=COLOUR,
        capsize=3,
        markersize=4,
        label=f"mean of {mean.seeds.max()} seeds, 95 % over documents",
    )
    axes.axhline(0.0, color="0.4", linewidth=0.8)


def main() -> None:
    """Trains what is missing, compares, saves."""
    parser = script_parser(__doc__, "figures/figure4_mixing_fraction.png")
    add_training_options(parser, "runs/fractions", preset=None, seeds=3)
    parser.add_argument("--values", type=float, nargs="+", default=SHARES, help="shares, with 0")
    parser.add_argument("--generation", action="store_true", help="measure generated text, too")
    given = parser.parse_args()
    sweep = swept(given)
    table = improvements(sweep)
    settings = {"values": sorted({*table.fraction}), "seeds": list(sweep.seeds)}
    shown = table[table.seed == "mean"]
    save_figure(draw(table), table, given.out, settings, [*sweep.runs.values()], shown)
    if sweep.missing:
        print(f"not finished, and not drawn: {', '.join(map(str, sweep.missing))}")  # noqa: T201


if __name__ == "__main__":
    run_script(main)
