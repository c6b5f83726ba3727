"""Prompts: any text, beginnings of documents, and the plans for what is to come."""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from probekit.config import user_path
from probekit.data.corpus import Corpus
from probekit.data.sentences import complete_spans, sentence_spans
from probekit.data.tokenizer import decoded, encoded
from probekit.errors import ProbekitError

Actions = Sequence[int] | np.ndarray
Plan = Literal["planner", "given"] | Actions
"""`planner`: the planner plans; `given`: each prompt has its own plan; or actions, for every prompt."""


@dataclass(frozen=True)
class Prompt:
    """A text to be continued.

    Attributes:
        tokens: Token ids, the separator first; the separator alone where text is to begin from nothing.
        text: The same as text, without the separator.
        plan: Actions of the sentences to come, first that of the sentence that the next token is in.
        document: The document of the corpus that it begins, -1 for none.
    """

    tokens: np.ndarray
    text: str
    plan: np.ndarray | None = None
    document: int = -1


def text_prompt(corpus: Corpus, text: str) -> Prompt:
    """A prompt of any text, which may be empty.

    A special token that is written out in the text, such as the separator, is plain text.

    Raises:
        ProbekitError: The text is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a command line can hold half a surrogate pair
        raise ProbekitError(f"a prompt is not valid Unicode at character {error.start}; correct it") from None
    ids = encoded(corpus.tokenizer, text)
    return Prompt(np.array([corpus.separator, *ids], dtype=np.int64), decoded(corpus.tokenizer, ids))


def document_prompts(
    corpus: Corpus,
    documents: np.ndarray,
    context: int,
    tokens: int,
    language: str = "en",
    most: int | None = None,
) -> tuple[list[Prompt], list[np.ndarray]]:
    """Beginnings of documents, and their true continuations.

    Args:
        corpus: The corpus.
        documents: Numbers of documents; those too short are passed over.
        context: A prompt ends at the first end of a sentence after this many tokens that the splitter finds
            without seeing what follows.
        tokens: Tokens of the true continuation; documents with fewer are too short.
        language: The setting `corpus.language`.
        most: As many prompts are enough; None: one for each document.

    Returns:
        The prompts, with the true actions from there on as their plans, and the continuations `[tokens]`.
    """
    prompts: list[Prompt] = []
    continuations: list[np.ndarray] = []
    for document in documents:
        if len(prompts) == most:
            break
        begin, end = corpus.document_tokens[document : document + 2]
        first, last = corpus.document_sentences[document : document + 2]
        for sentence in range(first + 1, last):
            cut = int(corpus.first_token[sentence])
            if cut + tokens > end:
                break
            text = decoded(corpus.tokenizer, corpus.tokens[begin + 1 : cut])
            complete = len(complete_spans(text, language)) == len(sentence_spans(text, language))
            if cut - begin - 1 >= context and complete:
                plan = corpus.actions[sentence:last].astype(np.int64)
                prompts.append(Prompt(corpus.tokens[begin:cut].astype(np.int64), text, plan, int(document)))
                continuations.append(corpus.tokens[cut : cut + tokens].astype(np.int64))
                break
    return prompts, continuations


def planned_prompts(
    corpus: Corpus, prompts: str | Prompt | Iterable[str | Prompt], plan: Plan
) -> list[Prompt]:
    """Texts or prompts, or a single one, as prompts that have a plan where plans are given.

    Raises:
        ProbekitError: Something is no prompt, or a plan is missing, empty, or has unknown actions.
    """
    single = isinstance(prompts, str) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0
    given: Any = [prompts] if single else prompts
    known: list[Prompt] = []
    for number, prompt in enumerate(given):
        if not isinstance(prompt, str | Prompt):
            raise ProbekitError(f"prompt {number} is a {type(prompt).__name__}; give a text or a Prompt")
        known.append(text_prompt(corpus, prompt) if isinstance(prompt, str) else prompt)
    if not isinstance(plan, str):
        actions = _checked(corpus, plan, "the plan")
        return [replace(prompt, plan=actions) for prompt in known]
    if plan not in ("planner", "given"):
        raise ProbekitError(f"plan is {plan!r}; give planner, given, or actions such as [12, 7, 7]")
    if plan == "planner":
        return known
    return [
        replace(prompt, plan=_checked(corpus, prompt.plan, f"the plan of prompt {number}"))
        for number, prompt in enumerate(known)
    ]


def _checked(corpus: Corpus, plan: object, name: str) -> np.ndarray:
    """The actions of a plan: at least one, and each known to the codebook."""
    try:
        actions = [operator.index(action) for action in plan]  # type: ignore[attr-defined]
    except TypeError:
        actions = []
    if not actions:
        raise ProbekitError(f"{name} is {plan!r}; give the action of a sentence or more, such as [12, 7, 7]")
    if unknown := [action for action in actions if not 0 <= action < corpus.k]:
        raise ProbekitError(
            f"{name} has the action {unknown[0]}, which the codebook lacks; its actions go from 0 to "
            f"{corpus.k - 1}"
        )
    return np.array(actions, dtype=np.int64)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a file: a line each or, where the name ends in `.jsonl`, the `text` of each line.

    Raises:
        ProbekitError: The file cannot be read, is empty, or a line holds no text.
    """
    try:
        text = user_path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ProbekitError(f"--prompts {path}: cannot be read as UTF-8 text ({error}); convert it") from None
    # Not splitlines: JSON may hold characters that only Unicode takes for line breaks.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ProbekitError(f"--prompts {path}: holds no prompt; give one a line")
    if Path(path).suffix != ".jsonl":
        return [line for _, line in lines]
    texts = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ProbekitError(f'--prompts {path}: line {number} is no JSON object with a "text"')
        texts.append(row["text"])
    return texts
