"""Every format streams its documents untouched, and every bad input is told in one line."""

import json
import re
import time
import unicodedata
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from probekit import hub
from probekit.config import CorpusSettings, PlantedSettings
from probekit.corpus import planted
from probekit.corpus.readers import Document, read_documents
from probekit.errors import ProbekitError

WIKITEXT = Path(__file__).parents[2].parent / "shared/data/wikitext-2/valid.txt"


def read(path=None, reader="text", **settings):
    path = path if path is None else str(path)
    return read_documents(CorpusSettings(reader=reader, path=path, **settings))


def contents(*arguments, **settings):
    return [(document.name, document.text) for document in read(*arguments, **settings)]


def refusal(*arguments, **settings):
    with pytest.raises(ProbekitError) as caught:
        list(read(*arguments, **settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path, *records):
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def toy():
    return datasets.Dataset.from_dict({"text": ["One.", "Two."], "number": [1, 2]})


# Text


def test_text_file_is_one_document_with_its_line_ends(tmp_path):
    path = write(tmp_path / "a.txt", "One.\r\nTwo.\rThree. \n\n\u2028 e\u0301 \U0001f600")
    assert contents(path) == [("a.txt", "One.\r\nTwo.\rThree. \n\n\u2028 e\u0301 \U0001f600")]


def test_text_folder_is_read_in_order_and_blank_documents_are_kept(tmp_path):
    write(tmp_path / "b.txt", "B.")
    write(tmp_path / "a/z.txt", "Z.")
    write(tmp_path / "a/C.TXT", " \n")
    write(tmp_path / "notes.md", "Not text.")
    (tmp_path / "folder.txt").mkdir()
    assert contents(tmp_path) == [("a/C.TXT", " \n"), ("a/z.txt", "Z."), ("b.txt", "B.")]


def test_home_folder_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", "A.")
    assert contents("~/a.txt") == [("a.txt", "A.")]


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf-16"])
def test_byte_order_mark_is_no_text(tmp_path, encoding):
    content = "\ufeffOne.".encode("utf-8") if encoding != "utf-16" else "One.".encode("utf-16")
    assert contents(write(tmp_path / "a.txt", content), encoding=encoding) == [("a.txt", "One.")]


def test_other_encodings(tmp_path):
    path = write(tmp_path / "a.txt", "Caf\u00e9.".encode("cp1252"))
    assert contents(path, encoding="cp1252") == [("a.txt", "Caf\u00e9.")]


def test_file_name_that_is_not_utf8_can_be_written_down(tmp_path):
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")
    write(tmp_path / name, "A.")
    assert contents(tmp_path) == [("caf\ufffd.txt", "A.")]


def test_max_documents(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.txt", name)
    assert [name for name, _ in contents(tmp_path, max_documents=2)] == ["a.txt", "b.txt"]
    assert len(contents(tmp_path, max_documents=9)) == 3


# WikiText

ARTICLES = (
    " \n = M @-@ 82 ( road ) = \n \n It is 1 @,@ 000 @.@ 5 @-@ long . \n \n = = History = = \n \n x = y \n"
    " = = = Old = = = \n = Second = \r\n Text @ home .\r\n"
)


def test_wikitext_is_split_at_titles_and_its_escapes_are_undone(tmp_path):
    first = " = M-82 ( road ) = \n \n It is 1,000.5-long . \n \n = = History = = \n \n x = y \n = = = Old = = = \n"
    expected = [("M-82 ( road )", first), ("Second", " = Second = \r\n Text @ home .\r\n")]
    assert contents(write(tmp_path / "wiki.test.tokens", ARTICLES), "wikitext") == expected
    assert contents(tmp_path, "wikitext") == expected


@pytest.mark.skipif(not WIKITEXT.is_file(), reason=f"{WIKITEXT} is not there")
def test_real_wikitext_file_has_60_articles():
    documents = contents(WIKITEXT, "wikitext")
    assert len(documents) == 60
    assert [documents[0][0], documents[2][0]] == ["Homarus gammarus", "M-82 ( Michigan highway )"]
    assert all(text.startswith(f" = {name} = \n") for name, text in documents)
    assert not any(re.search(r" @[-,.]@ ", text) for _, text in documents)
    file = WIKITEXT.read_text(encoding="utf-8")
    together = "".join(text for _, text in documents)
    assert len(together) == len(file) - len(" \n") - 4 * len(re.findall(r" @[-,.]@ ", file))


def test_wikitext_file_without_a_title(tmp_path):
    message = refusal(write(tmp_path / "a.txt", "\nA story.\n"), "wikitext")
    assert message.startswith(f"{tmp_path}/a.txt:2: ")
    assert "--corpus.reader text" in message


# JSON lines


def test_jsonl_documents_are_named_by_line(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '\ufeff{"text": "One.\\r\\n"}\r\n\n{"n": 1, "text": ""}\n{"text":"\u2028"}'
    )
    assert contents(path, "jsonl") == [("a.jsonl:1", "One.\r\n"), ("a.jsonl:3", ""), ("a.jsonl:4", "\u2028")]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{oops}", "not a line of JSON: Expecting property name"),
        ("[" * 100_000, "not a line of JSON: "),
        ('["text"]', "list where a JSON object should be"),
        ("null", "NoneType where a JSON object should be"),
        ('{"body": "a", "title": "b"}', "corpus.text_column is 'text'"),
        ('{"text": 3}', "'text' holds int, not a string"),
        ('{"text": null}', "'text' holds NoneType, not a string"),
    ],
)
def test_bad_jsonl_line(tmp_path, line, told):
    path = write(tmp_path / "a.jsonl", '{"text": "One."}\n' + line)
    message = refusal(path, "jsonl")
    assert f"{path}:2" in message
    assert told in message


