"""Multiple choice: whether an LM finds the true choice less surprising than the others.

A choice's loss is the mean of its tokens' losses behind the context, in nats: short and long choices are then
alike. All choices of a question are read behind the same context. What conditions it is made as in
generation, from the context alone: all tokens of a choice carry the action that is planned for the next
sentence before it is known.
"""

from __future__ import annotations

import json
import string
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from probekit.config import ModelName
from probekit.data.corpus import Corpus
from probekit.data.windows import IGNORE
from probekit.distributed import autocast
from probekit.errors import ProbekitError
from probekit.evaluation.perplexity import TokenLosses, window_and_stride
from probekit.models.decoding import Known, Text, read_windows
from probekit.models.replanning import Constant, Draft, conditioner_of, decoded, encoded
from probekit.progress import Task
from probekit.run.run import Run
from probekit.statistics import Intervals, Resampling, bootstrap_ratios

CHOICES = 4
"""Choices of a question that a corpus asks."""

# Characters of a value that a message quotes.
_SHOWN = 60


class TooShortError(ProbekitError):
    """A corpus has no document that is long enough to be asked about."""


@dataclass(frozen=True)
class Question:
    """A question with several choices, one of them true.

    Attributes:
        context: Ids that are read, the separator first.
        choices: Ids of each choice, as they stand behind the context.
        answer: Which of them is true.
        document: The document that it comes from; of a file, the line: each question is its own document.
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
    The wrong choices stand behind the true one where enough do, else also before what is read.

    Args:
        corpus: The corpus.
        documents: Numbers of documents, which are asked about in turn.
        count: How many are asked, if the documents have so many.
        window: Tokens that the LM reads at once. A choice has at most half as many.
        seed: Of the order of documents, of the sentences that are asked for, and of all choices.

    Raises:
        TooShortError: No document has sentences enough.
    """
    order = np.random.default_rng(seed).permutation(documents)
    asking = deque(_Asker(corpus, int(document), window, seed).questions() for document in order)
    questions: list[Question] = []
    while asking and len(questions) < count:
        asker = asking.popleft()
        if (question := next(asker, None)) is not None:
            questions.append(question)
            asking.append(asker)
    if not questions:
        raise TooShortError(
            f"none of {len(documents)} documents has a sentence that could be asked for: there must be one "
            f"before it and {CHOICES - 1} others outside the {window} tokens that the LM reads, all of them "
            f"different and of at most {window // 2} tokens; give longer documents or your own questions "
            "(evaluation.questions_file)"
        )
    return questions


@dataclass(frozen=True)
class _Sentence:
    """A sentence of a document.

    Attributes:
        begin: Where its tokens begin, counted from the document's separator.
        ids: Its tokens.
        text: Its text without surrounding white space.
        spaces: The white space before and behind it, whichever sentences' tokens it is in.
        own: The white space at the beginning and end of its own tokens.
    """

    begin: int
    ids: tuple[int, ...]
    text: str
    spaces: tuple[str, str]
    own: tuple[str, str]

    @property
    def end(self) -> int:
        return self.begin + len(self.ids)


