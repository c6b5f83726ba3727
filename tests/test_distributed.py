"""Devices and the arithmetic on them; two processes against one: the same losses and statistics of probes."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from running import in_two_processes

from probekit.config import Config
from probekit.distributed import autocast, compute_device
from probekit.errors import ProbekitError
from probekit.probing.probe import probe
from probekit.run.run import Run
from probekit.training.train import train

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")


def arithmetic(device: torch.device, precision: str) -> torch.dtype:
    with autocast(device, precision):
        return (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype


@pytest.mark.parametrize("available", [True, False])
def test_auto_is_the_gpu_where_there_is_one(available: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert compute_device("auto").type == ("cuda" if available else "cpu")


@pytest.mark.parametrize("name", ["", "nonsense", "cuda:99", "cpu:x", "meta"])
def test_what_cannot_compute_here_is_refused_in_one_line(name: str):
    with pytest.raises(ProbekitError) as raised:
        compute_device(name)
    message = str(raised.value)
    assert message.startswith(f"device is {name!r}")
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("auto", torch.float32), ("float32", torch.float32), ("bfloat16", torch.bfloat16)],
)
def test_arithmetic_on_a_cpu(precision: str, expected: torch.dtype):
    device = torch.device("cpu")
    assert arithmetic(device, precision) == expected
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_auto_is_bfloat16_on_a_gpu_that_has_it(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bfloat16)
    chosen = {}
    monkeypatch.setattr(torch, "autocast", lambda kind, **given: chosen.update(kind=kind, **given))
    autocast(torch.device("cuda"), "auto")
    expected = {"kind": "cuda", "dtype": torch.bfloat16, "enabled": has_bfloat16}
    assert expected.items() <= chosen.items()


@pytest.mark.gpu
@needs_cuda
def test_on_a_gpu():
    device = compute_device("auto")
    assert device.type == "cuda"
    assert compute_device("cuda:0").index == 0
    assert arithmetic(device, "float32") == torch.float32
    assert arithmetic(device, "bfloat16") == torch.bfloat16
    expected = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    assert arithmetic(device, "auto") == expected


SETTINGS = {
    # What draws random numbers draws others in two processes.
    "planner.dropout": 0.0,
    "mixing.variants": ["fixed", "joint"],
    "probe.positions": [1, 2],
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


def test_sums_of_closed_form_probes_are_those_of_one_process(one: Run, tmp_path: Path):
    """With a control task, whose labels alone differ: mean and scatter are added up once."""
    folder = shutil.copytree(one.folder, tmp_path / "run")
    settings = {"probe.solvers": ["ridge", "lda"], "probe.variants": ["none"], "probe.layers": [2]}
    words = [word for name, value in settings.items() for word in (f"--{name}", *map(str, value))]
    in_two_processes("-m", "probekit", "probe", folder, "--quiet", *words)
    shared, alone = Run.open(folder).probes(), probe(Run.open(folder), settings, quiet=True).table
    for column in ("accuracy", "cross_entropy", "validation_cross_entropy", "selectivity"):
        np.testing.assert_allclose(shared[column], alone[column], rtol=1e-4, atol=1e-4)


GRID = """
import sys
import numpy as np
import probekit
from probekit import distributed
X = np.random.default_rng(0).normal(size=(2, 1300, 4))
for name, labels in (("classes", X[0, :, 0] > 0), ("numbers", X[1, :, 1] + 0.5)):
    solvers = ["softmax", "ridge"] if name == "classes" else ["ridge"]
    table = probekit.fit_grid(X, labels, solvers=solvers, l2=[0.01, 0.1], resamples=100).table
    if distributed.is_first():
        table.to_json(f"{sys.argv[1]}-{name}.json")
distributed.leave()
"""


def test_a_grid_of_arrays_is_that_of_one_process(tmp_path: Path):
    (tmp_path / "grid.py").write_text(GRID)
    in_two_processes(tmp_path / "grid.py", tmp_path / "two")
    subprocess.run([sys.executable, tmp_path / "grid.py", tmp_path / "one"], check=True)
    for name, metrics in (("classes", ["accuracy", "cross_entropy"]), ("numbers", ["r2", "squared_error"])):
        one, two = (pd.read_json(tmp_path / f"{count}-{name}.json") for count in ("one", "two"))
        np.testing.assert_array_equal(one.examples, two.examples)
        for metric in metrics:
            np.testing.assert_allclose(one[metric], two[metric], rtol=1e-3, atol=1e-4)


def test_a_command_that_is_not_shared_is_done_once(one: Run, tmp_path: Path):
    printed = in_two_processes("-m", "probekit", "corpus", one.folder, "--export", tmp_path / "sentences.csv")
    assert printed.count("All sentences") == 1
    assert len(pd.read_csv(tmp_path / "sentences.csv")) == len(one.corpus.actions)
