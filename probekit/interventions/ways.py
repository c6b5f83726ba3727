"""Ways of steering: from an activation toward an action, each as long as the way between class means.

PPLM (Dathathri et al. 2020, arXiv 1912.02164) moves activations along the gradient of a classifier's
log-probability, in a few steps of fixed length. Here the classifier is the probe of the site itself. The
gradient of a linear softmax probe with weights w_a is w_a - sum_b p_b w_b: unlike a fixed direction it turns
away from the actions that the activation tells, with every step anew.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from probekit.probing.saved import LinearProbe

Way = Callable[[Tensor, Tensor, float], Tensor]
"""Activations in float32 `[scenes, width]`, the action that each is moved to `[scenes]`, and a strength;
gives the moved activations."""


def straight(vectors: Tensor) -> Way:
    """Adds the action's vector, given for strength 1 `[actions, width]`, wherever the activation is."""

    def move(activations: Tensor, target: Tensor, strength: float) -> Tensor:
        return activations + strength * vectors[target]

    return move


def along_weights(probe: LinearProbe, lengths: Tensor) -> Way:
    """Adds the probe's weights of the action less the mean of all, as long as given `[actions]`."""
    weights = probe.coef.T - probe.coef.T.mean(dim=0)
    return straight(_long(weights, lengths))


def along_gradient(probe: LinearProbe, lengths: Tensor, steps: int) -> Way:
    """Follows the gradient of the probe's log-probability of the action.

    Args:
        probe: The probe of the site.
        lengths: Of the whole way to each action, for strength 1 `[actions]`; all steps are equally long.
        steps: How many.
    """

    def move(activations: Tensor, target: Tensor, strength: float) -> Tensor:
        step = strength * lengths[target] / steps
        for _ in range(steps):
            activations = activations + _long(uphill(probe, activations, target), step)
        return activations

    return move


def uphill(probe: LinearProbe, activations: Tensor, target: Tensor) -> Tensor:
    """The gradient of the log-probability of targets `[scenes]`, over the probability of all others.

    So it does not vanish, or drown in rounding, where the probe is sure of the target.

    Args:
        probe: The probe.
        activations: By which the gradient is taken `[scenes, width]`.
        target: The targets.
    """
    others = probe.log_probabilities(activations).scatter(1, target[:, None], -torch.inf).softmax(dim=1)
    return probe.coef.T[target] - others @ probe.coef.T


def _long(vectors: Tensor, lengths: Tensor) -> Tensor:
    """Vectors `[n, width]`, each scaled to a length `[n]`; none where there is no direction."""
    return torch.nn.functional.normalize(vectors, dim=1) * lengths[:, None]
