"""Activations: one forward pass reads every hook point at every distance, a chunk of documents at a time.

A `Reader` runs the model. A `Store` reads back what `write_store` kept of a reader on disk.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from probekit import distributed
from probekit.config import ProbedName
from probekit.data.windows import Windows, collate, cut_windows, input_tokens
from probekit.distributed import autocast, precision_of
from probekit.errors import ProbekitError
from probekit.evaluation.perplexity import window_and_stride
from probekit.io import read_json, write_json, write_tensors
from probekit.models.conditioning import Conditioned
from probekit.models.hook_points import BEFORE, Hook, hook_name
from probekit.models.mixing import VARIANTS, evaluation_mixing
from probekit.probing.targets import Examples
from probekit.progress import Progress
from probekit.run.run import Run

HookPoint = tuple[str, int]
"""A location and a layer."""

CHUNK_EXAMPLES = 512
"""Examples read at once; a longer document is read in parts, whose windows may overlap a little."""

HEADROOM = 1.02
"""Free disk space that a store asks for, as a multiple of the activations' size: shards have headers."""


@dataclass(frozen=True)
class Stack:
    """Hook points of one width, whose activations are read into one tensor.

    Attributes:
        width: Features at each hook point.
        points: The hook points, in the order of the tensor's first axis.
    """

    width: int
    points: tuple[HookPoint, ...]


class Activations(Protocol):
    """A source of activations: a model, or a store of what was read before."""

    stacks: list[Stack]

    def chunks(self, examples: Examples) -> Iterator[tuple[slice, list[Tensor]]]:
        """Reads this process's share of the examples in order, a chunk at a time.

        Args:
            examples: The examples.

        Yields:
            The rows of the chunk, and for every stack its activations, float32
            `[points, distances, chunk, width]`.
        """
        ...


def stacks_of(points: Sequence[HookPoint], widths: Mapping[str, int]) -> list[Stack]:
    """Groups hook points by the width of their location, in order of first appearance."""
    groups: dict[int, list[HookPoint]] = {}
    for point in points:
        groups.setdefault(widths[point[0].removesuffix(BEFORE)], []).append(point)
    return [Stack(width, tuple(group)) for width, group in groups.items()]


