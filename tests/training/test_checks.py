"""What does not fit together is refused before long work."""

from pathlib import Path

import pytest

from probekit.errors import ProbekitError
from probekit.run.run import Run
from probekit.training import train as checks
from probekit.training.train import train


def test_a_missing_encoder_is_told_before_the_planner_is_trained(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"mixing.variants": ["soft", "joint"], "training.joint.encoder_learning_rate": 1e-5}
    run = Run.begin(tmp_path / "run", tiny_run.config.override(settings))
    for stage in ("corpus", "lm"):
        run.take_over(stage, tiny_run)

    def missing(folder: Path) -> None:
        raise ProbekitError(f"{folder} needs a library")

    monkeypatch.setattr(checks, "check_encoder", missing)
    with pytest.raises(ProbekitError, match=r"corpus/encoder needs a library"):
        train(None, run.folder, existing="resume", quiet=True)
    assert not run.finished("planner")
    without = run.config.override({"mixing.variants": ["soft"]})
    assert train(without, run.folder, existing="resume", quiet=True).variants == ["soft"]
