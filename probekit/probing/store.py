"""Activations that were read: held for solvers that need them all at once, or stored in the run's folder."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from probekit import distributed
from probekit.distributed import precision_of
from probekit.errors import ProbekitError
from probekit.io import read_json, write_json, write_tensors
from probekit.models.mixing import VARIANTS
from probekit.models.pretrained import dtype_name
from probekit.probing.activations import ActivationReader, Activations, Done, HookPoint, Stack, chunk_slices
from probekit.probing.targets import Examples
from probekit.progress import Meter, Progress

HEADROOM = 1.02
"""Free disk space that is asked for, as a multiple of the activations' size."""

MANIFEST = "manifest.json"
"""The file in a store that says what its activations are of."""

GROUP_SHARE = 0.25
"""The part of `probe.memory` that the float32 activations of one group of probes may take."""


class _ByExample:
    """What has been read already: its progress is counted in examples."""

    unit = "examples"

    def size(self, examples: Examples) -> int:
        """How many examples there are."""
        return len(examples)


class HeldActivations(_ByExample):
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
            _check_room(folder, spilled, "raise probe.memory, or read fewer hook points or positions")
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

    def chunks(
        self, examples: Examples, done: Done = lambda examples: None
    ) -> Iterator[tuple[slice, list[Tensor]]]:
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


class HeldSubset(_ByExample):
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

    def chunks(
        self, examples: Examples, done: Done = lambda examples: None
    ) -> Iterator[tuple[slice, list[Tensor]]]:
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


class Store(_ByExample):
    """Activations that `write_store` kept.

    Args:
        folder: A complete store.
        stacks: The hook points to read, all of them in the store.
        device: Where activations are wanted.
    """

    def __init__(self, folder: Path, stacks: list[Stack], device: torch.device) -> None:
        self.stacks, self._folder, self._device = stacks, folder, device
        manifest = read_json(folder / MANIFEST)
        self.dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self._chunk: list[int] = manifest["chunk"]

    def chunks(
        self, examples: Examples, done: Done = lambda examples: None
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        """Reads this process's share of one of the splits that were stored; see `Activations.chunks`.

        Raises:
            ProbekitError: A shard is missing or damaged.
        """
        for rows in distributed.share([*chunk_slices(examples.document, *self._chunk)]):
            path = self._folder / _shard_name(examples, rows)
            try:
                with safe_open(path, "pt", device=str(self._device)) as shard:
                    values = [
                        torch.stack([shard.get_tensor(_key(point)) for point in stack.points])
                        for stack in self.stacks
                    ]
            except (OSError, SafetensorError) as error:
                raise ProbekitError(
                    f"{path} cannot be read ({error}); delete it and run with --store again"
                ) from None
            yield rows, values
            done(rows.stop - rows.start)


def write_store(
    reader: ActivationReader, splits: Mapping[str, Examples], folder: Path, progress: Progress, meter: Meter
) -> None:
    """Writes the activations of a reader to disk, a shard for every chunk; shards that exist are kept.

    The first of several processes reads and writes; the others wait for it.

    Args:
        reader: Reads the activations.
        splits: Examples of every split.
        folder: The store's folder.
        progress: Shows the tokens read.
        meter: Counts them.

    Raises:
        ProbekitError: The folder holds activations of something else, or the disk is too small.
    """
    manifest, contents = folder / MANIFEST, store_contents(reader, splits)
    chunk = reader.chunk_examples
    if manifest.exists():
        known = read_json(manifest)
        _check_same(folder, known, contents)
        chunk = known["chunk"]
    distributed.wait()  # all processes have looked before anything is written
    if distributed.is_first():
        missing = [
            (examples, rows)
            for examples in splits.values()
            for rows in chunk_slices(examples.document, *chunk)
            if not (folder / _shard_name(examples, rows)).exists()
        ]
        total = sum(rows.stop - rows.start for _, rows in missing)
        size = (
            reader.dtype.itemsize
            * len(reader.positions)
            * total
            * sum(len(s.points) * s.width for s in reader.stacks)
        )
        _check_room(folder, size, "lower probe.max_examples, or run without --store")
        kept = f"store {size / 1e9:,.2f} GB of activations in {folder}"
        progress.say(kept if missing else f"activations from {folder}")
        if not manifest.exists():
            write_json(manifest, contents | {"chunk": chunk})
        tokens = sum(reader.size(examples[rows]) for examples, rows in missing)
        with (
            progress.task("store activations", total=tokens, unit="tokens") as task,
            meter.reading(task) as done,
        ):
            for examples, rows in missing:
                read = reader.read(examples[rows], done)
                tensors = {
                    _key(point): value
                    for stack, values in zip(reader.stacks, read, strict=True)
                    for point, value in zip(stack.points, values, strict=True)
                }
                write_tensors(folder / _shard_name(examples, rows), tensors)
    distributed.wait()


def store_contents(reader: ActivationReader, splits: Mapping[str, Examples]) -> dict[str, Any]:
    """Everything that a store's activations depend on: model, corpus, settings, hook points and examples."""
    run, variant, config = reader.run, reader.variant, reader.run.config
    conditioning = config.model_dump(mode="json", include={"planner", "conditioning"})
    return {
        "version": version("probekit-lm"),
        "model": run.weights_digest(variant),
        "corpus": f"{run.corpus.facts['fingerprint'][:16]}, {run.corpus.facts['tokens']} tokens",
        "variant": f"random, seed {reader.seed}" if variant == "random" else variant,
        "windows": [*reader.windows],
        "dtype": dtype_name(reader.dtype),
        "precision": precision_of(run.device, config.training.precision),
        "conditioning": conditioning if variant in VARIANTS else None,
        "temperature": config.mixing.temperature if variant in VARIANTS else None,
        "positions": [*reader.positions],
        "points": [_key(point) for stack in reader.stacks for point in stack.points],
        "examples": {split: _digest(examples) for split, examples in splits.items()},
    }


def _check_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ProbekitError(
                f"{folder} stores activations of another {name}: {_short(found.get(name))}, but "
                f"{_short(value)} is wanted; delete it, or run without --store"
            )


def _check_room(folder: Path, size: int, advice: str) -> None:
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


def _key(point: HookPoint) -> str:
    return f"{point[0]}|{point[1]}"


def _digest(examples: Examples) -> str:
    """Identifies where examples are, and their order."""
    second = () if examples.second is None else examples.second.T
    places = np.stack([examples.start, examples.stop, *second]).astype(np.int64)
    return hashlib.sha256(places.tobytes()).hexdigest()[:12]


def _shard_name(examples: Examples, rows: slice) -> str:
    return f"{_digest(examples)}-{rows.start:09d}.safetensors"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"
