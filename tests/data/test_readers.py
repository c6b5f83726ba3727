"""Every format streams its documents untouched, and bad input is refused in one line; the Arrow file."""

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from probekit.config import CorpusSettings, PlantedSettings
from probekit.data import hub, readers
from probekit.data.documents import Document, DocumentFile, read_batch
from probekit.data.readers import read_documents, write_documents
from probekit.data.sentences import sentence_spans
from probekit.data.splits import DocumentKeys
from probekit.errors import ProbekitError
from probekit.planted import corpus as planted
from probekit.progress import Progress

WIKITEXT = Path(__file__).parents[2].parent / "shared/data/wikitext-2/valid.txt"
FILE_READERS = [*readers.FORMATS]


def read(path=None, reader="text", **settings):
    path = path if path is None else str(path)
    return read_documents(CorpusSettings(reader=reader, path=path, **settings))


def contents(*arguments, **settings):
    return [(document.name, document.text) for document in read(*arguments, **settings)]


def texts(*arguments, **settings):
    return [document.text for document in read(*arguments, **settings)]


def refusal(*arguments, **settings):
    with pytest.raises(ProbekitError) as caught:
        list(read(*arguments, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_text_file_is_one_document_with_nothing_changed(tmp_path):
    text = "One.\r\nTwo.\rThree. \n\n\u2028 e\u0301 \u00e9 \ufb01 \U0001f600"
    assert contents(write(tmp_path / "a.txt", text)) == [("a.txt", text)]


def test_text_folder_is_read_in_order_and_blank_documents_are_kept(tmp_path):
    write(tmp_path / "b.txt", "B.")
    write(tmp_path / "a/z.txt", "Z.")
    write(tmp_path / "a/C.TXT", " \n")
    write(tmp_path / "notes.md", "Not text.")
    (tmp_path / "folder.txt").mkdir()
    everything = [("a/C.TXT", " \n"), ("a/z.txt", "Z."), ("b.txt", "B.")]
    assert contents(tmp_path) == contents(tmp_path, max_documents=9) == everything
    assert contents(tmp_path, max_documents=2) == everything[:2]


def kept(folder: Path, path: str, **settings: object) -> list[Document]:
    """The documents that a corpus keeps."""
    file = folder / "documents.arrow"
    write_documents(CorpusSettings.model_validate({"path": path, **settings}), file, Progress(quiet=True))
    return [document for _, batch in DocumentFile(file).batches() for document in batch]


def test_the_opening_of_a_text_is_its_first_sentences(tmp_path: Path):
    whole = ["It rained. Nobody came!\n\nThe road\nwas wet.  So what?", "One. Two.", "One, and no end"]
    write(tmp_path / "some.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in whole))
    path = str(tmp_path / "some.jsonl")
    assert [document.text for document in kept(tmp_path, path)] == whole
    cut = [document.text for document in kept(tmp_path, path, max_sentences=3)]
    assert cut == ["It rained. Nobody came!\n\nThe road", *whole[1:]]
    assert [len(sentence_spans(text)) for text in cut] == [3, 2, 1]


def test_planted_openings_keep_their_actions(tmp_path: Path):
    settings = {"reader": "planted", "planted": PlantedSettings(documents=6, sentences=(2, 5))}
    all_of_it = kept(tmp_path, "", **settings)
    cut = kept(tmp_path, "", max_sentences=3, **settings)
    assert [document.actions for document in cut] == [document.actions[:3] for document in all_of_it]
    assert all(one.text.startswith(other.text) for one, other in zip(all_of_it, cut, strict=True))


@pytest.mark.parametrize(
    ("settings", "content", "text"),
    [
        ({}, b"\xef\xbb\xbfOne.", "One."),
        ({"encoding": "UTF8"}, b"\xef\xbb\xbfOne.", "One."),
        ({"encoding": "utf-16"}, "One.".encode("utf-16"), "One."),
        ({"encoding": "cp1252"}, b"caf\xe9\r\n", "caf\u00e9\r\n"),
    ],
)
def test_encodings_and_byte_order_marks(tmp_path, settings, content, text):
    assert texts(write(tmp_path / "a.txt", content), **settings) == [text]


def test_wikitext_is_split_at_titles_and_its_escapes_are_undone(tmp_path):
    inside = " \n = = History = = \n x = y \n = = = Old = = = \n"
    first = " = M @-@ 82 ( road ) = \n It is 1 @,@ 000 @.@ 5 @-@ long . \n" + inside
    second = " = Second = \r\n Text @ home .\r\n"
    write(tmp_path / "wiki.test.tokens", " \n" + first + second)
    meant = " = M-82 ( road ) = \n It is 1,000.5-long . \n" + inside
    expected = [("M-82 ( road )", meant), ("Second", second)]
    assert contents(tmp_path / "wiki.test.tokens", "wikitext") == contents(tmp_path, "wikitext") == expected


@pytest.mark.skipif(not WIKITEXT.is_file(), reason=f"{WIKITEXT} is not there")
def test_real_wikitext_file_has_60_articles():
    documents = contents(WIKITEXT, "wikitext")
    assert len(documents) == 60
    assert [documents[0][0], documents[2][0]] == ["Homarus gammarus", "M-82 ( Michigan highway )"]
    assert all(text.startswith(f" = {name} = \n") for name, text in documents)
    # All of the file but the blank line before the first title and four characters for each escape.
    file = WIKITEXT.read_text(encoding="utf-8")
    escapes = len(re.findall(" @[-,.]@ ", file))
    assert escapes == 2518
    assert sum(len(text) for _, text in documents) == len(file) - len(" \n") - 4 * escapes


def test_jsonl_documents_are_named_by_line(tmp_path):
    lines = '\ufeff{"text": "One.\\r\\n"}\r\n\n{"n": 1, "text": ""}\n{"text":"\u2028"}'
    path = write(tmp_path / "a.jsonl", lines)
    expected = [("a.jsonl:1", "One.\r\n"), ("a.jsonl:3", ""), ("a.jsonl:4", "\u2028")]
    assert contents(path, "jsonl") == contents(tmp_path, "jsonl") == expected


def test_jsonl_text_column_and_half_a_surrogate_pair(tmp_path):
    path = write(tmp_path / "a", r'{"body": "\ud83d\ude00", "text": 3}' + "\n" + r'{"body": "bad \ud83d."}')
    settings = {"reader": "jsonl", "text_column": "body"}
    assert texts(path, max_documents=1, **settings) == ["\U0001f600"]
    message = refusal(path, **settings)
    assert message.startswith("a:2: character 4 of the text is half a surrogate pair; ")


def test_parquet_documents_are_named_by_row(tmp_path):
    parquet(tmp_path / "b.parquet", text=["One.\r\n", " "], number=[1, 2])
    parquet(tmp_path / "a.parquet", text=pa.array(["Zero."], pa.large_string()))
    rows = [("a.parquet:1", "Zero."), ("b.parquet:1", "One.\r\n"), ("b.parquet:2", " ")]
    assert contents(tmp_path, "parquet") == rows


def test_parquet_is_not_read_whole(tmp_path):
    # One row group of 32 MB, whose first rows must not need the others.
    path = parquet(tmp_path / "a.parquet", text=["x" * 1000 + str(number) for number in range(32_000)])
    before = pa.total_allocated_bytes()
    documents = read(path, "parquet")
    assert next(documents).name == "a.parquet:1"
    assert pa.total_allocated_bytes() - before < 10e6


def test_bad_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["One."], title=["T"])
    assert refusal(path, "parquet", text_column="body").endswith("a.parquet has text, title")
    path.write_bytes(path.read_bytes()[:-20])  # cut short
    assert f"{path}: not a readable Parquet file: " in refusal(path, "parquet")
    for column, said in [
        (["One.", None], f"{path}:2: no 'text'; --corpus.missing skip drops such rows"),
        ([1], f"{path}:1: 'text' holds int, not a string"),
        (pa.array([b"\xff"]).view(pa.string()), f"{path}: not a readable Parquet file: 'utf-8' codec"),
        (pa.array([], pa.string()), f"corpus.path is '{path}': the parquet reader finds no document"),
    ]:
        assert refusal(parquet(path, text=column), "parquet").startswith(said)


@pytest.fixture(scope="module")
def toy():
    return datasets.Dataset.from_dict({"text": ["One.", "Two."], "number": [1, 2]})


def test_huggingface_folder(tmp_path, toy):
    toy.to_parquet(tmp_path / "train-0.parquet")
    assert contents(tmp_path, "huggingface") == [(f"{tmp_path}:1", "One."), (f"{tmp_path}:2", "Two.")]
    assert refusal(tmp_path, "huggingface", text_column="body").endswith(f"{tmp_path} has text, number")
    message = refusal(tmp_path, "huggingface", dataset_split="nope")
    assert "corpus.dataset_split 'nope'" in message
    assert "Available splits: ['train']" in message
    assert "corpus.subset 'nope'" in refusal(tmp_path, "huggingface", subset="nope")


def test_huggingface_saved_to_disk(tmp_path, toy):
    toy.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"probe": toy}).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        assert texts(tmp_path / name, "huggingface", dataset_split="probe") == ["One.", "Two."]
    message = refusal(tmp_path / "splits", "huggingface")
    assert message == f"corpus.dataset_split is 'train', but {tmp_path}/splits has probe"


