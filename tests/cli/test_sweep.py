"""`probekit sweep` as it is typed: what is swept over, what is printed of it."""

from pathlib import Path
from typing import Any

import pytest
from read_tables import rows_of, shows
from running import Capture, printed, refused

from probekit.cli import commands
from probekit.cli.sweep_options import parse_sweep, swept
from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.sweeps import Sweep


def test_sweeping_trains_prints_and_goes_on(capsys: Capture, tmp_path: Path, tiny_config: Config):
    (tmp_path / "tiny.yaml").write_text(tiny_config.to_yaml())
    out = tmp_path / "sweep"
    words = ["sweep", "mixing-fraction", "--config", tmp_path / "tiny.yaml", "--out", out, "--quiet"]
    words += ["--corpus.planted.documents", "60", "--seeds", "1"]
    printed(capsys, *words, "--values", "0", "1")
    text = printed(capsys, *words, "--values", "0.5")
    table = Sweep.open(out).table()
    means = table[table.seed.isna()]
    assert set(zip(means["mixing.fraction"], means.variant, strict=True)) == {
        (fraction, variant) for fraction in (0.0, 0.5, 1.0) for variant in ("none", "mixed")
    }
    for row in means.itertuples():
        named = [row.member, row.variant, row.actions]
        (cell,) = [cells[3] for cells in rows_of(text) if cells[:3] == named]
        assert shows(cell, (row.value, row.value_low, row.value_high))
    assert "Not finished" not in text
    assert "results.parquet" in text
    # Every other command works on a member.
    printed(capsys, "evaluate", out / "mixing.fraction=0.5" / "seed0", "--quiet")
    line = refused(capsys, *words, "--lm.layers", "4", "--values", "0")
    assert "was begun with other settings: lm.layers was 3 and is now 4" in line
    assert "holds no sweep" in refused(capsys, *words, "--out", tmp_path)


def sweep_of(*words: str) -> tuple[Config, dict[str, dict[str, Any]], list[int]]:
    """What `probekit sweep` with some words sweeps over."""
    return swept(*parse_sweep(commands.sweep, list(words)))


def test_a_study_sweeps_over_its_setting_with_its_variant():
    config, members, seeds = sweep_of("mixing-fraction", "--preset", "demo", "--seeds", "3", "--seed", "2")
    assert config == Config.from_preset("demo").override({"mixing.variants": ["mixed"], "seed": 2})
    assert members == {f"mixing.fraction={f:g}": {"mixing.fraction": f} for f in (0.0, 0.25, 0.5, 0.75, 1.0)}
    assert seeds == [2, 3, 4]
    words = ("mixing-fraction", "--preset", "demo", "--values", "0", "1e-1")
    config, members, seeds = sweep_of(*words, "--mixing.variants", "mixed", "fixed", "--seeds", "7", "5")
    assert config.mixing.variants == ("fixed", "mixed")
    assert [*members] == ["mixing.fraction=0", "mixing.fraction=0.1"]
    assert seeds == [7, 5]


def test_settings_are_swept_in_a_grid():
    config, members, seeds = sweep_of(
        *("training.adapter.learning_rate", "--values", "1e-3", "0.01", "--preset", "demo"),
        *("--over", "mixing.variants", "soft,joint", "soft", "--over", "training.adapter.patience", "null"),
    )
    assert config == Config.from_preset("demo")
    assert seeds == [0]
    assert list(members.values()) == [
        {
            "training.adapter.learning_rate": rate,
            "mixing.variants": variants,
            "training.adapter.patience": None,
        }
        for rate in (1e-3, 1e-2)
        for variants in (("soft", "joint"), ("soft",))
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["mixing-fraction"], "no settings to change; give --preset or --config"),
        (["--preset", "demo"], "nothing to sweep over; give a setting with --values, or mixing-fraction"),
        (["--preset", "demo", "--values", "3"], "--values has no setting; give it first"),
        (["mixing-fractoin", "--preset", "demo"], "did you mean 'mixing-fraction'?"),
        (["layers", "--preset", "demo", "--values", "3"], "'layers'; did you mean 'lm.layers'?"),
        (["--preset", "demo", "--over", "lm.layers"], "lm.layers has no values to sweep over"),
        (["lm.layers", "--preset", "demo", "--values", "3", "3"], "lm.layers=3 is given twice"),
        (
            ["mixing-fraction", "--preset", "demo", "--values", "1.1"],
            "mixing.fraction is '1.1': input should",
        ),
        (["mixing-fraction", "--preset", "demo", "--seeds", "few"], "argument --seeds: invalid int value"),
        (
            ["lm.layers", "--values", "3", "--over", "lm.layers", "4", "--preset", "demo"],
            "lm.layers is swept over twice",
        ),
    ],
)
def test_sweeps_that_are_not_understood_are_refused(words: list[str], said: str):
    with pytest.raises(ProbekitError) as caught:
        sweep_of(*words)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
