"""`probekit.fit_grid` on arrays against scikit-learn, probes on disk, and input that is refused."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

import probekit
from probekit.errors import ProbekitError
from probekit.io import write_tensors
from probekit.probing.results import COLUMNS
from probekit.probing.texts import TextActivations

EXAMPLES, WIDTH, GROUPS = 300, 8, 60
FAST = {"l2": [0.01, 0.1], "control": False, "resamples": 100}


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations of three layers, labels that only layer 1 holds, and groups."""
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=EXAMPLES)
    X = generator.normal(size=(3, EXAMPLES, WIDTH)).astype(np.float32)
    X[1, :, 2] += 2 * labels
    return X, np.array(["false", "true"])[labels], generator.integers(GROUPS, size=EXAMPLES)


def own_split(groups: np.ndarray) -> np.ndarray:
    return np.array(["train", "train", "train", "validation", "test"])[groups % 5]


def probes_at(table: pd.DataFrame, layer: int) -> pd.DataFrame:
    return table[(table.reader == "probe") & (table.layer == layer)]


def test_the_label_is_found_where_it_is(data):
    X, labels, groups = data
    solvers = ("softmax", "lda", "mean-difference", "l1", "mlp")
    results = probekit.fit_grid(X, labels, groups=groups, solvers=solvers, name="truth")
    table = results.table
    assert set(COLUMNS) < set(table.columns)
    assert (probes_at(table, 1).auroc_low > 0.6).all()
    assert set(table.target) == {"truth"}
    probes = table[table.reader == "probe"]
    assert len(probes) == 3 * len(solvers)
    assert (probes[probes.layer == 1].accuracy_low > 0.6).all()
    elsewhere = probes[probes.layer != 1]
    assert ((elsewhere.accuracy_low < 0.55) & (elsewhere.bits < 0.1)).all()
    assert (probes.control_accuracy < 0.75).all()
    (prior,) = table[table.reader == "prior"].cross_entropy
    assert prior == pytest.approx(np.log(2), abs=0.03)
    assert results.probes.cells[0].layer == 1


def test_equals_scikit_learn_on_the_same_split(data):
    X, labels, groups = data
    split = own_split(groups)
    results = probekit.fit_grid(X, labels, groups=groups, split=split, **(FAST | {"l2": [0.1]}))
    for layer in range(3):
        train, test = X[layer][split == "train"], X[layer][split == "test"]
        scaler = StandardScaler().fit(train)
        oracle = LogisticRegression(C=2 / (0.1 * len(train)), tol=1e-8)  # the two classes halve the weights
        oracle.fit(scaler.transform(train), labels[split == "train"])
        (row,) = probes_at(results.table, layer).itertuples()
        decided = oracle.decision_function(scaler.transform(test))
        assert row.auroc == pytest.approx(roc_auc_score(labels[split == "test"], decided), abs=1e-3)
        assert row.accuracy == pytest.approx(oracle.score(scaler.transform(test), labels[split == "test"]))
        p = results.score(X, layer)[["p(false)", "p(true)"]].to_numpy()
        np.testing.assert_allclose(p, oracle.predict_proba(scaler.transform(X[layer])), atol=2e-3)


def test_groups_cross_no_split_and_intervals_resample_them(data):
    X, labels, groups = data
    results = probekit.fit_grid(X[1], labels, groups=groups, **FAST)
    row = results.table[results.table.reader == "probe"].iloc[0]
    assert 0.12 * EXAMPLES < row.examples < 0.28 * EXAMPLES
    assert 0.5 * EXAMPLES < row.fitted_on < 0.7 * EXAMPLES
    assert row.documents < GROUPS / 3
    alone = probekit.fit_grid(X[1], labels, **FAST).table.iloc[0]
    assert alone.documents == alone.examples


def test_the_same_seed_gives_the_same_table(data):
    X, labels, groups = data
    tables = [probekit.fit_grid(X[:2], labels, groups=groups, seed=s, **FAST).table for s in (3, 3, 4)]
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


