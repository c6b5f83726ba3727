"""What compression does to an LM: its layers, and what probes read of them, beside its compressed selves.

    python analyses/compare_compressed.py FICTION.jsonl --model LM

FICTION.jsonl has a passage a line, with `text`, `author` and `title`. `labels_fiction.py` draws passages and
labels their sentences. What is read is the last token of every sentence, and what is asked of it is whether
the sentence holds words in quotation marks (speech).

Above, how similar the layers of the LM and of each compressed one are (CKA; 0 where passages are permuted).
Below, what probes read: of the LM itself (first); the same probes of the compressed LM (frozen), and of its
activations mapped onto the LM's by Procrustes (mapped); and probes fitted to the compressed LM (refitted).
Bands are 95 % intervals over stories.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from shared.fiction import passages, save_labels
from shared.script import run_script, save_figure, script_parser

import probekit
from probekit.probing.compare import Comparison
from probekit.reports.plot_compare import draw_readings, draw_similarity

TARGET = "speech"


def draw(found: dict[str, Comparison]) -> Figure:
    """Draws a column for each way of compressing: the pairs of layers above, the readings below."""
    figure = Figure(figsize=(4.1 * len(found), 7.0), layout="constrained")
    panels = figure.subplots(2, len(found), squeeze=False)
    for (how, comparison), (above, below) in zip(found.items(), panels.T, strict=True):
        draw_similarity(figure, above, comparison.similarity, "cka")
        above.set_title(f"{comparison.names[0]}, {how}", fontsize=9)
        above.set(xlabel="layer of the compressed LM", ylabel="layer of the LM")
        if comparison.probes is not None:
            draw_readings(below, comparison.probes)
    for axes in panels[1]:
        axes.sharey(panels[1, 0])
        axes.set_xlabel("layer")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Labels the passages, compares the LM with each compressed one, draws, saves."""
    parser = script_parser(__doc__, "figures/compare_compressed.png")
    parser.add_argument("text", type=Path, help="JSON lines with text, author and title")
    parser.add_argument("--model", required=True, help="hub name or folder of the LM")
    parser.add_argument(
        "--compress", nargs="+", default=["int8", "prune=0.5", "rank=64"], help="values of lm.compress"
    )
    parser.add_argument("--authors", type=int, default=12, help="how many authors (12)")
    parser.add_argument("--passages", type=int, default=5, help="passages of each (5)")
    parser.add_argument("--sentences", type=int, default=20, help="most sentences of a passage (20)")
    parser.add_argument("--runs", type=Path, default=Path("runs/compressed"), help="folder of the runs")
    given = parser.parse_args(arguments)
    drawn = passages(given.text, given.authors, given.passages, seed=0)
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
    found = {
        how: probekit.compare(config, {"lm.compress": how}, given.runs / how.replace("=", "-"))
        for how in given.compress
    }
    tables = [
        getattr(comparison, name).assign(compress=how, table=name)
        for how, comparison in found.items()
        for name in ("similarity", "probes")
    ]
    runs = [probekit.load_run(comparison.folder / "second") for comparison in found.values()]
    settings = {name: getattr(given, name) for name in ("authors", "passages", "sentences", "compress")}
    save_figure(draw(found), pd.concat(tables, ignore_index=True).round(5), given.out, settings, runs)


if __name__ == "__main__":
    run_script(main)
