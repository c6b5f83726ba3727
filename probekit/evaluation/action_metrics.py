"""How well a distribution over actions predicts the true ones, and the baselines that need no activations.

The baselines count: the prior knows how often an action occurs, the bigram also which action came before.
Both give arrays of log-probabilities that are scored exactly like a probe's or a planner's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from probekit.errors import ProbekitError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

NO_ACTION = -1
"""Stands for the previous action where there is none: before the first sentence of a document."""
STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Strengths of the prior that the bigram tries, in pseudo-counts."""


@dataclass(frozen=True)
class ActionScores:
    """Scores of each example: arrays [..., examples], ready for a table or to be summed by document."""

    correct: Bools
    top5: Bools
    cross_entropy: Floats  # nats


def score_actions(log_probabilities: Tensor | NDArray, actions: Tensor | NDArray) -> ActionScores:
    """Compares predictions with the true actions.

    An action's rank is the number of actions that are more probable, or as probable and of a lower index: a
    constant distribution predicts action 0, and is not right about every example.

    Args:
        log_probabilities: In nats, [..., examples, actions], on any device.
        actions: True actions, [..., examples], or [examples] where the leading dimensions share them.
    """
    log_p = torch.as_tensor(log_probabilities)
    truth = torch.as_tensor(actions, device=log_p.device).long().expand(log_p.shape[:-1])[..., None]
    true_log_p = log_p.gather(-1, truth)
    index = torch.arange(log_p.shape[-1], device=log_p.device)
    # Not <= instead of >, so that a NaN counts as more probable than the truth and never as a hit.
    ahead = ~(log_p <= true_log_p) | ((log_p == true_log_p) & (index < truth))
    rank = ahead.sum(-1).cpu().numpy()
    return ActionScores(rank == 0, rank < 5, -true_log_p[..., 0].double().cpu().numpy())


def prior_log_probabilities(actions: ArrayLike, k: int, pseudo_count: float = 0.5) -> Floats:
    """Log share of each action in the training examples, [k], in nats.

    Every action gets `pseudo_count` more examples than it has; one half is the estimator of Krichevsky and
    Trofimov (1981). An action that never occurred thus costs a lot, but not infinity.
    """
    counts = np.bincount(_actions(actions, k), minlength=k) + pseudo_count
    return np.log(counts / counts.sum())


@dataclass(frozen=True)
class Bigram:
    """P(target action | previous action), shrunk towards the prior."""

    table: Floats  # [k + 1, k], log-probabilities in nats; the last row is that of NO_ACTION
    strength: float

    def log_probabilities(self, previous: ArrayLike) -> Floats:
        """Log-probabilities in nats, [examples, k], given previous actions [examples]."""
        return self.table[_actions(previous, len(self.table) - 1, lowest=NO_ACTION)]


def fit_bigram(
    previous: ArrayLike,
    target: ArrayLike,
    k: int,
    validation: tuple[ArrayLike, ArrayLike],
    strengths: Sequence[float] = STRENGTHS,
) -> Bigram:
    """Fits (count(previous, target) + strength * prior(target)) / (count(previous) + strength).

    Args:
        previous: Previous actions of the training examples, [examples], -1 where there is none.
        target: Target actions of the training examples, [examples].
        k: Number of actions.
        validation: Previous and target actions on which the strength is chosen, by cross-entropy.
        strengths: Strengths to try, in pseudo-counts, all positive.
    """
    rows, columns = _actions(previous, k, lowest=NO_ACTION), _actions(target, k)
    rows_validation, columns_validation = (
        _actions(validation[0], k, lowest=NO_ACTION),
        _actions(validation[1], k),
    )
    if not len(columns_validation):
        raise ProbekitError("the bigram's validation examples are empty; its strength is chosen on them")
    counts = np.zeros((k + 1, k))
    np.add.at(counts, (rows, columns), 1.0)  # the row of NO_ACTION, -1, is the last one
    prior = np.exp(prior_log_probabilities(columns, k))
    fits = []
    for strength in strengths:
        table = np.log((counts + strength * prior) / (counts.sum(1, keepdims=True) + strength))
        fits.append((-table[rows_validation, columns_validation].mean(), Bigram(table, strength)))
    return min(fits, key=lambda fit: fit[0])[1]


def _actions(actions: ArrayLike, k: int, lowest: int = 0) -> Integers:
    """The actions as integers, checked."""
    checked = np.asarray(actions, np.int64)
    if checked.size and not lowest <= checked.min() <= checked.max() < k:
        raise ProbekitError(
            f"actions run from {checked.min()} to {checked.max()}, not from {lowest} to {k - 1}"
        )
    return checked
