"""Faults that happen to others: damaged files, full disks, folders that are read only, signals, kills."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import hashes, ran

from probekit.config import Config
from probekit.io import locked, read_json, write_json
from probekit.training.train import train

CELLS = ("--probe.variants", "none", "--probe.layers", "1", "--probe.distances", "1", "2")


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
    assert ran("probe", folder, "--quiet", *CELLS).code == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def stages(folder: Path) -> dict[str, Any]:
    return read_json(folder / "run.json")["stages"]


def same_results(one: Path, other: Path, *names: str) -> None:
    """Of two runs, some files."""
    found, wanted = hashes(one), hashes(other)
    assert {name: found.get(name) for name in names} == {name: wanted[name] for name in names}


# Damaged files


def cautioned(run: Path, name: str) -> bool:
    """Whether the report has a damaged file among its cautions; it leaves out what it cannot read."""
    page = run / "report.md"
    cautions = page.read_text().splitlines() if page.exists() else []
    return any(line.startswith("- ") and f"/{name} is" in line for line in cautions)


@pytest.mark.parametrize("name", READERS)
def test_a_command_names_the_damaged_file_that_it_reads(copy: Path, name: str):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: len(whole) // 2])
    before = hashes(copy)
    command, *words = READERS[name]
    result = ran(command, copy, *words)
    assert result.refused(name, Path(name).name) or cautioned(copy, name), result
    assert {path: hashes(copy).get(path) for path in before} == before


# Disks


def mounted(folder: Path, *words: str) -> None:
    folder.mkdir(exist_ok=True)
    mount = shutil.which("mount")
    command = [mount or "", *words, str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount file systems")


def unmounted(folder: Path) -> None:
    """Mapped files may still be open; the disk goes when they are closed."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    mounted(folder, "-t", "tmpfs", "-o", "size=16m", "tmpfs")
    yield folder
    unmounted(folder)


def fill(disk: Path, leave: int) -> None:
    """Leaves so many bytes on a disk."""
    (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - leave))


@pytest.mark.parametrize("share", [0.02, 0.6, 0.97])
def test_training_on_a_full_disk_goes_on_when_there_is_room(
    disk: Path, finished: Path, small: Config, share: float
):
    (disk / "settings.yaml").write_text(small.to_yaml())
    results = ("evaluation.json", "losses.parquet", "probes")
    trained = [path for path in finished.iterdir() if path.name not in results]
    size = sum(file.stat().st_size for path in trained for file in (path, *path.rglob("*")) if file.is_file())
    fill(disk, int(share * size))
    out = disk / "run"
    result = ran("train", "--config", disk / "settings.yaml", "--out", out, "--quiet")
    assert result.refused("No space left"), result
    begun = (out / "run.json").exists()
    done = stages(out) if begun else {}
    before = {name: digest for name, digest in hashes(out).items() if name.split("/")[0] in done}
    assert not list(disk.rglob(".tmp-*"))
    (disk / "filler").unlink()
    source = ["--resume"] if begun else ["--config", disk / "settings.yaml"]
    assert ran("train", *source, "--out", out, "--quiet").code == 0
    same_results(out, finished, *(hashes(out).keys() - {"run.json", "provenance.json"}))
    assert {name: digest for name, digest in hashes(out).items() if name in before} == before


@pytest.mark.parametrize(
    ("command", "leave"), [("probe", 0), ("probe", 9000), ("evaluate", 0), ("report", 5000)]
)
def test_results_on_a_full_disk_are_the_old_ones(disk: Path, finished: Path, command: str, leave: int):
    run = Path(shutil.copytree(finished, disk / "run"))
    before = hashes(run)
    fill(disk, leave)
    words = {"probe": ["--quiet", *CELLS], "evaluate": ["--quiet"], "report": []}[command]
    result = ran(command, run, *words)
    assert result.refused("No space left"), result
    after = hashes(run)
    assert {name: after.get(name) for name in before} == before
    (disk / "filler").unlink()
    assert ran(command, run, *words).code == 0
    assert not list(run.rglob(".tmp-*"))
    same_results(run, finished, "evaluation.json", "losses.parquet", "probes/results.parquet")


def test_a_folder_that_is_read_only_is_told_before_work_begins(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def worked(*_: object) -> None:
        raise AssertionError("worked for nothing")

    before = hashes(copy)
    mounted(copy, "--bind", str(copy))
    try:
        mounted(copy, "-o", "remount,ro,bind")
        for command in ("evaluate", "probe"):
            with monkeypatch.context() as patch:
                patch.setattr("probekit.run.run.Run.corpus", property(worked))
                result = ran(command, copy, "--quiet")
            assert result.refused(f"{copy} cannot be written to"), result
        result = ran("train", "--resume", "--out", copy, "--quiet")
        assert result.refused(f"{copy} cannot be written to"), result
        for words in (("report", copy), ("lens", copy, *LENS)):
            assert ran(*words).refused("Read-only file system"), words
        assert ran("report", copy, "-o", tmp_path / "report.md").code == 0
        assert ran("lens", copy, *LENS, "-o", tmp_path / "lens.html").code == 0
    finally:
        unmounted(copy)
    assert hashes(copy) == before


# Signals and kills


def signalled(monkeypatch: pytest.MonkeyPatch, place: str, number: signal.Signals, call: int) -> None:
    """Has a signal come at a certain call of a function."""
    module, _, name = place.rpartition(".")
    loaded = __import__(module, fromlist=[name])
    work, calls = getattr(loaded, name), []

    def hit(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return work(*arguments, **named)

    monkeypatch.setattr(loaded, name, hit)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", ["evaluate", "probe", "train"])
def test_a_command_that_is_stopped_can_be_given_again(
    copy: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    number: signal.Signals,
    code: int,
):
    words: list[object] = {
        "evaluate": ["evaluate", copy, "--quiet"],
        "probe": ["probe", copy, "--quiet", *CELLS],
        "train": ["train", "--resume", "--out", copy, "--quiet"],
    }[command]
    place = {
        "evaluate": "probekit.evaluation.perplexity.collate",
        "probe": "probekit.probing.probe.fit",
        "train": "torch.nn.utils.clip_grad_norm_",
    }[command]
    if command == "train":
        record = read_json(copy / "run.json")
        kept = {name: facts for name, facts in record["stages"].items() if name in ("corpus", "lm")}
        write_json(copy / "run.json", record | {"stages": kept})
    before = hashes(copy)
    with monkeypatch.context() as patch:
        # A shell has what it runs in the background ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signalled(patch, place, number, call=2)
        result = ran(*words)
    assert result.code == code
    assert result.told.startswith(f"probekit: {'terminated' if code == 143 else 'interrupted'}; ")
    assert result.told.count("\n") == 1
    if command != "train":
        after = hashes(copy)
        assert {name: after.get(name) for name in before} == before
    assert not list(copy.rglob(".tmp-*"))
    assert ran(*words).code == 0
    same_results(copy, finished, "evaluation.json", "probes/results.parquet", "adapters/soft.safetensors")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_process_that_was_killed_leaves_no_lock(copy: Path):
    ready, told = os.pipe()
    if not (child := os.fork()):
        with locked(copy):
            os.write(told, b"x")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(ready, 1) == b"x"
        assert ran("train", "--resume", "--out", copy, "--quiet").refused("another process is at work")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)
    assert ran("train", "--resume", "--out", copy, "--quiet").code == 0
