"""Table 1: perplexity of every variant by base LM, and the differences that the paper claims.

    python analyses/table1_perplexity.py runs/table1/planted runs/table1/wikitext
    python analyses/table1_perplexity.py --preset demo --seeds 5 --runs runs/table1

A folder is a single run, or a sweep whose seeds of each member are taken together. With `--preset` the sweep
is trained or continued in `RUNS/PRESET` first. `--losses` keeps the documents' losses, so that seeds can be
added when the runs of others are gone. Points are means over seeds of a document's losses with 95 %
intervals from resampling documents, thin marks are single seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from shared.script import (
    add_training_options,
    run_script,
    runs_in,
    save_figure,
    script_parser,
    training_config,
)
from shared.seeds import differences_over_seeds, with_earlier

import probekit
from probekit.reports.drawing import draw_intervals
from probekit.run.run import Run
from probekit.statistics import over_seeds

TRAINED = ("fixed", "uniform", "oracle", "predicted", "straight-through", "gumbel", "soft", "joint")
TRUE = "oracle (true actions)"

CLAIMS = (
    ("joint", "soft"),
    ("soft", "predicted"),
    ("predicted", "fixed"),
    ("predicted", "oracle"),
    ("straight-through", "predicted"),
)
"""The first should have the lower perplexity; for the last pair, the claim is that there is no difference."""


def losses_of(runs: Sequence[Run]) -> pd.DataFrame:
    """Test losses of one base LM, with `name`: the variant, or `TRUE`."""
    losses = pd.concat(
        [run.corpus.by_group(run.losses()).assign(seed=run.config.seed) for run in runs], ignore_index=True
    )
    losses["name"] = losses.variant.where(losses.actions != "true", TRUE)
    return losses[["name", "seed", "document", "tokens", "loss"]]


def measured(losses: pd.DataFrame, resamples: int) -> pd.DataFrame:
    """Measures one base LM: perplexities and differences, as the column `what` says."""
    names = [name for name in ("none", *TRAINED, TRUE) if name in set(losses.name)]
    sums = losses.rename(columns={"loss": "sum", "tokens": "count"}).assign(metric="perplexity")
    resampling = {"resamples": resamples, "seed": 0}
    values = over_seeds(sums, ["name", "metric"], {"perplexity": np.exp}, **resampling)
    pairs = [pair for pair in CLAIMS if {*pair} <= {*names}]
    values = values[values.name.isin(names)].sort_values(
        "name", key=lambda column: column.map(names.index), kind="stable"
    )
    parts = [values.assign(what="perplexity")]
    if pairs:
        found = differences_over_seeds(losses, pairs, **resampling)
        parts.append(found.assign(what="difference", name=found["first"] + " − " + found["second"]))
    return pd.concat(parts, ignore_index=True).drop(columns="metric")


def draw(table: pd.DataFrame) -> Figure:
    """Draws a row of two panels for each base LM."""
    models = list(dict.fromkeys(table["base LM"]))
    figure = Figure(figsize=(12.5, 3.1 * len(models)), layout="constrained")
    panels = figure.subplots(len(models), 2, squeeze=False)
    for (left, right), model in zip(panels, models, strict=True):
        rows = table[table["base LM"] == model]
        for axes, what in ((left, "perplexity"), (right, "difference")):
            part = rows[rows.what == what]
            draw_intervals(axes, part, list(dict.fromkeys(part.name)))
        right.set_xscale("symlog", linthresh=0.1)
        right.axvline(0.0, color="0.4", linewidth=0.8)
        seeds, documents = int(rows.seeds.max()), int(rows.documents.max())
        left.set_title(f"{model}: {seeds} seed{'s' * (seeds > 1)}, {documents} documents", fontsize=10)
        left.set_xlabel("test perplexity")
        right.set_xlabel("difference of perplexities (left of 0: the first is better)")
    return figure


def main() -> None:
    """Trains what is missing, measures, saves."""
    parser = script_parser(__doc__, "figures/table1_perplexity.png")
    parser.add_argument("folders", nargs="*", type=Path, help="sweeps or runs")
    add_training_options(parser, "runs/table1", preset=None, seeds=5)
    parser.add_argument(
        "--losses", type=Path, help="a CSV file: losses by document are added to it, and read from it"
    )
    given = parser.parse_args()
    folders = list(given.folders)
    if given.preset:
        config, seeds = training_config(given)
        folders.append(given.runs / given.preset)
        everything = {"all": {"mixing.variants": TRAINED}}
        probekit.sweep(config, everything, seeds, folders[-1])
    if not folders:
        parser.error("give sweeps or runs, or --preset to train one")
    models = {name: runs for folder in folders for name, runs in runs_in(folder).items()}
    losses = pd.concat(
        [losses_of(runs).assign(**{"base LM": name}) for name, runs in models.items()], ignore_index=True
    )
    if given.losses is not None:
        losses = with_earlier(losses, given.losses)
    tables = [
        measured(losses[losses["base LM"] == name], runs[0].config.evaluation.resamples).assign(
            **{"base LM": name}
        )
        for name, runs in models.items()
    ]
    table = pd.concat(tables, ignore_index=True)
    shown = table[table.seed.isna()].drop(columns=["seed", "first", "second", "below"], errors="ignore")
    save_figure(draw(table), table, given.out, {"preset": given.preset}, [*chain(*models.values())], shown)


if __name__ == "__main__":
    run_script(main)
