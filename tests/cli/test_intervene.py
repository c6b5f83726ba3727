"""`probekit intervene` as it is typed: what it prints and writes, and one line for whatever is wrong."""

import re
from pathlib import Path

import pytest
from read_tables import rows_of, shows
from running import Capture, printed, refused

from probekit.cli import main
from probekit.run.run import Run

FAST = ["--intervene.layers", "0", "2", "--intervene.distances", "2", "1", "--intervene.boundaries", "10"]
FAST += ["--intervene.strengths", "2", "--evaluation.resamples", "100"]


def test_it_ends_with_every_layer_at_the_nearest_distance(probed_copy: Run, capsys: Capture):
    out = printed(capsys, "intervene", probed_copy.folder, *FAST, "--quiet")
    table = probed_copy.interventions()
    assert sorted(table.distance.unique()) == [1, 2]
    for kind in ("erase", "steer", "patch"):
        assert f"{kind}: changes of losses in nats per token" in out
    for condition in ("erase", "random subspace", "same label", "wrong label × 2", "random (true) × 2"):
        assert len(re.findall(rf"resid post [02]\*? +│ {re.escape(condition)} ", out)) >= 2, condition
    rows = table[(table.distance == 1) & (table.condition == "patch") & (table.layer == 2)]
    values = rows.set_index("metric")
    for metric in ("next_loss", "next_loss_over_random", "other_loss", "readout_true"):
        row = values.loc[metric]
        bounds = (row.value, row.value_low, row.value_high)
        assert any(shows(cell, bounds) for cells in rows_of(out) for cell in cells)
    assert "resid post 2*" in out
    assert "* the edit changes the activation that the probe reads" in out
    assert "Accuracy of a linear probe where actions were erased" in out
    fewest = table[table.distance == 1].documents.min()
    assert f"Only {fewest} test documents: intervals from resampling so few are too narrow" in out
    assert "raise intervene.boundaries" in out
    assert f"All {len(table):,} rows: " in out
    assert "written anew" not in out


def test_plans_of_a_conditioned_variant(probed_copy: Run, capsys: Capture):
    words = ["--intervene.kinds", "codebook", "--intervene.variant", "soft", "--intervene.samples", "4"]
    assert main(["intervene", str(probed_copy.folder), *FAST, *words]) == 0
    out, err = capsys.readouterr()
    assert "intervene: done" in err
    assert "codebook: changes of losses" in out
    assert "Share of sentences written anew that have the action aimed at" in out
    assert "+ the adapter has already given the LM" in out
    assert set(probed_copy.interventions().location) == {"plan"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--intervene.variant", "sft"], "intervene.variant"),
        (["--intervene.kinds", "erase", "codebook"], "is not conditioned on actions"),
        (["--intervene.sample", "3"], "unknown setting 'intervene.sample'; did you mean 'intervene.samples'"),
        (["--probe.layers", "1"], "unknown setting 'probe.layers'"),
    ],
)
def test_bad_input_is_refused_in_one_line(words: list[str], said: str, probed_copy: Run, capsys: Capture):
    assert said in refused(capsys, "intervene", probed_copy.folder, *FAST, "--quiet", *words)
    assert not (probed_copy.folder / "interventions").exists()


def test_a_run_without_probes_is_reported_the_command(tiny_run: Run, capsys: Capture, tmp_path: Path):
    line = refused(capsys, "intervene", tiny_run.folder)
    assert f"run `probekit probe {tiny_run.folder} --probe.variants none`" in line
    line = refused(capsys, "intervene", tmp_path / "nowhere")
    assert "does not exist; make one with `probekit train" in line