def test_all_splits_of_a_dataset(tmp_path, toy):
    splits = {"train": toy, "validation": toy, "test": toy}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for name, part in splits.items():
        part.to_parquet(tmp_path / f"files/{name}-0.parquet")
    for folder in ("saved", "files"):
        found = list(read(tmp_path / folder, "huggingface", dataset_split="all", split_column="split"))
        assert [document.split for document in found] == ["probe"] * 2 + ["validation"] * 2 + ["test"] * 2
        assert [document.name for document in found][-1] == f"{tmp_path}/{folder}:6"
        assert len(texts(tmp_path / folder, "huggingface", dataset_split="all")) == 6


def test_huggingface_columns_that_are_known_late_and_bad_folders(tmp_path):
    write(tmp_path / "text/train.txt", "One.\nTwo.\n")
    assert texts(tmp_path / "text", "huggingface") == ["One.", "Two."]
    assert refusal(tmp_path / "text", "huggingface", text_column="body").endswith("text:1 has text")
    write(tmp_path / "broken/train.jsonl", '{"text": "One."}\n{oops\n')
    assert "the library datasets cannot read" in refusal(tmp_path / "broken", "huggingface")
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in refusal(tmp_path / "empty", "huggingface")
    assert "no such folder" in refusal(tmp_path / "nope", "huggingface")


