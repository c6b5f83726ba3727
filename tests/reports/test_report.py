"""The report: every number that the run has, the same in both formats, and text from a corpus as it is."""

import base64
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import synthetic_results as made
from read_reports import Page, read_html, read_markdown
from read_tables import rounds, shows
from synthetic_probes import probe_table

import probekit.reports.report
from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.evaluation.evaluate import evaluate
from probekit.generation.evaluate import evaluate_generation
from probekit.io import read_json, write_json
from probekit.probing.probe import ProbeResults, probe
from probekit.reports import tables
from probekit.reports.display import Table
from probekit.reports.report import Picture, Section, render, report
from probekit.run.run import Run

TITLES = [
    *("Report on full", "What to mind", "What it is", "Corpus", "Perplexity", "Planners", "Generated text"),
    *("Probes", "Over training: lm", "Continuation", "Interventions: none", "Interventions: soft"),
    *("Subnetwork: none", "Stages", "Training", "How to reproduce it", "Settings"),
]

HOSTILE = (
    "<script>alert(1)</script>",
    "| a | b |",
    "`code` and ``more``",
    "# heading",
    "- item",
    "1. first",
    "---",
    "===",
    "> quote",
    "+ more",
    "*bold* _em_ **x** __y__ ~~z~~",
    "[link](http://evil.example) ![pic](http://evil.example/p.png)",
    "[ref]: http://evil.example",
    "<http://evil.example>",
    "&amp; &lt; &#35; \\| \\",
    "</details></table></section>",
    "\"quotes\" 'and' <!-- comment -->",
    "    indented",
    "$x^2$ {{ y }} {% z %}",
    "hook_resid_post _a_ snake_case_",
    "bell\x07 colour\x1b[31m turned\u202eover",
    "lone \udc80 surrogate",
    "no-break\u00a0space",
)


def shown(text: str) -> str:
    """What a reader is to see of a text."""
    return "".join(f"‹U+{ord(c):04X}›" if c in "\x07\x1b\u202e\udc80" else c for c in text).strip()


