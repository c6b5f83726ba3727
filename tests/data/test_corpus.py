"""A built corpus read back: look-ups and tables against counting by hand, files that are cut off."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.config import Config
from probekit.data.corpus import (
    SPLITS,
    WRITERS,
    Corpus,
    action_table,
    export_sentences,
    ranges,
    sentence_lengths,
    sizes,
)
from probekit.data.encoders import WORD
from probekit.errors import ProbekitError
from probekit.probing.labels import target_of
from probekit.run.run import Run
from probekit.training.train import build_corpus


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 9)), max_size=20))
def test_ranges_are_the_ranges_one_after_the_other(bounds: list[tuple[int, int]]):
    starts = np.array([start for start, _ in bounds], dtype=np.int64)
    stops = starts + np.array([length for _, length in bounds], dtype=np.int64)
    expected = [n for start, stop in zip(starts, stops, strict=True) for n in range(start, stop)]
    found = ranges(starts, stops)
    assert found.tolist() == expected
    assert found.dtype == np.int64


def test_splits_share_out_the_documents(tiny_run: Run):
    parts = [tiny_run.corpus.documents(split) for split in SPLITS]
    assert sorted(np.concatenate(parts).tolist()) == list(range(160))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert [len(part) for part in parts] == [96, 32, 16, 16]


def test_sentences_and_their_documents(tiny_run: Run):
    corpus = tiny_run.corpus
    bounds = list(itertools.pairwise(corpus.document_sentences.tolist()))
    chosen = np.array([7, 3, 150])
    sentences = corpus.sentences(chosen)
    assert sentences.tolist() == [n for document in chosen for n in range(*bounds[document])]
    owners = [document for document in chosen for _ in range(*bounds[document])]
    assert corpus.document_of(sentences).tolist() == owners
    assert corpus.sentences(np.array([], dtype=np.int64)).tolist() == []


def test_previous_actions(tiny_run: Run):
    corpus = tiny_run.corpus
    expected = []
    for start, stop in itertools.pairwise(corpus.document_sentences.tolist()):
        expected += [-1, *corpus.actions[start : stop - 1].tolist()]
    assert corpus.previous_actions(np.arange(len(corpus.actions))).tolist() == expected
    assert corpus.previous_actions(np.array([5, 0])).tolist() == [expected[5], -1]


def test_sentence_texts_in_any_order(tiny_run: Run):
    corpus = tiny_run.corpus
    sentences = [900, 0, 901, 13]
    expected = []
    for sentence in sentences:
        text = corpus.texts[int(corpus.document_of(np.array([sentence]))[0])].text
        expected.append(text[slice(*corpus.spans[sentence])].strip())
    assert corpus.sentence_texts(sentences) == expected
    assert all(text.endswith(".") for text in expected)


@pytest.mark.parametrize("file", ["tokens.npy", "codebook.safetensors", "facts.json", "split.npy"])
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_opening_a_corpus_names_the_damaged_file(tiny_run: Run, tmp_path: Path, file: str, damage: str):
    folder = shutil.copytree(tiny_run.folder / "corpus", tmp_path / "corpus")
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage == "cut off":
        (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ProbekitError, match=file):
        Corpus.open(folder)


# Tables


def lengths_of(run: Run, documents: list[int]) -> list[list[int]]:
    """Lengths of every document's sentences, in tokens."""
    corpus = run.corpus
    found = []
    for document in documents:
        starts = corpus.first_token[slice(*corpus.document_sentences[document : document + 2])].tolist()
        edges = [*starts, int(corpus.document_tokens[document + 1])]
        found.append([stop - start for start, stop in itertools.pairwise(edges)])
    return found


def test_sizes(tiny_run: Run):
    table = sizes(tiny_run.corpus)
    assert table.index.tolist() == list(SPLITS)
    for split in SPLITS:
        lengths = lengths_of(tiny_run, np.flatnonzero(tiny_run.corpus.split == SPLITS.index(split)).tolist())
        sentences = list(itertools.chain(*lengths))
        assert table.loc[split].tolist() == [len(lengths), len(sentences), sum(sentences)]
    assert table.sum().tolist() == [tiny_run.corpus.facts[name] for name in table.columns]


def test_a_sentence_ends_before_the_next_documents_separator(tiny_run: Run):
    corpus = replace(
        tiny_run.corpus,
        document_tokens=np.array([0, 4, 5, 13]),  # sentences of 3 tokens, of none, of 5 and 2
        document_sentences=np.array([0, 1, 1, 3]),
        first_token=np.array([1, 6, 11]),
    )
    assert (
        sentence_lengths(corpus).tolist() == np.quantile([3, 5, 2], sentence_lengths(corpus).index).tolist()
    )


