"""The benchmarks run, and refuse what they must; speed itself is not tested."""

import importlib.metadata
import json
import os
import sys
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


def run_quick(name: str, out: Path) -> tuple[dict, list[dict]]:
    """The file that a benchmark wrote, and its rows."""
    import_module(name).main(["--quick", "--repeats", "1", "--out", str(out)])
    (file,) = out.glob("*.json")
    assert file.name == f"{name}-cpu.json"
    results = json.loads(file.read_text("utf-8"))
    assert (results["benchmark"], results["quick"]) == (name, True)
    assert {row["repeats"] for row in results["rows"]} == {1}
    assert results["machine"]["cores"] >= 1
    assert results["machine"]["versions"]["torch"] == importlib.metadata.version("torch")
    return results, results["rows"]


def by_contestant(rows: list[dict]) -> dict[str, dict]:
    return {row["contestant"]: row for row in rows}


def test_workloads_that_were_left_out_keep_their_rows(harness: ModuleType, tmp_path: Path):
    def keep(rows: list[dict], **options: object) -> list[dict]:
        options = harness.Options(CPU, **({"quick": True, "repeats": 1, "out": tmp_path} | options))
        return json.loads(harness.keep("some", options, {}, rows).read_text("utf-8"))["rows"]

    first = keep([{"workload": "a", "seconds": 1}, {"workload": "b", "seconds": 2}])
    then = keep([{"workload": "b", "seconds": 3}], only="b", repeats=5)
    assert then[0] == first[0]
    assert [(row["workload"], row["seconds"], row["repeats"]) for row in then] == [("a", 1, 1), ("b", 3, 5)]
    assert [row["workload"] for row in keep([{"workload": "c"}])] == ["c"], "all were measured"
    assert [row["workload"] for row in keep([{"workload": "d"}], only="d", quick=False)] == ["d"], (
        "the results of a quick run say nothing beside these"
    )


# fit_grid


def test_fit_grid(tmp_path: Path):
    _, rows = run_quick("fit_grid", tmp_path)
    workloads = {row["workload"] for row in rows}
    for kind in ("softmax", "ridge", "lda"):
        assert {
            f"{kind}, {what}" for what in ("one penalty", "default penalties", "many classes")
        } < workloads
    for row in rows:
        assert row["probes"] == row["layers"] * row["distances"]
        assert 0 < row["seconds"] <= row["median_seconds"]
        same = [
            other
            for other in rows
            if all(
                row[key] == other[key] for key in ("workload", "layers", "distances", "examples", "classes")
            )
        ]
        reference = by_contestant(same)["probekit"]
        difference = abs(row["cross_entropy"] / reference["cross_entropy"] - 1)
        assert row["difference"] == pytest.approx(difference, abs=1e-12)
        assert row["ratio"] == (row["seconds"] / reference["seconds"] if difference <= 0.01 else None)
        assert row["measured_probes"] == row["probes"] or row["contestant"] != "probekit"
    for axis in ("examples", "layers", "distances", "classes"):
        small, large = (
            row
            for row in rows
            if row["workload"] == f"growth with {axis}" and row["contestant"] == "probekit"
        )
        assert large[axis] == 2 * small[axis]
        assert large["growth"] == large["seconds"] / small["seconds"]
    main = by_contestant([row for row in rows if row["workload"] == "softmax, one penalty"])
    assert 0 < main["probekit"]["added_megabytes"] < main["probekit"]["peak_megabytes"]


@pytest.fixture
def planted():
    planted_activations = import_module("planted_activations")
    size = planted_activations.Size(layers=2, distances=2, examples=400, width=12, classes=5, one_by_one=2)
    return size, planted_activations.plant(size, CPU)


