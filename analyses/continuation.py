"""What one activation holds of the next sentences: the LM writes on after it alone, by layer.

    python analyses/continuation.py FICTION.jsonl --models LM [LM ...]

FICTION.jsonl has a passage a line, with `text`, `author` and `title`; one passage of a story is drawn before
a second of any. In each test passage, the residual stream of the last token before one sentence is put into
an empty context, layer by layer and with all layers together (on the right), and the LM writes on. Shown is
the similarity of what it writes to the true sentences one and two ahead, by the corpus's sentence encoder
(ParaScopes, arXiv 2511.00180).

Beside it: the same with the activation of another passage; with all that stands before; with nothing; and
the embedding that ridge probes of the same activations predict, which were fitted on other stories. Bands are
95 % intervals from resampling stories, which never cross splits. What is finished is not done again by the
next call with the same passages.
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
from shared.fiction import beginning, passages
from shared.script import layers_over, made_of, names_of, run_script, save_figure, script_parser

import probekit
from probekit.cli import commands
from probekit.io import write_text
from probekit.models.pretrained import load_config
from probekit.reports.colours import colours_of_names
from probekit.reports.display import described
from probekit.run.folder import digest_of
from probekit.run.run import Run

CONDITIONS = {
    "context": "-.",
    "ridge map": ":",
    "activation": "-",
    "other document": "--",
    "nothing": (0, (1, 3)),
}
"""What is shown, and how."""

SHARES = {"probe": 0.35, "validation": 0.1, "test": 0.45}
"""Of the passages: nothing is trained, and the more test passages, the narrower intervals are."""


def continued(model: str, texts: Path, folder: Path, given: argparse.Namespace) -> tuple[Run, pd.DataFrame]:
    """Probes the next sentences' embeddings and has the LM write on; what is there is kept."""
    run = folder / "run"
    made_of(
        folder, " ".join(map(str, [digest_of([texts]), given.encoder, given.layers, given.boundaries, model]))
    )
    if not (run / "continuation" / "results.parquet").exists():
        depth = load_config(model).get_text_config().num_hidden_layers
        horizons, layers = ["1", "2"], [str(layer) for layer in layers_over(depth, given.layers)]
        words = ["--model", model, "--corpus", str(texts), "--group", "title", "--out", str(run)]
        words += ["--target", "embedding", "--positions", "1", "--probe.horizons", *horizons]
        words += ["--probe.variants", "none", "--probe.control", "false", "--probe.code_length", "false"]
        words += ["--actions.encoder", given.encoder]
        words += [
            word for name, share in SHARES.items() for word in (f"--corpus.{name}_fraction", str(share))
        ]
        commands.probe([*words, "--probe.layers", *layers])
        words = [str(run), "--continuation.horizons", *horizons, "--evaluation.batch_size", "64"]
        words += ["--continuation.boundaries", str(given.boundaries), "--continuation.layers", *layers]
        commands.continuation(words)
    opened = probekit.load_run(run)
    return opened, opened.continuation().assign(model=folder.name, layers=opened.frozen_lm().layers)


def draw(table: pd.DataFrame, metric: str) -> Figure:
    """Draws a row for each LM and a panel for each sentence ahead."""
    models, horizons = list(table.model.unique()), sorted(table.horizon.unique())
    figure = Figure(figsize=(10.0, 1.0 + 2.7 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), len(horizons), sharey="row", squeeze=False)
    for row, model in zip(panels, models, strict=True):
        for axes, horizon in zip(row, horizons, strict=True):
            own = table[(table.model == model) & (table.horizon == horizon) & (table.metric == metric)]
            draw_panel(axes, own)
            axes.set_title(f"{model}, {horizon} ahead", fontsize=9)
        row[0].set_ylabel(described(metric).label)
    for axes in panels[-1]:
        axes.set_xlabel("layer", fontsize=9)
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(CONDITIONS), fontsize=8, frameon=False
    )
    return figure


def draw_panel(axes: Axes, table: pd.DataFrame) -> None:
    """Draws a metric of every condition by layer; that of all layers together stands behind the last."""
    together = 1.08 * float(table.layers.max())
    for (condition, style), colour in zip(CONDITIONS.items(), colours_of_names(len(CONDITIONS)), strict=True):
        rows = table[table.condition == condition]
        by_layer, whole = rows[rows.layer.notna()].sort_values("layer"), rows[rows.layer.isna()]
        layers = by_layer.layer.astype(float)
        axes.plot(layers, by_layer.value, linestyle=style, color=colour, label=condition)
        axes.fill_between(layers, by_layer.value_low, by_layer.value_high, color=colour, alpha=0.15)
        for value, low, high in whole[["value", "value_low", "value_high"]].to_numpy():
            if len(by_layer):
                axes.errorbar(
                    together, value, [[value - low], [high - value]], fmt="o", color=colour, markersize=3
                )
            else:
                axes.axhline(value, color=colour, linestyle=style)
                axes.axhspan(low, high, color=colour, alpha=0.1, linewidth=0)
    ticks = np.unique(table.layer.dropna().astype(int))
    ticks = ticks[:: max(1, len(ticks) // 5)]
    axes.set_xticks([*ticks, together], [*map(str, ticks), "all"], fontsize=8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws passages, has every LM write on, draws, saves."""
    parser = script_parser(__doc__, "figures/continuation.png")
    parser.add_argument("text", type=Path, help="JSON lines with text, author and title")
    parser.add_argument("--models", nargs="+", required=True, help="hub names or folders of LMs")
    parser.add_argument("--encoder", default="tfidf", help="sentence encoder (tfidf)")
    parser.add_argument("--layers", type=int, default=6, help="how many layers, over the depth (6)")
    parser.add_argument("--authors", type=int, default=40, help="how many authors (40)")
    parser.add_argument("--passages", type=int, default=6, help="passages of each (6)")
    parser.add_argument("--sentences", type=int, default=16, help="most sentences of a passage (16)")
    parser.add_argument("--boundaries", type=int, default=200, help="most test passages (200)")
    parser.add_argument("--metric", default="cosine", choices=("cosine", "true_action", "rouge2"))
    parser.add_argument("--runs", type=Path, default=Path("runs/continuation"), help="folder of the runs")
    given = parser.parse_args(arguments)
    given.runs.mkdir(parents=True, exist_ok=True)
    texts = given.runs / "passages.jsonl"
    drawn = passages(given.text, given.authors, given.passages, seed=0)
    kept = ("author", "title")
    lines = [
        json.dumps({name: passage[name] for name in kept} | {"text": beginning(passage, given.sentences)})
        for passage in drawn
    ]
    write_text(texts, "".join(f"{line}\n" for line in lines))
    names = names_of(given.models)
    found = [
        continued(model, texts, given.runs / name, given)
        for model, name in zip(given.models, names, strict=True)
    ]
    table = pd.concat([part for _, part in found], ignore_index=True)
    options = ("authors", "passages", "sentences", "layers", "boundaries", "metric")
    settings = {name: getattr(given, name) for name in options} | {"models": names}
    save_figure(draw(table, given.metric), table, given.out, settings, [run for run, _ in found])


if __name__ == "__main__":
    run_script(main)
