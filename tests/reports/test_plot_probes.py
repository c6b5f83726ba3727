"""Figures: what is drawn is read back from the axes and held against the table."""

import itertools
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from synthetic_probes import BASELINES, DISTANCES, LAYERS, accuracy_of, probe_table

from probekit.models.mixing import VARIANTS
from probekit.probing.results import MODEL_FREE
from probekit.reports.drawing import draw_intervals
from probekit.reports.plot_probes import (
    BASELINE_STYLES,
    Panel,
    mean_over_seeds,
    panels,
    probe_heat_map,
    probe_lines,
    probe_scale,
    save_probe_figures,
)

EMPTY = (1, 4)
OF_CLASSES = ["accuracy", "top5", "bits", "gain", "selectivity", "compression"]
INJECTED = (2, 1)
NAMES = [str(distance) for distance in DISTANCES[::-1]]  # from left to right


def table(**choices) -> pd.DataFrame:
    return probe_table(("none", "soft"), ("hook_resid_post", "attn.hook_z"), **choices)


def expected(variant: str, horizon: int = 1, seed: int = 0) -> dict[tuple[int, int], float]:
    """Accuracy by layer and distance, of cells that are not empty."""
    values = {
        (layer, distance): accuracy_of(layer, distance, horizon, variant, seed)
        for layer, distance in itertools.product(LAYERS, DISTANCES)
        if (layer, distance) != EMPTY
    }
    return values | ({INJECTED: 0.95} if (variant, horizon) == ("soft", 1) else {})


def drawn_cells(axes: Axes) -> dict[tuple[int, int], str]:
    """The annotation of every cell, by the layer and distance that the axes' labels give its place."""
    axes_labels = [
        (axes.get_xticks(), axes.get_xticklabels()),
        (axes.get_yticks(), axes.get_yticklabels()),
    ]
    distances, layers = (
        {float(at): int(label.get_text()) for at, label in zip(*ticks, strict=True)} for ticks in axes_labels
    )
    return {
        (layers[text.get_position()[1]], distances[text.get_position()[0]]): text.get_text()
        for text in axes.texts
    }


def points(axes: Axes) -> dict[tuple[float, float], bool]:
    """The points of a line plot, and whether they are hollow."""
    return {
        (round(x, 6), round(y, 6)): tuple(dots.get_facecolors()[0]) == to_rgba("white")
        for dots in axes.collections
        if isinstance(dots, mpl.collections.PathCollection)
        for place, y in dots.get_offsets()
        if np.isfinite(y)
        for x in [DISTANCES[::-1][int(place)]]
    }


def lines_of(figure: Figure) -> dict[str, mpl.lines.Line2D]:
    return {str(line.get_label()): line for line in figure.axes[0].lines}


@pytest.mark.parametrize("variant", ["none", "soft"])
@pytest.mark.parametrize("horizon", [1, 2])
def test_the_heat_map_has_each_cell_in_its_place(variant: str, horizon: int):
    figure = probe_heat_map(table(), Panel(variant, "attn.hook_z", horizon))
    texts = {cell: f"{value:.2f}" for cell, value in expected(variant, horizon).items()}
    star = variant == "soft" and horizon == 1
    texts |= {EMPTY: "–"} | ({INJECTED: "0.95*"} if star else {})
    assert drawn_cells(figure.axes[0]) == texts
    assert ("* the target's own action" in figure.get_suptitle()) == star


def test_injected_cells_have_no_gain_and_still_their_star():
    cells = drawn_cells(probe_heat_map(table(), Panel("soft", "attn.hook_z"), "gain").axes[0])
    assert (cells[INJECTED], cells[EMPTY]) == ("*", "–")
    assert cells[0, 1] == f"{2 * expected('soft')[0, 1] - 0.5:.2f}"


