"""Reads the documents of a corpus from any format as a lazy stream, and keeps them in one Arrow file.

A new format of files is a function from a path to documents and an entry in `FORMATS`. Nothing here imports
torch, so that the processes that tokenise documents stay small.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from probekit.config import CorpusSettings
from probekit.data import huggingface
from probekit.data.chats import ChatTemplate, as_chat
from probekit.data.documents import SCHEMA, VISIBLE, Document
from probekit.data.sentences import opening
from probekit.data.splits import SPLITS, DocumentKeys, digest, normalised
from probekit.errors import ProbekitError, one_line
from probekit.planted.corpus import generate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from probekit.progress import Progress


File = tuple[Path, str, str]
"""A file to read, its short name and the name of its format."""

DOCUMENTS_PER_BATCH = 256
CHARACTERS_PER_BATCH = 1 << 23
"""A batch of the Arrow file ends with the document that reaches one of these: few books are held at once."""

_TITLE = re.compile(r" ?= (?!=)(?P<title>.*\S)(?<! =) =\s*")
_ESCAPE = re.compile(r" @([-,.])@ ")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROWS_AT_ONCE = 256
_BYTES_AT_ONCE = 1 << 20


def read_documents(
    settings: CorpusSettings,
    files: Sequence[File] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Iterator[Document]:
    """Streams the documents of a corpus, at most `max_documents` of them, blank ones included.

    Text keeps its line ends. Only a UTF-8 byte order mark at the start of a file is dropped, and WikiText's
    escapes (` @-@ `, ` @,@ `, ` @.@ `) are undone.

    Args:
        settings: Where and how to read.
        files: What `files_read` found, so that it is not looked for again.
        tokenizer: The LM's, whose template writes out chats.

    Raises:
        ProbekitError: A setting, a file or a record is not what the reader needs, or there is no document.
    """
    readers = {"planted": _planted, "huggingface": _huggingface}
    documents: Generator[Document]
    if settings.reader in readers:
        documents = readers[settings.reader](settings)
    else:
        documents = _from_files(settings, files or files_read(settings))
    empty, template = True, None
    with closing(documents):  # now, not when the process ends: some libraries crash there with open streams
        for document in itertools.islice(documents, settings.max_documents):
            empty = False
            if document.messages is not None:
                template = template or ChatTemplate(tokenizer)
                document = replace(document, **vars(template.render(document.messages, document.name)))
            try:
                document.text.encode()
            except UnicodeEncodeError as error:  # JSON can spell it, no tokenizer accepts it
                half = f"character {error.start} of the text is half a surrogate pair"
                raise ProbekitError(f"{document.name}: {half}; correct it") from None
            yield document
    if empty:
        raise ProbekitError(
            f"corpus.path is {settings.path!r}: the {settings.reader} reader finds no document there"
        )


def _planted(settings: CorpusSettings) -> Generator[Document]:
    for number, (text, actions, kind) in enumerate(generate(settings.planted).documents(), 1):
        yield Document(text, f"planted:{number}", actions, kind)


def _huggingface(settings: CorpusSettings) -> Generator[Document]:
    path = _path(settings)
    rows = huggingface.records(path, settings, lambda known: _columns(settings, known, path), "corpus.path")
    yield from (_document(record, where, where, settings) for where, _, record in rows)


def _from_files(settings: CorpusSettings, files: Sequence[File]) -> Generator[Document]:
    for path, name, kind in files:
        if kind not in RECORDS and (column := settings.group_column or settings.split_column):
            raise ProbekitError(
                f"corpus.group_column or corpus.split_column is {column!r}, but {path} is read as {kind}, "
                f"which has no columns; give {', '.join(RECORDS)}"
            )
        yield from FORMATS[kind][1](path, name, settings)


def files_read(settings: CorpusSettings) -> list[File]:
    """The files that a corpus is read from, with their formats.

    Raises:
        ProbekitError: There is no such file or folder, or a file of no known format.
    """
    return [(path, name, _format_of(path, settings)) for path, name in _files(settings)]


def _format_of(path: Path, settings: CorpusSettings) -> str:
    """The name in `FORMATS` of a file's format."""
    if settings.reader != "auto":
        return settings.reader
    suffix = _suffix(path)
    if suffix == ".txt":
        with _opened(path, settings) as file:
            first = next((line for line in file if not line.isspace()), "")
        return "wikitext" if _TITLE.fullmatch(first) else "text"
    for name, (suffixes, _) in FORMATS.items():
        if suffix in suffixes:
            return name
    raise ProbekitError(
        f"corpus.path is {str(path)!r}, whose ending says no format; set corpus.reader to "
        f"{', '.join(FORMATS)} or huggingface"
    )


