"""Table 1 of arXiv 2410.13077: what do trained parameters buy, by way of tuning and member?

    python analyses/depth_table1_parameters.py runs/depth/demo
    python analyses/depth_table1_parameters.py --preset demo --seeds 3 --runs runs/depth

A folder is a single run, or a sweep, of which the seeds of each member are taken together. With `--preset`
the sweep is trained first, into `RUNS/PRESET`, or gone on with: one member for each of `--tunings`. Of every
member: the trained parameters and their share of the LM's, test perplexity, accuracy on multiple-choice
questions, and differences that are paired over documents. `repeated` has as many parameters as an ensemble,
and no depth. Points are means over seeds of a document's sums with 95 % intervals from resampling documents,
thin marks are single seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from late_layers import PAIRS, Groups, add_run_options, depth_runs, differences_of, sums_of, values_of
from manifest import save_figure
from matplotlib.figure import Figure
from scripts import run_script, script_parser

import probekit
from probekit.io import read_json
from probekit.reports.figures import draw_intervals

METRICS = {"perplexity": "test perplexity", "accuracy": "accuracy on questions"}
BETTER = {"perplexity": "left", "accuracy": "right"}
"""On which side of 0 the first is better."""


def trained(run: probekit.Run, name: str) -> dict[str, float]:
    """Trained parameters of a model of a run, and their share of the LM's."""
    run.require("lm")
    stages = read_json(run.folder / "run.json")["stages"]
    facts = {}
    if name != run.config.depth.variant:
        run.require(f"depth/{name}")
        facts = stages[f"depth/{name}"]
    parameters = facts.get("parameters", 0) + facts.get("tuned_parameters", 0)
    return {"parameters": parameters, "share": parameters / stages["lm"]["parameters"]}


def measured(runs: Sequence[probekit.Run]) -> pd.DataFrame:
    """Values and differences of runs that differ in their seed; the column `what` tells them apart."""
    first = runs[0].config
    names = [first.depth.variant, *first.depth.members]
    sums = sums_of(runs)
    sums, resamples = sums[sums.name.isin(names)], first.evaluation.resamples
    values = values_of(sums, resamples=resamples)
    counted = pd.DataFrame([{"name": name} | trained(runs[0], name) for name in names])
    parts = [values.merge(counted, on="name", how="left").assign(what="value")]
    if pairs := [pair for pair in PAIRS if {*pair} <= {*names}]:
        found = differences_of(sums, pairs, resamples=resamples)
        parts.append(found.assign(what="difference", name=found["first"] + " − " + found["second"]))
    return pd.concat(parts, ignore_index=True)


def table_of(groups: Groups) -> pd.DataFrame:
    """`measured` of every group; the column `runs` tells them apart."""
    return pd.concat([measured(runs).assign(runs=name) for name, runs in groups.items()], ignore_index=True)


def draw(table: pd.DataFrame) -> Figure:
    """A row for each group: values of both metrics, then their differences."""
    groups = list(dict.fromkeys(table.runs))
    lines = max(len(set(rows.name)) for _, rows in table[table.what == "value"].groupby("runs"))
    figure = Figure(figsize=(17, (0.36 * lines + 1.1) * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 4, squeeze=False, gridspec_kw={"width_ratios": (1.1, 1.1, 1, 1)})
    for row, group in zip(panels, groups, strict=True):
        own = table[table.runs == group]
        values, differences = own[own.what == "value"], own[own.what == "difference"]
        labels = {rows.name: _with_parameters(rows) for rows in values.itertuples()}
        for axes, metric in zip(row, [*METRICS, *METRICS], strict=True):
            left = axes in row[:2]
            part = (values if left else differences).query("metric == @metric")
            draw_intervals(axes, part, list(dict.fromkeys(part.name)), labels)
            axes.set_xlabel(
                METRICS[metric] if left else f"{metric} ({BETTER[metric]} of 0: the first is better)"
            )
            axes.locator_params(axis="x", nbins=5 if left else 4)
            if not left:
                axes.axvline(0.0, color="0.4", linewidth=0.8)
            if axes in row[1::2]:
                axes.set_yticklabels([])
        of = own[own.seed.isna()].groupby("metric").documents.max()
        seeds = int(own.seeds.max())
        row[0].set_title(
            f"{group}: {seeds} seed{'s' * (seeds > 1)}, {of['perplexity']} documents "
            f"(questions on {of['accuracy']})",
            fontsize=11,
            loc="left",
        )
        row[2].set_title("differences", fontsize=11, loc="left")
    return figure


def _with_parameters(row: pd.Series) -> str:
    return (
        f"{row.name}\n{int(row.parameters):,} trained ({100 * row.share:.3g} %)"
        if row.parameters
        else str(row.name)
    )


def main() -> None:
    """Trains what is missing, measures, saves."""
    parser = script_parser(__doc__, "figures/depth_table1_parameters.png")
    add_run_options(parser)
    given = parser.parse_args()
    groups = depth_runs(given, parser)
    table = table_of(groups)
    path = save_figure(
        draw(table),
        table,
        given.out,
        script="analyses/depth_table1_parameters.py",
        settings={"preset": given.preset},
        runs=[run for runs in groups.values() for run in runs],
    )
    shown = table[table.seed.isna()].drop(columns=["seed", "first", "second"], errors="ignore")
    print(shown.to_string(index=False))  # noqa: T201 - a script tells what it found
    print(path)  # noqa: T201


if __name__ == "__main__":
    run_script(main)
