"""Data frames in Parquet files that tell when they are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from probekit.checksums import CHANGED, CHECKSUM, table_checksum
from probekit.storage import atomic_path, one_line

if TYPE_CHECKING:
    import pandas as pd


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Writes a data frame as Parquet, without its index, with a checksum that `read_table` looks at."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = pa.Table.from_pandas(table, preserve_index=False)
    kept = {**(columns.schema.metadata or {}), CHECKSUM: table_checksum(columns)}
    with atomic_path(path) as temporary:
        pq.write_table(columns.replace_schema_metadata(kept), temporary)


def read_table(path: str | Path) -> pd.DataFrame:
    """The data frame in a Parquet file.

    Raises:
        ValueError: It is damaged; it says in one line how.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.ParquetFile(path).read()
        checksum = (columns.schema.metadata or {}).get(CHECKSUM.encode())
        if checksum is not None and checksum.decode() != table_checksum(columns):
            raise ValueError(CHANGED)
        return columns.to_pandas()
    except (pa.ArrowException, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(one_line(error)) from None
