"""Interventions on the terminal: what each kind does at every layer, beside its controls."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from probekit.causal.intervene import InterventionResults
from probekit.probing.locations import label
from probekit.reports.terminal import print_table, say, warn_of_few, with_range

EFFECTS = {
    "next_loss": "next sentence",
    "next_loss_over_random": "over random",
    "rest_loss_over_random": "rest, over random",
    "other_loss": "tokens behind it",
    "readout_true": "probe",
}
"""Metrics of the table of each kind, and how they are called; *rest* is without the first token."""

ACCURACIES = {
    "fitted_accuracy": "as it was",
    "refitted_accuracy": "fitted again, erased",
    "prior_accuracy": "most frequent action",
}

FOLLOWING = {
    "plan_following": "have the target action",
    "plan_following_unedited": "without the edit",
    "plan_following_over_random": "over random",
}

BESIDE = {
    "Accuracy of a linear probe where actions were erased": ACCURACIES,
    "Share of sentences written anew that have the action aimed at": FOLLOWING,
}
"""What tables tell beside the effects; rows are of conditions that have the first metric."""

BOUNDS = {"value": "", "value_low": "_low", "value_high": "_high", "documents": "_documents"}
"""Columns of a result, and what they are called behind the metric's name."""

REMEDY = "raise intervene.scenes, or intervene.samples where that is fewer"
"""What is to be done where documents are few."""

NONE = -1
"""Stands for no layer where rows are grouped."""


def print_interventions(results: InterventionResults) -> None:
    """Every kind at all layers, at the nearest distance; nothing is chosen on the test documents."""
    table = results.table
    near = table[table.distance == table.distance.min()]
    for kind, own in near.groupby("kind", sort=False):
        print_table(
            f"{kind}, distance {own.distance.iloc[0]}: changes of losses in nats a token, of the true "
            f"action's probability by the last layer's probe, in scenes of {own.documents.max():,} test "
            "documents (95 % intervals from resampling them)",
            ["layer", "condition", *EFFECTS.values()],
            ([*place(row), *(with_range(row, metric) for metric in EFFECTS)] for row in wide(own, EFFECTS)),
        )
    for title, metrics in BESIDE.items():
        if len(there := near[near.metric == next(iter(metrics))]):
            which = near.merge(there[["kind", "condition"]].drop_duplicates())
            print_table(
                f"{title}, distance {near.distance.min()}",
                ["kind", "layer", "condition", *metrics.values()],
                (
                    [row["kind"], *place(row), *(with_range(row, metric) for metric in metrics)]
                    for row in wide(which, metrics)
                ),
            )
    warn_of_few(int(near.documents.min()), REMEDY)
    for line in [*remarks(near), *results.notes]:
        say(line)
    say(f"All {len(table):,} rows: {results.folder / 'results.parquet'}")


def remarks(table: pd.DataFrame) -> Iterator[str]:
    """What columns and marks mean."""
    yield "over random: less what as large a change in a random direction does; rest: all but its first token"
    if table.readout_direct.any():
        yield "* the probe reads what was changed itself: no effect of it"
    if table.injected.any():
        yield "+ the adapter had told the LM of the next sentence's action there"


def wide(table: pd.DataFrame, metrics: Mapping[str, str]) -> Sequence[Mapping[Hashable, Any]]:
    """A row for each condition, a column for each metric, its bounds and documents; controls' rows, too."""
    head = ["kind", "location", "layer", "strength", "condition", "distance", "readout_direct", "injected"]
    strength = table.strength.map(" × {:g}".format).where(table.strength.notna(), "")
    filled = table.assign(layer=table.layer.fillna(NONE), strength=strength)
    pivot = filled[filled.metric.isin(metrics)].pivot_table(
        index=head, columns="metric", values=[*BOUNDS], sort=False
    )
    bounds, names = (pivot.columns.get_level_values(level) for level in (0, 1))
    pivot.columns = names + bounds.map(BOUNDS)
    wanted = [f"{metric}{end}" for metric in metrics for end in BOUNDS.values()]
    return pivot.reindex(columns=wanted).reset_index().to_dict("records")


def place(row: Mapping[Hashable, Any]) -> list[str]:
    """Layer with its marks, and condition with its strength."""
    marks = "*" * bool(row["readout_direct"]) + "+" * bool(row["injected"])
    layer = "" if row["layer"] == NONE else f"{label(row['location'])} {row['layer']}"
    return [f"{layer}{marks}", f"{row['condition']}{row['strength']}"]
