"""Steering: methods that move activations toward an action, all of them by the same distance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from probekit.probing.results import LinearProbe
from probekit.probing.solvers import Moments

Steering = Callable[[Tensor, Tensor, float], Tensor]
"""Maps float32 activations `[boundaries, width]`, the action that each is steered to `[boundaries]` and a
strength to the moved activations."""


def class_mean_vectors(moments: Moments) -> Tensor:
    """From the mean of all activations to that of each class `[classes, width]`; 0 for absent classes."""
    counts = moments.class_counts[0][:, None]
    means = moments.class_sums[0] / counts.clamp(min=1) - moments.mean[0]
    return torch.where(counts > 0, means, 0.0).float()


def along_vectors(vectors: Tensor) -> Steering:
    """Adds the action's vector, given for strength 1 `[actions, width]`, whatever the activation."""

    def steer(activations: Tensor, target: Tensor, strength: float) -> Tensor:
        return activations + strength * vectors[target]

    return steer


def along_weights(probe: LinearProbe, lengths: Tensor) -> Steering:
    """Adds the probe's weights of the action, less the mean over actions, scaled to lengths `[actions]`."""
    weights = probe.coef.T - probe.coef.T.mean(dim=0)
    return along_vectors(_scaled(weights, lengths))


def along_gradient(probe: LinearProbe, lengths: Tensor, steps: int) -> Steering:
    """Follows the gradient of the probe's log-probability of the action (Dathathri et al. 2020).

    Args:
        probe: The probe of these activations.
        lengths: Length of the path to each action at strength 1 `[actions]`.
        steps: Number of steps, all equally long.
    """

    def steer(activations: Tensor, target: Tensor, strength: float) -> Tensor:
        step = strength * lengths[target] / steps
        for _ in range(steps):
            activations = activations + _scaled(log_odds_gradient(probe, activations, target), step)
        return activations

    return steer


def log_odds_gradient(probe: LinearProbe, activations: Tensor, target: Tensor) -> Tensor:
    """Gradient of the log-odds of targets `[boundaries]` by the activations `[boundaries, width]`.

    It has the direction of the log-probability's gradient, but does not vanish where the probe is certain of
    the target.
    """
    others = probe.log_probabilities(activations).scatter(1, target[:, None], -torch.inf).softmax(dim=1)
    return probe.coef.T[target] - others @ probe.coef.T


def _scaled(vectors: Tensor, lengths: Tensor) -> Tensor:
    """Vectors `[n, width]`, each scaled to a length `[n]`; zero vectors stay zero."""
    return torch.nn.functional.normalize(vectors, dim=1) * lengths[:, None]
