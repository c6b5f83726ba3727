"""An LM that is sharded over two processes against the whole one: weights, hooks, losses, probes."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from running import in_two_processes

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.io import read_tensors
from probekit.models.base_lm import LORA_WEIGHTS
from probekit.probing.probe import probe
from probekit.run.run import Run
from probekit.training.train import train

WORK = Path(__file__).with_name("sharded_processes.py")
TUNINGS = ("frozen", "lora", "full")
SETTINGS = {
    "mixing.variants": ["soft"],
    # The last batch of a pass is one row, of which the second process has none.
    "training.adapter.batch_size": 7,
    "training.accumulate": 2,
    "training.base.learning_rate": 1e-3,
    "probe.variants": ["none", "random", "soft"],
    "probe.distances": [1, 2],
    "probe.layers": [0, 2],
    "probe.solvers": ["ridge"],
    "probe.l2": [0.1],
    "probe.code_length": False,
}


def begun(tiny_run: Run, folder: Path, **settings: Any) -> Run:
    """A run that has all but its adapters."""
    run = Run.begin(folder, tiny_run.config.override(SETTINGS | settings))
    for stage in ("corpus", "lm", "planner"):
        run.take_over(stage, tiny_run)
    return run


def adapter_metrics(run: Run) -> pd.DataFrame:
    """What the adapter's stage logged, by step and epoch."""
    metrics = run.metrics()
    return metrics[metrics.stage == "adapter/soft"].set_index(["step", "epoch"])


@pytest.fixture(scope="module")
def whole(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run for each kind of tuning, of one process."""
    folder = tmp_path_factory.mktemp("whole")
    runs = {
        tuning: begun(tiny_run, folder / tuning, **{"training.base.tuning": tuning}) for tuning in TUNINGS
    }
    return {name: train(None, run.folder, existing="resume", quiet=True) for name, run in runs.items()}


@pytest.fixture(scope="module")
def sharded(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The same of two processes that share the LM's weights."""
    folder = tmp_path_factory.mktemp("sharded")
    for tuning in TUNINGS:
        begun(tiny_run, folder / tuning, **{"training.base.tuning": tuning, "lm.sharded": True})
    trained = [folder / tuning for tuning in TUNINGS]
    in_two_processes(WORK, "trained", *trained, "then", "probed", folder / "full")
    return {tuning: Run.open(folder / tuning) for tuning in TUNINGS}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_losses_are_those_of_the_whole_lm(tuning: str, whole: dict[str, Run], sharded: dict[str, Run]):
    first, second = (adapter_metrics(runs[tuning]) for runs in (whole, sharded))
    assert first.index.equals(second.index)
    for column in ("loss", "validation_loss"):
        np.testing.assert_allclose(first[column], second[column], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tuning", "file"), [("lora", LORA_WEIGHTS), ("full", "model.safetensors")])
def test_tuned_weights_are_those_of_the_whole_lm(
    tuning: str, file: str, whole: dict[str, Run], sharded: dict[str, Run], tiny_run: Run
):
    first, second = (read_tensors(runs[tuning].tuned_folder("soft") / file) for runs in (whole, sharded))
    assert first.keys() == second.keys()
    for name, weights in first.items():
        # Adam takes a step of full size also where a gradient is next to nothing.
        np.testing.assert_allclose(weights, second[name], rtol=1e-3, atol=1e-4, err_msg=name)
    tuned = dict(sharded[tuning].plain_model("soft").named_parameters())
    changes = [(tuned[name] - old).abs().max() for name, old in tiny_run.plain_model().named_parameters()]
    assert max(changes) > 1e-3


def test_statistics_of_probes_are_those_of_the_whole_lm(whole: dict[str, Run], sharded: dict[str, Run]):
    shared, alone = sharded["full"].probes(), probe(whole["full"], quiet=True).table
    assert set(alone.variant.dropna()) >= {"none", "random", "soft"}
    key = ["reader", "solver", "variant", "location", "layer", "distance", "horizon"]
    pd.testing.assert_frame_equal(shared[key], alone[key])
    for column in ("accuracy", "cross_entropy", "validation_cross_entropy", "gain", "examples"):
        np.testing.assert_allclose(shared[column], alone[column], rtol=1e-3, atol=1e-3, err_msg=column)


def test_one_that_is_stopped_goes_on(
    tiny_run: Run, tmp_path: Path, whole: dict[str, Run], folders: dict[str, Path]
):
    settings = {"training.base.tuning": "full", "lm.sharded": True, "training.adapter.checkpoints": 2}
    run = begun(tiny_run, tmp_path / "run", **settings)
    # And hooks of every architecture, now that two processes are there.
    in_two_processes(WORK, "stopped", run.folder, "then", "hooks", *folders.values())
    first, second = (adapter_metrics(r) for r in (whole["full"], run))
    np.testing.assert_allclose(first.loss, second.loss, rtol=1e-5, atol=1e-5)
    kept = [Run.open(folder).plain_model("soft") for folder in run.checkpoints("adapter/soft").values()]
    assert len(kept) == 2
    begun_with, ended_with = (dict(model.named_parameters()) for model in kept)
    assert all(begun_with[name].equal(old) for name, old in tiny_run.plain_model().named_parameters())
    assert any(not begun_with[name].equal(new) for name, new in ended_with.items())


def test_one_process_holds_it_whole(tiny_run: Run, tmp_path: Path):
    run = begun(tiny_run, tmp_path / "run", **{"lm.sharded": True})
    assert train(None, run.folder, existing="resume", quiet=True).variants == ["soft"]


def test_a_depth_ensemble_is_refused():
    with pytest.raises(ProbekitError, match=r"^lm.sharded is true, but method is 'depth-ensemble'"):
        Config().override({"lm.sharded": True, "method": "depth-ensemble"})
