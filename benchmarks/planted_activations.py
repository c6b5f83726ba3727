"""Random activations to fit probes on, shaped like those of an LM.

A few directions hold most of the variance, all positions share a large mean, features are correlated, layers
see one and the same example each in its own basis, and the class is a linear signal that fades with the
distance between the position that is read and the target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

SPLITS = ("probe", "validation", "test")
"""As in a run: probes are fitted on the first, their penalty is chosen on the second."""
MASSIVE = 3
"""Directions of far larger variance and mean than all others."""


@dataclass(frozen=True)
class Size:
    """How much there is to fit; there is a probe for each layer and distance."""

    layers: int
    distances: int
    examples: int  # for training, shared by all probes; a fifth as many each for validation and test
    width: int
    classes: int
    one_by_one: int  # the number of probes that contestants which fit them separately are measured on

    @property
    def probes(self) -> int:
        """Number of probes."""
        return self.layers * self.distances

    @property
    def shape(self) -> tuple[int, int, int]:
        """The product of a probe's activations and weights: rows, features and classes."""
        return self.examples, self.width, self.classes


@dataclass(frozen=True)
class Data:
    """Activations `[probes, rows, width]` and classes `[rows]` of each split."""

    X: dict[str, Tensor]
    y: dict[str, Tensor]
    classes: int

    def only(self, probes: slice) -> Self:
        """The same for some probes alone."""
        return replace(self, X={split: part[probes] for split, part in self.X.items()})

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        X = {split: part.to(device) for split, part in self.X.items()}
        return replace(self, X=X, y={split: part.to(device) for split, part in self.y.items()})


def plant(size: Size, device: torch.device, seed: int = 0) -> Data:
    """Draws activations in float32; the same size, seed and kind of device give the same."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = {"probe": size.examples, "validation": size.examples // 5, "test": size.examples // 5}
    n, width = sum(rows.values()), size.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    y = _classes(size, n, generator, device)
    spectrum = torch.arange(1.0, width + 1, device=device).rsqrt()  # standard deviation of each direction
    spectrum[:MASSIVE] *= 20
    offset = normal(width)
    offset[:MASSIVE] *= 50
    shared = normal(n, width)
    bases = [normal(width, width) / math.sqrt(width) for _ in range(size.layers)]
    signals = [normal(size.classes, width) * (0.8 / math.sqrt(width)) for _ in range(size.layers)]
    X = torch.empty(size.probes, n, width, device=device)
    for distance in range(size.distances):
        background = (0.8 * shared + 0.6 * normal(n, width)) * spectrum + offset
        for layer, (basis, signal) in enumerate(zip(bases, signals, strict=True)):
            at = layer * size.distances + distance
            torch.matmul(background, basis, out=X[at])
            X[at] += 0.85**distance * signal[y] + 0.3 * normal(n, width)
    split = dict(zip(SPLITS, X.split([rows[name] for name in SPLITS], dim=1), strict=True))
    labels = dict(zip(SPLITS, y.split([rows[name] for name in SPLITS]), strict=True))
    return Data({name: part.contiguous() for name, part in split.items()}, labels, size.classes)


def _classes(size: Size, rows: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Classes `[rows]` of uneven frequency, each there once at least among the training examples.

    Where a class is absent, solvers differ in what they minimise, and could not be compared.
    """
    if size.examples < size.classes:
        raise ValueError(f"{size.examples} examples are too few for {size.classes} classes")
    frequency = torch.arange(1.0, size.classes + 1, device=device).pow(-0.7)
    y = torch.multinomial(frequency, rows, replacement=True, generator=generator)
    y[: size.classes] = torch.arange(size.classes, device=device)
    return y
