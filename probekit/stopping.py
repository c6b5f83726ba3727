"""Ctrl-C and SIGTERM: work that keeps its state on the way puts it down first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal asked to stop.

    Attributes:
        signal: Which one.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Holding:
    """Whether a signal asked to stop while it was held back."""

    def __init__(self) -> None:
        self.asked: Stopped | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal; whoever types Ctrl-C twice does not want to wait."""
        if self.asked is not None and number == self.asked.signal == signal.SIGINT:
            raise self.asked
        self.asked = self.asked or Stopped(number)

    @classmethod
    @contextmanager
    def held(cls) -> Iterator[Self]:
        """Holds signals back; the block looks at `asked` wherever it can stop, and raises it."""
        holding = cls()
        with _handled(holding):
            yield holding


@contextmanager
def terminable() -> Iterator[None]:
    """Has SIGTERM end the block as Ctrl-C does, so that nothing is left half done."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handled(stop, (signal.SIGTERM,)):
        yield


@contextmanager
def at_once() -> Iterator[None]:
    """Has SIGTERM end the process at once, while it waits for others and hears nothing itself."""
    with _handled(signal.SIG_DFL, (signal.SIGTERM,)):
        yield


@contextmanager
def _handled(handler: signal._HANDLER, numbers: tuple[signal.Signals, ...] = HANDLED) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
