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
import pandas as pd
import pytest

import probekit
from probekit.cli import main
from probekit.data.corpus import SPLITS
from probekit.errors import ProbekitError
from probekit.probing.probe import probe
from probekit.reports.lens import page
from probekit.reports.lens_reading import LensData, read_text
from probekit.reports.pages import symbols
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
    data = read_text(probed_run, f"{EVIL} Noni noni. \U0001f469\u200d\U0001f467 Mumi", ["soft", "none"])
    examples = {action: [EVIL] for action in data.examples}
    changed = {
        "names": dict.fromkeys(data.names, (EVIL, EVIL)),
        "words": dict.fromkeys(data.words, EVIL),
        "truth": replace(data.truth, words=EVIL),
        "notes": [EVIL],
    }
    return replace(
        data, examples=examples, facts=data.facts | {"Run": EVIL}, language='"><script>', **changed
    )


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4")


def test_whatever_is_shown_is_text(evil: LensData):
    written = page(evil)
    parsed = Parsed(written)
    assert parsed.tags.count("script") == 2
    assert not {"img", "a", "link", "iframe", "base", "object"} & set(parsed.tags)
    assert not {"src", "href", "onerror", "action", "srcset"} & parsed.attributes
    assert [shown for shown in parsed.tokens if shown != "·"] == [symbols(p) for p in evil.pieces if p]
    assert len(parsed.tokens) == len(evil.pieces)
    assert "alert(1)" not in parsed.scripts[1]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202e]", written)


def test_embedded_json_ends_nothing_and_says_the_same(evil: LensData):
    raw, _ = Parsed(page(evil)).scripts
    assert not set("<>&\u2028\u2029") & set(raw)
    data = json.loads(raw)
    assert data["examples"] == {str(action): [symbols(EVIL)] for action in evil.examples}
    assert data["first"] == evil.first_token.tolist()
    assert set(data["words"].values()) == {symbols(EVIL)}
    (soft, none), (reading, _) = data["variants"], evil.readings
    assert soft["conditioning"]["carried"] == reading.conditioning["carried"].tolist()
    assert none["conditioning"] is None


def test_numbers_survive_the_packing(evil: LensData):
    data = json.loads(Parsed(page(evil)).scripts[0])
    np.testing.assert_array_equal(unpacked(data["truth"]), evil.truth.labels.ravel())
    np.testing.assert_array_equal(unpacked(data["fitted"]), evil.truth.fitted.ravel())
    for shown, reading in zip(data["variants"], evil.readings, strict=True):
        np.testing.assert_array_equal(unpacked(shown["read"]), reading.read.ravel())
        np.testing.assert_array_equal(unpacked(shown["top"]), reading.top.ravel())
        np.testing.assert_array_equal(unpacked(shown["right"]), reading.of_true.ravel())
        for part in ("tokens", "probability"):
            np.testing.assert_array_equal(unpacked(shown["next"][part]), reading.next[part].ravel())


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
    shown, row = qualities(evil, quality)[0], quality.iloc[0]
    assert shown["value"] == [0.5, None, None]
    for name in ("documents", "examples", "injected"):
        assert shown[name] == row[name]


def qualities(data: LensData, quality: pd.DataFrame) -> list[dict[str, Any]]:
    """What the page says of the first variant's cells, if the table of results says so."""
    first = replace(data.readings[0], probes=replace(data.probes, quality=quality))
    written = page(replace(data, readings=[first, *data.readings[1:]]))
    return json.loads(Parsed(written).scripts[0])["variants"][0]["quality"]


def test_a_gain_is_the_paired_difference_of_the_results(probed_run: Run, evil: LensData):
    """Over the strongest baseline that needs no model; its interval holds for all cells together."""
    table = probed_run.probes().query("variant == 'soft'").set_index(["location", "layer", "distance"])
    cells = [(*point, distance) for point in evil.probes.points for distance in evil.probes.positions]
    for cell, shown in zip(cells, qualities(evil, evil.probes.quality), strict=True):
        row = table.loc[cell]
        expected = row[["gain", "gain_low", "gain_high"]].to_numpy(float)
        np.testing.assert_allclose(np.array(shown["gain"], float), expected, atol=1e-5)
        assert shown["over"] == ("" if row.injected else row.gain_over)
        assert shown["better"] == (row.gain_low > 0)


@pytest.mark.parametrize("gain", [(0.197, 0.065, 0.329), (0.1, -0.1, 0.3)])
def test_a_probe_is_better_by_its_gain_and_not_by_intervals_of_accuracies(
    gain: tuple[float, float, float], evil: LensData
):
    """The intervals of the accuracies overlap in both cases, as those of a real LM did."""
    accuracy = dict(zip(("accuracy", "accuracy_low", "accuracy_high"), (0.3, 0.2, 0.4), strict=True))
    gains = dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
    quality = evil.probes.quality.assign(**accuracy | gains, gain_over="bigram", injected=False)
    assert {shown["better"] for shown in qualities(evil, quality)} == {gain[1] > 0}


