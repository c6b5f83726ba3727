import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import adjusted_rand_score

from probekit import io as storage
from probekit.data import codebook as actions
from probekit.data.codebook import Codebook, fit_codebook, label_centroids, nearest_sentences
from probekit.errors import ProbekitError

# Small integers as coordinates make exact ties and duplicates common, and every distance exact.
INTEGERS = st.integers(-3, 3).map(float)


def matrices(rows: int, columns: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (rows, columns), elements=INTEGERS)


def blobs(sentences: int, k: int, dimensions: int = 64, spread: float = 0.3, seed: int = 0):
    """Unit rows around k random directions, and the direction of each."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(k, size=sentences)
    centers = generator.normal(size=(k, dimensions))
    rows = centers[truth] + spread * generator.normal(size=(sentences, dimensions))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), truth


def squared_distances(embeddings: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return ((embeddings[:, None].astype(np.float64) - centroids[None]) ** 2).sum(axis=2)


@given(data=st.data(), rows=st.integers(0, 20), k=st.integers(1, 10), columns=st.integers(1, 5))
def test_nearest_is_brute_force_with_ties_to_the_lowest_index(data, rows: int, k: int, columns: int):
    embeddings, centroids = data.draw(matrices(rows, columns)), data.draw(matrices(k, columns))
    labels = Codebook(centroids).nearest(embeddings)
    np.testing.assert_array_equal(labels, squared_distances(embeddings, centroids).argmin(axis=1))
    assert labels.dtype == np.int32


def test_nearest_in_many_blocks_and_from_a_memory_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    embeddings, _ = blobs(500, 20)
    codebook = Codebook(embeddings[:37])
    storage.write_array(tmp_path / "e.npy", embeddings)
    whole = codebook.nearest(embeddings)
    monkeypatch.setattr(actions, "_BLOCK", 64 * 7)
    np.testing.assert_array_equal(codebook.nearest(storage.read_array(tmp_path / "e.npy")), whole)
    np.testing.assert_array_equal(whole[:37], np.arange(37))


def nasty(kind: str, k: int) -> np.ndarray:
    """Embeddings on which plain k-means leaves clusters empty."""
    generator = np.random.default_rng(1)
    distinct, _ = blobs(k, k, dimensions=16)
    match kind:
        case "mostly one point":
            return np.concatenate([np.zeros((4000, 16), np.float32), distinct])
        case "exactly k distinct":
            return generator.permutation(np.repeat(distinct, generator.integers(1, 40, size=k), axis=0))
        case "two far clumps":
            clump = 1e-3 * generator.normal(size=(3000, 16)) + np.where(np.arange(3000) % 2, 1, -1)[:, None]
            return clump.astype(np.float32)
        case "one outlier":
            return np.concatenate([distinct[:1] + 1000, distinct, 1e-4 * distinct])
        case _:
            return generator.zipf(1.3, size=(6000, 16)).clip(max=10**4).astype(np.float32)


@pytest.mark.parametrize("k", [8, 500])
@pytest.mark.parametrize(
    "kind", ["mostly one point", "exactly k distinct", "two far clumps", "one outlier", "heavy tails"]
)
def test_no_action_is_empty(kind: str, k: int):
    embeddings = nasty(kind, k)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codebook = fit_codebook(embeddings, k, seed=0)
    assert codebook.centroids.shape == (k, 16)
    assert codebook.centroids.dtype == np.float32
    assert np.bincount(codebook.nearest(embeddings), minlength=k).min() > 0


@settings(max_examples=30)
@given(embeddings=matrices(40, 2), seed=st.integers(0, 100))
def test_no_action_is_empty_or_there_is_too_little(embeddings: np.ndarray, seed: int):
    distinct = len(np.unique(embeddings, axis=0))
    if distinct >= 8:
        assert len(np.unique(fit_codebook(embeddings, 8, seed).nearest(embeddings))) == 8
    else:
        with pytest.raises(ProbekitError, match=rf"^actions.k is 8, .* 40 sentences .* {distinct} distinct"):
            fit_codebook(embeddings, 8, seed)


def test_mini_batches_leave_no_action_empty_and_find_blobs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(actions, "_FULL_KMEANS", 0)
    embeddings, truth = blobs(20_000, 100)
    labels = fit_codebook(embeddings, 100, seed=0).nearest(embeddings)
    assert len(np.unique(labels)) == 100
    assert adjusted_rand_score(truth, labels) > 0.97
    repeated = nasty("mostly one point", 500)
    assert len(np.unique(fit_codebook(repeated, 500, seed=0).nearest(repeated))) == 500


@pytest.mark.parametrize("k", [8, 24])
def test_separated_blobs_are_found(k: int):
    embeddings, truth = blobs(3000, k)
    assert adjusted_rand_score(truth, fit_codebook(embeddings, k, seed=0).nearest(embeddings)) > 0.999


def test_an_emptied_action_is_moved_to_the_farthest_embedding():
    embeddings = np.array([[0.0], [0.1], [5.0], [9.0]], np.float32)
    codebook = actions._fill_empty(embeddings, np.array([[0.0], [100.0], [200.0]], np.float32))
    np.testing.assert_array_equal(codebook.centroids, np.array([[0.0], [9.0], [5.0]], np.float32))


FIT_IN_A_NEW_PROCESS = """
import hashlib, sys
import numpy as np
from probekit.data import codebook as actions
embeddings = np.random.default_rng(0).normal(size=(6000, 32)).astype(np.float32)
for actions._FULL_KMEANS in (0, 10**9):
    print(hashlib.sha256(actions.fit_codebook(embeddings, 64, seed=3).centroids.tobytes()).hexdigest())