def test_huggingface_reads_the_revision_that_was_found(tmp_path, monkeypatch, toy):
    snapshot, load = Mock(return_value=str(tmp_path)), Mock(return_value=toy.to_iterable_dataset())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(datasets, "load_dataset", load)
    # On the hub, or in its cache.
    for cached, name, revision in [(False, "some/thing", "abc"), (True, str(tmp_path), None)]:
        source = hub.Source("some/thing", "abc", local_only=cached)
        monkeypatch.setattr(hub, "find", Mock(return_value=source))
        assert texts("some/thing", "huggingface", subset="en", max_documents=1) == ["One."]
        load.assert_called_with(name, "en", split="train", revision=revision, streaming=True)
    how = {"repo_type": "dataset", "revision": "abc", "local_files_only": True}
    snapshot.assert_called_once_with("some/thing", **how)


def test_planted_documents_carry_their_plan():
    settings = PlantedSettings(documents=4)
    documents = enumerate(planted.generate(settings).documents(), 1)
    expected = [Document(text, f"planted:{row}", actions, kind) for row, (text, actions, kind) in documents]
    assert list(read(reader="planted", planted=settings)) == expected


@pytest.mark.parametrize("reader", [*FILE_READERS, "huggingface"])
def test_path_is_needed(reader):
    message = "corpus.path is not set; give the file, folder or dataset to read"
    assert refusal(reader=reader) == refusal("", reader) == message


