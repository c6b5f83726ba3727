"""Overlap of sets: counts against Python's own sets, and what is drawn against the counts."""

import itertools

import numpy as np
import pandas as pd
import pytest
from depth_figure2_solved import BARS, draw_upset, draw_venn, intersections, sizes
from matplotlib.colors import same_color
from matplotlib.figure import Figure


def random_sets(number: int, things: int = 200) -> pd.DataFrame:
    inside = np.random.default_rng(number).random((things, number)) < np.linspace(0.2, 0.7, number)
    return pd.DataFrame(inside, columns=[f"set {place}" for place in range(number)])


@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_intersections_and_sizes_are_those_of_sets(number: int):
    table = random_sets(number)
    sets = {name: {*np.flatnonzero(table[name])} for name in table}
    expected = {}
    for row in itertools.product([False, True], repeat=number):
        inside = [sets[name] for name, is_in in zip(sets, row, strict=True) if is_in]
        outside = [sets[name] for name, is_in in zip(sets, row, strict=True) if not is_in]
        things = {*range(len(table))}.intersection(*inside).difference(*outside)
        if things:
            expected[row] = len(things)
    counts = intersections(table)
    found = dict(zip(map(tuple, counts[[*sets]].to_numpy(bool)), counts["count"], strict=True))
    assert found == expected
    assert counts["count"].is_monotonic_decreasing
    assert sizes(counts).to_dict() == {name: len(things) for name, things in sets.items()}


@pytest.mark.parametrize("number", [2, 3])
def test_a_venn_diagram_writes_every_count(number: int):
    counts = intersections(random_sets(number))
    axes = Figure().subplots()
    names = [f"layer {place}" for place in range(number)]
    draw_venn(axes, counts, names, ["red", "green", "blue"][:number])
    written = sorted(text.get_text() for text in axes.texts if text.get_text())
    none = ~counts.drop(columns="count").any(axis=1)
    expected = [f"none: {counts['count'][none].item()}", *map(str, counts["count"][~none]), *names]
    assert written == sorted(expected)


def test_an_upset_diagram_shows_counts_members_and_sizes():
    counts = intersections(random_sets(4))
    counts["count"] = counts["count"] / 2  # a mean of two seeds
    names = {name: name.upper() for name in counts.columns.drop("count")}
    colours = dict(zip(names, ["red", "green", "blue", "orange"], strict=True))
    figure = Figure()
    draw_upset(figure, counts, names, colours)
    bars, matrix, totals = figure.axes
    assert [bar.get_height() for bar in bars.patches] == counts["count"].tolist()
    assert [text.get_text() for text in bars.texts] == [
        f"{n:.1f}".removesuffix(".0") for n in counts["count"]
    ]
    assert [label.get_text() for label in matrix.get_yticklabels()] == [*names.values()]
    drawn = {
        (int(x), int(row))
        for dots in matrix.collections
        for x, row in np.asarray(dots.get_offsets())
        if any(same_color(dots.get_facecolor()[0], colour) for colour in colours.values())
    }
    inside = counts[[*names]].to_numpy(bool)
    assert drawn == {(x, row) for x, row in zip(*np.nonzero(inside), strict=True)}
    assert [bar.get_width() for bar in totals.patches] == sizes(counts)[[*names]].tolist()


def test_an_upset_diagram_says_how_much_it_leaves_out():
    counts = intersections(random_sets(6, 2000))
    assert len(counts) > BARS
    figure = Figure()
    draw_upset(figure, counts, {n: n for n in counts.columns[:-1]}, dict.fromkeys(counts.columns[:-1], "red"))
    bars = figure.axes[0]
    assert len(bars.patches) == BARS
    left_out = counts["count"].sum() - sum(bar.get_height() for bar in bars.patches)
    assert bars.get_title() == f"{len(counts) - BARS} smaller ones, {left_out:.0f} in all, are left out"
