"""A report before it is written: sections of paragraphs, tables, pictures and commands.

What a report says is made once, of these parts; `report_html` and `report_markdown` write it. All text in
them is plain text: to show it as it is, whatever it holds, is the renderers' work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from unicodedata import category

CAUTIONS = "What to mind"
"""Heading of the cautions."""

CALM = "Nothing was found that speaks against the results."
"""What stands there where there are none."""

HIDDEN = "\N{REPLACEMENT CHARACTER}"
"""What stands for a character that cannot be seen."""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of lines."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: What it shows.
        columns: Their names.
        rows: Cells of every row.
        words: How many columns, from the left, are words; the others are numbers.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: Part of a file's name.
        caption: What it shows.
        alt: The same for whoever does not see it, with what is to be read off.
        svg: The picture itself.
    """

    name: str
    caption: str
    alt: str
    svg: bytes


@dataclass(frozen=True)
class Code:
    """Commands or settings, line by line."""

    text: str
    language: str


@dataclass(frozen=True)
class Fold:
    """Parts that are shown when they are asked for."""

    title: str
    blocks: tuple[Block, ...]


Block = Paragraph | Items | Table | Picture | Code | Fold


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """A whole report.

    Attributes:
        title: Its heading.
        cautions: What to mind before anything below is believed.
        sections: All else.
    """

    title: str
    cautions: tuple[str, ...]
    sections: tuple[Section, ...]


def table(caption: str, columns: Iterable[str], rows: Iterable[Iterable[object]], words: int = 1) -> Table:
    """A table of whatever can be shown as text; whole numbers get thousands separators."""
    cells = tuple(tuple(_cell(value) for value in row) for row in rows)
    return Table(caption, tuple(columns), cells, words)


def fold_if(many: bool, title: str, block: Block) -> Block:
    """A block as it is, or folded where it is too much to be read in passing."""
    return Fold(title, (block,)) if many else block


def estimate(value: float | None, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """A value with its 95 % interval, to the digits that the interval leaves a meaning.

    These are two digits of its half width. Nothing where there is no value.
    """
    if value is None or math.isnan(value):
        return ""
    sign = "+" if signed else "-"
    if low is None or high is None or not math.isfinite(half := (high - low) / 2):
        return f"{value:{sign}.4g} (no interval)"
    decimals = min(6, max(0, 1 - math.floor(math.log10(half)))) if half > 0 else 3
    number = f"{{:{sign}z,.{decimals}f}}"
    return f"{number} [{number}, {number}]".format(value, low, high)


def visible(text: str) -> str:
    """The text with a mark in place of whatever cannot be seen: control characters, turns of direction."""
    return "".join(c if c.isprintable() or c in "\n\t" or category(c) == "Zs" else HIDDEN for c in text)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
