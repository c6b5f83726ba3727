"""What is written to the terminal: tables, lines, numbers with their intervals."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from probekit.corpus.store import MORE_DOCUMENTS, too_few


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints a table of texts as they are."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(_literal, row))
    _console().print(table)


def say(line: str) -> None:
    """Prints a line as it is."""
    _console().print(_literal(line))


def warn_of_few(documents: int, remedy: str = MORE_DOCUMENTS) -> None:
    """Says so where test documents are few, and what is to be done."""
    if warning := too_few(documents, remedy):
        say(warning)


def with_range(row: Mapping[Hashable, Any], value: str) -> str:
    """A row's value with its interval, empty where it has none."""
    return f"{row[value]:.3f} {interval(row, value)}" if pd.notna(row[value]) else ""


def interval(row: Mapping[Hashable, Any], value: str) -> str:
    """The interval of a row's value, and words where there is none."""
    low, high = row[f"{value}_low"], row[f"{value}_high"]
    return "(no interval)" if pd.isna(low) else f"[{low:.3f}, {high:.3f}]"


class _Output(Console):
    """Standard output that leaves it to the command what happens when nobody reads on."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal that says how wide it is."""
    console = _Output(soft_wrap=True)
    return console if console.is_terminal else _Output(soft_wrap=True, width=160)


def _literal(text: str) -> Text:
    """The text as it is: no markup, no emoji, and no control characters, which would steer the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))
