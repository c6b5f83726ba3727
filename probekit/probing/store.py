"""A store of activations on disk: safetensors shards and a manifest, resumable, checked when it is read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from probekit import distributed
from probekit.config import ProbedName
from probekit.distributed import precision_of
from probekit.errors import ProbekitError
from probekit.evaluation.perplexity import window_and_stride
from probekit.io import read_json, write_json, write_tensors
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import HookPoint, Reader, Stack, chunk_slices
from probekit.probing.grid import Grid
from probekit.probing.targets import Examples
from probekit.progress import Progress
from probekit.run.run import Run

FORMAT = 1
"""Version of the layout; other versions are refused."""

PARTS = ("identity", "blocks", "examples", "shards")
"""What a manifest records, beside its format."""

HEADROOM = 1.02
"""Room wanted on the disk, as a multiple of the activations' size: shards have headers."""


class Store:
    """Activations that were read before.

    Args:
        folder: A complete store.
        device: Where activations are wanted.
        places: Which of its places are.
    """

    def __init__(self, folder: Path, device: torch.device, places: Sequence[HookPoint]) -> None:
        self._folder, self._device = folder, device
        self._manifest = read_json(folder / "manifest.json")
        stored = [Stack(b["width"], tuple(map(_place, b["places"]))) for b in self._manifest["blocks"]]
        rows_of = [[i for i, place in enumerate(block.points) if place in places] for block in stored]
        self._wanted = {b: rows for b, rows in enumerate(rows_of) if rows}
        self.stacks = [
            Stack(stored[b].width, tuple(stored[b].points[i] for i in rows))
            for b, rows in self._wanted.items()
        ]

    def chunks(self, examples: Examples) -> Iterator[tuple[slice, list[Tensor]]]:
        """Activations of all examples, of one of the splits that were stored; see `Activations`.

        Raises:
            ProbekitError: A shard is missing or damaged.
        """
        digest = examples_digest(examples)
        for part in distributed.share([*chunk_slices(examples.document)]):
            tensors = self._shard(shard_name(digest, part))
            yield part, [tensors[f"block{b}"][rows].to(self._device) for b, rows in self._wanted.items()]

    def _shard(self, name: str) -> dict[str, Tensor]:
        path = self._folder / name
        recorded = self._manifest["shards"].get(name)
        try:
            data = path.read_bytes()
            if recorded is None or hashlib.sha256(data).hexdigest() != recorded:
                raise ProbekitError(
                    f"{path} is not what its manifest records; delete it and run with --store again"
                )
            return safetensors.torch.load(data)
        except (OSError, SafetensorError) as error:
            raise ProbekitError(f"{path} cannot be read ({error}); run with --store again") from None


