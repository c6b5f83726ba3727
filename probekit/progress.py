"""Progress of long work on standard error: rate and time left on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from probekit import distributed

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0

FIRST_SECONDS = 5.0
"""After so many seconds a `Meter` begins to say how long it will take."""


class Task:
    """Work that is under way; `Progress.task` makes it."""

    def __init__(self, name: str, total: int | None, done: int, unit: str, console: Console) -> None:
        self._name, self._total, self._console = name, total, console
        self._per_second = f" {unit} a second" if unit else "/s"
        self._before = self._done = done
        self._note = ""
        self._start = self._printed = time.monotonic()
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self._bar = self._bars.add_task(name, total=total, completed=done, note="")

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Counts steps that are done; the note says in a few words how it goes."""
        self._done += steps
        self._note = self._note if note is None else note
        self._bars.update(self._bar, completed=self._done, note=f"{self._note} {self._rate()}")
        if self._bars.disable and time.monotonic() - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self._console.print(f"  {self._name}: {self._status()}", highlight=False)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items and counts them."""
        for item in items:
            yield item
            self.advance()

    def _rate(self) -> str:
        seconds = time.monotonic() - self._start
        if seconds <= 0.1:
            return ""
        rate = (self._done - self._before) / seconds
        return f"({rate:,.0f}{self._per_second})" if rate >= 1 or not rate else f"({1 / rate:.1f} s each)"

    def _status(self) -> str:
        if self._total is None:
            return f"{self._done:,} {self._rate()} {self._note}"
        steps = max(self._done - self._before, 1)
        left = (time.monotonic() - self._start) * (self._total - self._done) / steps
        return f"{self._done:,} of {self._total:,} {self._rate()}, {duration(left)} left {self._note}"

    @contextmanager
    def _shown(self) -> Iterator[Task]:
        end = "stopped"
        try:
            with self._bars:
                yield self
            end = "done"
        finally:
            seconds = time.monotonic() - self._start
            counted = f", {self._done:,} {self._rate()}" if self._done else ""
            line = f"{self._name}: {end} in {seconds:.1f} s{counted} {self._note}".rstrip()
            self._console.print(line, highlight=False)


class Progress:
    """Shows tasks as they come.

    Args:
        quiet: Show nothing. Of several processes, only the first shows anything in any case.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        quiet = quiet or not distributed.is_first()
        self._console = Console(stderr=True, quiet=quiet, soft_wrap=True)

    @contextmanager
    def task(self, name: str, total: int | None = None, done: int = 0, unit: str = "") -> Iterator[Task]:
        """Shows a task until the block is left, and then a line that says how it ended.

        Args:
            name: What is done.
            total: How many steps it takes.
            done: How many of them an earlier process did.
            unit: What a step is, for the rate.
        """
        with Task(name, total, done, unit, self._console)._shown() as task:
            yield task

    def say(self, line: str) -> None:
        """Prints one line."""
        self._console.print(line, highlight=False)


class Meter:
    """Tokens that a command reads, and the time it takes.

    Args:
        progress: Where the forecast is shown.
        total: Tokens that the command will read; None: there is no forecast.
        advice: What would make it faster.

    Attributes:
        tokens: Tokens read.
        seconds: Time spent reading.
    """

    def __init__(self, progress: Progress, total: int | None = None, advice: str = "") -> None:
        self.tokens, self.seconds = 0, 0.0
        self._progress, self._total, self._advice = progress, total, advice

    @contextmanager
    def reading(self, task: Task) -> Iterator[Callable[[int], None]]:
        """Times the block, which calls what it is given for the tokens that were read."""
        start, before = time.monotonic(), self.seconds

        def done(tokens: int) -> None:
            self.tokens += tokens
            self.seconds = before + time.monotonic() - start
            task.advance(tokens)
            if self._total is not None and self.seconds > FIRST_SECONDS:
                rate = self.tokens / self.seconds
                self._progress.say(
                    f"reading takes about {duration(self._total / rate)} in all, at {rate:,.0f} tokens a "
                    f"second{self._advice}"
                )
                self._total = None

        yield done
        self.seconds = before + time.monotonic() - start


def duration(seconds: float) -> str:
    """A length of time in the unit that suits it."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:,.0f} seconds"


@contextmanager
def without_bars_of_transformers() -> Iterator[None]:
    """Keeps progress bars and reports of transformers, whose errors are raised, off standard error."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]
    from transformers.utils import logging

    made, verbosity = tqdm.__init__, logging.get_verbosity()

    def hidden(self: tqdm, *arguments: Any, **options: Any) -> None:
        made(self, *arguments, **options | {"disable": True})  # the bar of a notebook says False itself

    # Not transformers' own switch: the bar of a GGUF file does not heed it.
    tqdm.__init__ = hidden
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        tqdm.__init__ = made
