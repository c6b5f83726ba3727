"""What commands print: every number in its place, and text from a corpus as it is."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic_results as made
from read_tables import CONTROL, HOSTILE, rows_of, shows, with_range
from synthetic_probes import DISTANCES, probe_table

from probekit.config import Config
from probekit.data import corpus as inspect
from probekit.data.build import write_corpus
from probekit.evaluation.evaluate import evaluate
from probekit.evaluation.perplexity import Evaluation
from probekit.generation.evaluate import GenerationEvaluation
from probekit.probing.probe import ProbeResults
from probekit.progress import Progress
from probekit.reports import tables as tables_module
from probekit.reports.terminal import (
    print_corpus,
    print_evaluation,
    print_generation,
    print_interventions,
    print_probes,
    print_subnetwork,
    print_sweep,
    print_training,
)
from probekit.run.run import Run

# Training and corpus


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
        line = next(r for r in rows if r[0] == str(action) and len(r) == 6)
        assert line[1] == str(row.sentences)
        assert line[2] == f"{row['share']:.1%}"
        assert len(line[3]) == round(12 * row["share"] / table["share"].max())
        assert line[4] == row.words
        assert line[5] == row.nearest[0]
        assert row.nearest[1] in printed


def test_rarer_actions_are_counted(tiny_run: Run, capsys, monkeypatch):
    monkeypatch.setattr(tables_module, "SHOWN_ACTIONS", 3)
    print_corpus(tiny_run.corpus, nearest=0)
    printed = capsys.readouterr().out
    assert "5 rarer ones are left out" in printed
    assert len([row for row in rows_of(printed) if row[0].isdigit() and len(row) == 6]) == 3


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
    assert re.search(
        r"bell‹U\+0007› colour‹U\+001B›\[31m back‹U\+0008› turned‹U\+202E›over ‹U\+009B›2J end\\ \d+\.",
        printed,
    ), "each control character leaves a mark in its place"
    assert not re.search(r"[^\n\u2500-\u259f -~…‹›—–]", printed)


def test_lines_are_whole_without_a_terminal(tiny_run: Run, tmp_path: Path, monkeypatch):
    """A pipe or a file has no width: nothing is wrapped or coloured."""
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


# Evaluation


@pytest.fixture(scope="module")
def evaluation(tiny_run: Run, tmp_path_factory) -> Evaluation:
    folder = shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("reported") / "run")
    return evaluate(folder, quiet=True)


def test_evaluation(evaluation: Evaluation, capsys):
    print_evaluation(evaluation)
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert f"{evaluation.perplexity.tokens.iloc[0]:,} tokens" in printed
    for words, value, table in (
        (["variant", "actions"], "perplexity", evaluation.perplexity),
        (["first", "second"], "difference", evaluation.differences),
    ):
        for row in table.to_dict("records"):
            (cells,) = [cells for cells in rows if cells[:2] == [row[word] for word in words]]
            assert shows(cells[2], (row[value], row[f"{value}_low"], row[f"{value}_high"]))
    for reader in evaluation.planner.reader.unique():
        values = evaluation.planner[evaluation.planner.reader == reader].set_index("metric")
        (cells,) = [cells for cells in rows if cells[0] == reader]
        for cell, metric in zip(cells[1:], ("accuracy", "top5", "cross_entropy"), strict=True):
            assert shows(cell, tuple(values.loc[metric, ["value", "value_low", "value_high"]]))


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


def test_multiple_choice(evaluation: Evaluation, capsys):
    row = {"variant": "ensemble, layer 2", "questions": 40, "documents": 20, "chance": 0.25}
    row |= {"accuracy": 0.5, "accuracy_low": 0.41, "accuracy_high": 0.58}
    difference = {"first": "none", "second": "ensemble", "documents": 20}
    difference |= {"difference": -0.25, "difference_low": -0.5, "difference_high": 0.125}
    tables = {"accuracy": pd.DataFrame([row]), "accuracy_differences": pd.DataFrame([difference])}
    shared = {name: getattr(evaluation, name) for name in ("perplexity", "differences", "losses", "settings")}
    print_evaluation(Evaluation(**shared, **tables, choices=pd.DataFrame()))
    printed = capsys.readouterr().out
    assert "Multiple choice: 40 questions of 20 documents, by chance 0.250" in printed
    assert ["ensemble, layer 2", "0.500 [0.410, 0.580]"] in rows_of(printed)
    assert ["none", "ensemble", "-0.250 [-0.500, +0.125]", "20"] in rows_of(printed)


# Generated text


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
    assert sum("spread over seeds 0.25" in row for row in rows) == 4
    assert f"note {HOSTILE}\n" in printed
    assert "nan" not in printed.lower()
    assert "blank texts" not in printed.lower()
    assert "too narrow" not in printed


def test_generation_that_went_wrong(capsys):
    print_generation(generated(empty=3, value=np.nan, value_low=np.nan, value_high=np.nan))
    printed = capsys.readouterr().out
    assert printed.count("blank texts") == 4  # in every table
    assert all(row[-2:] == ["50", "3"] for row in rows_of(printed))
    assert "nan" not in printed.lower()


# Probes


def probe_results(table: pd.DataFrame | None = None, notes: tuple[str, ...] = ()) -> ProbeResults:
    table = probe_table(horizons=(1,)) if table is None else table
    return ProbeResults(table, Path("runs/tiny/probes"), list(notes))


def test_probes(capsys):
    probes = probe_results()
    print_probes(probes)
    printed = capsys.readouterr().out
    assert "on 200 test examples of 16 documents; target action, horizon 1, seed 0" in printed
    rows = rows_of(printed)
    best = probes.best_cells().sort_values(["variant", "location", "solver"])
    assert len(best) == 18
    for cell, shown in zip(best.itertuples(), rows, strict=False):
        assert not cell.injected
        words = [cell.variant, cell.location, cell.solver, str(cell.layer), str(cell.distance)]
        accuracy, bits = with_range(cell, "accuracy"), with_range(cell, "bits")
        assert shown[:7] == [*words, accuracy, bits]
        assert shows(shown[7], (cell.gain, cell.gain_low, cell.gain_high))
        assert shown[8] == cell.gain_over
        assert shows(shown[9], (cell.selectivity, cell.selectivity_low, cell.selectivity_high))
        assert shown[10:] == [f"{cell.compression:.3f}"]
    beside = probes.table[(probes.table.reader != "probe") & probes.table.distance.isin(best.distance)]
    assert {*best.distance} < {*DISTANCES}
    expected = [
        [row.reader, str(row.distance), "1", with_range(row, "accuracy"), with_range(row, "bits")]
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
    assert "6 of 84 cells are empty (too few examples): position 4 of horizon 1" in printed
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
    assert "(too few examples): position 4 of horizon 1; position 8, 4 of horizon 2" in printed


def test_seeds_and_targets_are_shown(capsys):
    table = probe_table(("none",), ("hook_resid_post",), horizons=(1,), solvers=("softmax",), seeds=(3, 5))
    embedding = table.reader == "token embedding"
    table = pd.concat([table.assign(seed=table.seed.mask(embedding, 3)), table[embedding].assign(seed=5)])
    print_probes(probe_results(table.assign(target="[red]topic").reset_index(drop=True)))
    printed = capsys.readouterr().out
    assert "target [red]topic, location hook_resid_post, solver softmax" in printed.replace("; ", ", ")
    rows = rows_of(printed)
    assert {row[4] for row in rows if row[1] == "hook_resid_post"} <= {"3", "5"}
    readers = {(row[0], row[3]) for row in rows if row[1] != "hook_resid_post"}
    assert {("token embedding", "3"), ("token embedding", "5"), ("prior", "")} <= readers


def test_a_grid_without_control_and_code_length(capsys):
    table = probe_table(("none",), ("hook_resid_post",), horizons=(1,), solvers=("softmax",))
    table[["selectivity", "selectivity_low", "selectivity_high", "compression"]] = np.nan
    print_probes(probe_results(table))
    printed = capsys.readouterr().out
    assert "selectivity" not in printed
    assert "compression" not in printed


# Interventions, subnetworks, sweeps


@pytest.mark.parametrize(("documents", "few"), [(39, True), (60, False)])
def test_interventions_at_the_nearest_distance(documents: int, few: bool, capsys):
    table = made.interventions("none", documents)
    print_interventions(table, [f"note {HOSTILE}"], Path("runs/x"))
    printed = capsys.readouterr().out
    assert "distance 2 (95 % intervals" in printed
    assert "distance 4" not in printed
    near = table[(table.distance == 2) & (table.metric == "next_loss")]
    shown = [cell for row in rows_of(printed) for cell in row]
    for row in near.itertuples():
        assert any(shows(cell, (row.value, row.value_low, row.value_high)) for cell in shown)
    assert f"note {HOSTILE}\n" in printed
    assert ("raise intervene.boundaries" in printed) == few


def test_interventions_at_the_nearest_distance_of_each_kind(capsys):
    table = made.interventions("none")
    table.loc[table.kind == "steer", "distance"] += 1
    print_interventions(table, [], Path("runs/x"))
    printed = capsys.readouterr().out
    assert "distance 2 (95 % intervals" in printed
    assert "distance 3 (95 % intervals" in printed
    assert "distance 4" not in printed
    assert "distance 5" not in printed


def test_a_subnetwork(capsys):
    mask = pd.DataFrame({"component": ["head 0", "mlp 0"], "removed": [True, False]})
    print_subnetwork(made.subnetwork(20), mask, ["a note"], Path("runs/x"))
    printed = capsys.readouterr().out
    assert [row[0] for row in rows_of(printed)] == ["nothing", "the subnetwork", "best alone", "random"]
    assert "raise subnetwork.documents" in printed
    assert "The subnetwork (1 of 2): head 0\n" in printed
    assert f"Every component: {Path('runs/x/mask.parquet')}" in printed


def test_a_sweep_that_was_stopped(capsys):
    row = {"member": "a", "variant": "soft", "actions": "planner", "metric": "mauve", "texts": "samples"}
    row |= {"length": 64, "seed": None, "value": 0.5, "value_low": None, "value_high": None}
    row |= {"seed_spread": 0.125, "seeds": 2, "documents": 9}
    print_sweep(pd.DataFrame([row]), ["a/seed1", "b/seed1"], Path("runs/x"))
    printed = capsys.readouterr().out
    assert ["a", "soft", "planner", "0.500 (no interval)", "0.125", "2", "9"] in rows_of(printed)
    assert "Only 9 test documents" in printed
    assert "Not finished, and not in the table: a/seed1, b/seed1" in printed
