"""Activations: one forward pass over documents reads every location and layer at the positions asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.corpus.examples import Windows, collate
from probekit.corpus.store import Corpus
from probekit.devices import autocast
from probekit.errors import ProbekitError
from probekit.models.language_model import hook_name
from probekit.models.mixing import Mixing
from probekit.models.planned_lm import PlannedLM
from probekit.progress import Task

Place = tuple[str, int]
"""A location and a layer."""


@dataclass(frozen=True)
class Activations:
    """What was read.

    Attributes:
        positions: Where, in `corpus.tokens`, sorted and distinct `[positions]`.
        values: For each place float32 activations `[positions, features]`, on the CPU.
    """

    positions: np.ndarray
    values: dict[Place, Tensor]

    def at(self, places: list[Place], positions: np.ndarray) -> Tensor:
        """Activations `[places, positions, features]` of places of one width, at positions that were read."""
        rows = np.searchsorted(self.positions, positions)
        return torch.stack([self.values[place][rows] for place in places])

    def by_width(self) -> list[list[Place]]:
        """The places, those of one width together."""
        groups: dict[int, list[Place]] = {}
        for place, values in self.values.items():
            groups.setdefault(values.shape[1], []).append(place)
        return list(groups.values())


def read_activations(
    model: PlannedLM,
    mixing: Mixing,
    corpus: Corpus,
    windows: Windows,
    positions: np.ndarray,
    places: list[Place],
    *,
    batch_size: int,
    precision: str,
    task: Task,
) -> Activations:
    """Reads activations, each in the window that scores the token after it.

    Args:
        model: The LM with its conditioning.
        mixing: How it chooses actions.
        corpus: The corpus.
        windows: Windows over the documents, in order, as `cut_windows` makes them.
        positions: Where to read, in `corpus.tokens`, sorted and distinct `[positions]`.
        places: What to read there.
        batch_size: Windows in one forward pass.
        precision: The setting `training.precision`.
        task: Told of every window.

    Raises:
        ProbekitError: An activation is not finite.
    """
    device = model.planner.start.device
    last = windows.start + windows.length
    window_of = np.searchsorted(last, positions, side="right")
    layers = len(model.bridged.blocks)
    stop = max(layer for _, layer in places) + 1
    read: dict[Place, list[Tensor]] = {place: [] for place in places}
    for start in range(0, len(windows), batch_size):
        rows = windows[start : start + batch_size]
        first, end = np.searchsorted(window_of, [start, start + len(rows)])
        task.advance(len(rows))
        if first == end:
            continue
        row = torch.from_numpy(window_of[first:end] - start)
        column = torch.from_numpy(positions[first:end] - rows.start[window_of[first:end] - start])
        batch = collate(corpus, rows).to(device)
        with torch.no_grad(), autocast(device, precision):
            capture = [(hook_name(*place), _reader(read[place], row, column)) for place in places]
            model.bridged.run_with_hooks(
                batch.tokens,
                fwd_hooks=[*model.hooks(batch, mixing), *capture],
                stop_at_layer=stop if stop < layers else None,
                return_type=None,
            )
    # Taken out one by one, so that parts and whole are not both held for all places.
    activations = {place: torch.cat(read.pop(place)) for place in places}
    for (location, layer), values in activations.items():
        if not values.isfinite().all():
            raise ProbekitError(f"the activations at {location}, layer {layer}, are not all finite")
    return Activations(positions, activations)


def _reader(into: list[Tensor], row: Tensor, column: Tensor) -> Callable[..., None]:
    def read(activation: Tensor, hook: Any = None) -> None:
        into.append(activation[row, column].flatten(1).float().cpu())

    return read
