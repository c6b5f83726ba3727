"""The scripts that draw the figures run on a tiny run, and what figures/ holds belongs together."""

import hashlib
import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from synthetic_probes import BASELINES, accuracy_of, probe_table

import probekit
from probekit.config import Config
from probekit.probing.locations import LOCATIONS
from probekit.reports import manifest
from probekit.reports.figures import Panel
from probekit.run import Run

ROOT = Path(__file__).parents[1]
FIGURES = sorted((ROOT / "figures").glob("*.png"))


def run_script(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "analyses" / name), run_name="__main__")


def probed(run: Run, folder: Path, table: pd.DataFrame, settings: dict[str, object] | None = None) -> Path:
    """A copy of a run, with other settings and with results of probes."""
    shutil.copytree(run.folder, folder)
    config = run.config.override(settings or {})
    (folder / "config.yaml").write_text(config.to_yaml())
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["seeds"]["run"] = config.seed
    (folder / "provenance.json").write_text(json.dumps(provenance))
    (folder / "probes").mkdir()
    table.to_parquet(folder / "probes" / "results.parquet", index=False)
    return folder


def test_demo_overview(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = probe_table()
    folder = probed(tiny_run, tmp_path / "run", table)
    evaluation = probekit.evaluate(Run(folder, tiny_run.config), quiet=True)
    out = tmp_path / "overview.png"
    run_script("demo_overview.py", folder, "--out", out, monkeypatch=monkeypatch)
    numbers = pd.read_csv(out.with_suffix(".csv"))
    shown = numbers[numbers.panel == "perplexity"]
    assert shown.perplexity.to_numpy() == pytest.approx(evaluation.perplexity.perplexity.to_numpy())
    cells = numbers[numbers.panel == "probes"]
    expected = Panel("none", "hook_resid_post").cells(table)
    columns = ["layer", "distance", "accuracy"]
    np.testing.assert_allclose(cells[columns].astype(float), expected[columns].astype(float))
    assert_belongs_together(out)
    with pytest.raises(SystemExit):
        run_script("demo_overview.py", folder, "--variant", "joint", "--out", out, monkeypatch=monkeypatch)


@pytest.mark.parametrize("options", [(), ("--parallel",)])
def test_figure_2(options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_script("figure2_locations.py", *options, monkeypatch=monkeypatch)
    out = tmp_path / "figures" / f"figure2_locations{'_parallel' if options else ''}.png"
    shown = pd.read_csv(out.with_suffix(".csv")).location.tolist()
    assert shown == [name for name in LOCATIONS if not options or name != "hook_resid_mid"]
    assert_belongs_together(out)


@pytest.fixture
def figure_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[pd.DataFrame, Figure]]:
    """Draws Figure 3, and gives its numbers and the figure."""

    def draw(*arguments: object) -> tuple[pd.DataFrame, Figure]:
        kept = []
        save = manifest.save_figure
        monkeypatch.setattr(
            manifest, "save_figure", lambda figure, *a, **b: kept.append(figure) or save(figure, *a, **b)
        )
        out = tmp_path / "figure3.png"
        run_script("figure3_probing.py", *arguments, "--out", out, monkeypatch=monkeypatch)
        monkeypatch.setattr(manifest, "save_figure", save)
        assert_belongs_together(out)
        return pd.read_csv(out.with_suffix(".csv")), kept[0]

    return draw


def panels_below(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.subfigs[1].axes if axes.lines]


def marks_above(figure: Figure) -> list[list[str]]:
    """The marks of every heat map."""
    return [
        [text.get_text() for text in axes.texts if text.get_text()] for axes in figure.subfigs[0].axes[:-1]
    ]


def test_figure_3_of_several_variants(tiny_run: Run, tmp_path: Path, figure_3):
    table = probe_table()
    numbers, figure = figure_3(probed(tiny_run, tmp_path / "run", table))
    wanted = table[(table.solver == "softmax") | (table.reader != "probe")].query("horizon == 1")
    assert len(numbers) == len(wanted)
    assert numbers.accuracy.sum() == pytest.approx(wanted.accuracy.sum())
    heat_maps = figure.subfigs[0].axes[:-1]
    assert [axes.get_title() for axes in heat_maps[:3]] == ["none", "random", "soft"]
    assert [axes.get_ylabel() for axes in heat_maps[::3]] == ["heads", "resid post", "final norm"]
    assert marks_above(figure) == [["–"], ["–"], ["*", "–"]] * 2 + [[], [], ["*"]]
    assert len({axes.collections[0].get_clim() for axes in heat_maps}) == 1
    # Layer 2 is best on validation, though it is injected at one distance.
    for axes, location in zip(
        panels_below(figure), ["attn.hook_z", "hook_resid_post", "ln_final.hook_out"], strict=True
    ):
        for variant in ("none", "random", "soft"):
            cells = Panel(variant, location).cells(table)
            line = next(line for line in axes.lines if line.get_label() == variant)
            shown = cells[cells.layer == 2].sort_values("distance")
            np.testing.assert_allclose(line.get_xydata(), shown[["distance", "accuracy"]].astype(float))
        assert {*BASELINES} <= {line.get_label() for line in axes.lines}
        assert ("best layer: none 2, random 2, soft 2" in axes.get_title()) == (
            location != "ln_final.hook_out"
        )


def test_the_layer_is_chosen_on_validation_and_not_on_test(tiny_run: Run, tmp_path: Path, figure_3):
    """Where no layer is injected: injected reads, however good, choose nothing."""
    table = probe_table(("none", "soft"), ("hook_resid_post",))
    of_soft = (table.variant == "soft") & (table.layer == 2) & (table.distance == 1)
    table.loc[of_soft, "validation_cross_entropy"] = 0.0
    first = (table.layer == 0) & (table.distance > 1)
    table.loc[first, "validation_cross_entropy"] -= 1.0
    _, figure = figure_3(probed(tiny_run, tmp_path / "run", table))
    assert "best layer: none 0, soft 0" in panels_below(figure)[0].get_title()


def test_figure_3_of_one_variant_has_a_line_for_each_layer(tiny_run: Run, tmp_path: Path, figure_3):
    folder = probed(tiny_run, tmp_path / "run", probe_table())
    options = ("--variants", "soft", "--locations", "hook_resid_post", "--metric", "bits")
    options += ("--horizon", 2, "--solver", "ridge")
    numbers, figure = figure_3(folder, *options)
    probes = numbers[numbers.reader == "probe"]
    assert {*zip(probes.variant, probes.location, probes.horizon, probes.solver, strict=True)} == {
        ("soft", "hook_resid_post", 2, "ridge")
    }
    (axes,) = panels_below(figure)
    assert axes.get_ylabel() == "bits over the prior"
    assert {f"layer {n}" for n in range(3)} <= {line.get_label() for line in axes.lines}


def test_runs_that_differ_in_their_seed_are_averaged(tiny_run: Run, tmp_path: Path, figure_3):
    tables = [probe_table(("none", "fixed"), ("hook_resid_post",), seeds=(seed,)) for seed in (0, 4)]
    folders = [
        probed(tiny_run, tmp_path / f"seed{seed}", table, {"seed": seed})
        for seed, table in zip((0, 4), tables, strict=True)
    ]
    numbers, figure = figure_3(*folders)
    assert {*numbers.variant.dropna()} == {"none", "fixed"}
    assert {*numbers.run} == {"seed0", "seed4"}
    lines = panels_below(figure)[0].lines
    mean = next(line for line in lines if line.get_label() == "none")
    expected = [accuracy_of(2, distance) + 0.02 for distance in mean.get_xdata()]
    np.testing.assert_allclose(mean.get_ydata(), expected)
    assert [line.get_label() for line in lines].count("_seed") == 4


def test_other_runs_stand_side_by_side(tiny_run: Run, tmp_path: Path, figure_3):
    table = probe_table(("none", "soft"), ("hook_resid_post",))
    folders = [
        probed(tiny_run, tmp_path / "first", table),
        probed(tiny_run, tmp_path / "second", table, {"conditioning.skip_layers": 1}),
    ]
    numbers, figure = figure_3(*folders, "--variants", "soft", "none")
    titles = ["first: soft", "second: soft", "first: none", "second: none"]
    assert [axes.get_title() for axes in figure.subfigs[0].axes[:4]] == titles
    assert {*numbers.variant.dropna()} == {*titles}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "none", "joint"], "variant joint is not probed; none, random, soft are"),
        (["--horizon", "3"], "horizon 3 is not probed; 1, 2 are"),
        (["--solver", "lda"], "solver lda is not probed"),
        (["--locations", "hook_mlp_out"], "location hook_mlp_out is not probed"),
    ],
)
def test_what_was_not_probed_is_named(options, message, tiny_run: Run, tmp_path: Path, figure_3, capsys):
    folder = probed(tiny_run, tmp_path / "run", probe_table())
    with pytest.raises(SystemExit):
        figure_3(folder, *options)
    assert message in capsys.readouterr().err


