"""Probes on the terminal: every number in its place."""

from pathlib import Path

import numpy as np
import pandas as pd
from read_tables import HOSTILE, rows_of, with_range
from synthetic_probes import DISTANCES, probe_table

from probekit.probing.probe import ProbeResults
from probekit.reports.terminal import print_probes


def probe_results(table: pd.DataFrame | None = None, notes: tuple[str, ...] = ()) -> ProbeResults:
    table = probe_table(horizons=(1,)) if table is None else table
    return ProbeResults(table, Path("runs/tiny/probes"), list(notes))


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
