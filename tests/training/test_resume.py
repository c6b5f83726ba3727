"""Training that was stopped within a stage, by whatever, and runs as they were after a step."""

from pathlib import Path

import pytest
import torch

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.io import read_json
from probekit.models.language_model import new_model
from probekit.run.run import Run
from probekit.training.train import train

VARIANTS = ["fixed", "mixed", "gumbel"]
"""One that draws nothing, and two that draw from a generator of their own and from the global one."""


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
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
    """Trained without a stop, and without a state on the way."""
    rare = config.override({"training.save_minutes": 1e6})
    return train(rare, tmp_path_factory.mktemp("whole") / "run", quiet=True)


def made(folder: Path) -> dict[str, bytes]:
    """What training made, but for what tells of time, and of how often states were kept."""
    told = ("run.json", "provenance.json", "config.yaml")
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in told)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("stage", ["lm", "planner", "adapter/mixed", "adapter/gumbel"])
def test_every_stage_goes_on_to_the_same_bits(
    config: Config, whole: Run, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step, folder, ran = torch.optim.AdamW.step, tmp_path / "run", []
    rows = whole.metrics()
    last = int(rows[rows.stage == stage].step.max())
    monkeypatch.setattr("probekit.training.trainer.write_tensors", _killed_behind(stage, last // 2))
    with pytest.raises(Killed):
        train(config, folder, quiet=True)
    monkeypatch.undo()
    assert (folder / "checkpoints" / stage / "latest.safetensors").exists()

    def counted(self: torch.optim.AdamW, *arguments: object, **named: object) -> object:
        ran.append(1)
        return step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    train(None, folder, existing="resume", quiet=True)
    assert made(folder) == made(whole.folder)
    later = [name for name in read_json(folder / "run.json")["stages"] if name != "corpus"]
    later = later[later.index(stage) + 1 :]
    steps = {name: int(rows[rows.stage == name].step.max()) for name in later}
    assert len(ran) == last - last // 2 + sum(steps.values())


def _killed_behind(stage: str, step: int) -> object:
    from probekit.training import trainer as state

    write = state.write_tensors

    def killing(path: Path, tensors: object, metadata: dict[str, str]) -> None:
        write(path, tensors, metadata)
        if str(path.parent).endswith(f"checkpoints/{stage}") and f'"step": {step},' in metadata["state"]:
            raise Killed

    return killing


def test_a_state_of_other_settings_is_begun_anew(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    monkeypatch.setattr("probekit.training.trainer.write_tensors", _killed_behind("planner", 2))
    with pytest.raises(Killed):
        train(config, folder, quiet=True)
    monkeypatch.undo()
    changed = config.override({"training.planner.learning_rate": 1e-4})
    resumed = train(changed, folder, existing="resume", quiet=True)
    anew = train(changed, tmp_path / "anew", quiet=True)
    assert made(folder) == made(anew.folder)
    assert resumed.metrics().step.min() == 1


# Checkpoints


def test_checkpoints_are_runs_as_they_were(whole: Run, config: Config):
    kept = whole.checkpoints("lm")
    rows = whole.metrics()
    assert [*kept] == [0, 1, rows[rows.stage == "lm"].step.max()]
    first, last = (Run.open(kept[step]) for step in (min(kept), max(kept)))
    assert set(read_json(first.folder / "run.json")["stages"]) == {"corpus", "lm"}
    untrained = new_model(config.lm, whole.corpus.tokenizer, config.seed)
    for name, value in first.plain_model().state_dict().items():
        assert torch.equal(value, untrained.state_dict()[name]), name
    assert (last.corpus.tokens == whole.corpus.tokens).all()
    with pytest.raises(ProbekitError, match="lacks the stage 'planner'"):
        last.planner()


def test_checkpoints_of_a_variant_have_what_is_trained_with_it(whole: Run):
    kept = whole.checkpoints("adapter/gumbel")
    first = Run.open(kept[0])
    assert first.variants == ["gumbel"]
    for (name, before), after in zip(
        whole.planner().state_dict().items(), first.planner("gumbel").state_dict().values(), strict=True
    ):
        assert torch.equal(before, after), name
    assert first.model("gumbel").adapter is not None
    assert not Run.open(whole.folder).checkpoints("planner")