@dataclass(frozen=True)
class _Asker:
    """Asks about one document."""

    corpus: Corpus
    document: int
    window: int
    seed: int

    def questions(self) -> Iterator[Question]:
        """All questions that can be asked, in random order."""
        rng = np.random.default_rng([self.seed, self.document])
        start = int(self.corpus.document_tokens[self.document])
        for asked in 1 + rng.permutation(max(len(self._sentences) - 1, 0)):
            if wrong := self._wrong(int(asked), rng):
                true, answer = self._sentences[asked], int(rng.integers(CHOICES))
                context = np.array(self.corpus.tokens[start : start + true.begin], dtype=np.int64)
                choices = [*wrong[:answer], true, *wrong[answer:]]
                ids = tuple(np.array(choice.ids, dtype=np.int64) for choice in choices)
                yield Question(context, ids, answer, self.document)

    def _wrong(self, asked: int, rng: np.random.Generator) -> list[_Sentence]:
        """Wrong choices for a sentence, or nothing."""
        sentences, true = self._sentences, self._sentences[asked]
        # What is read at most: of the longest text, all but the last token is.
        read_from = true.end - 1 - self.window
        read = {sentence.text for sentence in sentences[:asked] if sentence.end > read_from}
        before = [i for i in range(asked) if sentences[i].end <= read_from]
        behind = range(asked + 1, len(sentences))
        if true.text in read or len(true.ids) > self.window // 2:
            return []
        found = [true]
        for i in (*rng.permutation(behind), *rng.permutation(before)):
            other = sentences[int(i)]
            alike = (other.spaces, other.own) == (true.spaces, true.own)
            fits = alike and len(other.ids) <= self.window // 2
            if fits and other.text not in read and _is_new(other, found):
                found.append(other)
            if len(found) == CHOICES:
                return found[1:]
        return []

    @cached_property
    def _sentences(self) -> list[_Sentence]:
        corpus = self.corpus
        start, end = corpus.document_tokens[self.document : self.document + 2].tolist()
        own = slice(*corpus.document_sentences[self.document : self.document + 2])
        places = [*corpus.first_token[own].tolist(), end]
        text = corpus.texts.row(self.document)["text"]
        sentences, space = [], ""
        for (a, b), first, last in zip(corpus.spans[own].tolist(), places[:-1], places[1:], strict=True):
            span = text[a:b]
            before, space = space + _leading(span), span[len(span.rstrip()) :]
            ids = tuple(corpus.tokens[first:last].tolist())
            held = decoded(corpus.tokenizer, ids)
            own_spaces = _leading(held), held[len(held.rstrip()) :]
            sentences.append(_Sentence(first - start, ids, span.strip(), (before, space), own_spaces))
        return sentences


