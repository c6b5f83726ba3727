"""Where a stage stands, kept now and then: what was stopped goes on from there to the same bits."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probekit.storage import read_metadata, read_tensors, write_tensors


@dataclass(frozen=True)
class Standing:
    """Where a stage stands.

    Attributes:
        step: Steps that are done.
        best: The best validation loss so far.
        best_epoch: The pass behind which it was measured.
        divided: Micro-batches in a step, which may have become more where memory was short.
    """

    step: int = 0
    best: float = float("inf")
    best_epoch: int = 0
    divided: int = 1


class StateFile:
    """The file that a stage's state is kept in.

    Args:
        path: The file.
        settings: What decides the stage's result; the state of another training is not gone on from.
        every: Seconds between two writes.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], every: float) -> None:
        self._path, self._every = path, every
        self._settings = json.dumps(settings, sort_keys=True, default=str)
        self._written = time.monotonic()

    @property
    def standing(self) -> Standing:
        """Where the stage stands; at its beginning, where nothing is kept or it is of another training."""
        if not self._path.exists():
            return Standing()
        kept = read_metadata(self._path)
        return (
            Standing(**json.loads(kept["standing"])) if kept.get("settings") == self._settings else Standing()
        )

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._written >= self._every

    def write(self, standing: Standing, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the state, in place of an earlier one."""
        write_tensors(
            self._path, tensors, {"standing": json.dumps(asdict(standing)), "settings": self._settings}
        )
        self._written = time.monotonic()

    def forget(self) -> None:
        """Removes the state of a stage that is finished."""
        self._path.unlink(missing_ok=True)

    def read(self) -> dict[str, Tensor]:
        """The tensors of the state."""
        return read_tensors(self._path)


def random_state(generators: Iterable[torch.Generator]) -> dict[str, Tensor]:
    """The states of what draws random numbers."""
    states = {"random": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states | {f"random.{i}": generator.get_state() for i, generator in enumerate(generators)}


def set_random_state(states: Mapping[str, Tensor], generators: Iterable[torch.Generator]) -> None:
    """Puts back what `random_state` took; on another device, that one's draws are others."""
    torch.set_rng_state(states["random"])
    if torch.cuda.is_available() and "random.cuda" in states:
        torch.cuda.set_rng_state(states["random.cuda"])
    for i, generator in enumerate(generators):
        generator.set_state(states[f"random.{i}"])


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of every parameter, by number and name."""
    remembered = optimiser.state_dict()["state"]
    return {
        f"optimiser.{i}.{name}": value for i, values in remembered.items() for name, value in values.items()
    }


def set_optimiser_state(optimiser: torch.optim.Optimizer, states: Mapping[str, Tensor]) -> None:
    """Puts back what `optimiser_state` took."""
    remembered: dict[int, dict[str, Tensor]] = {}
    for key, value in states.items():
        kind, _, rest = key.partition(".")
        if kind == "optimiser":
            number, _, name = rest.partition(".")
            remembered.setdefault(int(number), {})[name] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": remembered})
