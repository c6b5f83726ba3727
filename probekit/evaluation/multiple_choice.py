"""Multiple choice: whether an LM finds the true choice less surprising than the others.

A choice's loss is the mean over its tokens, in nats, so that short and long choices compare. All choices of a
question are read after the same context. A conditioned model plans from the context alone, as in generation:
all tokens of a choice carry the action that is planned for the next sentence before it is known.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probekit.config import BosRule, ModelName, user_path
from probekit.data.corpus import Corpus
from probekit.data.tokenizer import decoded, encoded
from probekit.data.windows import IGNORE, Batch
from probekit.errors import ProbekitError
from probekit.evaluation.perplexity import TokenLosses, window_and_stride
from probekit.models.decoding import GrowingText, read_windows
from probekit.models.generation_state import Constant, GenerationState, conditioner_of
from probekit.models.mixing import Mixing, Precomputed
from probekit.progress import Task
from probekit.run.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHOICES = 4
"""Choices of a question that is made from a corpus."""


class TooShortError(ProbekitError):
    """A corpus has no document that is long enough to be asked about."""


@dataclass(frozen=True)
class Question:
    """A question with several choices, one of them true.

    Attributes:
        context: Token ids, the separator first.
        choices: Token ids of each choice, as they stand after the context.
        answer: Which of them is true.
        document: The document that it comes from; of a file, the line, as if each question were a document.
    """

    context: np.ndarray
    choices: tuple[np.ndarray, ...]
    answer: int
    document: int

    @property
    def longest(self) -> int:
        """Tokens of the longest choice."""
        return max(map(len, self.choices))


def corpus_questions(
    corpus: Corpus, documents: np.ndarray, count: int, window: int, seed: int
) -> list[Question]:
    """Questions which sentence of a document comes next.

    They depend on nothing but the arguments, and those of a smaller `count` are the first of a larger one's.
    Wrong choices come from the text after the true one, and where it has too few also from before the window.

    Args:
        corpus: The corpus.
        documents: Numbers of documents, which are asked about in turn.
        count: How many are asked, if the documents have so many.
        window: Tokens that the LM reads at once. A choice has at most half as many.
        seed: Of the order of documents, of the sentences that are asked for, and of all choices.

    Raises:
        TooShortError: No question can be asked about any document.
    """
    order = np.random.default_rng(seed).permutation(documents)
    turns = deque(_document_questions(corpus, int(document), window, seed) for document in order)
    questions: list[Question] = []
    while turns and len(questions) < count:
        of_document = turns.popleft()
        if (question := next(of_document, None)) is not None:
            questions.append(question)
            turns.append(of_document)
    if not questions:
        raise TooShortError(
            f"none of {len(documents)} documents has a sentence that could be asked for: there must be one "
            f"before it and {CHOICES - 1} others outside the {window} tokens that the LM reads, all of them "
            f"different and of at most {window // 2} tokens; give longer documents or your own questions "
            "(evaluation.questions_file)"
        )
    return questions


def _document_questions(corpus: Corpus, document: int, window: int, seed: int) -> Iterator[Question]:
    """All questions that can be asked about a document, in random order."""
    rng = np.random.default_rng([seed, document])
    start = int(corpus.document_tokens[document])
    sentences = _sentences(corpus, document)
    for asked in (1 + rng.permutation(max(len(sentences) - 1, 0))).tolist():
        if wrong := _wrong_choices(sentences, asked, window, rng):
            true, answer = sentences[asked], int(rng.integers(CHOICES))
            context = np.array(corpus.tokens[start : start + true.begin], dtype=np.int64)
            choices = [*wrong[:answer], true, *wrong[answer:]]
            ids = tuple(np.array(choice.ids, dtype=np.int64) for choice in choices)
            yield Question(context, ids, answer, document)


class _Sentence(NamedTuple):
    """A sentence of a document.

    Attributes:
        begin: Where its tokens begin, counted from the document's separator.
        ids: Its tokens.
        text: Its text without surrounding white space.
        spaces: The white space before and after it in the text, and at both ends of its own tokens.
    """

    begin: int
    ids: tuple[int, ...]
    text: str
    spaces: tuple[str, str, str, str]

    @property
    def end(self) -> int:
        return self.begin + len(self.ids)


def _sentences(corpus: Corpus, document: int) -> list[_Sentence]:
    start, end = corpus.document_tokens[document : document + 2].tolist()
    own = slice(*corpus.document_sentences[document : document + 2])
    bounds = [*corpus.first_token[own].tolist(), end]
    text = corpus.texts[document].text
    sentences, space = [], ""
    for (a, b), first, last in zip(corpus.spans[own].tolist(), bounds[:-1], bounds[1:], strict=True):
        span = text[a:b]
        before, space = space + _leading(span), _trailing(span)
        ids = tuple(corpus.tokens[first:last].tolist())
        held = decoded(corpus.tokenizer, ids)
        spaces = (before, space, _leading(held), _trailing(held))
        sentences.append(_Sentence(first - start, ids, span.strip(), spaces))
    return sentences


def _leading(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _trailing(text: str) -> str:
    return text[len(text.rstrip()) :]


def _wrong_choices(
    sentences: Sequence[_Sentence], asked: int, window: int, rng: np.random.Generator
) -> list[_Sentence]:
    """Wrong choices for a sentence; empty if there are too few."""
    true = sentences[asked]
    # Of the longest text that is read, all but the last token is an input.
    read_from = true.end - 1 - window
    read = {sentence.text for sentence in sentences[:asked] if sentence.end > read_from}
    before = [i for i in range(asked) if sentences[i].end <= read_from]
    behind = range(asked + 1, len(sentences))
    if true.text in read or len(true.ids) > window // 2:
        return []
    found = [true]
    for i in (*rng.permutation(behind), *rng.permutation(before)):
        other = sentences[int(i)]
        # Where tokens are unknown to the tokenizer, different texts have the same ids.
        new = all(other.text != one.text and other.ids != one.ids for one in found)
        fits = other.spaces == true.spaces and len(other.ids) <= window // 2
        if new and fits and other.text not in read:
            found.append(other)
        if len(found) == CHOICES:
            return found[1:]
    return []


def read_questions(path: str | Path, corpus: Corpus) -> list[Question]:
    """The questions of a file, one to a line of JSON.

    A line has a `question`, its `choices`, a list of texts, and the `answer`, the number of the true choice
    counted from 0. A choice is read after the question, after a space where there is no white space.

    Args:
        path: The file, UTF-8.
        corpus: Whose tokenizer and separator are used.

    Raises:
        ProbekitError: The file cannot be read or holds no question, or a line is no question.
    """
    name = f"evaluation.questions_file {path}"
    try:
        text = user_path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ProbekitError(f"{name}: cannot be read as UTF-8 text ({error})") from None
    # Not splitlines: JSON may hold characters that only Unicode takes for line breaks.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ProbekitError(f"{name}: holds no question; give one a line, as JSON")
    return [_parsed(line, number, corpus, f"{name}, line {number}") for number, line in lines]


def _parsed(line: str, number: int, corpus: Corpus, where: str) -> Question:
    """The question of a line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not {"question", "choices", "answer"} <= row.keys():
        raise ProbekitError(f"{where}: is no JSON object with question, choices and answer: {shown(line)}")
    question, texts, answer = row["question"], row["choices"], row["answer"]
    if not is_text(question):
        raise ProbekitError(f"{where}: question is {shown(question)}; give a text that is not blank")
    if not isinstance(texts, list) or len(texts) < 2 or not all(map(is_text, texts)):
        raise ProbekitError(f"{where}: choices is {shown(texts)}; give a list of two texts or more")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        raise ProbekitError(
            f"{where}: answer is {shown(answer)}; give the number of a choice, from 0 to {len(texts) - 1}"
        )
    context, choices = encoded_choices(corpus.tokenizer, corpus.separator, question, texts, where)
    return Question(context, choices, answer, number)