def reader_for(path: Path, reader: str) -> str:
    """The reader for a file like those of a corpus: `auto`, which tells all formats apart but for lines."""
    return "lines" if reader == "lines" and (path.is_dir() or _suffix(path) == ".txt") else "auto"


def _suffix(path: Path) -> str:
    """The ending of a file, without that of its compression, in lower case."""
    return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).suffix.lower()


def _files(settings: CorpusSettings) -> Iterator[tuple[Path, str]]:
    """The file, or all files of the reader's formats below the folder, sorted; each with its short name."""
    root = Path(_path(settings))
    names = FORMATS if settings.reader == "auto" else (settings.reader,)
    suffixes = dict.fromkeys(suffix for name in names for suffix in FORMATS[name][0])
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except (OSError, ValueError) as error:
        raise ProbekitError(
            f"corpus.path is {str(root)!r}: {_reason(error)}; name a file or folder (or, for a "
            "dataset on the hub, set corpus.reader huggingface)"
        ) from None
    if not is_folder:
        root, files = root.parent, [root]
    else:
        files = sorted(path for path in root.rglob("*") if _suffix(path) in suffixes and path.is_file())
    if not files:
        raise ProbekitError(
            f"corpus.path is {str(root)!r}: a folder with no file that ends in {' or '.join(suffixes)}; name "
            "a file itself to read it whatever its ending"
        )
    for path in files:
        # Bytes of a file name that are not UTF-8 are half surrogate pairs in Python.
        yield path, _SURROGATE.sub("\ufffd", path.relative_to(root).as_posix())


def _read_text(path: Path, name: str, settings: CorpusSettings) -> Iterator[Document]:
    """A file as one document, or as the documents between its separator lines."""
    with _opened(path, settings) as file:
        if settings.separator is None:
            yield Document(file.read(), name)
            return
        separator, first = settings.separator.strip(), 1
        lines: list[str] = []
        for number, line in enumerate(file, 1):
            if line.strip() != separator:
                lines.append(line)
                continue
            if lines:
                yield Document("".join(lines), f"{name}:{first}")
            lines, first = [], number + 1
        if lines:
            yield Document("".join(lines), f"{name}:{first}")


def _read_wikitext(path: Path, name: str, settings: CorpusSettings) -> Iterator[Document]:
    """The articles of a file; each begins with its title line, and its name is the title."""
    title: str | None = None
    lines: list[str] = []
    with _opened(path, settings) as file:
        for number, line in enumerate(file, 1):
            if heading := _TITLE.fullmatch(line):
                if title is not None:
                    yield Document("".join(lines), title)
                title, lines = _ESCAPE.sub(r"\1", heading["title"]), []
            elif title is None and not line.isspace():
                raise ProbekitError(
                    f"{path}:{number}: text without a title line ` = Title = ` before it, so this is not a "
                    "WikiText file; read it with --corpus.reader text"
                )
            lines.append(_ESCAPE.sub(r"\1", line))
    if title is not None:
        yield Document("".join(lines), title)


def _read_lines(path: Path, name: str, settings: CorpusSettings) -> Iterator[Document]:
    with _opened(path, settings) as file:
        yield from (Document(line, f"{name}:{number}") for number, line in enumerate(file, 1))


def _read_table(path: Path, name: str, settings: CorpusSettings) -> Iterator[Document]:
    """The documents of a table, one a row."""
    for where, row, record in read_records(path, settings, lambda known: _columns(settings, known, path)):
        yield _document(record, where, f"{name}:{row}", settings)


Record = tuple[str, int, object]
"""Where a row of a table is, for messages; its number from 1 (in JSON lines that of the line); its values by
column, as they are written."""

Choose = Callable[[Sequence[str]], Sequence[str]]
"""Chooses columns of those that a table has, or refuses the table."""


def read_records(path: Path, settings: CorpusSettings, choose: Choose) -> Iterator[Record]:
    """Streams the rows of a table: CSV, TSV, JSON lines or Parquet, which may be compressed.

    Args:
        path: The table.
        settings: The reader, which may be auto, and the encoding.
        choose: Chooses the columns that are read; those of JSON lines are not known beforehand.

    Raises:
        ProbekitError: The file is no table, or damaged.
    """
    kind = _format_of(path, settings)
    if kind not in RECORDS:
        raise ProbekitError(f"{path} is read as {kind}, which has no columns; give {', '.join(RECORDS)}")
    return RECORDS[kind](path, settings, choose)


