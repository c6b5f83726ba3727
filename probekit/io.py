"""Files: atomic writes, JSON, safetensors, `.npy` arrays, Parquet tables, and the lock of a run's folder.

A file gets its name only when it is whole: a write that is killed leaves the old file or none. Nothing is
pickled.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.format import open_memmap, write_array_header_1_0
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from probekit.errors import ProbekitError, one_line

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{12}-(.+)")
"""Names of files and folders that are not whole yet; the group is the final name."""

METADATA = "probekit"
"""Key of a safetensors file's metadata; its value is one JSON text, for safetensors orders keys at random."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write one file to; it becomes `path` when the block succeeds.

    The temporary name keeps the suffix of `path`, for writers that choose their format by it. Missing parent
    folders are made. If the block fails, `path` stays as it was.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    except SafetensorError as error:  # what safetensors raises where others raise OSError, as on a full disk
        raise OSError(one_line(error)) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yields a new temporary folder to fill; it becomes `path` when the block succeeds.

    An older folder of that name is replaced; if the block fails, it stays as it was. Replacing takes two
    renames: should the machine stop between them, the older folder is still whole under its temporary name.
    """
    target = Path(path).resolve()
    temporary, retired = _temporary(target), _temporary(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            _sync(entry)
        if target.exists():
            target.rename(retired)
        temporary.rename(target)
        _sync(target.parent)
    except BaseException as error:
        if retired.exists() and not target.exists():
            retired.rename(target)
        if isinstance(error, SafetensorError):
            raise OSError(one_line(error)) from None
        raise
    finally:
        for leftover in (temporary, retired):
            shutil.rmtree(leftover, ignore_errors=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Gives a file, or a folder with all its files, a second name, as a whole or not at all.

    Files become hard links where the file system has them, else copies. A linked file must never be changed
    in place; the writers of this module replace files, and then the other name keeps the old one.
    """

    def link(source: str | Path, target: str | Path) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    if Path(source).is_dir():
        with atomic_folder(target) as temporary:
            shutil.copytree(source, temporary, copy_function=link, dirs_exist_ok=True)
    else:
        with atomic_path(target) as temporary:
            link(source, temporary)


def clear_temporaries(folder: str | Path, name: str | None = None) -> None:
    """Removes what killed writes have left in a folder.

    Args:
        folder: The folder.
        name: Only temporaries of this file or folder, or of this name with further suffixes; None: all.
    """
    for path in Path(folder).glob(".tmp-*"):
        target = TEMPORARY.fullmatch(path.name)
        if target and (name in (None, target[1]) or target[1].startswith(f"{name}.")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Locks a folder for this process; the system releases the lock when the process ends, however it does.

    Raises:
        ProbekitError: Another process has locked it.
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
    """Writes a value as indented JSON, keys in their own order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file."""
    with _reading(path, "JSON file"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named tensors, from any device, as safetensors."""
    from safetensors.torch import save_file

    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        # safetensors lets only a file's owner read it; a run may be shared, so the umask decides.
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(on_cpu, temporary, metadata={METADATA: json.dumps(dict(metadata or {}))})
        temporary.chmod(mode)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The named tensors in a safetensors file, on the CPU."""
    from safetensors.torch import load_file

    with _reading(path, "safetensors file"):
        return load_file(path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that `write_tensors` wrote into a safetensors file."""
    with _reading(path, "safetensors file"), safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get(METADATA, "{}"))


def write_array(path: str | Path, array: np.ndarray) -> None:
    """Writes an array in NumPy's `.npy` format."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: str | Path) -> np.ndarray:
    """The array in a `.npy` file, read-only; it stays on disk, and what is touched is read."""
    with _reading(path, ".npy array"):
        return open_memmap(path, mode="r")


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


def write_table(path: str | Path, table: pd.DataFrame) -> None:
    """Writes a data frame as Parquet, without its index."""
    with atomic_path(path) as temporary:
        table.to_parquet(temporary, index=False)


def read_table(path: str | Path) -> pd.DataFrame:
    """The data frame in a Parquet file."""
    import pandas as pd

    with _reading(path, "Parquet table"), Path(path).open("rb") as file:
        return pd.read_parquet(file)


@contextmanager
def _reading(path: str | Path, kind: str) -> Iterator[None]:
    """Turns a reader's error about a file into one line that names the file and the remedy."""
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


def _temporary(target: Path) -> Path:
    return target.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{target.name}")


def _sync(path: Path) -> None:
    """Has the system put a file's bytes, or a folder's list of names, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def out_path(path: Path, ending: str | None = None) -> Path:
    """The path that `--out` gives, where a file can be written.

    Raises:
        ProbekitError: It has another ending or is a folder, or its folder does not exist.
    """
    if ending is not None and path.suffix != ending:
        raise ProbekitError(f"--out {path}: must be a file that ends in {ending}")
    if path.is_dir():
        raise ProbekitError(f"--out {path}: is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ProbekitError(f"--out {path}: there is no folder {path.parent}")
    return path


def write_out(path: Path, text: str) -> Path:
    """Writes a text to the path that `--out` gives, and returns it.

    Raises:
        ProbekitError: It cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:  # which names a temporary file
        raise ProbekitError(f"--out {path}: cannot be written ({error.strerror})") from None
    return path
