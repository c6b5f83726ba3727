"""Where and in which arithmetic to compute."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Self, TypeVar

import torch

from probekit.errors import ProbekitError

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh


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


T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long processes wait for one that builds a corpus or loads a model alone."""


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this one, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """Whether this one is the one that writes."""
    return rank() == 0


def alone() -> None:
    """Leaves the others: what this process does from here on, it does by itself."""
    os.environ["WORLD_SIZE"] = "1"


def leave() -> None:
    """Takes leave of the others when all is done: what still listens would abort the process at its end."""
    if _joined.cache_info().currsize:
        wait()
        mesh.cache_clear()
        gc.collect()  # whatever still holds the group would keep its threads
        _joined().destroy_process_group()


def wait() -> None:
    """Waits until all processes are here.

    Raises:
        ProbekitError: One has ended.
    """
    if count() > 1:
        with at_once(), _told():
            _joined().wait_for_everyone()


def share(items: Sequence[T]) -> Sequence[T]:
    """Every process's own part of what all of them have: each item is in one."""
    return items[rank() :: count()]


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replaces every tensor by its sum over processes.

    Raises:
        ProbekitError: One has ended.
    """
    if count() > 1:
        _joined()
        import torch

        with _told():
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)


def total(value: float, device: torch.device) -> float:
    """The sum of a number over processes."""
    if count() == 1:
        return value
    import torch

    summed = torch.tensor(value, dtype=torch.float64, device=device)
    add_up([summed])
    return summed.item()


@cache
def mesh() -> DeviceMesh:
    """All processes, as what weights are sharded over."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(_joined().device.type, (count(),))


def own_device() -> torch.device | None:
    """The device of this process among several; None for one alone, which may choose."""
    return _joined().device if count() > 1 else None


@contextmanager
def _told() -> Iterator[None]:
    """Has it told in one line that another process is gone: what it said itself is what matters."""
    try:
        yield
    except RuntimeError as error:
        raise ProbekitError(
            f"another process has ended, and said why ({' '.join(str(error).split())[:80]})"
        ) from error


@cache
def _joined() -> PartialState:
    """Joins the others, once.

    Raises:
        ProbekitError: There are GPUs, but not one for each process.
    """
    import torch
    from accelerate import PartialState

    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ProbekitError(
            f"process {local} of this machine has no GPU of its own, for there are {gpus}; begin as many "
            "processes as there are GPUs, or set CUDA_VISIBLE_DEVICES to nothing for the CPU"
        )

    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def compute_device(name: str) -> torch.device:
    """The device that the setting `device` names.

    Raises:
        ProbekitError: It is not a device, or this machine has none of it.
    """
    if (own := own_device()) is not None:
        if name not in ("auto", own.type):
            raise ProbekitError(
                f"device is {name!r}, but of several processes each has its own, here {own}; give auto, or "
                "set CUDA_VISIBLE_DEVICES to nothing for the CPU"
            )
        return own
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ProbekitError(
            f"device is {name!r}: it cannot be used here ({reason}); use auto or cpu"
        ) from None
    return device


def autocast(
    device: torch.device, precision: str, *, keep_casts: bool = True
) -> contextlib.AbstractContextManager[None]:
    """The forward pass's arithmetic that the setting `training.precision` names.

    Args:
        device: Where to compute.
        precision: The setting.
        keep_casts: Keep trained weights that were cast until the end of the pass.
    """
    enabled = precision_of(device, precision) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=keep_casts)


def precision_of(device: torch.device, precision: str) -> str:
    """What the setting `training.precision` comes to on a device: float32 or bfloat16."""
    if precision != "auto":
        return precision
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bfloat16" if has_bfloat16 else "float32"