class Reader:
    """Reads activations of one variant of a run's LM.

    A position is read in the window that scores the token after it, as in the perplexity.

    Args:
        run: The run.
        variant: Whose activations: `none`, a trained variant, or `random` for random weights.
        points: The hook points to read.
        distances: Tokens before the anchor, in the order of the second axis.
        seed: Seed of random weights.
    """

    def __init__(
        self,
        run: Run,
        variant: ProbedName,
        points: Sequence[HookPoint],
        distances: Sequence[int],
        seed: int = 0,
    ) -> None:
        self.run, self.variant, self.seed = run, variant, seed
        self.stacks, self.distances = stacks_of(points, run.locations), tuple(distances)
        self._window, self._stride = window_and_stride(run)
        self._model = run.model(variant) if variant in VARIANTS else None
        self._corpus = run.corpus_of(variant) if variant in VARIANTS else run.corpus
        self._mixing = evaluation_mixing(variant)
        adapter = None if self._model is None else self._model.adapter
        names = [_hook_name(point) for point in points] + list(adapter.names if adapter is not None else ())
        self._forward = run.backend_for(names, variant, seed)

    def chunks(self, examples: Examples) -> Iterator[tuple[slice, list[Tensor]]]:
        """Reads this process's share of the examples; see `Activations.chunks`."""
        for rows in distributed.share([*chunk_slices(examples.document)]):
            yield rows, self.read(examples[rows])

    def read(self, examples: Examples) -> list[Tensor]:
        """Reads all stacks at some examples.

        Args:
            examples: The examples.

        Returns:
            For every stack float32 activations `[points, distances, examples, width]`.

        Raises:
            ProbekitError: An activation is not finite; it names the location and layer.
        """
        positions = np.stack([examples.positions(distance) for distance in self.distances])
        into, positions = self._empty(*positions.shape), positions.ravel()
        windows = cut_windows(self.run.corpus, np.unique(examples.document), self._window, self._stride)
        window = np.searchsorted(windows.start + windows.length, positions, side="right")
        # Batches of windows that are about equally long need little padding.
        needed = np.unique(window)
        needed = needed[np.argsort(windows.length[needed], kind="stable")]
        rank = np.argsort(needed)[np.searchsorted(np.sort(needed), window)]
        size = self.run.config.evaluation.batch_size
        for start in range(0, len(needed), size):
            batch = windows[needed[start : start + size]]
            index = np.flatnonzero((rank >= start) & (rank < start + len(batch)))
            row = rank[index] - start
            column = positions[index] - batch.start[row]
            self._pass(self._inputs(batch), into, row, column, index)
        for stack, values in zip(self.stacks, into, strict=True):
            check_finite(stack, values, self.run.dtype)
        return into

    def changed_by_conditioning(self) -> set[HookPoint]:
        """The hook points whose activation depends on the action at the first position that can know it."""
        if self._model is None or (adapter := self._model.adapter) is None:
            return set()
        device = self.run.device
        # Two different tokens: if all were the same, attention would read the same wherever it looks.
        tokens = torch.tensor([[0, 1]], device=device)
        conditioned = torch.tensor([[adapter.lag, 1]], device=device)
        nothing = torch.zeros_like(adapter.codebook[0])
        without, added = self._empty(1, 1), self._empty(1, 1)
        for action, into in ((nothing, without), (nothing + 1, added)):
            given = adapter.conditioned(tokens, torch.stack([nothing, action]), conditioned)
            self._pass(given, into, np.array([0]), np.array([1]), np.array([0]))
        return {
            point
            for stack, before, after in zip(self.stacks, without, added, strict=True)
            for point, *values in zip(stack.points, before, after, strict=True)
            if not torch.equal(*values)
        }

    def _inputs(self, batch: Windows) -> Conditioned:
        """The LM's inputs for a batch of windows, with the variant's actions if it is conditioned."""
        if self._model is None:
            return Conditioned(input_tokens(self.run.corpus, batch).to(self.run.device))
        with torch.no_grad():
            return self._model.conditioned(collate(self._corpus, batch).to(self.run.device), self._mixing)

    def _pass(
        self, given: Conditioned, into: list[Tensor], row: np.ndarray, column: np.ndarray, index: np.ndarray
    ) -> None:
        """Runs the model once; reads at (row, column) go to the flat index of distances and examples."""
        device = given.tokens.device
        at = torch.from_numpy(row).to(device), torch.from_numpy(column).to(device)
        if given.slots is not None:
            at = at[0], given.slots.own[at]
        flat = torch.from_numpy(index).to(device)

        def reading(target: Tensor) -> Any:
            def read(activation: Tensor, hook: Any = None) -> None:
                target.flatten(0, 1)[flat] = activation[at].flatten(1).float()

            return read

        before: list[Hook] = []
        after: list[Hook] = []
        for stack, values in zip(self.stacks, into, strict=True):
            for point, target in zip(stack.points, values, strict=True):
                hooks = before if point[0].endswith(BEFORE) else after
                hooks.append((_hook_name(point), reading(target)))
        with torch.no_grad(), autocast(device, self.run.config.training.precision):
            hooks = [*before, *given.hooks, *after]
            self._forward(given.tokens, hooks, len(before) + len(after), given.positions)

    def _empty(self, distances: int, examples: int) -> list[Tensor]:
        return [
            torch.empty(len(stack.points), distances, examples, stack.width, device=self.run.device)
            for stack in self.stacks
        ]


def chunk_slices(document: np.ndarray) -> Iterator[slice]:
    """Cuts examples `[examples]` into chunks of whole documents, or parts of one that is too long for one."""
    ends = np.append(np.flatnonzero(np.diff(document)) + 1, len(document))
    start = 0
    while start < len(document):
        last = np.searchsorted(ends, start + CHUNK_EXAMPLES, side="right") - 1
        whole = int(ends[last]) if last >= 0 else 0
        stop = whole if whole > start else min(start + CHUNK_EXAMPLES, len(document))
        yield slice(start, stop)
        start = stop


def check_finite(stack: Stack, values: Tensor, dtype: torch.dtype) -> None:
    """Refuses activations `[points, ...]` that are not all finite, of an LM with weights of a dtype.

    Raises:
        ProbekitError: Names the location and layer.
    """
    advice = "which ends at 65,504; give lm.dtype bfloat16"
    if dtype is not torch.float16:
        advice = "in which none should overflow; look for weights that are not finite in the checkpoint"
    for (location, layer), value in zip(stack.points, values, strict=True):
        # A sum is finite if all is, unless it overflows: only then is a closer look needed.
        if not value.sum().isfinite() and not value.isfinite().all():
            raise ProbekitError(
                f"the activations at {location}, layer {layer}, are not all finite in "
                f"{str(dtype).removeprefix('torch.')}, {advice}"
            )


