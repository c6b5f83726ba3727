"""Reads what tables wrote to the terminal."""

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
