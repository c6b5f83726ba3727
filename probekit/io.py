"""Data frames in Parquet files that tell when they are damaged."""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.format import open_memmap, write_array_header_1_0
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from probekit.errors import ProbekitError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


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


TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{12}-(.+)")
"""Names that files and folders have until they are whole, and their names then."""

_KEPT = "probekit"
"""Under which a safetensors file has whatever it holds beside its tensors, as JSON."""

_HEADER = f"{CHECKSUM}.header"
"""Under which a safetensors file has the checksum of all that it holds beside its tensors' bytes."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write one file to; it becomes `path` when the block succeeds.

    The temporary name keeps the suffix of `path`, for writers that choose their format by it. Missing parent
    folders are made. When the block fails, `path` is as it was.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(target)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new temporary folder to fill; it becomes `path` when the block succeeds.

    An older folder of that name is replaced; when the block fails, it is as it was. Replacing takes two
    renames: should the machine stop between them, the older folder is still whole under its temporary name.
    """
    target = Path(path).resolve()
    temporary, retired = _sibling(target), _sibling(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            _sync(entry)
        if target.exists():
            target.rename(retired)
        temporary.rename(target)
        _sync(target.parent)
    except BaseException:
        if retired.exists() and not target.exists():
            retired.rename(target)
        raise
    finally:
        for leftover in (temporary, retired):
            shutil.rmtree(leftover, ignore_errors=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Gives a file, or a folder with all its files, a second name, as a whole or not at all.

    Files are hard links where the file system has them, else copies. What is linked must never be changed in
    place, and nothing here does so: writers replace files, and then the other name keeps the old one.
    """
    if Path(source).is_dir():
        with atomic_folder(target) as temporary:
            shutil.copytree(source, temporary, copy_function=_link_or_copy, dirs_exist_ok=True)
    else:
        with atomic_path(target) as temporary:
            _link_or_copy(source, temporary)


def clear_temporaries(folder: str | Path, name: str | None = None) -> None:
    """Removes what writes that were killed have left of a file or folder, or of one with more suffixes.

    Args:
        folder: Where they were written.
        name: Theirs; None: of all.
    """
    for path in Path(folder).glob(".tmp-*"):
        target = TEMPORARY.fullmatch(path.name)
        if target and (name in (None, target[1]) or target[1].startswith(f"{name}.")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Keeps a folder to this process: another one that would hold it is refused. Leaves nothing in it.

    The system lets go of it when the process ends, however it does.

    Raises:
        ProbekitError: Another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ProbekitError(
            f"another process is at work in {folder}; wait until it is done, or choose another --out"
        ) from None
    except OSError:  # some network file systems lock no folders
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Writes text as UTF-8, line ends as they are."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as indented JSON, keys in their own order; beside named values stands their checksum."""
    if isinstance(value, dict):
        value = value | {CHECKSUM: value_checksum({k: v for k, v in value.items() if k != CHECKSUM})}
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file, without its checksum, which must be right where there is one."""
    with _reading(path, "JSON file"):
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(value, dict) and CHECKSUM in value and value.pop(CHECKSUM) != value_checksum(value):
            raise ValueError(CHANGED)
        return value


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named tensors, from any device, as safetensors, with checksums that are looked at in reading."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        # safetensors lets only a file's owner read it; a run may be shared, so the umask decides.
        temporary.touch()
        mode = temporary.stat().st_mode
        kept = {**(metadata or {}), CHECKSUM: tensors_checksum(held)}
        shapes = {name: list(tensor.shape) for name, tensor in held.items()}
        with full_disks_told():
            # All under one name: safetensors writes several in no fixed order.
            told = json.dumps(kept | {_HEADER: _header_checksum(kept, shapes)})
            save_file(held, temporary, metadata={_KEPT: told})
        temporary.chmod(mode)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The named tensors in a safetensors file, on the CPU."""
    with _reading(path, "safetensors file"):
        tensors = load_file(path)
        if read_metadata(path).get(CHECKSUM, found := tensors_checksum(tensors)) != found:
            raise ValueError(CHANGED)
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """What was written into a safetensors file beside its tensors."""
    with _reading(path, "safetensors file"), safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
        kept = json.loads(found[_KEPT]) if _KEPT in found else found
        header = kept.pop(_HEADER, None)
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
        if header is not None and header != _header_checksum(kept, shapes):
            raise ValueError(CHANGED)
        return kept


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Writes an array in NumPy's `.npy` format."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


class ArrayAppender:
    """Writes an array in `.npy` format a few rows at a time, its length unknown until it is closed.

    For files inside an `atomic_folder`: it is not atomic itself. Use as a context manager.

    Args:
        path: The file.
        dtype: Type that rows are converted to.
        columns: Shape of a row.
    """

    def __init__(self, path: str | Path, dtype: DTypeLike, columns: tuple[int, ...] = ()) -> None:
        self._file = Path(path).open("wb")  # noqa: SIM115 - closed when the appender is left
        self._dtype = np.dtype(dtype)
        self._columns = columns
        self._rows = 0
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """Adds rows `[rows, *columns]`."""
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self._rows += len(rows)

    def __enter__(self) -> ArrayAppender:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        # NumPy pads the header for the first axis to grow to any length, so a later one fits in its place.
        shape = (self._rows, *self._columns)
        write_array_header_1_0(self._file, {"descr": self._dtype.str, "fortran_order": False, "shape": shape})


def read_array(path: str | Path, mapped: bool = True) -> np.ndarray:
    """The array in a `.npy` file.

    Args:
        path: The file.
        mapped: Leave the array on disk and read what is touched (read-only), or load all of it.
    """
    with _reading(path, ".npy array"):
        array = open_memmap(path, mode="r")
        return array if mapped else np.array(array)


def release(array: np.ndarray) -> None:
    """Lets go the pages of a mapped array that were read; until then they count as the process's memory."""
    if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base.madvise(mmap.MADV_DONTNEED)


@contextmanager
def full_disks_told() -> Iterator[None]:
    """Turns what safetensors says of a disk that it cannot write to into what all others say."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(one_line(error)) from None


def _header_checksum(kept: Mapping[str, str], shapes: Mapping[str, list[int]]) -> str:
    return value_checksum([sorted(kept.items()), sorted(shapes.items())])


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sibling(target: Path) -> Path:
    return target.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{target.name}")


def _sync(path: Path) -> None:
    """Has the system put a file's bytes, or a folder's list of names, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reading(path: str | Path, kind: str) -> Iterator[None]:
    """Turns whatever a reader raises about a file into one line that names the file and the way out."""
    try:
        yield
    except FileNotFoundError:
        raise ProbekitError(
            f"{path} does not exist; run the step that writes it, or check the path"
        ) from None
    except OSError as error:
        raise ProbekitError(
            f"{path} cannot be opened as a {kind} ({one_line(error)}); check the path and its permissions"
        ) from None
    except (ValueError, SafetensorError, RecursionError) as error:
        raise ProbekitError(
            f"{path} is no whole {kind} ({one_line(error)}); delete it and run the step that writes it again"
        ) from None


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())


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
