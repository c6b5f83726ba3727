from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probekit.io import read_table, write_table

TABLE = pd.DataFrame(
    {
        "document": np.arange(40),
        "variant": ["soft", None] * 20,
        "loss": np.where(np.arange(40) % 7, np.linspace(-1, 1, 40), np.nan),
        "injected": np.arange(40) % 2 == 0,
        "nothing": None,
        "lists": [[1, 2]] * 40,
    }
)


def test_tables_come_back_equal_and_pandas_reads_them_too(tmp_path: Path):
    for table in (TABLE, TABLE.iloc[:0], TABLE[[]]):
        write_table(tmp_path / "t.parquet", table)
        plain = tmp_path / "plain.parquet"
        table.to_parquet(plain, index=False)
        pd.testing.assert_frame_equal(read_table(tmp_path / "t.parquet"), pd.read_parquet(plain))
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), pd.read_parquet(plain))
        pd.testing.assert_frame_equal(read_table(plain), pd.read_parquet(plain))


def test_no_damaged_byte_makes_another_table(tmp_path: Path):
    path = tmp_path / "t.parquet"
    write_table(path, TABLE)
    whole, expected = path.read_bytes(), read_table(path)
    told = 0
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = read_table(path)
        except ValueError:
            told += 1
        else:  # a byte that says nothing, as in statistics
            pd.testing.assert_frame_equal(found, expected)
    assert told > len(whole) // 6
    for size in (0, 4, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"[a-z]"):
            read_table(path)
