"""Positions: where a probe reads, in or near the range of tokens that its example labels."""

from __future__ import annotations

import re
from collections.abc import Iterable

Position = int | str
"""A whole number d reads the token d places before the first one of the range: 1 the one right before it, 0
that one itself, -1 the one after it. `first` and `last` read those tokens of the range, `last-1` the one
before the last and so on, `mean` the mean over all of them."""

FARTHEST = 2**31
"""Positions are nearer than this."""

NAMED = ("first", "last", "mean")


def before_last(position: Position) -> int | None:
    """How many tokens before the last one of the range a position is; None if it is not counted so."""
    found = re.fullmatch(r"last(?:-([1-9]\d{0,8}))?", str(position))
    return None if found is None else int(found[1] or 0)


def as_position(value: object) -> Position:
    """The position of a setting, a column of a table or a saved probe's name.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, str) and (value in NAMED or before_last(value)):
        return value
    if re.fullmatch(r"[+-]?\d+", str(value).strip()) and abs(number := int(str(value))) < FARTHEST:
        return number
    raise ValueError(
        f"{value!r} is no position; give {', '.join(NAMED)}, last-1 and so on, or a number of tokens "
        "before the first"
    )


def nearest(names: Iterable[str]) -> str:
    """The position nearest before the range if there is one, else the first one in or after it, or named."""

    def place(name: str) -> tuple[bool, bool, int, int]:
        position = as_position(name)
        if isinstance(position, str):
            return True, True, *_named_place(position)
        return False, position <= 0, abs(position), 0

    return min(names, key=place)


def reading_order(names: Iterable[str]) -> list[str]:
    """Different positions from left to right: far before near, then `first`, `last-1`, `last` and `mean`."""

    def place(name: str) -> tuple[bool, int, int]:
        position = as_position(name)
        return (True, *_named_place(position)) if isinstance(position, str) else (False, -position, 0)

    return sorted(set(names), key=place)


def _named_place(position: str) -> tuple[int, int]:
    """The place of a position with a name among all such."""
    return NAMED.index(position.partition("-")[0]), -(before_last(position) or 0)