@pytest.fixture(scope="module")
def full(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has everything; tests must not write into it."""
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("reported") / "full"))
    evaluate(run, quiet=True)
    few = {
        "generation.prompts": 5,
        "generation.samples": 4,
        "generation.lengths": [6],
        "generation.context": 8,
    }
    evaluate_generation(run, few | {"evaluation.resamples": 100}, quiet=True)
    grid = {"probe.layers": [0, 2], "probe.variants": ["none", "soft"], "probe.l2": [0.01]}
    quick = {"probe.code_length": False, "probe.max_iterations": 2, "evaluation.resamples": 100}
    probe(run, grid | quick, quiet=True)
    drawing = {"continuation.layers": [1], "seed": 3, "generation.temperature": 0.5}
    made.write_continuation(run, **drawing, **{"generation.prompts": 7})
    made.write_interventions(run, "soft", **{"intervene.distances": [2, 4]})
    made.write_interventions(run, "none")
    made.write_subnetwork(run, **{"subnetwork.steps": 3})
    made.write_over_training(run, made.over_training(), **{"probe.layers": [0, 2]})
    return run


@pytest.fixture(scope="module")
def written(full: Run) -> tuple[Page, Page]:
    """Its report, read from both formats."""
    html, markdown = report(full)
    return read_html(html.read_text("utf-8")), read_markdown(markdown.read_text("utf-8"))


@pytest.fixture
def copy(full: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A copy that a test may change; its pictures, which take long, are not drawn."""
    monkeypatch.setattr(probekit.reports.report, "svg_of", lambda figure: b"<svg/>")
    return Run.open(shutil.copytree(full.folder, tmp_path / "copy"))


def rows_below(page: Page, caption: str, words: list[str]) -> list[list[str]]:
    """The rows of tables whose captions begin so, after the words with which the rows begin."""
    tables = [rows for name, rows in page.tables.items() if name.startswith(caption)]
    return [row[len(words) :] for rows in tables for row in rows if row[: len(words)] == words]


def holds(page: Page, caption: str, words: list[str], values: tuple[float, float, float]) -> bool:
    """Whether a table has a row that begins with some words and has the values, rounded, in one cell."""
    (row,) = rows_below(page, caption, words)
    return any(shows(cell, values) for cell in row)


def bounds(row: pd.Series, name: str) -> tuple[float, float, float]:
    return row[name], row[f"{name}_low"], row[f"{name}_high"]


# What it says


def test_every_table_of_the_results_is_there(full: Run, written: tuple[Page, Page]):
    """Their numbers are tested with the tables and with what the terminal prints, which is the same."""
    found = {name: pd.DataFrame(rows) for name, rows in full.evaluation().items() if name != "settings"}
    probes, generated = full.probes(), pd.DataFrame(full.generation_metrics()["metrics"])
    shown = [
        *tables.corpus_tables(full.corpus),
        *tables.perplexity_tables(found["perplexity"], found["differences"]),
        tables.planner_table(found["planner"]),
        *tables.generation_tables(generated.astype({"value": float})),
        *tables.probe_tables(probes, ProbeResults(probes, full.folder).best_cells()),
        tables.over_training_table(made.over_training(), "lm"),
        *tables.continuation_tables(made.continuation()),
        tables.subnetwork_table(made.subnetwork()),
        tables.stages_table(full.stages),
    ]
    for page in written:
        for table in shown:
            rows = [[*table.cells.columns], *table.cells.to_numpy().tolist()]
            assert page.tables[table.caption] == [[cell.strip() for cell in row] for row in rows]


def test_what_the_run_is(full: Run, written: tuple[Page, Page]):
    page = written[0]
    facts = dict(page.tables["The run"][1:])
    corpus = full.corpus.facts
    assert facts["fingerprint of the corpus"] == corpus["fingerprint"]
    assert facts["vocabulary"] == f"{corpus['vocabulary']:,}"
    whole = page.tables["Corpus by split"][-1]
    assert whole == ["all", "160", f"{corpus['sentences']:,}", f"{corpus['tokens']:,}"]
    stages = next(rows for name, rows in page.tables.items() if name.startswith("Training stages"))
    assert [row[0] for row in stages[1:]] == [*read_json(full.folder / "run.json")["stages"]]
    losses = next(rows for name, rows in page.tables.items() if name.startswith("Losses"))
    metrics = full.metrics()
    for stage, steps, first, *_, lowest in losses[1:]:
        own = metrics[metrics.stage == stage]
        assert steps == f"{own.step.max():,}"
        assert rounds(first, own.loss.dropna().iloc[0])
        assert rounds(lowest, own.validation_loss.min())


def test_how_to_reproduce_it(full: Run, written: tuple[Page, Page]):
    commands = written[0].code[0].splitlines()
    origin = read_json(full.folder / "provenance.json")
    assert commands[-8:] == [
        "probekit train --config full/config.yaml --out full-again",
        "probekit evaluate full-again --generation --evaluation.resamples 100 --generation.prompts 5 "
        "--generation.context 8 --generation.lengths 6 --generation.samples 4",
        "probekit probe full-again --evaluation.resamples 100 --probe.variants none soft --probe.layers 0 2 "
        "--probe.l2 0.01 --probe.max_iterations 2 --probe.code_length false",
        "probekit probe full-again --checkpoints --stage lm --probe.layers 0 2",
        "probekit continuation full-again --seed 3 --generation.temperature 0.5 --continuation.layers 1",
        "probekit intervene full-again --intervene.variant none",
        "probekit intervene full-again --intervene.variant soft --intervene.distances 2 4",
        "probekit subnetwork full-again --subnetwork.variant none --subnetwork.steps 3",
    ]
    where = written[0].tables["Where it was made"]
    for name, version in origin["versions"].items():
        assert [name, version] in where
    assert ["device", "cpu"] in where
    assert ["seed of the corpus", "0"] in where
    assert written[0].code[-1] == full.config.to_yaml().strip()


@pytest.mark.parametrize("variant", ["none", "soft"])
def test_interventions_that_are_compared_with_random_ones(variant: str, written: tuple[Page, Page]):
    table = made.interventions(variant)
    over = table[table.metric == "next_loss_over_random"]
    compared = table.merge(over[["kind", "condition"]].drop_duplicates())  # controls are in the run's folder
    for distance in (2, 4):
        for shown in tables.intervention_tables(compared[compared.distance == distance]):
            rows = [[*shown.cells.columns], *shown.cells.to_numpy().tolist()]
            assert written[0].tables[shown.caption] == rows


def test_subnetworks_and_checkpoints(written: tuple[Page, Page]):
    page = written[0]
    assert len(rows_below(page, "Without some of 6 components, on 50 test documents", [])) == 5
    assert len(rows_below(page, "Best layer after each step of lm", [])) == 1 + len(made.STEPS)
    assert "The subnetwork (2 of 6): head 0, head 3" in page.items
    for note in (
        "a note on what was written",
        "a note on the mask",
        "note on none",
        "note on soft",
        "a note on the steps",
    ):
        assert page.items.count(note) == 1
    assert any(alt.startswith("Accuracy against training steps of lm") for alt, _ in page.pictures)


# In both formats


def test_both_formats_say_the_same(written: tuple[Page, Page]):
    html, markdown = written
    for part in ("headings", "tables", "items", "code"):
        assert getattr(html, part) == getattr(markdown, part)
    assert [alt for alt, _ in html.pictures] == [alt for alt, _ in markdown.pictures]


def test_headings_are_in_order_and_every_section_is_there(written: tuple[Page, Page]):
    levels = [level for level, _ in written[0].headings]
    assert levels == [1, *[2] * (len(levels) - 1)]
    assert [title for _, title in written[0].headings] == TITLES


def test_the_page_needs_nothing_from_elsewhere(full: Run, written: tuple[Page, Page]):
    text = (full.folder / "report.html").read_text("utf-8")
    assert not re.search(r"https?:|url\(|@import|<script|<link|\son\w+=", text)
    page = written[0]
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    anchors = re.findall(r'\sid="([^"]+)"', text)
    assert len(anchors) == len(set(anchors))
    assert {link[1:] for link in page.links if link.startswith("#")} == set(anchors)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_pictures_are_the_same_in_both(full: Run, written: tuple[Page, Page]):
    html, markdown = written
    assert len(html.pictures) == 5
    for (alt, source), (_, file) in zip(html.pictures, markdown.pictures, strict=True):
        assert len(alt) > 20
        svg = (full.folder / file).read_bytes()
        assert base64.b64decode(source.partition(",")[2]) == svg
        assert svg.startswith(b"<?xml")


def test_the_same_run_gives_the_same_bytes(full: Run, written: tuple[Page, Page], tmp_path: Path):
    for name in ("report.html", "report.md"):
        (again,) = report(full, tmp_path / name)
        assert again.read_bytes() == (full.folder / name).read_bytes()
    pictures = sorted((tmp_path / "figures").iterdir())
    assert len(pictures) == len(written[1].pictures)
    for path in pictures:
        assert path.read_bytes() == (full.folder / "figures" / path.name).read_bytes()


# Text from elsewhere


def test_hostile_text_shows_as_it_is():
    cells = pd.DataFrame({"<i>name</i>": HOSTILE, "a|b": HOSTILE, "# c": "1"}, dtype=object)
    section = Section(
        "<b>&</b>",
        HOSTILE[0],
        code="```\n</code></pre><script>\n````",
        language="sh",
        pictures=[Picture("p", "cap <b>*x*</b>", "alt ] [x](http://evil.example) <b> \" '", b"<svg/>")],
        tables=[Table("|cap` <b>tion</b>", cells), Table("<b>fold</b> & more", cells, folded=True)],
        notes=HOSTILE,
    )
    sections = [section, *(Section(f"s{number}", text) for number, text in enumerate(HOSTILE))]
    files = Path("r.html"), Path("r.md")
    html, markdown = (render("<title> `x` | #", HOSTILE, sections, file) for file in files)
    calm = read_html(render("x", [], [], files[0]))
    wanted = [shown(text) for text in HOSTILE]
    for page in (read_html(html), read_markdown(markdown)):
        assert [title for _, title in page.headings][:3] == ["<title> `x` | #", "What to mind", "<b>&</b>"]
        assert page.items == [*wanted, *wanted]
        assert page.paragraphs[-len(wanted) :] == wanted
        for caption in ("|cap` <b>tion</b>", "<b>fold</b> & more"):
            assert page.tables[caption] == [
                ["<i>name</i>", "a|b", "# c"],
                *([text, text, "1"] for text in wanted),
            ]
        assert page.code == ["```\n</code></pre><script>\n````"]
        (picture,) = page.pictures
        assert picture[0] == "alt ] [x](http://evil.example) <b> \" '"
        assert not any("evil" in link for link in page.links)
        known = {"ul", "li", "p", "table", "thead", "tbody", "tr", "th", "td", "img", "pre", "code", "a"}
        known |= {"h1", "h2", "details", "summary", "caption", "figure", "figcaption", "strong", "em", "div"}
        assert page.tags <= known | calm.tags
        assert "script" not in page.tags


def test_a_label_that_is_markup_shows_as_text(copy: Run):
    label = "<script>| a |`b`"
    path = copy.folder / "probes" / "results.parquet"
    table = probe_table(("none",), ("hook_resid_post",), horizons=(1,), solvers=("softmax",))
    table.assign(target=label, shortfall=0.1, shortfall_high=0.2).to_parquet(path)
    settings = read_json(copy.folder / "probes" / "settings.json")
    write_json(copy.folder / "probes" / "settings.json", settings | {"cautions": [f"# note of {label}"]})
    html, markdown = report(copy)
    for page in (read_html(html.read_text("utf-8")), read_markdown(markdown.read_text("utf-8"))):
        assert f"Probes: # note of {label}" in page.items
        assert any(text.startswith(f"Probes of {label} on 200 test examples") for text in page.paragraphs)
        assert "script" not in page.tags


# Runs that lack something


def test_a_run_that_is_only_trained(tiny_run: Run, tmp_path: Path):
    (file,) = report(tiny_run, tmp_path / "r.html")
    titles = [title for _, title in read_html(file.read_text("utf-8")).headings[1:]]
    assert titles == [
        "What to mind",
        "What it is",
        "Corpus",
        "Stages",
        "Training",
        "How to reproduce it",
        "Settings",
    ]


def test_a_run_that_is_hardly_begun(tiny_config: Config, tmp_path: Path):
    run = Run.begin(tmp_path / "run", tiny_config)
    page = read_html(report(run)[0].read_text("utf-8"))
    assert any("not finished: corpus, lm, planner, adapter/fixed" in line for line in page.items)
    assert "Perplexity" not in [title for _, title in page.headings]


def test_a_calm_run_says_so():
    for name, read in (("r.html", read_html), ("r.md", read_markdown)):
        page = read(render("x", [], [], Path(name)))
        assert page.paragraphs == ["Nothing was found that speaks against the results."]


def test_multiple_choice_of_an_ensemble(copy: Run):
    row = {"variant": "ensemble, layer 2", "questions": 40, "documents": 20, "accuracy": 0.5, "chance": 0.25}
    row |= {"accuracy_low": 0.41, "accuracy_high": 0.58}
    difference = {"first": "none", "second": "ensemble", "documents": 20, "difference": -0.25}
    difference |= {"difference_low": -0.5, "difference_high": 0.125}
    found = copy.evaluation()
    del found["planner"]
    tables = {"accuracy": [row], "accuracy_differences": [difference]}
    write_json(copy.folder / "evaluation.json", found | tables)
    run = Run(copy.folder, copy.config.override({"method": "depth-ensemble"}))
    (file,) = report(run, copy.folder / "r.html")
    page = read_html(file.read_text("utf-8"))
    assert "Planners" not in [title for _, title in page.headings]
    assert holds(page, "Multiple choice: 40 questions", ["ensemble, layer 2"], bounds(row, "accuracy"))
    assert holds(page, "Differences of accuracy", ["none", "ensemble"], bounds(difference, "difference"))
    assert "depth ensemble" in page.paragraphs[0]


def test_a_damaged_file_is_refused_in_one_line(copy: Run):
    path = copy.folder / "evaluation.json"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ProbekitError, match=r"^[^\n]*evaluation\.json[^\n]*$"):
        report(copy, copy.folder / "r.html")


# Bad input


@pytest.mark.parametrize("out", ["report", "report.pdf", "md"])
def test_another_suffix_is_refused(out: str, tiny_run: Run, tmp_path: Path):
    with pytest.raises(ProbekitError, match=r"-o is .* it must end in \.html or \.md"):
        report(tiny_run, tmp_path / out)
    assert not list(tmp_path.iterdir())


def test_only_the_file_that_is_asked_for(copy: Run, tmp_path: Path):
    before = sorted(copy.folder.rglob("*"))
    assert report(copy, tmp_path / "new" / "r.html") == [tmp_path / "new" / "r.html"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["r.html"]
    assert sorted(copy.folder.rglob("*")) == before