def _csv_records(path: Path, settings: CorpusSettings, choose: Choose) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    with _opened(path, settings) as file:
        rows = csv.DictReader(file, delimiter="\t" if _suffix(path) == ".tsv" else ",")
        try:
            columns = choose(rows.fieldnames or ())
            for row, record in enumerate(rows, 1):
                # A row can have several lines.
                yield f"{path}: row {row}", row, {column: record[column] or None for column in columns}
        except csv.Error as error:
            raise ProbekitError(f"{path}:{rows.line_num}: not a line of CSV: {_reason(error)}") from None


def _jsonl_records(path: Path, settings: CorpusSettings, choose: Choose) -> Iterator[Record]:
    with _opened(path, settings) as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ProbekitError(f"{path}:{number}: not a line of JSON: {_reason(error)}") from None
            yield f"{path}:{number}", number, record


def _parquet_records(path: Path, settings: CorpusSettings, choose: Choose) -> Iterator[Record]:
    try:
        # Without both of these a row group, which may be the whole file, is read before its first row.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BYTES_AT_ONCE) as file:
            columns = choose(file.schema_arrow.names)
            batches = file.iter_batches(_ROWS_AT_ONCE, columns=[*columns])
            records = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            yield from ((f"{path}:{row}", row, record) for row, record in enumerate(records, 1))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ProbekitError(f"{path}: not a readable Parquet file: {_reason(error)}") from error


RECORDS: dict[str, Callable[[Path, CorpusSettings, Choose], Iterator[Record]]] = {
    "jsonl": _jsonl_records,
    "csv": _csv_records,
    "parquet": _parquet_records,
}
"""By the name of a reader: how the rows of a table are read."""

FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Path, str, CorpusSettings], Iterator[Document]]]] = {
    "text": ((".txt",), _read_text),
    "lines": ((".txt",), _read_lines),
    "wikitext": ((".tokens", ".raw", ".txt"), _read_wikitext),
    "jsonl": ((".jsonl", ".ndjson"), _read_table),
    "csv": ((".csv", ".tsv"), _read_table),
    "parquet": ((".parquet",), _read_table),
}
"""By the name of a reader: the suffixes looked for in a folder, and how one file is read."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""How a file of text is compressed, by its last suffix."""


def _path(settings: CorpusSettings) -> str:
    if not settings.path:
        raise ProbekitError("corpus.path is not set; give the file, folder or dataset to read")
    return os.path.expanduser(settings.path)  # noqa: PTH111 - Path makes `name`, as on the hub, of `./name`


def _columns(settings: CorpusSettings, known: Sequence[str], where: str | Path) -> list[str]:
    """The columns that hold text, group and split, which must be among those that there are."""
    wanted = [name for name in ("text_column", "group_column", "split_column") if getattr(settings, name)]
    for name in wanted:
        if (value := getattr(settings, name)) not in known:
            there = ", ".join(known) or "nothing"
            raise ProbekitError(f"corpus.{name} is {value!r}, but {where} has {there}")
    return list(dict.fromkeys(getattr(settings, name) for name in wanted))


def _document(record: object, where: str, name: str, settings: CorpusSettings) -> Document:
    """The document of a record."""
    if not isinstance(record, dict):
        raise ProbekitError(f"{where}: {type(record).__name__} where a JSON object should be")
    text = record.get(settings.text_column)
    if text is None and settings.missing == "skip":
        return Document("", name)  # dropped and counted like any blank document
    _columns(settings, list(record), where)
    if text is None:
        raise ProbekitError(f"{where}: no {settings.text_column!r}; --corpus.missing skip drops such rows")
    messages = as_chat(text, f"{where}: {settings.text_column!r}")
    if messages is None and not isinstance(text, str):
        raise ProbekitError(
            f"{where}: {settings.text_column!r} holds {type(text).__name__}, not a string or a chat; correct "
            "it, or set --corpus.text_column"
        )
    group, split = (
        None if column is None else as_written(record[column])
        for column in (settings.group_column, settings.split_column)
    )
    if settings.split_column is not None and split not in SPLITS:
        raise ProbekitError(
            f"{where}: corpus.split_column {settings.split_column!r} holds {split or ''!r}; it must hold "
            f"{', '.join(SPLITS)}"
        )
    return Document("" if messages else text, name, group=group, split=split, messages=messages)


def as_written(value: object) -> str | None:
    """A value of a table as text: None where it is empty, missing, or a number that is none.

    A float that is whole has no fraction: a column of whole numbers of which some are missing holds floats.
    """
    if value is None or value == "" or (isinstance(value, float) and value != value):
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


