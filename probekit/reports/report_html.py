"""A report as one HTML file that needs nothing else: no script, no network, light and dark, for print too."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from functools import singledispatch
from html import escape
from pathlib import Path

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
    Section,
    Table,
    visible,
)

STYLE = Path(__file__).with_name("report.css")
"""How the page looks."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What the page may load: the pictures that are in it."""


def to_html(report: Report) -> str:
    """The whole page."""
    title = text(report.title)
    names = [CAUTIONS, *(section.title for section in report.sections)]
    links = "".join(f'<li><a href="#{_anchor(name)}">{text(name)}</a></li>' for name in names)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{STYLE.read_text('utf-8')}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{title}</h1>\n<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n<main>\n'
        f"{_cautions(report.cautions)}{''.join(map(_section, report.sections))}</main>\n</body>\n</html>\n"
    )


def text(plain: str) -> str:
    """Plain text as HTML that shows it."""
    return escape(visible(plain))


def _cautions(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{text(line)}</li>\n" for line in lines)
    body = f"<ul>\n{items}</ul>" if items else f"<p>{CALM}</p>"
    kind = "cautions" if items else "calm"
    name = _anchor(CAUTIONS)
    return f'<section class="{kind}" id="{name}">\n<h2>{CAUTIONS}</h2>\n{body}\n</section>\n'


def _section(section: Section) -> str:
    blocks = "".join(map(_block, section.blocks))
    return f'<section id="{_anchor(section.title)}">\n<h2>{text(section.title)}</h2>\n{blocks}</section>\n'


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(block)


@_block.register
def _(block: Paragraph) -> str:
    return f"<p>{text(block.text)}</p>\n"


@_block.register
def _(block: Items) -> str:
    return "<ul>\n" + "".join(f"<li>{text(line)}</li>\n" for line in block.lines) + "</ul>\n"


@_block.register
def _(block: Table) -> str:
    head = "".join(
        f'<th scope="col"{_side(block, column)}>{text(name)}</th>'
        for column, name in enumerate(block.columns)
    )
    rows = "".join(f"<tr>{_cells(block, row)}</tr>\n" for row in block.rows)
    caption = text(block.caption)
    # A region that scrolls has to be reached, and named, without a mouse.
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">\n<table>\n'
        f"<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n"
        "</div>\n"
    )


def _cells(block: Table, row: tuple[str, ...]) -> str:
    first, *rest = row
    others = (f"<td{_side(block, column)}>{_lines(cell)}</td>" for column, cell in enumerate(rest, start=1))
    return f'<th scope="row">{_lines(first)}</th>{"".join(others)}'


def _side(block: Table, column: int) -> str:
    return "" if column < block.words else ' class="number"'


def _lines(cell: str) -> str:
    return text(cell).replace("\n", "<br>")


@_block.register
def _(block: Picture) -> str:
    data = base64.b64encode(block.svg).decode("ascii")
    return (
        f'<figure>\n<img alt="{text(block.alt)}" src="data:image/svg+xml;base64,{data}">\n'
        f"<figcaption>{text(block.caption)}</figcaption>\n</figure>\n"
    )


@_block.register
def _(block: Code) -> str:
    return f'<pre tabindex="0"><code>{text(block.text)}</code></pre>\n'


@_block.register
def _(block: Fold) -> str:
    blocks = "".join(map(_block, block.blocks))
    return f"<details>\n<summary>{text(block.title)}</summary>\n{blocks}</details>\n"


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
