"""The codebook: k-means over sentence embeddings, whose clusters are the actions.

A sentence's action is its nearest centroid, and the centroid is the action's embedding. Embeddings may be a
memory map of millions of rows: everything but the fit reads them in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import joblib
import numpy as np
import torch
from scipy.sparse import csr_array
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from probekit.errors import ProbekitError
from probekit.io import read_tensors, write_tensors

_BLOCK = 2**22
"""Float64 values in one block of embeddings or distances: 32 MiB."""
_MOST_THREADS = 8
"""Blocks that are in memory at once."""
_FULL_KMEANS = 4_000_000
"""Up to this many sentence-centroid pairs every iteration sees all sentences: a few seconds a fit."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """The actions' embeddings.

    Attributes:
        centroids: Float32 [k, dimensions].
    """

    centroids: np.ndarray

    def nearest(self, embeddings: np.ndarray) -> np.ndarray:
        """The action of each sentence: its nearest centroid (Euclidean), the lowest index among equals.

        Args:
            embeddings: Float32 [sentences, dimensions].

        Returns:
            Int32 [sentences].
        """
        centroids = self.centroids.astype(np.float64)
        norms = np.einsum("kd,kd->k", centroids, centroids)
        doubled = 2.0 * centroids.T
        labels = np.empty(len(embeddings), np.int32)

        def label(rows: slice) -> None:
            scores = _block(embeddings, rows) @ doubled
            # |x - c|^2 without |x|^2, which is the same for every centroid.
            labels[rows] = np.argmin(np.subtract(norms, scores, out=scores), axis=1)

        # Blocks in parallel, each on one thread: a product then has the same bits on any number of cores.
        with threadpool_limits(1), ThreadPoolExecutor(min(joblib.cpu_count(), _MOST_THREADS)) as threads:
            list(threads.map(label, _rows(embeddings, len(centroids))))
        return labels

    def save(self, path: str | Path) -> None:
        """Writes the codebook as safetensors."""
        write_tensors(path, {"centroids": torch.tensor(self.centroids)})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads what `save` wrote, bit for bit."""
        return cls(read_tensors(path)["centroids"].numpy())


def fit_codebook(embeddings: np.ndarray, k: int, seed: int) -> Codebook:
    """Clusters embeddings into k actions, none of which is empty on these embeddings.

    Args:
        embeddings: Float32 [sentences, dimensions].
        k: Number of actions.
        seed: Seed of the initial centroids and the mini-batches; the same seed gives the same bits.

    Raises:
        ProbekitError: Fewer than k distinct embeddings, or one that is not finite.
    """
    embeddings = np.asarray(embeddings, np.float32)
    distinct = _count_distinct(embeddings, enough=k)
    if distinct < k:
        raise ProbekitError(
            f"actions.k is {k}, but the {len(embeddings)} sentences to fit on have {distinct} distinct "
            f"embeddings; set it to {distinct} or less, or give more text"
        )
    full = len(embeddings) * k <= _FULL_KMEANS
    kmeans = (
        KMeans(k, n_init=3, max_iter=100, random_state=seed)
        if full
        else MiniBatchKMeans(k, n_init=3, batch_size=4096, compute_labels=False, random_state=seed)
    )
    # Threads add up partial sums in whichever order they finish: one thread, the same bits every time.
    with threadpool_limits(1):
        centroids = kmeans.fit(embeddings).cluster_centers_
    return _fill_empty(embeddings, centroids.astype(np.float32))


def label_centroids(embeddings: np.ndarray, labels: np.ndarray, k: int) -> Codebook:
    """The codebook of given labels: the mean embedding of each label's sentences.

    Args:
        embeddings: Float32 [sentences, dimensions].
        labels: Integers [sentences] from 0 to k - 1. A label with no sentence gets the mean of all sentences.
        k: Number of actions.
    """
    if len(labels) and labels.max() >= k:
        raise ProbekitError(
            f"actions.k is {k}, but the labels go up to {labels.max()}; set it to {labels.max() + 1} or more"
        )
    sums = np.zeros((k, embeddings.shape[1]))
    for rows, block in _blocks(embeddings, k):
        one_hot = csr_array((np.ones(len(block)), (labels[rows], np.arange(len(block)))), (k, len(block)))
        sums += one_hot @ block
    counts = np.bincount(labels, minlength=k)[:, None]
    overall = sums.sum(axis=0) / max(len(embeddings), 1)
    return Codebook(np.where(counts > 0, sums / np.maximum(counts, 1), overall).astype(np.float32))


