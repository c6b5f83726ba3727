"""Ceilings: exact posteriors of the planted corpus, lined up with the sentences and tokens of a built corpus.

Three predictors know the planted model and differ in what they have read of a document when they predict a
later sentence's action: "ceiling (actions)" the earlier sentences' true actions, "ceiling (words)" their
words, and "ceiling (tokens read)" all tokens up to a position, which may lie within a sentence or a word. No
probe or planner should beat its ceiling beyond chance; the gap to it is the result.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from probekit.config import Config, PlantedSettings
from probekit.errors import ProbekitError
from probekit.planted.corpus import FloatArray, IntArray, PlantedModel
from probekit.planted.posteriors import posterior_at, posterior_given_actions, posterior_given_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


BuiltCorpus = Any
"""A `probekit.data.corpus.Corpus`; not imported here, because `data` imports `planted`."""


def has_ceiling(config: Config) -> bool:
    """Whether the actions are planted, so that the best possible prediction is known."""
    return config.actions.labels == "planted"


def ceiling_log_probabilities(
    config: Config, corpus: BuiltCorpus, documents: np.ndarray, horizon: int = 1
) -> dict[str, np.ndarray]:
    """Exact log-posteriors of sentences' actions given the earlier sentences of their documents.

    Args:
        config: Settings of a planted corpus.
        corpus: The built corpus.
        documents: Numbers of the documents.
        horizon: 1 for the next sentence's action, 2 for that of the one after it.

    Returns:
        For "ceiling (actions)", given the earlier sentences' true actions, and "ceiling (words)", given their
        words alone: `[sentences, actions]` for all sentences of the documents in order. Row j is about
        sentence j + horizon - 1 given the sentences before j.
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
    config: Config, corpus: BuiltCorpus, positions: np.ndarray, sentences: np.ndarray
) -> np.ndarray:
    """Exact log-posterior of a sentence's action given the tokens up to and including a position.

    The predictor knows how many sentences ahead of the position the sentence is, but not how many tokens. A
    probe fitted at one distance knows that too, which is worth a hundredth of a bit where words have several
    tokens.

    A word of which only some tokens are read is evidence by the probability of all words whose tokens begin
    with those, and so is a word that is read whole while no token after it is. The number of words of a
    sentence does not depend on its action, so the full stop is no evidence, and neither is the line break
    after an example, which has a known number of sentences. A space that is a token of its own, as before a
    rare capital, is evidence of the next sentence's first word, and so of the sentence before.

    Args:
        config: Settings of a planted corpus.
        corpus: The built corpus.
        positions: Where reading ends, in `corpus.tokens` `[rows]`. At a separator nothing is read.
        sentences: Numbers of the sentences whose actions are predicted `[rows]`, each in the document of its
            position and none that ends before the position, but for white space.

    Returns:
        Log-probabilities in nats, `[rows, actions]`.

    Raises:
        ProbekitError: A position is not in the sentence's document or lies after the sentence, the planted
            settings are not those of the corpus, or the tokenizer does not separate words.
    """
    documents, document = np.unique(corpus.document_of(sentences), return_inverse=True)
    model, forms = _model_and_forms(config.corpus.planted, corpus.tokenizer)
    words = _words(model, corpus, documents)
    units = Units.of(words, documents, forms, corpus, model.example_length)

    beginning = corpus.document_tokens[documents[document]] + 1
    unit = np.searchsorted(units.start, np.maximum(positions, beginning), side="right") - 1
    own = sentences - corpus.document_sentences[documents[document]]
    ended = np.flatnonzero(
        (units.sentence[unit] == own + 1)
        & (units.document[unit] == document)
        & (positions < corpus.first_token[np.minimum(sentences + 1, len(corpus.first_token) - 1)])
    )
    space = forms.log_likelihood(units.form[unit[ended]], positions[ended] - units.start[unit[ended]] + 1)
    unit[ended] -= 1  # the full stop
    read = positions - units.start[unit] + 1  # tokens of the unit; none at the separator
    sentence = units.sentence[unit]
    ahead = own - sentence
    wrong = (positions < beginning - 1) | (units.document[unit] != document) | (ahead < 0)
    if wrong.any():
        row = int(wrong.argmax())
        raise ProbekitError(
            f"position {positions[row]} is not in the document of sentence {sentences[row]} or after that "
            "sentence; a ceiling is for positions within the sentence or before it"
        )

    # The sentence that holds the position: its words that are read whole, then the unit that is read last.
    log_likelihood = np.zeros((len(unit), len(model.emission)))
    first = units.first[unit]
    with np.errstate(divide="ignore"):
        log_emission = np.log(model.emission.T)
        for word in range(int((unit - first).max(initial=0))):
            rows = np.flatnonzero(first + word < unit)
            log_likelihood[rows] += log_emission[units.form[first[rows] + word] % len(model.words)]
        last = np.flatnonzero((read > 0) & (units.form[unit] < forms.stop))
        log_likelihood[last] += forms.log_likelihood(units.form[unit[last]], read[last])
        if len(ended):
            log_likelihood = np.repeat(log_likelihood[None], len(model.prior), axis=0)
            # A space is before a sentence of the same example: before another there is a line break.
            log_likelihood[:, ended] += np.log(np.einsum("tab,rb->tra", model.transition, np.exp(space)))
        return np.log(posterior_at(model, words, document, sentence, log_likelihood, ahead))


