"""Checks of a run: each is provoked; a sound run is not suspected."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_results as made
from synthetic_probes import probe_table

from probekit.data.corpus import FEW_DOCUMENTS
from probekit.io import read_json, write_json
from probekit.probing.probe import defaults_of
from probekit.reports.checks import checks, compared_interventions
from probekit.reports.report import commands
from probekit.run.run import Run

CEILINGS = {"accuracy": (0.6, 0.55, 0.65), "cross_entropy": (1.0, 0.9, 1.1)}
PLANNED = {"accuracy": (0.5, 0.45, 0.55), "cross_entropy": (1.2, 1.1, 1.3)}


@pytest.fixture
def run(tiny_run: Run, tmp_path: Path) -> Run:
    """A copy of the trained run with made-up results that nothing speaks against but few documents."""
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path / "copy"))
    write_evaluation(run)
    write_probes(run, sound_probes())
    return run


def write_evaluation(run: Run, planner: dict[str, tuple[float, float, float]] = PLANNED, **settings) -> None:
    names = ["none", *(name for name in run.variants)]
    bounds = {"perplexity": 20.0, "perplexity_low": 19.0, "perplexity_high": 21.0}
    perplexity = [
        {"variant": name, "actions": "planner", "tokens": 100, "documents": 16} | bounds for name in names
    ]
    readers = {"planner": planner, "ceiling (words)": CEILINGS}
    rows = [
        {"reader": reader, "metric": metric, "sentences": 90, "documents": 16}
        | dict(zip(("value", "value_low", "value_high"), values, strict=True))
        for reader, metrics in readers.items()
        for metric, values in metrics.items()
    ]
    used = {"split": "test", "window": 48, "stride": 24, "resamples": 200} | settings
    tables = {"perplexity": perplexity, "differences": [], "planner": rows}
    write_json(run.folder / "evaluation.json", {"settings": used} | tables)


def sound_probes() -> pd.DataFrame:
    table = probe_table(("none", "random"), ("hook_resid_post",), horizons=(1,), solvers=("softmax",))
    table = table[table.accuracy.notna()]
    shortfall = {"shortfall": 0.2, "shortfall_low": 0.1, "shortfall_high": 0.3}
    return table.assign(**shortfall).reset_index(drop=True)


def write_probes(run: Run, table: pd.DataFrame, **settings) -> None:
    (run.folder / "probes").mkdir(exist_ok=True)
    table.to_parquet(run.folder / "probes" / "results.parquet")
    used = run.config.override(settings).model_dump(mode="json")
    write_json(
        run.folder / "probes" / "settings.json",
        used
        | {
            "notes": [],
            "cautions": [],
            "documents": {},
            "classes": ["a", "b"],
            "range": None,
            "extent": "sentences",
            "of": {},
        },
    )


def others(run: Run) -> list[str]:
    """The lines beside that on the run's few documents, which all tests here have."""
    lines = checks(run)
    few = [line for line in lines if line.startswith("Only ")]
    assert len(few) == 1  # of the corpus, and of the probes
    return [line for line in lines if line not in few]


@pytest.fixture
def causal(run: Run) -> Run:
    """The same with texts written on, interventions, a subnetwork and probed checkpoints."""
    made.write_continuation(run)
    made.write_interventions(run, "soft", **{"intervene.distances": [2, 4]})
    made.write_interventions(run, "none")
    made.write_subnetwork(run, **{"subnetwork.steps": 3})
    made.write_over_training(run, made.over_training(), **{"probe.layers": [0, 2]})
    return run


def test_a_sound_run_is_not_suspected(causal: Run):
    assert others(causal) == []


@pytest.mark.parametrize(("documents", "few"), [(FEW_DOCUMENTS - 1, 1), (FEW_DOCUMENTS, 0)])
def test_few_documents(documents: int, few: int, run: Run):
    write_probes(run, sound_probes().assign(documents=60, groups=documents))
    lines = [line for line in checks(run) if line.startswith("Only 39 test documents")]
    assert len(lines) == few


@pytest.mark.parametrize("documents", [FEW_DOCUMENTS - 1, FEW_DOCUMENTS])
def test_few_documents_of_interventions_subnetworks_and_checkpoints(documents: int, run: Run):
    made.write_interventions(run, "soft", documents + 5)  # sentences of fewer are written anew
    made.write_subnetwork(run, documents)
    made.write_continuation(run, documents)
    made.write_over_training(run, made.over_training(documents))
    found = [line.partition(": only 39 test documents")[0] for line in others(run)]
    few = [
        "Probes over the training of lm",
        "Interventions in soft (steer)",
        "The subnetwork of none",
        "Continuation",
    ]
    assert found == (few if documents < FEW_DOCUMENTS else [])


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("numbers", {"classes": [], "range": [0.0, 1.0]}),
        ("vectors", {"classes": [], "range": None}),
        ("classes", {}),
    ],
)
def test_the_usual_settings_of_a_target_are_no_others(kind: str, facts: dict, run: Run):
    usual = defaults_of(kind, run.config.probe) or {"probe.solvers": ["ridge"]}
    write_probes(run, sound_probes(), **usual)
    path = run.folder / "probes" / "settings.json"
    write_json(path, read_json(path) | facts)
    warned = ["Probed with other settings than the run's: probe.solvers ridge"]
    assert others(run) == (warned if kind == "classes" else [])


