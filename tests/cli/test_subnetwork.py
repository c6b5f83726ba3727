"""`probekit subnetwork` as it is typed: what it prints, and one line for whatever is wrong."""

from read_tables import rows_of, shows
from running import Capture, refused

from probekit.cli import main
from probekit.run.run import Run

FAST = ["--subnetwork.steps", "3", "--subnetwork.documents", "8", "--subnetwork.draws", "2"]
FAST += ["--subnetwork.penalties", "0.0", "--subnetwork.learning_rate", "2", "--evaluation.resamples", "100"]


def test_it_ends_with_what_is_lost(probed_copy: Run, capsys: Capture):
    assert main(["subnetwork", str(probed_copy.folder), *FAST]) == 0
    out, err = capsys.readouterr()
    assert "none: learn masks: done" in err
    table, mask = probed_copy.subnetworks(), probed_copy.subnetwork_masks()
    assert "Without some of 6 components, on 8 test documents" in out
    for name in ("nothing", "the subnetwork", "best alone", "random"):
        assert f"│ {name} " in out
    row = table[(table.condition == "subnetwork") & (table.metric == "refitted_bits")].iloc[0]
    bounds = (row.value, row.value_low, row.value_high)
    assert any(shows(cell, bounds) for cells in rows_of(out) for cell in cells)
    assert f"The subnetwork ({mask.removed.sum()} of 6)" in out
    assert "Only 8 test documents" in out
    assert f"All {len(table):,} rows: " in out


def test_bad_input_is_refused_in_one_line(probed_copy: Run, capsys: Capture):
    for name in ("subnetwork.step", "intervene.layers"):
        line = refused(capsys, "subnetwork", probed_copy.folder, *FAST, "--quiet", f"--{name}", "3")
        assert f"unknown setting '{name}'" in line
