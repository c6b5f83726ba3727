"""Tables of labels against the characters and tokens that they label, as users write them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pandas as pd
import pytest
from huggingface_hub import HfApi, constants

from probekit.config import Config
from probekit.data import hub
from probekit.data.build import write_corpus
from probekit.data.corpus import Corpus, export_sentences
from probekit.errors import ProbekitError
from probekit.probing.label_table import labels_digest
from probekit.probing.labels import target_of
from probekit.probing.targets import NO_LABEL, Ranges, Target, find_examples, find_target
from probekit.progress import Progress
from probekit.run.run import Run

WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".tsv": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    ".jsonl": lambda table, path: table.to_json(path, orient="records", lines=True),
    ".parquet": lambda table, path: table.to_parquet(path, index=False),
    ".csv.gz": lambda table, path: table.to_csv(path, index=False, compression="gzip"),
}

TEXTS = [
    "The cat sat on the mat. It was red.",
    "A dog barked!",
    "Numbers: 12, 13. And more \u00e9t\u00e9, na\u00efve \U0001f600 end.",
    "  Leading space. Then a sentence.",
]


def written(folder: Path, suffix: str = ".csv", **columns: list) -> Path:
    path = folder / f"labels{suffix}"
    WRITERS[suffix](pd.DataFrame(columns), path)
    return path


def read(corpus: Corpus, name: str, path: Path, **settings: Any) -> Target:
    chosen = {f"probe.{key}": value for key, value in settings.items()}
    return target_of(corpus, Config().override({"probe.labels": str(path), "probe.target": name} | chosen))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of a few texts without actions, with a tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "texts.jsonl").write_text(
        "".join(
            json.dumps({"text": text}) + "\n"
            for text in [*TEXTS, *(f"Filler number {n}." for n in range(16))]
        )
    )
    config = Config().override(
        {"corpus.path": str(folder / "texts.jsonl"), "actions.labels": "none", "lm.vocabulary": 280}
    )
    return write_corpus(config, folder / "corpus", Progress(quiet=True))


def pieces(corpus: Corpus, ranges: Ranges) -> list[str]:
    """The text of each range, by decoding its tokens."""
    return [
        corpus.tokenizer.decode(corpus.tokens[a:b].tolist())
        for a, b in zip(ranges.start.tolist(), ranges.stop.tolist(), strict=True)
    ]


def named(target: Target) -> list[str]:
    assert isinstance(target.labels, Ranges)
    return [target.names[label] for label in target.labels.labels]


# What a row labels


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_whole_texts(corpus: Corpus, tmp_path: Path, suffix: str):
    path = written(tmp_path, suffix, statement=TEXTS, truth=["yes", "no", "no", None])
    target = read(corpus, "truth", path, text_column="statement")
    assert isinstance(target.labels, Ranges)
    assert target.labels.document.tolist() == [0, 1, 2]
    assert pieces(corpus, target.labels) == TEXTS[:3]
    assert named(target) == ["yes", "no", "no"]
    assert target.names == ("no", "yes")
    assert target.notes[0].endswith("3 labels, 2 classes of 'truth': no 2, yes 1")
    assert "1 of 4 rows of labels have no label" in target.notes[1]


@pytest.mark.parametrize("column", ["sentence", "document", "start", "end2", "text"])
@pytest.mark.parametrize("setting", ["probe.text_column", "corpus.text_column"])
def test_a_column_of_texts_may_have_any_name(corpus: Corpus, tmp_path: Path, column: str, setting: str):
    path = written(tmp_path, truth=["yes", "no", "no"], **{column: TEXTS[:3]})
    config = Config().override({"probe.labels": str(path), "probe.target": "truth", setting: column})
    target = target_of(corpus, config)
    assert isinstance(target.labels, Ranges)
    assert pieces(corpus, target.labels) == TEXTS[:3]


@pytest.mark.parametrize("column", ["sentence", "document", "text"])
def test_sentences_are_found_by_number_in_a_corpus_of_any_column(corpus: Corpus, tmp_path: Path, column: str):
    own = {"document": [0, 2], "sentence": [1, 0], "text": ["It was red.", "Numbers: 12, 13."]}
    path = written(tmp_path, truth=["yes", "no"], **own)
    given = {"probe.labels": str(path), "probe.target": "truth", "corpus.text_column": column}
    target = target_of(corpus, Config().override(given))
    assert target.of_sentences is not None
    assert np.flatnonzero(target.of_sentences != NO_LABEL).tolist() == [1, 3]
    written(tmp_path, truth=["yes", "no"], **own | {"text": ["It was blue.", "Numbers: 12, 13."]})
    with pytest.raises(ProbekitError, match=r"'text' is 'It was blue.', but that sentence of the corpus is"):
        target_of(corpus, Config().override(given))


def test_an_ending_that_is_of_no_table(corpus: Corpus, tmp_path: Path):
    (tmp_path / "labels.json").write_text("[]")
    with pytest.raises(ProbekitError, match=r"probe.labels is '.*labels.json'; a table ends in .csv, .tsv, "):
        read(corpus, "truth", tmp_path / "labels.json")


@pytest.mark.parametrize("document", [[2, 0], ["texts.jsonl:3", "texts.jsonl:1"], ["002", "000"]])
def test_documents_by_number_and_name(corpus: Corpus, tmp_path: Path, document: list):
    path = written(tmp_path, document=document, truth=["yes", "no"])
    target = read(corpus, "truth", path)
    assert pieces(corpus, target.labels) == [TEXTS[0], TEXTS[2]]
    assert named(target) == ["no", "yes"]


SPANS = [(0, word) for word in ("cat", "the mat", "red.")] + [
    (2, "12"),
    (2, "\u00e9t\u00e9"),
    (2, "\U0001f600"),
]


def test_spans_are_the_tokens_that_hold_their_characters(corpus: Corpus, tmp_path: Path):
    path = written(
        tmp_path,
        document=[d for d, _ in SPANS],
        start=[TEXTS[d].index(word) for d, word in SPANS],
        end=[TEXTS[d].index(word) + len(word) for d, word in SPANS],
        tag=[f"tag{n % 2}" for n in range(len(SPANS))],
    )
    target = read(corpus, "tag", path)
    found = [piece.strip() for piece in pieces(corpus, target.labels)]
    # Byte-level tokens can reach beyond a word, but hold it; here merges do not cross words.
    assert found == [word for _, word in SPANS]
    assert named(target) == [f"tag{n % 2}" for n in range(len(SPANS))]


def test_a_start_alone_is_the_token_that_holds_it(corpus: Corpus, tmp_path: Path):
    starts = [TEXTS[1].index(word) for word in ("dog", "barked")]
    target = read(corpus, "tag", written(tmp_path, document=[1, 1], start=starts, tag=["a", "b"]))
    assert (target.labels.stop - target.labels.start).tolist() == [1, 1]
    assert [piece.strip()[0] for piece in pieces(corpus, target.labels)] == ["d", "b"]


def test_characters_of_a_sentence_count_from_its_own_beginning(corpus: Corpus, tmp_path: Path):
    path = written(tmp_path, document=[0, 3], sentence=[1, 0], start=[7, 0], end=[10, 7], tag=["a", "b"])
    target = read(corpus, "tag", path)
    assert [piece.strip() for piece in pieces(corpus, target.labels)] == ["red", "Leading"]


def test_sentences_may_be_some_and_in_any_order(corpus: Corpus, tmp_path: Path):
    target = read(
        corpus, "tag", written(tmp_path, document=[2, 0, 0], sentence=[1, 1, 0], tag=["a", "b", "a"])
    )
    assert target.of_sentences is not None
    sentences = corpus.document_sentences
    expected = {sentences[2] + 1: "a", sentences[0] + 1: "b", sentences[0]: "a"}
    assert {n: target.names[c] for n, c in enumerate(target.of_sentences) if c != NO_LABEL} == expected


def test_overlapping_spans_are_examples_of_their_own(corpus: Corpus, tmp_path: Path):
    path = written(tmp_path, document=[0, 0, 0], start=[0, 4, 0], end=[7, 11, 23], tag=["a", "b", "b"])
    assert [piece.strip() for piece in pieces(corpus, read(corpus, "tag", path).labels)] == [
        "The cat", "The cat sat on the mat.", "cat sat"
    ]  # fmt: skip


def test_equal_rows_count_once(corpus: Corpus, tmp_path: Path):
    path = written(tmp_path, text=[TEXTS[0], TEXTS[1], TEXTS[0]], tag=["a", "b", "a"])
    target = read(corpus, "tag", path)
    assert named(target) == ["a", "b"]
    assert "1 of 3 rows of labels label what an equal row labels" in target.notes[1]


def test_texts_that_the_corpus_does_not_have_are_counted(corpus: Corpus, tmp_path: Path):
    path = written(tmp_path, text=[TEXTS[0], TEXTS[1], "Never seen."], tag=["a", "b", "a"])
    target = read(corpus, "tag", path)
    assert "1 of 3 rows of labels have a text that is not in the corpus, which was made of" in target.notes[1]
    assert "2 of 2 classes of 'tag' are seen once (a, b)" in target.notes[2]


@pytest.mark.parametrize(("slips", "noted"), [(1, True), (4, False)])
def test_a_class_that_may_be_a_slip_of_the_pen_is_noted(
    corpus: Corpus, tmp_path: Path, slips: int, noted: bool
):
    tags = [*["yes", "no"] * 10][: 20 - slips] + ["yse"] * slips
    target = read(corpus, "tag", written(tmp_path, document=list(range(20)), tag=tags))
    notes = [note for note in target.notes if "AUROC" in note]
    assert bool(notes) == noted
    if noted:
        assert "'tag' has 3 classes ('yes' 10, 'no' 9, 'yse' 1), so AUROC" in notes[0]


@pytest.mark.parametrize("anchors", ["start", "token"])
def test_examples_are_the_ranges_or_their_tokens(corpus: Corpus, tmp_path: Path, anchors: str):
    path = written(tmp_path, document=[2, 0, 0], start=[0, 0, 4], end=[7, 7, 11], tag=["a", "b", "a"])
    target = read(corpus, "tag", path)
    found = find_examples(corpus, np.array([2, 1, 0]), target, [1], anchors)
    order = np.argsort([0 if document == 2 else 1 for document in target.labels.document], kind="stable")
    ranges = [
        (
            int(target.labels.document[n]),
            a,
            b if anchors == "start" else a + 1,
            int(target.labels.labels[n]),
        )
        for n in order
        for b in [int(target.labels.stop[n])]
        for a in range(int(target.labels.start[n]), b)
        if anchors == "token" or a == target.labels.start[n]
    ]
    assert list(zip(found.document, found.start, found.stop, found.labels[:, 0], strict=True)) == ranges
    assert found.sentence.tolist() == [
        max(n for n, first in enumerate(corpus.first_token) if first <= start) for start in found.start
    ]
    with pytest.raises(ProbekitError, match=r"probe\.horizons is 1, 2, but the labels are of texts or spans"):
        find_examples(corpus, np.array([0]), target, [1, 2], anchors)


# Labels are what is written


@pytest.mark.parametrize("suffix", list(WRITERS))
@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["quote", "claim", "claim", "aside"], ["quote", "claim", "claim", "aside"]),
        (["quote", None, "claim"], ["quote", None, "claim"]),
        ([5, -2, 5, 300], ["5", "-2", "5", "300"]),
        (["01", "1", "1.0", "x"], ["01", "1", "1.0", "x"]),
        (["nan", "NaN", "null", None], ["nan", "NaN", "null", None]),
        ([True, False, False], ["True", "False", "False"]),
        (["None", "NA", None, "null"], ["None", "NA", None, "null"]),
        (
            ["eins, zwei", 'drei "vier"', "f\u00fcnf\nsechs"],
            ["eins, zwei", 'drei "vier"', "f\u00fcnf\nsechs"],
        ),
    ],
)
def test_classes_are_what_is_written(
    tiny_run: Run, tmp_path: Path, suffix: str, values: list, names: list[str | None]
):
    corpus = tiny_run.corpus
    count = len(corpus.first_token)
    kind = [values[n % len(values)] for n in range(count)]
    path = written(tmp_path, suffix, other=[1] * count, kind=pd.Series(kind, dtype=object).tolist())
    target = read(corpus, "kind", path)
    assert target.name == "kind"
    assert target.classes == len(target.names) == len({*names} - {None})
    found = [target.names[code] if code >= 0 else None for code in target.of_sentences]
    assert found == [names[n % len(names)] for n in range(count)]


def test_whole_numbers_are_in_their_own_order(corpus: Corpus, tmp_path: Path):
    assert read(corpus, "n", written(tmp_path, text=TEXTS, n=[10, 9, 2, 9])).names == ("2", "9", "10")


def test_a_field_that_is_missing_in_json_lines_is_empty(corpus: Corpus, tmp_path: Path):
    path = tmp_path / "labels.jsonl"
    rows = [{"text": TEXTS[0], "kind": "a"}, {"text": TEXTS[1]}, {"text": TEXTS[2], "kind": "b", "start": 0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = read(corpus, "kind", path)
    assert named(target) == ["a", "b"]
    assert pieces(corpus, target.labels)[0] == TEXTS[0]
    assert target.labels.stop[1] - target.labels.start[1] == 1


def test_a_path_is_made_absolute_where_it_enters(corpus: Corpus, tmp_path: Path, monkeypatch):
    written(tmp_path, text=TEXTS, kind=["a", "b", "a", "b"])
    monkeypatch.chdir(tmp_path)
    config = Config().override({"probe.labels": "labels.csv", "probe.target": "kind"})
    monkeypatch.chdir("/")
    assert named(target_of(corpus, config)) == ["a", "b", "a", "b"]
    assert Config().override({"probe.labels": "~/x.csv"}).probe.labels == str(Path.home() / "x.csv")


# Datasets

ROWS = {"text": TEXTS, "kind": ["a", "b", "a", "b"]}


def test_a_dataset_that_was_saved_to_disk(corpus: Corpus, tmp_path: Path):
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "one")
    expected = read(corpus, "kind", written(tmp_path, **ROWS))
    found = read(corpus, "kind", tmp_path / "one")
    assert named(found) == named(expected)
    assert found.labels.start.tolist() == expected.labels.start.tolist()
    datasets.DatasetDict(test=datasets.Dataset.from_dict(ROWS)).save_to_disk(tmp_path / "splits")
    config = {"probe.labels": str(tmp_path / "splits"), "probe.target": "kind"}
    found = target_of(corpus, Config().override(config | {"corpus.dataset_split": "test"}))
    assert named(found) == named(expected)
    with pytest.raises(ProbekitError, match=r"dataset_split is 'train', but .* has test"):
        target_of(corpus, Config().override(config))
    line = refusal(corpus, "type", tmp_path / "one")
    assert "has no column 'type' (probe.target); it has text, kind" in line


def test_a_dataset_has_a_digest(tmp_path: Path):
    def digest(kind: list) -> str | None:
        folder = tmp_path / "".join(kind)
        datasets.Dataset.from_dict({"kind": kind}).save_to_disk(folder)
        return labels_digest(Config().override({"probe.labels": str(folder)}))

    assert digest(["a", "b"]) is not None
    assert digest(["a", "b"]) != digest(["b", "a"])


def test_a_dataset_of_the_hub_has_its_revision_for_a_digest(monkeypatch: pytest.MonkeyPatch):
    config = Config().override({"probe.labels": "someone/thing"})
    monkeypatch.setattr(hub, "find", lambda name, **_: hub.Source(name, "abc", local_only=False))
    assert labels_digest(config) == "abc"

    def unreachable(name: str, **_: object) -> hub.Source:
        raise ProbekitError(name)

    monkeypatch.setattr(hub, "find", unreachable)
    assert labels_digest(config) == "not reached"


def test_a_dataset_of_the_hub_without_network_is_refused(corpus: Corpus, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "dataset_info", Mock(side_effect=ConnectionError))
    with pytest.raises(
        ProbekitError, match=r"probe\.labels is 'someone/thing' at revision 'main': no folder"
    ) as e:
        target_of(corpus, Config().override({"probe.labels": "someone/thing", "probe.target": "kind"}))
    assert "the Hugging Face hub cannot be reached" in str(e.value)
    assert "\n" not in str(e.value)


# Against truth


def test_a_column_that_copies_the_action_is_the_target_action(tiny_run: Run, tmp_path: Path):
    corpus = tiny_run.corpus
    path = export_sentences(corpus, tmp_path / "labels.csv")
    target, action = read(corpus, "action", path), find_target(corpus, "action")
    assert target.of_sentences.tolist() == corpus.actions.tolist()
    documents = corpus.documents("test")
    found, expected = (find_examples(corpus, documents, each, [1, 2]) for each in (target, action))
    for field in ("document", "start", "stop", "sentence", "group", "labels"):
        assert getattr(found, field).tolist() == getattr(expected, field).tolist()


def test_a_planted_document_type_read_as_labels_of_texts_is_the_target_document_type(
    tiny_run: Run, tmp_path: Path
):
    corpus = tiny_run.corpus
    documents = [document for _, batch in corpus.texts.batches() for document in batch]
    path = written(tmp_path, text=[d.text for d in documents], kind=[d.kind for d in documents])
    target = read(corpus, "kind", path)
    truth = find_examples(corpus, np.arange(len(documents)), find_target(corpus, "document-type"), [1])
    first = np.unique(truth.document, return_index=True)[1]
    assert target.labels.labels.tolist() == truth.labels[first, 0].tolist()
    assert target.labels.start.tolist() == truth.start[first].tolist()
    assert target.labels.stop.tolist() == corpus.document_tokens[1:].tolist()


def test_a_built_in_target_beside_a_table(corpus: Corpus, tmp_path: Path):
    path = written(tmp_path, text=TEXTS, kind=["a", "b", "a", "b"])
    assert read(corpus, "token", path).name == "token"


# Bad input


def refusal(corpus: Corpus, name: str, path: Path, **settings: Any) -> str:
    with pytest.raises(ProbekitError) as caught:
        read(corpus, name, path, **settings)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 500
    return line


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_a_missing_column_is_refused_with_those_that_exist(corpus: Corpus, tmp_path: Path, suffix: str):
    path = written(tmp_path, suffix, text=TEXTS, action=[1, 2, 3, 4])
    assert "has no column 'knid' (probe.target); it has text, action" in refusal(corpus, "knid", path)
    line = refusal(corpus, "action", path, text_column="statement")
    assert "has no column 'statement' (--text); it has text, action" in line


@pytest.mark.parametrize("suffix", list(WRITERS))
def test_fractions_are_numbers(corpus: Corpus, tmp_path: Path, suffix: str):
    values = [0.5, None, 2.0, 1e-3]
    target = read(corpus, "kind", written(tmp_path, suffix, text=TEXTS, kind=values))
    assert (target.kind, target.classes, target.names) == ("numbers", 0, ())
    assert isinstance(target.labels, Ranges)
    assert target.labels.labels.tolist() == [0.5, 2.0, 1e-3]
    assert target.notes[0].endswith("3 numbers of 'kind' from 0.001 to 2, mean 0.833667")
    assert target.notes[1] == "1 of 4 rows of labels have no label, and are left out"


def test_whole_numbers_are_numbers_where_it_is_said(corpus: Corpus, tmp_path: Path):
    path = written(tmp_path, text=TEXTS, n=["10", "9", "", "2"])
    config = Config().override({"probe.labels": str(path), "probe.target": "n", "probe.text_column": "text"})
    target = target_of(corpus, config.override({"probe.kind": "numbers"}))
    assert (target.kind, target.labels.labels.tolist()) == ("numbers", [10.0, 9.0, 2.0])
    assert target_of(corpus, config).kind == "classes"
    written(tmp_path, text=TEXTS, n=["10", "9", "n/a", "2"])
    with pytest.raises(ProbekitError, match=r"probe\.kind is 'numbers', but column 'n' of .* holds 'n/a'"):
        target_of(corpus, config.override({"probe.kind": "numbers"}))


BAD = [
    ({"text": TEXTS, "kind": ["a"] * 4}, "fewer than two classes: a"),
    ({"text": TEXTS, "kind": [None] * 4}, "fewer than two classes: none"),
    ({"text": TEXTS, "kind": [0.5] * 4}, "goes from 0.5 to 0.5, which leaves nothing to predict"),
    ({"text": TEXTS, "kind": [1e-300, 2e-300, 3e-300, 4e-300]}, "goes from 1e-300 to 4e-300, which leaves"),
    ({"text": TEXTS, "kind": ["0.5", "2", "inf", "1"]}, "holds 'inf', which is no finite number"),
    ({"text": TEXTS, "kind": ["1" * 400, "2", "3", "1"]}, "holds '11111111111111111111', which is no finite"),
    ({"text": ["Never."], "kind": ["a"]}, "no row with a label has a text of the corpus, which was made of"),
    (
        {"document": [0, 99], "kind": ["a", "b"]},
        "row 2: 'document' is '99'; no document has that; give numbers",
    ),
    (
        {"document": ["texts.jsonl:1", "x"], "kind": ["a", "b"]},
        "row 2: 'document' is 'x'; no document has that",
    ),
    ({"document": [0, None], "kind": ["a", "b"]}, "'document' is ''; no document has that"),
    (
        {"document": [0, 1], "sentence": [0, 7], "kind": ["a", "b"]},
        "row 2: 'sentence' is 7, but document 1 has 1",
    ),
    ({"document": [0], "start": [900], "end": [901], "kind": ["a"]}, "'start' 900 and 'end' 901 must be"),
    ({"document": [0], "start": [0], "end": [36], "kind": ["a"]}, "must be characters of a text of 35"),
    ({"document": [0], "start": [7], "end": [7], "kind": ["a"]}, "'start' 7 and 'end' 7 must be characters"),
    ({"document": [0], "start": ["x"], "kind": ["a"]}, "row 1: 'start' is 'x'; it must be a whole number"),
    ({"document": [0], "start": [-1], "kind": ["a"]}, "row 1: 'start' is '-1'; it must be a whole number"),
    (
        {"text": [TEXTS[0]] * 2, "kind": ["a", "b"]},
        "labels.csv: row 1 and row 2 label the same tokens, as 'a' and",
    ),
    ({"kind": ["a", "b"]}, "has 2 rows, but the corpus has"),
]


@pytest.mark.parametrize(("columns", "said"), BAD, ids=[said for _, said in BAD])
def test_what_is_no_table_of_labels_is_one_line(corpus: Corpus, tmp_path: Path, columns: dict, said: str):
    rows = len(columns["kind"])
    if rows == 1 and "fewer" not in said and "Never." not in columns.get("text", ()):
        columns = {name: [*values, *values[:1]] for name, values in columns.items()}
        columns["kind"] = ["a", "b"]
        columns["document"] = [columns["document"][0], 1]
        if "start" in columns:
            columns["start"] = [columns["start"][0], 0]
        if "end" in columns:
            columns["end"] = [columns["end"][0], 1]
    assert said in refusal(corpus, "kind", written(tmp_path, **columns))


def test_characters_between_tokens_are_inside_no_token(corpus: Corpus, tmp_path: Path, monkeypatch):
    words = np.array([[0, 3], [4, 7], [8, 11], [12, 14], [15, 18], [19, 23]])
    monkeypatch.setattr("probekit.probing.labels.token_spans", lambda *_: words)
    path = written(tmp_path, document=[0, 0], start=[4, 3], end=[7, 4], kind=["a", "b"])
    assert "row 2: 'start' 3 and 'end' 4 must be" in (line := refusal(corpus, "kind", path))
    assert "hold a token, not the space before one" in line


def test_more_classes_than_can_be_probed(corpus: Corpus, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("probekit.probing.labels.MOST_CLASSES", 3)
    path = written(tmp_path, text=TEXTS, kind=["a", "b", "c", "d"])
    assert "has 4 classes; at most 3 can be probed" in refusal(corpus, "kind", path)


def test_objects_are_no_labels(corpus: Corpus, tmp_path: Path):
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"text": TEXTS[0], "kind": {"a": 1}}) + "\n")
    assert "labels.jsonl:1: 'kind' holds objects; give words" in refusal(corpus, "kind", path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_lists_of_numbers_are_vectors(corpus: Corpus, tmp_path: Path, suffix: str):
    lists = [[0.5, 1, -2e-3], None, [3.0, 4, 5], [0.5, 1, -2e-3]]
    target = read(corpus, "kind", written(tmp_path, suffix, text=TEXTS, kind=lists))
    assert (target.kind, target.classes, target.outputs, target.positions) == ("vectors", 0, 3, ("last",))
    assert isinstance(target.labels, Ranges)
    assert target.labels.document.tolist() == [0, 2, 3]
    assert target.values(target.labels.labels).tolist() == [lists[0], lists[2], lists[3]]
    assert target.notes[0].endswith("3 vectors of 'kind', 3 numbers each, 2 of them different")
    assert target.notes[1] == "1 of 4 rows of labels have no label, and are left out"
    twice = written(tmp_path, suffix, text=[TEXTS[0], *TEXTS[:3]], kind=[lists[0], lists[0], [1, 2, 3], None])
    found = read(corpus, "kind", twice)
    assert found.values(found.labels.labels).tolist() == [lists[0], [1, 2, 3]]


def test_vectors_of_sentences_have_horizons(corpus: Corpus, tmp_path: Path):
    columns = {"document": [0, 0, 1], "sentence": [0, 1, 0], "kind": [[1.0, 2], [3.0, 4], [5.0, 6]]}
    target = read(corpus, "kind", written(tmp_path, ".parquet", **columns))
    found = find_examples(corpus, np.arange(3), target, (1, 2))
    assert target.values(found.labels[0]).tolist() == [[1, 2], [3, 4]]
    assert found.labels[1].tolist() == [target.of_sentences[1], NO_LABEL]
    assert (found.labels[3:] == NO_LABEL).all()


BAD_LISTS = [
    ([[1.0, 2.0], [1.0]], "labels.jsonl:2: 'kind' is 'a list of 1', but the first vector is a list of 2"),
    ([[1.0, 2.0], "x"], "labels.jsonl:2: 'kind' is 'x', but the first vector is a list of 2; all must be"),
    ([[1.0, 2.0], []], "labels.jsonl:2: 'kind' is an empty list; leave the field empty"),
    ([[1.0, float("nan")], [1, 2]], "labels.jsonl:1: 'kind' has 'nan' in a list; lists must hold numbers"),
    ([[1.0, 1e200], [1, 2]], "'kind' has '1e+200' in a list; lists must hold numbers, finite and below"),
    ([["a"], ["b"]], "'kind' has 'a' in a list"),
    ([[True], [False]], "'kind' has 'True' in a list"),
    ([[[1.0]], [[2.0]]], "'kind' has '[1.0]' in a list"),
    ([[1.0, 2.0], [1.0, 2.0]], "all vectors of 'kind' are equal"),
]


@pytest.mark.parametrize(("lists", "said"), BAD_LISTS, ids=[said for _, said in BAD_LISTS])
def test_lists_that_are_no_vectors_are_refused(corpus: Corpus, tmp_path: Path, lists: list, said: str):
    path = tmp_path / "labels.jsonl"
    rows = zip(TEXTS, lists, strict=False)
    path.write_text("".join(json.dumps({"text": text, "kind": values}) + "\n" for text, values in rows))
    assert said in refusal(corpus, "kind", path)


def test_a_kind_that_lists_are_not_is_refused(corpus: Corpus, tmp_path: Path):
    path = written(tmp_path, ".jsonl", text=TEXTS, n=[[1.0], [2.0], [3.0], [4.0]])
    with pytest.raises(ProbekitError, match=r"probe\.kind is 'numbers', but column 'n' .* which are vectors"):
        read(corpus, "n", path, kind="numbers")


@pytest.mark.parametrize("name", ["labels", "labels.txt", "labels.xlsx"])
def test_an_ending_that_says_no_table(corpus: Corpus, tmp_path: Path, name: str):
    (tmp_path / name).write_text("text,kind\n")
    assert "csv" in refusal(corpus, "kind", tmp_path / name)


@pytest.mark.parametrize("suffix", list(WRITERS))
@pytest.mark.parametrize(
    "content", [None, b"\xff\xfe\x00\xff", b'{"kind": 1}\n{"kind"', gzip.compress(b"a", mtime=0)[:9]]
)
def test_an_unreadable_file_is_named(corpus: Corpus, tmp_path: Path, suffix: str, content: bytes | None):
    path = tmp_path / f"labels{suffix}"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refusal(corpus, "kind", path)


def test_a_table_of_other_texts_is_refused(corpus: Corpus, tmp_path: Path):
    """The texts of an exported table must be those of the sentences that its rows name."""
    path = export_sentences(corpus, tmp_path / "labels.csv")
    table = pd.read_csv(path).assign(kind=lambda table: np.where(table.index % 2, "a", "b"))
    table.assign(text="  " + table.text + " \n").to_csv(path, index=False)
    assert read(corpus, "kind", path).of_sentences is not None
    table.loc[2, "text"] = "A dog sang!"
    table.to_csv(path, index=False)
    with pytest.raises(
        ProbekitError, match=r"labels\.csv: row 3: 'text' is 'A dog sang!', but that sentence .*'A dog b"
    ):
        read(corpus, "kind", path)
    other = Config().override(
        {"probe.labels": str(path), "probe.target": "kind", "corpus.text_column": "body"}
    )
    with pytest.raises(ProbekitError, match="'A dog sang!'"):
        target_of(corpus, other)
    whole = {"document": [1, 0], "text": [TEXTS[1], TEXTS[0]], "kind": ["a", "b"]}
    assert read(corpus, "kind", written(tmp_path, **whole)).names == ("a", "b")
    with pytest.raises(ProbekitError, match=r"row 1: 'text' is .* that document of the corpus"):
        read(corpus, "kind", written(tmp_path, **whole | {"document": [0, 1]}))


def test_an_empty_column_of_starts_leaves_labels_of_sentences(corpus: Corpus, tmp_path: Path):
    columns: dict[str, list] = {"document": [0, 0, 1], "sentence": [0, 1, 0], "start": [None] * 3}
    words = read(corpus, "tag", written(tmp_path, **columns, tag=["a", "b", "a"]))
    numbers = read(corpus, "size", written(tmp_path, **columns, size=[0.5, 1.5, 2]))
    assert words.of_sentences is not None
    assert words.of_sentences[:3].tolist() == [0, 1, 0]
    assert numbers.of_sentences is not None
    assert numbers.of_sentences[:3].tolist() == [0.5, 1.5, 2]
    some = written(tmp_path, **columns | {"start": [None, None, 0]}, tag=["a", "b", "a"])
    assert isinstance(read(corpus, "tag", some).labels, Ranges)
    with pytest.raises(ProbekitError, match=r"row 2: 'end' is 3, but 'start' is empty; give both"):
        read(corpus, "tag", written(tmp_path, **columns, end=[None, 3, None], tag=["a", "b", "a"]))
