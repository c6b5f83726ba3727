"""The report of interventions, subnetworks and checkpoints: every number, its commands, what to mind."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from read_reports import Page, read_html, read_markdown
from synthetic_probes import probe_table

from probekit.causal.intervene import rows
from probekit.causal.subnetwork import results_table
from probekit.data.corpus import FEW_DOCUMENTS
from probekit.io import read_json, write_json, write_table
from probekit.reports.checks import cautions_of
from probekit.reports.document import Table
from probekit.reports.report import report
from probekit.reports.report_causal import compared
from probekit.reports.report_findings import Findings
from probekit.reports.report_sections import stages
from probekit.reports.terminal import best_by_step, print_training
from probekit.run.run import Run

STEPS = (0, 7, 40)
DOCUMENTS = 50
"""More than are few."""

LOSSES = ("next_loss", "next_loss_over_random", "rest_loss_over_random")
FOLLOWED = ("plan_following", "plan_following_unedited", "plan_following_over_random")
ERASED = ("fitted_accuracy", "refitted_accuracy", "prior_accuracy")
SUBNETWORK_METRICS = ("first_loss", "rest_loss", "other_loss", "bits", "refitted_bits")


def sums(metrics: tuple[str, ...], documents: int, generator: np.random.Generator) -> dict:
    return {name: (generator.normal(0.3, 0.2, documents), np.ones(documents)) for name in metrics}


def interventions(variant: str, documents: int = DOCUMENTS) -> pd.DataFrame:
    """Conditions with what they are compared with: two distances, of which steering aims at an action."""
    generator, found = np.random.default_rng(len(variant)), []
    for kind, strengths in (("erase", [np.nan]), ("steer", [0.0, 2.0])):
        for distance in (2, 4):
            for strength in strengths:
                for condition in (kind, "random"):
                    head = {"kind": kind, "condition": condition, "strength": strength, "layer": 1}
                    head |= {"location": "hook_resid_post", "distance": distance, "readout_direct": True}
                    head |= {"injected": variant == "soft"}
                    measured = LOSSES if condition == kind else LOSSES[:1]
                    if condition == "erase":
                        measured += ERASED
                    own = sums(measured, documents, generator)
                    if kind == "steer":  # fewer sentences are written anew
                        own |= sums(FOLLOWED, documents - 5, generator)
                    found += rows(head, own, None, {"resamples": 100, "seed": 0})
    types = {"condition": "str", "strength": "float64", "layer": "Int64"}
    return pd.DataFrame(found).astype(types).assign(variant=variant)


def write_interventions(run: Run, variant: str, table: pd.DataFrame, **settings) -> None:
    folder = run.folder / "interventions" / variant
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "results.parquet", table)
    used = run.config.override({"intervene.variant": variant} | settings).model_dump(mode="json")
    write_json(folder / "settings.json", used | {"notes": [f"note on {variant}"]})


def write_subnetwork(run: Run, documents: int = DOCUMENTS, **settings) -> None:
    generator, folder = np.random.default_rng(5), run.folder / "subnetworks" / "none"
    folder.mkdir(parents=True, exist_ok=True)
    masks = np.zeros((5, 6), dtype=bool)  # whole, subnetwork, alone, two draws
    masks[1, [0, 3]] = masks[2, [0, 1]] = masks[3, [1, 3]] = masks[4, [2, 4]] = True
    own = {
        name: (generator.normal(1.0, 0.2, (len(masks), documents)), np.full(documents, 2.0))
        for name in SUBNETWORK_METRICS
    }
    table = results_table(own, masks, {"resamples": 100, "seed": 0}).assign(variant="none")
    write_table(folder / "results.parquet", table)
    names = [f"head {number}" for number in range(masks.shape[1])]
    write_table(folder / "mask.parquet", pd.DataFrame({"component": names, "removed": masks[1]}))
    write_table(folder / "candidates.parquet", pd.DataFrame({"penalty": [0.1], "chosen": [True]}))
    used = run.config.override(settings).model_dump(mode="json")
    write_json(folder / "settings.json", used | {"notes": ["a note on the mask"]})


def over_training(documents: int = DOCUMENTS) -> pd.DataFrame:
    parts = []
    for step in STEPS:
        part = probe_table(("none",), ("hook_resid_post",), horizons=(1,), solvers=("softmax",))
        # Another layer is best at every step.
        layer = part.layer.astype(float)
        part["validation_cross_entropy"] = np.where(layer == STEPS.index(step), 0.5, 1.0 + layer)
        parts.append(part.assign(step=step, documents=documents))
    return pd.concat(parts, ignore_index=True)


def write_over_training(run: Run, table: pd.DataFrame, **settings) -> None:
    used = run.config.override({"probe.variants": ["none"]} | settings).model_dump(mode="json")
    for step in STEPS:
        folder = run.checkpoints_of("lm") / f"step{step:07d}"
        (folder / "probes").mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", {"format": 1, "stages": {"lm": {"step": step}}})
        write_json(folder / "probes" / "settings.json", used | {"notes": ["a note on the steps"]})
    write_table(run.probes_file("lm"), table)


@pytest.fixture(scope="module")
def sound(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The trained run with made-up results that nothing speaks against; tests must not write into it."""
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("causal") / "copy"))
    write_interventions(run, "soft", interventions("soft"), **{"intervene.distances": [2, 4]})
    write_interventions(run, "none", interventions("none"))
    write_subnetwork(run, **{"subnetwork.steps": 3})
    write_over_training(run, over_training(), **{"probe.layers": [0, 2]})
    return run


