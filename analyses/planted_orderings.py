"""Do the paper's orderings come out on the planted corpus? Trains the demo with several seeds and compares.

    python analyses/planted_orderings.py --seeds 0 1 2 --runs runs/planted

Runs that are there already are used as they are. For every claim and seed: the difference of perplexities
with its interval, paired over documents. And the same for the mean over seeds of a document's losses: that
interval speaks of other documents, not of other seeds, whose spread the rows of the single seeds show.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

import probekit
from probekit.evaluation.statistics import Resampling, paired_difference
from probekit.reports.manifest import save_figure

# (first, second): the first is claimed to have the lower perplexity. `oracle` is on the planner's actions.
CLAIMS = [
    ("soft", "predicted"),
    ("predicted", "fixed"),
    ("predicted", "oracle"),
    ("joint", "soft"),
]


def train_and_evaluate(preset: str, seeds: list[int], runs: Path) -> list[probekit.Run]:
    """A trained and evaluated run for every seed, in `runs/seed<N>`."""
    done = []
    for seed in seeds:
        config = probekit.Config.from_preset(preset).override({"seed": seed})
        run = probekit.train(config, runs / f"seed{seed}", existing="resume")
        if not (run.folder / "evaluation.json").exists():
            probekit.evaluate(run)
        done.append(run)
    return done


def losses(run: probekit.Run) -> pd.DataFrame:
    """Test losses in nats, a row for each document, a column for each variant on the actions it uses."""
    table = run.losses()
    return table[table.actions != "true"].pivot_table(index="document", columns="variant", values="loss")


def compare(runs: list[probekit.Run]) -> pd.DataFrame:
    """One row for each claim and seed, and one for all seeds together."""
    tables = [losses(run) for run in runs]
    tokens = runs[0].losses().drop_duplicates("document").set_index("document").tokens.loc[tables[0].index]
    options: Resampling = {"resamples": 5000, "seed": 0, "transform": np.exp}
    by_seed = {str(run.config.seed): table for run, table in zip(runs, tables, strict=True)}
    by_seed["mean"] = sum(tables[1:], tables[0]) / len(tables)
    return pd.DataFrame(
        {"first": first, "second": second, "seed": seed}
        | paired_difference(table[first], table[second], tokens, **options).to_dict()
        for first, second in CLAIMS
        for seed, table in by_seed.items()
    )


def draw(table: pd.DataFrame) -> Figure:
    """Differences with intervals, a panel for each claim."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    panels = figure.subplots(1, len(CLAIMS))
    for axes, (first, second) in zip(panels, CLAIMS, strict=True):
        rows = table[(table["first"] == first) & (table.second == second)].reset_index(drop=True)
        errors = [rows.value - rows.low, rows.high - rows.value]
        axes.errorbar(rows.value, rows.index, xerr=errors, fmt="o", color="#1f4e79", capsize=3)
        axes.axvline(0.0, color="0.4", linewidth=0.8)
        axes.set_yticks(rows.index, rows.seed)
        axes.set_ylabel("seed")
        axes.set_title(f"{first} − {second}", fontsize=10)
        axes.set_xlabel("perplexity (left of 0: as claimed)", fontsize=8)
    return figure


def main() -> None:
    """Trains what is missing, compares, saves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo", help="settings of the runs (demo)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds (0 1 2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/planted"), help="runs' folder (runs/planted)")
    parser.add_argument("--out", type=Path, default=Path("figures/planted_orderings.png"))
    arguments = parser.parse_args()
    runs = train_and_evaluate(arguments.preset, arguments.seeds, arguments.runs)
    table = compare(runs)
    path = save_figure(
        draw(table),
        table,
        arguments.out,
        script="analyses/planted_orderings.py",
        settings={"preset": arguments.preset, "seeds": arguments.seeds},
        runs=runs,
    )
    print(table.to_string(index=False))  # noqa: T201 - a script tells what it found
    print(path)  # noqa: T201


if __name__ == "__main__":
    main()
