"""Figure 3 on real text: what pre-trained LMs know of the topics of the sentences ahead.

    python analyses/figure3_pretrained.py ARTICLES.jsonl --models LM [LM ...]

The text is read as the preset `smollm2-wikipedia` says: the opening sentences of articles, clustered into
actions by their embeddings. For each LM, and for the same architecture with random weights, probes read the
action of the sentences ahead, in layers spread over the depth, at some tokens before the next sentence. A
planner is trained on the embeddings of the sentences so far, and counted on nothing else.

Above, gain over the strongest baseline that needs no model, by layer and distance, of the next sentence; a
dot marks cells whose interval, which holds for all cells of the LM, is above zero. Below, bits over the prior
by how many sentences ahead, right before the next one: the layer that is best on validation documents for
each, beside what counting knows and the planner. Intervals resample articles.

What is finished is kept: the next call with the same text and LMs goes on from there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from shared.script import made_of, names_of, run_script, save_figure, script_parser

import probekit
from probekit.config import Config, reading_order
from probekit.probing.results import validation_loss
from probekit.reports.drawing import colour_bar, colours_of_names, draw_line
from probekit.reports.plot_probes import (
    BASELINE_STYLES,
    METRICS,
    Panel,
    draw_heat_map,
    mean_over_seeds,
    probe_scale,
)
from probekit.run.folder import digest_of
from probekit.run.run import Run

LOCATION = "hook_resid_post"
DISTANCES = (1, 2, 4, 8)
HORIZONS = (1, 2, 3, 4)

BESIDE = ("planner", "bag of words", "bigram (current action)", "skip n-gram", "token embedding")
"""Readers that are drawn beside the probes."""

KEPT = ["lm", "reader", "variant", "seed", "layer", "distance", "horizon", "examples", "documents"]
METRICS_KEPT = ("accuracy", "cross_entropy", "bits", "gain", "over_planner", "selectivity")


def probed(model: str, folder: Path, given: argparse.Namespace) -> Run:
    """Trains the planner and probes an LM, unless that is finished."""
    made_of(folder, f"{digest_of([given.text])} {given.encoder} {given.documents} {model}")
    config = Config.from_preset("smollm2-wikipedia").override(
        {
            "lm.name": model,
            "corpus.reader": "auto",
            "corpus.path": given.text,
            "corpus.subset": None,
            "corpus.max_documents": given.documents,
            "actions.encoder": given.encoder,
            "mixing.variants": ["none"],
            "evaluation.window": None,
        }
    )
    run = probekit.train(config, folder / "run", existing="resume")
    depth = run.frozen_lm().layers
    settings = {
        "probe.layers": np.unique(np.linspace(0, depth - 1, given.layers).round().astype(int)).tolist(),
        "probe.positions": DISTANCES,
        "probe.horizons": HORIZONS,
        "probe.code_length": False,
    }
    if not (run.folder / "probes" / "results.parquet").exists():
        probekit.probe(run, settings)
    return run


def best_cells(table: pd.DataFrame) -> pd.DataFrame:
    """Of each LM, variant and horizon, the cell at the nearest distance that validation documents choose."""
    cells = table[(table.reader == "probe") & (table.distance == 1)]
    chosen = validation_loss(cells).groupby([cells.lm, cells.variant, cells.horizon]).idxmin()
    return table.loc[chosen]


def draw(table: pd.DataFrame) -> Figure:
    """Draws a column for each LM."""
    lms = list(table.lm.unique())
    figure = Figure(figsize=(5.6 * len(lms), 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1.0])
    grid = top.subplots(1, 2 * len(lms), squeeze=False)
    shown = [(lm, variant) for lm in lms for variant in ("none", "random")]
    cells = [Panel(variant, LOCATION).cells(table[table.lm == lm]) for lm, variant in shown]
    means = [mean_over_seeds(one, "gain") for one in cells]
    scale = probe_scale(means, "gain")
    for axes, (lm, variant), own, mean in zip(grid.flat, shown, cells, means, strict=True):
        draw_heat_map(axes, own, "gain", scale, numbers=False)
        columns, layers = reading_order(mean.position), sorted(mean.layer.unique(), reverse=True)
        above = mean[mean.low > 0]
        x = [columns.index(position) + 0.5 for position in above.position]
        y = [layers.index(layer) + 0.5 for layer in above.layer]
        axes.plot(x, y, ".", color="black", markersize=3)
        axes.set(xlabel="", ylabel="")
        axes.set_title(f"{lm}\n{'random weights' if variant == 'random' else 'its weights'}", fontsize=9)
        axes.tick_params(labelsize=7)
    top.supxlabel("distance: tokens before the next sentence", fontsize=9)
    top.supylabel("layer", fontsize=9)
    colour_bar(top, grid, scale, pd.concat(means).value, METRICS["gain"])
    best = best_cells(table)
    panels = bottom.subplots(1, len(lms), squeeze=False, sharey=True)
    for axes, lm in zip(panels.flat, lms, strict=True):
        of_lm, beside = best[best.lm == lm], table[(table.lm == lm) & (table.distance == 1)]
        for variant, colour in zip(("none", "random"), colours_of_names(2), strict=True):
            rows = of_lm[of_lm.variant == variant].sort_values("horizon")
            name = "probe" if variant == "none" else "probe, random weights"
            values = rows.rename(columns={"bits": "value", "bits_low": "low", "bits_high": "high"})
            draw_line(axes, values, "horizon", name, colour)
        for reader in BESIDE:
            colour, style = BASELINE_STYLES[reader]
            rows = beside[(beside.reader == reader) & beside.bits.notna()].sort_values("horizon")
            rows = rows.drop_duplicates("horizon")
            axes.plot(rows.horizon, rows.bits, style if len(rows) > 1 else "D", color=colour, label=reader)
        axes.axhline(0.0, color="0.7", linewidth=0.8)
        axes.set_xticks(HORIZONS)
        axes.set_xlabel("sentences ahead", fontsize=9)
        axes.set_title(f"{lm}: {int(beside.documents.max())} articles", fontsize=9)
    panels.flat[0].set_ylabel(METRICS["bits"])
    handles, names = panels.flat[0].get_legend_handles_labels()
    bottom.legend(handles, names, loc="outside lower center", ncols=2 + len(lms), fontsize=8, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """Probes what is not probed yet, draws, saves."""
    parser = script_parser(__doc__, "figures/figure3_pretrained.png")
    parser.add_argument("text", type=Path, help="texts, such as JSON lines with a column `text`")
    parser.add_argument("--models", nargs="+", required=True, help="hub names or folders of LMs")
    parser.add_argument(
        "--encoder",
        default="sentence-transformers/all-MiniLM-L6-v2",
        help="sentence encoder (sentence-transformers/all-MiniLM-L6-v2)",
    )
    parser.add_argument("--documents", type=int, default=6100, help="at most so many texts (6100)")
    parser.add_argument("--layers", type=int, default=11, help="how many layers, over the depth (11)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/figure3_pretrained"), help="folder of the runs"
    )
    given = parser.parse_args(arguments)
    names = names_of(given.models)
    runs = [probed(model, given.runs / name, given) for model, name in zip(given.models, names, strict=True)]
    found = [run.probes().assign(lm=name) for run, name in zip(runs, names, strict=True)]
    table = pd.concat(found, ignore_index=True)
    bounds = [f"{metric}{bound}" for metric in METRICS_KEPT for bound in ("", "_low", "_high")]
    numbers = table[[*KEPT, *bounds, "gain_over", "validation_cross_entropy", "l2", "tokens_read"]]
    settings = {"documents": given.documents, "layers": given.layers, "models": names}
    shown = best_cells(table)[["lm", "variant", "horizon", "layer", *bounds[6:15]]]
    save_figure(draw(table), numbers, given.out, settings, runs, shown)


if __name__ == "__main__":
    run_script(main)
