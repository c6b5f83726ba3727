"""A built corpus read back: look-ups against brute force, damaged files."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.data.corpus import SPLITS, Corpus, ranges
from probekit.errors import ProbekitError
from probekit.run.run import Run


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
        text = corpus.texts.row(int(corpus.document_of(np.array([sentence]))[0]))["text"]
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
