"""Several processes at one job, by torch.distributed through accelerate; one alone needs none of it.

    accelerate launch --num_processes 2 -m probekit train --preset demo

All processes do the same with shares of the examples; sums over all of them are taken here. The first one
alone writes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from probekit.errors import ProbekitError
from probekit.stopping import at_once

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

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


def device() -> torch.device | None:
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