@pytest.mark.parametrize("reader", FILE_READERS)
def test_paths_with_nothing_to_read(tmp_path, monkeypatch, reader):
    missing = f"{tmp_path}/nope"
    said = f"corpus.path is '{missing}': No such file or directory; name a file or folder"
    assert refusal(missing, reader).startswith(said)
    assert "null" in refusal("a\0b", reader)
    said = f"corpus.path is '{tmp_path}': a folder with no file that ends in ."
    assert refusal(tmp_path, reader).startswith(said)
    path = write(tmp_path / "a", "A.")
    refuse = Mock(side_effect=PermissionError(13, "Permission denied"))
    monkeypatch.setattr(readers, "_bytes", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    assert re.fullmatch(f"{path}: .*: Permission denied", refusal(path, reader))


REFUSALS = [
    ("wikitext", "\nA story.", "PATH:2: text without a title line ` = Title = ` before it"),
    ("wikitext", " \n\n", "corpus.path is 'PATH': the wikitext reader finds no document there"),
    ("jsonl", " \n\n", "corpus.path is 'PATH': the jsonl reader finds no document there"),
    ("jsonl", "\n{oops}", "PATH:2: not a line of JSON: Expecting property name"),
    ("jsonl", "[" * 100_000, "PATH:1: not a line of JSON: "),
    ("jsonl", '["text"]', "PATH:1: list where a JSON object should be"),
    ("jsonl", "null", "PATH:1: NoneType where a JSON object should be"),
    ("jsonl", '{"body": "a", "title": "b"}', "corpus.text_column is 'text', but PATH:1 has body, title"),
    ("jsonl", "{}", "corpus.text_column is 'text', but PATH:1 has nothing"),
    (
        "jsonl",
        '{"text": 3}',
        "PATH:1: 'text' holds int, not a string or a chat; correct it, or set --corpus.",
    ),
    ("jsonl", '{"text": null}', "PATH:1: no 'text'; --corpus.missing skip drops such rows"),
    ("csv", "id,text\n1,One.\n2,\n", "PATH: row 2: no 'text'; --corpus.missing skip drops such rows"),
    ("csv", "id,text\n1\n", "PATH: row 1: no 'text'; --corpus.missing skip drops such rows"),
    ("csv", "id,body\n1,One.\n", "corpus.text_column is 'text', but PATH has id, body"),
    ("parquet", "PAR1 and then nothing of it", "PATH: not a readable Parquet file: "),
]


@pytest.mark.parametrize(("reader", "content", "said"), REFUSALS, ids=[said for *_, said in REFUSALS])
def test_files_that_hold_something_else(tmp_path, reader, content, said):
    path = write(tmp_path / "a", content)
    assert refusal(path, reader).startswith(said.replace("PATH", str(path)))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder with a file of every format, some of them compressed."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("One é.", "Two."))
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.JSONL.GZ", gzip.compress(rows.encode()))
    write(tmp_path / "c.csv", 'id,text\n1,"Three, ""3"".\nStill."\n2,Four.\n')
    with pa.CompressedOutputStream(str(tmp_path / "d.tsv.zst"), "zstd") as file:
        file.write(b"text\tid\nFive, and more.\t1\n\t2\n")
    write(tmp_path / "e.txt", "\n = Six = \n\n A.\n")
    write(tmp_path / "f.txt", "Seven.\n = Not a title = \n")
    parquet(tmp_path / "g.parquet", text=["Eight.", None])
    write(tmp_path / "h.md", "No corpus.")
    return tmp_path


def test_the_format_follows_the_file(mixed: Path):
    assert texts(mixed, "auto", missing="skip") == [
        *("One é.", "Two.") * 2,
        'Three, "3".\nStill.',
        "Four.",
        "Five, and more.",
        "",
        " = Six = \n\n A.\n",
        "Seven.\n = Not a title = \n",
        "Eight.",
        "",
    ]
    found = Counter(kind for *_, kind in readers.files_read(CorpusSettings(path=str(mixed))))
    assert found == {"jsonl": 2, "csv": 2, "wikitext": 1, "text": 1, "parquet": 1}
    assert "d.tsv.zst: row 2: no 'text'" in refusal(mixed, "auto")
    assert "set corpus.reader to text, lines, " in refusal(mixed / "h.md", "auto")


def test_lines_are_documents(tmp_path: Path):
    path = write(tmp_path / "a.txt", "One.\n\nTwo.")
    assert contents(path, "lines") == [("a.txt:1", "One.\n"), ("a.txt:2", "\n"), ("a.txt:3", "Two.")]


def test_rows_without_text_are_counted(mixed: Path, tmp_path: Path):
    settings = CorpusSettings(path=str(mixed), missing="skip")
    facts, *_ = write_documents(settings, tmp_path / "documents.arrow", Progress(quiet=True))
    assert (facts["documents"], facts["blank_documents_dropped"]) == (10, 2)


def test_a_compressed_file_that_is_cut_off_or_not_compressed(tmp_path: Path):
    whole = gzip.compress(b'{"text": "One."}\n' * 9)
    for content in (whole[:20], b'{"text": "One."}\n'):
        path = write(tmp_path / "a.jsonl.gz", content)
        assert refusal(path, "auto").startswith(f"{path}: cannot be read: ")


@pytest.mark.parametrize("encoding", ["utf-9", "hex", "undefined", "", "a\0b"])
def test_unknown_encoding(tmp_path, encoding):
    message = refusal(write(tmp_path / "a.txt", "A."), encoding=encoding)
    assert message.startswith(f"corpus.encoding is {encoding!r}: not an encoding that Python knows")


@pytest.mark.parametrize("reader", ["text", "wikitext", "jsonl"])
@pytest.mark.parametrize(
    ("encoding", "spaces", "content", "offset"),
    [
        ("utf-8", 4, b"\n\n \xff", 7),
        ("utf-8", 0, b"\xef\xbb\xbf\n \xff", 5),
        ("UTF8", 1, b"\xf0\x9f\x98", 1),
        ("utf-8", (1 << 20) - 1, b"\xe2\x82 ", (1 << 20) - 1),
        ("ascii", 3_000_000, b"\xc3\xa9", 3_000_000),
        ("utf-16", 0, b"n\0o\0 \0m\0a\0r\0k\0", 0),
        ("utf-16-le", 0, b" \0 \0c", 4),
        ("gb18030", (1 << 20) - 1, b"\x81\xff", (1 << 20) - 1),
    ],
)
def test_offset_of_the_bad_byte(tmp_path, reader, encoding, spaces, content, offset):
    path = write(tmp_path / "a", b" " * spaces + content)
    message = refusal(path, reader, encoding=encoding)
    assert message.startswith(f"{path}: byte {offset} is not valid {encoding}; set --corpus.encoding to ")


@pytest.mark.parametrize("separator", ["<|endoftext|>", ""])
def test_text_file_is_cut_at_separator_lines(tmp_path: Path, separator: str):
    parts = ["one\r\ntwo\r\n", "three <|endoftext|> \n", "four"]
    (tmp_path / "all.txt").write_text(f"{separator}\n".join(parts), newline="")
    settings = CorpusSettings(reader="text", path=str(tmp_path / "all.txt"), separator=separator)
    documents = list(read_documents(settings))
    assert [document.text for document in documents] == parts
    assert [document.name for document in documents] == ["all.txt:1", "all.txt:4", "all.txt:6"]


# The Arrow file


def written(folder: Path, sizes: list[int]) -> tuple[DocumentFile, list[str], DocumentKeys, int]:
    """A file of documents of so many characters, their texts, keys and number of characters."""
    texts = [chr(ord("a") + n % 26) * size for n, size in enumerate(sizes)]
    write(folder / "a.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    settings = CorpusSettings(reader="jsonl", path=str(folder))
    facts, keys, characters = write_documents(settings, folder / "documents.arrow", Progress(quiet=True))
    assert facts["documents"] == len(texts)
    return DocumentFile(folder / "documents.arrow"), texts, keys, characters


@pytest.mark.parametrize(
    ("sizes", "most_documents", "most_characters", "batches"),
    [
        ([5, 5, 5, 5, 5], 2, 100, [2, 2, 1]),
        ([5, 5, 5, 5, 5], 9, 11, [3, 2]),
        ([40, 5, 5, 40, 5], 2, 30, [1, 2, 1, 1]),
        ([40], 9, 9, [1]),
    ],
)
def test_documents_are_read_back_by_number_and_by_batch(
    tmp_path, monkeypatch, sizes, most_documents, most_characters, batches
):
    monkeypatch.setattr(readers, "DOCUMENTS_PER_BATCH", most_documents)
    monkeypatch.setattr(readers, "CHARACTERS_PER_BATCH", most_characters)
    file, expected, keys, characters = written(tmp_path, sizes)
    assert np.diff(file.starts).tolist() == batches
    assert characters == sum(sizes)
    assert (
        len(file) == len({keys.texts[i : i + 8].hex() for i in range(0, len(keys.texts), 8)}) == len(expected)
    )
    assert [file[n].text for n in range(len(file))] == expected
    assert [file[n].name for n in range(len(file))] == [f"a.jsonl:{n + 1}" for n in range(len(file))]
    assert [document.text for _, batch in file.batches() for document in batch] == expected
    for batch, (first, documents) in enumerate(file.batches()):
        assert read_batch(tmp_path / "documents.arrow", batch) == documents
        assert documents[0] == file[first]
    with pytest.raises(IndexError):
        file[len(file)]


def test_the_fingerprint_changes_with_content_alone(tmp_path):
    def fingerprint(name: str, *parts: str) -> str:
        for number, part in enumerate(parts):
            write(tmp_path / name / f"{number}.txt", part)
        settings = CorpusSettings(reader="text", path=str(tmp_path / name))
        return write_documents(settings, tmp_path / f"{name}.arrow", Progress(quiet=True))[0]["fingerprint"]

    assert fingerprint("a", "One.", "Two.") == fingerprint("b", "One.", "Two.")
    assert fingerprint("c", "One.", "Two. ") != fingerprint("a")


def test_a_file_of_documents_that_is_cut_off_or_missing(tmp_path):
    written(tmp_path, [3, 4])
    path = tmp_path / "documents.arrow"
    whole = path.read_bytes()
    for damaged in (b"", b"ARROW1\0\0", b"not arrow", *(whole[:n] for n in range(0, len(whole), 97)), None):
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        with pytest.raises(
            ProbekitError, match=r"documents\.arrow: cannot be read.*build the corpus again"
        ) as error:
            DocumentFile(path)
        assert "\n" not in str(error.value)


def test_files_that_are_read_in_part_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []
    read = readers._bytes
    monkeypatch.setattr(readers, "_bytes", lambda path: opened.append(read(path)) or opened[-1])
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "A text."}\n' * 1000)
    assert len(list(read_documents(CorpusSettings(path=str(path), max_documents=3)))) == 3
    begun = read_documents(CorpusSettings(path=str(path)))
    next(begun)
    begun.close()
    assert [file.closed for file in opened] == [True, True]


def test_the_format_of_a_file_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("A text.\n")
    opened, read = [], readers._bytes
    monkeypatch.setattr(readers, "_bytes", lambda path: opened.append(path) or read(path))
    write_documents(CorpusSettings(path=str(tmp_path)), tmp_path / "documents.arrow", Progress(quiet=True))
    assert len(opened) == 6  # each once for its format, and once for its text


def test_a_stream_of_datasets_that_is_read_in_part(tmp_path: Path):
    """The process ends by itself, and well."""
    (tmp_path / "a.jsonl").write_text('{"text": "A text."}\n' * 20_000)
    settings = f"reader='huggingface', path={str(tmp_path)!r}, max_documents=3"
    script = (
        "from probekit.config import CorpusSettings; from probekit.data.readers import read_documents; "
        f"stream = read_documents(CorpusSettings({settings})); print(next(stream).text, len(list(stream)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "A text. 2\n"), done.stderr[-2000:]
