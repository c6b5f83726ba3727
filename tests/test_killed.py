"""Commands that are killed at random moments and typed again: the same results as if nothing had happened.

PROBEKIT_KILLS says how many moments of each command are tried.
"""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from running import started

from probekit.cli import main
from probekit.config import Config
from probekit.io import read_json
from probekit.run.run import Run
from probekit.sweeps import Sweep
from probekit.training.train import train

KILLS = int(os.environ.get("PROBEKIT_KILLS", "1"))
FAST = (
    *("--probe.variants", "none", "gumbel", "--probe.layers", "0", "2", "--probe.positions", "1", "2"),
    *("--probe.l2", "0.1", "--evaluation.resamples", "100"),
)

TIMED = ("run.json", "provenance.json", "config.yaml", "manifest.json")
"""Files that tell when something was done, and how long it took."""


def made(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in TIMED)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def killed_and_done(
    command: Callable[[], tuple[str | Path, ...]],
    begun: Callable[[], bool],
    seconds: float,
    draw: random.Random,
) -> None:
    """Kills a command twice at a random moment after its beginning, then lets it end."""
    for _ in range(2):
        process = started(*command(), "--quiet")
        while not begun() and process.is_alive():
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, seconds))
        process.kill()
        process.join()
    assert main([*map(str, command()), "--quiet"]) == 0


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    # States so often that a kill in one is likely.
    return tiny_config.override(
        {
            "training.save_minutes": 0.0,
            "training.lm.checkpoints": 3,
            "mixing.variants": ["fixed", "mixed", "gumbel"],
            "evaluation.resamples": 100,
        }
    )


@pytest.fixture(scope="module")
def settings(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "settings.yaml"
    path.write_text(config.to_yaml())
    return path


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config, tmp_path_factory.mktemp("whole") / "run", quiet=True)


@pytest.mark.parametrize("seed", range(KILLS))
def test_train(whole: Run, settings: Path, tmp_path: Path, seed: int):
    folder = tmp_path / "run"

    def command() -> tuple[str | Path, ...]:
        if (folder / "run.json").exists():
            return "train", "--resume", "--out", folder
        return "train", "--config", settings, "--resume", "--out", folder

    taken = sum(stage["seconds"] for stage in read_json(whole.folder / "run.json")["stages"].values())
    killed_and_done(command, folder.exists, taken, random.Random(seed))
    assert made(folder) == made(whole.folder)


@pytest.fixture(scope="module")
def probed(whole: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, float]:
    """Results of an undisturbed probing, and how long it took."""
    folder = shutil.copytree(whole.folder, tmp_path_factory.mktemp("probed") / "run")
    begun = time.monotonic()
    assert main(["probe", str(folder), "--store", *FAST, "--quiet"]) == 0
    return Run.open(folder).probes(), time.monotonic() - begun


@pytest.mark.parametrize("seed", range(KILLS))
def test_probe(whole: Run, probed: tuple[pd.DataFrame, float], tmp_path: Path, seed: int):
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    killed_and_done(
        lambda: ("probe", folder, "--store", *FAST),
        (folder / "activations").exists,
        probed[1] / 2,
        random.Random(seed),
    )
    pd.testing.assert_frame_equal(Run.open(folder).probes(), probed[0])
    assert not (folder / "checkpoints" / "probe").exists()


def sweep_command(settings: Path, out: Path) -> tuple[str | Path, ...]:
    values = ("mixing.fraction", "--values", "0", "1", "--seeds", "1")
    return "sweep", *values, "--config", settings, "--mixing.variants", "mixed", "--out", out


@pytest.fixture(scope="module")
def swept(settings: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, float]:
    folder = tmp_path_factory.mktemp("swept") / "sweep"
    begun = time.monotonic()
    assert main([*map(str, sweep_command(settings, folder)), "--quiet"]) == 0
    return Sweep.open(folder).table(), time.monotonic() - begun


@pytest.mark.parametrize("seed", range(KILLS))
def test_sweep(settings: Path, swept: tuple[pd.DataFrame, float], tmp_path: Path, seed: int):
    folder = tmp_path / "sweep"
    killed_and_done(lambda: sweep_command(settings, folder), folder.exists, swept[1] / 2, random.Random(seed))
    pd.testing.assert_frame_equal(Sweep.open(folder).table(), swept[0])
