"""`probekit lens`: what it writes and refuses, and a page on which no text is ever markup."""

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import probekit
from probekit.cli import main
from probekit.data.corpus import SPLITS
from probekit.probing.probe import probe
from probekit.reports.lens import MISSING, _symbols, page
from probekit.reports.lens_reading import LensData, read_text
from probekit.run.run import Run

Capture = pytest.CaptureFixture[str]
EVIL = "<script>alert(1)</script> </script><img onerror=alert(2)> & \"'\u2028\u2029\x00\u202e <!-- ]]>"


class Parsed(HTMLParser):
    """Elements and texts of a page as a browser's parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict]] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.tokens: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag in ("script", "style", "span"):
            self.open.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")
        if tag == "span" and dict(attrs).get("role") == "option":
            self.tokens.append("")

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1][0] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1][1].get("role") == "option":
            self.tokens[-1] += data


@pytest.fixture(scope="module")
def evil(probed_run: Run) -> LensData:
    """A text, training sentences and facts that would be markup if they could."""
    data = read_text(probed_run, f"{EVIL} Noni noni. \U0001f469\u200d\U0001f467 Mumi", "soft")
    examples = {action: [EVIL] for action in data.examples}
    return replace(data, examples=examples, facts=data.facts | {"Run": EVIL}, language='"><script>')


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2")


def test_whatever_is_shown_is_text(evil: LensData):
    written = page(evil)
    parsed = Parsed(written)
    assert parsed.tags.count("script") == 2
    assert not {"img", "a", "link", "iframe", "base", "object"} & set(parsed.tags)
    assert not {"src", "href", "onerror", "action", "srcset"} & parsed.attributes
    assert [shown for shown in parsed.tokens if shown != "·"] == [_symbols(p) for p in evil.pieces if p]
    assert len(parsed.tokens) == len(evil.pieces)
    assert "alert(1)" not in parsed.scripts[1]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", written)


def test_embedded_json_ends_nothing_and_says_the_same(evil: LensData):
    raw, _ = Parsed(page(evil)).scripts
    assert not set("<>&\u2028\u2029") & set(raw)
    data = json.loads(raw)
    assert data["examples"] == {str(action): [_symbols(EVIL)] for action in evil.examples}
    assert data["first"] == evil.first_token.tolist()
    assert data["conditioning"]["carried"] == evil.conditioning["carried"].tolist()


def test_numbers_survive_the_packing(evil: LensData):
    data = json.loads(Parsed(page(evil)).scripts[0])
    np.testing.assert_array_equal(unpacked(data["top"]), evil.top.ravel())
    np.testing.assert_allclose(
        unpacked(data["read"]) / (MISSING - 1), evil.probability.ravel(), atol=0.6 / MISSING
    )
    right, true = unpacked(data["right"]), evil.true_probability.ravel()
    np.testing.assert_array_equal(right == MISSING, np.isnan(true))
    known = ~np.isnan(true)
    assert known.any()
    assert not known.all()
    np.testing.assert_allclose(right[known] / (MISSING - 1), true[known], atol=0.6 / MISSING)


def test_one_file_that_fetches_nothing(probed_run: Run, text: str):
    written = page(read_text(probed_run, text))
    for reference in ("http:", "https:", "src=", "href=", "url(", "@import", "fetch(", "innerHTML"):
        assert reference not in written
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in written
    for named in (
        "tiny",
        "none",
        "new GPT-2, 3 layers of width 32",
        "planted (160 documents)",
        "fitted on 32",
    ):
        assert named in written


def test_the_page_says_where_true_actions_come_from(probed_run: Run, document: int, text: str):
    split = SPLITS[probed_run.corpus.split[document]]
    own = f"The text is document {document:,} of the corpus, of the split &#39;{split}&#39;"
    nearest = "true action is the one whose centroid is nearest to it"
    of_corpus, other = (page(read_text(probed_run, given)) for given in (text, f"{text} And more."))
    assert own in of_corpus
    assert nearest not in of_corpus
    assert nearest in other
    assert own not in other


def test_an_interval_that_does_not_exist_is_null(evil: LensData):
    quality = evil.probes.quality.assign(accuracy=0.5, accuracy_low=np.nan, accuracy_high=np.nan)
    data = json.loads(Parsed(page(replace(evil, probes=replace(evil.probes, quality=quality)))).scripts[0])
    first = quality.iloc[0]
    assert data["quality"][0][:4] == [[0.5, None, None], first.documents, first.examples, first.injected]


def test_a_gain_is_the_paired_difference_of_the_results(probed_run: Run, evil: LensData):
    """Over the strongest baseline that needs no model; its interval holds for all cells together."""
    table = probed_run.probes().query("variant == 'soft'").set_index(["location", "layer", "distance"])
    data = json.loads(Parsed(page(evil)).scripts[0])
    cells = [(*point, distance) for point in evil.probes.points for distance in evil.probes.distances]
    for cell, (*_, gain, over, better) in zip(cells, data["quality"], strict=True):
        row = table.loc[cell]
        expected = row[["gain", "gain_low", "gain_high"]].to_numpy(float)
        np.testing.assert_allclose(np.array(gain, float), expected, atol=1e-5)
        assert over == ("" if row.injected else row.gain_over)
        assert better == (row.gain_low > 0)


@pytest.mark.parametrize("gain", [(0.197, 0.065, 0.329), (0.1, -0.1, 0.3)])
def test_a_probe_is_better_by_its_gain_and_not_by_intervals_of_accuracies(
    gain: tuple[float, float, float], evil: LensData
):
    """The intervals of the accuracies overlap in both cases, as those of a real LM did."""
    accuracy = dict(zip(("accuracy", "accuracy_low", "accuracy_high"), (0.3, 0.2, 0.4), strict=True))
    gains = dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
    probes = evil.probes
    baselines = {name: rows.assign(**accuracy) for name, rows in probes.baselines.items()}
    quality = probes.quality.assign(**accuracy | gains, gain_over="bigram", injected=False)
    data = replace(evil, probes=replace(probes, quality=quality, baselines=baselines))
    rows = json.loads(Parsed(page(data)).scripts[0])["quality"]
    assert {row[-1] for row in rows} == {gain[1] > 0}


def test_white_space_has_symbols():
    assert _symbols("a\tb\r\n\0\x85\u202e\u2028") == "a⇥b↩↵‹U+0000›‹U+0085›‹U+202E›↵"


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
def test_bad_input_is_refused_in_one_line(
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
    assert "read 'sentence-position' (probe.anchors start)" in capsys.readouterr().err


def test_closed_form_probes_will_do(tiny_run: Run, quick_probes: dict[str, Any], tmp_path: Path):
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    settings = {"probe.layers": [1], "probe.variants": ["random"], "probe.solvers": ["lda", "ridge"]}
    probe(folder, quick_probes | settings | {"probe.seeds": [3, 2]}, quiet=True)
    written = probekit.lens(folder, "Some words. And others.", quiet=True).read_text("utf-8")
    assert "<dd>random</dd>" in written
    assert "ridge, seed 2, for one of 8 actions" in written
    raw = written.split('id="data">')[1].split("</script>")[0]
    assert json.loads(raw)["conditioning"] is None
