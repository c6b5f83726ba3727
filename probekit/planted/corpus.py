"""A synthetic corpus with a known plan.

A document has a hidden type. Its sentences' actions are a Markov chain whose transitions depend on the type,
and a sentence's words are drawn independently from its action's distribution. A document may also hold
several examples of its type, a line each, and in each the chain starts anew. Because this plan is known, the
best possible prediction of a later action can be computed (`posteriors.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from probekit.config import PlantedSettings
from probekit.errors import ProbekitError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

TOPICS = tuple(
    tuple(line.split()) for line in Path(__file__).with_name("topics.txt").read_text("utf-8").splitlines()
)
"""English words by topic, the most typical first; all are distinct, and none can be made of `SYLLABLES`."""

SYLLABLES = tuple(consonant + vowel for consonant in "bdlmnrstv" for vowel in "aiou")
"""What words are made of when those of the topics are used up."""


@dataclass(frozen=True, eq=False)
class PlantedModel:
    """The distributions that documents are drawn from; redrawn from the settings, hence never saved.

    Attributes:
        prior: Probability of a document type, [types].
        initial: Probability of the first sentence's action, [types, actions].
        transition: Probability of the next action after an action, [types, actions, actions]. Every row has
            `successors` nonzero entries, drawn from all actions: an action may follow itself.
        emission: Probability of a word in a sentence of an action, [actions, vocabulary].
        words: The vocabulary; a word's id is its position.
        example_length: Sentences of an example; None where a document is one example, of any length.
    """

    prior: FloatArray
    initial: FloatArray
    transition: FloatArray
    emission: FloatArray
    words: tuple[str, ...]
    example_length: int | None = None

    @classmethod
    def draw(cls, settings: PlantedSettings) -> Self:
        """Draws the model of these settings, whatever the number and the lengths of documents."""
        rng, _ = _generators(settings.seed)
        types, actions = settings.types, settings.actions
        prior = rng.dirichlet(np.full(types, 10.0))  # unequal, but no type is rare
        initial = rng.dirichlet(np.ones(actions), size=types)
        every_action = np.broadcast_to(np.arange(actions), (types, actions, actions))
        successors = rng.permuted(every_action, axis=-1)[..., : settings.successors]
        transition = np.zeros((types, actions, actions))
        shares = rng.dirichlet(np.ones(settings.successors), size=(types, actions))
        np.put_along_axis(transition, successors, shares, axis=-1)
        emission = rng.dirichlet(np.full(settings.vocabulary, settings.concentration), size=actions)
        length = settings.sentences[0] if settings.examples > 1 else None
        return cls(prior, initial, transition, emission, _name_words(emission, rng), length)

    def begins(self, sentence: int) -> bool:
        """Whether a sentence, counted from 0 in its document, is the first one of an example."""
        return sentence == 0 if self.example_length is None else sentence % self.example_length == 0

    def step(self, sentence: int) -> FloatArray:
        """Probability of the action after that of a sentence, counted from 0, [types, actions, actions]."""
        if self.begins(sentence + 1):
            return np.broadcast_to(self.initial[:, None, :], self.transition.shape)
        return self.transition

    def spell(self, sentence: Iterable[int]) -> str:
        """The text of a sentence of words."""
        return " ".join(self.words[word] for word in sentence).capitalize() + "."

    def parse(self, text: str) -> list[IntArray]:
        """Word ids of each sentence of a planted document.

        Raises:
            ProbekitError: A word is not in this model's vocabulary.
        """
        sentences = [sentence.split() for sentence in text.lower().split(".") if sentence.strip()]
        try:
            return [np.array([self._ids[word] for word in sentence]) for sentence in sentences]
        except KeyError as error:
            raise ProbekitError(
                f"the word {error} is not in the planted vocabulary: use the corpus.planted settings that "
                "generated the text"
            ) from None

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


class PlantedDocument(NamedTuple):
    """A document's text, the action of each of its sentences, and its hidden type."""

    text: str
    actions: tuple[int, ...]
    type: int


