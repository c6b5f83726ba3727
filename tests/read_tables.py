"""Reads what tables show."""

import re

HOSTILE = "[red]x[/red] [/] :warning: \\[bold] [link=file:///etc]y[/link]"
CONTROL = "bell\x07 colour\x1b[31m back\x08 turned\u202eover \x9b2J end\\"


def rows_of(printed: str) -> list[list[str]]:
    """The cells of every printed row."""
    lines = [line.strip() for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line[1:-1].split("│")] for line in lines]


def with_range(row, value: str) -> str:
    """A value with its interval, as tables show it."""
    low, high = getattr(row, f"{value}_low"), getattr(row, f"{value}_high")
    return f"{getattr(row, value):.3f} [{low:.3f}, {high:.3f}]"


def shows(cell: str, values: tuple[float, float, float]) -> bool:
    """Whether a cell holds a value and its interval, rounded."""
    found = re.fullmatch(r"(\S+) \[(\S+), (\S+)\](\nspread over seeds \S+)?", cell)
    return found is not None and all(map(rounds, found.groups()[:3], values))


def rounds(text: str, value: float) -> bool:
    """Whether a number is a value, rounded."""
    decimals = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - value) <= 0.5000001 * 10**-decimals
