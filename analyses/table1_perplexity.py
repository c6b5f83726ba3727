"""Table 1: perplexity of every way of choosing the action, by base LM, and the differences that are claimed.

    python analyses/table1_perplexity.py runs/table1/planted runs/table1/wikitext
    python analyses/table1_perplexity.py --preset demo --seeds 5 --runs runs/table1

A folder is a sweep, whose seeds are taken together, or a single run; each is a base LM of its own. With
`--preset` the sweep is trained first, into `RUNS/PRESET`, or gone on with. Points are means over seeds of a
document's losses with 95 % intervals from resampling documents, thin marks are single seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import probekit
from probekit.config import Config
from probekit.evaluation.over_seeds import differences_over_seeds, over_seeds
from probekit.reports.intervals import draw_intervals
from probekit.reports.manifest import save_figure

VARIANTS = (
    "none",
    "fixed",
    "uniform",
    "oracle",
    "predicted",
    "straight-through",
    "gumbel",
    "soft",
    "joint",
)
TRUE = "oracle (true actions)"

CLAIMS = (
    ("joint", "soft"),
    ("soft", "predicted"),
    ("predicted", "fixed"),
    ("predicted", "oracle"),
    ("straight-through", "predicted"),
)
"""The first is claimed to have the lower perplexity; of the last, that it makes no difference."""

RESAMPLES = 5000


def read(folder: Path) -> tuple[list[probekit.Run], pd.DataFrame]:
    """The runs of a sweep, or a single one, and their test losses by `name`, a variant's."""
    if probekit.Sweep.is_in(folder):
        runs = list(probekit.Sweep.open(folder).runs.values())
    else:
        runs = [probekit.load_run(folder)]
    losses = pd.concat([run.losses().assign(seed=run.config.seed) for run in runs], ignore_index=True)
    losses["name"] = losses.variant.where(losses.actions != "true", TRUE)
    return runs, losses


def measured(losses: pd.DataFrame) -> pd.DataFrame:
    """Perplexities and differences of one base LM; the column `what` tells them apart."""
    names = [name for name in (*VARIANTS, TRUE) if name in set(losses.name)]
    sums = losses.rename(columns={"loss": "sum", "tokens": "count"}).assign(metric="perplexity")
    values = over_seeds(sums, ["name", "metric"], {"perplexity": np.exp}, resamples=RESAMPLES, seed=0)
    pairs = [pair for pair in CLAIMS if {*pair} <= {*names}]
    parts = [values[values.name.isin(names)].assign(what="perplexity")]
    if pairs:
        found = differences_over_seeds(losses, pairs, resamples=RESAMPLES, seed=0)
        parts.append(found.assign(what="difference", name=found["first"] + " − " + found["second"]))
    return pd.concat(parts, ignore_index=True).drop(columns="metric")


def draw(table: pd.DataFrame) -> Figure:
    """A row of two panels for each base LM."""
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what is missing, measures, saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="sweeps or runs, a base LM each")
    parser.add_argument("--preset", help="train this preset first")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds of it (5)")
    parser.add_argument("--runs", type=Path, default=Path("runs/table1"), help="where to train (runs/table1)")
    parser.add_argument("--out", type=Path, default=Path("figures/table1_perplexity.png"))
    given = parser.parse_args(arguments)
    folders = list(given.folders)
    if given.preset:
        config = Config.from_preset(given.preset).override({"mixing.variants": VARIANTS[1:]})
        folders.append(given.runs / given.preset)
        probekit.sweep(config, {"all": {}}, range(config.seed, config.seed + given.seeds), folders[-1])
    if not folders:
        parser.error("give sweeps or runs, or --preset to train one")
    found = [read(folder) for folder in folders]
    table = pd.concat(
        [
            measured(losses).assign(**{"base LM": folder.name})
            for folder, (_, losses) in zip(folders, found, strict=True)
        ],
        ignore_index=True,
    )
    path = save_figure(
        draw(table),
        table,
        given.out,
        script="analyses/table1_perplexity.py",
        settings={"preset": given.preset, "resamples": RESAMPLES},
        runs=[run for runs, _ in found for run in runs],
    )
    over_all = table[table.seed.isna()]
    print(over_all.drop(columns=["seed", "first", "second"]).to_string(index=False))  # noqa: T201 - a script tells
    print(path)  # noqa: T201


if __name__ == "__main__":
    main()
