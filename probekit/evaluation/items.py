"""Items of a forced choice: a table of contexts and choices, and the questions that they are to an LM."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.config import CorpusSettings, user_path
from probekit.config.types import TABLE_ENDINGS
from probekit.data.readers import as_written, read_records
from probekit.errors import ProbekitError
from probekit.evaluation.multiple_choice import Question, encoded_choices, is_text, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("context", "choices", "answer", "kind", "group", "score")
"""Columns of a table of items; choices may also be in `choice0`, `choice1` and so on."""

CHOICE = re.compile(r"choice\d+")

ALL_KINDS = "all kinds"
"""What a table of results calls the items of all kinds."""


@dataclass(frozen=True)
class Item:
    """A row of a table of items.

    Attributes:
        where: Where it is, for messages.
        context: What is read before each choice; may be empty.
        choices: Two texts or more.
        answer: The number of the true one; None where none is true.
        kind: What it is an item of, such as a phenomenon; None where the table has no kinds.
        group: Items of one group are resampled together.
        score: A number that people gave it, NaN where there is none.
    """

    where: str
    context: str
    choices: tuple[str, ...]
    answer: int | None
    kind: str | None
    group: str
    score: float


def read_items(path: str | Path, encoding: str = "utf-8") -> list[Item]:
    """Reads a table of items: CSV, TSV, JSON lines or Parquet.

    Args:
        path: The table.
        encoding: Of a table that is text.

    Raises:
        ProbekitError: The table cannot be read, holds no item, or lacks a column; or a row is no item.
    """
    file = user_path(path)
    if not file.name.lower().endswith(TABLE_ENDINGS):
        raise ProbekitError(f"--items is {str(path)!r}; a table ends in {', '.join(TABLE_ENDINGS[:-2])}")

    def choose(columns: Sequence[str]) -> list[str]:
        _check_spelling(columns, str(file))
        found = [name for name in columns if name in COLUMNS or CHOICE.fullmatch(name or "")]
        if not any(name.startswith("choice") for name in found):
            raise ProbekitError(
                f"{file}: no column 'choices' (or 'choice0', 'choice1', ...); it has "
                f"{', '.join(map(str, columns)) or 'none'}"
            )
        return found

    items = [
        _item(where, record)
        for where, _, record in read_records(file, CorpusSettings(encoding=encoding), choose)
    ]
    if not items:
        raise ProbekitError(f"{file}: holds no item; give one a row")
    for name in ("answer", "kind"):
        lacking = [item for item in items if getattr(item, name) is None]
        if 0 < len(lacking) < len(items):
            raise ProbekitError(
                f"{lacking[0].where}: no {name!r}, which {len(items) - len(lacking):,} rows have; give it in "
                "all rows, or in none"
            )
    return items


def _item(where: str, record: object) -> Item:
    """The item of a row."""
    if not isinstance(record, Mapping):
        raise ProbekitError(f"{where}: {type(record).__name__} where a JSON object should be")
    _check_spelling([*record], where)
    context = "" if record.get("context") is None else record["context"]
    if not isinstance(context, str) or (context and not is_text(context)):
        raise ProbekitError(f"{where}: 'context' is {shown(context)}; give a text, or leave it empty")
    choices = _choices(where, record)
    kind, group, answer, score = (
        _written(where, repr(name), record.get(name)) for name in ("kind", "group", "answer", "score")
    )
    if answer is not None and not (re.fullmatch(r"\d{1,9}", answer) and int(answer) < len(choices)):
        raise ProbekitError(
            f"{where}: 'answer' is {shown(answer)}; give the number of a choice, from 0 to {len(choices) - 1}"
        )
    if kind == ALL_KINDS:
        raise ProbekitError(f"{where}: 'kind' is {kind!r}, as results call all of them; give another name")
    return Item(
        where,
        context,
        choices,
        None if answer is None else int(answer),
        kind,
        # Copies are one observation, in whatever order their choices stand.
        json.dumps([context, *sorted(choices)]) if group is None else group,
        _score(where, score),
    )


def _check_spelling(columns: Sequence[str | None], where: str) -> None:
    """Refuses a column that lacks a letter of one of an item's, or has two of them in the wrong order."""
    numbered = any(CHOICE.fullmatch(name or "") for name in columns)
    lacking = [name for name in COLUMNS if name not in columns and not (name == "choices" and numbered)]
    for name, wanted in itertools.product(filter(None, columns), lacking):
        letters = [*itertools.combinations(wanted, len(name))] if len(name) == len(wanted) - 1 else []
        if name[0] == wanted[0] and (tuple(name) in letters or sorted(name) == sorted(wanted)):
            raise ProbekitError(f"{where}: column {name!r} is not read; did you mean {wanted!r}?")


def _choices(where: str, record: Mapping[str, Any]) -> tuple[str, ...]:
    listed = record.get("choices")
    if listed is None:
        named = sorted((name for name in record if CHOICE.fullmatch(name)), key=lambda name: int(name[6:]))
        if named != [f"choice{number}" for number in range(len(named))]:
            raise ProbekitError(f"{where}: choices are in {', '.join(named)}; number them from choice0 on")
        listed = [record[name] for name in named]
        while listed and as_written(listed[-1]) is None:  # of other rows, which have more
            listed.pop()
    if isinstance(listed, str | Mapping) or not hasattr(listed, "__iter__"):
        raise ProbekitError(
            f"{where}: 'choices' is {shown(listed)}; give a list of texts, or columns choice0, choice1, ..."
        )
    choices = tuple(_written(where, "a choice", value) or "" for value in listed)
    if len(choices) < 2:
        raise ProbekitError(f"{where}: an item with {len(choices)} choices; give two or more")
    for choice in choices:
        if not is_text(choice):
            raise ProbekitError(f"{where}: a choice is {shown(choice)}; give a text that is not blank")
        if choices.count(choice) > 1:
            raise ProbekitError(f"{where}: two choices are {shown(choice)}; give different ones")
    return choices


def _written(where: str, name: str, value: object) -> str | None:
    """One value of a table as text; None where it is empty."""
    if isinstance(value, list | dict):
        raise ProbekitError(f"{where}: {name} is {shown(value)}; give one value")
    return as_written(value)


def _score(where: str, written: str | None) -> float:
    if written is None:
        return math.nan
    try:
        score = float(written)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ProbekitError(f"{where}: 'score' is {shown(written)}; give a number, or leave it empty")
    return score


def asked(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, separator: int, window: int
) -> list[Question]:
    """The questions that an LM is asked, one for each item; where nothing is true, the first choice is named.

    Args:
        items: The items.
        tokenizer: The LM's.
        separator: The token before a text.
        window: Most tokens that the LM reads at once.

    Raises:
        ProbekitError: Two choices of an item have the same tokens, or it is longer than the window.
    """
    questions = []
    for number, item in enumerate(items):
        context, choices = encoded_choices(tokenizer, separator, item.context, item.choices, item.where)
        question = Question(context, choices, item.answer or 0, number)
        if (tokens := len(context) + question.longest - 1) > window:
            raise ProbekitError(
                f"{item.where}: the context and its longest choice have {tokens:,} tokens, but the LM reads "
                f"{window:,} at once; shorten them"
            )
        questions.append(question)
    return questions
