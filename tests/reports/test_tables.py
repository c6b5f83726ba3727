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
from synthetic_probes import DISTANCES, probe_table

from probekit.config import Config
from probekit.corpus import inspect
from probekit.corpus.build import write_corpus
from probekit.evaluation.evaluate import PlannerEvaluation as Evaluation
from probekit.evaluation.evaluate import evaluate
from probekit.evaluation.generation_metrics import GenerationEvaluation
from probekit.probing.probe import ProbeResults
from probekit.progress import Progress
from probekit.reports import tables
from probekit.reports.tables import (
    print_corpus,
    print_evaluation,
    print_generation,
    print_probes,
    print_training,
)
from probekit.run import Run

HOSTILE = "[red]x[/red] [/] :warning: \\[bold] [link=file:///etc]y[/link]"
CONTROL = "bell\x07 colour\x1b[31m back\x08 turned\u202eover \x9b2J end\\"


def rows_of(printed: str) -> list[list[str]]:
    """The cells of every printed row."""
    lines = [line.strip() for line in printed.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line[1:-1].split("│")] for line in lines]


@pytest.fixture(scope="module")
def evaluation(tiny_run: Run, tmp_path_factory) -> Evaluation:
    folder = shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("reported") / "run")
    return evaluate(folder, quiet=True)


def probe_results(table: pd.DataFrame | None = None, notes: tuple[str, ...] = ()) -> ProbeResults:
    table = probe_table(horizons=(1,)) if table is None else table
    return ProbeResults(table, Path("runs/tiny/probes"), list(notes))


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


def test_evaluation(evaluation: Evaluation, capsys):
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


def test_an_evaluation_without_intervals(evaluation: Evaluation, capsys):
    bare = {}
    for name in ("perplexity", "differences", "planner"):
        table = getattr(evaluation, name).copy()
        table[[column for column in table if column.endswith(("_low", "_high"))]] = np.nan
        bare[name] = table
    print_evaluation(replace(evaluation, **bare))
    printed = capsys.readouterr().out
    assert printed.count("(no interval)") == sum(map(len, bare.values()))
    assert "nan" not in printed


def test_an_evaluation_of_the_base_lm_alone(evaluation: Evaluation, capsys):
    alone = replace(evaluation, perplexity=evaluation.perplexity[:1], differences=evaluation.differences[:0])
    print_evaluation(alone)
    assert rows_of(capsys.readouterr().out)[0][0] == "none"


def generated(**changes) -> GenerationEvaluation:
    """Two lengths and two variants, one of them planned, of two seeds."""
    value = iter(np.linspace(0.1, 0.9, 40))
    rows = []
    for variant, seeds in (("other document", 1), ("soft", 2)):
        for texts, length, metric in (
            ("continuations", 1200, "rouge2"),
            ("continuations", 8, "levenshtein"),
            ("samples", 1200, "mauve"),
            ("continuations", 1200, "plan_following"),
        ):
            if variant == "soft" or metric in ("rouge2", "levenshtein"):
                keys = {"variant": variant, "actions": "planner", "texts": texts, "length": length}
                low, middle, high = (next(value) for _ in range(3))
                spread = np.nan if seeds == 1 else 0.25
                rows.append(
                    keys
                    | {"metric": metric, "value": middle, "value_low": low, "value_high": high}
                    | {"seed_spread": spread, "seeds": seeds, "documents": 50, "empty": 0}
                )
    table = pd.DataFrame(rows).assign(**changes)
    return GenerationEvaluation(table, pd.DataFrame(), {"prompts": 50}, [f"note {HOSTILE}"])


def test_generation(capsys):
    evaluation = generated()
    print_generation(evaluation)
    printed = capsys.readouterr().out
    for title in ("continuations of 1,200 tokens", "continuations of 8 tokens", "samples of 1,200 tokens"):
        assert f"Generated {title}" in printed
    rows = rows_of(printed)
    for row in evaluation.metrics.itertuples():
        cells = [r for r in rows if r[0] == row.variant]
        assert any(with_range(row, "value") in cell for cell in cells)
    assert sum("spread over seeds 0.250" in row for row in rows) == 4
    assert f"note {HOSTILE}\n" in printed
    assert "nan" not in printed.lower()
    assert "Blank among these" not in printed
    assert "too narrow" not in printed


def test_generation_that_went_wrong(capsys):
    print_generation(generated(empty=3, value=np.nan, value_low=np.nan, value_high=np.nan))
    printed = capsys.readouterr().out
    # By kind and length of texts: two variants' continuations, one's samples.
    assert re.findall("Blank among these: ([0-9]+);", printed) == ["6", "6", "3"]
    assert "nan" not in printed.lower()


def with_range(row, value: str) -> str:
    low, high = getattr(row, f"{value}_low"), getattr(row, f"{value}_high")
    return f"{getattr(row, value):.3f} [{low:.3f}, {high:.3f}]"


