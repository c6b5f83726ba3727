"""Results: from sums by document to the table that a grid leaves, with an interval for every number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from probekit.evaluation.action_metrics import METRICS
from probekit.evaluation.statistics import (
    Intervals,
    Resampling,
    bootstrap_ratios,
    simultaneous_ratios,
)
from probekit.probing.tally import Row, Tally

MODEL_FREE = ("prior", "bigram", "skip n-gram")
"""Baselines that no model is needed for: a probe has to read more than the strongest of them."""

CEILING = "ceiling (tokens read)"
"""What no reader of a position can beat."""

NONE = -1
"""Number of a row that is not there."""

_INTERVALS = (*METRICS.values(), "bits", "selectivity", "shortfall", "gain")

COLUMNS = (
    {"reader": "str", "solver": "str", "variant": "str", "target": "str", "seed": "Int64"}
    | {"location": "str", "layer": "Int64", "distance": "int64", "horizon": "int64"}
    | {"injected": "bool", "constant": "boolean", "examples": "int64", "documents": "Int64"}
    | {f"{metric}{bound}": "float64" for metric in _INTERVALS for bound in ("", "_low", "_high")}
    | {"gain_over": "str", "control_accuracy": "float64"}
    | {"code_length": "float64", "compression": "float64"}
    | {"l2": "float64", "shrinkage": "float64", "iterations": "Int64", "converged": "boolean"}
    | {"validation_cross_entropy": "float64", "fitted_on": "Int64"}
)
"""The table's columns and their types; those with a capital, and boolean, can say that nothing applies."""

CELL = ["reader", "solver", "variant", "seed", "location", "layer", "distance", "horizon"]
"""Columns that name a row."""


def table_of(
    tallies: Sequence[Tally], counts: np.ndarray, empty: Sequence[Row], resampling: Resampling
) -> pd.DataFrame:
    """The table of results.

    Args:
        tallies: What readers got right; among them the prior and the other model-free baselines of every
            distance and horizon. All were scored on the same test examples.
        counts: Test examples of every document `[documents]`.
        empty: Rows of cells that are empty.
        resampling: How documents are resampled.
    """
    rows = pd.DataFrame([head for tally in tallies for head in tally.heads])
    sums = {
        score: np.concatenate([_column(tally, score, len(counts)) for tally in tallies], axis=1)
        for score in (*METRICS, "control_correct")
    }
    nats = sums["cross_entropy"]
    priors = _beside(rows, rows.reader == "prior")
    strongest = _beside(rows, _strongest(rows))
    measured = {METRICS[score]: sums[score] for score in METRICS} | {
        "bits": (nats[:, priors] - nats) / np.log(2),
        "selectivity": sums["correct"] - sums["control_correct"],
        "shortfall": _shortfall(rows, nats),
    }
    for name, values in measured.items():
        there = np.flatnonzero(np.isfinite(values).all(axis=0))
        _write(rows, name, there, bootstrap_ratios(values[:, there], counts, **resampling))
    rows["control_accuracy"] = sums["control_correct"].sum(0) / counts.sum()
    rows["examples"] = int(counts.sum())
    rows["documents"] = int(np.count_nonzero(counts))
    rows["gain_over"] = rows.reader.iloc[strongest].set_axis(rows.index).where(_compared(rows))
    compared = np.flatnonzero(_compared(rows))
    if len(compared):
        gains = (nats[:, strongest[compared]] - nats[:, compared]) / np.log(2)
        draws = {"resamples": resampling["resamples"], "seed": resampling["seed"]}
        _write(rows, "gain", compared, simultaneous_ratios(gains, counts, **draws))
    table = pd.concat([rows, pd.DataFrame(list(empty))]).reindex(columns=list(COLUMNS))
    table["injected"] = table.injected.fillna(False).astype(bool)
    return table.astype(COLUMNS).sort_values(CELL, kind="stable", ignore_index=True)


def _shortfall(rows: pd.DataFrame, nats: np.ndarray) -> np.ndarray:
    """Bits by which each probe is below the ceiling `[documents, readers]`; NaN where none is known."""
    ceilings = _beside(rows, rows.reader == CEILING)
    known = (ceilings != NONE) & (rows.reader == "probe").to_numpy()
    return np.where(known, (nats - nats[:, ceilings]) / np.log(2), np.nan)


def _write(rows: pd.DataFrame, name: str, numbers: np.ndarray, found: Intervals) -> None:
    """Writes a metric and its interval into some rows."""
    for suffix, values in (("", found.value), ("_low", found.low), ("_high", found.high)):
        rows.loc[numbers, f"{name}{suffix}"] = values


def _column(tally: Tally, score: str, documents: int) -> np.ndarray:
    """Sums `[documents, readers]`; NaN where the readers were not scored so."""
    missing = np.full((documents, len(tally.heads)), np.nan)
    return tally.sums.get(score, missing)


def _compared(rows: pd.DataFrame) -> pd.Series:
    """Which rows are compared with the strongest baseline, all together: probes that nothing was told."""
    return (rows.reader == "probe") & (rows.injected != True)  # noqa: E712 - baselines have no such entry


def _strongest(rows: pd.DataFrame) -> np.ndarray:
    """The model-free baseline of each distance and horizon that is best on validation documents."""
    free = rows[rows.reader.isin(MODEL_FREE)]
    best = free.groupby(["distance", "horizon"]).validation_cross_entropy.idxmin()
    return np.asarray(rows.index.isin(best))


def _beside(rows: pd.DataFrame, chosen: pd.Series | np.ndarray) -> np.ndarray:
    """For each row the number of the chosen row of its distance and horizon, `NONE` where there is none."""
    cell = pd.MultiIndex.from_frame(rows[["distance", "horizon"]])
    return pd.Series(np.arange(len(rows)), cell)[np.asarray(chosen)].reindex(cell, fill_value=NONE).to_numpy()
