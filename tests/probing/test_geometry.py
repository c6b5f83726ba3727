"""The geometry of Gaussians whose spectrum is known, of planted features, and of a run."""

import numpy as np
import pandas as pd
import pytest
import torch
from running import printed

import probekit
from probekit.errors import ProbekitError
from probekit.probing.geometry import layer_geometry

RANKS = ("effective_rank", "participation_ratio")


def ranks(spectrum):
    share = spectrum / spectrum.sum()
    return np.exp(-(share * np.log(share)).sum()), 1 / (share**2).sum()


@pytest.mark.parametrize(
    ("spectrum", "correlated"), [(1 / np.arange(1, 13), True), (0.8 ** np.arange(12), False)]
)
def test_intervals_cover_the_ranks_of_a_known_spectrum(spectrum, correlated):
    """Also where the examples of a document are alike: 5 of 6 parts of their variance are the document's."""
    rng, found = np.random.default_rng(0), []
    for _ in range(120):
        own = rng.normal(size=(100, 2, 12))
        if correlated:
            own = np.sqrt(5 / 6) * rng.normal(size=(100, 1, 12)) + np.sqrt(1 / 6) * own
        X = torch.from_numpy((own * np.sqrt(spectrum)).reshape(200, 12))
        found.append(layer_geometry(X, np.repeat(np.arange(100), 2)))
    table = pd.DataFrame(found)
    for name, truth in zip(RANKS, ranks(spectrum), strict=True):
        covered = (table[f"{name}_low"] < truth) & (truth < table[f"{name}_high"])
        assert 0.9 < covered.mean() < 0.99, "95 % is meant"
        assert table[name].mean() == pytest.approx(truth, rel=0.02)


def test_few_examples_are_corrected_for():
    """The plain effective rank of as many examples as three halves of the features is 29 % too low."""
    rng = np.random.default_rng(1)
    X = rng.normal(size=(20, 60, 40))
    table = probekit.geometry(X)
    plain = [ranks(np.linalg.eigvalsh(np.cov(layer.T)))[0] for layer in X]
    assert np.mean(plain) < 30
    assert table.effective_rank.mean() == pytest.approx(40, rel=0.02)
    assert (table.effective_rank_high <= 40).all()


def test_cosines_and_norms_are_means_over_examples_of_different_groups():
    rng = np.random.default_rng(2)
    X = rng.normal(size=(60, 4)) + np.array([1, 0, 0, 0.5])
    group = np.repeat(np.arange(12), 5)
    (row,) = probekit.geometry(X, group).itertuples()
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    apart = group[:, None] != group
    assert row.anisotropy == pytest.approx((unit @ unit.T)[apart].mean())
    assert row.anisotropy_low < row.anisotropy < row.anisotropy_high
    assert row.norm == pytest.approx(np.linalg.norm(X, axis=1).mean())
    left = [np.linalg.norm(X[group != one], axis=1).mean() for one in range(12)]
    error = np.sqrt(11 / 12 * ((left - np.mean(left)) ** 2).sum())
    assert row.norm_high - row.norm == pytest.approx(2.200985 * error, rel=1e-5)  # t, 11 degrees of freedom


def test_planted_rogue_features_are_found_and_their_cosine_is_told_apart():
    rng = np.random.default_rng(3)
    X = rng.normal(size=(2, 200, 30))
    X[1, :, 7] += 40  # far from zero
    X[1, :, 21] *= 12  # or far apart
    table = probekit.geometry(X)
    assert table.rogue.tolist() == [0, 2]
    assert table.rogue_features.tolist() == ["", "7, 21"]
    planted = table.iloc[1]
    assert planted.rogue_share == pytest.approx((X[1, :, [7, 21]] ** 2).sum() / (X[1] ** 2).sum())
    assert planted.anisotropy > 0.8
    assert abs(planted.anisotropy_without) < 0.05
    assert table.rogue_share[0] == 0


def test_too_few_examples_or_groups_are_refused():
    X = np.random.default_rng(4).normal(size=(30, 30))
    with pytest.raises(ProbekitError, match=r"30 examples are too few .* more than 30, better 150"):
        probekit.geometry(X)
    with pytest.raises(ProbekitError, match="examples of 4 documents or groups are too few"):
        probekit.geometry(X[:, :5], np.arange(30) % 4)
    with pytest.raises(ProbekitError, match="groups has 29 values, but activations 30 examples"):
        probekit.geometry(X[:, :5], np.arange(29))


@pytest.mark.parametrize("missing", [None, np.nan])
def test_missing_groups_are_refused(missing):
    X = np.random.default_rng(4).normal(size=(30, 5))
    groups = ["a", missing, *range(28)]
    with pytest.raises(ProbekitError, match="groups: 1 of 30 are missing, the first is number 1"):
        probekit.geometry(X, groups)


def test_dead_features_make_no_living_one_rogue():
    rng = np.random.default_rng(9)
    X = rng.normal(size=(200, 20))
    X[:, 8:] = 0
    X[:, 3] *= 12
    (row,) = probekit.geometry(X).itertuples()
    assert (row.rogue, row.rogue_features) == (1, "3")


def test_a_layer_that_does_not_vary_has_no_ranks_and_is_named():
    X = np.random.default_rng(10).normal(size=(3, 60, 4)).astype(np.float32)
    X[1], X[2] = 0.1, 0
    with pytest.warns(UserWarning, match="do not vary, and have no ranks: 1, 2"):
        table = probekit.geometry(X)
    assert table.effective_rank.isna().tolist() == [False, True, True]
    assert table.anisotropy[1] == pytest.approx(1)


def test_a_run_has_a_table_and_a_picture(capsys, copy):
    words = ["--probe.layers", "0", "2", "--probe.positions", "1", "2", "--probe.l2", "0.1"]
    words += [
        "--probe.solvers",
        "ridge",
        "--probe.geometry",
        "true",
        "--probe.variants",
        "none",
        "soft",
        "--evaluation.resamples",
        "100",
    ]
    shown = printed(capsys, "probe", copy, *words, "--quiet")
    assert "Geometry of none, seed 0, resid post, position 1" in shown
    table = pd.read_parquet(copy / "probes" / "geometry.parquet")
    assert set(zip(table.variant, table.layer, table.position, strict=True)) == {
        (variant, layer, position)
        for variant in ("none", "soft")
        for layer in (0, 2)
        for position in ("1", "2")
    }
    assert (table.width == 32).all()
    assert (table.effective_rank_low < table.effective_rank).all()
    assert (copy / "probes" / "geometry.png").exists()
    assert probekit.plot_geometry(table).axes
    page = probekit.report(copy, copy / "report.md")[0].read_text("utf-8")
    assert "Geometry of none" in page


def test_a_run_with_fewer_examples_than_features_is_refused(capsys, copy):
    few = {"probe.geometry": True, "probe.max_examples": 20, "probe.locations": ["mlp.hook_post"]}
    with pytest.raises(
        ProbekitError,
        match=r"^probe\.geometry: .* too few for the geometry of 128 features.*; or probe without it$",
    ):
        probekit.probe(copy, few)
