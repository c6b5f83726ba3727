"""A run's tables on the terminal: every number in its place, and text from a corpus as it is."""

import json
import re
import sys
from pathlib import Path

import pandas as pd
from read_tables import CONTROL, HOSTILE, rows_of

from probekit.config import Config
from probekit.data import corpus as inspect
from probekit.data.build import write_corpus
from probekit.progress import Progress
from probekit.reports import terminal as run_tables
from probekit.reports.terminal import print_corpus, print_training
from probekit.run.run import Run


def test_training(tiny_run: Run, capsys):
    print_training(tiny_run)
    printed = capsys.readouterr().out
    stages = json.loads((tiny_run.folder / "run.json").read_text())["stages"]
    rows = rows_of(printed)
    assert [row[0] for row in rows] == list(stages)
    assert [row[1] for row in rows] == [f"{facts['seconds']:.1f}" for facts in stages.values()]
    parameters = sum(p.numel() for p in tiny_run.plain_model().parameters())
    assert ["lm", f"{parameters:,}"] in [[row[0], row[2]] for row in rows]
    assert f"probekit evaluate {tiny_run.folder}" in printed


def test_corpus(tiny_run: Run, capsys):
    print_corpus(tiny_run.corpus, nearest=2)
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    for split, sizes in inspect.sizes(tiny_run.corpus).iterrows():
        assert [split, *(f"{value:,}" for value in sizes)] in rows
    index = tiny_run.corpus.facts["adjusted_rand_index"]
    assert f"adjusted Rand index {index:.3f}" in printed
    table = inspect.action_table(tiny_run.corpus, nearest=2)
    for action, row in table.iterrows():
        line = next(r for r in rows if r[0] == str(action) and len(r) == 5)
        assert line[1] == str(row.sentences)
        assert line[2] == f"{row['share']:.1%}"
        assert len(line[3]) == round(12 * row["share"] / table["share"].max())
        assert line[4] == row.nearest[0]
        assert row.nearest[1] in printed


def test_rarer_actions_are_counted(tiny_run: Run, capsys, monkeypatch):
    monkeypatch.setattr(run_tables, "DISPLAY_ACTIONS", 3)
    print_corpus(tiny_run.corpus, nearest=0)
    printed = capsys.readouterr().out
    assert "… and 5 rarer actions" in printed
    assert len([row for row in rows_of(printed) if row[0].isdigit() and len(row) == 5]) == 3


def test_text_of_a_corpus_is_shown_as_it_is(tmp_path: Path, capsys):
    texts = [f"{HOSTILE} {n}. {CONTROL} {n}. A plain sentence {n}." for n in range(20)]
    (tmp_path / "documents.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    config = Config().override(
        {"corpus.reader": "jsonl", "corpus.path": str(tmp_path), "actions.k": 8}
        | {"actions.dimensions": 8, "lm.vocabulary": 300}
    )
    corpus = write_corpus(config, tmp_path / "corpus", Progress(quiet=True))
    print_corpus(corpus, nearest=20)
    printed = capsys.readouterr().out
    assert re.search(re.escape(HOSTILE) + r" \d+\.", printed)
    assert re.search(r"bell� colour�\[31m back� turned�over �2J end\\ \d+\.", printed), (
        "each control character leaves a mark in its place"
    )
    assert not re.search(r"[^\n\u2500-\u259f -~…�—–]", printed)


def test_long_sentences_are_cut_short(tiny_run: Run, capsys, monkeypatch):
    long = pd.DataFrame({"sentences": [3], "share": [1.0], "nearest": [["a" * 100, "b" * 101]]})
    monkeypatch.setattr(run_tables, "action_table", lambda corpus, nearest: long)
    print_corpus(tiny_run.corpus, nearest=2)
    printed = capsys.readouterr().out
    assert "a" * 100 in printed
    assert "b" * 99 + "…" in printed
    assert "b" * 100 not in printed


def test_lines_are_whole_without_a_terminal(tiny_run: Run, tmp_path: Path, monkeypatch):
    """A pipe or a file says no width: nothing is wrapped or coloured."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("COLUMNS", raising=False)
    with (tmp_path / "out.txt").open("w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        print_corpus(tiny_run.corpus, nearest=1)
        print_training(tiny_run)
    printed = (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert "\x1b" not in printed
    for row in inspect.action_table(tiny_run.corpus, 1).itertuples():
        assert row.nearest[0] in printed
    assert f"probekit probe {tiny_run.folder}" in printed