def test_planted_activations_hold_the_signal_in_every_split(planted):
    size, data = planted
    assert {split: tuple(part.shape) for split, part in data.X.items()} == {
        "probe": (4, 400, 12),
        "validation": (4, 80, 12),
        "test": (4, 80, 12),
    }
    again = import_module("planted_activations").plant(size, CPU)
    assert all(torch.equal(data.X[split], again.X[split]) for split in data.X)
    assert set(data.y["probe"].tolist()) == set(range(5))
    X, y = data.X["probe"][0], data.y["probe"]
    oracle = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(X.numpy(), y.numpy())
    found = oracle.score(data.X["test"][0].numpy(), data.y["test"].numpy())
    assert np.bincount(data.y["test"]).max() / 80 + 0.1 < found < 1
    spectrum = torch.linalg.svdvals(X - X.mean(0)).square()
    assert spectrum[:3].sum() > 0.8 * spectrum.sum()


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


def test_the_loosest_tolerance_of_equal_quality_is_taken(planted, monkeypatch: pytest.MonkeyPatch):
    fit_grid = import_module("fit_grid")
    size, data = planted
    workload = fit_grid.Workload("test", "softmax", (size,), (1e-3,))
    chosen = fit_grid._tolerances(workload, data, size)
    ladder = fit_grid.SOLVERS["softmax"]["scikit-learn"].tolerances
    part = data.only(slice(2))

    def quality(tolerance: float, name: str = "scikit-learn") -> dict[str, float]:
        fit = fit_grid.SOLVERS["softmax"][name].fit(part, (1e-3,), tolerance)
        return fit_grid._quality(workload, fit, part)

    wanted = quality(chosen["probekit"], "probekit")
    good = [all(abs(quality(t)[key] / wanted[key] - 1) <= 0.005 for key in wanted) for t in ladder]
    assert good[0] is False  # or the choice is none
    assert chosen["scikit-learn"] == ladder[good.index(True)]


# extraction


def test_extraction(tmp_path: Path):
    _, rows = run_quick("extraction", tmp_path)
    assert {row["read_layers"] for row in rows} == {2, 3}
    for layers in (2, 3):
        found = by_contestant([row for row in rows if row["read_layers"] == layers])
        reference, bare = found["probekit"], found["bare forward"]
        for name in ("output_hidden_states", "TransformerLens"):
            assert found[name]["difference"] < 1e-4
        for row in found.values():
            assert row["ratio"] == row["seconds"] / reference["seconds"]
            assert row["ratio_to_bare_forward"] == row["seconds"] / bare["seconds"]
    # Of a layer, two operations a multiplication: 4 width^2 weights in attention, 8 in the MLP, and the maps.
    shape = import_module("extraction").QUICK
    assert shape.flops == 3 * 6 * 32 * 2 * ((4 + 8) * 16**2 + 2 * 32 * 16)


def test_a_reader_that_reads_something_else_is_found_out(tmp_path: Path):
    extraction = import_module("extraction")
    scene = extraction.Scene(extraction.QUICK, CPU, tmp_path)
    true = extraction.probekit_reader(scene)()
    scene.columns = scene.columns - 1
    shifted = extraction.hidden_states(scene)()
    assert extraction._difference(true, true) == 0
    assert extraction._difference(shifted, true) > extraction.SAME[torch.float32]


# memory


def test_memory(tmp_path: Path):
    results, rows = run_quick("memory", tmp_path)
    imports, small, large = rows
    assert imports["workload"] == "imports alone"
    assert large["documents"] == results["settings"]["times"] * small["documents"]
    assert large["tokens"] > 7 * small["tokens"]
    for row in (small, large):
        assert row["peak_megabytes"] > imports["peak_megabytes"] > 0
        assert row["peak_ratio"] == row["peak_megabytes"] / small["peak_megabytes"]


# training


def test_training(tmp_path: Path):
    _, rows = run_quick("training", tmp_path)
    training = import_module("training")
    found = by_contestant(rows)
    assert found.keys() == set(training.CONTESTANTS)
    plain = found["plain fine-tuning"]
    for row in rows:
        # Three steps of four windows of sixteen tokens.
        assert row["tokens_per_second"] == 3 * 4 * 16 / row["seconds"]
        assert row["speed_of_plain"] == plain["seconds"] / row["seconds"]
        assert row["ratio"] == row["seconds"] / found["probekit"]["seconds"]
    assert found["probekit through the bridge"]["difference"] < 1e-4
    assert found["probekit, joint"]["difference"] is plain["difference"] is None


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


