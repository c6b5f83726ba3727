"""Where a stage stands, kept now and then: what was stopped goes on from there to the same bits."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.models.sharded import sharded_like
from probekit.storage import read_metadata, read_tensors, write_tensors

REMEMBERED = {"step", "exp_avg", "exp_avg_sq"}
"""What AdamW remembers of a parameter."""


@dataclass(frozen=True)
class Standing:
    """Where a stage stands.

    Attributes:
        step: Steps that are done.
        best: The best validation loss so far.
        best_epoch: The pass behind which it was measured.
        divided: Micro-batches in a step, which may have become more where memory was short.
    """

    step: Annotated[int, Field(ge=0)] = 0
    best: float = float("inf")
    best_epoch: Annotated[int, Field(ge=0)] = 0
    divided: Annotated[int, Field(ge=1)] = 1


class StateFile:
    """The file that a stage's state is kept in.

    Args:
        path: The file.
        settings: What decides the stage's result; the state of another training is not gone on from.
        every: Seconds between two writes.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], every: float) -> None:
        self._path, self._every = path, every
        self._settings = json.loads(json.dumps(settings, default=str))
        self._written = time.monotonic()

    @property
    def standing(self) -> Standing:
        """Where the stage stands; at its beginning, where nothing is kept or it is of another training."""
        kept = self._metadata()
        if kept is None or self._difference(kept):
            return Standing()
        with self.restoring():
            return TypeAdapter(Standing).validate_python(json.loads(kept["standing"]))

    @property
    def difference(self) -> str | None:
        """A setting that was another one when the state was kept, and how many steps are lost by it.

        Settings that only one version of probekit knows are none.
        """
        kept = self._metadata()
        return None if kept is None else self._difference(kept)

    def _metadata(self) -> dict[str, str] | None:
        return read_metadata(self._path) if self._path.exists() else None

    def _difference(self, kept: Mapping[str, str]) -> str | None:
        with self.restoring():
            settings: dict[str, Any] = dict(json.loads(kept["settings"]))
        for name in settings.keys() & self._settings.keys():
            if settings[name] != self._settings[name]:
                steps = json.loads(kept["standing"])["step"]
                return (
                    f"{name} was {settings[name]!r} and is now {self._settings[name]!r}, so the {steps:,} "
                    "steps that were done do not count"
                )
        return None

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._written >= self._every

    def write(self, standing: Standing, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the state, in place of an earlier one."""
        write_tensors(
            self._path,
            tensors,
            {"standing": json.dumps(asdict(standing)), "settings": json.dumps(self._settings)},
        )
        self._written = time.monotonic()

    def forget(self) -> None:
        """Removes the state of a stage that is finished."""
        self._path.unlink(missing_ok=True)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Has what does not fit in the block told as the fault of the file.

        Raises:
            ProbekitError: It is the state of something else.
        """
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
            raise ProbekitError(
                f"{self._path} is no state of this training; delete it, and the stage begins anew"
            ) from None

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


def check_alike(values: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Refuses tensors of other types and shapes.

    Raises:
        ValueError: Some are.
    """
    for value, other in zip(values, others, strict=True):
        if (value.dtype, value.shape) != (other.dtype, other.shape):
            raise ValueError(f"{value.dtype} {list(value.shape)} is not {other.dtype} {list(other.shape)}")


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of every parameter, by number and name."""
    remembered = optimiser.state_dict()["state"]
    return {
        f"optimiser.{i}.{name}": value for i, values in remembered.items() for name, value in values.items()
    }


def set_optimiser_state(optimiser: torch.optim.Optimizer, states: Mapping[str, Tensor]) -> None:
    """Puts back what `optimiser_state` took.

    Raises:
        ValueError: It was of an optimiser of other parameters.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    remembered: dict[int, dict[str, Tensor]] = {}
    for key, value in states.items():
        kind, _, rest = key.partition(".")
        if kind == "optimiser":
            number, _, name = rest.partition(".")
            if value.ndim:  # the others are counts of steps
                own = parameters[int(number)]
                check_alike([value], [own])
                value = sharded_like(value, own)
            remembered.setdefault(int(number), {})[name] = value
    if any(values.keys() != REMEMBERED for values in remembered.values()):
        raise ValueError("something is missing")
    optimiser.load_state_dict(optimiser.state_dict() | {"state": remembered})
