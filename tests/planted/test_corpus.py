"""The planted corpus against its own distributions."""

import itertools
import re

import numpy as np
import pytest
import sentencex
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.config import PlantedSettings
from probekit.config.types import HUGE
from probekit.errors import ProbekitError
from probekit.planted.corpus import SYLLABLES, TOPICS, PlantedCorpus, PlantedModel, generate
from probekit.planted.posteriors import posterior_at, posterior_given_actions

DEFAULT = PlantedSettings()


def test_tables_are_distributions():
    model = PlantedModel.draw(DEFAULT)
    for table in (model.prior, model.initial, model.transition, model.emission):
        np.testing.assert_allclose(table.sum(axis=-1), 1.0)
    assert (np.count_nonzero(model.transition, axis=-1) == DEFAULT.successors).all()
    shares = model.transition[model.transition > 0]
    assert np.unique(shares).size == shares.size


def test_frequencies_match_the_model(corpus):
    model, starts = corpus.model, corpus.document_starts
    n = len(corpus.types)
    np.testing.assert_allclose(np.bincount(corpus.types) / n, model.prior, atol=5 * 0.5 / n**0.5)
    first = np.bincount(corpus.actions[starts[:-1]], minlength=24) / n
    np.testing.assert_allclose(first, model.prior @ model.initial, atol=5 * 0.5 / n**0.5)

    action_of_word = np.repeat(corpus.actions, np.diff(corpus.sentence_starts))
    assert_counts_match(action_of_word, corpus.words, model.emission)

    type_of_sentence = np.repeat(corpus.types, np.diff(starts))
    inside = np.setdiff1d(np.arange(1, len(corpus.actions)), starts)
    state = type_of_sentence * 24 + corpus.actions
    assert_counts_match(state[inside - 1], corpus.actions[inside], model.transition.reshape(-1, 24))


@pytest.fixture(scope="module")
def lines() -> PlantedCorpus:
    """Documents of four examples of three sentences."""
    return generate(PlantedSettings(documents=2000, sentences=(3, 3), examples=4))


def test_examples_of_a_document_share_its_type_and_begin_anew(lines):
    model, actions = lines.model, lines.actions.reshape(2000, 4, 3)
    np.testing.assert_array_equal(lines.document_starts, 12 * np.arange(2001))
    types = np.repeat(lines.types, 4)
    first = actions[:, :, 0].ravel()
    assert_counts_match(types, first, model.initial)
    # Given the type, not even a trace of how the example before ended.
    ended = np.roll(actions[:, :, 2], 1, axis=1)[:, 1:].ravel()
    assert_counts_match(ended, first.reshape(2000, 4)[:, 1:].ravel(), expected_after(model, lines, ended))
    state = (types[:, None] * 24 + actions[:, :, :2].reshape(-1, 2)).ravel()
    assert_counts_match(state, actions[:, :, 1:].ravel(), model.transition.reshape(-1, 24))


def expected_after(model, lines, ended):
    """P(first action | last action of the example before), from the types that the latter occurs in."""
    counts = np.zeros((24, len(model.prior)))
    np.add.at(counts, (ended, np.repeat(lines.types, 3)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares @ model.initial


def test_an_example_is_a_line(lines):
    for d, document in enumerate(itertools.islice(lines.documents(), 20)):
        examples = document.text.split("\n")
        assert [line.count(".") for line in examples] == [3] * 4
        assert document.actions == tuple(lines.actions[12 * d : 12 * d + 12].tolist())
        words = lines.words[lines.sentence_starts[12 * d] : lines.sentence_starts[12 * d + 12]]
        assert [word for line in examples for part in lines.model.parse(line) for word in part] == [*words]


def assert_counts_match(rows, outcomes, probabilities):
    """Within five standard deviations of the expected counts, and none where the probability is zero."""
    counts = np.zeros(probabilities.shape)
    np.add.at(counts, (rows, outcomes), 1)
    expected = counts.sum(axis=1, keepdims=True) * probabilities
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected + 1)).all()
    assert not counts[probabilities == 0].any()


def test_lengths_are_uniform_over_the_whole_range(corpus):
    for counts, low, high in (
        (np.diff(corpus.document_starts), *DEFAULT.sentences),
        (np.diff(corpus.sentence_starts), *DEFAULT.words),
    ):
        shares = np.bincount(counts, minlength=high + 1) / len(counts)
        assert not shares[:low].any()
        assert len(shares) == high + 1
        np.testing.assert_allclose(shares[low:], 1 / (high - low + 1), atol=0.025)