def test_depth_ensemble(tmp_path: Path):
    _, rows = run_quick("depth_ensemble", tmp_path)
    assert [row["workload"] for row in rows] == ["k = 2"] * 3 + ["k = 2, distilled"] * 3
    for part in (rows[:3], rows[3:]):
        found = by_contestant(part)
        reference, plain = found["probekit"], found["plain LM"]
        assert found["all logits"]["difference"] < 1e-4
        assert plain["difference"] is None
        for row in found.values():
            assert 0 < row["added_megabytes"] < row["peak_megabytes"]
            assert row["matrix_rate_share"] > 0
            assert row["ratio"] == row["seconds"] / reference["seconds"]
            assert row["time_of_plain"] == row["seconds"] / plain["seconds"]
            assert row["memory_ratio"] == row["added_megabytes"] / reference["added_megabytes"]
            assert row["memory_of_plain"] == row["added_megabytes"] / plain["added_megabytes"]


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


# generation


def test_generation(tmp_path: Path):
    _, rows = run_quick("generation", tmp_path)
    written = [row for row in rows if "batch" in row["workload"]]
    assert [row["workload"] for row in written] == ["24 tokens, batch 1"] * 2 + ["12 tokens, batch 2"] * 2
    for row in written:
        assert row["difference"] == 0
        assert row["tokens_a_second"] == pytest.approx(24 / row["seconds"])
    scored = [row for row in rows if row["workload"].startswith("perplexity")]
    assert len(written) + len(scored) == len(rows) == 8
    for fast, slow in zip(scored[::2], scored[1::2], strict=True):
        assert (fast["stride"], slow["stride"]) == (16, 1)
        assert fast["measured_tokens"] == fast["tokens"] == slow["tokens"]
        assert slow["measured_tokens"] == slow["sample_tokens"] == fast["sample_tokens"] < fast["tokens"]
        difference = slow["sample_perplexity"] - fast["sample_perplexity"]
        assert slow["perplexity_difference"] == difference != 0
        assert abs(difference) < 0.1 * fast["sample_perplexity"]
        assert slow["ratio"] == slow["seconds"] / fast["seconds"]


# harness


def prepare_megabytes(device: str, megabytes: int):
    """The call takes some memory that preparing had taken, and more, before."""
    torch.ones(2 * megabytes * 250_000)
    return lambda: torch.ones(megabytes * 250_000)


def test_peak_memory_is_that_of_the_call_alone(harness: ModuleType):
    ballast = torch.ones(
        500 * 250_000
    )  # a process that is started inherits the peak of the one that starts it
    found = harness.peak_memory(prepare_megabytes, CPU, megabytes=60)
    del ballast
    assert found["added_megabytes"] == pytest.approx(60, abs=10)
    assert found["peak_megabytes"] > found["added_megabytes"]


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


# corpus


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc is read")
def test_a_command_is_watched_with_all_its_processes():
    corpus = import_module("corpus")
    child = "import time; held = bytearray(150_000_000); time.sleep(0.6)"
    script = (
        "import subprocess, sys, time\n"
        f"subprocess.run([sys.executable, '-c', {child!r}])\n"
        "print('first: done in 0.5 s, 7', file=sys.stderr, flush=True)\n"
        "end = time.process_time() + 0.4\n"
        "while time.process_time() < end: pass\n"
        "print('second: done in 0.3 s', file=sys.stderr, flush=True)\n"
    )
    watched = corpus.watch([sys.executable, "-c", script], dict(os.environ))
    assert [(stage, seconds) for stage, _, seconds in watched.stages] == [("first", 0.5), ("second", 0.3)]
    rows = [watched.row(done - seconds, done) for _, done, seconds in watched.stages]
    assert rows[0]["peak_megabytes"] > 150 > rows[1]["peak_megabytes"]
    whole = watched.row(watched.begun, watched.ended)
    assert whole["peak_megabytes"] == rows[0]["peak_megabytes"]
    assert whole["cpu_seconds"] >= 0.3
    assert whole["cores_wanted"] >= whole["cores_used"]
    with pytest.raises(RuntimeError, match="no such thing"):
        corpus.watch([sys.executable, "-c", "raise SystemExit('no such thing')"], dict(os.environ))