def test_white_space_hassymbols():
    assert symbols("a\tb\r\n\0\x85\u202e\u2028") == "a⇥b↩↵‹U+0000›‹U+0085›‹U+202E›↵"


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
    assert again.html == again.path.read_text("utf-8") == written
    assert again.save(tmp_path / "third.html").read_text("utf-8") == written
    with pytest.raises(ProbekitError, match=r"^--out .*third\.txt: must be a file that ends in \.html"):
        again.save(tmp_path / "third.txt")


def test_two_variants_by_the_command(probed_run: Run, tmp_path: Path, capsys: Capture):
    out = tmp_path / "page.html"
    words = ["lens", str(probed_run.folder), "--text", "Noni mumi.", "--variant", "soft", "none"]
    assert main([*words, "-o", str(out), "--quiet"]) == 0
    parsed = Parsed(out.read_text("utf-8"))
    assert [variant["name"] for variant in json.loads(parsed.scripts[0])["variants"]] == ["soft", "none"]


def test_the_page_is_in_the_run_and_inline_in_a_notebook(probed_run: Run, tmp_path: Path):
    folder = shutil.copytree(probed_run.folder, tmp_path / "run")
    shown = probekit.lens(folder, f"Some words. {EVIL}", quiet=True)
    assert shown.path == folder / "lens.html"
    assert shown.path.read_text("utf-8") == shown.html
    assert shown.html.endswith("</html>\n")
    assert repr(shown) == f"Lens({len(shown.data.pieces)} tokens, lens.html)"

    class Frames(HTMLParser):
        found: list[dict]

        def handle_starttag(self, tag: str, attrs: list) -> None:
            self.found.append({"tag": tag, **dict(attrs)})

    parser = Frames(convert_charrefs=True)
    parser.found = []
    parser.feed(shown._repr_html_())
    (frame,) = parser.found
    assert frame["tag"] == "iframe"
    assert frame["srcdoc"] == shown.html
    assert frame["sandbox"] == "allow-scripts"
    assert "src" not in frame


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


def test_a_page_of_labels_names_them(tiny_run: Run, quick_probes: dict[str, Any], tmp_path: Path):
    """Two classes as one signed scale, numbers on that of what was fitted, both with the run's own scores."""
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    corpus = Run.open(folder).corpus
    sentences = np.arange(len(corpus.first_token))
    document, sizes = (
        corpus.document_of(sentences),
        np.diff(np.append(corpus.first_token, len(corpus.tokens))),
    )
    table = {"document": document, "sentence": sentences - corpus.document_sentences[document]}
    table |= {"size": sizes / 3, "is <long>": np.where(sizes > np.median(sizes), "<b>", "&")}
    pd.DataFrame(table).to_csv(tmp_path / "labels.csv", index=False)
    settings = {"probe.layers": [1], "probe.variants": ["none"], "probe.labels": str(tmp_path / "labels.csv")}
    settings["probe.positions"] = ["last"]
    for target, kind in (("is <long>", "two"), ("size", "numbers")):
        found = probe(folder, quick_probes | settings | {"probe.target": target}, quiet=True)
        shown = probekit.lens(folder, "Noni mumi. Rata", quiet=True)
        data = json.loads(Parsed(shown.html).scripts[0])
        (row,) = found.table.query("reader == 'probe'").to_dict("records")
        (cell,) = data["variants"][0]["quality"]
        assert data["kind"] == kind
        assert data["baselines"]
        if kind == "two":
            assert data["names"] == {"0": ["&", "&"], "1": ["<b>", "<b>"]}
            assert "<h1>is &lt;long&gt;, read token by token</h1>" in shown.html
            assert (data["metric"], data["scale"]) == ("AUROC", [0, 1])
        else:
            fitted = sizes[corpus.sentences(corpus.documents("probe"))] / 3
            assert (data["metric"], data["names"]) == ("R²", {})
            np.testing.assert_allclose(data["scale"], [fitted.min(), fitted.max()])
        expected = [row[f"{'auroc' if kind == 'two' else 'r2'}{end}"] for end in ("", "_low", "_high")]
        np.testing.assert_allclose(cell["value"], expected, atol=1e-5)


def test_closed_form_probes_will_do(tiny_run: Run, quick_probes: dict[str, Any], tmp_path: Path):
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    settings = {"probe.layers": [1], "probe.variants": ["random"], "probe.solvers": ["lda", "ridge"]}
    probe(folder, quick_probes | settings | {"probe.seeds": [3, 2]}, quiet=True)
    written = probekit.lens(folder, "Some words. And others.", quiet=True).html
    assert "<dd>random</dd>" in written
    assert "ridge, seed 2, for action: one of 8 classes" in written
    assert json.loads(Parsed(written).scripts[0])["variants"][0]["conditioning"] is None
