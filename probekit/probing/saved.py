"""Fitted linear probes as they are kept beside the results: who reads, steers or erases along them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.storage import read_tensors, write_tensors

if TYPE_CHECKING:
    from probekit.probing.activations import Block
    from probekit.probing.fitting import Fitted

KEPT = ("softmax", "ridge", "lda")
"""Solvers whose probes are linear."""


@dataclass(frozen=True)
class Cell:
    """What a probe reads: where, when and what.

    Attributes:
        location: TransformerLens hook, without the layer.
        layer: The layer.
        distance: Tokens before the anchor.
        horizon: Sentences ahead.
        solver: How it was fitted.
    """

    location: str
    layer: int
    distance: int
    horizon: int = 1
    solver: str = "softmax"

    def __str__(self) -> str:
        return f"{self.location}, layer {self.layer}, distance {self.distance}, horizon {self.horizon}"

    @property
    def key(self) -> str:
        """Its name in the file."""
        return "|".join(map(str, (self.solver, self.location, self.layer, self.distance, self.horizon)))

    @classmethod
    def of(cls, key: str) -> Cell:
        """The cell of a name in the file."""
        solver, location, layer, distance, horizon = key.split("|")
        return cls(location, int(layer), int(distance), int(horizon), solver)


@dataclass(frozen=True)
class LinearProbe:
    """A probe on raw activations.

    Attributes:
        coef: `[width, classes]`.
        intercept: `[classes]`; minus infinity for a class that was not there to fit on.
    """

    coef: Tensor
    intercept: Tensor

    def log_probabilities(self, activations: Tensor) -> Tensor:
        """Log-probabilities of the classes in nats, of activations `[..., width]`."""
        return (activations.float() @ self.coef + self.intercept).log_softmax(dim=-1)


def weights_of(
    fitted: Iterable[Fitted], blocks: list[Block], distances: tuple[int, ...]
) -> dict[str, Tensor]:
    """The weights of fitted probes that are linear, by the names that they are kept under."""
    weights: dict[str, Tensor] = {}
    for batch in fitted:
        if batch.solver not in KEPT:
            continue
        places = [(place, distance) for place in blocks[batch.block].places for distance in distances]
        for ((location, layer), distance), coef, intercept in zip(
            places, batch.probes.coef_, batch.probes.intercept_, strict=True
        ):
            key = Cell(location, layer, distance, batch.horizon, batch.solver).key
            # Copied: a row of a batch would keep the whole batch.
            weights[f"{key}|coef"] = coef.detach().float().cpu().clone()
            weights[f"{key}|intercept"] = intercept.detach().float().cpu().clone()
    return weights


def write_probes(folder: Path, variant: str, seed: int, weights: Mapping[str, Tensor]) -> None:
    """Writes the weights of a variant's probes into the folder of results."""
    write_tensors(_file(folder, variant, seed), weights)


class SavedProbes:
    """The linear probes of one variant and seed of a run.

    Args:
        folder: The folder of results, `probes/` of a run.
        variant: Whose.
        seed: Of the documents drawn to fit on.

    Raises:
        ProbekitError: There are none; it says which command makes them.
    """

    def __init__(self, folder: Path, variant: str, seed: int) -> None:
        self._folder, self._variant = folder, variant
        path = _file(folder, variant, seed)
        if not path.is_file():
            there = sorted(other.stem for other in folder.glob("*-seed*.safetensors"))
            # A probing takes the place of the one before: what is there is to be asked for again.
            wanted = dict.fromkeys([*(name.rpartition("-seed")[0] for name in there), variant])
            raise ProbekitError(
                f"{path} does not exist: no linear probes of {variant!r} with seed {seed} are kept "
                f"(there are {', '.join(there) or 'none'}); run `probekit probe {folder.parent} "
                f"--probe.variants {' '.join(wanted)}`"
            )
        self._tensors = read_tensors(path)

    @property
    def cells(self) -> list[Cell]:
        """The cells that have a probe."""
        return [Cell.of(name.removesuffix("|coef")) for name in self._tensors if name.endswith("|coef")]

    def __getitem__(self, cell: Cell) -> LinearProbe:
        """The probe of a cell.

        Raises:
            ProbekitError: There is none.
        """
        if f"{cell.key}|coef" not in self._tensors:
            known = "; ".join(
                f"{name}s {', '.join(map(str, sorted({getattr(other, name) for other in self.cells})))}"
                for name in ("location", "layer", "distance", "horizon", "solver")
            )
            raise ProbekitError(
                f"{self._folder} has no {cell.solver} probe of {self._variant!r} at {cell}; it has {known}"
            )
        return LinearProbe(*(self._tensors[f"{cell.key}|{part}"] for part in ("coef", "intercept")))

    def stacked(self, cells: list[Cell]) -> LinearProbe:
        """The probes of several cells of one width at once: `coef` `[cells, width, classes]`."""
        probes = [self[cell] for cell in cells]
        return LinearProbe(
            torch.stack([probe.coef for probe in probes]),
            torch.stack([probe.intercept for probe in probes])[:, None],
        )


def _file(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{variant}-seed{seed}.safetensors"