def test_notes_on_the_labels_of_probes(run: Run):
    write_probes(run, sound_probes())
    settings = read_json(run.folder / "probes" / "settings.json")
    note = "93% of the test examples at horizon 1 have the class no"
    write_json(run.folder / "probes" / "settings.json", settings | {"cautions": [note]})
    assert others(run) == [f"Probes: {note}"]


@pytest.mark.parametrize("lowest", [-0.1, 0.1])
def test_probes_that_read_no_more_than_baselines(lowest: float, run: Run):
    """A cell of random weights that does is luck."""
    table = sound_probes().assign(gain=0.2, gain_low=-0.1, gain_high=0.4, gain_over="bigram")
    table.loc[table.variant == "random", "gain_low"] = 0.1
    table.loc[first_probe(table), "gain_low"] = lowest
    write_probes(run, table)
    lines = [line for line in others(run) if "read more than the bigram" in line]
    assert len(lines) == (lowest < 0)
    assert all(line.startswith("Probes: 0 of ") for line in lines)


def test_interventions_that_are_compared_with_nothing_are_left_out(causal: Run):
    table = compared_interventions(causal)
    assert set(table.condition) == {"erase", "steer"}
    assert set(table.metric) == set(causal.interventions().metric)


def test_few_prompts(run: Run):
    metrics = [{"variant": "none", "actions": "none", "texts": "samples", "length": 6, "metric": "mauve"}]
    metrics[0] |= {
        "value": 0.5,
        "value_low": 0.4,
        "value_high": 0.6,
        "seed_spread": None,
        "documents": 9,
        "empty": 0,
    }
    settings = run.config.generation.model_dump(mode="json") | {"seeds": [0], "resamples": 200, "prompts": 9}
    notes = ["9 prompts in place of 200: no more"]
    write_json(run.folder / "generation.json", {"settings": settings, "notes": notes, "metrics": metrics})
    (line,) = others(run)
    assert "9 documents only" in line