def test_runs_of_other_corpora_are_not_compared(tiny_run: Run, tmp_path: Path, figure_3, capsys):
    folders = [probed(tiny_run, tmp_path / name, probe_table()) for name in ("a", "b")]
    facts = folders[1] / "corpus" / "facts.json"
    facts.write_text(facts.read_text().replace(tiny_run.corpus.facts["fingerprint"], "another"))
    with pytest.raises(SystemExit):
        figure_3(*folders)
    assert "different corpora" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        figure_3(folders[0], folders[0])
    assert "names of their own" in capsys.readouterr().err


def test_planted_orderings(
    tiny_config: Config, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Config, "from_preset", lambda name: tiny_config)
    # Two seeds of which the first is there already: it must be used as it is.
    shutil.copytree(tiny_run.folder, tmp_path / "runs" / "seed0")
    written = (tmp_path / "runs" / "seed0" / "run.json").read_bytes()
    out = tmp_path / "orderings.png"
    run_script(
        "planted_orderings.py",
        *("--seeds", 0, 1, "--runs", tmp_path / "runs", "--out", out),
        monkeypatch=monkeypatch,
    )
    assert (tmp_path / "runs" / "seed0" / "run.json").read_bytes() == written
    table = pd.read_csv(out.with_suffix(".csv"), dtype={"seed": str}).set_index(["first", "second", "seed"])
    assert set(table.index.get_level_values("seed")) == {"0", "1", "mean"}
    for seed in (0, 1):
        losses = probekit.load_run(tmp_path / "runs" / f"seed{seed}").losses()
        mean = losses[losses.actions != "true"].groupby("variant")[["loss", "tokens"]].sum()
        perplexity = np.exp(mean.loss / mean.tokens)
        found = table.loc[("soft", "predicted", str(seed))]
        assert found.value == pytest.approx(perplexity["soft"] - perplexity["predicted"])
        assert found.low <= found.value <= found.high
    assert_belongs_together(out)


@pytest.mark.parametrize("picture", FIGURES, ids=lambda path: path.stem)
def test_kept_figures_have_their_numbers_and_manifest(picture: Path):
    assert_belongs_together(picture)


def assert_belongs_together(picture: Path) -> None:
    assert picture.read_bytes().startswith(b"\x89PNG")
    manifest = json.loads(picture.with_suffix(".json").read_text("utf-8"))
    digest = hashlib.sha256(picture.with_suffix(".csv").read_bytes()).hexdigest()
    assert manifest["numbers_sha256"] == digest
    assert (ROOT / manifest["script"]).is_file()
    for run in manifest["runs"]:
        Config.from_dict(run["config"])
        assert run["seeds"]["run"] == run["config"]["seed"]