@contextmanager
def _opened(path: Path, settings: CorpusSettings) -> Iterator[TextIO]:
    """Opens a text file, line ends untranslated; errors of opening and decoding become one clear line."""
    encoding = settings.encoding
    try:
        " ".encode(encoding)  # a codec may exist and yet not be one of text, such as hex
    except (LookupError, ValueError):
        raise ProbekitError(
            f"corpus.encoding is {encoding!r}: not an encoding that Python knows, such as utf-8 or latin-1"
        ) from None
    if codecs.lookup(encoding).name == "utf-8":
        encoding = "utf-8-sig"  # takes the byte order mark that some editors write, and needs none
    try:
        with _bytes(path) as file:
            yield io.TextIOWrapper(file, encoding, newline="")
    except UnicodeError:
        raise ProbekitError(
            f"{path}: byte {_bad_byte(path, encoding)} is not valid {settings.encoding}; set "
            "--corpus.encoding to the encoding of the file, such as latin-1, or cp1252 of Windows"
        ) from None
    except OSError as error:
        raise ProbekitError(f"{path}: cannot be read: {_reason(error)}") from None


def _bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, uncompressed."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open("rb")
    stream: IO[bytes] = pa.CompressedInputStream(pa.OSFile(str(path)), compression)
    return stream


def _bad_byte(path: Path, encoding: str) -> int:
    """The offset at which decoding fails: a text stream counts from its current buffer, so decode again."""
    decoder, read = codecs.getincrementaldecoder(encoding)(), 0
    with _bytes(path) as file:
        for chunk in itertools.chain(iter(lambda: file.read(_BYTES_AT_ONCE), b""), [b""]):
            read += len(chunk)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                return read - len(error.object) + error.start  # `object` ends where reading does
            except UnicodeError:  # UTF-16 and UTF-32 without the byte order mark that they begin with
                break
    return 0


def _reason(error: BaseException) -> str:
    """The message of an error, on one line."""
    return getattr(error, "strerror", None) or one_line(error) or type(error).__name__


def write_documents(
    settings: CorpusSettings,
    path: Path,
    progress: Progress,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[dict[str, Any], DocumentKeys, int]:
    """Reads all documents and writes those that are not blank to an Arrow file.

    Args:
        settings: Where and how to read.
        path: The file.
        progress: Shows what is read.
        tokenizer: The LM's, whose template writes out chats.

    Returns:
        Facts about them; which of them belong together; the number of characters.

    Raises:
        ProbekitError: As `read_documents`, or all documents are blank, or only some are chats.
    """
    keys = DocumentKeys()
    number_of: dict[bytes, int] = {}
    blank = characters = chats = 0
    files: list[File] = []
    if settings.reader == "auto":
        files = files_read(settings)
        formats = Counter(kind for *_, kind in files)
        shown = ", ".join(f"{count:,} as {name}" for name, count in formats.items())
        progress.say(f"corpus.reader auto: files read: {shown}")
    with (
        progress.task("read documents") as task,
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        documents = read_documents(settings, files, tokenizer)
        for batch in _batches(task.track(_opening(document, settings) for document in documents)):
            kept = []
            for document in batch:
                if not VISIBLE.search(document.text):
                    blank += 1
                    continue
                text = digest(document.key)
                number = number_of.setdefault(text, len(keys)) if settings.distinct else len(keys)
                if number == len(keys):
                    kept.append(document)
                    keys.texts += text
                    keys.normalised += digest(normalised(document.text))
                    characters += len(document.text)
                    chats += document.messages is not None
                if settings.group_column is not None or document.split is not None:
                    keys.documents.append(number)
                    keys.groups += text if document.group is None else digest(document.group)
                    keys.splits.append(-1 if document.split is None else SPLITS.index(document.split))
            if kept:
                writer.write_batch(pa.RecordBatch.from_pylist([vars(d) for d in kept], schema=SCHEMA))
    if not keys:
        raise ProbekitError(f"corpus.path {settings.path!r}: all its {blank} documents are blank")
    if 0 < chats < len(keys):
        raise ProbekitError(
            f"corpus.path {settings.path!r}: column {settings.text_column!r} holds {chats:,} chats and "
            f"{len(keys) - chats:,} plain texts; give all of one kind"
        )
    facts = {
        "documents": len(keys),
        "chats": chats,
        "blank_documents_dropped": blank,
        "fingerprint": keys.fingerprint(),
    }
    return facts, keys, characters


def _opening(document: Document, settings: CorpusSettings) -> Document:
    """A text's first `max_sentences` sentences."""
    most = settings.max_sentences
    if most is None or document.messages is not None:
        return document
    actions = None if document.actions is None else document.actions[:most]
    return replace(document, text=opening(document.text, most, settings.language), actions=actions)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
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