def test_a_location_that_is_there_once_is_one_row():
    numbers = probe_table(("none",), ("hook_embed", "ln_final.hook_out"))
    for location, layer in {"hook_embed": 0, "ln_final.hook_out": 2}.items():
        figure = probe_heat_map(numbers, Panel("none", location))
        assert {cell[0] for cell in drawn_cells(figure.axes[0])} == {layer}
        assert not {"layer 0", "layer 2"} & {*lines_of(probe_lines(numbers, Panel("none", location)))}


def test_the_heat_map_colours_what_it_says():
    axes = probe_heat_map(table(), Panel("soft", "attn.hook_z")).axes[0]
    mesh = axes.collections[0]
    values = np.ma.asarray(mesh.get_array()).reshape(len(LAYERS), len(DISTANCES))
    # Layers from the bottom up, distances towards the target on the right.
    truth = expected("soft")
    cells = [[truth.get((layer, d), np.nan) for d in DISTANCES[::-1]] for layer in LAYERS[::-1]]
    np.testing.assert_allclose(values.filled(np.nan), cells)
    assert axes.yaxis_inverted()  # the first row is on top
    # All pictures of a table have the same colours. The injected cell would leave the others one colour: it
    # is beyond the scale.
    assert mesh.get_clim() == (0.0, table().query("reader == 'probe' and not injected").accuracy.max())


def test_signed_metrics_part_their_colours_at_zero():
    cells = Panel("none", "attn.hook_z").cells(table())
    for metric in OF_CLASSES:
        scale = probe_scale([mean_over_seeds(cells, metric)], metric).norm
        assert (scale.vmin == -scale.vmax) == (metric in ("gain", "selectivity"))
        assert scale.vmin <= 0.0 < scale.vmax


@pytest.mark.parametrize("metric", OF_CLASSES)
def test_lines_have_values_and_intervals(metric: str):
    numbers = table()
    figure = probe_lines(numbers, Panel("none", "attn.hook_z"), metric)
    lines = lines_of(figure)
    bands = [
        c for c in figure.axes[0].collections if isinstance(c, mpl.collections.FillBetweenPolyCollection)
    ]
    assert len(bands) == (0 if metric == "compression" else len(LAYERS))
    cells = Panel("none", "attn.hook_z").cells(numbers)
    for layer, band in itertools.zip_longest(LAYERS, bands):
        rows = cells[cells.layer == layer].sort_values("distance", ascending=False)
        x, y = lines[f"layer {layer}"].get_data()
        assert x.tolist() == NAMES
        np.testing.assert_allclose(y, rows[metric])
        for offset in (-0.02, 0.03) if band else ():
            corners = {tuple(np.round(corner, 6)) for path in band.get_paths() for corner in path.vertices}
            for row in rows[rows[metric].notna()].to_dict("records"):
                place = NAMES.index(row["position"])
                assert (place, round(row[metric] + offset, 6)) in corners
    axes = figure.axes[0]
    assert axes.get_ylim()[0] <= 0.0
    figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_xticklabels()] == NAMES


def test_baselines_are_drawn_where_they_have_the_metric():
    numbers = table()
    lines = lines_of(probe_lines(numbers, Panel("none", "attn.hook_z")))
    assert {name for name in lines if name[0] != "_"} == {*BASELINES} | {f"layer {n}" for n in LAYERS}
    for reader in BASELINES:
        rows = numbers[(numbers.reader == reader) & (numbers.horizon == 1)]
        rows = rows.sort_values("distance", ascending=False)
        assert lines[reader].get_xdata().tolist() == NAMES
        assert lines[reader].get_ydata().tolist() == rows.accuracy.tolist()
    two = lines_of(probe_lines(numbers, Panel("none", "attn.hook_z", horizon=2)))
    assert {*lines} - {*two} == {"planner", "planner after joint"}
    assert not {*BASELINES} & {*lines_of(probe_lines(numbers, Panel("none", "attn.hook_z"), "gain"))}


