"""What LMs know of ten phenomena of English: minimal pairs, made by rule.

    python analyses/minimal_pairs.py --models LM LM [LM ...]

Each phenomenon has 40 groups of two pairs (`shared/english_pairs.py`). What is right in one pair is wrong in
the other of its group: who only prefers some words, or an order of words, is right in one half.

Left, the share of pairs whose right sentence is more probable, by total log-probability; middle, by how much;
right, the paired difference of that share to the first LM. Intervals are 95 %, from resampling groups: they
are about other words in the same sentences, not about other sentences. Grey is the first LM with random
weights, a mark for each draw. What each LM says of each pair is kept in `--runs`, with the items.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shared.english_pairs import PHENOMENA, pairs
from shared.script import names_of, run_script, save_figure, script_parser

import probekit
from probekit.evaluation.ask import RANDOM_WEIGHTS
from probekit.evaluation.items import ALL_KINDS, read_items
from probekit.evaluation.preferences import LogProbabilities, preference_table
from probekit.io import write_text
from probekit.reports.colours import colours_of_names

PANELS = {
    "accuracy": "share of pairs that are right",
    "margin": "margin (nats)",
    "over_first": "right, over the first LM",
}


def asked(given: argparse.Namespace) -> tuple[pd.DataFrame, list[dict[str, object]]]:
    """Asks every LM the same pairs; returns the table of all of them, and what they are."""
    items = given.runs / "items.jsonl"
    write_text(items, "".join(f"{json.dumps(pair)}\n" for pair in pairs()))
    found: dict[str | None, LogProbabilities] = {}
    known: list[dict[str, object]] = []
    for model, name in zip(given.models, names_of(given.models), strict=True):
        random = 0 if found else given.random
        settings = {"lm.dtype": given.dtype}
        answers = probekit.ask(model, items, given.runs / name, random=random, settings=settings)
        for revision, own in answers.answers.groupby("revision", dropna=False, sort=False):
            drawn = str(revision).startswith(RANDOM_WEIGHTS)
            found[str(revision) if drawn else name] = log_probabilities(own)
        known += answers.settings["revisions"]
    table = preference_table(read_items(items), found, "total", resamples=2000, seed=0)
    return table.rename(columns={"revision": "model"}), known


def log_probabilities(answers: pd.DataFrame) -> LogProbabilities:
    """What an LM says of pairs without a context, from a row for each item and choice."""
    own, tokens = (
        answers.pivot_table(index="item", columns="choice", values=name).to_numpy()
        for name in ("log_probability", "tokens")
    )
    return LogProbabilities(own, own, tokens.astype(np.int64))


def draw(table: pd.DataFrame) -> Figure:
    """Draws a panel for each of `PANELS`, with a row for each phenomenon."""
    figure = Figure(figsize=(10.0, 4.6), layout="constrained")
    kinds = [*PHENOMENA, ALL_KINDS]
    panels = figure.subplots(1, len(PANELS), sharey=True)
    drawn = table.model.str.startswith(RANDOM_WEIGHTS)
    models = list(table[~drawn].model.unique())
    axes: Axes
    for axes, (metric, title) in zip(panels, PANELS.items(), strict=True):
        if metric != "over_first":
            rows = table[drawn].kind.map(kinds.index)
            axes.plot(table[drawn][metric], rows, "|", color="0.6", label="random weights")
        for number, (model, colour) in enumerate(zip(models, colours_of_names(len(models)), strict=True)):
            own = table[table.model == model].set_index("kind").loc[kinds]
            row = np.arange(len(kinds)) + 0.25 * (number - (len(models) - 1) / 2)
            ends = np.stack([own[metric] - own[f"{metric}_low"], own[f"{metric}_high"] - own[metric]])
            axes.errorbar(own[metric], row, xerr=ends, fmt="o", markersize=4, color=colour, label=model)
        axes.axvline(0.5 if metric == "accuracy" else 0.0, color="0.7", linewidth=0.8)
        axes.axhline(len(PHENOMENA) - 0.5, color="0.85", linewidth=0.8)
        axes.set_xlabel(title, fontsize=9)
    panels[0].set_yticks(np.arange(len(kinds)), kinds, fontsize=9)
    panels[0].invert_yaxis()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the pairs, asks the LMs, draws, saves."""
    parser = script_parser(__doc__, "figures/minimal_pairs.png")
    parser.add_argument("--models", nargs="+", required=True, help="hub names or folders of causal LMs")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/minimal_pairs"), help="folder of what they say"
    )
    parser.add_argument("--random", type=int, default=5, help="draws of random weights of the first LM (5)")
    parser.add_argument("--dtype", default="auto", help="numbers that weights are held in (auto)")
    given = parser.parse_args(arguments)
    given.runs.mkdir(parents=True, exist_ok=True)
    table, known = asked(given)
    columns = ["model", "kind", "accuracy", "accuracy_low", "accuracy_high", "margin"]
    save_figure(draw(table), table, given.out, {"models": known}, [], table[columns])


if __name__ == "__main__":
    run_script(main)