def encoded_choices(
    tokenizer: PreTrainedTokenizerBase, separator: int, question: str, texts: Sequence[str], where: str
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The tokens of a question, the separator first, and those of each choice as they stand after it.

    A choice is read after a space where there is no white space; after an empty question it is read as it is.

    Args:
        tokenizer: The LM's.
        separator: The token before a text.
        question: What is read before each choice.
        texts: The choices.
        where: What the question is called in messages.

    Raises:
        ProbekitError: Two choices have the same tokens.
    """
    asked, space = question.rstrip(), _trailing(question)
    context = [separator, *encoded(tokenizer, asked)]
    choices: list[list[int]] = []
    for text in texts:
        choice = space + text if space or not asked or text[0].isspace() else f" {text}"
        whole = [separator, *encoded(tokenizer, asked + choice)]
        # The tokens after the question's own, unless the tokenizer merges the two.
        apart = len(whole) > len(context) and whole[: len(context)] == context
        ids = whole[len(context) :] if apart else encoded(tokenizer, choice)
        if ids in choices:
            raise ProbekitError(
                f"{where}: choice {shown(text)} has the same tokens as another; give different ones"
            )
        choices.append(ids)
    return np.array(context), tuple(np.array(ids, dtype=np.int64) for ids in choices)


def is_text(value: object) -> bool:
    """Whether a value is a text that is not blank, without half a surrogate pair, which JSON can spell."""
    return isinstance(value, str) and value.strip() != "" and not re.search("[\ud800-\udfff]", value)


def shown(value: object) -> str:
    """A value in ASCII, on one line and not too long."""
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def check_lengths(questions: Sequence[Question], window: int) -> None:
    """Refuses questions with a choice that is longer than the window, in tokens.

    Raises:
        ProbekitError: Names the first one.
    """
    for question in questions:
        if question.longest > window:
            raise ProbekitError(
                f"a question of document or line {question.document} has a choice of {question.longest} "
                f"tokens, but the LM reads {window} at once; a choice may have {window} at most"
            )


def choice_losses(
    run: Run, name: ModelName, questions: Sequence[Question], token_losses: TokenLosses, task: Task
) -> np.ndarray:
    """Mean next-token loss of each choice given its context.

    Args:
        run: The run.
        name: The model whose variant conditions the LM.
        questions: At least one. Of a context, the last tokens are read, as many as fit beside the question's
            longest choice.
        token_losses: The losses of that model or of its layers. The mixing of their batches gives the
            embeddings that condition them.
        task: Is advanced by questions.

    Returns:
        Nats `[readers, questions, choices]`; infinite where a question has fewer choices than others.

    Raises:
        ProbekitError: A choice is longer than the window, or the model is not trained.
    """
    (window, _), size = window_and_stride(run), run.config.evaluation.batch_size
    check_lengths(questions, window)
    variant, precision = run.variant_of(name), run.config.training.precision
    condition = conditioner_of(run.model(name), variant, partial(run.encoder, variant), precision)

    def conditioned(contexts: Sequence[np.ndarray]) -> list[GrowingText]:
        if isinstance(condition, Constant):  # which needs no sentences of what is not read
            contexts = [np.append(context[:1], context[1:][-window:]) for context in contexts]
        states = [
            GenerationState(context.tolist(), run.corpus.tokenizer, run.config.corpus.language)
            for context in contexts
        ]
        condition(states)
        return [state.text for state in states]

    def losses(batch: Batch, mixing: Mixing) -> Tensor:
        with run.autocast():
            return token_losses(batch, mixing)

    reader = ChoiceReader(losses, conditioned, window, run.corpus.bos_rule, size, run.device)
    return reader.summed_losses(questions, task) / choice_lengths(questions)


def choice_lengths(questions: Sequence[Question]) -> np.ndarray:
    """Tokens of each choice `[questions, choices]`, 1 where a question has fewer choices than others."""
    lengths = np.ones((len(questions), max(len(question.choices) for question in questions)), np.int64)
    for row, question in zip(lengths, questions, strict=True):
        row[: len(question.choices)] = [len(ids) for ids in question.choices]
    return lengths


@dataclass(frozen=True)
class ChoiceReader:
    """How choices are read, whatever conditions the LM.

    Attributes:
        token_losses: The losses of the LM, or of its layers.
        conditioned: Makes texts of contexts, with the embeddings that their positions carry.
        window: Most tokens that are read at once.
        bos: Where the LM reads the separator; if never, it is read where there is nothing else.
        batch_size: Choices in one forward pass.
        device: Where to compute.
    """

    token_losses: TokenLosses
    conditioned: Callable[[Sequence[np.ndarray]], Sequence[GrowingText]]
    window: int
    bos: BosRule
    batch_size: int
    device: torch.device

    @torch.no_grad()
    def summed_losses(self, questions: Sequence[Question], task: Task) -> np.ndarray:
        """Next-token losses of each choice given its context, summed over its tokens.

        Args:
            questions: At least one, none with a choice longer than the window.
            task: Is advanced by questions.

        Returns:
            Nats `[readers, questions, choices]`; infinite where a question has fewer choices than others.
        """
        losses: dict[tuple[int, int], np.ndarray] = {}
        # Contexts of about the same length share a batch, so that little is padded.
        order = np.argsort([len(question.context) for question in questions], kind="stable").tolist()
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            texts = self.conditioned([questions[number].context for number in numbers])
            readings = [
                reading
                for number, text in zip(numbers, texts, strict=True)
                for reading in _readings(number, questions[number], text, self.window, self.bos)
            ]
            readings.sort(key=lambda reading: len(reading.text.tokens))
            for first in range(0, len(readings), self.batch_size):
                part = readings[first : first + self.batch_size]
                losses |= {
                    (r.question, r.choice): row for r, row in zip(part, self._summed(part), strict=True)
                }
            task.advance(len(numbers))
        most = max(len(question.choices) for question in questions)
        table = np.full((len(losses[0, 0]), len(questions), most), np.inf)
        for (number, choice), row in losses.items():
            table[:, number, choice] = row
        return table

    def _summed(self, readings: Sequence[_Reading]) -> np.ndarray:
        """Summed loss of each choice `[readings, readers]`."""
        read = read_windows([reading.text for reading in readings], self.window, self.device)
        targets = torch.full(read.tokens.shape, IGNORE)
        for row, reading in enumerate(readings):
            end = len(reading.text.tokens)
            targets[row, end - len(reading.ids) : end] = torch.from_numpy(reading.ids)
        losses = self.token_losses(read.batch(targets.to(self.device)), Precomputed(read.embeddings))
        return losses.double().sum(dim=-1).cpu().numpy().T


class _Reading(NamedTuple):
    """A choice after its context, as it is read.

    Attributes:
        question: Number of its question.
        choice: Its number among the question's choices.
        text: The inputs: what is kept of the context, and all of the choice but its last token.
        ids: The targets of the last inputs: the choice.
    """

    question: int
    choice: int
    text: GrowingText
    ids: np.ndarray


def _readings(
    number: int, question: Question, context: GrowingText, window: int, bos: BosRule
) -> Iterator[_Reading]:
    """The choices of a question after its context, which is cut from the left."""
    kept = min(window + 1 - question.longest, len(context.tokens) - (bos == "none"))
    tokens, carried = context.tokens[-kept:], context.carried[-kept:]
    if bos == "every-window":
        tokens[0] = context.tokens[0]
    for choice, ids in enumerate(question.choices):
        inputs = [*tokens, *ids[:-1].tolist()]
        text = GrowingText(inputs, carried + carried[-1:] * (len(ids) - 1), context.embeddings)
        yield _Reading(number, choice, text, ids)


def solved(losses: np.ndarray, questions: Sequence[Question]) -> np.ndarray:
    """Whether the answer alone has the lowest loss `[readers, questions]`.

    Args:
        losses: Of each choice `[readers, questions, choices]`.
        questions: The questions.
    """
    is_answer = np.arange(losses.shape[-1]) == np.array([question.answer for question in questions])[:, None]
    own = losses[:, is_answer]
    return own < np.where(is_answer, np.inf, losses).min(axis=-1)


def by_document(values: np.ndarray, questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
    """Values of questions `[readers, questions]`, summed by document.

    Returns:
        Sums `[documents, readers]` and numbers of questions `[documents]`; documents are sorted.
    """
    _, row = np.unique([question.document for question in questions], return_inverse=True)
    sums = np.stack([np.bincount(row, weights=reader) for reader in values], axis=1)
    return sums, np.bincount(row)
