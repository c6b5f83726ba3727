"""How much of each component is removed, as a random number that can be trained and is often exactly 0 or 1.

A hard concrete variable (Louizos et al. 2018, arXiv 1712.01312): a sigmoid of logistic noise around a trained
location, stretched a little beyond [0, 1] and cut there. Here it is what is *removed*, so that the penalty,
the expected number that is not 0, counts removed components.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOW, HIGH = -0.1, 1.1
"""What the sigmoid is stretched to."""

TEMPERATURE = 2 / 3
"""Of the sigmoid: low enough for most draws to be near 0 or 1, high enough for a gradient."""

START = -2.0
"""Locations before training: little is removed, and every component has a draw of its own now and then."""


def begun(components: int) -> Tensor:
    """Locations before training `[components]`."""
    return torch.full((components,), START)


def drawn(locations: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random amounts removed `[count, components]`, differentiable by locations `[components]`.

    Args:
        locations: On any device.
        count: How many draws.
        generator: On the CPU, so that every device has the same draws.
    """
    uniform = torch.rand(count, len(locations), generator=generator).clamp(1e-6, 1 - 1e-6)
    return _hard((uniform.logit().to(locations) + locations) / TEMPERATURE)


def settled(locations: Tensor) -> Tensor:
    """The amounts removed without noise `[components]`."""
    return _hard(locations)


def expected_count(locations: Tensor) -> Tensor:
    """How many components are removed at least in part, in the mean over draws."""
    return (locations - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid().sum()


def _hard(scores: Tensor) -> Tensor:
    return (LOW + (HIGH - LOW) * scores.sigmoid()).clamp(0.0, 1.0)