def unconverged(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(converged=table.converged.where(table.index != first_probe(table), other=False))


def constant(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(constant=table.constant.where(table.index != first_probe(table), other=True))


def injected(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(injected=table.index == first_probe(table))


def above(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(shortfall_high=table.shortfall_high.where(table.index != first_probe(table), -0.01))


def empty(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(accuracy=table.accuracy.where(table.index != first_probe(table)))


def first_probe(table: pd.DataFrame) -> int:
    return int(table.index[table.reader == "probe"][0])


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (unconverged, "1 of 22 probes did not converge"),
        (constant, "1 of 22 cells have the same activation in all examples"),
        (injected, "1 of 22 cells read the target's own action"),
        (above, "1 of 22 probes are above the ceiling by more than their intervals"),
        (empty, "1 of 22 cells are empty"),
    ],
)
def test_cells(spoil: Callable[[pd.DataFrame], pd.DataFrame], line: str, run: Run):
    write_probes(run, spoil(sound_probes()))
    (found,) = others(run)
    assert line in found
    if spoil is above:
        row = sound_probes().loc[first_probe(sound_probes())]
        place = f"{row.variant}, {row.location}, layer {row.layer}, position {row.position}, horizon 1"
        assert place in found
        assert "a leak until shown otherwise" in found


def test_an_injected_cell_is_no_leak(run: Run):
    write_probes(run, above(injected(sound_probes())))
    assert not any("ceiling" in line for line in others(run))


@pytest.mark.parametrize(
    ("metric", "values", "above"),
    [
        ("accuracy", (0.65, 0.61, 0.69), True),
        ("accuracy", (0.65, 0.59, 0.69), False),
        ("cross_entropy", (0.9, 0.8, 0.99), True),
        ("cross_entropy", (0.9, 0.8, 1.01), False),
    ],
)
def test_a_planner_above_the_ceiling(metric: str, values: tuple[float, float, float], above: bool, run: Run):
    write_evaluation(run, PLANNED | {metric: values})
    lines = others(run)
    assert len(lines) == above
    if above:
        assert lines[0].startswith(f"planner is above the ceiling by more than its interval: {metric}")


@pytest.mark.parametrize("kind", ["loss", "validation_loss"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_losses_that_are_not_finite(kind: str, value: float, run: Run):
    row = {"stage": "adapter/soft", "step": 77, kind: value}
    run.log(row | ({"epoch": 1} if kind == "validation_loss" else {}))
    (line,) = others(run)
    what = "validation" if kind == "validation_loss" else "training"
    assert line.startswith(f"1 {what} losses of the stage adapter/soft are not finite, the first at step 77")


def test_a_run_that_is_not_finished(run: Run):
    state = read_json(run.folder / "run.json")
    del state["stages"]["adapter/soft"]
    write_json(run.folder / "run.json", state)
    (line,) = others(run)
    assert line.startswith("The run is not finished: adapter/soft not trained; `probekit train --resume")


def test_a_run_that_only_probes_is_finished(run: Run):
    state = read_json(run.folder / "run.json")
    state["stages"] = {name: state["stages"][name] for name in ("lm", "corpus")}
    write_json(run.folder / "run.json", state)
    (run.folder / "evaluation.json").unlink()
    prepared = Run(run.folder, run.config.override({"lm.name": "gpt2"}))
    write_probes(prepared, sound_probes())
    assert not any("not finished" in line for line in checks(prepared))
    (words,) = commands(prepared)
    begin = "probekit probe --model gpt2 --config copy/config.yaml --out copy-again"
    assert " ".join(words).startswith(begin)


def test_settings_that_were_replaced(run: Run):
    write_evaluation(run, stride=12)
    write_probes(run, sound_probes(), **{"probe.positions": [1, 2], "probe.layers": [0]})
    assert others(run) == [
        "Evaluated with other settings than the run's: evaluation.stride 12",
        "Probed with other settings than the run's: probe.layers 0, probe.positions 1 2",
    ]


def test_what_was_trained_after_the_evaluation(run: Run):
    times = (run.folder / "evaluation.json").stat().st_mtime
    seconds = read_json(run.folder / "run.json")["stages"]["adapter/soft"]["seconds"]
    now = times + max(1.0, seconds) + 5
    os.utime(run.folder / "adapters" / "soft.safetensors", (now, now))
    (line,) = others(run)  # the probes read none of it
    assert line.startswith("evaluation.json is older than adapter/soft")
    assert line.endswith("run `probekit evaluate copy` again")
    write_probes(run, sound_probes().assign(variant=lambda t: t.variant.replace("random", "soft")))
    os.utime(run.folder / "probes" / "results.parquet", (times, times))
    assert [line.split(",")[0] for line in others(run)] == [
        "evaluation.json is older than adapter/soft",
        "probes/results.parquet is older than adapter/soft",
    ]


def test_what_was_trained_after_other_results(causal: Run):
    facts = read_json(causal.folder / "run.json")["stages"]
    for name in ("evaluation.json", "probes/results.parquet"):  # these are not asked about here
        (causal.folder / name).unlink()
    now = causal.probes_file("lm").stat().st_mtime + max(1.0, facts["adapter/soft"]["seconds"]) + 5
    os.utime(causal.folder / "adapters" / "soft.safetensors", (now, now))
    (line,) = [line for line in checks(causal) if "older" in line]
    assert line.startswith("interventions/soft/results.parquet is older than adapter/soft")
    assert line.endswith("run `probekit intervene copy --intervene.variant soft` again")
    now += facts["lm"]["seconds"]
    for path in (causal.folder / "lm").iterdir():
        os.utime(path, (now, now))
    assert sorted(line.partition(", and out of date")[0] for line in checks(causal) if "older" in line) == [
        "checkpoints/lm/probes.parquet is older than lm",
        "continuation/results.parquet is older than lm",
        "interventions/none/results.parquet is older than lm",
        "interventions/soft/results.parquet is older than lm, adapter/soft",
        "subnetworks/none/results.parquet is older than lm",
    ]


def test_results_of_checkpoints_are_no_later_training(causal: Run):
    now = causal.probes_file("lm").stat().st_mtime + 10_000
    for path in (causal.folder / "checkpoints").rglob("*.json"):
        os.utime(path, (now, now))
    assert others(causal) == []


def test_checkpoints_that_were_kept_later(causal: Run):
    table = made.over_training()
    made.write_over_training(causal, table[table.step != 7])
    (line,) = others(causal)
    assert line.startswith("checkpoints/lm/probes.parquet lacks checkpoints kept later, of steps 7;")


def test_copies_and_what_was_taken_over_are_no_later_training(run: Run):
    state = read_json(run.folder / "run.json")
    state["stages"]["adapter/soft"]["seconds"] = 100.0
    state["stages"]["adapter/joint"]["taken_from"] = "../other"
    write_json(run.folder / "run.json", state)
    now = (run.folder / "evaluation.json").stat().st_mtime
    for name, after in {"soft": 60, "joint": 10_000}.items():  # a copy took a minute
        os.utime(run.folder / "adapters" / f"{name}.safetensors", (now + after, now + after))
    assert others(run) == []


def test_what_was_trained_and_never_evaluated(run: Run):
    found = read_json(run.folder / "evaluation.json")
    found["perplexity"] = [row for row in found["perplexity"] if row["variant"] != "soft"]
    write_json(run.folder / "evaluation.json", found)
    assert others(run) == ["evaluation.json lacks what was trained later: soft"]


def test_other_versions(run: Run):
    origin = read_json(run.folder / "provenance.json")
    now = origin["versions"]["numpy"]
    origin["versions"]["numpy"] = "1.0.0"
    write_json(run.folder / "provenance.json", origin)
    (line,) = others(run)
    assert f"numpy 1.0.0 (now {now})" in line
    assert "torch" not in line
