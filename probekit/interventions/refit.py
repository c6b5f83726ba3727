"""Whether an eraser left anything: a probe fitted again on erased activations, from the sums alone.

A least-squares probe on one-hot classes, the linear reader that an eraser's guarantee is about. It is fitted
on the split that all probes are fitted on, and asked on the activations of the scenes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from probekit.interventions.erasure import Eraser, erased
from probekit.probing.solvers import Moments

PENALTY = 1e-3
"""On weights, as a share of the mean variance: what was erased is zero but for rounding."""


def predictions(moments: Moments, activations: Tensor) -> np.ndarray:
    """The class that a least-squares probe tells for activations `[examples, width]`: `[examples]`."""
    count = moments.count[0]
    shares = moments.class_counts[0] / count
    covariance = moments.scatter[0] / count
    cross = (moments.class_sums[0] / count - shares[:, None] * moments.mean[0]).mT
    ridge = PENALTY * covariance.diagonal().mean().clamp(min=1e-30)
    weights = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance)).to(covariance), cross)
    scores = shares + (activations.to(covariance) - moments.mean[0]) @ weights
    return scores.argmax(dim=-1).cpu().numpy()


def accuracies(
    moments: Moments, eraser: Eraser, activations: Tensor, true: np.ndarray
) -> dict[str, np.ndarray]:
    """Which of some examples are told right, by metric `[examples]`.

    Args:
        moments: Sums to fit on, of one probe.
        eraser: What is taken away.
        activations: Of the examples, as they are `[examples, width]`.
        true: Their classes `[examples]`.

    Returns:
        `fitted_accuracy` of a probe on activations as they are, `refitted_accuracy` of one on erased ones,
        and `prior_accuracy` of the most frequent class.
    """
    told = {
        "fitted_accuracy": predictions(moments, activations),
        "refitted_accuracy": predictions(erased(moments, eraser), eraser(activations)),
        "prior_accuracy": np.full(len(true), int(moments.class_counts[0].argmax())),
    }
    return {name: (classes == true).astype(float) for name, classes in told.items()}
