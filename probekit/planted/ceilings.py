"""What the planted corpus allows at best: exact posteriors, lined up with a built corpus.

Three readers know the planted model and differ in what of a document they have seen before they say which
action a later sentence has: "ceiling (actions)" the earlier sentences' true actions, "ceiling (words)" their
words, and "ceiling (tokens read)" all tokens up to a position, which may lie within a sentence or a word.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from probekit.config import Config, PlantedSettings
from probekit.data.corpus import Corpus, ranges
from probekit.errors import ProbekitError
from probekit.planted.corpus import PlantedModel
from probekit.planted.posteriors import posterior_at, posterior_given_actions, posterior_given_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

DOCUMENT_START, SENTENCE_START, INSIDE = range(3)
"""Where a word stands: first words have a capital, and no space is before a document's first."""


@dataclass(frozen=True)
class Forms:
    """Every planted word as tokens, by where it stands, and the full stop.

    Attributes:
        vocabulary: Number of words.
        tokens: Tokens of all forms, one form after the other `[tokens]`. Form `place * vocabulary + word` is
            a word, the last one is the full stop.
        starts: Form f's tokens begin at `starts[f]` `[forms + 1]`.
        prefixes: For every token, a number that stands for it, the tokens before it in its form, and the
            place: equal where a reader of these tokens cannot tell two forms apart `[tokens]`.
    """

    vocabulary: int
    tokens: Integers
    starts: Integers
    prefixes: Integers

    @classmethod
    def of(cls, model: PlantedModel, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Tokenises every word as it stands in a document, for alone it might be cut in another way."""
        capitals = [word.capitalize() for word in model.words]
        encoded = tokenizer(
            [f"{first}. {first} {word}." for first, word in zip(capitals, model.words, strict=True)],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        cut = [
            _pieces(ids, offsets, [len(word), 1, 1 + len(word), 1 + len(word), 1])
            for word, ids, offsets in zip(
                model.words, encoded["input_ids"], encoded["offset_mapping"], strict=True
            )
        ]
        # Of each text, pieces 0, 2 and 3 are its word at the three places, and 4 is the full stop.
        forms = [pieces[piece] for piece in (0, 2, 3) for pieces in cut] + [cut[0][4]]
        number: dict[tuple[int, tuple[int, ...]], int] = {}
        prefixes = [
            number.setdefault((i // len(cut), form[: read + 1]), len(number))
            for i, form in enumerate(forms)
            for read in range(len(form))
        ]
        starts = np.cumsum([0, *map(len, forms)])
        return cls(len(cut), np.array([*itertools.chain(*forms)]), starts, np.array(prefixes))

    @property
    def stop(self) -> int:
        """The form that is the full stop."""
        return len(self.starts) - 2

    def log_likelihood(self, emission: Floats, form: Integers, read: Integers) -> Floats:
        """Log-probability under each action of a word's first tokens: of all words that begin with them.

        Args:
            emission: Probability of a word under an action `[actions, vocabulary]`.
            form: The word's form `[rows]`.
            read: How many of its tokens are read, at least one `[rows]`.

        Returns:
            In nats, `[rows, actions]`.
        """
        asked, row = np.unique(self.prefixes[self.starts[form] + read - 1], return_inverse=True)
        # A prefix number stands once in each form that begins with that prefix.
        token = np.flatnonzero(np.isin(self.prefixes, asked))
        word = (np.searchsorted(self.starts, token, side="right") - 1) % self.vocabulary
        likelihood = np.zeros((len(asked), len(emission)))
        np.add.at(likelihood, np.searchsorted(asked, self.prefixes[token]), emission.T[word])
        with np.errstate(divide="ignore"):
            return np.log(likelihood)[row]


@dataclass(frozen=True)
class Layout:
    """The units of documents one after the other; arrays `[units]`.

    Attributes:
        form: Which form the unit is.
        start: Its first token, in `corpus.tokens`.
        document: Its document, counted among those laid out.
        sentence: Its sentence, counted from 0 in the document.
        first: First unit of its sentence.
    """

    form: Integers
    start: Integers
    document: Integers
    sentence: Integers
    first: Integers

    @classmethod
    def of(cls, words: list[list[Integers]], documents: Integers, forms: Forms, corpus: Corpus) -> Self:
        """Lays documents out and compares them with the corpus's tokens.

        Args:
            words: Word ids of the sentences of each document.
            documents: The documents' numbers in the corpus, sorted.
            forms: The words as tokens.
            corpus: The built corpus.

        Raises:
            ProbekitError: A document's tokens are others.
        """
        sentences = np.array([len(document) for document in words])
        units = np.array([len(sentence) + 1 for document in words for sentence in document])
        first = np.cumsum(units) - units
        place = np.full(units.sum(), INSIDE)
        place[first] = SENTENCE_START
        place[first[np.cumsum(sentences) - sentences]] = DOCUMENT_START
        is_word = np.ones(len(place), dtype=bool)
        is_word[first + units - 1] = False
        form = np.full(len(place), forms.stop)
        form[is_word] = np.concatenate([sentence for document in words for sentence in document])
        form[is_word] += place[is_word] * forms.vocabulary
        document = np.repeat(np.repeat(np.arange(len(words)), sentences), units)
        sentence = np.repeat(ranges(np.zeros_like(sentences), sentences), units)
        start = _token_starts(form, document, documents, forms, corpus)
        return cls(form, start, document, sentence, np.repeat(first, units))


def _token_starts(
    form: Integers, document: Integers, documents: Integers, forms: Forms, corpus: Corpus
) -> Integers:
    """Where each unit's tokens begin in the corpus, once these are found to be its tokens `[units]`."""
    lengths = np.diff(forms.starts)[form]
    ends = np.cumsum(lengths)
    counts = np.bincount(document, lengths, len(documents)).astype(np.int64)
    begin, end = corpus.document_tokens[documents] + 1, corpus.document_tokens[documents + 1]
    wrong = counts != end - begin
    if not wrong.any():
        differs = forms.tokens[ranges(forms.starts[form], forms.starts[form + 1])]
        differs = differs != corpus.tokens[ranges(begin, end)]
        wrong = np.bincount(np.repeat(np.arange(len(documents)), counts), differs) > 0
    if wrong.any():
        raise ProbekitError(
            f"{corpus.folder}: the tokens of document {documents[wrong.argmax()]} are not those of its words "
            "one by one, so no ceiling is known within a word; use an LM whose tokenizer cuts at spaces and "
            "full stops"
        )
    return ends - lengths + (begin - (np.cumsum(counts) - counts))[document]


def _pieces(ids: list[int], offsets: list[tuple[int, int]], lengths: list[int]) -> list[tuple[int, ...]]:
    """The tokens of a text's pieces; a token belongs to the piece in which its characters start.

    Args:
        ids: The text's tokens.
        offsets: The characters from which and to which each token goes.
        lengths: Characters of each piece; together they are the text.
    """
    piece = np.searchsorted(np.cumsum(lengths), [start for start, _ in offsets], side="right")
    return [tuple(np.array(ids)[piece == number].tolist()) for number in range(len(lengths))]


def has_ceiling(config: Config) -> bool:
    """Whether the actions are planted, so that the best possible prediction is known."""
    return config.actions.labels == "planted"


def ceiling_log_probabilities(
    config: Config, corpus: Corpus, documents: np.ndarray, horizon: int = 1
) -> dict[str, np.ndarray]:
    """Exact log-posteriors of every sentence's action given all that comes before some documents' sentences.

    Args:
        config: Settings of a planted corpus.
        corpus: The built corpus.
        documents: Which documents.
        horizon: 1 for the next sentence's action, 2 for that of the one after it.

    Returns:
        For "ceiling (actions)", which knows the earlier sentences' true actions, and "ceiling (words)", which
        knows their words alone: `[sentences, actions]` for all sentences of the documents in order. Row j is
        about sentence j + horizon - 1 given the sentences before j.
    """
    model = PlantedModel.draw(config.corpus.planted)
    bounds = zip(corpus.document_sentences[documents], corpus.document_sentences[documents + 1], strict=True)
    actions = [np.asarray(corpus.actions[start:stop]) for start, stop in bounds]
    words = _words(model, corpus, documents)
    with np.errstate(divide="ignore"):
        return {
            "ceiling (actions)": np.log(np.concatenate(posterior_given_actions(model, actions, horizon))),
            "ceiling (words)": np.log(np.concatenate(posterior_given_words(model, words, horizon))),
        }


def position_ceiling(
    config: Config, corpus: Corpus, positions: np.ndarray, sentences: np.ndarray
) -> np.ndarray:
    """Exact log-posterior of a sentence's action given the tokens up to and including a position.

    It is told how many sentences ahead of the position the sentence is, but not how many tokens. A reader
    made for one distance knows that much more; where words have several tokens, a hundredth of a bit.

    A word of which only some tokens are read is evidence by the probability of all words whose tokens begin
    with those; so is one that is whole as long as no token after it is read. How many words a sentence has
    does not depend on its action, so neither does the full stop tell of it.

    Args:
        config: Settings of a planted corpus.
        corpus: The built corpus.
        positions: Where reading ends, in `corpus.tokens` `[rows]`. At a separator nothing is read.
        sentences: Numbers of the sentences whose actions are asked for `[rows]`, each of its position's
            document and none before the sentence that holds the position.

    Returns:
        Log-probabilities in nats, `[rows, actions]`.

    Raises:
        ProbekitError: A position is not in the sentence's document or lies behind the sentence, the planted
            settings are not those of the corpus, or the tokenizer does not cut words apart.
    """
    documents, document = np.unique(corpus.document_of(sentences), return_inverse=True)
    model, forms = _known(config.corpus.planted, corpus.tokenizer)
    words = _words(model, corpus, documents)
    layout = Layout.of(words, documents, forms, corpus)
    beginning = corpus.document_tokens[documents[document]] + 1
    unit = np.searchsorted(layout.start, np.maximum(positions, beginning), side="right") - 1
    read = positions - layout.start[unit] + 1  # tokens of the unit; none at the separator
    sentence = layout.sentence[unit]
    ahead = sentences - corpus.document_sentences[documents[document]] - sentence
    wrong = (positions < beginning - 1) | (layout.document[unit] != document) | (ahead < 0)
    if wrong.any():
        row = int(wrong.argmax())
        raise ProbekitError(
            f"position {positions[row]} is not in the document of sentence {sentences[row]} or behind that "
            "sentence; a ceiling is for positions within the sentence or before it"
        )
    log_likelihood = _log_likelihood(model, forms, layout, unit, read)
    with np.errstate(divide="ignore"):
        return np.log(posterior_at(model, words, document, sentence, log_likelihood, ahead))


@lru_cache(maxsize=2)
def _known(settings: PlantedSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[PlantedModel, Forms]:
    """The planted model, and its words as tokens; it is asked for anew for every few documents."""
    model = PlantedModel.draw(settings)
    return model, Forms.of(model, tokenizer)


def _log_likelihood(
    model: PlantedModel, forms: Forms, layout: Layout, unit: np.ndarray, read: np.ndarray
) -> np.ndarray:
    """Log-probability under each action of what is read of a sentence, `[rows, actions]`.

    Args:
        model: What the documents were drawn from.
        forms: The model's words as tokens.
        layout: The documents as words and full stops.
        unit: The word or full stop that is read last `[rows]`.
        read: How many of its tokens are read `[rows]`.
    """
    with np.errstate(divide="ignore"):
        log_emission = np.log(model.emission.T)
    log_likelihood = np.zeros((len(unit), len(model.emission)))
    first = layout.first[unit]
    for word in range(int((unit - first).max(initial=0))):
        rows = np.flatnonzero(first + word < unit)
        log_likelihood[rows] += log_emission[layout.form[first[rows] + word] % forms.vocabulary]
    last = np.flatnonzero((read > 0) & (layout.form[unit] != forms.stop))
    log_likelihood[last] += forms.log_likelihood(model.emission, layout.form[unit[last]], read[last])
    return log_likelihood


def _words(model: PlantedModel, corpus: Corpus, documents: np.ndarray) -> list[list[np.ndarray]]:
    """Word ids of the sentences of documents."""
    return [model.parse(corpus.texts.row(int(document))["text"]) for document in documents]
