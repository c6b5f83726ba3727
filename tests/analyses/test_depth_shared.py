"""Shared functions of the depth figures, where the scripts' own tests do not reach."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from depth_table1_parameters import draw
from matplotlib.backends.backend_agg import FigureCanvasAgg
from shared.depth import differences_of, layer_name, layer_style, training_curves

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.run.run import Run


def run_with(rows: list[dict[str, object]], folder: Path, seed: int) -> Run:
    """A folder that has the stage `depth/ensemble` and what was logged."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"format": 1, "stages": {"depth/ensemble": {}}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(folder, Config().override({"method": "depth-ensemble", "seed": seed}))


def row(step: int, loss: float, **more: float) -> dict[str, object]:
    return {"stage": "depth/ensemble", "step": step, "loss": 9.0, "ensemble_loss": loss, **more}


def test_the_mean_of_curves_is_of_steps_that_all_seeds_have(tmp_path: Path):
    first = [
        row(2, 4.0, **{"weight-1": 0.5}),
        row(4, 2.0, **{"weight-1": 0.7}),
        row(6, 0.0, **{"weight-1": 0.9}),
    ]
    noise = [{"stage": "depth/ensemble", "step": 4, "epoch": 1, "validation_loss": 7.0}]
    noise += [{"stage": "depth/plain", "step": 2, "ensemble_loss": 8.0}]
    runs = [run_with([*first, *noise], tmp_path / "a", 0), run_with(first[:2], tmp_path / "b", 1)]
    table = training_curves(runs, "ensemble", window=3)
    assert set(table.quantity) == {"ensemble_loss", "weight"}
    losses = table[table.quantity == "ensemble_loss"]
    assert losses.layer.isna().all()
    by_seed = {-1 if pd.isna(s) else s: rows for s, rows in losses.groupby("seed", dropna=False)}
    assert by_seed[0].smoothed.tolist() == [3.0, 2.0, 1.0]
    assert by_seed[1].smoothed.tolist() == [3.0, 3.0]
    assert by_seed[-1].step.tolist() == [2, 4]
    assert by_seed[-1].value.tolist() == [4.0, 2.0]
    assert set(table[table.quantity == "weight"].layer) == {-1}


def test_a_stage_that_logged_no_losses_of_layers_is_refused(tmp_path: Path):
    run = run_with([{"stage": "depth/ensemble", "step": 1, "loss": 1.0}], tmp_path / "old", 0)
    with pytest.raises(ProbekitError, match=r"metrics\.jsonl has no losses of depth/ensemble"):
        training_curves([run], "ensemble", 1)


def test_no_label_of_table_1_lies_on_another():
    kept = Path(__file__).parents[2] / "figures" / "depth_table1_parameters.csv"
    figure = draw(pd.read_csv(kept))
    FigureCanvasAgg(figure).draw()
    texts = []
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [text for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
        texts += [*axes.texts, *ticks, *axes.get_yticklabels(), axes.xaxis.label]
    texts = [text for text in texts if text.get_text()]
    boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in texts]
    for (a, one), (b, other) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not one.overlaps(other), f"{a.get_text()!r} and {b.get_text()!r}"
    assert len(texts) > 60


def test_layers_have_names_and_styles_of_their_own():
    numbers = range(-18, 0)
    assert len({layer_name(number) for number in numbers}) == len(numbers)
    assert len({tuple(layer_style(number).values()) for number in numbers}) == len(numbers)


def test_differences_are_those_of_the_whole_ratios():
    generator = np.random.default_rng(0)
    parts = [
        pd.DataFrame(
            {
                "metric": metric,
                "name": name,
                "seed": seed,
                "document": range(30),
                "sum": generator.integers(0, 5, 30),
                "count": np.arange(30) % 3 + 5,
            }
        )
        for metric in ("perplexity", "accuracy")
        for name in ("a", "b")
        for seed in (4, 7)
    ]
    table = differences_of(pd.concat(parts), [("a", "b"), ("b", "a")], resamples=100)
    found = table.assign(seed=table.seed.fillna(-1)).set_index(["metric", "first", "seed"])
    for metric, transform in (("perplexity", np.exp), ("accuracy", lambda ratio: ratio)):
        for seed in (4, 7, -1):
            value = {}
            for name in "ab":
                own = pd.concat(parts).query(
                    "metric == @metric and name == @name and (seed == @seed or @seed == -1)"
                )
                value[name] = transform(own["sum"].sum() / own["count"].sum())
            one, other = found.loc[(metric, "a", seed)], found.loc[(metric, "b", seed)]
            assert one.value == pytest.approx(value["a"] - value["b"])
            assert one.value_low < one.value < one.value_high
            assert other.value == pytest.approx(-one.value)
