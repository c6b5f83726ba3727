"""Figures: what is drawn is read back from the axes and held against the table."""

import io
import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from probekit.probing.probe import probe
from probekit.reports.figures import BASELINE_STYLES, probe_heat_map, probe_lines, save_probe_figures
from probekit.run import Run

LAYERS, DISTANCES = (0, 1, 2), (1, 2, 4, 8)


def accuracy_of(layer: int, distance: int, horizon: int = 1) -> float:
    """Another accuracy for every cell."""
    return 0.01 * (10 * layer + distance) + 0.4 * (horizon - 1) + 0.1


def table() -> pd.DataFrame:
    """Probes of one variant at two locations, in no order; the cell (1, 4) is empty and (2, 1) injected."""
    rows = []
    for location, layer, distance, horizon in itertools.product("ab", LAYERS, DISTANCES, (1, 2)):
        value = accuracy_of(layer, distance, horizon) + (0.3 if location == "b" else 0.0)
        value = np.nan if (layer, distance) == (1, 4) else value
        rows.append(
            {"reader": "probe", "variant": "soft", "location": location, "layer": layer}
            | {"distance": distance, "horizon": horizon, "accuracy": value}
            | {"injected": (layer, distance, horizon) == (2, 1, 1), "documents": 16}
        )
    for reader, distance, horizon in itertools.product(
        (*BASELINE_STYLES, "ceiling (actions)"), DISTANCES, (1, 2)
    ):
        if (reader, horizon) == ("planner", 2):
            continue
        rows.append(
            {"reader": reader, "distance": distance, "horizon": horizon, "injected": False}
            | {"accuracy": 0.05 * len(reader) / distance + 0.01 * horizon}
        )
    frame = pd.DataFrame(rows).assign(
        accuracy_low=lambda t: t.accuracy - 0.02, accuracy_high=lambda t: t.accuracy + 0.03
    )
    types = {"layer": "Int64", "documents": "Int64"}
    return frame.astype(types).sample(frac=1, random_state=0, ignore_index=True)


def drawn_cells(figure: Figure) -> dict[tuple[int, int], str]:
    """The annotation of every cell, by the layer and distance that the axes' labels give its place."""
    axes = figure.axes[0]
    distances = {
        float(x): int(label.get_text())
        for x, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    }
    layers = {
        float(y): int(label.get_text())
        for y, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    }
    return {
        (layers[text.get_position()[1]], distances[text.get_position()[0]]): text.get_text()
        for text in axes.texts
    }


@pytest.mark.parametrize("horizon", [1, 2])
def test_the_heat_map_has_each_cell_in_its_place(horizon: int):
    figure = probe_heat_map(table(), "soft", "a", horizon)
    expected = {
        (layer, distance): f"{accuracy_of(layer, distance, horizon):.2f}"
        for layer in LAYERS
        for distance in DISTANCES
    }
    expected[1, 4] = "–"
    if horizon == 1:
        expected[2, 1] += "*"
    assert drawn_cells(figure) == expected


def test_the_heat_map_colours_what_it_says():
    axes = probe_heat_map(table(), "soft", "b").axes[0]
    mesh = axes.collections[0]
    values = np.ma.asarray(mesh.get_array()).reshape(len(LAYERS), len(DISTANCES))
    # Layers from the bottom up, distances towards the target on the right.
    expected = np.array([[accuracy_of(layer, d) + 0.3 for d in DISTANCES[::-1]] for layer in LAYERS[::-1]])
    assert values.mask.tolist() == [[False] * 4, [False, True, False, False], [False] * 4]
    np.testing.assert_allclose(values.filled(0), np.where(values.mask, 0, expected))
    assert mesh.get_clim()[0] == 0.0
    assert axes.yaxis_inverted()  # the first row is on top


def test_titles_name_what_is_shown_and_explain_the_star():
    assert (
        "soft: a, horizon 1   (* already conditioned"
        in probe_heat_map(table(), "soft", "a").axes[0].get_title()
    )
    assert probe_heat_map(table(), "soft", "a", 2).axes[0].get_title() == "soft: a, horizon 2"
    assert probe_lines(table(), "soft", "b", 2).axes[0].get_title() == "soft: b, horizon 2, 16 test documents"


