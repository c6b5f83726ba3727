"""Sections of a report that tell whether what probes read is used: interventions and subnetworks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from probekit.reports import intervention_tables, subnetwork_tables
from probekit.reports.document import Block, Fold, Items, Paragraph, Table, estimate, table
from probekit.reports.intervention_tables import BESIDE, EFFECTS
from probekit.reports.report_findings import Findings
from probekit.reports.report_results import INTERVALS, Row

COMPARED = "next_loss_over_random"
"""What only conditions have that are compared with random ones."""

EFFECTS_OVER_RANDOM = {name: called for name, called in EFFECTS.items() if name.endswith("over_random")}

TABLES = {"Changes of the next sentence's loss, in nats a token": EFFECTS_OVER_RANDOM, **BESIDE}
"""Tables of interventions; each has the conditions that have its first metric."""


def interventions(found: Findings, variant: str) -> list[Block]:
    """What interventions in a variant do beyond random ones, at the nearest distance and at farther ones."""
    results = found.interventions(variant)
    # What the last layer's probe reads is in none of these tables, and so neither is its mark.
    rows = compared(results.table).assign(readout_direct=False)
    boundaries = int(rows.documents.max())
    return [
        Paragraph(
            f"What the variant {variant} makes of changed activations, in scenes of {boundaries:,} test "
            f"documents, one sentence boundary of each ({INTERVALS}). Shown are conditions that are compared "
            "with random ones; all rows, those of the controls too, are in the run's folder."
        ),
        *(
            block
            for caption, metrics in TABLES.items()
            for block in _by_distance(rows, f"{caption}, variant {variant}", metrics)
        ),
        Items((*intervention_tables.remarks(rows), *results.notes)),
    ]


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of the conditions that are compared with random ones."""
    conditions = rows[rows.metric == COMPARED][["kind", "condition"]].drop_duplicates()
    return rows.merge(conditions)


def _by_distance(rows: pd.DataFrame, caption: str, metrics: Mapping[str, str]) -> Iterator[Block]:
    """A table of each kind's nearest distance, and one of farther ones, folded."""
    own = rows[rows.metric.isin(metrics)]
    there = own.merge(own[own.metric == next(iter(metrics))][["kind", "condition"]].drop_duplicates())
    near = there.distance == there.groupby("kind").distance.transform("min")
    if near.any():
        yield _effects(there[near], f"{caption}, at the nearest distance", metrics)
    if not near.all():
        farther = f"{caption}, at farther distances"
        yield Fold(farther, (_effects(there[~near], farther, metrics),))


def _effects(rows: pd.DataFrame, caption: str, metrics: Mapping[str, str]) -> Table:
    shown = {name: called for name, called in metrics.items() if name in set(rows.metric)}
    documents = f"{next(iter(shown))}_documents"
    cells = (
        [
            *(row["kind"], *intervention_tables.place(row), int(row["distance"])),
            *(_estimate(row, name, signed=name.endswith("over_random")) for name in shown),
            int(row[documents]),
        ]
        for row in intervention_tables.wide(rows, shown)
    )
    columns = ["kind", "layer", "condition", "distance", *shown.values(), "documents"]
    return table(caption, columns, cells, words=3)


def subnetwork(found: Findings, variant: str) -> list[Block]:
    """What a variant has lost without its subnetwork, and without as many other components."""
    results = found.subnetwork(variant)
    metrics = subnetwork_tables.CHANGES
    cells = (
        [
            *(row["called"], row["removed"]),
            *(
                _estimate(row, name, signed=name.endswith("_change")) if name in row else ""
                for name in metrics
            ),
        ]
        for row in subnetwork_tables.rows_of(results.table)
    )
    return [
        table(
            f"{subnetwork_tables.caption(results.table)}, variant {variant} ({INTERVALS})",
            ["removed", "components", *metrics.values()],
            cells,
        ),
        Items((*subnetwork_tables.remarks(results.table, results.mask), *results.notes)),
    ]


def _estimate(row: Row, name: str, *, signed: bool) -> str:
    return estimate(row[name], row[f"{name}_low"], row[f"{name}_high"], signed=signed)
