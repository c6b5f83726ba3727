"""An interrupted probing continues to the same results."""

import contextlib
import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import save_file

from probekit.io import read_tensors
from probekit.probing import probe as module
from probekit.probing.probe import probe
from probekit.run.run import Run

FEW = {
    "probe.layers": [0, 2],
    "probe.positions": [1, 2],
    "probe.l2": [0.1],
    "probe.solvers": ["softmax", "ridge"],
    "probe.variants": ["none", "soft", "random"],
    "probe.max_examples": 400,
    "evaluation.resamples": 100,
}


@pytest.fixture
def run(tiny_run: Run, tmp_path: Path) -> Run:
    return Run.open(shutil.copytree(tiny_run.folder, tmp_path / "run"))


def interrupted(run: Run, after: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Probes until so many parts are done; the parts that were probed."""
    done: list[str] = []
    fit_and_score = module._VariantProbes.fit_and_score

    def stopping(self: module._VariantProbes, solvers: list[str]) -> object:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(f"{self._name}, {' '.join(solvers)}")
        return fit_and_score(self, solvers)

    monkeypatch.setattr(module._VariantProbes, "fit_and_score", stopping)
    with contextlib.suppress(KeyboardInterrupt):
        probe(run, FEW, quiet=True)
    monkeypatch.undo()
    return done


def test_it_continues_to_the_same_results(run: Run, monkeypatch: pytest.MonkeyPatch):
    def weights() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (run.folder / "probes").glob("*.safetensors")}

    whole, parts = probe(run, FEW, quiet=True).table, run.folder / "checkpoints" / "probe"
    kept = weights()
    assert not parts.exists()
    first = ["token embedding, softmax", "none, ridge", "none, softmax", "soft, ridge"]
    assert interrupted(run, 4, monkeypatch) == first
    assert len([*parts.iterdir()]) == 4
    assert interrupted(run, 99, monkeypatch) == ["soft, softmax", "random, ridge", "random, softmax"]
    pd.testing.assert_frame_equal(run.probes(), whole)
    assert weights() == kept
    assert not parts.exists()


@pytest.mark.parametrize("changed", ["settings", "weights"])
def test_parts_of_other_settings_or_weights_are_not_used(run: Run, changed: str, monkeypatch):
    interrupted(run, 2, monkeypatch)
    settings = dict(FEW)
    if changed == "settings":
        settings["probe.l2"] = [0.2]
    else:
        name = "lm/model.safetensors"
        tensors = {key: value * 1.01 for key, value in read_tensors(run.folder / name).items()}
        save_file(tensors, run.folder / name, {"format": "pt"})
    run = Run.open(run.folder)
    found = probe(run, settings, quiet=True).table
    pd.testing.assert_frame_equal(found, probe(run, settings, quiet=True).table)


def test_what_is_finished_is_stored_too(run: Run, monkeypatch: pytest.MonkeyPatch):
    interrupted(run, 3, monkeypatch)
    probe(run, FEW, store=True, quiet=True)
    stores = {path.name for path in (run.folder / "activations").iterdir()}
    assert stores == {"none-seed0", "soft-seed0", "random-seed0"}
