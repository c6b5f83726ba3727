"""The table of labels: a file of records, or a dataset: a column of labels, and columns that say of what.

`labels` places its rows in a corpus and makes a target of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probekit.config import Config, user_path
from probekit.config.types import TABLE_ENDINGS
from probekit.data import hub, huggingface
from probekit.data.chats import as_chat, key_of
from probekit.data.readers import Choose, Record, as_written, read_records
from probekit.errors import ProbekitError
from probekit.probing.targets import TARGETS
from probekit.run.folder import digest_of

LARGEST = 1e150
"""Numbers of a vector are smaller: the squares of larger ones overflow."""

SPANS = ("start", "end", "start2", "end2")
"""Columns of characters; the last two give the other span of a pair."""


@dataclass(frozen=True)
class LabelTable:
    """A column of labels, and the columns that say what is labelled.

    Attributes:
        path: The file or dataset.
        where: Where each row is, for messages `[rows]`.
        labels: The labels, as they are written; None where a field is empty `[rows]`.
        columns: The values of the other columns, as far as the table has them `[rows]`.
        texts: The column of texts by which rows find their documents, whatever its name; None where they name
            them in `document`.
        vectors: The labels that are lists, by row.
    """

    path: str
    where: list[str]
    labels: list[str | None]
    columns: dict[str, list[str | None]]
    texts: str | None
    vectors: dict[int, np.ndarray]

    def numbers(self, column: str) -> np.ndarray:
        """The whole numbers in a column `[rows]`, -1 where a field or the whole column is empty or of texts.

        Raises:
            ProbekitError: A value is no whole number from 0 on.
        """
        found = np.full(len(self.where), -1, dtype=np.int64)
        for row, value in enumerate(self.columns.get(column, ())):
            if value is not None and column != self.texts:
                if not re.fullmatch(r"\d{1,18}(\.0*)?", value):
                    raise ProbekitError(
                        f"{self.where[row]}: {column!r} is {value!r}; it must be a whole number from 0 on"
                    )
                found[row] = int(value.partition(".")[0])
        return found


def read_table(path: str, column: str, config: Config) -> LabelTable | None:
    """Reads a table of labels; None if it lacks the column, but there is a built-in target of its name.

    Args:
        path: The file, or a folder that `datasets` saved.
        column: The column of labels.
        config: The settings; `probe.text_column`, or else that of the corpus, names the column of texts.

    Raises:
        ProbekitError: The table cannot be read, has no such column, or holds what cannot be a label.
    """
    texts = config.probe.text_column
    texts_in = texts or config.corpus.text_column
    wanted = {"document", "sentence", "text", texts_in, *SPANS} - {column}
    known: dict[str, None] = {}

    def choose(columns: Sequence[str]) -> list[str]:
        known.update(dict.fromkeys(columns))
        return [name for name in columns if name == column or name in wanted]

    places: list[str] = []
    rows: list[dict[str, str | None]] = []
    vectors: dict[int, np.ndarray] = {}
    for place, _, record in _records(path, config, choose):
        if not isinstance(record, dict):
            raise ProbekitError(f"{place}: {type(record).__name__} where a JSON object should be")
        row = {name: as_written(record[name]) for name in choose(list(record)) if name != column}
        if chat := as_chat(record.get(texts_in), f"{place}: {texts_in!r}"):
            row[texts_in] = key_of(chat)
        label = record.get(column)
        if isinstance(label, list | dict):
            vectors[len(rows)] = _vector(place, column, label)
            label = f"a list of {len(label)}"
        row[column] = as_written(label)
        places.append(place)
        rows.append(row)
    if column not in known and column in TARGETS:
        return None
    for setting, wants in (("probe.target", column), ("--text", texts)):
        if wants is not None and wants not in known:
            raise ProbekitError(
                f"probe.labels {path} has no column {wants!r} ({setting}); "
                f"it has {', '.join(known) or 'none'}"
            )
    # In JSON lines a field may be missing.
    columns = {name: [row.get(name) for row in rows] for name in choose(list(known))}
    # A corpus of texts in a column `document` can have a table of its sentences, which numbers its documents.
    names_them = texts_in != "document" or {"sentence", "text"} <= columns.keys()
    by_name = texts is None and "document" in columns and names_them
    return LabelTable(path, places, columns.pop(column), columns, None if by_name else texts_in, vectors)


def _records(path: str, config: Config, choose: Choose) -> Iterator[Record]:
    """The rows of a file or a dataset."""
    settings = config.corpus.model_copy(update={"reader": "auto"})
    if huggingface.is_dataset(path):
        return huggingface.records(path, settings, choose, "probe.labels")
    if Path(path).is_file() and not path.lower().endswith(TABLE_ENDINGS):
        raise ProbekitError(f"probe.labels is {path!r}; a table ends in {', '.join(TABLE_ENDINGS[:-2])}")
    return read_records(Path(path), settings, choose)


def labels_digest(config: Config) -> str | None:
    """A digest of the table of labels, of the hub's data its revision; None where there is none."""
    if config.probe.labels is None:
        return None
    path = user_path(config.probe.labels)
    if not path.exists() and huggingface.is_dataset(config.probe.labels):
        try:
            return hub.find(config.probe.labels, setting="probe.labels", kind="dataset").revision
        except (
            ProbekitError
        ):  # a run can be looked at without network: its labels are not known to be the same
            return "not reached"
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return digest_of(file for file in files if file.is_file()) if path.exists() else None


def _vector(where: str, column: str, values: list[Any] | dict[str, Any]) -> np.ndarray:
    """A list of finite numbers as a vector, in float64."""
    if isinstance(values, dict):
        raise ProbekitError(f"{where}: {column!r} holds objects; give words, numbers or lists of numbers")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
            raise ProbekitError(
                f"{where}: {column!r} has {str(value)[:20]!r} in a list; lists must hold numbers, finite and "
                f"below {LARGEST:g}"
            )
    if not values:
        raise ProbekitError(f"{where}: {column!r} is an empty list; leave the field empty")
    return np.array(values, dtype=np.float64)