@pytest.mark.parametrize("kind", ["torch", "bfloat16", "npy", "safetensors", "list of classes"])
def test_all_kinds_of_arrays_give_the_same(data, kind, tmp_path: Path):
    X, labels, groups = data
    given: object = torch.from_numpy(X)
    if kind == "bfloat16":
        given = torch.from_numpy(X).bfloat16()
        X = given.float().numpy()
    if kind == "npy":
        given = tmp_path / "x.npy"
        np.save(given, X)
    if kind == "safetensors":
        given = str(tmp_path / "x.safetensors")
        save_file({"activations": torch.from_numpy(X)}, given)
    found = probekit.fit_grid(given, labels.tolist(), groups=torch.from_numpy(groups), **FAST)
    assert found.table.equals(probekit.fit_grid(X, labels, groups=groups, **FAST).table)


def test_probes_are_kept_with_a_card(data, tmp_path: Path):
    X, labels, groups = data
    results = probekit.fit_grid(X, labels, groups=groups, solvers=["softmax", "ridge"], name="truth", **FAST)
    results.save(tmp_path / "probes.safetensors")

    probes = probekit.load_probes(tmp_path / "probes.safetensors")
    assert probes.card["classes"] == ["false", "true"]
    assert probes[1].coef.shape == (WIDTH, 2)

    assert probes.cells == results.probes.cells
    assert len(probes.cells) == 6
    assert probes.card == results.probes.card
    assert probes.card["target"] == "truth"
    assert [row["accuracy"] for row in probes.card["scores"]] == pytest.approx(
        [results.probes.card["scores"][i]["accuracy"] for i in range(6)]
    )
    assert probes.score(X).equals(results.score(X))
    assert probes.score(X[1], layer=1).equals(results.score(X, layer=1))
    right = (results.score(X).predicted == labels).mean()
    assert right > 0.8
    with pytest.raises(ProbekitError, match="layer is 7"):
        probes.score(X, layer=7)
    with pytest.raises(ProbekitError, match=f"width 5, but the probe reads {WIDTH}"):
        probes.score(X[:, :, :5])
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    write_tensors(tmp_path / "odd.safetensors", {"x": torch.zeros(1)}, {"card": "{}", "cells": '["a|b"]'})
    key = "softmax|hook_resid_post|0|last|1"
    parts = {f"{key}|coef": torch.zeros(2, 2), f"{key}|intercept": torch.zeros(2)}
    card = {"model": None, "position": "last", "classes": ["a", "b"]}
    written = {"card": json.dumps(card), "cells": json.dumps([key])}
    write_tensors(tmp_path / "pointless.safetensors", parts, written)
    for name in ("other", "odd", "pointless"):
        with pytest.raises(ProbekitError, match="no card of probes"):
            probekit.load_probes(tmp_path / f"{name}.safetensors")


def test_numbers_are_read_by_ridge(data, tmp_path: Path):
    X, _, groups = data
    noise = np.random.default_rng(1).normal(size=EXAMPLES)
    numbers = 10 + 3 * X[1, :, 2] - 2 * X[1, :, 5] + noise
    split = own_split(groups)
    results = probekit.fit_grid(X, numbers, groups=groups, split=split, l2=[0.01], resamples=100)
    row = next(probes_at(results.table, 1).itertuples())
    train, test = X[1][split == "train"], X[1][split == "test"]
    scaler = StandardScaler().fit(train)
    oracle = Ridge(alpha=0.01 * len(train)).fit(scaler.transform(train), numbers[split == "train"])
    expected = oracle.predict(scaler.transform(test))
    error = ((expected - numbers[split == "test"]) ** 2).mean()
    assert row.squared_error == pytest.approx(error, rel=1e-3)
    assert row.r2_low > 0.8
    assert probes_at(results.table, 0).r2.item() < 0.3
    assert abs(row.control_r2) < 0.3
    results.save(tmp_path / "numbers.safetensors")
    scored = probekit.load_probes(tmp_path / "numbers.safetensors").score(X[:, split == "test"])
    np.testing.assert_allclose(scored.predicted, expected, atol=1e-2)


def test_few_examples_are_noted(data):
    X, labels, _ = data
    notes = probekit.fit_grid(X[1, :40], labels[:40], **FAST).notes
    assert notes[:2] == [
        f"the split {name} has 8 examples, fewer than 20: intervals are wide"
        for name in ("validation", "test")
    ]
    assert notes[2].startswith("Only 8 groups of test examples: intervals from resampling so few are too nar")


def test_few_groups_are_noted_and_many_are_not(data):
    X, labels, groups = data
    few = probekit.fit_grid(X[1], labels, groups=groups, **FAST)
    tested = few.table.groups.max()
    assert tested < 20
    assert [note for note in few.notes if "groups" in note] == [
        f"Only {tested} groups of test examples: intervals from resampling so few are too narrow to trust; "
        "give examples of more groups"
    ]
    assert not probekit.fit_grid(X[1], labels, **FAST).notes


