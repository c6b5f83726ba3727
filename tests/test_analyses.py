"""The scripts that draw the figures run on a tiny run, and what figures/ holds belongs together."""

import hashlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import probekit
from probekit.config import Config
from probekit.run import Run

ROOT = Path(__file__).parents[1]
FIGURES = sorted((ROOT / "figures").glob("*.png"))


def run_script(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "analyses" / name), run_name="__main__")


def test_demo_overview(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(Path(shutil.copytree(tiny_run.folder, tmp_path / "run")), tiny_run.config)
    evaluation = probekit.evaluate(run, quiet=True)
    probes = probekit.probe(run, {"probe.layers": [0]}, quiet=True)
    out = tmp_path / "overview.png"
    run_script("demo_overview.py", run.folder, "--out", out, monkeypatch=monkeypatch)
    numbers = pd.read_csv(out.with_suffix(".csv"))
    shown = numbers[numbers.panel == "perplexity"]
    assert shown.perplexity.to_numpy() == pytest.approx(evaluation.perplexity.perplexity.to_numpy())
    assert (numbers.panel == "probes").sum() == len(probes.table)
    assert_belongs_together(out)


def test_planted_orderings(
    tiny_config: Config, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Config, "from_preset", lambda name: tiny_config)
    # Two seeds of which the first is there already: it must be used as it is.
    shutil.copytree(tiny_run.folder, tmp_path / "runs" / "seed0")
    written = (tmp_path / "runs" / "seed0" / "run.json").read_bytes()
    out = tmp_path / "orderings.png"
    run_script(
        "planted_orderings.py",
        *("--seeds", 0, 1, "--runs", tmp_path / "runs", "--out", out),
        monkeypatch=monkeypatch,
    )
    assert (tmp_path / "runs" / "seed0" / "run.json").read_bytes() == written
    table = pd.read_csv(out.with_suffix(".csv"), dtype={"seed": str}).set_index(["first", "second", "seed"])
    assert set(table.index.get_level_values("seed")) == {"0", "1", "mean"}
    for seed in (0, 1):
        losses = probekit.load_run(tmp_path / "runs" / f"seed{seed}").losses()
        mean = losses[losses.actions != "true"].groupby("variant")[["loss", "tokens"]].sum()
        perplexity = np.exp(mean.loss / mean.tokens)
        found = table.loc[("soft", "predicted", str(seed))]
        assert found.value == pytest.approx(perplexity["soft"] - perplexity["predicted"])
        assert found.low <= found.value <= found.high
    assert_belongs_together(out)


@pytest.mark.parametrize("picture", FIGURES, ids=lambda path: path.stem)
def test_kept_figures_have_their_numbers_and_manifest(picture: Path):
    assert_belongs_together(picture)


def assert_belongs_together(picture: Path) -> None:
    assert picture.read_bytes().startswith(b"\x89PNG")
    manifest = json.loads(picture.with_suffix(".json").read_text("utf-8"))
    digest = hashlib.sha256(picture.with_suffix(".csv").read_bytes()).hexdigest()
    assert manifest["numbers_sha256"] == digest
    assert (ROOT / manifest["script"]).is_file()
    for run in manifest["runs"]:
        Config.from_dict(run["config"])
        assert run["seeds"]["run"] == run["config"]["seed"]
