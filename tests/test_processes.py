"""Two processes against one: the same losses, and the same statistics of probes."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from running import in_two_processes

from probekit.config import Config
from probekit.probing.probe import probe
from probekit.run.run import Run
from probekit.training.train import train

SETTINGS = {
    # What draws random numbers draws others in two processes.
    "planner.dropout": 0.0,
    "mixing.variants": ["fixed", "joint"],
    "probe.distances": [1, 2],
    "probe.layers": [0, 2],
    "probe.solvers": ["softmax", "ridge"],
    "probe.l2": [0.01, 0.1],
    "probe.variants": ["none", "joint"],
}


@pytest.fixture(scope="module")
def one(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny_config.override(SETTINGS), tmp_path_factory.mktemp("one") / "run", quiet=True)


@pytest.fixture(scope="module")
def two(one: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("two")
    (folder / "settings.yaml").write_text(one.config.to_yaml())
    in_two_processes(
        "-m", "probekit", "train", "--config", folder / "settings.yaml", "--out", folder / "run", "--quiet"
    )
    return Run.open(folder / "run")


def test_losses_are_those_of_one_process(one: Run, two: Run):
    first, second = (run.metrics().set_index(["stage", "step"]) for run in (one, two))
    assert first.index.equals(second.index)
    assert len(second) == len(second.reset_index().drop_duplicates(["stage", "step", "epoch"]))
    for column in ("loss", "validation_loss"):
        np.testing.assert_allclose(first[column], second[column], rtol=1e-5, atol=1e-5)


def test_statistics_of_probes_are_those_of_one_process(one: Run, two: Run, tmp_path: Path):
    in_two_processes("-m", "probekit", "probe", one.folder, "--quiet")
    shared = one.probes()
    alone = probe(one, quiet=True).table
    key = ["reader", "solver", "variant", "location", "layer", "distance", "horizon"]
    pd.testing.assert_frame_equal(shared[key], alone[key])
    closed = alone.solver == "ridge"
    for column in ("accuracy", "cross_entropy", "validation_cross_entropy", "gain", "l2"):
        np.testing.assert_allclose(shared[column][closed], alone[column][closed], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(shared.examples, alone.examples)
    np.testing.assert_allclose(shared.cross_entropy, alone.cross_entropy, rtol=1e-3, atol=1e-3)


def test_a_command_that_is_not_shared_is_done_once(one: Run, tmp_path: Path):
    printed = in_two_processes("-m", "probekit", "corpus", one.folder, "--export", tmp_path / "sentences.csv")
    assert printed.count("All sentences") == 1
    assert len(pd.read_csv(tmp_path / "sentences.csv")) == len(one.corpus.actions)
