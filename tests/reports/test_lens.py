"""`probekit lens` as it is typed: one page, or one line for whatever is wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import probekit
from probekit.cli import main
from probekit.io import read_json, write_json
from probekit.probing.probe import probe
from probekit.run.run import Run

Capture = pytest.CaptureFixture[str]


def test_a_page_is_written(probed_run: Run, tmp_path: Path, capsys: Capture):
    source, out = tmp_path / "text.txt", tmp_path / "page.html"
    source.write_text("Noni noni mumi. Rata noni.", "utf-8")
    words = ["lens", str(probed_run.folder), "--text", str(source), "-o", str(out), "--variant", "soft"]
    assert main([*words, "--layers", "2", "--locations", "hook_resid_post", "--quiet"]) == 0
    assert capsys.readouterr() == (f"The lens: {out}\n", "")
    written = out.read_text("utf-8")
    assert '"layer":2}]' in written
    assert written.count('"layer":') == 1
    again = probekit.lens(
        probed_run, source, tmp_path / "again.html", variant="soft", layers=[2], locations=["hook_resid_post"]
    )
    assert again.read_text("utf-8") == written


def test_the_page_is_in_the_run_if_not_said_otherwise(probed_run: Run, tmp_path: Path):
    folder = shutil.copytree(probed_run.folder, tmp_path / "run")
    assert probekit.lens(folder, "Some words.", quiet=True) == folder / "lens.html"
    assert (folder / "lens.html").read_text("utf-8").endswith("</html>\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--text", " "], "--text is blank: it has no sentence to read"),
        (["--text", "missing.txt"], "--text missing.txt: does not exist"),
        (["--text", "Some words.", "--limit", "2"], "more than --limit 2; shorten it, or raise that"),
        (["--text", "Some words.", "--limit", "0"], "--limit is 0;"),
        (["--text", "Some words.", "--variant", "joint"], "--variant is 'joint', of which "),
        (["--text", "Some words.", "--layers", "5"], "--layers has 5, where no probe reads"),
        (["--text", "Some words.", "--locations", "x"], "--locations has 'x', where no probe reads"),
        (["--text", "Some words.", "-o", "page.txt"], "--out page.txt: must be a file that ends in .html"),
        (["--text", "Some words.", "-o", "none/page.html"], "--out none/page.html: there is no folder none"),
        ([], "the following arguments are required: --text; see `probekit lens --help`"),
    ],
)
def test_bad_input_is_told_in_one_line(
    words: list[str],
    said: str,
    probed_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
):
    monkeypatch.chdir(tmp_path)
    assert main(["lens", str(probed_run.folder), *words, "--quiet"]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert said in line
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


def test_a_run_without_probes_says_which_command_makes_them(tiny_run: Run, capsys: Capture):
    assert main(["lens", str(tiny_run.folder), "--text", "Some words."]) == 2
    line = capsys.readouterr().err
    assert f"keeps no linear probes; run `probekit probe {tiny_run.folder}`" in line


def test_probes_for_something_else_are_refused(
    tiny_run: Run, quick_probes: dict[str, Any], tmp_path: Path, capsys: Capture
):
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    one = {"probe.layers": [0], "probe.variants": ["none"], "probe.target": "sentence-position"}
    probe(folder, quick_probes | one, quiet=True)
    assert main(["lens", str(folder), "--text", "Some words."]) == 2
    assert "read 'sentence-position' at every sentence" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation": 0.5},
        {"documents": {"0": {"test": "x"}}},
        {"documents": {}},
        {"probe": {"variants": ["fixed"]}},
        {"probe": {"distances": {"a": 1}}},
    ],
)
def test_a_record_of_something_else_is_told_in_one_line(
    change: dict[str, Any], probed_run: Run, tmp_path: Path, capsys: Capture
):
    folder = shutil.copytree(probed_run.folder, tmp_path / "run")
    record = folder / "probes" / "settings.json"
    write_json(record, read_json(record) | change)
    assert main(["lens", str(folder), "--text", "A word.", "--quiet"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "settings.json" in told
    assert f"probekit probe {folder}" in told


def test_closed_form_probes_will_do(tiny_run: Run, quick_probes: dict[str, Any], tmp_path: Path):
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    settings = {"probe.layers": [1], "probe.variants": ["random"], "probe.solvers": ["lda", "ridge"]}
    probe(folder, quick_probes | settings | {"probe.seeds": [3, 2]}, quiet=True)
    written = probekit.lens(folder, "Some words. And others.", quiet=True).read_text("utf-8")
    assert "<dd>random</dd>" in written
    assert "ridge, seed 2, for one of 8 actions" in written
    raw = written.split('id="data">')[1].split("</script>")[0]
    assert json.loads(raw)["told"] is None


def test_a_page_that_is_there_stays_where_the_text_is_bad(probed_run: Run, tmp_path: Path):
    out = tmp_path / "page.html"
    out.write_text("old", "utf-8")
    with pytest.raises(probekit.ProbekitError):
        probekit.lens(probed_run, "", out, quiet=True)
    assert out.read_text("utf-8") == "old"
