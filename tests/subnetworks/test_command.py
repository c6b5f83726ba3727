"""`probekit subnetwork` as it is typed: what it prints, and one line for whatever is wrong."""

import pytest

from probekit.cli import main
from probekit.run import Run

FAST = ["--subnetwork.steps", "3", "--subnetwork.documents", "8", "--subnetwork.draws", "2"]
FAST += ["--subnetwork.penalties", "0.0", "--subnetwork.learning_rate", "2", "--evaluation.resamples", "100"]

Capture = pytest.CaptureFixture[str]


def typed(capsys: Capture, *words: object) -> tuple[int, str, str]:
    code = main(["subnetwork", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_it_ends_with_what_is_lost(masked_copy: Run, capsys: Capture):
    code, out, err = typed(capsys, masked_copy.folder, *FAST)
    assert code == 0
    assert "none: learn masks: done" in err
    table, mask = masked_copy.subnetworks(), masked_copy.subnetwork_masks()
    assert "Without some of 6 components, on 8 test documents" in out
    for name in ("nothing", "the subnetwork", "best alone", "random"):
        assert f"│ {name} " in out
    row = table[(table.condition == "subnetwork") & (table.metric == "refitted_bits")].iloc[0]
    assert f"{row.value:.3f} [{row.value_low:.3f}, {row.value_high:.3f}]" in out
    assert f"The subnetwork ({mask.removed.sum()} of 6)" in out
    assert "Only 8 test documents" in out
    assert f"All {len(table):,} rows: " in out


def test_help_explains_it(capsys: Capture):
    with pytest.raises(SystemExit, match="0"):
        main(["subnetwork", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Find the heads and parts of the adapter without which nothing is read" in said
    assert "--subnetwork.keep" in said
    assert "--probe.layers" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--subnetwork.variant", "joint"], "probekit probe"),
        (["--subnetwork.draws", "0"], "subnetwork.draws"),
        (["--subnetwork.step", "3"], "did you mean 'subnetwork.steps'"),
        (["--intervene.layers", "1"], "unknown setting 'intervene.layers'"),
    ],
)
def test_bad_input_is_refused_in_one_line(words: list[str], said: str, masked_copy: Run, capsys: Capture):
    code, out, err = typed(capsys, masked_copy.folder, *FAST, "--quiet", *words)
    assert (code, out) == (2, "")
    assert err.startswith("probekit: error: ")
    assert err.count("\n") == 1
    assert said in err