def test_every_reader_has_a_style_of_its_own():
    joint = {f"planner after {name}" for name, variant in VARIANTS.items() if variant.joint}
    assert {*MODEL_FREE, *BASELINES, *joint} <= {*BASELINE_STYLES}
    assert len(set(BASELINE_STYLES.values())) == len(BASELINE_STYLES)


def test_injected_points_are_hollow():
    for variant in ("none", "soft"):
        figure = probe_lines(table(), Panel(variant, "attn.hook_z"))
        truth = {
            (distance, round(value, 6)): variant == "soft" and (layer, distance) == INJECTED
            for (layer, distance), value in expected(variant).items()
        }
        assert points(figure.axes[0]) == truth
        assert ("hollow" in figure.axes[0].get_title()) == (variant == "soft")


def test_seeds_are_averaged_and_each_is_a_thin_line():
    numbers = table(seeds=(3, 5))
    panel = Panel("none", "attn.hook_z")
    figure = probe_lines(numbers, panel)
    axes, cells = figure.axes[0], panel.cells(numbers)
    mean = {cell: value + 0.01 for cell, value in expected("none", seed=3).items()}
    assert points(axes) == {(d, round(value, 6)): False for (_, d), value in mean.items()}
    thin = sorted(line.get_ydata().tolist() for line in axes.lines if line.get_label() == "_seed")
    rows = cells.sort_values("distance", ascending=False).groupby(["layer", "seed"]).accuracy.agg(list)
    np.testing.assert_allclose(thin, sorted(rows))
    found = mean_over_seeds(cells, "accuracy").set_index(["layer", "position"])
    for (layer, distance), value in mean.items():
        assert found.loc[(layer, str(distance)), ["value", "low", "high"]].tolist() == pytest.approx(
            [value, value - 0.02, value + 0.03]
        )
    assert drawn_cells(probe_heat_map(numbers, panel).axes[0])[0, 1] == f"{mean[0, 1]:.2f}"


def test_a_cell_that_is_empty_for_one_seed_is_empty():
    cells = Panel("none", "attn.hook_z").cells(table(seeds=(0, 1))).copy()
    cells.loc[(cells.seed == 1) & (cells.layer == 0) & (cells.distance == 2), "accuracy"] = np.nan
    found = mean_over_seeds(cells, "accuracy").set_index(["layer", "position"])
    assert {cell for cell, value in found.value.items() if np.isnan(value)} == {(1, "4"), (0, "2")}
    assert found.low.isna().equals(found.value.isna())


def test_panels_are_those_that_have_something():
    numbers = table()
    numbers.loc[(numbers.variant == "soft") & (numbers.location == "attn.hook_z"), "accuracy"] = np.nan
    grid = itertools.product(
        ("none", "soft"), ("hook_resid_post", "attn.hook_z"), (1, 2), ("softmax", "ridge")
    )
    assert {*panels(numbers)} == {Panel(*row) for row in grid if row[:2] != ("soft", "attn.hook_z")}
    for panel in panels(numbers):
        cells = panel.cells(numbers)
        assert len(cells) == len(LAYERS) * len(DISTANCES)
        assert not cells.duplicated(["layer", "distance"]).any()


def test_figures_are_saved_with_their_numbers(tmp_path: Path):
    numbers = probe_table(
        ("soft",), ("attn.hook_z", "attn.hook_z:before"), horizons=(1, 2), solvers=("ridge",)
    )
    pictures = save_probe_figures(numbers, tmp_path / "figures")
    names = {
        f"soft_{place}_action_ridge_h{h}" for place in ("attn_hook_z", "attn_hook_z_before") for h in (1, 2)
    }
    assert {picture.name for picture in pictures} == {
        f"{k}_{n}.png" for k in ("heatmap", "lines") for n in names
    }
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {picture.name for picture in pictures} | {f"{name}.csv" for name in names}
    for picture in pictures:
        assert imread(picture).std() > 0.01
    for panel in panels(numbers):
        written = pd.read_csv(tmp_path / "figures" / f"{panel.name}.csv")
        probes = written[written.reader == "probe"]
        assert probes.accuracy.tolist() == pytest.approx(panel.cells(numbers).accuracy.tolist(), nan_ok=True)
        assert set(probes.location) == {panel.location}
        baselines = written[written.reader != "probe"]
        assert set(baselines.horizon) == {panel.horizon}
        assert len(baselines) == len(numbers.query("reader != 'probe' and horizon == @panel.horizon"))