def nearest_sentences(
    embeddings: np.ndarray, labels: np.ndarray, codebook: Codebook, per_action: int = 3
) -> np.ndarray:
    """The most typical sentences of each action: its own sentences nearest to its centroid.

    Args:
        embeddings: Float32 [sentences, dimensions].
        labels: Integers [sentences], each sentence's action, -1 for one that is not to be found.
        codebook: The k actions.
        per_action: Sentences wanted for each action.

    Returns:
        Int64 [k, per_action], indices of sentences, nearest first (the lowest index among equals); -1 where
        an action has fewer.
    """
    order = np.lexsort((_squared_distances(embeddings, codebook.centroids, labels), labels))
    ordered = np.asarray(labels)[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    shown = (rank < per_action) & (ordered >= 0)
    nearest = np.full((len(codebook.centroids), per_action), -1, np.int64)
    nearest[ordered[shown], rank[shown]] = order[shown]
    return nearest


def _count_distinct(embeddings: np.ndarray, enough: int) -> int:
    """The number of distinct embeddings, exact only below `enough`, so that memory stays bounded."""
    seen: set[bytes] = set()
    for _, block in _blocks(embeddings):
        seen.update(row.tobytes() for row in block + 0.0)  # + 0.0 turns -0.0 into 0.0
        if len(seen) >= enough:
            break
    return len(seen)


def _fill_empty(embeddings: np.ndarray, centroids: np.ndarray) -> Codebook:
    """Moves each centroid that is nearest to no embedding onto the embedding farthest from any centroid.

    A moved centroid may take all the embeddings of another, so this is repeated; it ends because each move
    reduces the embeddings' total distance to their centroids.
    """
    centroids = centroids.copy()
    for _ in range(len(centroids)):
        codebook = Codebook(centroids)
        labels = codebook.nearest(embeddings)
        empty = np.flatnonzero(np.bincount(labels, minlength=len(centroids)) == 0)
        if not len(empty):
            return codebook
        distances = _squared_distances(embeddings, centroids, labels)
        for action in empty:
            centroids[action] = embeddings[distances.argmax()]
            moved = np.full(len(embeddings), action)
            distances = np.minimum(distances, _squared_distances(embeddings, centroids, moved))
    raise ProbekitError(
        f"actions.k is {len(centroids)}, but the embeddings are too close together for so many "
        "distinct actions; lower it, or give more text"
    )


def _squared_distances(embeddings: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Float64 [sentences]: from each embedding to the centroid of its label; exactly 0 where equal."""
    distances = np.empty(len(embeddings))
    for rows, block in _blocks(embeddings):
        difference = block - centroids[labels[rows]]
        distances[rows] = np.einsum("sd,sd->s", difference, difference)
    return distances


def _blocks(embeddings: np.ndarray, width: int = 1) -> Iterator[tuple[slice, np.ndarray]]:
    """The embeddings in float64, a block of rows at a time, such that [rows, width] is small too."""
    for rows in _rows(embeddings, width):
        yield rows, _block(embeddings, rows)


def _rows(embeddings: np.ndarray, width: int) -> list[slice]:
    height = max(1, _BLOCK // max(embeddings.shape[1], width))
    return [slice(n, min(n + height, len(embeddings))) for n in range(0, len(embeddings), height)]


def _block(embeddings: np.ndarray, rows: slice) -> np.ndarray:
    """Some rows in float64."""
    block = np.asarray(embeddings[rows], np.float64)
    finite = np.isfinite(block).all(axis=1)
    if not finite.all():
        raise ProbekitError(
            f"the embedding of sentence {rows.start + finite.argmin()} is not finite; "
            "check the model that actions.encoder names"
        )
    return block
