"""The same grid at every checkpoint: what stands there equals a probe of that checkpoint alone."""

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from probekit.cli import main
from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.models.mixing import VARIANTS
from probekit.probing import over_training
from probekit.probing.over_training import probe_checkpoints
from probekit.probing.probe import probe
from probekit.run.run import Run
from probekit.training.train import train

FAST = {
    "probe.layers": [0, 2],
    "probe.positions": [1, 2],
    "probe.l2": [0.1],
    "probe.code_length": False,
    "probe.control": False,
    "evaluation.resamples": 100,
}


@pytest.fixture(scope="module")
def run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    kept = {"training.lm.checkpoints": 3, "training.adapter.checkpoints": 2, "mixing.variants": ["soft"]}
    return train(tiny_config.override(kept), tmp_path_factory.mktemp("kept") / "run", quiet=True)


@pytest.fixture(scope="module")
def results(run: Run) -> over_training.TrainingProbes:
    return probe_checkpoints(run, FAST, quiet=True)


def test_every_step_is_a_probe_of_its_checkpoint(run: Run, results: over_training.TrainingProbes):
    steps = [*run.checkpoints("lm")]
    assert sorted(results.table.step.unique()) == steps
    assert results.stage == "lm"
    assert set(results.table[results.table.reader == "probe"].variant) == {"none"}
    alone = probe(
        Run.open(run.checkpoints("lm")[steps[-1]]), FAST | {"probe.variants": ["none"]}, quiet=True
    ).table
    own = results.table[results.table.step == steps[-1]].drop(columns="step").reset_index(drop=True)
    pd.testing.assert_frame_equal(own, alone)
    pd.testing.assert_frame_equal(run.probes_over_training("lm"), results.table)


def test_examples_are_the_same_at_every_step(results: over_training.TrainingProbes):
    table = results.table
    same = table[table.reader.isin(["prior", "bigram"])].drop(columns="step")
    assert len(same.drop_duplicates()) == len(same) / table.step.nunique()
    assert len(set(table.groupby("step").examples.max())) == 1


def test_what_is_probed_is_not_probed_again(run: Run, results: over_training.TrainingProbes, monkeypatch):
    monkeypatch.setattr(over_training, "probe", None)
    again = probe_checkpoints(run, FAST, quiet=True)
    pd.testing.assert_frame_equal(again.table, results.table)
    monkeypatch.undo()
    asked = []
    monkeypatch.setattr(
        over_training, "probe", lambda other, **_: asked.append(other.folder) or probe(other, quiet=True)
    )
    probe_checkpoints(run, FAST | {"probe.positions": [1]}, quiet=True)
    assert asked == [*run.checkpoints("lm").values()]


def test_a_variant_is_read_at_its_own_steps(run: Run):
    found = probe_checkpoints(run, FAST, "adapter/soft", quiet=True)
    probes = found.table[found.table.reader == "probe"]
    assert set(probes.variant) == {"soft"}
    first, last = (probes[probes.step == step].accuracy.to_numpy() for step in (0, probes.step.max()))
    assert first.shape == last.shape
    assert VARIANTS["soft"].evaluation.needs_scores
    assert probes[probes.layer == 2].injected.any()


def test_the_command_prints_every_step_and_draws(run: Run, capsys: pytest.CaptureFixture[str]):
    words = [word for name, value in FAST.items() for word in (f"--{name}", *_words(value))]
    assert main(["probe", str(run.folder), "--checkpoints", "--quiet", *words]) == 0
    printed = capsys.readouterr().out
    for step in run.checkpoints("lm"):
        assert re.search(rf"(?<![\d,]){step:,} +│", printed)
    assert (run.folder / "checkpoints" / "lm" / "probes.png").stat().st_size > 10_000


def _words(value: object) -> list[str]:
    return [str(part).lower() for part in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--checkpoints", "--stage", "adapter/oracle"],
            "--stage is 'adapter/oracle', of which no checkpoints",
        ),
        (["--stage", "lm"], "--stage: goes with --checkpoints"),
        (["--checkpoints", "--store"], "--store: does not go with --checkpoints"),
    ],
)
def test_bad_input(run: Run, words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        raise SystemExit(main(["probe", str(run.folder), *words]))
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_a_run_without_checkpoints_says_how_to_get_them(tiny_run: Run, tmp_path: Path):
    copy = shutil.copytree(tiny_run.folder, tmp_path / "run")
    with pytest.raises(ProbekitError, match=r"keeps no checkpoints; .*--training.lm.checkpoints 10"):
        probe_checkpoints(copy, quiet=True)
    with pytest.raises(ProbekitError, match=r"run `probekit probe .* --checkpoints`"):
        Run.open(copy).probes_over_training()