"""


def test_the_same_seed_gives_the_same_bits_whatever_the_threads():
    def digest(threads: str) -> str:
        limits = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        return subprocess.run(
            [sys.executable, "-c", FIT_IN_A_NEW_PROCESS],
            env=limits,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert digest("1") == digest("4")


def test_another_seed_gives_another_codebook():
    embeddings, _ = blobs(500, 40, spread=1.0)
    first, same, other = (fit_codebook(embeddings, 16, seed) for seed in (0, 0, 1))
    assert first.centroids.tobytes() == same.centroids.tobytes() != other.centroids.tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_refused(value: float):
    embeddings, labels = blobs(100, 8)
    embeddings[17, 3] = value
    codebook = Codebook(embeddings[:8])
    for use in (
        lambda: fit_codebook(embeddings, 8, seed=0),
        lambda: codebook.nearest(embeddings),
        lambda: label_centroids(embeddings, labels, 8),
        lambda: nearest_sentences(embeddings, labels, codebook),
    ):
        with pytest.raises(ProbekitError, match="sentence 17 is not finite"):
            use()


@given(data=st.data(), rows=st.integers(1, 30), k=st.integers(1, 8))
def test_label_centroids_are_class_means(data, rows: int, k: int):
    embeddings = data.draw(matrices(rows, 3))
    labels = data.draw(arrays(np.int32, rows, elements=st.integers(0, k - 1)))
    centroids = label_centroids(embeddings, labels, k).centroids
    for label in range(k):
        own = embeddings[labels == label] if label in labels else embeddings
        np.testing.assert_allclose(centroids[label], own.mean(axis=0), atol=1e-6)


def test_a_label_past_k_is_refused():
    with pytest.raises(
        ProbekitError, match=r"^actions.k is 8, but the labels go up to 30; set it to 31 or more"
    ):
        label_centroids(np.zeros((2, 3), np.float32), np.array([0, 30]), 8)


@given(data=st.data(), rows=st.integers(0, 30), k=st.integers(1, 6), per_action=st.integers(1, 4))
def test_nearest_sentences_are_brute_force(data, rows: int, k: int, per_action: int):
    embeddings, centroids = data.draw(matrices(rows, 3)), data.draw(matrices(k, 3))
    labels = data.draw(arrays(np.int32, rows, elements=st.integers(0, k - 1)))
    expected = np.full((k, per_action), -1)
    for action in range(k):
        own = np.flatnonzero(labels == action)
        distance = ((embeddings[own] - centroids[action]) ** 2).sum(axis=1)
        chosen = own[np.argsort(distance, kind="stable")][:per_action]
        expected[action, : len(chosen)] = chosen
    found = nearest_sentences(embeddings, labels, Codebook(centroids), per_action)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int64