def test_a_class_that_may_be_a_slip_of_the_pen_is_noted(data):
    X, labels, _ = data
    written = labels.astype(object)
    written[5] = written[9] = "ture"
    results = probekit.fit_grid(X[1], written, **FAST)
    counts = [(written == name).sum() for name in ("false", "true")]
    (note,) = [note for note in results.notes if "AUROC" in note]
    assert "'label' has 3 classes (" in note
    assert all(f"'{name}' {count}" in note for name, count in zip(("false", "true"), counts, strict=True))
    assert "'ture' 2" in note
    assert "auroc" not in results.table


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": ["a"] * 10}, "labels has 10 values, but activations 300 examples"),
        ({"labels": [1j, 2j] * 150}, "labels holds complex numbers; give words or numbers"),
        ({"name": ["a"]}, r"name is \['a'\]; give what the labels are called"),
        ({"groups": [1, 2]}, "groups has 2 values, but activations 300 examples"),
        ({"labels": ["a"] * EXAMPLES}, "labels has 1 classes; it must have 2 to 4,096"),
        ({"labels": [*["a", "b"] * 149, "a", None]}, "labels: 1 of 300 are missing, the first is number 299"),
        ({"labels": [["a"], ["b"]] * 150}, "labels holds lists or objects"),
        ({"groups": [0, 1] * 150}, "groups has 2 groups, but probe, validation, test need one each"),
        ({"split": ["train"] * EXAMPLES}, "split has no validation examples"),
        ({"split": ["dev"] * EXAMPLES}, "split has 'dev' at 0; it must be train, validation or test"),
        (
            {"split": ["train", "test"] * 150, "groups": np.arange(EXAMPLES) // 4},
            "groups: 0 is in more than one",
        ),
        ({"solvers": "svm"}, "probe.solvers.0 is 'svm'"),
        ({"l3": 1}, "l3"),
        (
            {"labels": np.linspace(0, 1, EXAMPLES), "solvers": "lda"},
            "lda, which read classes, and 'label' holds",
        ),
        ({"kind": "numbers"}, "labels holds words, but kind is numbers"),
        ({"labels": [1.5] * EXAMPLES}, "numbers must be finite, not all the same"),
        (
            {"labels": [1e-300, 2.5e-300] * 150},
            "numbers must be finite, not all the same, and not of extreme",
        ),
        (
            {"activations": np.zeros(5)},
            r"activations \[5\] must be \[examples, width\] or \[layers, examples",
        ),
        ({"activations": np.zeros((EXAMPLES, 3))}, "only 1 of 300 examples differ"),
        ({"activations": "x.csv"}, "it must end in .npy or .safetensors"),
        ({"activations": np.full((EXAMPLES, 3), np.nan)}, "example 0 of layer 0 is not finite"),
        ({"activations": [[1.0], [1.0, 2.0]]}, "activations is a list that makes no array of numbers"),
        ({"activations": np.full((EXAMPLES, 3), "a")}, "activations is a ndarray that makes no array of num"),
        ({"activations": np.ones((EXAMPLES, 3), complex)}, "no array of numbers .they are complex"),
        ({"activations": torch.empty(EXAMPLES, 3, device="meta")}, "makes no array of numbers"),
        ({"labels": None}, "labels is None; give a list or an array"),
        ({"labels": ["\ud800", "a"] * 150}, "labels holds half a surrogate pair"),
        ({"labels": 1}, "labels is 1; give a list or an array"),
        ({"groups": [[1]] * EXAMPLES}, "groups holds lists or objects"),
        ({"split": [["train"]] * EXAMPLES}, "split holds lists or objects"),
        ({"kind": "number"}, "kind is 'number'; it must be classes or numbers"),
        ({"seed": -1}, "seed is -1"),
        ({"resamples": 0}, "evaluation.resamples is 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(data, changed, message):
    X, labels, _ = data
    with pytest.raises(ProbekitError, match=message) as caught:
        probekit.fit_grid(**({"activations": X, "labels": labels} | changed))
    assert "\n" not in str(caught.value)


def test_groups_that_the_mean_predicts_exactly_count(data):
    """Every example is a group; the mean of those fitted on is 0, the label of a third of them."""
    numbers = np.tile([-1.0, 0.0, 1.0], EXAMPLES // 3)
    X = np.random.default_rng(2).normal(size=(EXAMPLES, WIDTH)) + 0.5 * numbers[:, None] * (
        np.arange(WIDTH) == 3
    )
    split = np.array(["train", "train", "train", "validation", "test"])[np.arange(EXAMPLES) // 3 % 5]
    results = probekit.fit_grid(X, numbers, split=split, l2=[0.1], kind="numbers", resamples=100)
    row, tested = probes_at(results.table, 0).iloc[0], split == "test"
    error = ((results.score(X[tested]).predicted - numbers[tested]) ** 2).sum()
    assert row.r2 == pytest.approx(1 - error / (numbers[tested] ** 2).sum(), abs=1e-6)
    assert row.gain == pytest.approx(row.r2)
    assert row.selectivity == pytest.approx(row.r2 - row.control_r2)
    assert row.documents == row.examples == tested.sum()
    assert row.r2_low < row.r2 < row.r2_high


def of_texts(X: np.ndarray, *points: tuple[str, int], model: str = "tiny", position: object = "last"):
    return TextActivations(torch.from_numpy(X), points, position, np.full(X.shape[1], 5), model, None)


def test_probes_are_applied_only_where_they_read(data, tmp_path: Path):
    """Location and layer are looked up; the label is in the second stack alone."""
    X, labels, groups = data
    mid, post = ("hook_resid_mid", 1), ("hook_resid_post", 1)
    fitted = probekit.fit_grid(of_texts(X[:2], mid, post, position="last-1"), labels, groups=groups, **FAST)
    assert {*fitted.table.position} == {"last-1"}
    fitted.save(tmp_path / "probes.safetensors")
    probes = probekit.load_probes(tmp_path / "probes.safetensors")
    assert probes.cells[0].location == post[0]
    expected = probes.score(X[:2])
    assert (expected.predicted == labels).mean() > 0.75
    assert probes.score(of_texts(X[1::-1].copy(), post, mid, position="last-1")).equals(expected)
    assert probes.score(of_texts(X[1:2], post, position="last-1"), layer=1).equals(expected)
    other = probes.score(of_texts(X[:2], mid, post, position="last-1"), probes.cells[1])
    assert probes.score(of_texts(X[:1], mid, position="last-1"), layer=1).equals(other)
    for given, message in (
        (
            of_texts(X[:1], mid, position="last-1"),
            "reads hook_resid_post, layer 1.*of hook_resid_mid, layer 1",
        ),
        (of_texts(X[:2], mid, post), "position is 'last', but the probes read 'last-1'"),
        (
            of_texts(X[:2], mid, post, position="last-1", model="other"),
            "model is 'other', but the probes read",
        ),
        (X, "activations has 3 layers, but the probes were fitted to 2"),
    ):
        with pytest.raises(ProbekitError, match=message):
            probes.score(given)


def test_copies_are_one_group():
    """Labels are noise: a probe could know them only from copies in another split."""
    generator = np.random.default_rng(0)
    X = np.repeat(generator.normal(size=(2, 200, 60)), 5, axis=1)
    labels = np.repeat(generator.integers(2, size=200), 5)
    results = probekit.fit_grid(X, labels, **FAST)
    probes = results.table[results.table.reader == "probe"]
    assert (probes.accuracy < 0.8).all()
    assert (probes.documents == probes.examples / 5).all()
    assert results.notes[0].startswith("800 of 1,000 examples have the same activations as another")
    split = np.tile(["train", "train", "train", "validation", "test"], 200)
    (note, *_) = probekit.fit_grid(X, labels, split=split, **FAST).notes
    assert note.endswith("within a split; 400 have such a copy in another split")


def test_large_numbers_keep_their_order():
    """Seconds since 1970, apart by less than float32 can tell."""
    X = np.random.default_rng(0).normal(size=(EXAMPLES, WIDTH))
    numbers = 1.7e9 + 10 * X[:, 0]
    split = own_split(np.arange(EXAMPLES))
    results = probekit.fit_grid(X, numbers, split=split, kind="numbers", l2=[1e-6], resamples=100)
    assert probes_at(results.table, 0).rank_correlation.item() > 0.999
    scored = results.score(X).predicted
    assert scored.rank().corr(pd.Series(numbers).rank()) > 0.999