def _leading(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _is_new(sentence: _Sentence, others: Sequence[_Sentence]) -> bool:
    # Where tokens are unknown, different texts have the same ids.
    return all(sentence.text != other.text and sentence.ids != other.ids for other in others)


def read_questions(path: str | Path, corpus: Corpus) -> list[Question]:
    """The questions of a file, one to a line of JSON.

    A line has a `question`, its `choices`, a list of texts, and the `answer`: its number, counted from 0, its
    text, or its letter, A for the first. Lines as ARC has them (Clark et al. 2018, arXiv 1803.05457) are
    taken too: `choices` with `text` and `label`, and `answerKey`, a label. A choice is read behind the
    question, and a space between them where there is no white space.

    Args:
        path: The file, UTF-8.
        corpus: Whose tokenizer and separator are used.

    Raises:
        ProbekitError: The file cannot be read or holds no question, or a line is no question.
    """
    name = f"evaluation.questions_file {path}"
    try:
        text = Path(path).expanduser().read_text("utf-8-sig")
    except (OSError, RuntimeError) as error:  # the latter where ~ is nobody's home
        reason = getattr(error, "strerror", None) or error
        raise ProbekitError(f"{name}: cannot be read ({reason}); give a file of JSON lines") from None
    except UnicodeDecodeError as error:
        raise ProbekitError(f"{name}: is not UTF-8 from byte {error.start} on; give UTF-8 text") from None
    # Not splitlines: JSON may hold line breaks that only Unicode takes for such.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ProbekitError(f"{name}: holds no question; give one a line, as JSON")
    return [_Line(f"{name}, line {number}", corpus).question(line, number) for number, line in lines]


@dataclass(frozen=True)
class _Line:
    """Makes a question of a file's line.

    Attributes:
        where: What messages call the line.
        corpus: Whose tokenizer and separator are used.
    """

    where: str
    corpus: Corpus

    def question(self, line: str, number: int) -> Question:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise self._wrong(
                f"{_shown(line.strip())} is no JSON object; give one with question, choices and answer"
            )
        for key in ("question", "choices"):
            if key not in row:
                raise self._wrong(f"has no {key!r}, only {_shown(list(row))}; add it")
        text = self._text(row["question"], "question")
        texts, labels = self._choices(row["choices"])
        answer = self._answer(row, texts, labels)
        context = np.array([self.corpus.separator, *encoded(self.corpus.tokenizer, text.rstrip())])
        space = text[len(text.rstrip()) :]
        choices = tuple(self._behind(text.rstrip(), context, space, choice) for choice in texts)
        for i, ids in enumerate(choices):
            if any(np.array_equal(ids, other) for other in choices[:i]):
                raise self._wrong(f"choice {_shown(texts[i])} is there twice, in tokens; make it another")
        return Question(context, choices, answer, number)

    def _behind(self, text: str, context: np.ndarray, space: str, choice: str) -> np.ndarray:
        """Ids of a choice, cut behind those of the question where the tokenizer does not merge the two."""
        choice = space + choice if space or choice[0].isspace() else f" {choice}"
        whole = np.array([self.corpus.separator, *encoded(self.corpus.tokenizer, text + choice)])
        if len(whole) > len(context) and np.array_equal(whole[: len(context)], context):
            return whole[len(context) :]
        return np.array(encoded(self.corpus.tokenizer, choice), dtype=np.int64)

    def _choices(self, choices: object) -> tuple[list[str], list[str]]:
        """Texts and labels."""
        # Choices behind the last letter have none.
        texts, labels = choices, list(string.ascii_uppercase)
        if labelled := isinstance(choices, dict):
            if not {"text", "label"} <= choices.keys():
                raise self._wrong(f"choices has {_shown(list(choices))}; it must have text and label")
            texts, labels = choices["text"], choices["label"]
        if not isinstance(texts, list) or len(texts) < 2:
            raise self._wrong(f"choices is {_shown(texts)}; give a list of two texts or more")
        known = [self._text(text, f"choice {i}") for i, text in enumerate(texts)]
        bare = [text.strip() for text in known]
        if repeated := [text for i, text in enumerate(bare) if text in bare[:i]]:
            raise self._wrong(f"choice {_shown(repeated[0])} is there twice; make it another")
        if not labelled:
            return known, labels[: len(known)]
        named = [label for label in labels if isinstance(label, str)] if isinstance(labels, list) else []
        if labels != named or not len(named) == len(set(named)) == len(known):
            raise self._wrong(
                f"label is {_shown(labels)}; give a list of {len(known)} different texts, one for each choice"
            )
        return known, named

    def _answer(self, row: dict[str, object], texts: list[str], labels: list[str]) -> int:
        keys = [key for key in ("answer", "answerKey") if key in row]
        if len(keys) != 1:
            what = "has both answer and answerKey" if keys else f"has no 'answer', only {_shown(list(row))}"
            raise self._wrong(f"{what}; give one answer")
        (key,) = keys
        value, right = row[key], f"one of {_shown(labels)}"
        if key == "answer":
            right = f"a number from 0 to {len(texts) - 1}, the text of a choice, or {right}"
        found = self._named(key, value, texts, labels)
        if len(found) > 1:
            raise self._wrong(
                f"{key} {_shown(value)} is the text of one choice and the letter of another; give its number"
            )
        if not found:
            raise self._wrong(f"{key} is {_shown(value)}; it must be {right}")
        return found.pop()

    def _named(self, key: str, value: object, texts: list[str], labels: list[str]) -> set[int]:
        """The choices that an answer may mean."""
        if isinstance(value, int) and not isinstance(value, bool):
            return {value} & set(range(len(texts))) if key == "answer" else set()
        if not isinstance(value, str):
            return set()
        named = {i for i, label in enumerate(labels) if label == value.strip()}
        if key == "answer":
            named |= {i for i, text in enumerate(texts) if text.strip() == value.strip()}
        return named

    def _text(self, value: object, name: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(f"{name} is {_shown(value)}; it must be a text, not an empty one")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._wrong(f"{name} is {_shown(value)}, with half a surrogate pair; correct it") from None
        return value

    def _wrong(self, what: str) -> ProbekitError:
        return ProbekitError(f"{self.where}: {what}")


def _shown(value: object) -> str:
    """A value, ASCII, on one line and not too long."""
    shown = ascii(value)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."


@dataclass(frozen=True)
class _Reading:
    """A choice behind its context, as it is read.

    Attributes:
        question: Which question's.
        choice: Which choice of it.
        text: The inputs: what is kept of the context, and all of the choice but its last token.
        ids: The choice: the targets of the last inputs.
    """

    question: int
    choice: int
    text: Text
    ids: np.ndarray


def choice_losses(
    run: Run, name: ModelName, questions: Sequence[Question], token_losses: TokenLosses, task: Task
) -> np.ndarray:
    """Mean next-token loss of each choice given its context.

    Args:
        run: The run.
        name: The model that is conditioned, as `run.model` has it; `none` is not.
        questions: At least one. Of a context, the last tokens are read, as many as fit beside the question's
            longest choice.
        token_losses: Reads batches with that model. They are already conditioned: the mixing gives their
            embeddings.
        task: Is advanced by questions.

    Returns:
        Nats `[readers, questions, choices]`; infinite where a question has fewer choices than others.

    Raises:
        ProbekitError: A choice leaves no room for a context, or the model is not trained.
    """
    (window, _), size = window_and_stride(run), run.config.evaluation.batch_size
    check_lengths(questions, window)
    variant = run.variant_of(name)
    conditioned = conditioner_of(
        run.model(name), variant, partial(run.encoder, variant), run.config.training.precision
    )
    losses: dict[tuple[int, int], np.ndarray] = {}
    # Contexts of a length go together, so that little is padded.
    order = np.argsort([len(question.context) for question in questions], kind="stable").tolist()
    with torch.no_grad():
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            contexts = [questions[number].context for number in numbers]
            if isinstance(conditioned, Constant):  # no need to find the sentences of what is not read
                contexts = [context[-window:] for context in contexts]
            drafts = [
                Draft(context.tolist(), run.corpus.tokenizer, run.config.corpus.language)
                for context in contexts
            ]
            conditioned(drafts)
            readings = [
                reading
                for number, draft in zip(numbers, drafts, strict=True)
                for reading in _readings(number, questions[number], draft.text, window)
            ]
            readings.sort(key=lambda reading: len(reading.text.tokens))
            for first in range(0, len(readings), size):
                part = readings[first : first + size]
                found = _mean_losses(run, part, window, token_losses)
                losses |= {(r.question, r.choice): row for r, row in zip(part, found, strict=True)}
            task.advance(len(numbers))
    most = max(len(question.choices) for question in questions)
    table = np.full((len(losses[0, 0]), len(questions), most), np.inf)
    for (number, choice), row in losses.items():
        table[:, number, choice] = row
    return table


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


def _readings(number: int, question: Question, context: Text, window: int) -> Iterator[_Reading]:
    """The choices of a question behind its context, which is cut from the left."""
    kept = window + 1 - question.longest
    tokens, carried = context.tokens[-kept:], context.carried[-kept:]
    for choice, ids in enumerate(question.choices):
        text = Text(
            [*tokens, *ids[:-1].tolist()], carried + carried[-1:] * (len(ids) - 1), context.embeddings
        )
        yield _Reading(number, choice, text, ids)


def _mean_losses(
    run: Run, readings: Sequence[_Reading], window: int, token_losses: TokenLosses
) -> np.ndarray:
    """Mean loss of each choice `[readings, readers]`."""
    read = read_windows([reading.text for reading in readings], window, run.device)
    targets = torch.full(read.tokens.shape, IGNORE)
    for row, reading in enumerate(readings):
        end = len(reading.text.tokens)
        targets[row, end - len(reading.ids) : end] = torch.from_numpy(reading.ids)
    with autocast(run.device, run.config.training.precision):
        losses = token_losses(read.batch(targets.to(run.device)), Known(read.embeddings))
    sums = losses.double().sum(dim=-1).cpu().numpy()
    return (sums / [len(reading.ids) for reading in readings]).T


def solved(losses: np.ndarray, questions: Sequence[Question]) -> np.ndarray:
    """Whether the answer has the lowest loss; where another choice has the same, it has not.

    Args:
        losses: Of each choice `[readers, questions, choices]`.
        questions: The questions.

    Returns:
        `[readers, questions]`.
    """
    is_answer = np.arange(losses.shape[-1]) == np.array([question.answer for question in questions])[:, None]
    own = losses[:, is_answer]
    return own < np.where(is_answer, np.inf, losses).min(axis=-1)


def by_document(values: np.ndarray, questions: Sequence[Question]) -> tuple[np.ndarray, np.ndarray]:
    """Values summed over the questions of each document, as `statistics` takes them.

    Args:
        values: Of each question `[readers, questions]`.
        questions: The questions.

    Returns:
        Sums `[documents, readers]` and numbers of questions `[documents]`; documents are sorted.
    """
    _, row = np.unique([question.document for question in questions], return_inverse=True)
    counts = np.bincount(row)
    sums = np.stack([np.bincount(row, weights=reader) for reader in values], axis=1)
    return sums, counts


def accuracy(
    solved: np.ndarray, questions: Sequence[Question], **resampling: Unpack[Resampling]
) -> Intervals:
    """Share of questions that each reader solved, resampled over documents; a cell is a reader.

    Args:
        solved: What `solved` gives `[readers, questions]`.
        questions: The questions.
        **resampling: See `Resampling`.
    """
    return bootstrap_ratios(*by_document(solved, questions), **resampling)
