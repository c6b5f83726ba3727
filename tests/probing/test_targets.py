"""Targets against walking through every token of every document."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from bare_corpora import bare_corpus
from hypothesis import given
from hypothesis import strategies as st

from probekit.config import Position
from probekit.data.corpus import Corpus
from probekit.errors import ProbekitError
from probekit.probing import targets
from probekit.probing.targets import NO_LABEL, TARGETS, find_examples, find_target, reached, sentence_target
from probekit.run.run import Run

DOCUMENTS = np.array([40, 3, 159, 8, 41])
HORIZONS = [1, 2, 9, 200]


def walk(corpus: Corpus, document: int) -> list[tuple[int, int]]:
    """Tokens of a document's sentences, each with the number of its sentence in the corpus."""
    first, last = corpus.document_sentences[document : document + 2].tolist()
    starts = [*corpus.first_token[first:last].tolist(), int(corpus.document_tokens[document + 1])]
    return [(t, first + j) for j in range(last - first) for t in range(starts[j], starts[j + 1])]


def anchors_by_walking(corpus: Corpus, document: int, anchors: str) -> list[tuple[int, int]]:
    tokens = walk(corpus, document)
    if anchors == "token":
        return tokens
    return [pair for n, pair in enumerate(tokens) if n == 0 or tokens[n - 1][1] != pair[1]]


def slow_label(run: Run, target: str, document: int, anchor: int, sentence: int, horizon: int) -> int:
    """The label of one example, by the words of the reference alone."""
    corpus = run.corpus
    first, last = corpus.document_sentences[document : document + 2].tolist()
    asked = sentence + horizon - 1
    if target == "document-type":
        return corpus.texts[document].kind
    if target == "token":
        token = anchor + horizon - 1
        if token >= corpus.document_tokens[document + 1]:
            return NO_LABEL
        return frequent_tokens(corpus).get(int(corpus.tokens[token]), NO_LABEL)
    if asked >= last:
        return NO_LABEL
    if target == "embedding":
        return asked if corpus.embeddings[asked].any() else NO_LABEL
    return int(corpus.actions[asked]) if target == "action" else min(asked - first, 15)


def frequent_tokens(corpus: Corpus) -> dict[int, int]:
    """The rank of each token of the training documents, without separators; ties by id."""
    counts: Counter[int] = Counter()
    for document in corpus.documents("train"):
        counts.update(
            corpus.tokens[corpus.document_tokens[document] + 1 : corpus.document_tokens[document + 1]]
            .astype(int)
            .tolist()
        )
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    return {token: rank for rank, token in enumerate(ranked[: targets.MOST_TOKENS])}


@pytest.mark.parametrize("anchors", ["start", "token"])
@pytest.mark.parametrize("name", list(TARGETS))
def test_examples_equal_the_walk(tiny_run: Run, name: str, anchors: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets, "MOST_TOKENS", 40)  # fewer than there are: some tokens have no label
    corpus = tiny_run.corpus
    target = find_target(corpus, name)
    found = find_examples(corpus, DOCUMENTS, target, HORIZONS, anchors)
    expected = [
        (document, anchor, sentence)
        for document in DOCUMENTS.tolist()
        for anchor, sentence in anchors_by_walking(corpus, document, anchors)
    ]
    rows = zip(found.document.tolist(), found.start.tolist(), found.sentence.tolist(), strict=True)
    assert list(rows) == expected
    assert len(found) == len(expected)
    stops = {n: token + 1 for document in DOCUMENTS.tolist() for token, n in walk(corpus, document)}
    assert found.stop.tolist() == [
        stops[sentence] if anchors == "start" else anchor + 1 for _, anchor, sentence in expected
    ]
    assert found.group.tolist() == found.document.tolist()
    sample = np.random.default_rng(0).choice(len(expected), size=min(200, len(expected)), replace=False)
    for row in sample:
        labels = [slow_label(tiny_run, name, *expected[row], horizon) for horizon in HORIZONS]
        assert found.labels[row].tolist() == labels, expected[row]
    assert found.labels.dtype == np.int64
    assert found.labels.max() < max(target.classes, len(target.vectors))


@pytest.mark.parametrize("anchors", ["start", "token"])
@pytest.mark.parametrize("position", [1, 2, 9, 40, 1000, 0, -1, -7, -1000, "first", "last", "mean"])
def test_what_a_position_reaches(tiny_run: Run, position: Position, anchors: str):
    corpus = tiny_run.corpus
    found = find_examples(corpus, DOCUMENTS, find_target(corpus, "action"), [1], anchors)
    expected = [
        isinstance(position, str) or anchor - position in {token for token, _ in walk(corpus, document)}
        for document in DOCUMENTS.tolist()
        for anchor, _ in anchors_by_walking(corpus, document, anchors)
    ]
    assert reached(corpus, found, position).tolist() == expected


