"""The documents of a corpus in one Arrow file, written and read a batch at a time.

Nothing here imports torch: processes that cut documents are to be small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from probekit.config import CorpusSettings
from probekit.corpus.readers import Document, read_documents
from probekit.errors import ProbekitError

if TYPE_CHECKING:
    from probekit.progress import Progress

DOCUMENTS_PER_BATCH = 256
CHARACTERS_PER_BATCH = 1 << 23
"""A batch ends with the document that reaches one of these; books are not held by the hundred."""

SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("text", pa.large_string()),
        ("actions", pa.list_(pa.int32())),
        ("kind", pa.int32()),
    ]
)

Row = dict[str, Any]
"""The columns of one document."""


class DocumentTexts:
    """The corpus's texts and names, in an Arrow file.

    Attributes:
        starts: Number of the first document of each batch, and at the end of all of them `[batches + 1]`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            sizes = [self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)]
        except (OSError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise ProbekitError(f"{path}: cannot be read ({reason}); build the corpus again") from None
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def row(self, document: int) -> Row:
        """All columns of one document."""
        batch = int(np.searchsorted(self.starts, document, side="right")) - 1
        columns = self._reader.get_batch(batch).slice(document - int(self.starts[batch]), 1)
        return columns.to_pylist()[0]

    def batches(self) -> Iterator[tuple[int, list[Row]]]:
        """The documents in the file's own batches, each with the number of its first document."""
        # Read, not mapped: mapped pages count as the process's memory until the file is closed.
        with pa.OSFile(str(self._path)) as source:
            reader = pa.ipc.open_file(source)
            for batch, start in enumerate(self.starts[:-1].tolist()):
                yield start, reader.get_batch(batch).to_pylist()


def read_batch(path: Path, batch: int) -> list[Row]:
    """The documents of one batch of a file."""
    with pa.OSFile(str(path)) as source:
        return pa.ipc.open_file(source).get_batch(batch).to_pylist()


def sentence_texts(rows: Sequence[Row], sentences: np.ndarray, spans: np.ndarray) -> list[str]:
    """The sentences of some documents, surrounding white space removed.

    Args:
        rows: The documents.
        sentences: How many each has [documents].
        spans: Their character offsets, document by document [sentences, 2].
    """
    owners = np.repeat(np.arange(len(rows)), sentences).tolist()
    return [
        rows[row]["text"][start:end].strip() for row, (start, end) in zip(owners, spans.tolist(), strict=True)
    ]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in batches that are small enough to hold."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == DOCUMENTS_PER_BATCH or characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def write_documents(
    settings: CorpusSettings, path: Path, progress: Progress
) -> tuple[dict[str, Any], np.ndarray, int]:
    """Reads all documents and writes those that are not blank.

    Returns:
        Facts; a digest of each document [documents]; the number of characters.
    """
    digests = bytearray()
    blank = characters = 0
    with (
        progress.task("read documents") as task,
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        for batch in _batches(task.track(read_documents(settings))):
            kept = [document for document in batch if document.text.strip()]
            blank += len(batch) - len(kept)
            for document in kept:
                text = document.text.encode("utf-8", "surrogatepass")
                digests += hashlib.blake2b(text, digest_size=8).digest()
                characters += len(document.text)
            if kept:
                writer.write_batch(pa.RecordBatch.from_pylist([vars(d) for d in kept], schema=SCHEMA))
    if not digests:
        raise ProbekitError(f"corpus.path {settings.path!r}: all its {blank} documents are blank")
    facts = {
        "documents": len(digests) // 8,
        "blank_documents_dropped": blank,
        "fingerprint": hashlib.sha256(digests).hexdigest(),
    }
    return facts, np.frombuffer(digests, dtype=">u8").astype(np.uint64), characters
