"""Scores of predicted actions, and the two counting baselines: the prior, and the bigram of actions.

The baselines give log-probabilities that are scored exactly like a probe's or a planner's, for actions or any
other labels. Counts of parts of a corpus add up, so that it can be counted a few documents at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from probekit.errors import ProbekitError

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

NO_ACTION = -1
"""Stands for a missing action or other label, such as the one before a document's first."""
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Strengths of the prior that the bigram tries, in pseudo-counts."""


METRICS = {"correct": "accuracy", "top5": "top5", "cross_entropy": "cross_entropy"}
"""Scores of examples, and the names of their means."""


def score_actions(log_probabilities: Tensor | NDArray, actions: Tensor | NDArray) -> dict[str, NDArray[Any]]:
    """Scores predictions against the true actions: arrays `[..., examples]`, cross-entropy in nats.

    An action's rank is the number of actions that are more probable, or as probable and of a lower index, so
    that a constant distribution predicts action 0.

    Args:
        log_probabilities: In nats `[..., examples, actions]`, on any device.
        actions: True actions `[..., examples]`, or `[examples]` where the leading dimensions share them.
    """
    log_p = torch.as_tensor(log_probabilities)
    truth = torch.as_tensor(actions, device=log_p.device).long().expand(log_p.shape[:-1])[..., None]
    true_log_p = log_p.gather(-1, truth)
    index = torch.arange(log_p.shape[-1], device=log_p.device)
    # Not <= instead of >, so that a NaN counts as more probable than the truth and never as a hit.
    ahead = ~(log_p <= true_log_p) | ((log_p == true_log_p) & (index < truth))
    rank = ahead.sum(-1).cpu().numpy()
    nats = -true_log_p[..., 0].double().cpu().numpy()
    return {"correct": rank == 0, "top5": rank < 5, "cross_entropy": nats}


def prior_log_probabilities(actions: ArrayLike, k: int) -> Floats:
    """`log_shares` of actions or other labels 0 to k - 1 `[examples]`; missing ones, -1, do not count."""
    checked = _checked(actions, k)
    return log_shares(np.bincount(checked[checked != NO_ACTION], minlength=k))


def log_shares(counts: ArrayLike) -> Floats:
    """Log shares of counts `[classes]`, in nats.

    Every class gets half an example more than it has, so that one that never occurred has a finite loss:
    the estimator of Krichevsky and Trofimov (1981).
    """
    smoothed = np.asarray(counts, np.float64) + 0.5
    return np.log(smoothed / smoothed.sum())


def pair_counts(previous: ArrayLike, target: ArrayLike, k: int) -> Floats:
    """How often each action follows each.

    Args:
        previous: Previous actions, -1 where there is none `[examples]`.
        target: Target actions; an example without one, -1, does not count `[examples]`.
        k: Number of actions.

    Returns:
        Counts `[k + 1, k]`; the last row is that of no previous action.
    """
    before, after = _checked(previous, k), _checked(target, k)
    there = after != NO_ACTION
    cells = np.where(before == NO_ACTION, k, before)[there] * k + after[there]
    return np.bincount(cells, minlength=(k + 1) * k).reshape(k + 1, k).astype(np.float64)


@dataclass(frozen=True)
class Bigram:
    """P(target action | previous action), shrunk towards the prior.

    Attributes:
        table: Log-probabilities in nats `[k + 1, k]`; the last row is that of no previous action, -1.
        strength: Pseudo-counts of the prior.
    """

    table: Floats
    strength: float

    def log_probabilities(self, previous: ArrayLike) -> Floats:
        """Log-probabilities in nats `[examples, k]`, given previous actions `[examples]`."""
        return self.table[_checked(previous, self.table.shape[1])]


def fit_bigram(
    previous: ArrayLike,
    target: ArrayLike,
    k: int,
    validation: tuple[ArrayLike, ArrayLike],
    strengths: Sequence[float] = STRENGTHS,
) -> Bigram:
    """`bigram_of_counts` of examples, and of the previous and target actions of validation examples."""
    return bigram_of_counts(pair_counts(previous, target, k), pair_counts(*validation, k), strengths)


def bigram_of_counts(counts: Floats, validation: Floats, strengths: Sequence[float] = STRENGTHS) -> Bigram:
    """Fits (count(previous, target) + strength * prior(target)) / (count(previous) + strength).

    Args:
        counts: `pair_counts` of the training examples `[k + 1, k]`.
        validation: Those of the examples on which the strength is chosen, by cross-entropy.
        strengths: Strengths to try, in pseudo-counts, all positive.

    Raises:
        ProbekitError: There is no validation example.
    """
    if not validation.any():
        raise ProbekitError("the bigram's validation examples are empty; its strength is chosen on them")
    prior = np.exp(log_shares(counts.sum(0)))
    fits = []
    for strength in strengths:
        table = np.log((counts + strength * prior) / (counts.sum(1, keepdims=True) + strength))
        fits.append((-(validation * table).sum(), Bigram(table, strength)))
    return min(fits, key=lambda fit: fit[0])[1]


def _checked(actions: ArrayLike, k: int) -> Integers:
    checked = np.asarray(actions, np.int64)
    if checked.size and not NO_ACTION <= checked.min() <= checked.max() < k:
        raise ProbekitError(
            f"actions run from {checked.min()} to {checked.max()}, not from {NO_ACTION} (none) to {k - 1}"
        )
    return checked
