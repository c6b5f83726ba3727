"""In-context learning beside Bayes: what examples of one hidden type in the prompt are worth.

    python analyses/in_context.py --preset in-context --seeds 1 --runs runs/in_context

Trains an LM for each seed on documents of several examples (a line each) of one hidden type, and measures how
well it predicts another example, the query, after none, one, two, ... of them (`probekit.in_context`). All
seeds share the corpus, the queries and what stands before them. Columns: the document's own examples; the
same with the sentences of each in a random order, which leaves the frequencies of actions and takes their
transitions; the examples of a document of another type.

Rows: the query's loss; what is known of its type, and of its last sentence's action, before this sentence.
Lines are means over seeds with 95 % intervals from resampling documents. Black is the exact posterior that
takes the prompt for what the LM was trained on; grey the one that is told what was done to it, which nobody
can beat but by chance. What lies outside a panel is in the numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shared.script import add_training_options, run_script, save_figure, script_parser, training_config

import probekit
from probekit.io import read_table
from probekit.probing.in_context import (
    ACTION,
    EXACT,
    KNOWN,
    LM,
    NGRAM,
    PROBE,
    RANDOM,
    TOLD,
    TYPE,
    WORDS,
    in_context_table,
)
from probekit.reports.colours import COLOUR

MEASURES = {
    WORDS: "loss of the query\n(nats per word)",
    TYPE: "type of the document\n(bits over its prior)",
    ACTION: "action of the query's last\nsentence (bits over its prior)",
}
"""Rows of panels, and their labels."""

STYLES: dict[str, dict[str, Any]] = {
    KNOWN: {"color": "0.75", "linestyle": ":"},
    TOLD: {"color": "0.55", "linestyle": "--"},
    EXACT: {"color": "black", "linestyle": "-"},
    LM: {"color": COLOUR, "linestyle": "-", "marker": "o"},
    PROBE: {"color": COLOUR, "linestyle": "-", "marker": "s"},
    RANDOM: {"color": "#b35900", "linestyle": "--", "marker": "x"},
    NGRAM: {"color": "#b35900", "linestyle": ":", "marker": "v"},
}
"""Readers, and how they are drawn."""

DRAWN = (0.08, 0.1)
"""Share of the height of a row's panels that is free below and above what is drawn of the first column."""


def measured(given: argparse.Namespace) -> tuple[pd.DataFrame, list[probekit.Run]]:
    """Trains and measures what is missing; returns the values of all seeds, and the runs."""
    config, seeds = training_config(given)
    values, runs = [], []
    for seed in seeds:
        folder = given.runs / f"seed{seed}"
        run = probekit.train(config.override({"seed": seed}), folder, existing="resume")
        kept = folder / "in_context" / "values.parquet"
        own = read_table(kept) if kept.exists() else probekit.in_context(run).values
        values.append(own.assign(seed=seed))
        runs.append(run)
    return pd.concat(values, ignore_index=True), runs


def draw(table: pd.DataFrame) -> Figure:
    """Draws a row of panels for each measure and a column for each condition."""
    conditions = [*table.condition.unique()]
    figure = Figure(figsize=(3.4 * len(conditions), 8.2), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(conditions), squeeze=False, sharex=True, sharey="row")
    for row, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for axes, condition in zip(row, conditions, strict=True):
            draw_panel(axes, table[(table.measure == measure) & (table.condition == condition)])
        # Who takes examples of another type for the query's is wrong by far: the axis is that of the others.
        own = table[(table.measure == measure) & ((table.condition == conditions[0]) | (table.reader == LM))]
        low, high = own.value_low.min(), own.value_high.max()
        row[0].set_ylim(low - DRAWN[0] * (high - low), high + DRAWN[1] * (high - low))
        row[0].set_ylabel(label, fontsize=9)
    for axes, condition in zip(panels[0], conditions, strict=True):
        axes.set_title(f"examples: {condition}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("examples before the query", fontsize=9)
    named = {
        name: line
        for axes in panels[:, 0]
        for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    shown = [name for name in STYLES if name in named]
    figure.legend(
        [named[name] for name in shown], shown, loc="outside lower center", ncols=4, fontsize=9, frameon=False
    )
    return figure


def draw_panel(axes: Axes, table: pd.DataFrame) -> None:
    """Draws every reader by number of examples."""
    for reader, style in STYLES.items():
        own = table[table.reader == reader].sort_values("examples")
        if len(own):
            axes.plot(own.examples, own.value, label=reader, markersize=4, **style)
            axes.fill_between(
                own.examples, own.value_low, own.value_high, color=style["color"], alpha=0.15, linewidth=0
            )
    axes.set_xticks(np.unique(table.examples))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, measures, draws, saves."""
    parser = script_parser(__doc__, "figures/in_context.png")
    add_training_options(parser, "runs/in_context", preset="in-context", seeds=1)
    given = parser.parse_args(arguments)
    values, runs = measured(given)
    table = in_context_table(values, resamples=2000, seed=0).assign(seeds=len(runs))
    settings = {"preset": given.preset, "set": given.set, "seeds": [run.config.seed for run in runs]}
    printed = table[table.condition == table.condition.iloc[0]]
    columns = ["measure", "examples", "reader", "value", "value_low", "value_high", "gain", "behind_told"]
    save_figure(draw(table), table, given.out, settings, runs, printed[columns])


if __name__ == "__main__":
    run_script(main)
