"""Table 3: which parts of joint training matter; one is changed at a time, all against soft mixing.

    python analyses/table3_joint.py --preset demo --seeds 5 --runs runs/table3
    python analyses/table3_joint.py --runs runs/table3 --only joint "no planner loss"

Every row is an adapter (and, where it is joint, a planner) trained on the same base LM and from the same
planner; the sweep in RUNS shares these. Left: test perplexity minus that of soft mixing with a frozen
planner, paired over documents. Right: the planner's accuracy afterwards. Points are means over seeds, thin
marks are single seeds; intervals are at 95 %, from resampling documents (of an accuracy, the mean of the
seeds' intervals).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure
from shared.script import add_training_options, run_script, save_figure, script_parser, training_config
from shared.seeds import differences_over_seeds

import probekit
from probekit.config import Config, VariantName
from probekit.reports.drawing import draw_intervals


class Row(NamedTuple):
    """A row of the table: the variant that is trained, and changed settings by dotted name."""

    variant: VariantName = "joint"
    settings: Mapping[str, Any] = {}


REFERENCE = "soft, planner frozen"


def rows(config: Config) -> dict[str, Row]:
    """Returns the rows by name; rates are multiples of the preset's own."""
    rate = config.training.joint.planner_learning_rate
    adapter_rate = config.training.adapter.learning_rate

    def joint(**settings: Any) -> Row:
        return Row(settings={f"training.joint.{name}": value for name, value in settings.items()})

    return {
        REFERENCE: Row("soft"),
        "soft, temperature learned": Row("soft", {"mixing.learn_temperature": True}),
        "joint": Row(),
        "planner's own loss alone": joint(end_to_end=False),
        "next-token loss alone": joint(planner_loss_weight=0.0),
        "planner loss × 0.1": joint(planner_loss_weight=0.1),
        "planner rate × 0.1": joint(planner_learning_rate=0.1 * rate),
        "planner rate × 3": joint(planner_learning_rate=3 * rate),
        "planner rate = adapter's": joint(planner_learning_rate=adapter_rate),
        "unfrozen after a half": joint(planner_frozen=0.5),
        "temperature learned": Row(settings={"mixing.learn_temperature": True}),
        "encoder trained": joint(encoder_learning_rate=rate),
        "straight-through": Row("straight-through"),
        "gumbel": Row("gumbel"),
    }


def members(table: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    """Returns the sweep's members; names of folders have no spaces."""
    return {_folder(name): {"mixing.variants": [row.variant], **row.settings} for name, row in table.items()}


def _folder(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.replace("×", "x"))


def compare(sweep: probekit.Sweep, table: Mapping[str, Row]) -> pd.DataFrame:
    """Measures differences from soft mixing, and planners' accuracies, as the column `what` says."""
    names = {_folder(name): name for name in table}
    losses = sweep.corpus.by_group(sweep.losses())
    losses = losses[(losses.variant != "none") & (losses.actions != "true")]
    losses = losses.assign(name=losses.member.map(names)).dropna(subset=["name"])
    pairs = [(name, REFERENCE) for name in table if name != REFERENCE]
    resamples = sweep.config.evaluation.resamples
    differences = differences_over_seeds(losses, pairs, resamples=resamples, seed=0)
    differences = differences.assign(what="difference", name=differences["first"])
    accuracies = pd.DataFrame(
        {"name": names[place.member], "seed": place.seed, "what": "planner accuracy"}
        | {f"value{end}": reader[f"value{end}"] for end in ("", "_low", "_high")}
        | {"seeds": 1, "documents": reader["documents"]}
        for place, run in sweep.runs.items()
        if place.member in names
        for reader in run.evaluation()["planner"]
        if reader["metric"] == "accuracy" and reader["reader"] == _planner(table[names[place.member]])
    )
    return pd.concat([differences, accuracies, _means(accuracies)], ignore_index=True)


def _planner(row: Row) -> str:
    """The name of the row's planner in an evaluation."""
    return "planner" if row.variant == "soft" else f"planner after {row.variant}"


def _means(accuracies: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of accuracies and of the ends of their intervals."""
    by_name = accuracies.groupby("name", sort=False)
    ends = ["value", "value_low", "value_high"]
    means = (
        by_name[ends]
        .mean()
        .assign(seed_spread=by_name.value.std(), seeds=by_name.size(), documents=by_name.documents.first())
    )
    return means.reset_index().assign(what="planner accuracy")


def draw(table: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Draws differences beside accuracies, a line for each row."""
    figure = Figure(figsize=(13, 0.34 * len(names) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    draw_intervals(right, table[table.what == "planner accuracy"], names)
    draw_intervals(left, table[table.what == "difference"], names)
    left.axvline(0.0, color="0.4", linewidth=0.8)
    left.set_xlabel("test perplexity minus that of soft mixing (left of 0: better)")
    right.set_xlabel("accuracy of the planner afterwards")
    return figure


def main() -> None:
    """Trains what is missing, compares, saves."""
    parser = script_parser(__doc__, "figures/table3_joint.png")
    add_training_options(parser, "runs/table3", preset="demo", seeds=5)
    parser.add_argument("--only", nargs="+", help="names of rows, beside the reference; all by default")
    given = parser.parse_args()
    config, seeds = training_config(given)
    table = rows(config)
    if given.only:
        if unknown := {*given.only} - {*table}:
            parser.error(f"--only: no row {unknown.pop()!r}; there are {', '.join(table)}")
        table = {name: row for name, row in table.items() if name in (REFERENCE, *given.only)}
    sweep = probekit.sweep(config, members(table), seeds, given.runs)
    found = compare(sweep, table)
    runs = [run for place, run in sweep.runs.items() if place.member in members(table)]
    shown = found[found.seed.isna()].drop(columns=["seed", "first", "second"])
    save_figure(draw(found, list(table)), found, given.out, {"preset": given.preset}, runs, shown)


if __name__ == "__main__":
    run_script(main)
