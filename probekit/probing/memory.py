"""Activations held for solvers that need all at once: in memory, and in a file where they do not fit."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from probekit import distributed
from probekit.errors import ProbekitError
from probekit.probing.activations import Activations, Chunk, Done
from probekit.probing.targets import Examples

HEADROOM = 1.02
"""Free disk space that is asked for, as a multiple of the activations' size."""

GROUP_SHARE = 0.25
"""The part of `probe.memory` that the float32 activations of one group of probes may take."""


class HeldActivations(Activations):
    """All activations of some splits, in the dtype in which they were read.

    Those of the first probes lie in memory, those that it has no room for in a file of the run's folder. The
    file has no name, so that nothing is left of it when the process ends, however it ends.

    Args:
        activations: Where they come from.
        splits: Examples of the splits.
        positions: Number of positions; every stack has as many probes for each of its hook points.
        memory: Bytes for what is held and what `load` returns.
        folder: Where the file is made.
        device: Where solvers want activations.

    Raises:
        ProbekitError: The disk is too small.
    """

    def __init__(
        self,
        activations: Activations,
        splits: Mapping[str, Examples],
        positions: int,
        memory: float,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.stacks, self.dtype = activations.stacks, activations.dtype
        self._splits, self._positions, self._device = dict(splits), positions, device
        self._written: dict[str, list[slice]] = {split: [] for split in splits}
        self._group, room = GROUP_SHARE * memory, (1 - GROUP_SHARE) * memory
        self._tensors: dict[tuple[str, int], Tensor] = {}
        self._begin: dict[tuple[str, int], int] = {}
        spilled = 0
        for number, stack in enumerate(self.stacks):
            probes = len(stack.points) * positions
            sizes = {name: len(e) * stack.width * self.dtype.itemsize for name, e in splits.items()}
            kept = min(probes, int(room // sum(sizes.values())))
            room -= kept * sum(sizes.values())
            for name, size in sizes.items():
                shape = kept, len(splits[name]), stack.width
                self._tensors[name, number] = torch.zeros(shape, dtype=self.dtype)
                self._begin[name, number] = spilled - kept * size
                spilled += (probes - kept) * size
        self._file: IO[bytes] | None = None
        if spilled:
            check_room(folder, spilled, "raise probe.memory, or read fewer hook points or positions")
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open as long as this is held
            _reserve(self._file.fileno(), spilled, folder)  # what other processes read is zero here

    def write(self, split: str, rows: slice, chunk: list[Tensor]) -> None:
        """Holds some examples: for every stack `[probes, rows, width]`."""
        self._written[split].append(rows)
        for number, values in enumerate(chunk):
            values = values.cpu()
            held = self._tensors[split, number]
            held[:, rows] = values[: len(held)]
            for probe in range(len(held), len(values)):
                self._seek(split, number, probe, rows.start).write(_bytes(values[probe].contiguous()))

    def groups(self) -> Iterator[tuple[int, slice]]:
        """The probes that are fitted together: the number of their stack, and which of its probes."""
        examples = sum(map(len, self._splits.values()))
        for number, stack in enumerate(self.stacks):
            probes = len(stack.points) * self._positions
            size = max(1, int(self._group // (4 * examples * stack.width)))
            yield from ((number, slice(first, min(first + size, probes))) for first in range(0, probes, size))

    def load(self, split: str, stack: int, probes: slice) -> Tensor:
        """Activations of a group in float32, those of all processes `[probes, examples, width]`."""
        whole = self._read(split, stack, probes, slice(0, len(self._splits[split]))).float().to(self._device)
        distributed.add_up([whole])  # what another process has read is zero here
        return whole

    def chunks(self, examples: Examples, done: Done = lambda read: None) -> Iterator[Chunk]:
        """This process's share of a split as it was written; see `Activations.chunks`."""
        (split,) = (name for name, known in self._splits.items() if known is examples)
        for rows in self._written[split]:
            yield (
                rows,
                [
                    self._read(split, number, slice(0, len(stack.points) * self._positions), rows)
                    .unflatten(0, (len(stack.points), self._positions))
                    .to(self._device)
                    for number, stack in enumerate(self.stacks)
                ],
            )
            done(rows.stop - rows.start)

    def _read(self, split: str, stack: int, probes: slice, rows: slice) -> Tensor:
        """`[probes, rows, width]` from memory and file."""
        held, width = self._tensors[split, stack], self.stacks[stack].width
        found = torch.empty(probes.stop - probes.start, rows.stop - rows.start, width, dtype=self.dtype)
        for probe, values in enumerate(found, start=probes.start):
            if probe < len(held):
                values.copy_(held[probe, rows])
            else:
                self._seek(split, stack, probe, rows.start).readinto(_bytes(values))  # type: ignore[attr-defined]
        return found

    def _seek(self, split: str, stack: int, probe: int, row: int) -> IO[bytes]:
        """The file at an example of a probe."""
        assert self._file is not None  # noqa: S101 - only probes that are not in memory are looked for
        of_row = self.stacks[stack].width * self.dtype.itemsize
        self._file.seek(self._begin[split, stack] + (probe * len(self._splits[split]) + row) * of_row)
        return self._file


class HeldSubset(Activations):
    """Some of the examples of activations that are held, with the interface of `HeldActivations`.

    Args:
        held: The activations.
        splits: The examples that they are of.
        rows: Which examples of each split, in increasing order.
    """

    def __init__(
        self, held: HeldActivations, splits: Mapping[str, Examples], rows: Mapping[str, np.ndarray]
    ) -> None:
        self.stacks, self.dtype, self.groups = held.stacks, held.dtype, held.groups
        self.examples = {split: splits[split][own] for split, own in rows.items()}
        self._held, self._splits, self._rows = held, splits, rows

    def load(self, split: str, stack: int, probes: slice) -> Tensor:
        """See `HeldActivations.load`."""
        whole = self._held.load(split, stack, probes)
        return whole[:, torch.from_numpy(self._rows[split]).to(whole.device)]

    def chunks(self, examples: Examples, done: Done = lambda read: None) -> Iterator[Chunk]:
        """See `HeldActivations.chunks`."""
        (split,) = (name for name, known in self.examples.items() if known is examples)
        rows = self._rows[split]
        for whole, stacks in self._held.chunks(self._splits[split]):
            first, stop = np.searchsorted(rows, (whole.start, whole.stop)).tolist()
            if first < stop:
                own = torch.from_numpy(rows[first:stop] - whole.start)
                yield slice(first, stop), [values[:, :, own.to(values.device)] for values in stacks]
                done(stop - first)


def _bytes(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return values.view(torch.uint8).numpy().data.cast("B")


def check_room(folder: Path, size: int, advice: str) -> None:
    """Refuses to begin what the disk has no room for, and advises what to do."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if HEADROOM * size > free:
        raise ProbekitError(
            f"{folder}: the activations take {size / 1e9:,.2f} GB, and the disk has {free / 1e9:,.2f} GB "
            f"free; {advice}"
        )


def _reserve(file: int, size: int, folder: Path) -> None:
    """Makes a new file as long as it will be, its room reserved where the system can: zeros.

    Raises:
        ProbekitError: The disk has no room for it.
    """
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ProbekitError(
                f"{folder}: {size / 1e9:,.2f} GB of activations cannot be kept there ({error.strerror}); "
                "raise probe.memory, or read fewer hook points or positions"
            ) from None
        os.truncate(file, size)  # such as a file system that reserves nothing
    except AttributeError:  # such as macOS
        os.truncate(file, size)