def test_lines_have_values_intervals_and_baselines():
    numbers = table()
    axes = probe_lines(numbers, "soft", "a").axes[0]
    lines = {str(line.get_label()): line for line in axes.lines}
    assert set(lines) == {"layer 0", "layer 1", "layer 2", *BASELINE_STYLES}
    bands = dict(zip(LAYERS, axes.collections, strict=True))
    for layer in LAYERS:
        x, y = lines[f"layer {layer}"].get_data()
        shown = [d for d in DISTANCES if (layer, d) != (1, 4)]
        assert x.tolist() == list(DISTANCES)
        assert [a for d, a in zip(x, y, strict=True) if d in shown] == [accuracy_of(layer, d) for d in shown]
        assert np.isnan(y[2]) == (layer == 1)
        corners = {
            (round(px, 6), round(py, 6)) for path in bands[layer].get_paths() for px, py in path.vertices
        }
        for distance in shown:
            for offset in (-0.02, 0.03):
                assert (distance, round(accuracy_of(layer, distance) + offset, 6)) in corners
    for reader in BASELINE_STYLES:
        rows = numbers[(numbers.reader == reader) & (numbers.horizon == 1)].sort_values("distance")
        assert lines[reader].get_xdata().tolist() == list(DISTANCES)
        assert lines[reader].get_ydata().tolist() == rows.accuracy.tolist()
    assert axes.xaxis_inverted()
    assert axes.get_ylim()[0] == 0.0
    assert axes.get_xticks().tolist() == list(DISTANCES)


def test_a_baseline_that_is_not_there_is_not_drawn():
    axes = probe_lines(table(), "soft", "a", horizon=2).axes[0]
    assert "planner" not in {line.get_label() for line in axes.lines}


def test_figures_are_saved_with_their_numbers(tmp_path: Path):
    numbers = table()
    only_empty = numbers[numbers.reader == "probe"].assign(location="c", accuracy=np.nan)
    numbers = pd.concat([numbers, only_empty], ignore_index=True)
    pictures = save_probe_figures(numbers, tmp_path / "figures")
    names = {
        f"{kind}_soft_{place}_h{h}.png" for kind in ("heatmap", "lines") for place in "ab" for h in (1, 2)
    }
    assert {picture.name for picture in pictures} == names
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == names | {f"soft_{place}_h{h}.csv" for place in "ab" for h in (1, 2)}
    for picture in pictures:
        assert imread(picture).std() > 0.01
    for place, horizon in itertools.product("ab", (1, 2)):
        written = pd.read_csv(tmp_path / "figures" / f"soft_{place}_h{horizon}.csv")
        probes = written[written.reader == "probe"]
        expected = numbers.query("reader == 'probe' and location == @place and horizon == @horizon")
        assert probes.accuracy.tolist() == pytest.approx(expected.accuracy.tolist(), nan_ok=True)
        assert set(probes.location) == {place}
        baselines = written[written.reader != "probe"]
        assert set(baselines.horizon) == {horizon}
        assert len(baselines) == len(numbers.query("reader != 'probe' and horizon == @horizon"))


def test_saving_twice_leaves_the_same(tmp_path: Path):
    numbers = table()
    first = {path.name: path.read_bytes() for path in map(Path, save_probe_figures(numbers, tmp_path))}
    tables = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    again = save_probe_figures(numbers, tmp_path)
    assert {path.name: path.read_bytes() for path in again} == first
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")} == tables
    assert len(list(tmp_path.iterdir())) == len(first) + len(tables)


def test_a_probed_run_is_drawn_from_its_file(tiny_run: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    settings = {
        "probe.variants": ["soft"],
        "probe.locations": ["attn.hook_z"],
        "probe.distances": [1, 2, 500],
    }
    probe(run, settings, quiet=True)
    probes = run.probes()
    shown = drawn_cells(probe_heat_map(probes, "soft", "attn.hook_z"))
    assert len(shown) == 9
    for row in probes[probes.reader == "probe"].itertuples():
        star = "*" if (row.layer, row.distance) == (2, 1) else ""
        text = "–" if row.distance == 500 else f"{row.accuracy:.2f}{star}"
        assert shown[row.layer, row.distance] == text
    pictures = save_probe_figures(probes, run.folder / "probes")
    assert [path.name for path in pictures] == [
        "heatmap_soft_attn_hook_z_h1.png",
        "lines_soft_attn_hook_z_h1.png",
    ]
    rendered = io.BytesIO()
    probe_lines(probes, "soft", "attn.hook_z").savefig(rendered)
    assert rendered.getvalue().startswith(b"\x89PNG")
