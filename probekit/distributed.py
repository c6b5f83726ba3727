"""Where and in which arithmetic to compute, in one process or in several of torchrun or accelerate.

Of several processes, each has its own device and its own share of the work; the first one writes. Signals to
stop are raised as `Stopped`, or held back by `Holding` until the work can stop without loss.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Self, TypeVar

from probekit.errors import ProbekitError, one_line

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from torch import Tensor


T = TypeVar("T")

LONGEST_WAIT = timedelta(days=7)
"""How long processes wait for one that builds a corpus or loads a model alone."""


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def alone() -> None:
    """Leaves the other processes out of all that follows."""
    os.environ["WORLD_SIZE"] = "1"


def check_alone(name: str) -> None:
    """Refuses several processes, where each would have its share of the work and none would add them up."""
    if count() > 1:
        raise ProbekitError(
            f"{name} runs in one process, but there are {count()}; call it in a process of its own"
        )


def share(items: Sequence[T]) -> Sequence[T]:
    """The items that fall to this process: each item falls to one."""
    return items[rank() :: count()]


def wait() -> None:
    """Waits until all processes are here.

    Raises:
        ProbekitError: One has ended.
    """
    if count() > 1:
        # While it waits, Python handles no signals: SIGTERM has to end the process by itself.
        with _handling(signal.SIG_DFL, signal.SIGTERM), _others_alive():
            _joined().wait_for_everyone()


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replaces every tensor by its sum over processes.

    Raises:
        ProbekitError: One has ended.
    """
    import torch

    if count() > 1:
        _joined()
        with _others_alive():
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)


def total(value: float, device: torch.device) -> float:
    """The sum of a number over processes."""
    import torch

    if count() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=device)
    add_up([summed])
    return summed.item()


def leave() -> None:
    """Leaves the process group at the end of all work; one left open would abort the process at its exit."""
    if _joined.cache_info().currsize:
        wait()
        _joined().destroy_process_group()


@cache
def _joined() -> PartialState:
    """Joins the other processes, once; there must be a GPU for each, or none at all."""
    import torch
    from accelerate import PartialState

    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ProbekitError(
            f"process {local} of this machine has no GPU of its own, for there are {gpus}; begin as many "
            "processes as there are GPUs, or set CUDA_VISIBLE_DEVICES to nothing for the CPU"
        )
    return PartialState(cpu=not gpus, timeout=LONGEST_WAIT)


@contextmanager
def _others_alive() -> Iterator[None]:
    """Turns the error of a process group that lost a process into one line; that process says the reason."""
    try:
        yield
    except RuntimeError as error:
        raise ProbekitError(f"another process has ended, and said why ({one_line(error)[:80]})") from error


def compute_device(name: str) -> torch.device:
    """The device that the setting `device` names.

    Raises:
        ProbekitError: It is not a device, or this machine has none of it.
    """
    import torch

    if count() > 1:
        own = _joined().device
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
        raise ProbekitError(
            f"device is {name!r}: it cannot be used here ({one_line(error)[:200]}); use auto or cpu"
        ) from None
    return device


def precision_of(device: torch.device, precision: str) -> str:
    """The arithmetic that the setting `training.precision` stands for on a device: float32 or bfloat16."""
    import torch

    if precision != "auto":
        return precision
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bfloat16" if has_bfloat16 else "float32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The arithmetic of forward passes that the setting `training.precision` stands for."""
    import torch

    enabled = precision_of(device, precision) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


class Stopped(KeyboardInterrupt):
    """A signal asked to stop.

    Attributes:
        signal: Its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


class Holding:
    """Holds back SIGINT and SIGTERM.

    Attributes:
        asked: What to raise when the work can stop; None while no signal has come.
    """

    def __init__(self) -> None:
        self.asked: Stopped | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal. A second Ctrl-C stops at once."""
        if self.asked is not None and number == self.asked.signal == signal.SIGINT:
            raise self.asked
        self.asked = self.asked or Stopped(number)

    @classmethod
    @contextmanager
    def held(cls) -> Iterator[Self]:
        """Holds signals back; the block looks at `asked` wherever it can stop, and raises it."""
        holding = cls()
        with _handling(holding, signal.SIGINT, signal.SIGTERM):
            yield holding


@contextmanager
def terminable() -> Iterator[None]:
    """Has SIGTERM end the block as Ctrl-C does, so that nothing is left half done."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with _handling(stop, signal.SIGTERM):
        yield


@contextmanager
def _handling(handler: signal._HANDLER, *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
