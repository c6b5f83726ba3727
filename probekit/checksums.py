"""Checksums: whether what is read is what was written.

A file that can hold one has the checksum of its own contents: JSON and settings beside the values,
safetensors and Parquet in their metadata. Files that others define, as arrays and models in Hugging Face
format, have theirs in the run's record of the stage that wrote them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

CHECKSUM = "sha256"
"""Under which a file has the checksum of its contents."""

CHANGED = "its checksum is another one than when it was written"
"""What is said of contents that do not have their checksum."""

READ_WHOLE = 4 << 30
"""Larger files are read in part: commands that need little of a corpus are not to wait for all of it."""

_BLOCK = 1 << 20
_BLOCKS = 1024

Record = dict[str, list[Any]]
"""Size in bytes and checksum of files, by name."""


def text_checksum(text: str) -> str:
    """The checksum of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def value_checksum(value: Any) -> str:
    """The checksum of what JSON can hold, however it is indented."""
    return text_checksum(json.dumps(value))


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of named tensors on the CPU, of their bytes alone."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def table_checksum(table: pa.Table) -> str:
    """The checksum of a table's columns, and of what pandas makes of them."""
    digest = hashlib.sha256((table.schema.metadata or {}).get(b"pandas", b""))
    for name, column in zip(table.column_names, table.columns, strict=True):
        number = str(column.type) if column.type in _numbers() else None
        digest.update(json.dumps([name, number, len(column)]).encode())
        if number:
            digest.update(column.is_valid().to_numpy().tobytes())
            digest.update(column.fill_null(0).to_numpy().tobytes())
        else:
            digest.update(json.dumps(column.to_pylist(), default=str).encode())
    return digest.hexdigest()


@cache
def _numbers() -> frozenset[pa.DataType]:
    import pyarrow as pa

    return frozenset((pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.float32(), pa.float64()))


def record_of(files: Iterable[Path], root: Path) -> Record:
    """Sizes and checksums of files, and of the files in folders, by their names below a root."""
    found = (path for file in files for path in (file.rglob("*") if file.is_dir() else (file,)))
    return {
        path.relative_to(root).as_posix(): [path.stat().st_size, file_checksum(path)]
        for path in sorted(found)
        if path.is_file()
    }


def first_damaged(record: Record, root: Path) -> tuple[Path, str] | None:
    """The first file that is not as it was recorded, and why; None if there is none.

    What a process has read once it does not read again, unless the file has changed since.
    """
    for name, (size, checksum) in record.items():
        path = root / name
        try:
            found = path.stat().st_size
            if found != size:
                return path, f"it has {found:,} bytes, not {size:,}"
            if file_checksum(path) != checksum:
                return path, CHANGED
        except OSError as error:
            return path, error.strerror or str(error)
    return None


def file_checksum(path: Path) -> str:
    """The checksum of a file.

    One of more than 4 GiB is read in 1,024 blocks of 1 MiB, evenly spread from its beginning to its end: this
    finds files that were cut off, mixed up or half copied, but not every single byte.
    """
    stat = path.stat()
    return _file_checksum(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@cache
def _file_checksum(path: Path, size: int, changed: int, number: int) -> str:
    """As `file_checksum`; the other arguments tell whether it is still the file that was read before."""
    with path.open("rb") as file:
        if size <= READ_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for block in range(_BLOCKS):
            file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
        return digest.hexdigest()
