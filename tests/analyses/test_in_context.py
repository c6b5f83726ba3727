"""The script trains two tiny LMs, draws the mean of what they know of a query, and does not do it again."""

from pathlib import Path

import in_context
import pandas as pd
import pytest

from probekit.io import read_table

TINY = {
    "corpus.planted.documents": "80",
    "corpus.planted.examples": "3",
    "lm.layers": "3",
    "lm.width": "16",
    "lm.heads": "2",
    "lm.vocabulary": "300",
    "training.lm.epochs": "0.5",
    "probe.max_iterations": "20",
    "planner.width": "16",
    "actions.dimensions": "8",
}


def test_the_script_draws_the_mean_over_seeds(tmp_path: Path):
    out, runs = tmp_path / "in_context.png", tmp_path / "runs"
    words = [word for setting in TINY.items() for word in ("--set", *setting)]
    words += ["--seeds", "2", "--runs", str(runs), "--out", str(out)]
    in_context.main(words)
    numbers = pd.read_csv(out.with_suffix(".csv"))
    key = ["measure", "condition", "examples", "reader"]
    found = numbers.set_index(key).value.sort_index()
    seeds = [read_table(runs / f"seed{seed}" / "in_context" / "results.parquet") for seed in (0, 1)]
    one, two = (table.set_index(key).value.sort_index() for table in seeds)
    pd.testing.assert_series_equal(found, (one + two) / 2)
    exact = found.index.get_level_values("reader").str.startswith("exact")
    pd.testing.assert_series_equal(one[exact], two[exact])
    assert one.loc["word_loss", "same type", 2, "LM"] != two.loc["word_loss", "same type", 2, "LM"]
    assert (numbers.seeds == 2).all()
    made = {file: file.stat().st_mtime_ns for file in runs.rglob("*.parquet")}
    out.unlink()
    in_context.main(words)
    assert out.exists()
    assert made == {file: file.stat().st_mtime_ns for file in runs.rglob("*.parquet")}
    assert str(tmp_path) not in out.with_suffix(".json").read_text(), "paths mean nothing on another machine"


def test_every_reader_is_drawn_in_the_row_of_its_measure():
    key = {"condition": "same type", "examples": [0, 1], "value": 1.0, "value_low": 0.9, "value_high": 1.1}
    table = pd.concat(
        [
            pd.DataFrame(key | {"measure": measure, "reader": reader})
            for measure in in_context.MEASURES
            for reader in in_context.STYLES
        ]
    )
    figure = in_context.draw(table)
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == [*in_context.STYLES]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*in_context.STYLES]
    assert figure.axes[0].get_ylim()[0] < 0.9 < 1.1 < figure.axes[0].get_ylim()[1] == pytest.approx(1.12)
