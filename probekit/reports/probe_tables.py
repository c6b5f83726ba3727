"""Probes on the terminal: the best cells, what they are compared with, and what to mind."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from probekit.probing.over_training import TrainingProbes
from probekit.probing.probe import ProbeResults
from probekit.reports.console import print_table, say, warn_of_few, with_range


def print_probes(results: ProbeResults) -> None:
    """The best cells, the baselines on the same examples, and what to know of all cells together."""
    table = results.table
    best = results.best_cells().sort_values(["horizon", "variant", "location", "solver", "seed"])
    examples, documents = table.examples[table.accuracy.notna()].max(), table.documents.max()
    print_table(
        f"Best cells, chosen on validation, on {examples:,} test examples of {documents:,} documents",
        ["cell", "accuracy", "bits over the prior", "gain in bits", "selectivity", "compression"],
        [_cell_row(row) for row in best.to_dict("records")],
    )
    beside = table[table.reader != "probe"].merge(best[["distance", "horizon"]].drop_duplicates())
    beside = beside.sort_values(["horizon", "distance"], kind="stable")
    print_table(
        "Baselines and ceilings at the distances and horizons of these cells, on the same examples",
        ["distance", "horizon", "reader", "accuracy", "bits over the prior"],
        (
            [str(row["distance"]), str(row["horizon"]), _reader(row), *_scores(row)]
            for row in beside.to_dict("records")
        ),
    )
    warn_of_few(documents)
    probes = table[table.reader == "probe"]
    for line in [*beaten_baselines(probes), *unreliable_cells(probes), *results.notes]:
        say(line)
    say(f"All {len(table):,} rows: {results.folder / 'results.parquet'}; pictures: {results.folder}")


def print_over_training(results: TrainingProbes, picture: Path) -> None:
    """The layer that is best on validation documents at every checkpoint, at the nearest distance."""
    best = best_by_step(results.table)
    documents = int(best.documents.max())
    print_table(
        f"Best layer behind each step of {results.stage}, distance {best.distance.min()}, on {documents:,} "
        "test documents",
        ["step", "cell", "accuracy", "bits over the prior", "gain in bits"],
        (
            [
                f"{row['step']:,}",
                f"{row['variant']}, {row['location']}, {row['solver']}, layer {row['layer']}",
                *_scores(row),
                f"{with_range(row, 'gain')} over the {row['gain_over']}",
            ]
            for row in best.to_dict("records")
        ),
    )
    warn_of_few(documents)
    for line in results.notes:
        say(line)
    say(f"All {len(results.table):,} rows: {results.path}; picture: {picture}")


def best_by_step(table: pd.DataFrame) -> pd.DataFrame:
    """The probes of the layer that is best on validation documents, of a table of `probe_checkpoints`.

    One at every step, at the nearest distance, for each variant, location, solver, horizon and seed.
    """
    probes = table[(table.reader == "probe") & table.accuracy.notna()]
    near = probes[probes.distance == probes.distance.min()]
    cells = near.groupby(["variant", "location", "solver", "horizon", "seed", "step"])
    return near.loc[cells.validation_cross_entropy.idxmin()]


def _cell_row(row: Mapping[Hashable, Any]) -> list[str]:
    target = "" if row["target"] == "action" else f"{row['target']}, "
    return [
        f"{target}{row['variant']}, {row['location']}, {row['solver']}\n"
        f"layer {row['layer']}, distance {row['distance']}, horizon {row['horizon']}, seed {row['seed']}",
        *_scores(row),
        f"{with_range(row, 'gain')}\nover the {row['gain_over']}",
        with_range(row, "selectivity"),
        "" if pd.isna(row["compression"]) else f"{row['compression']:.3f}",
    ]


def _reader(row: Mapping[Hashable, Any]) -> str:
    return row["reader"] if pd.isna(row["seed"]) else f"{row['reader']}, seed {row['seed']}"


def beaten_baselines(probes: pd.DataFrame) -> Iterator[str]:
    """How many cells read more than the strongest baseline that needs no model."""
    compared = probes[probes.gain_low.notna() & ~probes.injected]
    if len(compared):
        beat = (compared.gain_low > 0.0).groupby(compared.variant).agg(["sum", "count"])
        each = ", ".join(f"{variant} {won} of {of}" for variant, won, of in beat.itertuples())
        yield (
            f"{beat['sum'].sum():,} of {len(compared):,} cells read more than the "
            f"{' or '.join(sorted(compared.gain_over.unique()))}, 95 % for all together ({each})"
        )


def unreliable_cells(probes: pd.DataFrame) -> Iterator[str]:
    """How many cells have nothing to say, or nothing to rely on."""
    empty = probes[probes.accuracy.isna()]
    if len(empty):
        where = [
            f"distance {', '.join(map(str, sorted(cells.distance.unique())))} of horizon {horizon}"
            for horizon, cells in empty.groupby("horizon")
        ]
        yield f"{len(empty):,} of {len(probes):,} cells are empty (too few examples): {'; '.join(where)}"
    if constant := int(probes.constant.fillna(value=False).sum()):
        yield f"{constant:,} of {len(probes):,} cells have the same activation in all examples"
    if unconverged := int((~probes.converged.fillna(value=True)).sum()):
        yield f"{unconverged:,} of {len(probes):,} probes did not converge"


def _scores(row: Mapping[Hashable, Any]) -> list[str]:
    return [with_range(row, "accuracy"), with_range(row, "bits")]
