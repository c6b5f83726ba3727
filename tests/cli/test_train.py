"""`probekit train` as it is typed: what it prints, what it refuses, how it goes on."""

from pathlib import Path

import pytest
from running import Capture, printed, refused

from probekit.cli import main
from probekit.run.run import Run

STAGES = ["corpus", "lm", "planner", "adapter/fixed", "adapter/oracle", "adapter/predicted", "adapter/soft"]


def test_a_single_setting_may_put_a_file_right(capsys: Capture, tmp_path: Path):
    path = tmp_path / "heads.yaml"
    path.write_text("lm: {heads: 3}\ncorpus: {path: /no/text}")
    out = tmp_path / "run"
    assert "heads 3" in refused(capsys, "train", "--config", path, "--out", out)
    line = refused(capsys, "train", "--config", path, "--lm.width", "96", "--out", out, "--quiet")
    assert "/no/text" in line


def test_resuming_by_command_changes_only_what_is_free(capsys: Capture, copy: Path):
    line = refused(capsys, "train", "--resume", "--out", copy, "--lm.layers", "4")
    assert "lm.layers was 3 and is now 4" in line
    out = printed(capsys, "train", "--resume", "--out", copy, "--probe.layers", "0", "--quiet")
    assert "adapter/joint" in out
    assert Run.open(copy).config.probe.layers == (0,)


def test_training_prints_stages_and_what_comes_next(capsys: Capture, tiny_run: Run):
    out = printed(capsys, "train", "--resume", "--out", tiny_run.folder, "--quiet")
    for stage in STAGES:
        assert f" {stage} " in out
    assert f"probekit evaluate {tiny_run.folder}" in " ".join(out.split())


def test_settings_that_change_nothing_are_reported(capsys: Capture, copy: Path):
    words = ["train", "--resume", "--out", str(copy), "--quiet", "--training.base.rank", "4"]
    how = ["--training.save_minutes", "3", "--lm.device_map", "auto"]
    assert main([*words, *how, "--evaluation.stride", "7", "--seed", "0"]) == 0
    assert capsys.readouterr().err == (
        "probekit: note: training.base.rank changes nothing here: it goes with training.base.tuning lora, "
        "which is frozen\n"
    )


@pytest.mark.parametrize("words", [["--preset", "demo"], ["--preset=demo"]])
def test_help_after_a_preset_has_its_defaults(words: list[str], capsys: Capture):
    plain, demo = (" ".join(printed(capsys, "train", *more, "--help").split()) for more in ([], words))
    assert "--lm.width int Residual stream width (d_model) of a new LM. (default: 128)" in plain
    assert "--lm.width int Residual stream width (d_model) of a new LM. (default: 64)" in demo
