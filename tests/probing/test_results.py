"""The table of results against each number worked out by hand from sums by document."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest

from probekit.probing.results import COLUMNS, METRICS, Row, Tally, table_of
from probekit.statistics import Resampling, bootstrap_ratio, simultaneous_ratios

COUNTS = np.array([9, 4, 12, 7, 8, 3, 10, 6, 5, 11])
RESAMPLING = Resampling(resamples=300, seed=4)
DISTANCES, HORIZONS = (1, 2), (1, 3)
FREE = {"prior": 2.0, "bigram": 1.6, "skip n-gram": 1.8}
"""Model-free baselines and what each loses on the test, in nats."""


def sums_of(loss: float, readers: int, generator: np.random.Generator, *, control: bool) -> dict[str, Any]:
    shape = len(COUNTS), readers
    correct = generator.binomial(COUNTS[:, None], 0.4, size=shape).astype(float)
    sums = {
        "correct": correct,
        "top5": np.minimum(COUNTS[:, None], correct + 2),
        "cross_entropy": COUNTS[:, None] * (loss + 0.2 * generator.normal(size=shape)),
    }
    if control:
        sums["control_correct"] = generator.binomial(COUNTS[:, None], 0.2, size=shape).astype(float)
    return sums


def tally(heads: list[Row], loss: float, generator: np.random.Generator, *, control: bool = False) -> Tally:
    made = Tally(heads, len(COUNTS))
    made.sums = sums_of(loss, len(heads), generator, control=control)
    return made


def make_tallies(seed: int = 0, **validation: float) -> list[Tally]:
    """Baselines, and probes at two layers in two variants; that of soft at layer 1 is injected."""
    generator = np.random.default_rng(seed)
    known = {"prior": 2.1, "bigram": 1.7, "skip n-gram": 1.9} | validation
    made = []
    for horizon, distance in itertools.product(HORIZONS, DISTANCES):
        cell = {"distance": distance, "horizon": horizon}
        for reader, loss in FREE.items():
            head = {"reader": reader, "validation_cross_entropy": known[reader]} | cell
            made.append(tally([head], loss, generator))
        made.append(tally([{"reader": "planner"} | cell], 1.2, generator))
        made.append(tally([{"reader": "ceiling (tokens read)"} | cell], 1.0, generator))
    for variant in ("soft", "none"):
        for horizon in reversed(HORIZONS):
            heads = [
                {"reader": "probe", "solver": "softmax", "variant": variant, "seed": 7}
                | {"location": "hook_resid_post", "layer": layer, "distance": distance, "horizon": horizon}
                | {"injected": variant == "soft" and layer == 1 and distance == 1, "constant": False}
                | {"l2": 0.1, "iterations": 9, "converged": True, "validation_cross_entropy": 1.5}
                | {"fitted_on": 400, "code_length": 1.5, "compression": 2.0}
                for layer in (1, 0)
                for distance in DISTANCES
            ]
            made.append(tally(heads, 1.5, generator, control=True))
    return made


EMPTY: list[Row] = [
    {"reader": "probe", "solver": "softmax", "variant": "none", "seed": 7, "location": "hook_resid_post"}
    | {"layer": layer, "distance": 9, "horizon": 1, "examples": 3}
    for layer in (0, 1)
]


@pytest.fixture(scope="module")
def tallies() -> list[Tally]:
    return make_tallies()


@pytest.fixture(scope="module")
def table(tallies: list[Tally]) -> pd.DataFrame:
    return table_of(tallies, COUNTS, EMPTY, RESAMPLING)


def sums_by_row(tallies: list[Tally]) -> dict[tuple[Any, ...], tuple[Row, dict[str, np.ndarray]]]:
    """Head and sums of every row, by what names it."""
    found = {}
    for one in tallies:
        for number, head in enumerate(one.heads):
            key = head["reader"], head.get("variant"), head.get("layer"), head["distance"], head["horizon"]
            found[key] = head, {name: sums[:, number] for name, sums in one.sums.items()}
    return found


def row_of(table: pd.DataFrame, key: tuple[Any, ...]) -> pd.Series:
    reader, variant, layer, distance, horizon = key
    rows = table[(table.reader == reader) & (table.distance == distance) & (table.horizon == horizon)]
    if variant is not None:
        rows = rows[(rows.variant == variant) & (rows.layer == layer)]
    ((_, row),) = rows.iterrows()
    return row


def test_every_metric_and_its_interval(table: pd.DataFrame, tallies: list[Tally]):
    rows = sums_by_row(tallies)
    for key, (_, sums) in rows.items():
        row = row_of(table, key)
        prior = rows["prior", None, None, *key[3:]][1]
        measured = {METRICS[score]: sums[score] for score in METRICS}
        measured["bits"] = (prior["cross_entropy"] - sums["cross_entropy"]) / np.log(2)
        if "control_correct" in sums:
            measured["selectivity"] = sums["correct"] - sums["control_correct"]
            assert row.control_accuracy == pytest.approx(sums["control_correct"].sum() / COUNTS.sum())
        else:
            assert np.isnan([row.selectivity, row.selectivity_low, row.control_accuracy]).all()
        if key[0] == "probe":
            ceiling = rows["ceiling (tokens read)", None, None, *key[3:]][1]
            gap = sums["cross_entropy"] - ceiling["cross_entropy"]
            measured["shortfall"] = gap / np.log(2)
        else:
            assert np.isnan([row.shortfall, row.shortfall_low, row.shortfall_high]).all()
        for name, values in measured.items():
            expected = bootstrap_ratio(values, COUNTS, **RESAMPLING)
            assert row[name] == pytest.approx(values.sum() / COUNTS.sum(), abs=1e-12)
            assert row[f"{name}_low"] == pytest.approx(expected.low, abs=1e-12)
            assert row[f"{name}_high"] == pytest.approx(expected.high, abs=1e-12)
        assert (row.examples, row.documents) == (COUNTS.sum(), len(COUNTS))


def test_gain_is_over_the_strongest_baseline_that_needs_no_model(table: pd.DataFrame, tallies: list[Tally]):
    """The planner is stronger than the bigram, and needs a model."""
    rows = sums_by_row(tallies)
    probes = [key for key, (head, _) in rows.items() if key[0] == "probe" and not head["injected"]]
    bigrams = [rows["bigram", None, None, *key[3:]][1]["cross_entropy"] for key in probes]
    own = [rows[key][1]["cross_entropy"] for key in probes]
    gains = (np.stack(bigrams, axis=1) - np.stack(own, axis=1)) / np.log(2)
    together = simultaneous_ratios(gains, COUNTS, **RESAMPLING)
    for number, key in enumerate(probes):
        row = row_of(table, key)
        assert row.gain_over == "bigram"
        assert row.gain == pytest.approx(gains[:, number].sum() / COUNTS.sum())
        assert row.gain == pytest.approx(row.bits - row_of(table, ("bigram", None, None, *key[3:])).bits)
        assert row.gain_low == pytest.approx(together.low[number])
        assert row.gain_high == pytest.approx(together.high[number])


def test_an_interval_for_all_cells_together_holds_that_of_each(table: pd.DataFrame, tallies: list[Tally]):
    rows = sums_by_row(tallies)
    compared = table[table.gain.notna()]
    assert len(compared) == 2 * 2 * 2 * 2 - 2
    for row in compared.itertuples():
        bigram = rows["bigram", None, None, row.distance, row.horizon][1]["cross_entropy"]
        own = rows["probe", row.variant, row.layer, row.distance, row.horizon][1]["cross_entropy"]
        alone = simultaneous_ratios((bigram - own)[:, None] / np.log(2), COUNTS, **RESAMPLING)
        assert row.gain_low < alone.low[0] < row.gain < alone.high[0] < row.gain_high
        single = bootstrap_ratio((bigram - own) / np.log(2), COUNTS, **RESAMPLING)
        assert row.gain_low < single.low
        assert single.high < row.gain_high


def test_the_strongest_baseline_is_chosen_on_validation():
    """Not on the test, where the bigram remains the strongest."""
    table = table_of(make_tallies(**{"skip n-gram": 1.0}), COUNTS, [], RESAMPLING)
    probes = table[(table.reader == "probe") & ~table.injected]
    assert (probes.gain_over == "skip n-gram").all()
    for row in probes.itertuples():
        bits = row_of(table, ("skip n-gram", None, None, row.distance, row.horizon)).bits
        assert row.gain == pytest.approx(row.bits - bits)


def test_only_probes_that_nothing_was_told_have_a_gain(table: pd.DataFrame):
    without = table[table.gain.isna()]
    assert without.gain_over.isna().all()
    assert without[["gain_low", "gain_high"]].isna().all(axis=None)
    assert set(without.reader) == {*FREE, "planner", "ceiling (tokens read)", "probe"}
    probes = without[without.reader == "probe"]
    assert (probes.injected | (probes.distance == 9)).all()
    assert probes.injected.sum() == 2


def test_a_cell_that_is_told_changes_no_other_cells_gain(table: pd.DataFrame):
    tallies = make_tallies()
    for one in tallies:
        for number, head in enumerate(one.heads):
            if head.get("injected"):
                one.sums["cross_entropy"][:, number] = np.random.default_rng(8).exponential(9, len(COUNTS))
    again = table_of(tallies, COUNTS, EMPTY, RESAMPLING)
    columns = ["gain", "gain_low", "gain_high", "gain_over"]
    pd.testing.assert_frame_equal(again[columns], table[columns])


def test_without_a_ceiling_nothing_falls_short(table: pd.DataFrame):
    tallies = [one for one in make_tallies() if one.heads[0]["reader"] != "ceiling (tokens read)"]
    without = table_of(tallies, COUNTS, EMPTY, RESAMPLING)
    known = [name for name in COLUMNS if not name.startswith("shortfall")]
    assert without.drop(columns=known).isna().all(axis=None)
    others = table[table.reader != "ceiling (tokens read)"].reset_index(drop=True)
    pd.testing.assert_frame_equal(without[known], others[known])


def test_columns_and_types(table: pd.DataFrame):
    assert list(table.columns) == list(COLUMNS)
    for name, kind in COLUMNS.items():
        assert str(table[name].dtype) == kind, name
    baselines = table[table.reader != "probe"]
    unknown = ["solver", "variant", "seed", "location", "layer", "constant", "l2", "iterations", "converged"]
    assert baselines[unknown].isna().all(axis=None)
    assert not baselines.injected.any()


def test_empty_cells_have_counts_and_nothing_else(table: pd.DataFrame):
    empty = table[table.distance == 9]
    assert len(empty) == 2
    assert (empty.examples == 3).all()
    named = ["reader", "solver", "variant", "seed", "location", "layer", "distance", "horizon"]
    assert empty[named].notna().all(axis=None)
    assert not empty.injected.any()
    assert empty.drop(columns=[*named, "injected", "examples"]).isna().all(axis=None)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_the_readers_makes_no_difference(table: pd.DataFrame, seed: int):
    tallies = make_tallies()
    order = np.random.default_rng(seed).permutation(len(tallies))
    again = table_of([tallies[number] for number in order], COUNTS, EMPTY[::-1], RESAMPLING)
    pd.testing.assert_frame_equal(again, table)