def test_the_name_of_a_target_is_no_mathematics_and_no_path(tmp_path: Path):
    numbers = probe_table(("none",), ("hook_resid_post",), horizons=(1,), solvers=("softmax",))
    pictures = save_probe_figures(numbers.assign(target="../a $\\frac$ b"), tmp_path / "figures")
    assert len(pictures) == 2
    assert {picture.parent for picture in pictures} == {tmp_path / "figures"}


def test_values_intervals_and_seeds_are_drawn_where_they_are():
    rows = [("a", None, 1.0, 0.5, 1.75), ("a", 0, 0.9, 0.4, 1.6), ("a", 1, 1.1, 0.6, 1.9)]
    rows += [("b", None, -0.25, np.nan, np.nan)]
    table = pd.DataFrame(rows, columns=["name", "seed", "value", "value_low", "value_high"])
    axes = Figure().subplots()
    draw_intervals(axes, table, ["b", "a", "not there"], {"a": "first"})
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "first", "not there"]
    assert [text.get_text() for text in axes.texts] == ["−0.250 (no interval)", "1.00 [0.50, 1.75]"]
    points = {tuple(map(tuple, line.get_xydata())) for line in axes.lines if line.get_marker() in ("o", "|")}
    assert ((1.0, 1.0),) in points
    assert ((0.9, 1.0), (1.1, 1.0)) in points
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first name is at the top"


def test_named_positions_stand_apart():
    """On the right, in the order of reading; no line joins them to the numbers."""
    numbers = table()
    for distance, name in ((4, "last"), (8, "mean")):
        numbers.loc[numbers.distance == distance, "position"] = name
    panel, names = Panel("none", "attn.hook_z"), ["2", "1", "last", "mean"]
    figure = probe_heat_map(numbers, panel)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == names
    mesh = np.ma.asarray(figure.axes[0].collections[0].get_array()).reshape(len(LAYERS), len(names))
    np.testing.assert_allclose(mesh[-1], [expected("none")[0, d] for d in (2, 1, 4, 8)])

    axes = probe_lines(numbers, panel).axes[0]
    drawn = {str(line.get_label()): line for line in axes.lines}
    for reader in ("layer 0", "bigram"):
        assert drawn[reader].get_xdata().tolist() == ["2", "1"]
    marks = [line for line in axes.lines if line.get_label() == "_named"]
    assert {tuple(line.get_xdata()) for line in marks} == {("last", "mean")}
    dots = next(dots for dots in axes.collections if isinstance(dots, mpl.collections.PathCollection))
    places = dict(zip(*np.transpose(dots.get_offsets()), strict=True))
    assert places == pytest.approx({n: expected("none")[0, d] for n, d in enumerate((2, 1, 4, 8))})


def test_one_position_is_drawn_by_layer():
    rows = table()
    rows = rows[rows.position == "2"]
    figure = probe_lines(rows, Panel("none", "hook_resid_post"), "accuracy")
    axes = figure.axes[0]
    (line,) = (line for line in axes.lines if line.get_label() == "none")
    values = {layer: value for (layer, distance), value in expected("none").items() if distance == 2}
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == pytest.approx(values)
    assert axes.get_xlabel() == "layer"
    assert "position 2" in axes.get_title()
    prior = rows[(rows.reader == "prior") & (rows.horizon == 1)].accuracy.mean()
    assert lines_of(figure)["prior"].get_ydata()[0] == pytest.approx(prior)
