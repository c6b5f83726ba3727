"""Documents, and the Arrow file that holds those of a corpus.

Nothing here imports torch, so that the processes that tokenise documents stay small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from probekit.data.chats import Messages, key_of
from probekit.errors import ProbekitError, one_line

VISIBLE = re.compile(
    r"[^\s\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb]"
)
"""Matches a character that is seen: neither white space nor a control or format character."""


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: As it was read, line ends included.
        name: Title, file name, or file and line or row (counted from 1), for messages and inspection.
        actions: The planted action of each sentence (planted corpora only).
        kind: The hidden document type (planted corpora only).
        group: What the group column holds; None where it is empty.
        split: What the split column holds.
        messages: Of a chat, its messages and where they stand in the text; see `chats.Rendered`.
        special: Of a chat, where special tokens stand in the text.
    """

    text: str
    name: str
    actions: Sequence[int] | None = None
    kind: int | None = None
    group: str | None = None
    split: str | None = None
    messages: Messages | None = None
    special: Sequence[Sequence[int]] | None = None

    @property
    def key(self) -> str:
        """What a table of labels finds it by: its text, or a chat's messages as JSON."""
        return self.text if self.messages is None else key_of(self.messages)


SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("text", pa.large_string()),
        ("actions", pa.list_(pa.int32())),
        ("kind", pa.int32()),
        (
            "messages",
            pa.list_(
                pa.struct(
                    {
                        "role": pa.string(),
                        "content": pa.large_string(),
                        "start": pa.int64(),
                        "end": pa.int64(),
                    }
                )
            ),
        ),
        ("special", pa.list_(pa.list_(pa.int64()))),
    ]
)


class DocumentFile:
    """The documents of a built corpus, in an Arrow file.

    Args:
        path: The file, which `write_documents` wrote.

    Attributes:
        starts: Number of the first document of each batch, and at the end their number `[batches + 1]`.

    Raises:
        ProbekitError: The file is missing or cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            sizes = [self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            raise ProbekitError(
                f"{path}: cannot be read ({one_line(error)}); build the corpus again"
            ) from None
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> Document:
        """One document by its number."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        batch = int(np.searchsorted(self.starts, number, side="right")) - 1
        return _documents(self._reader.get_batch(batch).slice(number - int(self.starts[batch]), 1))[0]

    def batches(self) -> Iterator[tuple[int, list[Document]]]:
        """The documents in the file's own batches, each with the number of its first document."""
        for batch, first in enumerate(self.starts[:-1].tolist()):
            yield first, read_batch(self._path, batch)


def read_batch(path: Path, batch: int) -> list[Document]:
    """One batch of a file of documents."""
    # Read, not mapped: mapped pages count as the process's memory until the file is closed.
    with pa.OSFile(str(path)) as source:
        return _documents(pa.ipc.open_file(source).get_batch(batch))


def _documents(batch: pa.RecordBatch) -> list[Document]:
    return [Document(**record) for record in batch.to_pylist()]
