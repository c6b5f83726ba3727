"""What many tests share: a tiny planted run, trained, evaluated and probed once a session."""

import gc
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models this small lose more to threads that wait for one another than they win.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from probekit.config import Config
from probekit.probing.probe import probe
from probekit.run.run import Run
from probekit.training.train import train

# A busy machine is no failure.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

LONG = ("test_readme", "test_notebooks", "test_benchmarks", "test_distributed", "test_learned", "test_killed")
"""Files that take longest, and begin first, so that neither process is left with one at the end."""

SHARED_TEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2" / "valid.txt"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """A planted run that trains in seconds: every stage is there, none learns much."""
    return Config.from_preset("demo").override(
        {
            "device": "cpu",
            "corpus.planted.documents": 160,
            "corpus.planted.actions": 8,
            "corpus.planted.vocabulary": 60,
            "corpus.planted.seed": 1,  # with this seed the token before a sentence is always a full stop
            "actions.k": 8,
            "actions.dimensions": 16,
            "lm.layers": 3,
            "lm.width": 32,
            "lm.heads": 2,
            "lm.positions": 48,
            "lm.vocabulary": 560,
            "planner.width": 32,
            "training.window": 48,
            "training.lm.epochs": 1,
            "training.planner.epochs": 2,
            "training.adapter.epochs": 1,
            "evaluation.resamples": 200,
            "probe.positions": [1, 2, 4],
            "mixing.variants": ["fixed", "oracle", "predicted", "soft", "joint"],
        }
    )


@pytest.fixture(scope="session")
def tiny_run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The trained tiny run; tests must not write into it."""
    return train(tiny_config, tmp_path_factory.mktemp("runs") / "tiny", quiet=True)


@pytest.fixture
def copy(tiny_run: Run, tmp_path: Path) -> Path:
    """The folder of a copy of the trained run, which a test may change."""
    return shutil.copytree(tiny_run.folder, tmp_path / "copy")


@pytest.fixture(scope="session")
def quick_probes() -> dict[str, Any]:
    """Settings of probes that are fitted in a second or two."""
    return {
        "probe.variants": ["none", "soft"],
        "probe.l2": [0.1],
        "probe.max_iterations": 50,
        "probe.control": False,
        "probe.code_length": False,
        "evaluation.resamples": 100,
    }


@pytest.fixture(scope="session")
def probed_run(tiny_run: Run, quick_probes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the tiny run with probes of the base LM and of two variants; tests must not write into it."""
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("probed") / "run"))
    own = {"probe.variants": ["none", "soft", "oracle"], "probe.positions": [1, 2, 3]}
    probe(run, quick_probes | own, quiet=True)
    return run


@pytest.fixture
def probed_copy(probed_run: Run, tmp_path: Path) -> Run:
    """A copy of the probed run that a test may write into."""
    return Run.open(shutil.copytree(probed_run.folder, tmp_path / "run"))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the copies of LMs in memory, of those that are loaded from now on."""
    loaded: list[Any] = []
    load = Run.plain_model

    def watched(run: Run, *names: Any) -> Any:
        model = load(run, *names)
        loaded.append(weakref.ref(model.transformer.wte.weight))
        return model

    def count() -> int:
        gc.collect()
        return sum(weights() is not None for weights in loaded)

    monkeypatch.setattr(Run, "plain_model", watched)
    return count


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """Sixty real Wikipedia articles."""
    if not SHARED_TEXT.exists():
        pytest.skip(f"the WikiText-2 validation file is not at {SHARED_TEXT}")
    return SHARED_TEXT
