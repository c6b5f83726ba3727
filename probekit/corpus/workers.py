"""The same work on many parts, by several processes, with the results in the order of the parts.

Processes are begun anew and import only what the work needs: they neither run the user's script again nor
inherit threads, as processes of the standard library's pools do.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

T = TypeVar("T")

MANY_CHARACTERS = 1 << 23
"""Texts shorter than this are done before other processes have begun."""
_PARTS_AHEAD = 8
"""Results held for each process."""
_IDLE_SECONDS = 60


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_for(characters: int) -> int:
    """How many processes texts of so many characters in all are worth."""
    return cores() if characters >= MANY_CHARACTERS else 1


def in_order(work: Callable[..., T], parts: Iterable[tuple[Any, ...]], processes: int) -> Iterator[T]:
    """What a function returns for each part, in their order; at most some of them are held.

    Args:
        work: Something that can be pickled, of a module that imports little.
        parts: Its arguments.
        processes: How many work; 1 is this process itself. They change nothing but the time.
    """
    if processes == 1:
        yield from itertools.starmap(work, parts)
        return
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor

    left = iter(parts)
    with Parallel(
        processes, backend="loky", batch_size=1, max_nbytes=None, idle_worker_timeout=_IDLE_SECONDS
    ) as pool:
        while some := list(itertools.islice(left, processes * _PARTS_AHEAD)):
            yield from pool(delayed(_alone)(os.getpid(), work, *part) for part in some)
    get_reusable_executor(reuse=True).shutdown(wait=True)  # idle processes would keep their memory


def _alone(parent: int, work: Callable[..., T], *part: Any) -> T:
    """Does a part in a process that has one core for itself."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _end_with(parent)
    return work(*part)


@cache
def _end_with(parent: int) -> None:
    """Ends this process soon after the one that began it, should that be killed: it would wait for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