def test_action_table(tiny_run: Run):
    corpus = tiny_run.corpus
    table = action_table(corpus, nearest=3)
    train = [
        action
        for n in corpus.documents("train")
        for action in corpus.actions[corpus.sentences(np.array([n]))]
    ]
    for action, row in table.iterrows():
        assert row.sentences == train.count(action)
        assert row.share == pytest.approx(train.count(action) / len(train))
        own = np.flatnonzero(corpus.actions == action)
        distances = np.linalg.norm(corpus.embeddings[own] - corpus.codebook.centroids[action], axis=1)
        shown = [text.lower() for text in row.nearest]
        assert len(shown) == 3
        limit = np.sort(distances)[2] + 1e-6
        near = {text.lower() for text in corpus.sentence_texts(own[distances <= limit])}
        assert set(shown) <= near
        own_words = {word for text in corpus.sentence_texts(own) for word in WORD.findall(text.lower())}
        assert set(row.words.split(", ")) <= own_words
    assert sorted(table.index) == list(range(8))
    assert table.sentences.is_monotonic_decreasing
    assert table.share.sum() == pytest.approx(1)


# The table of sentences

READERS = {
    ".csv": pd.read_csv,
    ".jsonl": lambda path: pd.read_json(path, lines=True),
    ".parquet": pd.read_parquet,
}


def rows_by_walking(corpus: Corpus) -> list[tuple[int, str, str, int, int, str]]:
    """Document, its name, split, number in the document, action and text of every sentence."""
    return [
        (
            document,
            corpus.texts[document].name,
            SPLITS[corpus.split[document]],
            j,
            int(corpus.actions[first + j]),
            text,
        )
        for document in range(len(corpus.split))
        for first, last in [corpus.document_sentences[document : document + 2].tolist()]
        for j, text in enumerate(corpus.sentence_texts(np.arange(first, last)))
    ]


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_export_has_a_row_for_every_sentence_in_order(tiny_run: Run, tmp_path: Path, suffix: str):
    path = export_sentences(tiny_run.corpus, tmp_path / "new" / f"sentences{suffix}")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    table = READERS[suffix](path)
    assert list(table.columns) == ["document", "name", "split", "sentence", "action", "text"]
    assert list(table.itertuples(index=False, name=None)) == rows_by_walking(tiny_run.corpus)


@pytest.fixture(scope="module")
def difficult(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A corpus of texts that formats of tables trip over."""
    folder = tmp_path_factory.mktemp("difficult")
    (folder / "texts").mkdir()
    texts = [
        'She said "no, never", and left. Then;\tshe came back, "twice".',
        "One line\rof an old Mac. Another one\r\nof Windows. A third\nof Unix.",
        "Umlauts: äöü ß. Signs: 漢字 🎉. Separators: \u2028 and \u2029 and \x85.",
        "NA. None. nan. 3.5. -1. =1+1. 'single'. \\ backslash.",
        " Leading space. \ufeffA mark in front. \x0bVertical. \x1cFile.",
    ]
    for n in range(40):
        (folder / "texts" / f"{n:02d}.txt").write_bytes(f"{texts[n % 5]} Number {n} ends here.".encode())
    config = tiny_config.override(
        {"corpus.reader": "text", "corpus.path": str(folder / "texts"), "actions.labels": "clusters"}
    )
    return build_corpus(config, folder / "run", quiet=True).corpus


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_column_that_is_added_to_an_export_can_be_probed_for(
    difficult: Corpus, tmp_path: Path, suffix: str
):
    path = export_sentences(difficult, tmp_path / f"sentences{suffix}")
    table = READERS[suffix](path)
    expected = rows_by_walking(difficult)
    assert len(table) == len(expected)
    kinds = ["even" if number % 2 else "odd" for number in range(len(table))]
    WRITERS[suffix](table.assign(kind=kinds), path)
    config = Config().override({"probe.labels": str(path), "probe.target": "kind"})
    target = target_of(difficult, config)
    assert [target.names[code] for code in target.of_sentences] == kinds
    if suffix != ".csv":
        assert table.text.tolist() == [row[-1] for row in expected]
    assert target_of(difficult, config.override({"probe.target": "action"})).of_sentences is not None