def test_probes(capsys):
    probes = probe_results()
    print_probes(probes)
    printed = capsys.readouterr().out
    assert "on 200 test examples of 16 documents" in printed
    rows = rows_of(printed)
    cells = [row for row in rows if len(row) == 6]
    best = probes.best_cells().sort_values(["variant", "location", "solver"])
    assert len(best) == len(cells) / 2 == 18
    for cell, shown, below in zip(best.itertuples(), cells[::2], cells[1::2], strict=True):
        assert not cell.injected
        assert shown[0] == f"{cell.variant}, {cell.location}, {cell.solver}"
        assert below[0] == f"layer {cell.layer}, distance {cell.distance}, horizon 1, seed 0"
        ranges = [with_range(cell, value) for value in ("accuracy", "bits", "gain", "selectivity")]
        assert shown[1:] == [*ranges, f"{cell.compression:.3f}"]
        assert below[1:] == ["", "", f"over the {cell.gain_over}", "", ""]
    beside = probes.table[(probes.table.reader != "probe") & probes.table.distance.isin(best.distance)]
    assert {*best.distance} < {*DISTANCES}
    expected = [
        [str(row.distance), "1", row.reader, with_range(row, "accuracy"), with_range(row, "bits")]
        for row in beside.itertuples()
    ]
    assert sorted(row for row in rows if len(row) == 5) == sorted(expected)
    assert "nan" not in printed.lower()
    assert f"All {len(probes.table)} rows: {Path('runs/tiny/probes/results.parquet')}" in printed


def test_cells_are_counted_by_what_they_read(capsys):
    table = probe_table(horizons=(1,), solvers=("softmax",))
    print_probes(probe_results(table))
    probes = table[(table.reader == "probe") & ~table.injected & table.accuracy.notna()]
    beat = {name: (int((cells.gain_low > 0).sum()), len(cells)) for name, cells in probes.groupby("variant")}
    # Two locations of three layers and one of one layer; one cell is empty in both, three are injected.
    assert beat == {"none": (beat["none"][0], 26), "random": (0, 26), "soft": (beat["soft"][0], 23)}
    assert 0 < beat["none"][0] < beat["soft"][0]
    total = sum(won for won, _ in beat.values())
    each = ", ".join(f"{name} {won} of {of}" for name, (won, of) in beat.items())
    printed = capsys.readouterr().out
    assert (
        f"{total} of 75 cells read more than the bigram or skip n-gram, 95 % for all together ({each})"
        in printed
    )
    assert "6 of 84 cells are empty (too few examples): distance 4 of horizon 1" in printed
    assert "same activation" not in printed
    assert "did not converge" not in printed


def test_cells_that_are_not_to_be_relied_on_are_counted(capsys):
    table = probe_table(solvers=("softmax",))
    read = table.index[(table.reader == "probe") & table.accuracy.notna()]
    table.loc[read[:4], "converged"] = False
    table.loc[read[:3], "constant"] = True
    table.loc[(table.reader == "probe") & (table.distance == 8) & (table.horizon == 2), "accuracy"] = np.nan
    print_probes(probe_results(table))
    printed = capsys.readouterr().out
    assert "4 of 168 probes did not converge" in printed
    assert "3 of 168 cells have the same activation in all examples" in printed
    assert "(too few examples): distance 4 of horizon 1; distance 4, 8 of horizon 2" in printed


def test_seeds_and_targets_are_told(capsys):
    table = probe_table(("none",), ("hook_resid_post",), horizons=(1,), solvers=("softmax",), seeds=(3, 5))
    embedding = table.reader == "token embedding"
    table = pd.concat([table.assign(seed=table.seed.mask(embedding, 3)), table[embedding].assign(seed=5)])
    print_probes(probe_results(table.assign(target="[red]topic").reset_index(drop=True)))
    rows = rows_of(capsys.readouterr().out)
    seeds = {row[0].split(", ")[-1] for row in rows if row[0].startswith("layer")}
    assert seeds <= {"seed 3", "seed 5"}
    assert {row[0] for row in rows if "hook_resid_post" in row[0]} == {
        "[red]topic, none, hook_resid_post, softmax"
    }
    readers = [row[2] for row in rows if len(row) == 5]
    assert {"token embedding, seed 3", "token embedding, seed 5", "prior"} <= {*readers}


def test_a_grid_without_control_and_code_length(capsys):
    table = probe_table(("none",), ("hook_resid_post",), horizons=(1,), solvers=("softmax",))
    table[["selectivity", "selectivity_low", "selectivity_high", "compression"]] = np.nan
    print_probes(probe_results(table))
    row = next(row for row in rows_of(capsys.readouterr().out) if row[0].startswith("none"))
    assert row[4:] == ["", ""]


def test_a_grid_that_was_told_everything(capsys):
    table = probe_table(("none",), horizons=(1,)).assign(injected=lambda t: t.reader == "probe")
    print_probes(probe_results(table))
    printed = capsys.readouterr().out
    assert "on 200 test examples of 16 documents" in printed
    assert "read more than" not in printed


def test_notes_are_said_as_they_are(capsys):
    print_probes(probe_results(notes=(f"dropped {HOSTILE}", "second\x1b[31m")))
    printed = capsys.readouterr().out
    assert f"dropped {HOSTILE}\n" in printed
    assert "second�[31m\n" in printed


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
