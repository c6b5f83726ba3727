"""Subnetworks on the terminal: which components, and what the LM has lost without them."""

from __future__ import annotations

from collections.abc import Hashable

import pandas as pd

from probekit.reports.tables import print_table, say, warn_of_few, with_range
from probekit.subnetworks.results import ALONE, CONDITIONS, RANDOM, SUBNETWORK, WHOLE
from probekit.subnetworks.subnetwork import SubnetworkResults

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


def print_subnetwork(results: SubnetworkResults) -> None:
    """What is lost without the subnetwork, beside what it is compared with; which components it has."""
    table = results.table[results.table.draw.isna()]
    wide = {name: _by_metric(table[table.condition == name]) for name in (*CONDITIONS, RANDOM)}
    documents = int(table.documents.max())
    print_table(
        f"Without some of {table.components.iloc[0]} components, on {documents:,} test documents: changes of "
        "the next sentence's losses in nats a token, bits over the prior that the last layer's probe reads "
        "(95 % intervals from resampling documents)",
        ["removed", "components", *CHANGES.values()],
        (
            [
                CALLED[name],
                str(table[table.condition == name].removed.iloc[0]),
                *(with_range(row, metric) if metric in row else "" for metric in CHANGES),
            ]
            for name, row in wide.items()
        ),
    )
    warn_of_few(documents)
    draws = results.table[results.table.draw.notna()]
    say(
        "best alone: as many, those that are best removed alone; random: as many in every layer, the mean of "
        f"{draws.draw.nunique()} draws"
    )
    say("fitted again: by a probe that is fitted without them, which finds what has only moved")
    mask = results.mask
    removed = mask[mask.removed]
    say(f"The subnetwork ({len(removed)} of {len(mask)}): {', '.join(removed.component) or 'nothing'}")
    for line in results.notes:
        say(line)
    say(f"All {len(results.table):,} rows: {results.folder / 'results.parquet'}")
    say(f"Every component: {results.folder / 'mask.parquet'}")


def _by_metric(rows: pd.DataFrame) -> dict[Hashable, float]:
    """Values and bounds of one condition, by the metric's name."""
    return {
        f"{row.metric}{end}": getattr(row, f"value{end}")
        for row in rows.itertuples()
        for end in ("", "_low", "_high")
    }
