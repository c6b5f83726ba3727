"""`probekit ask` as it is typed."""

import json
from pathlib import Path

import pandas as pd
import pytest
from running import Capture, printed, refused

from probekit.io import read_json
from probekit.run.run import Run

ROWS = [
    {"kind": "one", "context": "Rona bolu.", "choices": ["Da mina", "Suti rola"], "answer": 0, "score": 1},
    {"kind": "two", "context": "Rona bolu.", "choices": ["Da mina", "Suti"], "answer": 1, "score": 2},
    {"kind": "two", "choices": ["Da <b>[red]mina", "Suti"], "answer": 1, "score": 4},
]


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)), "utf-8")
    return path


def test_an_lm_is_asked_without_a_run(tiny_run: Run, items: Path, tmp_path: Path, capsys: Capture):
    out = tmp_path / "new" / "out"
    words = ["ask", tiny_run.folder / "lm", "--items", items, "--out", out, "--scoring", "mean", "--quiet"]
    shown = " ".join(printed(capsys, *words, "--evaluation.resamples", "100", "--seed", "3").split())
    assert "Choices by mean log-probability" in shown
    assert "Only 1 groups of items of a kind" in shown
    assert "items one choice has more tokens than another" in shown
    for name in ("LM over prior", "prior", "one", "two", "all kinds", "rank correlation", str(out)):
        assert name in shown
    table = pd.read_parquet(out / "results.parquet")
    assert len(table) == 9
    assert len(pd.read_parquet(out / "answers.parquet")) == 6
    known = read_json(out / "ask.json")
    assert (known["scoring"], known["seed"], known["resamples"]) == ("mean", 3, 100)
    assert [lm["dtype"] for lm in known["revisions"]] == ["float32"]


def test_preferences_are_called_differences(tiny_run: Run, tmp_path: Path, capsys: Capture):
    items = tmp_path / "items.csv"
    items.write_text("choice0,choice1\nHe ran,She ran\n", "utf-8")
    words = ["ask", tiny_run.folder / "lm", "--items", items, "--out", tmp_path / "out", "--quiet"]
    shown = " ".join(printed(capsys, *words).split())
    assert "paired differences between how probable the LM finds" in shown
    assert "No item has a context: there is no prior" in shown
    assert "accuracy" not in shown
    preference = pd.read_parquet(tmp_path / "out" / "results.parquet").preference[0]
    assert f"{preference:.3f} (no interval)" in shown, "a table of one row has its numbers"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: --items"),
        (["--items", "none.csv"], "none.csv: cannot be read"),
        (["--items", "ITEMS", "--scoring", "sum"], "argument --scoring: invalid choice"),
        (["--items", "ITEMS", "--revisions", "step9"], "--revisions has 'step9': no such folder"),
        (["--items", "ITEMS", "--lm.layers", "2"], "unknown setting 'lm.layers'"),
        (["--items", "LONG"], "long.jsonl:1: the context and its longest choice have"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    words: list[str], said: str, tiny_run: Run, items: Path, tmp_path: Path, capsys: Capture
):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"context": "Rona " * 99, "choices": ["a", "b"]}), "utf-8")
    files = {"ITEMS": str(items), "LONG": str(long)}
    typed = [files.get(word, word) for word in words]
    out = tmp_path / "out"
    assert said in refused(capsys, "ask", tiny_run.folder / "lm", *typed, "--out", out, "--quiet")
    assert not out.exists()