def write_store(
    reader: Reader,
    splits: Mapping[str, Examples],
    folder: Path,
    identity: Mapping[str, Any],
    progress: Progress,
) -> None:
    """Writes what a reader reads, or goes on with a store that was begun; a complete one costs nothing.

    The first of several processes reads and writes.

    Args:
        reader: Reads the activations.
        splits: Examples of every split.
        folder: The store's folder.
        identity: What model, corpus and settings the activations come from.
        progress: Told of every example.

    Raises:
        ProbekitError: The folder holds a store of something else, or the disk is too small.
    """
    shards = _begun(folder, identity, reader, splits)
    distributed.wait()  # all have looked before anything is written
    manifest = {
        "format": FORMAT,
        "identity": dict(identity),
        "blocks": [{"width": b.width, "places": [list(place) for place in b.points]} for b in reader.stacks],
        "examples": {split: examples_digest(examples) for split, examples in splits.items()},
        "shards": shards,
    }
    wanted = [
        (examples, part, shard_name(examples_digest(examples), part))
        for examples in splits.values()
        for part in chunk_slices(examples.document)
    ]
    missing = [item for item in wanted if item[2] not in shards]
    size = sum(
        stored_bytes(reader.stacks, len(reader.distances), part.stop - part.start) for _, part, _ in missing
    )
    _check_room(folder, size)
    rows = sum(part.stop - part.start for _, part, _ in missing)
    progress.say(
        f"store {size / 1e9:,.2f} GB of activations in {folder}" if missing else f"activations from {folder}"
    )
    if missing and distributed.is_first():
        # Before the first shard: a store that is interrupted in it can be told from a foreign folder.
        write_json(folder / "manifest.json", manifest)
    if missing and distributed.is_first():
        with progress.task("store activations", total=rows) as task:
            for examples, part, name in missing:
                blocks = reader.read(examples[part])
                write_tensors(folder / name, {f"block{b}": values for b, values in enumerate(blocks)})
                shards[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
                write_json(folder / "manifest.json", manifest)
                task.advance(part.stop - part.start)


def identity(run: Run, variant: ProbedName, seed: int, grid: Grid) -> dict[str, Any]:
    """What the activations of a variant depend on, other than places and examples."""
    window, stride = window_and_stride(run)
    facts, config = run.corpus.facts, run.config
    told = config.model_dump(include={"planner", "conditioning"}) | {"temperature": config.mixing.temperature}
    return {
        "version": version("probekit-lm"),
        "model": run.weights_digest(variant),
        "corpus": f"{facts['fingerprint'][:16]}, {facts['tokens']} tokens",
        "variant": f"random, seed {seed}" if variant == "random" else variant,
        "windows": [window, stride],
        "precision": precision_of(run.device, config.training.precision),
        "conditioning": str(told) if variant in VARIANTS else None,
        "distances": list(grid.distances),
    }


def stored_bytes(blocks: list[Stack], distances: int, examples: int) -> int:
    """Size in bytes of float32 activations of some examples."""
    return 4 * distances * examples * sum(len(block.points) * block.width for block in blocks)


def examples_digest(examples: Examples) -> str:
    """A digest of where examples are, in their order."""
    return hashlib.sha256(np.ascontiguousarray(examples.anchor, dtype=np.int64).tobytes()).hexdigest()


def shard_name(digest: str, part: slice) -> str:
    """The file of a chunk of examples."""
    return f"{digest[:12]}-{part.start:09d}.safetensors"


def _begun(
    folder: Path, identity: Mapping[str, Any], reader: Reader, splits: Mapping[str, Examples]
) -> dict[str, str]:
    """Shards that are there already.

    Raises:
        ProbekitError: They are of something else.
    """
    if not (folder / "manifest.json").exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ProbekitError(f"{folder} exists and holds no store (no manifest.json); move it away")
        return {}
    manifest = read_json(folder / "manifest.json")
    if not (isinstance(manifest, dict) and manifest.keys() >= {"format", *PARTS}):
        raise ProbekitError(f"{folder} has a manifest.json that records no store; delete it")
    if manifest["format"] != FORMAT:
        raise ProbekitError(f"{folder} has store format {manifest['format']}, not {FORMAT}; delete it")
    wanted = dict(identity) | {
        "places": [list(place) for block in reader.stacks for place in block.points],
        "examples": {split: examples_digest(examples) for split, examples in splits.items()},
    }
    found = manifest["identity"] | {
        "places": [place for block in manifest["blocks"] for place in block["places"]],
        "examples": manifest["examples"],
    }
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ProbekitError(
                f"{folder} stores activations of another {name}: {_short(found.get(name))}, and "
                f"{_short(value)} is asked for; delete it, or run without --store"
            )
    return {name: digest for name, digest in manifest["shards"].items() if (folder / name).exists()}


def _check_room(folder: Path, size: int) -> None:
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if HEADROOM * size > free:
        raise ProbekitError(
            f"{folder}: the activations take {size / 1e9:,.2f} GB, and the disk has {free / 1e9:,.2f} GB "
            "free; take fewer places or distances, lower probe.max_examples, or run without --store"
        )


def _place(pair: list[Any]) -> HookPoint:
    return str(pair[0]), int(pair[1])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"
