"""Progress of long work on standard error: rate and time left on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from probekit import distributed

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0


class Task:
    """One piece of work that is under way."""

    def __init__(
        self, name: str, total: int | None, done: int, bar: RichProgress | None, console: Console
    ) -> None:
        self._name, self._total, self._bar, self._console = name, total, bar, console
        self._before = self._done = done
        self._note = ""
        self._begun = self._told = time.monotonic()
        self._id = bar.add_task(name, total=total, completed=done, note="") if bar else None

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Tells that `steps` more are done, with a few words on how it goes."""
        self._done += steps
        self._note = self._note if note is None else note
        if self._bar and self._id is not None:
            self._bar.update(self._id, completed=self._done, note=f"{self._note} {self._rate()}")
        elif time.monotonic() - self._told > SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            self._console.print(f"  {self._name}: {self._so_far()}", highlight=False)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items and counts them."""
        for item in items:
            yield item
            self.advance()

    def close(self, *, failed: bool) -> None:
        """Ends the task with a line that stays."""
        if self._bar and self._id is not None:
            self._bar.remove_task(self._id)
        seconds = time.monotonic() - self._begun
        end = "stopped" if failed else "done"
        counted = f", {self._done:,} {self._rate()}" if self._done else ""
        self._console.print(
            f"{self._name}: {end} in {seconds:.1f} s{counted} {self._note}".rstrip(), highlight=False
        )

    def _rate(self) -> str:
        seconds = time.monotonic() - self._begun
        return f"({(self._done - self._before) / seconds:,.0f}/s)" if seconds > 0.1 else ""

    def _so_far(self) -> str:
        if self._total is None:
            return f"{self._done:,} {self._rate()} {self._note}"
        here = max(self._done - self._before, 1)
        left = (time.monotonic() - self._begun) * (self._total - self._done) / here
        return f"{self._done:,} of {self._total:,} {self._rate()}, {left:.0f} s left {self._note}"


class Progress:
    """Shows tasks as they come; `quiet` shows nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet or not distributed.is_first()  # one of several tells for all
        self._console = Console(stderr=True, quiet=self._quiet, soft_wrap=True)

    @contextmanager
    def task(self, name: str, total: int | None = None, done: int = 0) -> Iterator[Task]:
        """Opens a task; its end, or that it failed, is told when the block is left.

        Args:
            name: What is done.
            total: How many steps it takes.
            done: How many of them were done before, by a process that was stopped.
        """
        if self._quiet or not self._console.is_terminal:
            with _closing(Task(name, total, done, None, self._console)) as task:
                yield task
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with (
            RichProgress(*columns, console=self._console, transient=True) as bar,
            _closing(Task(name, total, done, bar, self._console)) as task,
        ):
            yield task

    def say(self, line: str) -> None:
        """Prints one line."""
        self._console.print(line, highlight=False)


@contextmanager
def without_bars_of_transformers() -> Iterator[None]:
    """Keeps the bars of transformers off standard error: ours tell how far the work is."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _closing(task: Task) -> Iterator[Task]:
    try:
        yield task
    except BaseException:
        task.close(failed=True)
        raise
    task.close(failed=False)
