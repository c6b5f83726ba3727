"""Subnetworks on the terminal: which components, and what the LM has lost without them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import pandas as pd

from probekit.causal.subnetwork import ALONE, CONDITIONS, RANDOM, SUBNETWORK, WHOLE, SubnetworkResults
from probekit.reports.terminal import print_table, say, warn_of_few, with_range

CHANGES = {
    "first_loss_change": "first token",
    "rest_loss_change": "rest of it",
    "other_loss_change": "first sentences",
    "bits": "bits, probe",
    "refitted_bits": "bits, fitted again",
}
"""Metrics of the table, and how they are called."""

CALLED = {
    WHOLE: "nothing",
    SUBNETWORK: "the subnetwork",
    ALONE: "best alone",
    RANDOM: "random",
}


REMEDY = "raise subnetwork.documents, or give more documents"
"""What is to be done where documents are few."""


def print_subnetwork(results: SubnetworkResults) -> None:
    """What is lost without the subnetwork, beside what it is compared with; which components it has."""
    table = results.table[results.table.draw.isna()]
    documents = int(table.documents.max())
    print_table(
        f"{caption(table)} (95 % intervals from resampling documents)",
        ["removed", "components", *CHANGES.values()],
        (
            [
                row["called"],
                str(row["removed"]),
                *(with_range(row, metric) if metric in row else "" for metric in CHANGES),
            ]
            for row in rows_of(table)
        ),
    )
    warn_of_few(documents, REMEDY)
    for line in [*remarks(results.table, results.mask), *results.notes]:
        say(line)
    say(f"All {len(results.table):,} rows: {results.folder / 'results.parquet'}")
    say(f"Every component: {results.folder / 'mask.parquet'}")


def caption(table: pd.DataFrame) -> str:
    """What its rows are."""
    return (
        f"Without some of {table.components.iloc[0]} components, on {int(table.documents.max()):,} test "
        "documents: changes of the next sentence's losses in nats a token, bits over the prior that the last "
        "layer's probe reads"
    )


def rows_of(table: pd.DataFrame) -> Iterator[Mapping[Hashable, Any]]:
    """What each condition is `called`, how many components are `removed`, its metrics with their bounds.

    Random draws are one condition, their mean.
    """
    means = table[table.draw.isna()]
    for name in (*CONDITIONS, RANDOM):
        own = means[means.condition == name]
        yield {"called": CALLED[name], "removed": int(own.removed.iloc[0])} | _by_metric(own)


def remarks(table: pd.DataFrame, mask: pd.DataFrame) -> Iterator[str]:
    """What rows and columns mean, and which components the subnetwork has."""
    yield (
        "best alone: as many, those that are best removed alone; random: as many in every layer, the mean of "
        f"{table.draw.nunique()} draws, with intervals over draws and documents"
    )
    yield "fitted again: by a probe that is fitted without them, which finds what has only moved"
    removed = mask[mask.removed]
    yield f"The subnetwork ({len(removed)} of {len(mask)}): {', '.join(removed.component) or 'nothing'}"


def _by_metric(rows: pd.DataFrame) -> dict[Hashable, Any]:
    """Values and bounds of one condition, by the metric's name."""
    return {
        f"{row.metric}{end}": getattr(row, f"value{end}")
        for row in rows.itertuples()
        for end in ("", "_low", "_high")
    }
