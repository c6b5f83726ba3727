"""A report as Markdown, in GitHub's dialect, with the pictures in files beside it."""

from __future__ import annotations

import re
from functools import singledispatch
from urllib.parse import quote

from probekit.reports.document import (
    CALM,
    CAUTIONS,
    Block,
    Code,
    Fold,
    Items,
    Paragraph,
    Picture,
    Report,
    Table,
    visible,
)

ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}

SPECIAL = re.compile(
    r"[\\`*|~#$]"  # code, emphasis, cells, strikethrough, headings, formulas
    r"|(?<![^\W_])_|_(?![^\W_])"  # emphasis; inside a word it is a letter
    r"|!(?=\[)|\](?=[(\[:])"  # pictures, links and their definitions
)
"""What means something anywhere in a line."""

IN_BRACKETS = re.compile(rf"[\[\]]|{SPECIAL.pattern}")
"""What means something between brackets."""

LEADING = re.compile(r"^()([-+=]|\d+[.)])(?=[-=\s]|$)")
"""What means something at the beginning of one."""


def to_markdown(report: Report, pictures: dict[str, str]) -> str:
    """The whole text.

    Args:
        report: The report.
        pictures: Paths of the pictures' files by their names, from where the text is.
    """
    minded = Items(report.cautions) if report.cautions else Paragraph(CALM)
    parts = [f"# {text(report.title)}", f"## {CAUTIONS}", _block(minded, pictures)]
    for section in report.sections:
        parts += [f"## {text(section.title)}", *(_block(block, pictures) for block in section.blocks)]
    return "\n\n".join(parts) + "\n"


def text(plain: str, special: re.Pattern[str] = SPECIAL) -> str:
    """Plain text, on one line, as Markdown that shows it."""
    line = visible(re.sub(r"[ \t\r\n]+", " ", plain).strip())
    marked = special.sub(lambda found: f"\\{found[0]}", line)
    marked = re.sub("[&<>]", lambda found: ENTITIES[found[0]], marked)
    return LEADING.sub(lambda found: f"{found[1]}{found[2][:-1]}\\{found[2][-1]}", marked)


@singledispatch
def _block(block: Block, pictures: dict[str, str]) -> str:
    raise TypeError(block)


@_block.register
def _(block: Paragraph, pictures: dict[str, str]) -> str:
    return text(block.text)


@_block.register
def _(block: Items, pictures: dict[str, str]) -> str:
    return "\n".join(f"- {text(line)}" for line in block.lines)


@_block.register
def _(block: Table, pictures: dict[str, str]) -> str:
    sides = [":--" if column < block.words else "--:" for column in range(len(block.columns))]
    rows = [map(text, block.columns), sides, *(map(_cell, row) for row in block.rows)]
    return f"**{text(block.caption)}**\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


@_block.register
def _(block: Picture, pictures: dict[str, str]) -> str:
    return f"![{text(block.alt, IN_BRACKETS)}]({quote(pictures[block.name])})\n\n*{text(block.caption)}*"


@_block.register
def _(block: Code, pictures: dict[str, str]) -> str:
    longest = max(map(len, re.findall("`+", block.text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{block.language}\n{visible(block.text).rstrip()}\n{fence}"


@_block.register
def _(block: Fold, pictures: dict[str, str]) -> str:
    parts = [f"<details>\n<summary>{_html(block.title)}</summary>"]
    return "\n\n".join([*parts, *(_block(inner, pictures) for inner in block.blocks), "</details>"])


def _cell(cell: str) -> str:
    return "<br>".join(map(text, cell.split("\n")))


def _html(plain: str) -> str:
    return re.sub("[&<>]", lambda found: ENTITIES[found[0]], visible(plain))
