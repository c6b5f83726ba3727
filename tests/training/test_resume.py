"""Training that was stopped within a stage, by whatever, and runs as they were after a step."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.io import read_json
from probekit.models.language_model import new_model
from probekit.run.run import Run
from probekit.run.stages import stages_before
from probekit.training import trainer
from probekit.training.train import train

VARIANTS = ["mixed", "gumbel"]
"""They draw from a generator of their own, and from the global one."""


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    """A state is saved after every step."""
    return tiny_config.override(
        {
            "mixing.variants": VARIANTS,
            "training.save_minutes": 0.0,
            "training.lm.checkpoints": 3,
            "training.adapter.checkpoints": 2,
            "planner.dropout": 0.1,
        }
    )


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained without a stop, and without saving a state."""
    rare = config.override({"training.save_minutes": 1e6})
    return train(rare, tmp_path_factory.mktemp("whole") / "run", quiet=True)


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_in(run: Run, stage: str, step: int) -> None:
    """Trains a run until the state after a step of a stage is saved."""
    write = trainer.write_tensors

    def killing(path: Path, tensors: object, metadata: dict[str, str]) -> None:
        write(path, tensors, metadata)
        if str(path.parent).endswith(f"checkpoints/{stage}") and f'"step": {step},' in metadata["state"]:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "write_tensors", killing)
        with pytest.raises(Killed):
            train(None, run.folder, existing="resume", quiet=True)
    assert (run.checkpoints_of(stage) / "latest.safetensors").exists()


@pytest.fixture
def begun(config: Config, whole: Run, tmp_path: Path) -> Callable[..., Run]:
    """A run that has all stages before a given one, and trains no variant but that of the stage."""

    def begin(stage: str, name: str = "run") -> Run:
        variant = stage.removeprefix("adapter/") if stage.startswith("adapter/") else "none"
        run = Run.begin(tmp_path / name, config.override({"mixing.variants": [variant]}))
        for before in stages_before(run.config, stage):
            run.take_over(before, whole)
        return run

    return begin


def rows_of(run: Run, stage: str) -> pd.DataFrame:
    return run.losses_of(stage).reset_index(drop=True)


def files_of(run: Run, stage: str) -> dict[str, bytes]:
    paths = (path for top in run.files_of(stage) for path in [top, *top.rglob("*")] if path.is_file())
    timed = ("run.json", "provenance.json", "config.yaml")  # time, and the variants of the run
    return {str(p.relative_to(run.folder)): p.read_bytes() for p in paths if p.name not in timed}


@pytest.mark.parametrize("stage", ["lm", "planner", "adapter/mixed", "adapter/gumbel"])
def test_every_stage_goes_on_to_the_same_bits(
    whole: Run, begun: Callable[..., Run], stage: str, monkeypatch: pytest.MonkeyPatch
):
    run, last = begun(stage), int(rows_of(whole, stage).step.max())
    killed_in(run, stage, last // 2)
    step, ran = torch.optim.AdamW.step, []

    def counted(self: torch.optim.AdamW, *arguments: object, **named: object) -> object:
        ran.append(1)
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    train(None, run.folder, existing="resume", quiet=True)
    later = int(rows_of(whole, "planner").step.max()) if stage == "lm" else 0
    assert len(ran) == last - last // 2 + later
    for trained in {stage, "planner"}:
        assert files_of(run, trained) == files_of(whole, trained)
        pd.testing.assert_frame_equal(rows_of(run, trained), rows_of(whole, trained))


def test_a_state_of_other_settings_is_begun_anew(begun: Callable[..., Run]):
    run, other = begun("planner"), begun("planner", "other")
    killed_in(run, "planner", 2)
    changed = run.config.override({"training.planner.learning_rate": 1e-4})
    train(changed, run.folder, existing="resume", quiet=True)
    train(changed, other.folder, existing="resume", quiet=True)
    assert files_of(run, "planner") == files_of(other, "planner")
    assert rows_of(run, "planner").step.min() == 1


# Checkpoints


def test_checkpoints_are_runs_as_they_were(whole: Run, config: Config):
    kept = whole.checkpoints("lm")
    assert [*kept] == [0, 1, rows_of(whole, "lm").step.max()]
    first, last = (Run.open(kept[step]) for step in (min(kept), max(kept)))
    assert set(read_json(first.folder / "run.json")["stages"]) == {"corpus", "lm"}
    untrained = new_model(config.lm, whole.corpus.tokenizer, config.seed)
    for name, value in first.plain_model().state_dict().items():
        assert torch.equal(value, untrained.state_dict()[name]), name
    assert (last.corpus.tokens == whole.corpus.tokens).all()
    with pytest.raises(ProbekitError, match="lacks the stage 'planner'"):
        last.planner()


def test_checkpoints_of_a_variant_have_what_is_trained_with_it(whole: Run):
    first = Run.open(whole.checkpoints("adapter/gumbel")[0])
    assert first.variants == ["gumbel"]
    before, after = whole.planner().state_dict(), first.planner("gumbel").state_dict()
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert first.model("gumbel").adapter is not None
    assert not whole.checkpoints("planner")
