"""A run with the probes that interventions need."""

import shutil
from pathlib import Path

import pytest

from probekit.probing.probe import probe
from probekit.run import Run

FEW_PROBES = {
    "probe.l2": [0.1],
    "probe.max_iterations": 30,
    "probe.control": False,
    "probe.code_length": False,
    "probe.distances": [1, 2, 3],
    "evaluation.resamples": 100,
}


@pytest.fixture(scope="session")
def probed_run(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny run with probes of the base LM and of a conditioned variant; tests must not write into it."""
    folder = tmp_path_factory.mktemp("interventions") / "run"
    shutil.copytree(tiny_run.folder, folder)
    run = Run.open(folder)
    probe(run, FEW_PROBES | {"probe.variants": ["none", "soft"]}, quiet=True)
    return run


@pytest.fixture
def run_copy(probed_run: Run, tmp_path: Path) -> Run:
    """A copy of the probed run that a test may write into."""
    shutil.copytree(probed_run.folder, tmp_path / "run")
    return Run.open(tmp_path / "run")
