"""What is continued: any text, beginnings of documents, and the plans for what is to come."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from probekit.data.corpus import Corpus
from probekit.data.sentences import complete_spans, sentence_spans
from probekit.errors import ProbekitError
from probekit.models.replanning import decoded, encoded

Actions = Sequence[int] | np.ndarray
Plan = Literal["planner", "given"] | Actions


@dataclass(frozen=True)
class Prompt:
    """What is continued.

    Attributes:
        tokens: Ids, the separator first; just the separator where text is to begin from nothing.
        text: The same as text, without the separator.
        plan: Actions of the sentences to come, first that of the sentence that the next token is in.
        document: The document of the corpus that it begins, -1 for none.
    """

    tokens: np.ndarray
    text: str
    plan: np.ndarray | None = None
    document: int = -1


def text_prompt(corpus: Corpus, text: str, plan: Actions | None = None) -> Prompt:
    """A prompt of any text, the empty one too, and any plan.

    What reads like a special token, such as the separator, is text like all else.

    Raises:
        ProbekitError: The plan is none, or the text no valid Unicode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell it, and a command line
        raise ProbekitError(
            f"a prompt has half a surrogate pair at character {error.start}; correct it"
        ) from None
    ids = encoded(corpus.tokenizer, text)
    actions = None if plan is None else _actions(corpus, plan, "the plan")
    return Prompt(np.array([corpus.separator, *ids], dtype=np.int64), decoded(corpus.tokenizer, ids), actions)


def document_prompts(
    corpus: Corpus, documents: np.ndarray, context: int, tokens: int, language: str = "en"
) -> tuple[list[Prompt], list[np.ndarray]]:
    """Beginnings of documents, and how they truly go on.

    Args:
        corpus: The corpus.
        documents: Numbers of documents; those too short are passed over.
        context: A prompt goes on to the first end of a sentence behind this many tokens, one that is told
            as such by what stands before it.
        tokens: Tokens of the true continuation, which has to have as many.
        language: The setting `corpus.language`.

    Returns:
        The prompts, with the true actions from there on as their plans, and the continuations `[tokens]`.
    """
    prompts, continuations = [], []
    for document in documents:
        begin, end = corpus.document_tokens[document : document + 2]
        first, last = corpus.document_sentences[document : document + 2]
        for sentence in range(first + 1, last):
            cut = int(corpus.first_token[sentence])
            if cut + tokens > end:
                break
            text = decoded(corpus.tokenizer, corpus.tokens[begin + 1 : cut])
            if cut - begin - 1 >= context and _is_over(text, language):
                plan = corpus.actions[sentence:last].astype(np.int64)
                prompts.append(Prompt(corpus.tokens[begin:cut].astype(np.int64), text, plan, int(document)))
                continuations.append(corpus.tokens[cut : cut + tokens].astype(np.int64))
                break
    return prompts, continuations


def planned_prompts(
    corpus: Corpus, prompts: str | Prompt | Iterable[str | Prompt], plan: Plan
) -> list[Prompt]:
    """What was asked for as prompts, each with its plan where plans are given.

    Args:
        corpus: The corpus.
        prompts: Texts or prompts, or a single one.
        plan: `planner`: none is needed; `given`: each has its own; or actions, for every prompt.

    Raises:
        ProbekitError: Something is no prompt, or a plan is missing, empty, or has unknown actions.
    """
    if not isinstance(prompts, Iterable) or isinstance(prompts, str):
        prompts = [prompts]
    known = [_prompt(corpus, prompt, number) for number, prompt in enumerate(prompts)]
    if not isinstance(plan, str):
        actions = _actions(corpus, plan, "the plan")
        return [replace(prompt, plan=actions) for prompt in known]
    if plan not in ("planner", "given"):
        raise ProbekitError(f"plan is {plan!r}; give planner, given, or actions such as [12, 7, 7]")
    if plan == "planner":
        return known
    return [
        replace(prompt, plan=_actions(corpus, prompt.plan, f"the plan of prompt {number}"))
        for number, prompt in enumerate(known)
    ]


def _prompt(corpus: Corpus, prompt: object, number: int) -> Prompt:
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return text_prompt(corpus, prompt)
    raise ProbekitError(f"prompt {number} is a {type(prompt).__name__}; give a text or a Prompt")


def _actions(corpus: Corpus, plan: object, name: str) -> np.ndarray:
    """Actions that the codebook has, at least one."""
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


def _is_over(text: str, language: str) -> bool:
    """Whether the last sentence of a text is complete."""
    return len(complete_spans(text, language)) == len(sentence_spans(text, language))
