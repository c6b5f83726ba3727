"""Figure 5 shows what the run's tables hold: what is read beside what is used, less its controls."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import shared.script
from matplotlib.figure import Figure
from synthetic_probes import accuracy_of, probe_table

import probekit
from probekit.reports.plot_interventions import draw_interventions
from probekit.run.run import Run

SCRIPT = Path(__file__).parents[2] / "analyses" / "figure5_causal.py"
LAYERS, DISTANCES, STRENGTHS = (0, 1, 2), (1, 2), (1.0, 3.0)
CONDITIONS = {
    "erase": ("erase", "random", "random subspace"),
    "patch": ("patch", "random", "same label"),
    "steer": ("wrong label", "random (wrong)", "true label", "random (true)"),
}
ACCURACIES = ("fitted_accuracy", "refitted_accuracy", "prior_accuracy")


def effect_of(condition: str, layer: int, distance: int, strength: float = 1.0) -> float:
    """Another effect for every row."""
    return 0.01 * len(condition) + 0.1 * layer + 0.003 * distance + 0.5 * strength


def effects(variant: str) -> pd.DataFrame:
    rows = []
    for kind, names in CONDITIONS.items():
        for strength in STRENGTHS if kind == "steer" else (np.nan,):
            for name in names:
                for layer in LAYERS:
                    for distance in DISTANCES:
                        value = effect_of(name, layer, distance, 1.0 if np.isnan(strength) else strength)
                        head = {"kind": kind, "condition": name, "strength": strength, "layer": layer}
                        head |= {"location": "hook_resid_post", "distance": distance, "variant": variant}
                        head |= {"injected": variant == "soft" and layer == 2, "readout_direct": False}
                        metrics = {"next_loss": value, "other_loss": 9.0}
                        if not name.startswith(("random", "same")):
                            metrics["next_loss_over_random"] = value - 0.3
                        if name == "erase":
                            metrics |= {metric: 0.1 * len(metric) for metric in ACCURACIES}
                        rows += [head | {"metric": metric, "value": v} for metric, v in metrics.items()]
    table = pd.DataFrame(rows).astype({"layer": "Int64"})
    return table.assign(value_low=table.value - 0.05, value_high=table.value + 0.05, documents=12)


@pytest.fixture(scope="module")
def run(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("figure5") / "run"
    shutil.copytree(tiny_run.folder, folder)
    (folder / "probes").mkdir()
    probe_table().to_parquet(folder / "probes" / "results.parquet", index=False)
    for variant in ("none", "soft"):
        (folder / "interventions" / variant).mkdir(parents=True)
        effects(variant).to_parquet(folder / "interventions" / variant / "results.parquet", index=False)
    return folder


def drawn(
    monkeypatch: pytest.MonkeyPatch, out: Path, *words: object
) -> tuple[pd.DataFrame, Figure, dict[str, Any]]:
    kept: list[Figure] = []
    save = shared.script.save_figure
    monkeypatch.setattr(
        shared.script, "save_figure", lambda figure, *a, **b: kept.append(figure) or save(figure, *a, **b)
    )
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, words), "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    monkeypatch.setattr(shared.script, "save_figure", save)
    return pd.read_csv(out.with_suffix(".csv")), kept[0], json.loads(out.with_suffix(".json").read_text())


def test_maps_and_lines_are_those_of_the_tables(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    numbers, figure, told = drawn(monkeypatch, tmp_path / "figure5.png", run)
    assert told["settings"] == {"variant": "none", "location": "hook_resid_post", "strength": None}
    maps = numbers[numbers.part == "map"].set_index(["panel", "layer", "distance"]).value
    assert len(maps) == 4 * len(LAYERS) * len(DISTANCES)
    for layer in LAYERS:
        for distance in DISTANCES:
            assert maps["read", layer, distance] == pytest.approx(accuracy_of(layer, distance))
            for kind, name in {"erase": "erase", "patch": "patch", "steer": "wrong label"}.items():
                expected = effect_of(name, layer, distance) - 0.3
                assert maps[kind, layer, distance] == pytest.approx(expected)
    lines = numbers[numbers.part == "line"].set_index(["panel", "line", "layer"])
    assert (lines.distance == 1).all()
    for kind, names in CONDITIONS.items():
        for name in names:
            for layer in LAYERS:
                row = lines.loc[(kind, name, layer)]
                assert row.value == pytest.approx(effect_of(name, layer, 1))
                assert row.value_high - row.value_low == pytest.approx(0.1)
    for metric in ACCURACIES:
        assert lines.loc[("read", metric, 1)].value == pytest.approx(0.1 * len(metric))
    above, below = figure.axes[:4], figure.axes[4:8]
    assert [axes.get_title() for axes in above][:2] == ["read by a linear probe", "erased"]
    assert [len(axes.lines) - 1 for axes in below] == [4, 3, 3, 4]
    # The nearest distance on the right, the last layer at the top.
    assert [label.get_text() for label in above[0].get_xticklabels()] == ["2", "1"]
    assert [label.get_text() for label in above[0].get_yticklabels()] == ["2", "1", "0"]
    assert len({axes.collections[0].get_clim() for axes in above[1:]}) == 1


def test_the_title_tells_of_how_many_documents_the_numbers_are(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    numbers, figure, _ = drawn(monkeypatch, tmp_path / "figure5.png", run)
    probed = probe_table().documents.max()
    assert f"read on {probed} test documents, changed at 12 boundaries, one of each" in figure.get_suptitle()
    assert set(numbers[numbers.panel == "erase"].documents) == {12}
    # At some boundaries a patch has no donor.
    patched = numbers.assign(documents=numbers.documents.where(numbers.panel != "patch", 9))
    told = draw_interventions(patched).get_suptitle()
    assert (
        "boundaries, one of each document: erased at 12, patched at 9, steered to a wrong label at 12" in told
    )


def test_one_line_draws_the_same(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, figure, _ = drawn(monkeypatch, tmp_path / "figure5.png", run, "--variant", "soft", "--strength", 3)
    same = probekit.plot_interventions(Run.open(run), "soft", strength=3)
    assert same.get_suptitle() == figure.get_suptitle()
    for axes, others in zip(same.axes, figure.axes, strict=True):
        assert [text.get_text() for text in axes.texts] == [text.get_text() for text in others.texts]
        assert len(axes.lines) == len(others.lines)


def test_marks_and_strength(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = (run, "--variant", "soft", "--strength", 3)
    numbers, figure, _ = drawn(monkeypatch, tmp_path / "figure5.png", *words)
    steer = numbers[(numbers.panel == "steer") & (numbers.part == "map")]
    assert steer.value.max() == pytest.approx(effect_of("wrong label", 2, 2, 3.0) - 0.3)
    texts = [text.get_text() for text in figure.axes[1].texts]
    assert [text.endswith("+") for text in texts] == [True, True, False, False, False, False]
    assert "conditioned" in figure.get_suptitle()
    # Within its interval of 0: 0.01 * 5 + 0.5 - 0.3 is not, and so no brackets.
    assert not any(text.startswith("(") for text in texts)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variant", "joint"], "no interventions on joint at hook_resid_post, but on none at hook_"),
        (["--location", "attn.hook_z"], "no interventions on none at attn.hook_z"),
        (["--strength", "2"], "strength 2 was not tried; 1, 3 were"),
    ],
)
def test_what_is_not_there_is_refused(
    words: list[str],
    said: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(SystemExit, match="2"):
        drawn(monkeypatch, tmp_path / "figure5.png", run, *words)
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_without_interventions_is_refused(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        drawn(monkeypatch, tmp_path / "figure5.png", tiny_run.folder)
    assert "run `probekit intervene" in capsys.readouterr().err