@pytest.mark.parametrize("anchors", ["start", "token"])
def test_what_is_read_at_a_position(tiny_run: Run, anchors: str):
    corpus = tiny_run.corpus
    found = find_examples(corpus, DOCUMENTS, find_target(corpus, "action"), [1], anchors)
    tokens: dict[int, list[int]] = {}
    for document in DOCUMENTS.tolist():
        for token, sentence in walk(corpus, document):
            tokens.setdefault(sentence if anchors == "start" else token, []).append(token)
    ranges = [*tokens.values()]
    for position, read in {
        "first": [(own[0], own[0]) for own in ranges],
        "last": [(own[-1], own[-1]) for own in ranges],
        "last-2": [(own[-1] - 2, own[-1] - 2) for own in ranges],
        "mean": [(own[0], own[-1]) for own in ranges],
        0: [(own[0], own[0]) for own in ranges],
        3: [(own[0] - 3, own[0] - 3) for own in ranges],
        -2: [(own[0] + 2, own[0] + 2) for own in ranges],
    }.items():
        assert [*zip(*(bound.tolist() for bound in found.bounds(position)), strict=True)] == read


def test_the_first_token_of_a_document_is_reached_but_not_its_separator(tiny_run: Run):
    corpus = tiny_run.corpus
    found = find_examples(corpus, np.array([20]), find_target(corpus, "action"), [1])
    length = int(found.start[1] - corpus.document_tokens[20] - 1)  # tokens of the first sentence
    assert reached(corpus, found, length)[:2].tolist() == [False, True]
    assert reached(corpus, found, length + 1)[:2].tolist() == [False, False]


@given(
    st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=6),
    st.integers(0, 2),
    st.integers(1, 4),
    st.sampled_from(["start", "token"]),
    st.integers(0, 100),
)
def test_documents_of_any_shape(documents, lead: int, horizon: int, anchors: str, seed: int):
    """Documents without a sentence, and tokens in front of the first one, are no anchors."""
    corpus = bare_corpus([("train", sentences) for sentences in documents], None, lead)
    numbers = np.random.default_rng(seed).permutation(len(documents))
    found = find_examples(corpus, numbers, find_target(corpus, "action"), [horizon], anchors)
    expected = []
    for document in numbers.tolist():
        last = corpus.document_sentences[document + 1]
        for anchor, sentence in anchors_by_walking(corpus, document, anchors):
            asked = sentence + horizon - 1
            expected.append((document, anchor, sentence, asked if asked < last else NO_LABEL))
    rows = zip(found.document, found.start, found.sentence, found.labels[:, 0], strict=True)
    assert [tuple(map(int, row)) for row in rows] == expected


# Built-in targets


def test_tokens_are_named_and_most_frequent_first(tiny_run: Run):
    corpus = tiny_run.corpus
    target = find_target(corpus, "token")
    ranks = frequent_tokens(corpus)
    assert target.classes == len(ranks) == len(target.names)
    assert target.of_sentences is None
    assert list(target.names) == corpus.tokenizer.convert_ids_to_tokens(list(ranks))


def test_a_document_type_that_nobody_knows(tiny_run: Run):
    corpus = replace(tiny_run.corpus)
    documents = [replace(each, kind=None) for _, batch in tiny_run.corpus.texts.batches() for each in batch]
    vars(corpus)["texts"] = type("Texts", (), {"batches": lambda self: iter([(0, documents)])})()
    with pytest.raises(ProbekitError, match="'document-type', which only the planted corpus knows"):
        find_target(corpus, "document-type")


def test_an_action_beyond_the_codebook(tiny_run: Run):
    actions = np.array(tiny_run.corpus.actions)
    actions[7] = 8
    with pytest.raises(ProbekitError, match=r"actions\.npy holds action 8, but the codebook has 8") as caught:
        find_target(replace(tiny_run.corpus, actions=actions), "action")
    assert "\n" not in str(caught.value)


def test_an_unknown_target_is_refused_with_those_that_exist(tiny_run: Run):
    with pytest.raises(ProbekitError, match=r"probe\.target is 'acton'") as caught:
        find_target(tiny_run.corpus, "acton")
    assert all(name in str(caught.value) for name in TARGETS)


@pytest.mark.parametrize("anchors", ["start", "token"])
def test_examples_without_a_label_are_not_counted(tiny_run: Run, anchors: str):
    corpus = tiny_run.corpus
    labels = np.where(np.random.default_rng(0).random(len(corpus.first_token)) < 0.7, NO_LABEL, 1)
    target = sentence_target(corpus, "rare", 2, labels)
    for first in (True, False):
        counts = target.example_counts(corpus, anchors, first=first)
        for document in DOCUMENTS:
            found = find_examples(corpus, np.array([document]), target, [1], anchors)
            known = found.labels[:, 0] != NO_LABEL
            if anchors == "token":  # the separator counts for the first token
                expected = int(known.sum()) + first
            else:
                expected = int(known[0 if first else 1 :].sum())
            assert counts[document] == expected
