"""Tables of probes of copied runs, and what holds in all of them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from probekit.probing.probe import probe
from probekit.run.run import Run


def copied(run: Run, folder: Path) -> Run:
    return Run.open(shutil.copytree(run.folder, folder / "run"))


def rewritten(run: Run, folder: Path, file: str, change) -> Run:
    """A copy of a run with one array of its corpus changed."""
    run = copied(run, folder)
    path = run.folder / "corpus" / file
    np.save(path, change(np.array(np.load(path))))
    return run


def table_of(run: Run, folder: Path, settings: dict[str, Any], **options: Any) -> pd.DataFrame:
    return probe(copied(run, folder), settings, quiet=True, **options).table


def cells(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def cell(table: pd.DataFrame, **values: Any) -> pd.Series:
    ((_, row),) = cells(table, **values).iterrows()
    return row


def check_ceilings(table: pd.DataFrame) -> None:
    """No reader of tokens beats the ceiling beyond chance, and probes fall short of it by what they lack."""
    rows = table[table.accuracy.notna()]
    for row in rows[rows.reader.isin(["probe", "token embedding", "skip n-gram"])].itertuples():
        at = {"distance": row.distance, "horizon": row.horizon}
        best = cell(rows, reader="ceiling (tokens read)", **at)
        assert row.bits_low <= best.bits
        assert row.accuracy_low <= best.accuracy
        if row.reader == "probe":
            assert row.shortfall == pytest.approx(best.bits - row.bits)
            assert row.shortfall_high >= 0
