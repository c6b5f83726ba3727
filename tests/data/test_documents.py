"""The file of documents: read back whole, by row and by batch; damaged files; what ends a batch."""

import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from probekit.config import CorpusSettings
from probekit.data import readers as documents
from probekit.data.readers import DocumentTexts, read_batch, sentence_texts, write_documents
from probekit.errors import ProbekitError
from probekit.progress import Progress


def write_arrow(path: Path, sizes: list[int]) -> list[str]:
    schema = pa.schema([("name", pa.string()), ("text", pa.large_string())])
    names = [f"document {n}" for n in range(sum(sizes))]
    rows = iter(names)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for size in sizes:
            batch = [{"name": name, "text": name.upper()} for name in itertools.islice(rows, size)]
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return names


@pytest.mark.parametrize("sizes", [[1], [3, 2], [0, 4, 0, 0, 1, 0], []])
def test_document_texts_across_batches(tmp_path: Path, sizes: list[int]):
    names = write_arrow(tmp_path / "documents.arrow", sizes)
    texts = DocumentTexts(tmp_path / "documents.arrow")
    assert len(texts) == len(names)
    assert [texts.row(n) for n in range(len(names))] == [{"name": n, "text": n.upper()} for n in names]
    streamed = [(first + i, row["name"]) for first, rows in texts.batches() for i, row in enumerate(rows)]
    assert streamed == list(enumerate(names))


def test_damaged_texts_say_so(tmp_path: Path):
    path = tmp_path / "documents.arrow"
    write_arrow(path, [3, 4])
    whole = path.read_bytes()
    for damaged in (b"", b"ARROW1\0\0", b"not arrow", *(whole[:n] for n in range(0, len(whole), 37))):
        path.write_bytes(damaged)
        with pytest.raises(
            ProbekitError, match=r"documents\.arrow: cannot be read.*build the corpus again"
        ) as error:
            DocumentTexts(path)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(ProbekitError, match=r"documents\.arrow: cannot be read"):
        DocumentTexts(path)


def test_damaged_batches_are_told_when_the_file_is_opened(tmp_path: Path):
    path = tmp_path / "documents.arrow"
    write_arrow(path, [3])
    whole = bytearray(path.read_bytes())
    batch = whole.index(b"\xff\xff\xff\xff", 16)  # every message begins with this mark; the schema's is at 8
    whole[batch : batch + 64] = bytes(64)
    path.write_bytes(whole)
    with pytest.raises(ProbekitError, match=r"documents\.arrow: cannot be read"):
        DocumentTexts(path)


@pytest.mark.parametrize(
    ("sizes", "most_documents", "most_characters", "batches"),
    [
        ([5, 5, 5, 5, 5], 2, 100, [2, 2, 1]),
        ([5, 5, 5, 5, 5], 9, 11, [3, 2]),
        ([40, 5, 5, 40, 5], 2, 30, [1, 2, 1, 1]),
        ([40], 9, 9, [1]),
    ],
)
def test_batches_end_with_so_many_documents_or_characters(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[int],
    most_documents: int,
    most_characters: int,
    batches: list[int],
):
    monkeypatch.setattr(documents, "DOCUMENTS_PER_BATCH", most_documents)
    monkeypatch.setattr(documents, "CHARACTERS_PER_BATCH", most_characters)
    texts = [letter * size for letter, size in zip("abcde", sizes, strict=False)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    path = tmp_path / "documents.arrow"
    settings = CorpusSettings(reader="jsonl", path=str(tmp_path))
    facts, digests, characters = write_documents(settings, path, Progress(quiet=True))
    written = DocumentTexts(path)
    assert np.diff(written.starts).tolist() == batches
    assert characters == sum(sizes)
    assert facts["documents"] == len({*digests.tolist()}) == len(texts)
    assert [row["text"] for _, rows in written.batches() for row in rows] == texts
    for batch, (first, rows) in enumerate(written.batches()):
        assert read_batch(path, batch) == rows
        assert rows[0] == written.row(first)


def test_sentences_of_some_documents():
    rows = [{"text": "One. Two "}, {"text": "..."}, {"text": " Three"}]
    spans = np.array([[0, 5], [5, 9], [0, 6]])
    assert sentence_texts(rows, np.array([2, 0, 1]), spans) == ["One.", "Two", "Three"]
