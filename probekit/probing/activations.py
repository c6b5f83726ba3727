"""Activations: one forward pass over documents reads every location, layer and distance, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from probekit import distributed
from probekit.config import ProbedName
from probekit.data.windows import collate, cut_windows, input_tokens
from probekit.distributed import autocast
from probekit.errors import ProbekitError
from probekit.evaluation.perplexity import window_and_stride
from probekit.models.conditioning import Conditioned
from probekit.models.language_model import Hook, hook_name
from probekit.models.mixing import VARIANTS, evaluation_mixing
from probekit.probing.locations import BEFORE
from probekit.probing.targets import Examples
from probekit.run.run import Run

HookPoint = tuple[str, int]
"""A location and a layer."""

CHUNK_EXAMPLES = 512
"""Examples read at once; a longer document is read in parts, whose windows may overlap a little."""


@dataclass(frozen=True)
class Stack:
    """Places of one width, read into one tensor.

    Attributes:
        width: Features at each place.
        points: The hook points, in the order of the tensor's first axis.
    """

    width: int
    points: tuple[HookPoint, ...]


class Activations(Protocol):
    """Where activations come from: a model, or a store of what was read before."""

    stacks: list[Stack]

    def chunks(self, examples: Examples) -> Iterator[tuple[slice, list[Tensor]]]:
        """Activations of this process's share of the examples, in order, a chunk at a time.

        Yields:
            Which examples, and for every block float32 activations `[places, distances, chunk, width]`.
        """
        ...


def stacks_of(places: Sequence[HookPoint], widths: dict[str, int]) -> list[Stack]:
    """The places, those of one width together."""
    groups: dict[int, list[HookPoint]] = {}
    for place in places:
        groups.setdefault(widths[place[0].removesuffix(BEFORE)], []).append(place)
    return [Stack(width, tuple(group)) for width, group in groups.items()]


class Reader:
    """Reads activations of one variant of a run's LM.

    Each is read in the window that scores the token after it, as the perplexity is.

    Args:
        run: The run.
        variant: Whose activations: `none`, a trained variant, or `random` for random weights.
        places: What to read.
        distances: Tokens before the anchor, in the order of the second axis.
        seed: Of random weights.
    """

    def __init__(
        self,
        run: Run,
        variant: ProbedName,
        places: Sequence[HookPoint],
        distances: Sequence[int],
        seed: int = 0,
    ) -> None:
        self.stacks = stacks_of(places, run.locations)
        self._run, self.distances = run, np.array(distances)
        self._window, self._stride = window_and_stride(run)
        self._conditioned = run.model(variant) if variant in VARIANTS else None
        self._corpus = run.corpus_of(variant) if variant in VARIANTS else run.corpus
        self._mixing = evaluation_mixing(variant)
        adapter = None if self._conditioned is None else self._conditioned.adapter
        names = [_name(place) for place in places] + list(adapter.names if adapter is not None else ())
        self._forward = run.forward_pass(names, variant, seed)

    def chunks(self, examples: Examples) -> Iterator[tuple[slice, list[Tensor]]]:
        """Activations of this process's share of the examples; see `Activations`."""
        for part in distributed.share([*chunk_slices(examples.document)]):
            yield part, self.read(examples[part])

    def changed_by_conditioning(self) -> set[HookPoint]:
        """The places that an action changes at the first position, if any, that can have been told of it."""
        if self._conditioned is None or (adapter := self._conditioned.adapter) is None:
            return set()
        # Unlike tokens: where all are alike, attention reads the same wherever it looks.
        tokens = torch.tensor([[0, 1]], device=self._run.device)
        told = torch.tensor([[adapter.lag, 1]], device=self._run.device)
        at = np.array([0]), np.array([1]), torch.tensor([0], device=self._run.device)
        without, added = (self._empty(1, 1) for _ in range(2))
        nothing = torch.zeros_like(adapter.codebook[0])
        for action, into in ((nothing, without), (nothing + 1, added)):
            self._pass(adapter.conditioned(tokens, torch.stack([nothing, action]), told), into, *at)
        return {
            place
            for block, before, after in zip(self.stacks, without, added, strict=True)
            for place, *values in zip(block.points, before, after, strict=True)
            if not torch.equal(*values)
        }

    def read(self, examples: Examples) -> list[Tensor]:
        """All blocks of some examples, each `[places, distances, examples, width]`.

        Raises:
            ProbekitError: An activation is not finite; it names the location and layer.
        """
        positions = examples.anchor - self.distances[:, None]
        windows = cut_windows(self._run.corpus, np.unique(examples.document), self._window, self._stride)
        window = np.searchsorted(windows.start + windows.length, positions.ravel(), side="right")
        # Windows of like length side by side need little padding.
        needed = np.unique(window)
        needed = needed[np.argsort(windows.length[needed], kind="stable")]
        rank = np.empty(len(windows), dtype=np.int64)
        rank[needed] = np.arange(len(needed))
        order = np.argsort(rank[window], kind="stable")
        into = self._empty(*positions.shape)
        size = self._run.config.evaluation.batch_size
        for start in range(0, len(needed), size):
            rows = windows[needed[start : start + size]]
            first, end = np.searchsorted(rank[window[order]], [start, start + len(rows)])
            flat = order[first:end]
            row = rank[window[flat]] - start
            column = positions.ravel()[flat] - rows.start[row]
            index = torch.from_numpy(flat).to(self._run.device)
            if self._conditioned is None:
                read = Conditioned(input_tokens(self._run.corpus, rows).to(self._run.device))
            else:
                batch = collate(self._corpus, rows).to(self._run.device)
                with torch.no_grad():
                    read = self._conditioned.conditioned(batch, self._mixing)
            self._pass(read, into, row, column, index)
        for block, values in zip(self.stacks, into, strict=True):
            check_finite(block, values)
        return into

    def _pass(
        self,
        given: Conditioned,
        into: list[Tensor],
        row: np.ndarray,
        column: np.ndarray,
        index: Tensor,
    ) -> None:
        """One forward pass; rows and columns of tokens go to the flat index of each block's inner axes."""
        at = tuple(torch.from_numpy(axis).to(given.tokens.device) for axis in (row, column))
        if given.slots is not None:
            at = at[0], given.slots.own[at]

        def reader(target: Tensor) -> Callable[[Tensor], None]:
            def read(activation: Tensor, hook: Any = None) -> None:
                target.flatten(0, 1)[index] = activation[at].flatten(1).float()

            return read

        reads: dict[bool, list[Hook]] = {True: [], False: []}
        for block, values in zip(self.stacks, into, strict=True):
            for place, target in zip(block.points, values, strict=True):
                reads[place[0].endswith(BEFORE)].append((_name(place), reader(target)))
        all_hooks = [*reads[True], *given.hooks, *reads[False]]
        with torch.no_grad(), autocast(given.tokens.device, self._run.config.training.precision):
            self._forward(given.tokens, all_hooks, len(reads[True]) + len(reads[False]), given.positions)

    def _empty(self, distances: int, examples: int) -> list[Tensor]:
        return [
            torch.empty(len(block.points), distances, examples, block.width, device=self._run.device)
            for block in self.stacks
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


def check_finite(block: Stack, values: Tensor) -> None:
    """Refuses activations `[places, ...]` of a block that are not all finite.

    Raises:
        ProbekitError: Names the location and layer.
    """
    for (location, layer), value in zip(block.points, values, strict=True):
        # A sum is finite if all is, unless it overflows: only then is a closer look needed.
        if not value.sum().isfinite() and not value.isfinite().all():
            raise ProbekitError(
                f"the activations at {location}, layer {layer}, are not all finite; with "
                "training.precision bfloat16 try float32"
            )


def _name(place: HookPoint) -> str:
    location, layer = place
    return hook_name(location.removesuffix(BEFORE), layer)
