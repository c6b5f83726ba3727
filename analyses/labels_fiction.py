"""What pre-trained LMs know of the fiction they read: probes of six labels by layer.

    python analyses/labels_fiction.py FICTION.jsonl --models LM [LM ...]

FICTION.jsonl has a passage a line, with `text`, `author` and `title`. Of the authors with most stories, as
many passages are drawn from each, a story at a time, and cut after some sentences. What is read is the last
token of every sentence, and what is asked of it:

- author: who wrote it, of stories that no probe was fitted on;
- speech: whether the sentence holds words in quotation marks;
- next speech: whether the next sentence does;
- next paragraph: whether the next sentence begins a paragraph;
- place: the sentence's number in the passage, by ridge;
- title: whether the story's title, without its article, begins with A to L or M to Z: a control that
  nothing should read.

Stories never cross splits, and intervals resample them. A tokenizer that puts line breaks into the last
token of a sentence (as those of Qwen and Llama 3 do) gives the answer to "next paragraph" away.

The probes of each label are written once finished, and the next call with the same passages goes on from
there. Solid lines are the LM, dashed ones random weights; bands are 95 %
intervals. Grey lines are the bag of words of the text so far, the embedding of the token that is read, and
of labels of two classes what shows at the surface (`surface`), by logistic regression on the same examples.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from shared.fiction import SPEECH, passages, save_labels
from shared.script import made_of, names_of, run_script, save_figure, script_parser
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import probekit
from probekit.cli import commands
from probekit.data.corpus import SPLITS
from probekit.evaluation.metrics import two_class_metrics
from probekit.io import write_table
from probekit.reports.colours import colours_of_names
from probekit.reports.plot_probes import BASELINE_STYLES, METRIC_LABELS, mean_over_seeds
from probekit.run.folder import digest_of
from probekit.run.run import Run
from probekit.statistics import Resampling, bootstrap_ratio, sum_groups

TARGETS = {
    "author": "balanced_accuracy",
    "speech": "auroc",
    "next speech": "auroc",
    "next paragraph": "auroc",
    "place": "r2",
    "title": "auroc",
}
"""The labels, and what is shown of each."""

CHANCE = {"auroc": 0.5, "r2": 0.0}
"""What knowing nothing gives; of balanced accuracy it is what the prior has."""

LINES = {name: ("0.5", BASELINE_STYLES[name][1]) for name in ("bag of words", "token embedding")}
LINES["surface"] = ("0.1", ":")
"""Baselines that are drawn, with colour and style of their line."""

ENDINGS = (".", "!", "?", "”", '"', ",", ":")
REPORTED = re.compile(r"\b(said|asked|cried|answered|replied|exclaimed|continued)\b")


def surface(text: str, start: int, end: int, place: int) -> list[float]:
    """What anybody sees up to a sentence's end: marks, length, a verb of speech, an open quotation."""
    sentence, before = text[start:end], text[:end]
    is_open = before.count("“") > before.count("”") or before.count('"') % 2 == 1
    return [
        bool(SPEECH.search(sentence)),
        is_open,
        bool(SPEECH.search(text[max(0, start - 200) : start])),
        bool(REPORTED.search(sentence)),
        *(sentence.endswith(mark) for mark in ENDINGS),
        np.log(len(sentence)),
        place,
    ]


def surface_rows(run: Run, labels: Path) -> pd.DataFrame:
    """A row for each label of two classes: what logistic regression on `surface` tells of test examples.

    Intervals resample stories.
    """
    table, corpus = pd.read_csv(labels), run.corpus
    splits = {corpus.texts[number].text: split for number, split in enumerate(corpus.split)}
    split = table.text.map(splits).map(dict(enumerate(SPLITS)))
    features = [surface(*row) for row in table[["text", "start", "end", "place"]].itertuples(index=False)]
    X, fitted, tested = np.array(features, float), (split == "probe").to_numpy(), (split == "test").to_numpy()
    stories = table.story[tested].factorize()[0]
    one = sum_groups(stories, np.ones(len(stories)))
    resampling: Resampling = {"resamples": 1000, "seed": 0}
    rows = []
    for target in (name for name, metric in TARGETS.items() if metric == "auroc"):
        y = table[target].to_numpy(int)
        reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(X[fitted], y[fitted])
        said, true = reader.predict_log_proba(X[tested]), y[tested]
        share = np.log([1 - y[fitted].mean(), y[fitted].mean()])
        bits = (said[np.arange(len(true)), true] - share[true]) / np.log(2)
        odds = (said[:, 1] - said[:, 0])[:, None]
        auroc = two_class_metrics(odds, true == 1, stories, 0.05, **resampling)["auroc"][0]
        over_prior = bootstrap_ratio(sum_groups(stories, bits), one, **resampling)
        found = over_prior.columns("bits") | auroc.columns("auroc")
        row = {"reader": "surface", "target": target, "examples": len(true), "groups": len(one)}
        rows.append(found | row | {"documents": len(one)})
    return pd.DataFrame(rows)