def test_missing_text_column_lists_those_that_are_there(tmp_path):
    message = refusal(jsonl(tmp_path / "a.jsonl", {"body": "A.", "title": "B"}), "jsonl")
    assert message.endswith("a.jsonl:1 has body, title")
    assert refusal(jsonl(tmp_path / "b.jsonl", {}), "jsonl").endswith("b.jsonl:1 has nothing")


def test_other_text_column(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"body": "A.", "text": 3})
    assert contents(path, "jsonl", text_column="body") == [("a.jsonl:1", "A.")]


def test_half_a_surrogate_pair(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "ok \\ud83d\\ude00"}\n{"text": "bad \\ud83d."}\n')
    message = refusal(path, "jsonl")
    assert message.startswith("a.jsonl:2: character 4 ")
    assert "--corpus.decode_errors replace" in message
    texts = [text for _, text in contents(path, "jsonl", decode_errors="replace")]
    assert texts == ["ok \U0001f600", "bad \ufffd."]


# Parquet


def test_parquet_documents_are_named_by_row(tmp_path):
    parquet(tmp_path / "b.parquet", text=["One.\r\n", " "], number=[1, 2])
    parquet(tmp_path / "a.parquet", text=pa.array(["Zero."], pa.large_string()))
    expected = [("a.parquet:1", "Zero."), ("b.parquet:1", "One.\r\n"), ("b.parquet:2", " ")]
    assert contents(tmp_path, "parquet") == expected


def test_parquet_is_not_read_whole(tmp_path):
    # One row group of 32 MB: its first rows must not need the rest.
    path = parquet(tmp_path / "a.parquet", text=["x" * 1000 + str(number) for number in range(32_000)])
    before = pa.total_allocated_bytes()
    documents = read(path, "parquet")
    assert next(documents).name == "a.parquet:1"
    assert pa.total_allocated_bytes() - before < 10e6


def test_bad_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["One."], title=["T"])
    assert refusal(path, "parquet", text_column="body").endswith("a.parquet has text, title")
    path.write_bytes(path.read_bytes()[:-20])
    assert f"{path}: not a readable Parquet file: " in refusal(path, "parquet")
    parquet(path, text=["One.", None])
    assert f"{path}:2: 'text' holds NoneType, not a string" in refusal(path, "parquet")
    parquet(path, text=[1])
    assert f"{path}:1: 'text' holds int, not a string" in refusal(path, "parquet")
    parquet(path, text=pa.array([b"\xff"]).view(pa.string()))
    assert f"{path}: not a readable Parquet file: 'utf-8' codec" in refusal(path, "parquet")


