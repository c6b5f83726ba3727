"""Vectors as targets: how near a predicted vector is to the true one, and where that ranks among others.

A vector is ranked among the distinct vectors of all test examples, those of its own document included, by the
cosine to the prediction. Cosines are between differences from the mean of the examples fitted on, as R2 is
measured from there: sentence embeddings have a large mean in common, and predictions, which ridge shrinks
towards it, would be nearest to those that are near the mean, whatever was read.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.config import ProbeSettings
from probekit.run.run import Run

PENALTIES = (*ProbeSettings().l2, 10.0, 100.0)
"""Tried unless `probe.l2` is set. What can be read of a sentence's embedding is so little that with few
examples no penalty up to 1 is better than none of it; the baselines go as far."""

MOST_CANDIDATES = 10_000
"""Of more distinct vectors so many are candidates, spread evenly over the test examples, and the true one."""

FIRST = 0.01
"""The share of the candidates that counts as first: by chance the true vector is there as often, however many
candidates there are, which is not so for the first ten."""

COSINES = 1 << 24
"""Cosines that are in memory at once."""

EQUAL = 1e-6
"""Cosines that differ by no more, which is the precision of float32, are equal."""

VANISHING = 1e-9
"""A prediction whose distance from the mean is less than this share of the vectors' own predicts the mean."""


class Candidates:
    """The distinct vectors of test examples, among which each example's own is ranked.

    Args:
        vectors: The vectors `[rows, outputs]`.
        labels: The row of each test example `[examples]`.
        centre: The mean of the examples fitted on `[outputs]`.

    Attributes:
        count: How many there are.
        rows: The row of the first example with each distinct vector `[vectors]`.
    """

    def __init__(self, vectors: np.ndarray, labels: np.ndarray, centre: np.ndarray) -> None:
        row, rows = pd.factorize(labels)
        found = np.asarray(vectors[rows], np.float64) - centre
        same, distinct = pd.factorize(np.array([vector.tobytes() for vector in found], object))
        self._centre = torch.from_numpy(centre)
        self._own = torch.from_numpy(same[row])
        first = np.unique(same, return_index=True)[1]
        self._least = VANISHING * float(np.sqrt((found[first] ** 2).sum(1).mean()))
        self._units = self._normalised(torch.from_numpy(found[first]))
        self.rows = rows[first]
        self._pool = torch.arange(0, len(distinct), -(-len(distinct) // MOST_CANDIDATES))
        self.count = len(self._pool)

    @property
    def chance(self) -> tuple[float, float]:
        """The mean reciprocal rank, and the share in the first 1 %, of a prediction that knows nothing."""
        return float((1 / np.arange(1, self.count + 1)).mean()), self._first / self.count

    def scores(self, predicted: Tensor, rows: slice) -> dict[str, np.ndarray]:
        """Scores of predictions of some test examples.

        Equal cosines are in random order: the reciprocal rank and the share are what is expected of it.

        Args:
            predicted: Vectors `[readers, examples, outputs]`.
            rows: Which of the examples.

        Returns:
            `cosine`, `reciprocal_rank` and `first_percent` `[readers, examples]`.
        """
        device = predicted.device
        own, pool = self._own[rows].to(device), self._pool.to(device)
        true, candidates = self._units.to(device)[own], self._units.to(device)[pool]
        others = own[:, None] != pool
        found = []
        for vectors in predicted:
            units = self._normalised(vectors.double() - self._centre.to(device))
            cosine = (units * true).sum(1)
            ahead = units @ candidates.T - cosine[:, None]
            closer = ((ahead > EQUAL) & others).sum(1).double()
            tied = ((ahead.abs() <= EQUAL) & others).sum(1) + 1.0
            ranks = torch.digamma(closer + tied + 1) - torch.digamma(closer + 1)  # sum of 1 / rank
            found.append([cosine.double(), ranks / tied, ((self._first - closer) / tied).clamp(0, 1)])
        names = "cosine", "reciprocal_rank", "first_percent"
        scores = torch.stack([torch.stack(each) for each in found], 1).cpu().numpy()
        return dict(zip(names, scores, strict=True))

    def nearest(self, predicted: Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The distinct vectors that are nearest to predictions, of all, nearest first.

        Args:
            predicted: Vectors `[examples, outputs]`.
            count: How many, at most.

        Returns:
            Their rows, and their cosines to the predictions, each `[examples, count]`.
        """
        units = self._normalised(predicted.cpu().double() - self._centre)
        parts = units.split(max(1, COSINES // len(self._units)))
        found = [(part @ self._units.T).topk(min(count, len(self.rows)), dim=1) for part in parts]
        rows = torch.cat([part.indices for part in found]).numpy()
        return self.rows[rows], torch.cat([part.values for part in found]).numpy()

    def cosines(self, predicted: Tensor, vectors: np.ndarray) -> np.ndarray:
        """The cosine of each prediction to a vector of its own, both `[examples, outputs]`."""
        own = torch.from_numpy(np.asarray(vectors, np.float64)) - self._centre
        units = self._normalised(predicted.cpu().double() - self._centre)
        return np.asarray((units * self._normalised(own)).sum(1))

    @property
    def _first(self) -> int:
        return int(np.ceil(FIRST * self.count))

    def _normalised(self, vectors: Tensor) -> Tensor:
        """Vectors of norm 1, or 0 where they vanish, in float32."""
        norm = vectors.norm(dim=1, keepdim=True)
        return torch.where(norm > self._least, vectors / norm, 0.0).float()


def sentence_candidates(run: Run) -> Candidates:
    """The sentences of a run's test documents, by their embeddings; rows are numbers of sentences."""
    corpus = run.corpus

    def known(split: str) -> np.ndarray:
        sentences = corpus.sentences(corpus.documents(split))
        return sentences[corpus.embeddings[sentences].any(axis=1)]

    centre = corpus.embeddings[known("probe")].mean(0, dtype=np.float64)
    return Candidates(corpus.embeddings, known("test"), centre)


def nearest(run: Run, predictions: Tensor, count: int = 3) -> np.ndarray:
    """The sentences of a run's test documents whose embeddings are nearest to predicted ones.

    Args:
        run: The run, whose probes of the target `embedding` predicted them.
        predictions: Embeddings `[examples, dimensions]`.
        count: How many sentences, at most; those with equal embeddings are one.

    Returns:
        Numbers of sentences, nearest first `[examples, count]`; `corpus.sentence_texts` has their texts.
    """
    return sentence_candidates(run).nearest(predictions, count)[0]