def _hook_name(point: HookPoint) -> str:
    location, layer = point
    return hook_name(location.removesuffix(BEFORE), layer)


class Store:
    """Activations that `write_store` kept.

    Args:
        folder: A complete store.
        stacks: The hook points to read, all of them in the store.
        device: Where activations are wanted.
    """

    def __init__(self, folder: Path, stacks: list[Stack], device: torch.device) -> None:
        self.stacks, self._folder, self._device = stacks, folder, device

    def chunks(self, examples: Examples) -> Iterator[tuple[slice, list[Tensor]]]:
        """Reads this process's share of one of the splits that were stored; see `Activations.chunks`.

        Raises:
            ProbekitError: A shard is missing or damaged.
        """
        for rows in distributed.share([*chunk_slices(examples.document)]):
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


def write_store(reader: Reader, splits: Mapping[str, Examples], folder: Path, progress: Progress) -> None:
    """Writes the activations of a reader to disk, a shard for every chunk; shards that exist are kept.

    The first of several processes reads and writes; the others wait for it.

    Args:
        reader: Reads the activations.
        splits: Examples of every split.
        folder: The store's folder.
        progress: Shows the examples read.

    Raises:
        ProbekitError: The folder holds activations of something else, or the disk is too small.
    """
    manifest, contents = folder / "manifest.json", store_contents(reader, splits)
    if manifest.exists():
        _check_same(folder, read_json(manifest), contents)
    distributed.wait()  # all processes have looked before anything is written
    if distributed.is_first():
        missing = [
            (examples, rows)
            for examples in splits.values()
            for rows in chunk_slices(examples.document)
            if not (folder / _shard_name(examples, rows)).exists()
        ]
        total = sum(rows.stop - rows.start for _, rows in missing)
        size = 4 * len(reader.distances) * total * sum(len(s.points) * s.width for s in reader.stacks)
        _check_room(folder, size)
        kept = f"store {size / 1e9:,.2f} GB of activations in {folder}"
        progress.say(kept if missing else f"activations from {folder}")
        if not manifest.exists():
            write_json(manifest, contents)
        with progress.task("store activations", total=total) as task:
            for examples, rows in missing:
                read = reader.read(examples[rows])
                tensors = {
                    _key(point): value
                    for stack, values in zip(reader.stacks, read, strict=True)
                    for point, value in zip(stack.points, values, strict=True)
                }
                write_tensors(folder / _shard_name(examples, rows), tensors)
                task.advance(rows.stop - rows.start)
    distributed.wait()


def store_contents(reader: Reader, splits: Mapping[str, Examples]) -> dict[str, Any]:
    """Everything that a store's activations depend on: model, corpus, settings, hook points and examples."""
    run, variant, config = reader.run, reader.variant, reader.run.config
    conditioning = config.model_dump(mode="json", include={"planner", "conditioning"})
    return {
        "version": version("probekit-lm"),
        "model": run.weights_digest(variant),
        "corpus": f"{run.corpus.facts['fingerprint'][:16]}, {run.corpus.facts['tokens']} tokens",
        "variant": f"random, seed {reader.seed}" if variant == "random" else variant,
        "windows": [*window_and_stride(run)],
        "precision": precision_of(run.device, config.training.precision),
        "conditioning": conditioning if variant in VARIANTS else None,
        "temperature": config.mixing.temperature if variant in VARIANTS else None,
        "distances": [*reader.distances],
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


def _check_room(folder: Path, size: int) -> None:
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if HEADROOM * size > free:
        raise ProbekitError(
            f"{folder}: the activations take {size / 1e9:,.2f} GB, and the disk has {free / 1e9:,.2f} GB "
            "free; read fewer hook points or distances, lower probe.max_examples, or run without --store"
        )


def _key(point: HookPoint) -> str:
    return f"{point[0]}|{point[1]}"


def _digest(examples: Examples) -> str:
    """Identifies where examples are, and their order."""
    return hashlib.sha256(np.ascontiguousarray(examples.anchor, dtype=np.int64).tobytes()).hexdigest()[:12]


def _shard_name(examples: Examples, rows: slice) -> str:
    return f"{_digest(examples)}-{rows.start:09d}.safetensors"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"