@dataclass(frozen=True)
class Forms:
    """Every planted word as tokens in each of its forms, and the full stop.

    A word has four forms: at the start of a document and of another line it has a capital and no space before
    it, at the start of any other sentence a capital, elsewhere none. The nth form of a word, counted from 0,
    is form `n * vocabulary + word`, and the last two forms are the full stop and that which ends a line, with
    the line break after it.

    Attributes:
        tokens: Tokens of each form.
        prefix: For every form, and each number of its tokens read, the row of `prefix_log_likelihood`; one
            form after the other `[tokens]`.
        starts: Form f begins at `starts[f]` of `prefix` `[forms + 1]`.
        prefix_log_likelihood: Log-probability under each action of all words that begin with the tokens read,
            `[prefixes, actions]`.
    """

    tokens: list[tuple[int, ...]]
    prefix: IntArray
    starts: IntArray
    prefix_log_likelihood: FloatArray

    @classmethod
    def of(cls, model: PlantedModel, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Tokenises every word as it stands in a document: alone, it might have other tokens."""
        capitals = [word.capitalize() for word in model.words]
        encoded = tokenizer(
            [
                f"{first}.\n{first}. {first} {word}."
                for first, word in zip(capitals, model.words, strict=True)
            ],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
        )
        pieces = []
        for word, ids, offsets in zip(
            model.words, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            # The word, the end of a line, the word, a full stop, the capital word, the word, a full stop; a
            # token belongs to the piece in which it begins.
            ends = np.cumsum([len(word), 2, len(word), 1, 1 + len(word), 1 + len(word), 1])
            piece = np.searchsorted(ends, [start for start, _ in offsets], side="right")
            pieces.append([tuple(np.array(ids)[piece == number].tolist()) for number in range(len(ends))])
        tokens = [of_word[piece] for piece in (0, 2, 4, 5) for of_word in pieces]
        tokens += [pieces[0][piece] for piece in (6, 1)]

        vocabulary = len(model.words)
        likelihood: dict[tuple[int, tuple[int, ...]], FloatArray] = defaultdict(
            lambda: np.zeros(len(model.emission))
        )
        prefixes = [
            (form // vocabulary, read[: count + 1])
            for form, read in enumerate(tokens)
            for count in range(len(read))
        ]
        starts = np.cumsum([0, *map(len, tokens)])
        forms = np.repeat(np.arange(len(tokens)), np.diff(starts))
        for prefix, form in zip(prefixes, forms.tolist(), strict=True):
            likelihood[prefix] += model.emission[:, form % vocabulary]
        number = {prefix: row for row, prefix in enumerate(likelihood)}
        with np.errstate(divide="ignore"):
            log_likelihood = np.log(np.stack([*likelihood.values()]))
        return cls(tokens, np.array([number[prefix] for prefix in prefixes]), starts, log_likelihood)

    @property
    def stop(self) -> int:
        """The form that is the full stop."""
        return len(self.tokens) - 2

    def log_likelihood(self, form: IntArray, read: IntArray) -> FloatArray:
        """Log-probability under each action of a word's first tokens: of all words that begin with them.

        Args:
            form: The word's form `[rows]`.
            read: How many of its tokens are read, at least one `[rows]`.

        Returns:
            In nats, `[rows, actions]`.
        """
        return self.prefix_log_likelihood[self.prefix[self.starts[form] + read - 1]]


@dataclass(frozen=True)
class Units:
    """Documents as units, which are words and full stops, one document after the other; arrays `[units]`.

    Attributes:
        form: The unit's form.
        start: Its first token, in `corpus.tokens`.
        document: Its document, counted among those given.
        sentence: Its sentence, counted from 0 in the document.
        first: First unit of its sentence.
    """

    form: IntArray
    start: IntArray
    document: IntArray
    sentence: IntArray
    first: IntArray

    @classmethod
    def of(
        cls,
        words: list[list[IntArray]],
        documents: IntArray,
        forms: Forms,
        corpus: BuiltCorpus,
        example: int | None = None,
    ) -> Self:
        """Lines documents up with the corpus's tokens.

        Args:
            words: Word ids of the sentences of each document.
            documents: The documents' numbers in the corpus, sorted.
            forms: The words as tokens.
            corpus: The built corpus.
            example: Sentences of an example, which is a line; None: a document is one line.

        Raises:
            ProbekitError: The tokens of a document are not those of its words one by one.
        """
        vocabulary = forms.stop // 4
        lengths = np.diff(forms.starts)
        columns: dict[str, list[IntArray]] = defaultdict(list)
        units = 0
        for document, (sentences, number) in enumerate(zip(words, documents.tolist(), strict=True)):
            form = [np.append(sentence + 3 * vocabulary, forms.stop) for sentence in sentences]
            for position, sentence in enumerate(form):
                begins_line = position % (example or len(form)) == 0
                sentence[0] -= vocabulary * (1 + begins_line + (position == 0))
                if begins_line and position:
                    form[position - 1][-1] += 1
            sizes = np.array([len(sentence) for sentence in form])
            whole = np.concatenate(form)
            begin, end = (int(bound) for bound in corpus.document_tokens[number : number + 2])
            expected = [token for unit in whole.tolist() for token in forms.tokens[unit]]
            if not np.array_equal(expected, corpus.tokens[begin + 1 : end]):
                raise ProbekitError(
                    f"{corpus.folder}: the tokens of document {number} are not those of its words one by "
                    "one, so no ceiling is known within a word; use an LM whose tokenizer cuts at spaces and "
                    "full stops"
                )
            columns["form"].append(whole)
            columns["start"].append(begin + 1 + np.cumsum(lengths[whole]) - lengths[whole])
            columns["document"].append(np.full(len(whole), document))
            columns["sentence"].append(np.repeat(np.arange(len(sizes)), sizes))
            columns["first"].append(units + np.repeat(np.cumsum(sizes) - sizes, sizes))
            units += len(whole)
        return cls(**{name: np.concatenate(parts) for name, parts in columns.items()})


@lru_cache(maxsize=2)
def _model_and_forms(
    settings: PlantedSettings, tokenizer: PreTrainedTokenizerBase
) -> tuple[PlantedModel, Forms]:
    """The planted model and its words as tokens; cached, for one call sees few documents."""
    model = PlantedModel.draw(settings)
    return model, Forms.of(model, tokenizer)


def _words(model: PlantedModel, corpus: BuiltCorpus, documents: np.ndarray) -> list[list[np.ndarray]]:
    """Word ids of the sentences of documents."""
    return [model.parse(corpus.texts[int(document)].text) for document in documents]
