"""Faults that happen to others: damaged files, full disks, folders that are read only, signals."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import TWO_CELLS, hashes, ran

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.generation.evaluate import evaluate_generation
from probekit.io import read_json, write_json
from probekit.training.train import train

LENS = ("--text", "A word or two.", "--quiet")
GENERATE = ("generate", "--prompt", "A", "--tokens", "1", "--quiet", "--variant")
READERS = {
    "lm/model.safetensors": (*GENERATE, "none"),
    "planner/model.safetensors": (*GENERATE, "soft"),
    "adapters/soft.safetensors": (*GENERATE, "soft"),
    "provenance.json": ("report",),
    "evaluation.json": ("report",),
    "probes/results.parquet": ("report",),
    "probes/settings.json": ("report",),
    "probes/none-seed0.safetensors": ("lens", *LENS),
}
"""A command that reads a file."""


@pytest.fixture(scope="module")
def small(tiny_config: Config) -> Config:
    """Settings of a run that is trained in about a second."""
    return tiny_config.override({"corpus.planted.documents": 60, "mixing.variants": ["fixed", "soft"]})


@pytest.fixture(scope="module")
def finished(small: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, trained, evaluated and probed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(small, folder, quiet=True)
    assert ran("evaluate", folder, "--quiet").code == 0
    assert ran("probe", folder, "--quiet", *TWO_CELLS).code == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def same_results(one: Path, other: Path, *names: str) -> None:
    """Of two runs, some files."""
    found, wanted = hashes(one), hashes(other)
    assert {name: found.get(name) for name in names} == {name: wanted[name] for name in names}


def cautioned(run: Path, name: str) -> bool:
    """Whether the report has a damaged file among its checks; it leaves out what it cannot read."""
    page = run / "report.md"
    lines = page.read_text().splitlines() if page.exists() else []
    return any(line.startswith("- ") and f"/{name} is" in line for line in lines)


@pytest.mark.parametrize("name", READERS)
def test_a_command_names_the_damaged_file_that_it_reads(copy: Path, name: str):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    before = hashes(copy)
    command, *words = READERS[name]
    result = ran(command, copy, *words)
    assert result.refused(name, Path(name).name) or cautioned(copy, name), result
    assert {path: hashes(copy).get(path) for path in before} == before


# Full disks


def on_call(monkeypatch: pytest.MonkeyPatch, function: str, call: int, act: Callable[[], None]) -> None:
    """Has something happen at a certain call of a function."""
    module, _, name = function.rpartition(".")
    loaded = __import__(module, fromlist=[name])
    work, calls = getattr(loaded, name), []

    def hit(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            act()
        return work(*arguments, **named)

    monkeypatch.setattr(loaded, name, hit)


def full() -> None:
    raise OSError(28, "No space left on device", "somewhere")


@pytest.mark.parametrize("write", [4, 40, 60])
def test_training_on_a_full_disk_continues_when_there_is_room(
    finished: Path, small: Config, tmp_path: Path, write: int, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "settings.yaml").write_text(small.to_yaml())
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_call(patch, "os.fsync", write, full)
        result = ran("train", "--config", tmp_path / "settings.yaml", "--out", out, "--quiet")
    assert result.refused("No space left"), result
    assert not list(tmp_path.rglob(".tmp-*"))
    source = ["--resume"] if (out / "run.json").exists() else ["--config", tmp_path / "settings.yaml"]
    assert ran("train", *source, "--out", out, "--quiet").code == 0
    same_results(out, finished, *(hashes(out).keys() - {"run.json", "provenance.json"}))


@pytest.mark.parametrize("command", ["probe", "evaluate", "report"])
def test_results_on_a_full_disk_are_the_old_ones(
    copy: Path, finished: Path, command: str, monkeypatch: pytest.MonkeyPatch
):
    words = {"probe": ["--quiet", *TWO_CELLS], "evaluate": ["--quiet"], "report": []}[command]
    before = hashes(copy)
    with monkeypatch.context() as patch:
        on_call(patch, "os.fsync", 1, full)
        result = ran(command, copy, *words)
    assert result.refused("No space left"), result
    after = hashes(copy)
    assert {name: after.get(name) for name in before} == before
    assert ran(command, copy, *words).code == 0
    assert not list(copy.rglob(".tmp-*"))
    same_results(copy, finished, "evaluation.json", "losses.parquet", "probes/results.parquet")


def test_a_folder_that_is_read_only_is_refused_before_work_begins(
    copy: Path, monkeypatch: pytest.MonkeyPatch
):
    def worked(*_: object) -> None:
        raise AssertionError("worked for nothing")

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr("probekit.run.run.Run.corpus", property(worked))
    commands = [(name, copy) for name in ("evaluate", "probe", "intervene", "subnetwork", "continuation")]
    for words in (*commands, ("train", "--resume", "--out", copy)):
        assert ran(*words, "--quiet").refused(f"{copy} cannot be written to"), words
    with pytest.raises(ProbekitError, match="cannot be written to"):
        evaluate_generation(copy, quiet=True)


# Signals


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("evaluate", "probekit.evaluation.perplexity.collate"),
        ("probe", "probekit.probing.probe.fit"),
        ("train", "torch.nn.utils.clip_grad_norm_"),
    ],
)
def test_a_command_that_is_stopped_can_be_given_again(
    copy: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, command: str, function: str
):
    words: list[object] = {
        "evaluate": ["evaluate", copy, "--quiet"],
        "probe": ["probe", copy, "--quiet", *TWO_CELLS],
        "train": ["train", "--resume", "--out", copy, "--quiet"],
    }[command]
    if command == "train":
        record = read_json(copy / "run.json")
        kept = {name: facts for name, facts in record["stages"].items() if name in ("corpus", "lm")}
        write_json(copy / "run.json", record | {"stages": kept})
    before = hashes(copy)
    with monkeypatch.context() as patch:
        on_call(patch, function, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = ran(*words)
    assert result.code == 143
    assert result.errors.startswith("probekit: terminated; ")
    assert result.errors.count("\n") == 1
    if command != "train":
        after = hashes(copy)
        assert {name: after.get(name) for name in before} == before
    assert not list(copy.rglob(".tmp-*"))
    assert ran(*words).code == 0
    same_results(copy, finished, "evaluation.json", "probes/results.parquet", "adapters/soft.safetensors")