def probed(model: str, labels: Path, folder: Path, given: argparse.Namespace) -> tuple[Run, pd.DataFrame]:
    """Probes every label of an LM, and returns the run and its results; those there are kept."""
    run = folder / "run"
    tables = []
    made_of(folder, f"{digest_of([labels])} {' '.join(given.variants)} {model}")
    for target, metric in TARGETS.items():
        kept = folder / f"{target}.parquet"
        if not kept.exists():
            kind, solver = ("numbers", "ridge") if metric == "r2" else ("classes", "softmax")
            words = ["--model", model, "--labels", str(labels), "--text", "text", "--target", target]
            words += ["--group", "story", "--out", str(run), "--store"]
            words += ["--probe.kind", kind, "--probe.solvers", solver]  # a run keeps what it was given last
            commands.probe([*words, "--probe.variants", *given.variants])
            write_table(kept, probekit.load_run(run).probes())
        tables.append(pd.read_parquet(kept))
    opened = probekit.load_run(run)
    return opened, pd.concat([*tables, surface_rows(opened, labels)]).assign(model=folder.name)


def draw(table: pd.DataFrame) -> Figure:
    """Draws a panel for each label: its metric by layer, of every LM and of random weights."""
    figure = Figure(figsize=(10.0, 5.8), layout="constrained")
    models = list(table.model.unique())
    probes = table[table.reader == "probe"]
    panels = figure.subplots(2, 3)
    for axes in panels[-1]:
        axes.set_xlabel("depth: share of the layers", fontsize=9)
    for axes, (target, metric) in zip(panels.flat, TARGETS.items(), strict=True):
        for model, colour in zip(models, colours_of_names(len(models)), strict=True):
            of_model = probes[(probes.model == model) & (probes.target == target)]
            for variant, cells in of_model.groupby("variant"):
                means = mean_over_seeds(cells, metric).sort_values("layer")
                style = "--" if variant == "random" else "-"
                share = means.layer / means.layer.max()  # LMs differ in the number of their layers
                axes.plot(share, means.value, style, color=colour, label=f"{model}, {variant}")
                axes.fill_between(share.astype(float), means.low, means.high, color=colour, alpha=0.15)
        beside = table[(table.reader != "probe") & (table.target == target)]
        for reader, (colour, line) in LINES.items():
            value = beside[beside.reader == reader][metric].mean()
            if np.isfinite(value):
                axes.axhline(value, color=colour, linestyle=line, label=reader)
        of_prior = beside[beside.reader == "prior"][metric].mean()
        axes.axhline(CHANCE.get(metric, of_prior), color="0.7", linewidth=0.8, label="_chance")
        axes.set_title(f"{target}: {METRIC_LABELS[metric].removeprefix('test ')}", fontsize=9)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the labels, probes what is not probed yet, draws, saves."""
    parser = script_parser(__doc__, "figures/labels_fiction.png")
    parser.add_argument("text", type=Path, help="JSON lines with text, author and title")
    parser.add_argument("--models", nargs="+", required=True, help="hub names or folders of LMs")
    parser.add_argument("--variants", nargs="+", default=["none", "random"], help="whose weights")
    parser.add_argument("--authors", type=int, default=6, help="how many authors (6)")
    parser.add_argument("--passages", type=int, default=24, help="passages of each (24)")
    parser.add_argument("--sentences", type=int, default=16, help="most sentences of a passage (16)")
    parser.add_argument("--runs", type=Path, default=Path("runs/labels_fiction"), help="folder of the runs")
    given = parser.parse_args(arguments)
    drawn = passages(given.text, given.authors, given.passages, seed=0)
    labels = save_labels(drawn, given.sentences, given.runs)
    names = names_of(given.models)
    found = [
        probed(model, labels, given.runs / name, given)
        for model, name in zip(given.models, names, strict=True)
    ]
    table = pd.concat([part for _, part in found], ignore_index=True)
    settings = {name: getattr(given, name) for name in ("authors", "passages", "sentences", "variants")}
    save_figure(draw(table), table, given.out, settings | {"models": names}, [run for run, _ in found])


if __name__ == "__main__":
    run_script(main)
