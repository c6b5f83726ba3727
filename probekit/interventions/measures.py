"""The metrics of interventions, each with its interval from resampling documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from probekit.evaluation.statistics import Resampling, bootstrap_ratios
from probekit.interventions.changes import Condition
from probekit.interventions.effects import Outcomes

Sums = dict[str, tuple[np.ndarray, np.ndarray]]
"""By metric its sums and counts `[scenes]`."""


def changes(condition: Condition, plain: Outcomes, changed: Mapping[str, Outcomes], true: np.ndarray) -> Sums:
    """What a condition changes in every scene, against the scene left alone and against other conditions.

    Args:
        condition: The condition.
        plain: The scenes left alone.
        changed: What was seen under every condition of the site, by name.
        true: The true actions `[scenes]`.
    """
    now, scenes = changed[condition.name], np.arange(len(true))
    one = np.ones(len(true))
    read = np.exp(now.readout) - np.exp(plain.readout)
    rest = plain.next_tokens - 1
    sums: Sums = {
        "next_loss": (now.next_loss - plain.next_loss, plain.next_tokens),
        "rest_loss": (_rest(now) - _rest(plain), rest),
        "other_loss": (now.other_loss - plain.other_loss, plain.other_tokens),
        "first_kl": (_kl(plain.first, now.first), one),
        "readout_kl": (_kl(plain.readout, now.readout), one),
        "readout_true": (read[scenes, true], one),
        "moved": (now.moved, now.norm),
    }
    if condition.target is not None:
        sums["readout_target"] = (read[scenes, condition.target], one)
    for name, called in condition.beside.items():
        control, over = changed[name], f"over_{called.replace(' ', '_')}"
        sums[f"next_loss_{over}"] = (now.next_loss - control.next_loss, plain.next_tokens)
        sums[f"rest_loss_{over}"] = (_rest(now) - _rest(control), rest)
    return sums


def follows(condition: Condition, plain: np.ndarray, changed: Mapping[str, np.ndarray]) -> Sums:
    """How many of the sentences written anew have the action that they were moved to.

    Args:
        condition: The condition.
        plain: The action of each sentence that was written without an edit `[scenes]`.
        changed: The same under every condition of the site, by name.
    """
    if condition.target is None:
        return {}
    target, one = condition.target[: len(plain)], np.ones(len(plain))
    hit = (changed[condition.name] == target).astype(float)
    sums: Sums = {
        "plan_following": (hit, one),
        "plan_following_unedited": ((plain == target).astype(float), one),
    }
    for name, called in condition.beside.items():
        if called == "random":
            sums["plan_following_over_random"] = (hit - (changed[name] == target), one)
    return sums


def rows(head: Mapping[str, Any], sums: Sums, there: np.ndarray | None, resampling: Resampling) -> list[dict]:
    """A row for each metric.

    Args:
        head: What all rows share.
        sums: The metrics; those of fewer scenes are of the first ones.
        there: Which scenes take part `[scenes]`; None for all.
        resampling: How intervals are made.
    """
    found = []
    for size in sorted({len(values) for values, _ in sums.values()}):
        own = {name: pair for name, pair in sums.items() if len(pair[0]) == size}
        part = np.ones(size) if there is None else there[:size].astype(float)
        values, counts = (
            np.stack([pair[which] for pair in own.values()], axis=1) * part[:, None] for which in (0, 1)
        )
        intervals = bootstrap_ratios(values, counts, **resampling)
        for number, metric in enumerate(own):
            interval = intervals[number]
            found.append(
                dict(head)
                | {"metric": metric, "value": interval.value}
                | {"value_low": interval.low, "value_high": interval.high, "documents": interval.documents}
            )
    return found


def _rest(outcomes: Outcomes) -> np.ndarray:
    """Loss of the next sentence without its first token, summed `[scenes]`."""
    return outcomes.next_loss - outcomes.first_loss


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of log-probabilities `[scenes, outcomes]`, in nats `[scenes]`."""
    there = np.isfinite(p)  # what is sure not to be costs nothing
    p, q = np.where(there, p, 0.0).astype(np.float64), np.where(there, q, 0.0).astype(np.float64)
    return (np.where(there, np.exp(p), 0.0) * (p - q)).sum(axis=1)
