"""`probekit compare` as it is typed."""

import json
from pathlib import Path

import pandas as pd
import pytest
from random_lms import save_random_llama
from running import Capture, printed, refused

from probekit.cli.compare_options import compared_configs, parse_compare
from probekit.run.run import Run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LM, and texts that end in one of two words."""
    folder = tmp_path_factory.mktemp("compared")
    rows = [
        {
            "text": f"The plan of town {n // 2} went {'well' if n % 3 else 'wrong'}. So it was.",
            "fate": f"{n % 3 > 0}",
        }
        for n in range(240)
    ]
    pd.DataFrame(rows).to_csv(folder / "fates.csv", index=False)
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": row["text"]}) for row in rows[:40]))
    save_random_llama(folder / "lm", (row["text"] for row in rows), positions=64)
    return folder


SHORT = ["--device", "cpu", "--training.window", "64", "--permutations", "5", "--quiet"]


def test_layers_are_compared_on_any_text(capsys: Capture, folder: Path, tmp_path: Path):
    words = ["compare", folder / "lm", "--compress", "int8", "--corpus", folder / "texts.jsonl", *SHORT]
    shown = printed(capsys, *words, "--out", tmp_path / "out")
    assert "Layers of lm and lm int8 at the same depth" in shown
    assert "pairs cannot be told from permuted documents" in shown
    assert not (tmp_path / "out" / "probes.parquet").exists()
    table = pd.read_parquet(tmp_path / "out" / "similarity.parquet")
    assert table.examples.tolist() == [80] * 4
    assert (tmp_path / "out" / "similarity.png").exists()
    run = Run.open(tmp_path / "out" / "second")
    assert (run.config.lm.compress, run.corpus.has_actions) == ("int8", False)
    assert Run.open(tmp_path / "out" / "first").config.lm.compress is None
    line = refused(capsys, *words[:3], "rank=2", *words[4:], "--out", tmp_path / "out")
    assert "was begun with other settings" in line


def test_probes_of_labels_are_read_in_both(capsys: Capture, folder: Path, tmp_path: Path):
    labels = ["--labels", folder / "fates.csv", "--text", "text", "--target", "fate"]
    few = ["--probe.l2", "0.1", "--evaluation.resamples", "100"]
    words = ["compare", folder / "lm", "--compress", "prune=0.5", *labels, *few, *SHORT]
    shown = printed(capsys, *words, "--out", tmp_path / "out")
    for reading in ("first", "frozen", "mapped", "refitted"):
        assert reading in shown
    assert "AUROC of fate by layer" in shown
    assert "differences of accuracy are paired" in shown
    assert set(pd.read_parquet(tmp_path / "out" / "probes.parquet").target) == {"fate"}


def test_what_is_typed_wrong_is_refused(capsys: Capture, folder: Path, tmp_path: Path):
    words = ["compare", folder / "lm", "--out", tmp_path / "out", "--quiet"]
    corpus = ["--corpus", folder / "texts.jsonl"]
    line = refused(capsys, *words, *corpus)
    assert f"give another LM beside {folder / 'lm'}, or --compress int8, prune=0.5 or rank=64" in line
    line = refused(capsys, *words[:2], folder / "lm", *words[2:], *corpus)
    assert line.startswith(f"both LMs are {folder / 'lm'}; give another one, or --compress int8")
    line = refused(capsys, *words, *corpus, "--compress", "int4")
    assert "lm.compress" in line
    assert "'int4' must be int8, prune=SHARE" in line
    line = refused(capsys, *words, "--compress", "int8", "--labels", folder / "fates.csv")
    assert "argument --labels: goes with --target, the column of labels" in line
    line = refused(capsys, *words, *corpus, "--compress", "int8", "--permutations", "0")
    assert "argument --permutations: 0 is below 1" in line
    assert not (tmp_path / "out").exists()


def test_actions_are_built_where_they_are_asked_for(tmp_path: Path):
    def actions(*words: str) -> str:
        typed = ["m", "--compress", "int8", "--corpus", "t.txt", "--out", str(tmp_path), *words]
        config, second = compared_configs(
            *parse_compare(test_actions_are_built_where_they_are_asked_for, typed)
        )
        assert second == {"lm.compress": "int8"}
        return config.actions.labels

    assert actions() == "none"
    assert actions("--target", "action") == "clusters"
    assert actions("--target", "token") == "none"
