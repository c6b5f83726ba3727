"""Activations that `probekit probe --store` keeps in the run's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from probekit import distributed
from probekit.distributed import precision_of
from probekit.errors import ProbekitError
from probekit.io import read_json, write_json, write_tensors
from probekit.models.mixing import VARIANTS
from probekit.models.pretrained import dtype_name
from probekit.probing.activations import (
    ActivationReader,
    Activations,
    Chunk,
    Done,
    HookPoint,
    Stack,
    chunk_slices,
)
from probekit.probing.memory import check_room
from probekit.probing.targets import Examples
from probekit.progress import Meter, Progress

MANIFEST = "manifest.json"
"""The file in a store that says what its activations are of."""


class Store(Activations):
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

    def chunks(self, examples: Examples, done: Done = lambda read: None) -> Iterator[Chunk]:
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
        check_room(folder, size, "lower probe.max_examples, or run without --store")
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