# Hugging Face


def test_huggingface_local_folder(tmp_path, toy):
    toy.to_parquet(tmp_path / "train-0.parquet")
    expected = [(f"{tmp_path}:1", "One."), (f"{tmp_path}:2", "Two.")]
    assert contents(tmp_path, "huggingface") == expected
    assert refusal(tmp_path, "huggingface", text_column="body").endswith(f"{tmp_path} has text, number")
    message = refusal(tmp_path, "huggingface", dataset_split="nope")
    assert "corpus.dataset_split 'nope'" in message
    assert "Available splits: ['train']" in message
    assert "corpus.subset 'nope'" in refusal(tmp_path, "huggingface", subset="nope")


@pytest.mark.parametrize("split", ["train", "probe"])
def test_huggingface_saved_to_disk(tmp_path, toy, split):
    toy.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({split: toy}).save_to_disk(tmp_path / "splits")
    for name in ("one", "splits"):
        documents = contents(tmp_path / name, "huggingface", dataset_split=split)
        assert [text for _, text in documents] == ["One.", "Two."]
    message = refusal(tmp_path / "splits", "huggingface", dataset_split="test")
    assert message == f"corpus.dataset_split is 'test', but {tmp_path}/splits has {split}"


def test_huggingface_columns_that_are_known_late_or_broken(tmp_path):
    write(tmp_path / "text/train.txt", "One.\nTwo.\n")
    assert [text for _, text in contents(tmp_path / "text", "huggingface")] == ["One.", "Two."]
    assert refusal(tmp_path / "text", "huggingface", text_column="body").endswith("text:1 has text")
    write(tmp_path / "broken/train.jsonl", '{"text": "One."}\n{oops\n')
    assert "the library datasets cannot read" in refusal(tmp_path / "broken", "huggingface")
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in refusal(tmp_path / "empty", "huggingface")


def no_network(*_, **__):
    raise ConnectionError("no route")


def test_huggingface_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    begin = time.perf_counter()
    message = refusal("someone/something", "huggingface")
    assert time.perf_counter() - begin < 5
    assert message.startswith("corpus.path is 'someone/something': ")
    assert "no such folder" in refusal(tmp_path / "nope", "huggingface")


def test_huggingface_copy_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    jsonl(tmp_path / "train.jsonl", {"text": "One."})
    monkeypatch.setattr(hub, "find", lambda name, **_: hub.Source(name, "abc", local_only=True))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *name, **how: asked.append((name, how)) or str(tmp_path)
    )
    assert [text for _, text in contents("someone/something", "huggingface")] == ["One."]
    how = {"repo_type": "dataset", "revision": "abc", "local_files_only": True}
    assert asked == [(("someone/something",), how)]


def test_huggingface_reads_the_revision_that_the_hub_gave(monkeypatch, toy):
    monkeypatch.setattr(hub, "find", lambda name, **_: hub.Source(name, "abc", local_only=False))
    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *name, **how: asked.append((name, how)) or toy.to_iterable_dataset()
    )
    documents = contents("someone/something", "huggingface", subset="en", max_documents=1)
    assert documents == [("someone/something:1", "One.")]
    assert asked == [(("someone/something", "en"), {"split": "train", "revision": "abc", "streaming": True})]


# Planted


def test_planted_documents_carry_their_plan():
    settings = PlantedSettings(documents=4)
    documents = list(read(reader="planted", planted=settings))
    corpus = planted.generate(settings).documents()
    assert documents == [
        Document(text, f"planted:{number}", actions, kind)
        for number, (text, actions, kind) in enumerate(corpus, 1)
    ]


# Whatever the format


@pytest.mark.parametrize("reader", ["text", "wikitext", "jsonl", "parquet", "huggingface"])
def test_path_is_needed(reader):
    message = f"corpus.path is not set, and the {reader} reader needs one: give it with --corpus.path"
    assert refusal(reader=reader) == message
    assert refusal("", reader) == message


