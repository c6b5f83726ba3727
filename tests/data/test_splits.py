"""Groups against a walk through everything that documents share, and splits that no group crosses."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.config import Config, CorpusSettings
from probekit.data.readers import write_documents
from probekit.data.splits import (
    SPLITS,
    DocumentKeys,
    digest,
    group_documents,
    normalised,
    split_documents,
)
from probekit.errors import ProbekitError
from probekit.progress import Progress


def keys_of(texts: list[str], groups: list[str | None] | None = None) -> DocumentKeys:
    keys = DocumentKeys()
    for text in texts:
        keys.texts += digest(text)
        keys.normalised += digest(normalised(text))
    for row, group in enumerate(groups or []):
        keys.documents.append(row)
        keys.groups += digest(texts[row] if group is None else group)
        keys.splits.append(-1)
    return keys


def split_of(chosen: CorpusSettings, digests: np.ndarray) -> np.ndarray:
    """Splits of documents of which those with one digest are copies."""
    keys = keys_of([str(value) for value in digests])
    keys.texts = keys.normalised = bytearray(digests.astype(">u8").tobytes())
    return split_documents(chosen, keys, group_documents(keys))


def slow_groups(texts: list[str], groups: list[str | None]) -> list[int]:
    """The first document that each can be reached from, by what two documents share."""
    shared = [
        {("words", normalised(text)), ("group", group or text)}
        for text, group in zip(texts, groups, strict=True)
    ]
    found = list(range(len(texts)))
    for _ in texts:
        for i, one in enumerate(shared):
            found[i] = min(found[j] for j, other in enumerate(shared) if one & other)
    return found


@settings(max_examples=100)
@given(copies=st.lists(st.integers(1, 4), min_size=12, max_size=30), seed=st.integers(0, 3), data=st.data())
def test_copies_stay_together_and_the_order_of_documents_does_not_matter(copies, seed, data):
    digests = np.random.default_rng(len(copies)).integers(2**63, size=len(copies)).repeat(copies)
    chosen = CorpusSettings(seed=seed)
    splits = split_of(chosen, digests)
    by_digest = dict(zip(digests.tolist(), splits.tolist(), strict=True))
    assert [by_digest[digest] for digest in digests.tolist()] == splits.tolist()
    held_out = [*by_digest.values()]
    assert held_out.count(SPLITS.index("probe")) == round(0.2 * len(copies))
    for split in ("validation", "test"):
        assert held_out.count(SPLITS.index(split)) == round(0.1 * len(copies))
    order = np.array(data.draw(st.permutations(range(len(digests)))))
    assert split_of(chosen, digests[order]).tolist() == splits[order].tolist()


def test_another_seed_splits_otherwise_and_a_split_of_no_share_is_empty():
    digests = np.arange(20)
    first, second = (split_of(CorpusSettings(seed=seed), digests) for seed in (0, 1))
    assert first.tolist() != second.tolist()
    without = split_of(CorpusSettings(probe_fraction=0), digests)
    assert np.bincount(without, minlength=4).tolist() == [16, 0, 2, 2]


@pytest.mark.parametrize("documents", [6, 7, 100, 101])
def test_no_training_document_is_needed_where_all_shares_are_given(documents: int):
    """Also where shares are rounded up, as half of seven and twice a quarter of it are."""
    shares = {"probe_fraction": 0.5, "validation_fraction": 0.25, "test_fraction": 0.25}
    found = np.bincount(split_of(CorpusSettings(**shares), np.arange(documents)), minlength=4)
    assert found[0] <= 1
    assert found.sum() == documents
    np.testing.assert_allclose(found[1:], np.array([0.5, 0.25, 0.25]) * documents, atol=1)


@pytest.mark.parametrize(
    ("documents", "overrides", "split"),
    [
        (4, {}, "validation"),
        (2, {"corpus.probe_fraction": 0.1}, "probe"),
        (8, {"corpus.test_fraction": 0.01}, "test"),
        (
            3,
            {"corpus.probe_fraction": 0.3, "corpus.validation_fraction": 0.3, "corpus.test_fraction": 0.3},
            "train",
        ),
    ],
)
def test_too_few_documents_name_the_split(documents: int, overrides: dict, split: str):
    few = Config().override(overrides).corpus
    with pytest.raises(ProbekitError, match=f"{documents} distinct documents.*none for the split '{split}'"):
        split_of(few, np.arange(documents).repeat(2))


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a b", "A, b!", "a  c", "d", "e", "f."]),
            st.sampled_from(["x", "y", "z", "w", None]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_groups_are_what_can_be_reached_by_shared_words_and_groups(rows: list[tuple[str, str | None]]):
    texts, groups = map(list, zip(*rows, strict=True))
    assert group_documents(keys_of(texts, groups)).tolist() == slow_groups(texts, groups)
    assert group_documents(keys_of(texts)).tolist() == slow_groups(texts, [str(n) for n in range(len(texts))])


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("The  cat sat.", "the cat, sat", True),
        ("2 + 2 = 4", "2 2 = 4", False),
        ("\u0915\u093f", "\u0915\u0940", False),  # vowel signs
        ("!!!", "???", False),
        ("Stra\u00dfe", "STRASSE", True),
        ("no tab", "no\ttab\n", True),
        ("notab", "no tab", False),
        ("-5", "5", False),
        ("It is -5.", "It is 5.", False),
        ("1.5", "1 5", False),
        (".5", "5", False),
        ("1,5", "1 5", False),
        ("10-5", "10 5", False),
        ("It was 5.", "it was 5", True),
        ("Covid-19, in 2020.", "covid 19 in 2020", True),
        ("5, 6", "5 6", True),
        ("- 5", "5", True),
    ],
)
def test_which_texts_are_copies(one: str, other: str, same: bool):
    assert (normalised(one) == normalised(other)) == same


# Tables with a column of groups or splits


def read(tmp_path: Path, rows: list[dict], **chosen) -> tuple[DocumentKeys, np.ndarray, np.ndarray]:
    path = tmp_path / "table.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    settings = CorpusSettings(path=str(path), **chosen)
    _, keys, _ = write_documents(settings, tmp_path / "documents.arrow", Progress(quiet=True))
    group = group_documents(keys)
    return keys, group, split_documents(settings, keys, group, "row {}".format)


def test_no_group_is_in_two_splits(tmp_path: Path):
    rows = [{"text": f"text number {n}", "author": f"author {n % 15}"} for n in range(90)]
    rows += [{"text": "text number 0", "author": "author 3"}]  # a copy: joins authors 0 and 3
    _, group, split = read(tmp_path, rows, group_column="author")
    authors = [row["author"].replace("author 3", "author 0") for row in rows]
    table = pd.DataFrame({"author": authors, "group": group, "split": split})
    assert len(table.drop_duplicates()) == 14
    assert table.group.nunique() == 14
    assert np.bincount(table.groupby("author").split.first(), minlength=4).tolist() == [9, 3, 1, 1]


def test_the_split_of_a_group_depends_on_its_name_alone(tmp_path: Path):
    rows = [{"text": f"text number {n}", "author": f"author {n % 15}"} for n in range(90)]
    _, _, split = read(tmp_path, rows, group_column="author")
    others = [row | {"text": f"other {n}"} for n, row in enumerate(rows)]
    _, _, other = read(tmp_path, others[::-1], group_column="author")
    assert other[::-1].tolist() == split.tolist()


def test_an_empty_group_is_a_group_of_its_own(tmp_path: Path):
    rows = [{"text": f"text number {n}", "author": None if n % 2 else "x"} for n in range(30)]
    _, group, _ = read(tmp_path, rows, group_column="author")
    assert group.tolist() == [n if n % 2 else 0 for n in range(30)]


def test_splits_are_those_of_the_column(tmp_path: Path):
    rows = [{"text": f"text number {n}", "part": SPLITS[n % 4]} for n in range(30)]
    _, _, split = read(tmp_path, rows, split_column="part")
    assert split.tolist() == [n % 4 for n in range(30)]


def test_distinct_texts_are_read_once_and_join_their_groups(tmp_path: Path):
    rows = [
        {"text": text, "author": author, "part": part}
        for text, author, part in [
            ("one", "x", "test"), ("two", "y", "test"), ("one", "y", "test"), ("three", "z", "train")
        ]
    ]  # fmt: skip
    keys, group, split = read(tmp_path, rows, group_column="author", split_column="part", distinct=True)
    assert len(keys) == 3
    assert group.tolist() == [0, 0, 2]
    assert [SPLITS[number] for number in split] == ["test", "test", "train"]


@pytest.mark.parametrize(
    ("rows", "chosen", "said"),
    [
        (
            [("a", "x", "train"), ("b", "x", "test")],
            {"split_column": "part", "group_column": "author"},
            "puts row 0 in 'train' and row 1 in 'test', but they are of one group",
        ),
        (
            [("Hello!", "x", "train"), ("hello", "y", "test")],
            {"split_column": "part"},
            "puts row 0 in 'train'",
        ),
        (
            [("a", "x", "dev")],
            {"split_column": "part"},
            "table.csv: row 1: .*'part' holds 'dev'; it must hold train",
        ),
        ([("a", "x", None)], {"split_column": "part"}, "'part' holds ''; it must hold train, probe, valid"),
        (
            [("a", "x", "train")],
            {"split_column": "prat"},
            "corpus.split_column is 'prat', but .* has text, auth",
        ),
        ([("a", "x", "train")], {"group_column": "topic"}, "corpus.group_column is 'topic', but .* has text"),
        (
            [("a", "x", "train"), ("b", "y", "train")],
            {"group_column": "author"},
            "has 2 groups of corpus.group_column 'author', which leaves none for the split 'probe'",
        ),
    ],
)
def test_bad_columns_are_one_line(tmp_path: Path, rows: list, chosen: dict, said: str):
    with pytest.raises(ProbekitError, match=said) as caught:
        read(tmp_path, [dict(zip(("text", "author", "part"), row, strict=True)) for row in rows], **chosen)
    assert "\n" not in str(caught.value)


def test_text_has_no_columns(tmp_path: Path):
    (tmp_path / "a.txt").write_text("Some text.")
    with pytest.raises(
        ProbekitError, match=r"is 'author', but .*a\.txt is read as text, which has no columns"
    ):
        write_documents(
            CorpusSettings(path=str(tmp_path), group_column="author"),
            tmp_path / "d.arrow",
            Progress(quiet=True),
        )


def test_json_lines_without_the_column_are_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Some text.", "autor": "x"}) + "\n")
    with pytest.raises(
        ProbekitError, match=r"corpus.group_column is 'author', but .*a\.jsonl:1 has text, autor"
    ):
        write_documents(
            CorpusSettings(path=str(tmp_path / "a.jsonl"), group_column="author"),
            tmp_path / "d.arrow",
            Progress(quiet=True),
        )