@dataclass(frozen=True, eq=False)
class PlantedCorpus:
    """Generated documents, flat, with offsets.

    Attributes:
        model: What they were drawn from.
        types: Hidden type of each document, [documents].
        actions: Action of each sentence of all documents, [sentences].
        document_starts: Document d's sentences begin at `document_starts[d]`, [documents + 1].
        words: Word ids of all sentences, [words].
        sentence_starts: Sentence s's words begin at `sentence_starts[s]`, [sentences + 1].
    """

    model: PlantedModel
    types: IntArray
    actions: IntArray
    document_starts: IntArray
    words: IntArray
    sentence_starts: IntArray

    def documents(self) -> Iterator[PlantedDocument]:
        """The documents one by one; their texts are made as they are needed."""
        bounds = itertools.pairwise(self.document_starts.tolist())
        for hidden_type, (first, last) in zip(self.types.tolist(), bounds, strict=True):
            starts = self.sentence_starts[first : last + 1].tolist()
            sentences = [self.model.spell(self.words[a:b].tolist()) for a, b in itertools.pairwise(starts)]
            size = self.model.example_length or len(sentences)
            lines = (" ".join(sentences[at : at + size]) for at in range(0, len(sentences), size))
            yield PlantedDocument("\n".join(lines), tuple(self.actions[first:last].tolist()), hidden_type)


def generate(settings: PlantedSettings) -> PlantedCorpus:
    """Draws the model and its documents; the same settings always give the same corpus."""
    model = PlantedModel.draw(settings)
    _, rng = _generators(settings.seed)
    lengths = rng.integers(*settings.sentences, size=settings.documents * settings.examples, endpoint=True)
    types = rng.choice(settings.types, size=settings.documents, p=model.prior)
    actions = _draw_actions(model, np.repeat(types, settings.examples), settings.sentences[1], rng)
    actions = actions[np.arange(settings.sentences[1]) < lengths[:, None]]
    word_counts = rng.integers(*settings.words, size=len(actions), endpoint=True)
    words = _draw(_cumulative(model.emission), np.repeat(actions, word_counts), rng)
    document_starts = _offsets(lengths)[:: settings.examples]
    return PlantedCorpus(model, types, actions, document_starts, words, _offsets(word_counts))


def _generators(seed: int) -> list[np.random.Generator]:
    """One for the model and one for the documents, so that more documents leave the model as it is."""
    return np.random.default_rng(seed).spawn(2)


def _name_words(emission: FloatArray, rng: np.random.Generator) -> tuple[str, ...]:
    """Distinct words: English ones by topic for the most telling, made-up ones for what is left.

    An action has a topic, and a word comes from the topic of the action under which it is most probable, as
    long as any are left, so that a person sees what a sentence is about. Names change nothing that is drawn.
    """
    words = _made_up_words(emission.shape[1], rng)
    left = [[*reversed(topic)] for topic in TOPICS]
    for word in np.argsort(-emission.max(axis=0), kind="stable").tolist():
        by_likelihood = np.argsort(-emission[:, word], kind="stable") % len(TOPICS)
        topic = next((left[t] for t in [*by_likelihood.tolist(), *range(len(TOPICS))] if left[t]), None)
        if topic is None:
            break
        words[word] = topic.pop()
    return tuple(words)


def _made_up_words(vocabulary: int, rng: np.random.Generator) -> list[str]:
    """Distinct words, all of the same number of syllables: two, or as many as it takes."""
    syllables = next(n for n in itertools.count(2) if len(SYLLABLES) ** n >= vocabulary)
    codes = rng.choice(len(SYLLABLES) ** syllables, size=vocabulary, replace=False)
    digits = np.unravel_index(codes, (len(SYLLABLES),) * syllables)
    return ["".join(word) for word in np.array(SYLLABLES)[np.stack(digits, axis=1)]]


def _draw_actions(model: PlantedModel, types: IntArray, sentences: int, rng: np.random.Generator) -> IntArray:
    """[examples, sentences]: a chain of actions for each example."""
    actions = np.empty((len(types), sentences), dtype=np.int64)
    actions[:, 0] = _draw(_cumulative(model.initial), types, rng)
    width = len(model.emission)
    cumulative = _cumulative(model.transition.reshape(-1, width))
    for j in range(1, sentences):
        actions[:, j] = _draw(cumulative, types * width + actions[:, j - 1], rng)
    return actions


def _cumulative(probabilities: FloatArray) -> FloatArray:
    """Cumulative rows, row r from r to r + 1: flattened, they are one sorted array for `_draw` to search."""
    cumulative = probabilities.cumsum(axis=1)
    return cumulative / cumulative[:, -1:] + np.arange(len(probabilities))[:, None]


def _draw(cumulative: FloatArray, rows: IntArray, rng: np.random.Generator) -> IntArray:
    """An outcome from `cumulative[row]` for each of `rows`; never one of probability zero."""
    # Rounding could push a point onto the next row, whence the bound.
    points = np.minimum(rows + rng.random(rows.shape), np.nextafter(rows + 1.0, 0.0))
    return np.searchsorted(cumulative.ravel(), points, side="right") - rows * cumulative.shape[1]


def _offsets(counts: IntArray) -> IntArray:
    """Where each run of `counts` begins, and the end."""
    return np.concatenate([[0], counts.cumsum()])