@pytest.mark.parametrize("reader", ["text", "wikitext", "jsonl", "parquet"])
def test_missing_file_and_folder_without_files(tmp_path, reader):
    missing = tmp_path / "nope"
    assert refusal(missing, reader) == (
        f"corpus.path is '{missing}': No such file or directory; name a file or folder"
    )
    assert "null" in refusal("a\0b", reader)
    message = refusal(tmp_path, reader)
    assert message.startswith(f"corpus.path is '{tmp_path}': a folder with no file that ends in .")


@pytest.mark.parametrize("reader", ["text", "wikitext", "jsonl", "parquet"])
def test_unreadable_file(tmp_path, monkeypatch, reader):
    path = write(tmp_path / "a", "A.")
    monkeypatch.setattr(
        Path, "open", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert f"{path}: " in refusal(path, reader)


@pytest.mark.parametrize("reader", ["text", "wikitext", "jsonl"])
@pytest.mark.parametrize("before", [0, 5, (1 << 20) - 1, 3_000_000])
def test_bytes_that_are_not_valid_in_the_encoding(tmp_path, reader, before):
    path = write(tmp_path / "a", " = T = \n".encode() + b" " * before + b"\xe2\x82 \xff")
    message = refusal(path, reader)
    assert message.startswith(f"{path}: byte {8 + before} is not valid utf-8; ")
    assert "--corpus.encoding" in message
    assert "--corpus.decode_errors replace" in message


@pytest.mark.parametrize(
    ("encoding", "content", "offset"),
    [
        ("utf-8", b"\xef\xbb\xbfok \xff", 6),
        ("utf-8", b"ok \xf0\x9f\x98", 3),
        ("ascii", "caf\u00e9".encode(), 3),
        ("utf-16", "no mark".encode("utf-16-le"), 0),
        ("utf-16-le", b"a\0b\0c", 4),
        ("gb18030", b"a" * ((1 << 20) - 1) + b"\x81\xff", (1 << 20) - 1),
    ],
)
def test_offset_of_the_bad_byte(tmp_path, encoding, content, offset):
    path = write(tmp_path / "a.txt", content)
    assert f"byte {offset} is not valid {encoding};" in refusal(path, encoding=encoding)


def test_bad_bytes_are_replaced_when_asked_for(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfcaf\xe9\r\n")
    assert contents(path, decode_errors="replace") == [("a.txt", "caf\ufffd\r\n")]


@pytest.mark.parametrize("encoding", ["utf-9", "hex", "undefined", "", "a\0b"])
def test_unknown_encoding(tmp_path, encoding):
    message = refusal(write(tmp_path / "a.txt", "A."), encoding=encoding)
    assert message.startswith(f"corpus.encoding is {encoding!r}: ")


@pytest.mark.parametrize("reader", ["wikitext", "jsonl"])
def test_no_documents(tmp_path, reader):
    path = write(tmp_path / "a", " \n\n")
    message = f"corpus.path is '{path}': the {reader} reader finds no document there"
    assert refusal(path, reader) == message


def test_no_rows(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=pa.array([], pa.string()))
    assert "finds no document" in refusal(path, "parquet")


@pytest.mark.parametrize(
    ("reader", "first"), [("wikitext", " = One = \n A.\n = Two = \n"), ("jsonl", '{"text": "One."}\n')]
)
def test_what_is_not_asked_for_is_not_read(tmp_path, reader, first):
    path = write(tmp_path / "a", first.encode() + b"ab\n" * 2_000_000 + b"\xff")
    begin = time.perf_counter()
    assert len(contents(path, reader, max_documents=1)) == 1
    assert time.perf_counter() - begin < 0.5
    assert refusal(path, reader)


def test_nothing_is_normalised(tmp_path):
    text = "e\u0301 \u00e9 \ufb01 \u212b"
    assert unicodedata.normalize("NFC", text) != text
    assert contents(write(tmp_path / "a.txt", text)) == [("a.txt", text)]