def test_same_settings_same_corpus_and_more_documents_same_model(documents):
    assert list(generate(DEFAULT).documents()) == documents
    more = generate(DEFAULT.model_copy(update={"documents": 7000, "words": (4, 9)})).model
    other = generate(DEFAULT.model_copy(update={"seed": 1, "documents": 4})).model
    model = PlantedModel.draw(DEFAULT)
    for name in ("prior", "initial", "transition", "emission", "words"):
        np.testing.assert_array_equal(getattr(more, name), getattr(model, name))
        assert not np.array_equal(getattr(other, name), getattr(model, name))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), max_words=st.integers(1, 9), vocabulary=st.integers(2, 1500))
def test_sentence_splitter_finds_the_planted_sentences(seed, max_words, vocabulary):
    drawn_from = PlantedSettings(
        documents=10, words=(1, max_words), vocabulary=vocabulary, concentration=1.0, seed=seed
    )
    for document in generate(drawn_from).documents():
        spans = sentencex.get_sentence_boundaries("en", document.text)
        found = [document.text[span["start_index"] : span["end_index"]].strip() for span in spans]
        assert found == [f"{sentence}." for sentence in document.text.removesuffix(".").split(". ")]
        assert len(found) == len(document.actions)


ENGLISH = list(itertools.chain(*TOPICS))


def test_no_word_is_taken_for_an_abbreviation():
    for word in [*map("".join, itertools.product(SYLLABLES, repeat=2)), *ENGLISH]:
        text = f"Dolu {word}. {word.capitalize()}. {word.capitalize()} ro{word}. Talu."
        assert len(sentencex.get_sentence_boundaries("en", text)) == 4


def test_parse_gives_back_the_words(corpus, documents):
    for d, document in enumerate(documents[:200]):
        first, last = corpus.document_starts[d : d + 2]
        starts = corpus.sentence_starts[first : last + 1]
        planted = np.split(corpus.words[starts[0] : starts[-1]], starts[1:-1] - starts[0])
        parsed = corpus.model.parse(document.text)
        assert [words.tolist() for words in parsed] == [words.tolist() for words in planted]


def test_no_english_word_stands_twice_or_can_be_made_up():
    assert len({*ENGLISH}) == len(ENGLISH)
    syllables = re.compile(f"({'|'.join(SYLLABLES)})+")
    assert [word for word in ENGLISH if syllables.fullmatch(word)] == []


@pytest.mark.parametrize("vocabulary", [2, 600, 36**2, 36**2 + 1, 50_000])
def test_words_are_distinct_and_english_as_far_as_it_goes(vocabulary):
    words = PlantedModel.draw(DEFAULT.model_copy(update={"vocabulary": vocabulary})).words
    assert len(set(words)) == vocabulary
    assert all(len(word) >= 3 and word.isalpha() and word.islower() for word in words)
    assert len({*words} & {*ENGLISH}) == min(vocabulary, len(ENGLISH))


@pytest.mark.parametrize(("seed", "actions"), [(0, 24), (1, 24), (2, 24), (0, 48)])
def test_sentences_of_an_action_are_about_its_topic(seed, actions):
    """More actions than topics share them."""
    model = PlantedModel.draw(DEFAULT.model_copy(update={"seed": seed, "actions": actions}))
    topic_of = {word: topic for topic, words in enumerate(TOPICS) for word in words}
    share = np.zeros((len(TOPICS), actions))
    np.add.at(share, [topic_of[word] for word in model.words], model.emission.T)
    assert (share.argmax(axis=0) == np.arange(actions) % len(TOPICS)).all()


def test_the_largest_concentration_gives_uniform_words():
    emission = PlantedModel.draw(DEFAULT.model_copy(update={"concentration": HUGE})).emission
    np.testing.assert_allclose(emission, 1 / emission.shape[1], rtol=1e-4)


def test_bad_input_is_refused_in_one_line(corpus, documents):
    model = corpus.model
    with pytest.raises(ProbekitError, match=r"the word 'xylem' .* corpus\.planted settings"):
        model.parse(documents[0].text + " Xylem.")
    with pytest.raises(ProbekitError, match=r"horizon is 0"):
        posterior_given_actions(model, [documents[0].actions], horizon=0)
    action = 0
    never = int(np.flatnonzero(model.transition[:, action].sum(axis=0) == 0)[0])
    with pytest.raises(ProbekitError, match="sentence 1 of document 1 is impossible"):
        posterior_given_actions(model, [documents[0].actions, [action, never]])
    nothing_left = np.full((1, 24), -np.inf)
    with pytest.raises(ProbekitError, match="sentence 0 of document 0 is impossible"):
        posterior_at(model, [[[0]]], np.zeros(1, int), np.zeros(1, int), nothing_left, np.zeros(1, int))
