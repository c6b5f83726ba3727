"""Tallies: what readers got right, summed by document, while examples stream by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probekit import processes
from probekit.evaluation.action_metrics import METRICS, score_actions

Row = dict[str, Any]

SCORES = tuple(METRICS)
"""Fields of `ActionScores`."""

ELEMENTS = 1 << 25
"""Log-probabilities scored at once: bounds the memory."""


class Tally:
    """Sums over the examples of each document, for readers that are scored on the same examples.

    Attributes:
        heads: What is known of each reader `[readers]`: its row of results begins with it.
        sums: For every score its sums, float64 `[documents, readers]`.
    """

    def __init__(self, heads: Sequence[Row], documents: int, scores: Sequence[str] = SCORES) -> None:
        self.heads = list(heads)
        self.sums: dict[str, NDArray[np.float64]] = {
            score: np.zeros((documents, len(self.heads))) for score in scores
        }

    def add(
        self, document: np.ndarray, log_probabilities: Tensor | np.ndarray, labels: Tensor | np.ndarray
    ) -> None:
        """Scores some examples.

        Args:
            document: Number of each example's document, from 0, those of one document together `[examples]`.
            log_probabilities: In nats `[readers, examples, classes]`.
            labels: True classes `[examples]`, or `[readers, examples]` where each reader has its own.
        """
        starts = np.flatnonzero(np.diff(document, prepend=-1))
        scores = score_actions(log_probabilities, labels)
        for score, sums in self.sums.items():
            values = getattr(scores, score).astype(np.float64)
            sums[document[starts]] += np.add.reduceat(values, starts, axis=1).T

    def over_processes(self, device: torch.device) -> None:
        """Takes in what all processes have scored."""
        for score, sums in self.sums.items():
            summed = torch.from_numpy(sums).to(device)
            processes.add_up([summed])
            self.sums[score] = summed.cpu().numpy()


def row_slices(readers: int, examples: int, classes: int) -> list[slice]:
    """Cuts examples so that log-probabilities of all readers stay within `ELEMENTS`."""
    size = max(1, ELEMENTS // (readers * classes))
    return [slice(start, start + size) for start in range(0, examples, size)]
