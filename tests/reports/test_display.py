"""How values and texts are shown, to the digits that an interval allows, and display tables."""

import unicodedata

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probekit.reports.display import (
    by_metric,
    described,
    display,
    heading,
    ordered,
    shortened,
    visible,
    with_interval,
)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((25.9616, 25.5909, 26.3494), "25.962 [25.591, 26.349]"),
        ((0.003149, 0.000801, 0.005539), "0.0031 [0.0008, 0.0055]"),
        ((12345.6, 11000.0, 14000.0), "12,345.600 [11,000.000, 14,000.000]"),
        ((0.5, 0.5, 0.5), "0.500 [0.500, 0.500]"),
        ((-0.00001, -0.02, 0.02), "0.000 [-0.020, 0.020]"),
        ((0.25, None, None), "0.250 (no interval)"),
        ((0.25, np.nan, np.nan), "0.250 (no interval)"),
        ((1.0, 0.5, np.inf), "1.000 (no interval)"),
        ((None, None, None), ""),
        ((np.nan, 0.0, 1.0), ""),
        ((1.0, 1.0 - 1e-12, 1.0 + 1e-12), "1.000000 [1.000000, 1.000000]"),
    ],
)
def test_values_have_the_digits_that_their_intervals_allow(values: tuple, text: str):
    assert with_interval(*values) == text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((25.9616, 25.5909, 26.3494), "25.96 [25.59, 26.35]"),
        ((12345.6, 11000.0, 14000.0), "12,346 [11,000, 14,000]"),
        ((0.0072, 0.0058, 0.0087), "0.0072 [0.0058, 0.0087]"),
        ((0.0, 0.0, 0.0), "0.000 [0.000, 0.000]"),
        ((0.25, np.nan, np.nan), "0.250 (no interval)"),
    ],
)
def test_figures_show_the_half_width_to_two_digits(values: tuple, text: str):
    assert with_interval(*values, decimals=0) == text


def test_differences_have_a_sign():
    assert with_interval(0.5, -0.5, 1.5, signed=True) == "+0.500 [-0.500, +1.500]"


def test_columns_are_described_once_and_the_others_by_their_name():
    assert heading("cross_entropy") == "cross-entropy (nats) ↓"
    assert heading("accuracy") == "accuracy ↑"
    assert heading("some_new_metric") == "some new metric"
    assert ordered(["some_new_metric", "top5", "accuracy", "top5"]) == ["accuracy", "top5", "some_new_metric"]
    assert [described(name).better for name in ("perplexity", "bits", "documents")] == [-1, 1, 0]


def test_cells_are_text_and_optional_columns_are_dropped_or_told_in_the_caption():
    table = pd.DataFrame(
        {"variant": ["a", "b"], "seed": [1, 1], "step": [1000, 20], "seconds": [1.25, np.nan]}
    )
    table = table.assign(layer=pd.array([None, 2], dtype="Int64"), taken_from=None)
    shown = display("Caption", table, [*table], optional=["seed", "taken_from", "missing", "layer"])
    assert shown.caption == "Caption; seed 1"
    assert shown.cells.to_dict("list") == {
        "variant": ["a", "b"],
        "step": ["1,000", "20"],
        "seconds": ["1.2", ""],
        "layer": ["", "2"],
    }
    assert display("x", table, ["variant", "step"]).numeric == [False, True]


def test_metrics_become_columns_with_their_bounds_and_conditions_keep_their_order():
    rows = [("b", None, "accuracy", 0.5, 9), ("a", 1.0, "accuracy", 0.25, 8), ("b", None, "top5", 0.75, 7)]
    table = pd.DataFrame(rows, columns=["reader", "strength", "metric", "value", "documents"])
    wide = by_metric(table.assign(value_low=0.1, value_high=0.9, seed_spread=0.2), ["reader", "strength"])
    assert wide.reader.tolist() == ["b", "a"]
    assert wide.documents.tolist() == [9, 8]
    assert wide.accuracy.tolist() == [0.5, 0.25]
    assert wide.top5.isna().tolist() == [False, True]
    assert (wide.accuracy_low[0], wide.top5_high[0], wide.accuracy_spread[1]) == (0.1, 0.9, 0.2)


def test_invisible_characters_leave_a_mark():
    marked = "a‹U+0007›b‹U+001B›[31m‹U+202E›‹U+DC80›\u00a0\tc\nd"
    assert visible("a\x07b\x1b[31m\u202e\udc80\u00a0\tc\nd") == marked
    plain = "Straße, 12 € “naïve” 👩\u200d👧 नमस्ते"
    assert visible(plain) == plain


@given(st.text())
def test_nothing_invisible_is_left(text: str):
    seen = {unicodedata.category(c) for c in visible(text) if c not in "\n\t\u200c\u200d"}
    assert not seen & {"Cc", "Cf", "Cs", "Zl", "Zp"}


def test_long_sentences_are_cut_short():
    assert shortened("a" * 100) == "a" * 100
    assert shortened("b" * 101) == "b" * 99 + "…"
