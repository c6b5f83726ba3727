"""`probekit evaluate` as it is typed: what it writes is what it prints."""

import json
from pathlib import Path

from read_tables import rows_of, shows
from running import Capture, printed, refused

from probekit.io import read_json
from probekit.run.run import Run


def test_evaluating_writes_and_prints_the_same_numbers(capsys: Capture, copy: Path):
    out = printed(capsys, "evaluate", copy, "--evaluation.resamples", "150", "--device", "cpu", "--quiet")
    written = json.loads((copy / "evaluation.json").read_text())
    assert written["settings"]["resamples"] == 150
    assert [row["variant"] for row in written["perplexity"]] == [
        "none", "fixed", "oracle", "oracle", "predicted", "soft", "joint",
    ]  # fmt: skip
    for row in written["perplexity"]:
        words = [row["variant"], row["actions"]]
        (cell,) = [cells[2] for cells in rows_of(out) if cells[:2] == words and len(cells) == 4]
        assert shows(cell, (row["perplexity"], row["perplexity_low"], row["perplexity_high"]))
    assert Run.open(copy).config.evaluation.resamples == 200, "a setting of one evaluation is not the run's"


def test_generated_text_is_measured_behind_perplexity(capsys: Capture, copy: Path):
    words = ["evaluate", copy, "--quiet", "--generation", "--generation.prompts", "4"]
    words += ["--generation.lengths", "8", "16", "--generation.samples", "3", "--evaluation.resamples", "100"]
    text = printed(capsys, *words)
    titles = ["Perplexity per token on", "Generated continuations of 8", "Generated continuations of 16"]
    titles += [
        "Generated samples of 16 tokens",
        "Sentences that have the action",
        "No MAUVE: it needs 50 texts",
    ]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    found = read_json(copy / "generation.json")
    assert found["settings"]["lengths"] == [8, 16]
    line = refused(capsys, *words, "--generation.lengths", "4000")  # before perplexity, which prints
    assert "lower generation.lengths or generation.context" in line
