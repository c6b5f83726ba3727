"""Table 1 of arXiv 2410.13077: what trained parameters gain, by tuning and member.

    python analyses/depth_table1_parameters.py runs/depth/demo
    python analyses/depth_table1_parameters.py --preset demo --seeds 3 --runs runs/depth

A folder is a single run, or a sweep whose seeds of each member are taken together. With `--preset` the sweep
is trained or continued in `RUNS/PRESET` first, with one member for each of `--tunings`. For every member: the
trained parameters and their share of the LM's, test perplexity, accuracy on multiple-choice questions, and
differences paired over documents. `repeated` has as many parameters as an ensemble, and no depth. Points are
means over seeds of a document's sums with 95 % intervals from resampling documents, thin marks single seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from shared.depth import PAIRS, depth_parser, depth_runs, differences_of, sums_of, values_of
from shared.script import run_script, save_figure

from probekit.io import read_json
from probekit.reports.drawing import draw_intervals
from probekit.run.run import Run

METRICS = {"perplexity": "test perplexity", "accuracy": "accuracy on questions"}
BETTER = {"perplexity": "left", "accuracy": "right"}
"""The side of 0 on which the first is better."""


def trained(run: Run, name: str) -> dict[str, float]:
    """Counts the trained parameters of a model, and their share of the LM's."""
    run.require("lm")
    stages = read_json(run.folder / "run.json")["stages"]
    facts = {}
    if name != run.config.depth.variant:
        run.require(f"depth/{name}")
        facts = stages[f"depth/{name}"]
    parameters = facts.get("parameters", 0) + facts.get("tuned_parameters", 0)
    return {"parameters": parameters, "share": parameters / stages["lm"]["parameters"]}


def measured(runs: Sequence[Run]) -> pd.DataFrame:
    """Measures runs that differ in their seed: values and differences, as the column `what` says."""
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


def draw(table: pd.DataFrame) -> Figure:
    """Draws a row for each group: values of both metrics, then their differences."""
    groups = list(dict.fromkeys(table.runs))
    lines = max(len(set(rows.name)) for _, rows in table[table.what == "value"].groupby("runs"))
    figure = Figure(
        figsize=(17, (0.46 * lines + 1.1) * len(groups)), layout=ConstrainedLayoutEngine(w_pad=0.12)
    )
    panels = figure.subplots(len(groups), 4, squeeze=False, gridspec_kw={"width_ratios": (1.1, 1.1, 1, 1)})
    for row, group in zip(panels, groups, strict=True):
        own = table[table.runs == group]
        values, differences = own[own.what == "value"], own[own.what == "difference"]
        labels = {
            row.name: f"{row.name}\n{int(row.parameters):,} trained ({100 * row.share:.3g} %)"
            for row in values.itertuples()
            if row.parameters
        }
        for axes, metric in zip(row, [*METRICS, *METRICS], strict=True):
            left = axes in row[:2]
            part = (values if left else differences).query("metric == @metric")
            draw_intervals(axes, part, list(dict.fromkeys(part.name)), labels)
            axes.set_xlabel(
                METRICS[metric] if left else f"{metric} ({BETTER[metric]} of 0: the first is better)"
            )
            axes.locator_params(axis="x", nbins=4 if left else 3)
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


def main() -> None:
    """Trains what is missing, measures, saves."""
    parser = depth_parser(__doc__, "depth_table1_parameters")
    given = parser.parse_args()
    groups = depth_runs(given, parser)
    table = pd.concat([measured(runs).assign(runs=name) for name, runs in groups.items()], ignore_index=True)
    shown = table[table.seed.isna()].drop(columns=["seed", "first", "second"], errors="ignore")
    save_figure(draw(table), table, given.out, {"preset": given.preset}, [*chain(*groups.values())], shown)


if __name__ == "__main__":
    run_script(main)
