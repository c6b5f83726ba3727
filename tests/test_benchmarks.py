"""The benchmarks run, and refuse what they must; speed itself is not tested."""

import importlib.metadata
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

FOLDER = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.fixture
def harness() -> ModuleType:
    return import_module("harness")


# fit_grid


@pytest.fixture
def planted():
    planted_activations = import_module("planted_activations")
    size = planted_activations.Size(layers=2, distances=2, examples=400, width=12, classes=5, one_by_one=2)
    return size, planted_activations.plant(size, CPU)


@pytest.mark.parametrize(
    "name", ["arrays", "depth_ensemble", "extraction", "fit_grid", "generation", "memory", "training"]
)
def test_a_quick_run_compares_equal_results(name: str, tmp_path: Path):
    import_module(name).main(["--quick", "--repeats", "1", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text("utf-8"))
    assert (file.name, results["benchmark"], results["quick"]) == (f"{name}-cpu.json", name, True)
    assert results["machine"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert results["rows"]
    for row in results["rows"]:
        assert row["repeats"] == 1
        if row.get("difference") is not None and row.get("ratio") is not None:
            assert row["difference"] <= 0.01
            assert row["contestant"] != "probekit" or row["ratio"] == 1


def test_planted_activations_hold_the_signal_in_every_split(planted):
    _, data = planted
    assert {split: tuple(part.shape) for split, part in data.X.items()} == {
        "probe": (4, 400, 12),
        "validation": (4, 80, 12),
        "test": (4, 80, 12),
    }
    X, y = data.X["probe"][0], data.y["probe"]
    oracle = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(X.numpy(), y.numpy())
    found = oracle.score(data.X["test"][0].numpy(), data.y["test"].numpy())
    assert np.bincount(data.y["test"]).max() / 80 + 0.1 < found < 1


@pytest.mark.parametrize("kind", ["softmax", "ridge", "lda"])
def test_at_their_tightest_all_contestants_agree(kind: str, planted):
    contestants = import_module("contestants")
    _, data = planted
    losses = {
        name: contestants.cross_entropies(solver.fit(data, (0.01,), solver.tolerances[-1]), data)
        for name, solver in contestants.SOLVERS[kind].items()
    }
    for loss in losses.values():
        assert loss.tolist() == pytest.approx(losses["probekit"].tolist(), rel=1e-3)


# extraction


def test_a_reader_that_reads_something_else_is_found_out(tmp_path: Path):
    extraction = import_module("extraction")
    scene = extraction.Scene(extraction.QUICK, CPU, tmp_path)
    true = extraction.probekit_reader(scene)()
    scene.columns = scene.columns - 1
    shifted = extraction.hidden_states(scene)()
    assert extraction._difference(true, true) == 0
    assert extraction._difference(shifted, true) > extraction.SAME[torch.float32]


# training


def test_all_train_on_the_same_windows(tmp_path: Path):
    training = import_module("training")
    scene = training.Scene(training.QUICK, CPU, tmp_path)
    works = {name: make(scene) for name, make in training.CONTESTANTS.items()}
    windows = scene.corpus.tokens[:-6].reshape(6, 33)[:, :-1].reshape(12, 16)
    seen: list[tuple[int, ...]] = []

    def look(module: torch.nn.Module, given: tuple[torch.Tensor, ...], output: object) -> None:
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == 300 and len(given[0]) == 4:
            seen.extend(map(tuple, given[0].tolist()))

    with torch.nn.modules.module.register_module_forward_hook(look):
        for name, work in works.items():
            seen.clear()
            work()
            assert sorted(seen) == sorted(map(tuple, windows.tolist())), name


# depth_ensemble


@pytest.mark.parametrize("distilled", [False, True])
def test_losses_have_the_same_gradients_and_others_are_found_out(distilled: bool):
    bench = import_module("depth_ensemble")
    scene = bench.Scene(bench.Sizes(40, 90, 16, 3, distilled), CPU)
    wanted = scene.gradients(bench.probekit)
    # Of three layers' states, and of their norms' scales and shifts, and of the router's weights and biases.
    assert [tuple(one.shape) for one in wanted] == [(40, 16)] * 3 + [(3, 16)] * 3 + [(3,)]
    assert all(one.abs().max() > 0 for one in wanted)
    assert bench.difference(scene.gradients(bench.all_logits), wanted) < 1e-5
    other = bench.Scene(bench.Sizes(40, 90, 16, 3, not distilled), CPU)
    assert bench.difference(other.gradients(bench.all_logits), wanted) > max(bench.SAME.values())


# harness


def test_ratios_of_unequal_results_are_refused(harness: ModuleType):
    rows = [
        {"contestant": "probekit", "seconds": 2.0, "difference": 0.0},
        {"contestant": "equal", "seconds": 6.0, "difference": 0.009},
        {"contestant": "unequal", "seconds": 1.0, "difference": 0.011},
        {"contestant": "not comparable", "seconds": 1.0, "difference": None},
    ]
    harness.compare(rows)
    assert [row["ratio"] for row in rows] == [1.0, 3.0, None, 0.5]


def test_a_race_alternates_after_a_warm_up(harness: ModuleType):
    log = []
    contestants = {
        name: harness.Contestant(lambda name=name: log.append(name) or name * 2, lambda: log.append("warm"))
        for name in "ab"
    }
    outcomes = harness.race(contestants, 3, CPU)
    assert log == ["warm", "warm", "a", "b", "b", "a", "a", "b"]
    assert {name: outcome.result for name, outcome in outcomes.items()} == {"a": "aa", "b": "bb"}
    assert [len(outcome.times) for outcome in outcomes.values()] == [3, 3]


def test_matrix_rate_counts_two_operations_for_each_multiplication(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(harness, "timed", lambda call, device: (0.5, call()))
    assert harness.matrix_rate(CPU, torch.float32, (3, 5, 7), batch=2) == 2 * 2 * 3 * 5 * 7 / 0.5