@pytest.fixture
def run(sound: Run, tmp_path: Path) -> Run:
    """A copy that a test may change."""
    return Run.open(shutil.copytree(sound.folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def pages(sound: Run) -> tuple[Page, Page]:
    """Its report, read from both formats."""
    html, markdown = report(sound)
    return read_html(html.read_text("utf-8")), read_markdown(markdown.read_text("utf-8"))


def tables(page: Page, start: str, part: str = "") -> list[list[str]]:
    """All rows below captions that begin so, and have such a part."""
    named = [found for name, found in page.tables.items() if name.startswith(start) and part in name]
    return [row for found in named for row in found[1:]]


def shows(cell: str, values: tuple[float, float, float]) -> bool:
    """Whether a cell holds a value and its interval, rounded."""
    found = re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", cell)
    assert found, cell
    return all(
        abs(float(text) - value) <= 0.5000001 * 10 ** -len(text.partition(".")[2])
        for text, value in zip(found.groups(), values, strict=True)
    )


def cautions(run: Run) -> list[str]:
    """What is told beside the corpus's few documents."""
    damaged: dict[str, str] = {}
    told = cautions_of(Findings(run), damaged)
    assert not damaged
    return [line for line in told if not line.startswith("Only ")]


def test_both_formats_say_the_same_and_each_variant_has_its_section(pages: tuple[Page, Page]):
    html, markdown = pages
    for part in ("headings", "tables", "items", "code"):
        assert getattr(html, part) == getattr(markdown, part)
    assert [alt for alt, _ in html.pictures] == [alt for alt, _ in markdown.pictures]
    titles = [title for _, title in html.headings]
    own = ["Over training: lm", "Interventions: none", "Interventions: soft", "Subnetwork: none"]
    assert [title for title in titles if title in own] == own


@pytest.mark.parametrize("variant", ["none", "soft"])
@pytest.mark.parametrize(
    ("caption", "metrics"),
    [
        ("Changes of the next sentence's loss", LOSSES[1:]),
        ("Share of sentences written anew", FOLLOWED),
        ("Accuracy of a linear probe", ERASED),
    ],
)
def test_every_number_of_interventions(
    variant: str, caption: str, metrics: tuple[str, ...], pages: tuple[Page, Page]
):
    found = tables(pages[0], caption, f", variant {variant},")
    table = interventions(variant)
    wanted = table[table.condition.isin(["erase", "steer"]) & (table.metric == metrics[0])]
    assert len(found) == len(wanted) == {LOSSES[1]: 6, FOLLOWED[0]: 4, ERASED[0]: 2}[metrics[0]]
    for row in wanted.itertuples():
        condition = row.condition + ("" if np.isnan(row.strength) else f" × {row.strength:g}")
        words = [row.kind, f"resid post 1{'+' * (variant == 'soft')}", condition, str(row.distance)]
        (shown,) = (cells for cells in found if cells[:4] == words)
        for metric, cell in zip(metrics, shown[4:-1], strict=True):
            same = (table.strength == row.strength) | (np.isnan(row.strength) & table.strength.isna())
            same &= (table.kind == row.kind) & (table.condition == row.condition)
            (value,) = table[same & (table.distance == row.distance) & (table.metric == metric)].itertuples()
            assert shows(cell, (value.value, value.value_low, value.value_high))
        assert shown[-1] == str(DOCUMENTS - 5 if metrics is FOLLOWED else DOCUMENTS)


def test_conditions_that_are_compared_with_nothing_are_left_out():
    table = interventions("none")
    assert set(compared(table).condition) == {"erase", "steer"}
    assert set(compared(table).metric) == set(table.metric)
    assert compared(table[table.metric == "next_loss"]).empty


def test_every_number_of_a_subnetwork(sound: Run, pages: tuple[Page, Page]):
    found = {
        row[0]: row[1:] for row in tables(pages[0], "Without some of 6 components, on 50 test documents")
    }
    assert [*found] == ["nothing", "the subnetwork", "best alone", "random"]
    table = sound.subnetworks()
    columns = [f"{name}_change" for name in SUBNETWORK_METRICS[:3]] + [*SUBNETWORK_METRICS[3:]]
    for called, condition in zip(found, ("whole", "subnetwork", "alone", "random"), strict=True):
        own = table[(table.condition == condition) & table.draw.isna()].set_index("metric")
        removed, *cells = found[called]
        assert removed == ("0" if condition == "whole" else "2")
        for metric, cell in zip(columns, cells, strict=True):
            if metric in own.index:
                assert shows(cell, tuple(own.loc[metric, ["value", "value_low", "value_high"]]))
            else:
                assert (condition, cell) == ("whole", "")
    assert "The subnetwork (2 of 6): head 0, head 3" in pages[0].items
    assert any("the mean of 2 draws" in line for line in pages[0].items)
    for note in ("a note on the mask", "note on none", "note on soft"):
        assert note in pages[0].items


def test_the_best_layer_at_every_step(pages: tuple[Page, Page]):
    found = tables(pages[0], "The layer that is best on validation documents behind each step of lm")
    assert [row[:2] for row in found] == [[str(step), str(layer)] for layer, step in enumerate(STEPS)]
    table = over_training()
    for layer, (step, row) in enumerate(zip(STEPS, found, strict=True)):
        cell = (table.step == step) & (table.layer == layer) & (table.distance == 1)
        (own,) = table[cell & (table.reader == "probe")].itertuples()
        assert shows(row[2], (own.accuracy, own.accuracy_low, own.accuracy_high))
        assert shows(row[4], (own.gain, own.gain_low, own.gain_high))
    assert any(alt.startswith("Accuracy against training steps of lm") for alt, _ in pages[0].pictures)
    assert pages[0].items.count("a note on the steps") == 1


def test_the_best_layer_is_chosen_on_validation_documents():
    table = over_training()
    best = best_by_step(table)
    assert best.layer.tolist() == [0, 1, 2]
    assert set(best.distance) == {1}
    at_last = table[(table.step == STEPS[0]) & (table.reader == "probe") & (table.distance == 1)]
    assert at_last.loc[at_last.accuracy.idxmax()].layer != 0  # on test documents another is


def test_commands(pages: tuple[Page, Page]):
    assert pages[0].code[0].splitlines()[-4:] == [
        "probekit probe copy-again --checkpoints --stage lm --probe.layers 0 2",
        "probekit intervene copy-again --intervene.variant none",
        "probekit intervene copy-again --intervene.variant soft --intervene.distances 2 4",
        "probekit subnetwork copy-again --subnetwork.variant none --subnetwork.steps 3",
    ]


def test_other_variants_at_checkpoints_are_in_the_command(run: Run):
    write_over_training(run, over_training(), **{"probe.variants": ["none", "random"]})
    (file,) = report(run, run.folder / "r.md")
    commands = read_markdown(file.read_text("utf-8")).code[0]
    assert "--checkpoints --stage lm --probe.variants none random" in commands


# What to mind


def test_sound_results_are_not_suspected(run: Run):
    assert cautions(run) == []


@pytest.mark.parametrize("documents", [FEW_DOCUMENTS - 1, FEW_DOCUMENTS])
def test_few_documents(documents: int, run: Run):
    write_interventions(run, "soft", interventions("soft", documents + 5))  # sentences of fewer
    write_subnetwork(run, documents)
    write_over_training(run, over_training(documents))
    told = [line.partition(": only 39 test documents")[0] for line in cautions(run)]
    few = ["Probes over the training of lm", "Interventions in soft (steer)", "The subnetwork of none"]
    assert told == (few if documents < FEW_DOCUMENTS else [])


def test_what_was_trained_later(run: Run):
    facts = read_json(run.folder / "run.json")["stages"]
    now = (run.probes_file("lm")).stat().st_mtime + max(1.0, facts["adapter/soft"]["seconds"]) + 5
    os.utime(run.folder / "adapters" / "soft.safetensors", (now, now))
    (line,) = cautions(run)
    assert line.startswith("interventions/soft/results.parquet is older than adapter/soft")
    assert line.endswith("run `probekit intervene copy --intervene.variant soft` again")
    now += facts["lm"]["seconds"]
    for path in (run.folder / "lm").iterdir():
        os.utime(path, (now, now))
    assert sorted(line.split(":")[0] for line in cautions(run)) == [
        "checkpoints/lm/probes.parquet is older than lm",
        "interventions/none/results.parquet is older than lm",
        "interventions/soft/results.parquet is older than lm, adapter/soft",
        "subnetworks/none/results.parquet is older than lm",
    ]


def test_results_of_checkpoints_are_no_later_training(run: Run):
    now = (run.probes_file("lm")).stat().st_mtime + 10_000
    for path in (run.folder / "checkpoints").rglob("*.json"):
        os.utime(path, (now, now))
    assert cautions(run) == []


def test_checkpoints_that_were_kept_later(run: Run):
    table = over_training()
    write_table(run.probes_file("lm"), table[table.step != 7])
    (line,) = cautions(run)
    assert line.startswith(
        "checkpoints/lm/probes.parquet lacks checkpoints that were kept later, of steps 7;"
    )


@pytest.mark.parametrize(
    ("file", "lost"),
    [
        ("interventions/soft/results.parquet", "Interventions: soft"),
        ("subnetworks/none/mask.parquet", "Subnetwork: none"),
        ("checkpoints/lm/probes.parquet", "Over training: lm"),
    ],
)
def test_what_is_damaged_is_left_out_alone(file: str, lost: str, run: Run, pages: tuple[Page, Page]):
    path = run.folder / file
    path.write_bytes(path.read_bytes()[:-40])
    (again,) = report(run, run.folder / "r.html")
    page = read_html(again.read_text("utf-8"))
    assert [title for _, title in page.headings] == [t for _, t in pages[0].headings if t != lost]
    assert sum(f"{file.split('/')[0]}/" in line for line in page.items) == 1


# Checkpoints of an older version


def test_stages_that_do_not_tell_their_time(run: Run, capsys: pytest.CaptureFixture[str]):
    state = read_json(run.folder / "run.json")
    del state["stages"]["lm"]["seconds"]
    write_json(run.folder / "run.json", state)
    (block,) = stages(Findings(run))
    assert isinstance(block, Table)
    assert next(row for row in block.rows if row[0] == "lm")[1] == ""
    total = sum(facts.get("seconds", 0.0) for facts in state["stages"].values())
    assert f"{total:,.0f} seconds in all" in block.caption
    print_training(run)
    assert re.search(r"│ lm +│ +│", capsys.readouterr().out)
    assert cautions(run) == []
