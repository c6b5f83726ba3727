"""CKA and Procrustes against their definitions, and on activations that are known to be alike or not."""

import numpy as np
import pytest
import torch
from scipy.spatial import procrustes

from probekit.errors import ProbekitError
from probekit.probing.similarity import compare_layers, rotation_onto
from probekit.progress import Progress

QUIET = Progress(quiet=True)


def compared(first, second, document=None, permutations=30):
    document = np.repeat(np.arange(first.shape[1] // 10), 10) if document is None else document
    return compare_layers(
        torch.as_tensor(first),
        torch.as_tensor(second),
        document,
        permutations=permutations,
        seed=0,
        progress=QUIET,
    )


def rotation(width, rng):
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


def unbiased_cka(X, Y):
    """Song et al. 2012, equation 5, term by term."""
    n = len(X)

    def hsic(K, L):
        K, L = (np.where(np.eye(n), 0, gram) for gram in (K, L))
        one = np.ones(n)
        trace = np.trace(K @ L)
        sums = (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
        return (trace + sums - 2 / (n - 2) * one @ K @ L @ one) / (n * (n - 3))

    K, L = X @ X.T, Y @ Y.T
    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


def test_both_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(2, 60, 9)) * np.arange(1, 10)
    Y = X[:, :, :6] @ rng.normal(size=(6, 6)) + rng.normal(size=(2, 60, 6))
    table = compared(X, Y)
    assert list(zip(table.layer, table.second_layer, strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for row in table.itertuples():
        first, second = X[row.layer], Y[row.second_layer]
        assert row.cka == pytest.approx(unbiased_cka(first - 3, second + 1), abs=1e-9)
        padded = np.pad(second, ((0, 0), (0, 3)))
        assert row.procrustes == pytest.approx(procrustes(first, padded)[2], abs=1e-9)


def test_intervals_are_those_of_leaving_out_documents():
    rng = np.random.default_rng(1)
    X = rng.normal(size=(1, 60, 5))
    Y = X + rng.normal(size=X.shape)
    document = np.repeat(np.arange(6), 10)
    (row,) = compared(X, Y, document).itertuples()
    left = [document != one for one in range(6)]
    for metric, of in (
        ("cka", unbiased_cka),
        ("procrustes", lambda first, second: procrustes(first, second)[2]),
    ):
        values = np.array([of(X[0, rows], Y[0, rows]) for rows in left])
        half = 2.570582 * np.sqrt(
            5 / 6 * ((values - values.mean()) ** 2).sum()
        )  # t with 5 degrees of freedom
        value = getattr(row, metric)
        assert getattr(row, f"{metric}_low") == pytest.approx(value - half, abs=1e-5)
        assert getattr(row, f"{metric}_high") == pytest.approx(min(value + half, 1), abs=1e-5)


@pytest.mark.parametrize("width", [12, 90])
def test_a_rotation_a_scale_and_a_shift_change_nothing(width):
    rng = np.random.default_rng(2)
    X = rng.normal(size=(2, 80, width))
    table = compared(X, 3 * X @ rotation(width, rng) + rng.normal(size=width))
    same = table.layer == table.second_layer
    assert table.cka[same].to_numpy() == pytest.approx(1, abs=1e-9)
    assert table.procrustes[same].to_numpy() == pytest.approx(0, abs=1e-9)
    assert (table.cka_low[same] > 1 - 1e-9).all()
    assert (table.cka_p[same] == 1 / 31).all()
    assert (table.cka[~same] < 0.5).all()
    assert (table.procrustes[~same] > 0.3).all()


def test_independent_models_are_as_alike_as_where_documents_are_permuted():
    """Documents have a mean of their own, so that examples of one are alike: permuting these would not do."""
    rng = np.random.default_rng(3)
    p, covered = [], []
    for _ in range(60):
        X, Y = (
            np.repeat(rng.normal(size=(1, 12, 6)), 5, axis=1) + 0.5 * rng.normal(size=(1, 60, 6))
            for _ in "ab"
        )
        (row,) = compared(X, Y, np.repeat(np.arange(12), 5), permutations=19).itertuples()
        p.append([row.cka_p, row.procrustes_p])
        covered.append(row.procrustes - row.procrustes_null)
    rejected = (np.array(p) <= 0.05).mean(0)
    assert (rejected < 0.15).all(), "5 % are expected"
    assert np.mean(covered) == pytest.approx(0, abs=0.02)


def test_noise_lowers_both_step_by_step():
    rng = np.random.default_rng(4)
    X = rng.normal(size=(1, 100, 8))
    noise = rng.normal(size=X.shape)
    rows = [compared(X, X + scale * noise).iloc[0] for scale in (0.1, 0.5, 2)]
    assert rows[0].cka > rows[1].cka > rows[2].cka > 0
    assert rows[0].procrustes < rows[1].procrustes < rows[2].procrustes < rows[2].procrustes_null


def test_too_few_are_refused():
    X = np.zeros((1, 15, 3))
    with pytest.raises(ProbekitError, match="15 examples of 15 documents or groups are too few"):
        compared(X, X, np.arange(15))
    X = np.zeros((1, 40, 3))
    with pytest.raises(ProbekitError, match="40 examples of 4 documents or groups are too few"):
        compared(X, X)


def test_a_layer_that_does_not_vary_is_like_none_and_unlike_none():
    rng = np.random.default_rng(6)
    X = rng.normal(size=(2, 50, 6)).astype(np.float32)
    X[1] = 0.1
    table = compared(X, X[:1]).set_index("layer")
    measured = [
        f"{name}{end}" for name in ("cka", "procrustes") for end in ("", "_low", "_high", "_null", "_p")
    ]
    assert table.loc[1, measured].isna().all()
    assert table.loc[0, measured].notna().all()
    assert table.cka_p[0] == 1 / 31


def test_a_map_undoes_a_rotation_and_leaves_what_does_not_vary():
    rng = np.random.default_rng(5)
    X = torch.from_numpy(rng.normal(size=(50, 7)))
    X[:, 5:] = 1.0
    turn = torch.block_diag(torch.from_numpy(rotation(5, rng)), torch.eye(2, dtype=torch.float64))
    matrix, shift = rotation_onto(2 * X @ turn + 3, X)
    torch.testing.assert_close((2 * X @ turn + 3) @ matrix + shift, X)
    torch.testing.assert_close(2 * matrix[5:, 5:], torch.eye(2, dtype=torch.float64), atol=1e-6, rtol=0)
    wider = torch.nn.functional.pad(X, (0, 2))
    matrix, shift = rotation_onto(wider @ torch.from_numpy(rotation(9, rng)), X)
    assert matrix.shape == (9, 7)


def test_the_scale_of_a_wider_model_is_that_of_the_part_that_is_kept():
    """Twelve more features of noise change nothing about the ones that are the target itself."""
    rng = np.random.default_rng(7)
    Y = torch.from_numpy(rng.normal(size=(400, 4)))
    noise = 3 * torch.from_numpy(rng.normal(size=(400, 12)))
    noise -= noise.mean(0)
    noise -= (centred := Y - Y.mean(0)) @ torch.linalg.lstsq(
        centred, noise
    ).solution  # of no use for the target
    matrix, shift = rotation_onto(torch.cat([Y, noise], dim=1), Y)
    torch.testing.assert_close(matrix[:4], torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(torch.cat([Y, noise], dim=1) @ matrix + shift, Y)


def test_of_a_model_that_does_not_vary_the_map_gives_the_mean_of_the_target():
    Y = torch.from_numpy(np.random.default_rng(8).normal(size=(30, 3)))
    matrix, shift = rotation_onto(torch.ones(30, 3), Y)
    assert (matrix == 0).all()
    torch.testing.assert_close(shift, Y.mean(0))
