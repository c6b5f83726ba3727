"""Multiple-choice questions: which sentence comes next in a document, or whatever a file asks.

A corpus's own questions offer the true next sentence and three others of the same document, so that neither
the topic nor the style tells them apart. None of these can be ruled out by its surface: all four stand
between the same white space, such as line breaks, and none has been read before.
"""

from __future__ import annotations

import json
import string
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from probekit.corpus.store import Corpus
from probekit.errors import ProbekitError
from probekit.evaluation.drafts import decoded
from probekit.evaluation.prompts import text_prompt

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
        context = text_prompt(self.corpus, text.rstrip()).tokens
        space = text[len(text.rstrip()) :]
        choices = tuple(self._behind(text.rstrip(), context, space, choice) for choice in texts)
        for i, ids in enumerate(choices):
            if any(np.array_equal(ids, other) for other in choices[:i]):
                raise self._wrong(f"choice {_shown(texts[i])} is there twice, in tokens; make it another")
        return Question(context, choices, answer, number)

    def _behind(self, text: str, context: np.ndarray, space: str, choice: str) -> np.ndarray:
        """Ids of a choice, cut behind those of the question where the tokenizer does not merge the two."""
        choice = space + choice if space or choice[0].isspace() else f" {choice}"
        whole = text_prompt(self.corpus, text + choice).tokens
        if len(whole) > len(context) and np.array_equal(whole[: len(context)], context):
            return whole[len(context) :]
        return text_prompt(self.corpus, choice).tokens[1:]

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
