"""Multiple choice: whether an LM finds the true choice less surprising than the others.

A choice's loss is the mean of its tokens' losses behind the context, in nats: short and long choices are then
alike. All choices of a question are read behind the same context. What conditions it is made as in
generation, from the context alone: all tokens of a choice carry the action that is planned for the next
sentence before it is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch

from probekit.config import ModelName
from probekit.corpus.examples import IGNORE
from probekit.devices import autocast
from probekit.errors import ProbekitError
from probekit.evaluation.drafts import Constant, Draft
from probekit.evaluation.generation import conditioner
from probekit.evaluation.perplexity import TokenLosses, window_and_stride
from probekit.evaluation.questions import Question
from probekit.evaluation.statistics import Intervals, Resampling, bootstrap_ratios
from probekit.models.growing_text import Known, Text, read_windows
from probekit.progress import Task
from probekit.run import Run


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
    conditioned = conditioner(run, run.model(name), run.variant_of(name))
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
