"""What compression and tuning do to an LM: its layers, and what probes read of them, beside its other selves.

    python analyses/compare_compressed.py FICTION.jsonl --model LM --tune 110

FICTION.jsonl has a passage a line, with `text`, `author` and `title`. `labels_fiction.py` draws passages and
labels their sentences. What is read is the last token of every sentence, and what is asked of it is whether
the sentence holds words in quotation marks (speech).

With `--tune N`, all weights are also tuned on N passages of other stories, one pass in float32.

Above, how similar the layers of the LM and of each changed one are (CKA; 0 where passages are permuted).
Below, what probes read: of the LM itself (first); the same probes of the changed LM (frozen), and of its
activations mapped onto the LM's by Procrustes (mapped); and probes fitted to the changed LM (refitted).
Bands are 95 % intervals over stories.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from shared.fiction import other_stories, passages, save_labels
from shared.script import run_script, save_figure, script_parser

import probekit
from probekit.io import write_text
from probekit.probing.compare import Comparison
from probekit.reports.plot_compare import draw_readings, draw_similarity

TARGET = "speech"


def draw(found: dict[str, Comparison]) -> Figure:
    """Draws a column for each change: the pairs of layers above, the readings below."""
    figure = Figure(figsize=(4.1 * len(found), 7.0), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False)
    for (how, comparison), (above, below) in zip(found.items(), panels.T, strict=True):
        draw_similarity(figure, above, comparison.similarity, "cka")
        above.set_title(f"{comparison.names[0]}, {how}", fontsize=9)
        above.set(xlabel="layer of the changed LM", ylabel="layer of the LM")
        if comparison.probes is not None:
            draw_readings(below, comparison.probes)
    for axes in panels[1]:
        axes.sharey(panels[1, 0])
        axes.set_xlabel("layer")
    return figure


def tuned(model: str, other: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Tunes all weights of an LM on passages, or goes on with it; returns the folder of the tuned LM."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "passages.jsonl"
    write_text(text, "".join(f"{json.dumps(passage, ensure_ascii=False)}\n" for passage in other))
    config = probekit.Config().override(
        {
            "method": "depth-ensemble",
            "lm.name": model,
            "corpus.path": str(text),
            "corpus.group_column": "title",
            "corpus.probe_fraction": 0.0,
            "corpus.test_fraction": 0.05,
            "corpus.validation_fraction": 0.05,
            "actions.labels": "none",
            "depth.members": ["plain"],
            "depth.layers": 1,
            "training.base.tuning": "full",
            "training.base.learning_rate": 1e-5,
            "training.depth.batch_size": 8,
        }
    )
    return probekit.train(config, folder / "run", existing="resume").tuned_folder("plain")


def main(arguments: Sequence[str] | None = None) -> None:
    """Labels the passages, compares the LM with each changed one, draws, saves."""
    parser = script_parser(__doc__, "figures/compare_compressed.png")
    parser.add_argument("text", type=Path, help="JSON lines with text, author and title")
    parser.add_argument("--model", required=True, help="hub name or folder of the LM")
    parser.add_argument(
        "--compress", nargs="+", default=["int8", "prune=0.5", "rank=64"], help="values of lm.compress"
    )
    parser.add_argument(
        "--tune", type=int, default=0, metavar="N", help="also tune the LM on N passages of other stories (0)"
    )
    parser.add_argument("--authors", type=int, default=12, help="how many authors (12)")
    parser.add_argument("--passages", type=int, default=5, help="passages of each (5)")
    parser.add_argument("--sentences", type=int, default=20, help="most sentences of a passage (20)")
    parser.add_argument("--runs", type=Path, default=Path("runs/compressed"), help="folder of the runs")
    given = parser.parse_args(arguments)
    drawn = [*passages(given.text, given.authors, given.passages, seed=0)]
    labels = save_labels(drawn, given.sentences, given.runs)
    config = probekit.Config.from_preset("any-model").override(
        {
            "lm.name": given.model,
            "corpus.path": str(labels),
            "corpus.distinct": True,
            "corpus.group_column": "story",
            "corpus.probe_fraction": 0.45,
            "corpus.test_fraction": 0.35,  # few passages: nothing is trained, and intervals are over these
            "actions.labels": "none",
            "probe.labels": str(labels),
            "probe.text_column": "text",
            "probe.target": TARGET,
        }
    )
    changes: dict[str, dict[str, Any]] = {how: {"lm.compress": how} for how in given.compress}
    if given.tune:
        other = other_stories(given.text, drawn, given.tune, seed=0)
        changes["tuned on fiction"] = {"lm.name": str(tuned(given.model, other, given.runs / "tuned"))}
    found = {
        how: probekit.compare(config, change, given.runs / re.sub(r"[= ]", "-", how))
        for how, change in changes.items()
    }
    tables = [
        getattr(comparison, name).assign(change=how, table=name)
        for how, comparison in found.items()
        for name in ("similarity", "probes")
    ]
    runs = [probekit.load_run(comparison.folder / "second") for comparison in found.values()]
    settings = {
        name: getattr(given, name) for name in ("authors", "passages", "sentences", "compress", "tune")
    }
    save_figure(draw(found), pd.concat(tables, ignore_index=True).round(5), given.out, settings, runs)


if __name__ == "__main__":
    run_script(main)
