"""What becomes of speech in fiction when what reads it is erased or steered, in pre-trained LMs.

    python analyses/causal_fiction.py FICTION.jsonl --models LM [LM ...]

FICTION.jsonl has a passage a line, with `text`, `author` and `title`. As many passages are drawn from each of
the authors with most stories, and cut after some sentences. The label of a sentence is whether it holds words
in quotation marks. Probes read before a sentence whether it will; then, in test stories, LEACE erases what a
linear probe reads at the last tokens before the boundary, or the mean of the label that the sentence does
not have is added, and the LM writes the sentence.

Above, accuracies of least-squares probes by layer: before, after erasing and fitting again, and of the more
frequent label. Below, by how much steering changes the share of written sentences that have the label aimed
at, according to a classifier of words, beyond a change as large in a random direction: a paired difference.
Bars are 95 % intervals that resample stories. What is finished is kept in `--runs`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from shared.fiction import SPEECH, beginning, passages
from shared.script import made_of, names_of, run_script, save_figure, script_parser

import probekit
from probekit.cli import commands
from probekit.io import write_text
from probekit.reports.colours import COLOUR
from probekit.run.folder import digest_of
from probekit.run.run import Run

ERASED = {
    "fitted_accuracy": ("least squares", COLOUR, "-"),
    "refitted_accuracy": ("erased, fitted again", "#b35900", "-"),
    "prior_accuracy": ("the more frequent label", "0.5", ":"),
}
"""Metrics of the upper panels: name, colour and style."""

SPLITS = {"probe": 0.35, "validation": 0.1, "test": 0.35}
"""Shares of the stories; the rest, `train`, teaches the classifier that judges written sentences."""


APART = 0.3
"""Layers between what stands side by side."""

SETTINGS = ("authors", "passages", "sentences", "boundaries", "layers", "reach", "strengths", "seed")
"""Options that the numbers depend on."""


def tested(model: str, corpus: Path, folder: Path, given: argparse.Namespace) -> tuple[Run, pd.DataFrame]:
    """Probes and changes one LM, and returns the run and its table of interventions, which is kept."""
    run, exported, labels = folder / "run", folder / "sentences.csv", folder / "labels.csv"
    results = run / "interventions" / "none" / "results.parquet"
    settings = {name: getattr(given, name) for name in SETTINGS}
    made_of(folder, f"{digest_of([corpus])} {settings} {model}")
    if not results.exists():
        words = ["--preset", "any-model", "--lm.name", model, "--corpus.path", str(corpus)]
        words += ["--corpus.group_column", "story", "--actions.labels", "none"]
        words += ["--seed", str(given.seed), "--evaluation.window", "128"]
        for split, share in SPLITS.items():
            words += [f"--corpus.{split}_fraction", str(share)]
        commands.corpus([*words, "--out", str(run), "--resume", "--export", str(exported)])
        sentences = pd.read_csv(exported, keep_default_na=False)
        sentences["speech"] = [bool(SPEECH.search(text)) for text in sentences.text]
        write_text(labels, sentences.to_csv(index=False))
        words = ["--labels", str(labels), "--target", "speech", "--probe.positions", "1"]
        words += ["--probe.control", "false", "--probe.code_length", "false", "--probe.variants", "none"]
        commands.probe(["--model", model, "--out", str(run), *words])
        words = ["--intervene.kinds", "erase", "steer", "--intervene.distances", str(given.reach)]
        words += ["--intervene.boundaries", str(given.boundaries)]
        words += ["--intervene.samples", str(given.boundaries)]
        words += ["--intervene.strengths", *map(str, given.strengths)]
        if given.layers is not None:
            words += ["--intervene.layers", *map(str, given.layers)]
        commands.intervene([str(run), *words])
    return probekit.load_run(run), pd.read_parquet(results).assign(model=folder.name)


def bars(axes: Axes, rows: pd.DataFrame, number: int, label: str, colour: str, style: str) -> None:
    """Draws a metric by layer, with its intervals, beside those of other numbers."""
    rows = rows.sort_values("layer")
    ends = abs(rows[["value_low", "value_high"]].sub(rows.value, axis=0).to_numpy().T)
    at = rows.layer.astype(float) + APART * number
    axes.errorbar(at, rows.value, ends, fmt=style, marker=".", color=colour, capsize=2, label=label)


def draw(table: pd.DataFrame) -> Figure:
    """Draws erasing above and steering below, a column for each LM."""
    models = list(table.model.unique())
    figure = Figure(figsize=(1.8 + 4.2 * len(models), 6.2), layout="constrained")
    panels = figure.subplots(2, len(models), squeeze=False, sharey="row")
    for column, model in enumerate(models):
        own = table[table.model == model]
        above, below = panels[:, column]
        for number, (metric, look) in enumerate(ERASED.items()):
            bars(above, own[(own.kind == "erase") & (own.metric == metric)], number, *look)
        above.set_title(model, fontsize=10)
        steered = own[own.metric == "plan_following_over_random"]
        for number, ((label, strength), rows) in enumerate(steered.groupby(["condition", "strength"])):
            bars(below, rows, number, f"{label}, {strength:g} times", f"C{number}", "-")
        below.axhline(0, color="0.5", linewidth=0.8, linestyle=":")
        below.set_xlabel("layer", fontsize=9)
        for panel in (above, below):
            panel.set_xticks(sorted(own.layer.unique()))
    panels[0, 0].set_ylabel("accuracy of a linear probe", fontsize=9)
    panels[1, 0].set_ylabel("share of the label aimed at,\nsteered less random", fontsize=9)
    for row in panels:
        row[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the passages, tests what is not tested yet, draws, saves."""
    parser = script_parser(__doc__, "figures/causal_fiction.png")
    parser.add_argument("text", type=Path, help="JSON lines with text, author and title")
    parser.add_argument("--models", nargs="+", required=True, help="hub names or folders of LMs")
    parser.add_argument("--authors", type=int, default=3, help="how many authors (3)")
    parser.add_argument("--passages", type=int, default=120, help="passages of each (120)")
    parser.add_argument("--sentences", type=int, default=12, help="most sentences of a passage (12)")
    parser.add_argument("--boundaries", type=int, default=100, help="sentences that are written (100)")
    parser.add_argument("--layers", nargs="+", type=int, help="layers that are changed (all)")
    parser.add_argument("--reach", type=int, default=4, help="how many tokens before them are changed (4)")
    parser.add_argument("--strengths", nargs="+", type=float, default=[1.0, 4.0], help="of steering (1 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the splits and of what is written (0)")
    parser.add_argument("--runs", type=Path, default=Path("runs/causal_fiction"), help="folder of the runs")
    given = parser.parse_args(arguments)
    drawn = [
        {"text": beginning(passage, given.sentences), "story": f"{passage['author']}: {passage['title']}"}
        for passage in passages(given.text, given.authors, given.passages, seed=0)
    ]
    given.runs.mkdir(parents=True, exist_ok=True)
    corpus = given.runs / "passages.jsonl"
    write_text(corpus, "".join(f"{json.dumps(row)}\n" for row in drawn))
    found = [
        tested(model, corpus, given.runs / name, given)
        for model, name in zip(given.models, names_of(given.models), strict=True)
    ]
    table = pd.concat([part for _, part in found], ignore_index=True)
    settings = {name: getattr(given, name) for name in SETTINGS} | {"models": list(table.model.unique())}
    save_figure(draw(table), table, given.out, settings, [run for run, _ in found])


if __name__ == "__main__":
    run_script(main)
