"""How like true ones sequences of actions are: edit distance, latent perplexity, and plans followed or not.

Pure functions on arrays of actions, a sequence for each text. Every one gives sums and counts by text, so
that texts can be resampled (`statistics.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from probekit.evaluation.action_metrics import Bigram, Floats, Integers


class Sums(NamedTuple):
    """A metric by text: its value is the ratio of the two sums over texts.

    Attributes:
        sums: `[texts]`.
        counts: What the sums are over, such as sentences `[texts]`; a text without any has no part.
    """

    sums: Floats
    counts: Floats


def edit_distances(true: Sequence[Integers], generated: Sequence[Integers]) -> Sums:
    """Levenshtein distance of each pair of sequences: insertions, deletions and substitutions, 1 each.

    The distance from an empty sequence is the length of the other.
    """
    distances = [Levenshtein.distance(a.tolist(), b.tolist()) for a, b in zip(true, generated, strict=True)]
    return Sums(np.array(distances, np.float64), np.ones(len(distances)))


def normalised_edit_distances(true: Sequence[Integers], generated: Sequence[Integers]) -> Sums:
    """The same as a share of the longer sequence's length, from 0 to 1; 0 where both are empty."""
    distances, counts = edit_distances(true, generated)
    longer = [max(len(a), len(b), 1) for a, b in zip(true, generated, strict=True)]
    return Sums(distances / np.array(longer), counts)


def latent_losses(bigram: Bigram, sequences: Sequence[Integers], previous: Integers) -> Sums:
    """Negative log-probability of sequences under a bigram; exp of the ratio is the latent perplexity.

    Args:
        bigram: Fitted on true sequences.
        sequences: The sequences.
        previous: The action before the first of each, -1 where there is none `[texts]`.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    text = np.repeat(np.arange(len(lengths)), lengths)
    actions = np.concatenate([np.zeros(0, np.int64), *sequences])
    before = np.concatenate([np.zeros(0, np.int64), *_before(sequences, previous)])
    losses = -bigram.table[before, actions]  # NO_ACTION, -1, is the table's last row
    sums = np.bincount(text, weights=losses, minlength=len(lengths))
    return Sums(sums.astype(np.float64), lengths.astype(np.float64))


def plans_followed(plans: Sequence[Integers], sequences: Sequence[Integers]) -> Sums:
    """How many sentences have the action they were given: the j-th of a plan is that of the j-th sentence.

    Sentences that no plan reaches, and planned ones that are not there, do not count.
    """
    pairs = list(_paired(plans, sequences))
    return Sums(
        np.array([(plan == actions).sum() for plan, actions in pairs], np.float64),
        np.array([len(plan) for plan, _ in pairs], np.float64),
    )


def plans_followed_by_chance(plans: Sequence[Integers], sequences: Sequence[Integers], prior: Floats) -> Sums:
    """The same as it is to be expected of sentences whose actions are drawn from a prior `[actions]`."""
    planned = [plan for plan, _ in _paired(plans, sequences)]
    return Sums(
        np.array([prior[plan].sum() for plan in planned]),
        np.array([len(plan) for plan in planned], np.float64),
    )


def _paired(plans: Sequence[Integers], sequences: Sequence[Integers]) -> list[tuple[Integers, Integers]]:
    pairs = zip(plans, sequences, strict=True)
    return [(plan[: len(actions)], actions[: len(plan)]) for plan, actions in pairs]


def _before(sequences: Sequence[Integers], previous: Integers) -> list[Integers]:
    """The action before each of a sequence's own."""
    return [
        np.concatenate([[first], sequence])[:-1].astype(np.int64)
        for sequence, first in zip(sequences, previous, strict=True)
    ]
