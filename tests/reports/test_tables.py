"""Tables on the terminal: every number in its place, and text from a corpus as it is."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from probekit.config import Config
from probekit.corpus import inspect
from probekit.corpus.build import write_corpus
from probekit.evaluation.evaluate import Evaluation, evaluate
from probekit.probing.probe import ProbeResults, probe
from probekit.progress import Progress
from probekit.reports import tables
from probekit.reports.tables import print_corpus, print_evaluation, print_probes, print_training
from probekit.run import Run

HOSTILE = "[red]x[/red] [/] :warning: \\[bold] [link=file:///etc]y[/link]"
CONTROL = "bell\x07 colour\x1b[31m back\x08 turned\u202eover \x9b2J end\\"


def rows_of(printed: str) -> list[list[str]]:
    """The cells of every printed row."""
    lines = [line.strip() for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line[1:-1].split("│")] for line in lines]


@pytest.fixture(scope="module")
def results(tiny_run: Run, tmp_path_factory) -> tuple[Evaluation, ProbeResults]:
    folder = shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("reported") / "run")
    settings = {"probe.variants": ["none", "soft"], "probe.distances": [1, 2, 500]}
    return evaluate(folder, quiet=True), probe(folder, settings, quiet=True)


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
    monkeypatch.setattr(tables, "DISPLAY_ACTIONS", 3)
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
    monkeypatch.setattr(tables, "action_table", lambda corpus, nearest: long)
    print_corpus(tiny_run.corpus, nearest=2)
    printed = capsys.readouterr().out
    assert "a" * 100 in printed
    assert "b" * 99 + "…" in printed
    assert "b" * 100 not in printed


def test_evaluation(results: tuple[Evaluation, ProbeResults], capsys):
    evaluation, _ = results
    print_evaluation(evaluation)
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert f"{evaluation.perplexity.tokens.iloc[0]:,} tokens" in printed
    for row in evaluation.perplexity.itertuples():
        interval = f"[{row.perplexity_low:.3f}, {row.perplexity_high:.3f}]"
        assert [row.variant, row.actions, f"{row.perplexity:.3f}", interval] in rows
    for row in evaluation.differences.itertuples():
        interval = f"[{row.difference_low:.3f}, {row.difference_high:.3f}]"
        assert [row.first, row.second, f"{row.difference:+.3f}", interval] in rows
    for reader in evaluation.planner.reader.unique():
        values = evaluation.planner[evaluation.planner.reader == reader].set_index("metric")
        cells = [
            f"{values.value[m]:.3f} [{values.value_low[m]:.3f}, {values.value_high[m]:.3f}]"
            for m in ("accuracy", "top5", "cross_entropy")
        ]
        assert [reader, *cells] in rows


def test_an_evaluation_without_intervals(results: tuple[Evaluation, ProbeResults], capsys):
    evaluation, _ = results
    bare = {}
    for name in ("perplexity", "differences", "planner"):
        table = getattr(evaluation, name).copy()
        table[[column for column in table if column.endswith(("_low", "_high"))]] = np.nan
        bare[name] = table
    print_evaluation(replace(evaluation, **bare))
    printed = capsys.readouterr().out
    assert printed.count("(no interval)") == sum(map(len, bare.values()))
    assert "nan" not in printed


def test_an_evaluation_of_the_base_lm_alone(results: tuple[Evaluation, ProbeResults], capsys):
    evaluation, _ = results
    alone = replace(evaluation, perplexity=evaluation.perplexity[:1], differences=evaluation.differences[:0])
    print_evaluation(alone)
    assert rows_of(capsys.readouterr().out)[0][0] == "none"


def test_probes(results: tuple[Evaluation, ProbeResults], capsys):
    _, probes = results
    print_probes(probes)
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    best = probes.best_cells()
    assert len(best) == 2
    blocks = [n for n, row in enumerate(rows) if row[0]]
    assert len(blocks) == 2
    for begin, cell in zip(blocks, best.itertuples(), strict=True):
        assert rows[begin][0] == (
            f"{cell.variant}, {cell.location}, layer {cell.layer}, distance {cell.distance}, horizon 1"
        )
        beside = probes.table.query("reader != 'probe' and distance == @cell.distance")
        assert len(beside) == 6
        for row, shown in zip([cell, *beside.itertuples()], rows[begin : begin + 7], strict=True):
            assert shown[1:] == [
                row.reader,
                f"{row.accuracy:.3f} [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}]",
                f"{row.bits:.3f} [{row.bits_low:.3f}, {row.bits_high:.3f}]",
                "200 / 16",
            ]
    assert "Of 18 probes 6 are empty (too few examples), 0 did not converge" in printed
    assert f"All {len(probes.table)} rows: {probes.folder / 'results.parquet'}" in printed


def test_probes_that_did_not_converge_are_counted(results: tuple[Evaluation, ProbeResults], capsys):
    _, probes = results
    table = probes.table[probes.table.distance != 500].copy()
    table.loc[table.index[table.reader == "probe"][:4], "converged"] = False
    print_probes(replace(probes, table=table))
    assert "Of 12 probes 0 are empty (too few examples), 4 did not converge" in capsys.readouterr().out
    table["converged"] = table.converged.where(table.converged.isna(), True)
    print_probes(replace(probes, table=table))
    assert "did not converge" not in capsys.readouterr().out


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
