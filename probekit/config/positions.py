"""Positions: where a probe reads, in or near the range of tokens that its example labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

NamedPosition = Literal["first", "last", "mean"]

Position = int | NamedPosition
"""A whole number d reads the token d before the first one of the range: 1 the one right before it, 0 itself,
-1 the one after it. `first` and `last` read those tokens of the range, `mean` the mean over all of them."""

FARTHEST = 2**31
"""Positions are nearer than this."""

NAMED: tuple[NamedPosition, ...] = get_args(NamedPosition)


def as_position(value: object) -> Position:
    """The position of a setting, a column of a table or a saved probe's name.

    Raises:
        ValueError: It is none.
    """
    for name in NAMED:
        if value == name:
            return name
    try:
        number = int(str(value))
        if abs(number) < FARTHEST:
            return number
        raise ValueError
    except ValueError:
        raise ValueError(
            f"{value!r} is no position; give {', '.join(NAMED)}, or a number of tokens before the first"
        ) from None


def nearest(names: Iterable[str]) -> str:
    """The position nearest before the range if there is one, else the first one in or after it, or named."""

    def place(name: str) -> tuple[bool, bool, int]:
        position = as_position(name)
        if isinstance(position, str):
            return True, True, NAMED.index(position)
        return False, position <= 0, abs(position)

    return min(names, key=place)


def reading_order(names: Iterable[str]) -> list[str]:
    """Different positions from left to right: far before near, then `first`, `last` and `mean`."""

    def place(name: str) -> tuple[bool, int]:
        position = as_position(name)
        return (True, NAMED.index(position)) if isinstance(position, str) else (False, -position)

    return sorted(set(names), key=place)
