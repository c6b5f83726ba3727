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
import shared.script
from figure1_method import MIXING
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from synthetic_probes import BASELINES, accuracy_of, probe_table

import probekit
from probekit.config import Config
from probekit.io import read_json, write_json
from probekit.models.locations import LABELS
from probekit.models.mixing import VARIANTS
from probekit.reports.plot_probes import Panel
from probekit.run.run import Run
from probekit.sweeps import grid

ROOT = Path(__file__).parents[2]
FIGURES = sorted((ROOT / "figures").glob("*.png"))


def run_script(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(ROOT / "analyses" / name), run_name="__main__")


def probed(run: Run, folder: Path, table: pd.DataFrame, settings: dict[str, object] | None = None) -> Path:
    """A copy of a run, with other settings and with results of probes."""
    shutil.copytree(run.folder, folder)
    config = run.config.override(settings or {})
    (folder / "config.yaml").write_text(config.to_yaml())
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
    assert shown == [name for name in LABELS if not options or name != "hook_resid_mid"]
    assert_belongs_together(out)


@pytest.fixture
def figure_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[pd.DataFrame, Figure]]:
    """Draws Figure 3, and gives its numbers and the figure."""

    def draw(*arguments: object) -> tuple[pd.DataFrame, Figure]:
        kept = []
        save = shared.script.save_figure
        monkeypatch.setattr(
            shared.script, "save_figure", lambda figure, *a, **b: kept.append(figure) or save(figure, *a, **b)
        )
        out = tmp_path / "figure3.png"
        run_script("figure3_probing.py", *arguments, "--out", out, monkeypatch=monkeypatch)
        monkeypatch.setattr(shared.script, "save_figure", save)
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
            shown = cells[cells.layer == 2].sort_values("distance", ascending=False)
            assert line.get_xdata().tolist() == shown.position.tolist()
            np.testing.assert_allclose(line.get_ydata(), shown.accuracy)
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
    expected = [accuracy_of(2, int(name)) + 0.02 for name in mean.get_xdata()]
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
    write_json(facts, read_json(facts) | {"fingerprint": "another"})
    with pytest.raises(SystemExit):
        figure_3(*folders)
    assert "different corpora" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        figure_3(folders[0], folders[0])
    assert "names of their own" in capsys.readouterr().err


def test_figure_1_shows_the_structure_of_the_model(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "method.png"
    run_script("figure1_method.py", tiny_run.folder, "--out", out, monkeypatch=monkeypatch)
    facts = pd.read_csv(out.with_suffix(".csv"), index_col="fact").value
    model = tiny_run.model("joint")
    assert int(facts.layers) == tiny_run.config.lm.layers
    assert int(facts.actions) == tiny_run.corpus.k
    assert int(facts.adapter_parameters) == sum(p.numel() for p in model.adapter.parameters())
    assert facts.conditioned == str(tuple(range(tiny_run.config.conditioning.skip_layers, int(facts.layers))))
    assert_belongs_together(out)


def test_every_mixing_has_a_description():
    assert set(MIXING) == {type(variant.training) for variant in VARIANTS.values()}


def test_table_1(tiny_config: Config, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Config, "from_preset", lambda name: tiny_config)
    out, evaluated = tmp_path / "table.png", tmp_path / "evaluated"
    shutil.copytree(tiny_run.folder, evaluated)
    probekit.evaluate(evaluated, quiet=True)
    run_script(
        "table1_perplexity.py",
        *(evaluated, "--preset", "demo", "--seeds", 2, "--runs", tmp_path / "runs", "--out", out),
        *("--set", "evaluation.batch_size", 16),
        monkeypatch=monkeypatch,
    )
    table = pd.read_csv(out.with_suffix(".csv"))
    assert set(table["base LM"]) == {"demo", "evaluated"}
    trained = table[table["base LM"] == "demo"]
    for seed in (0, 1):
        losses = probekit.load_run(tmp_path / "runs" / "demo" / "all" / f"seed{seed}").losses()
        sums = losses[losses.actions != "true"].groupby("variant")[["loss", "tokens"]].sum()
        perplexity = np.exp(sums.loss / sums.tokens)
        rows = trained[trained.seed == seed].set_index("name").value
        assert rows["soft"] == pytest.approx(perplexity["soft"])
        assert rows["soft − predicted"] == pytest.approx(perplexity["soft"] - perplexity["predicted"])
    whole = trained[trained.seed.isna()].set_index("name")
    assert {*whole.index} >= {*VARIANTS} - {"mixed"} | {"none", "oracle (true actions)", "joint − soft"}
    assert (whole.seeds == 2).all()
    assert whole.seed_spread.notna().all()
    assert (whole.value_low <= whole.value).all()
    assert (whole.value <= whole.value_high).all()
    assert_belongs_together(out)


def test_bad_input_of_a_script_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for words, message in (
        ([tmp_path / "nothing"], "nothing does not exist"),
        (["--preset", "demo", "--set", "lm.layer", 3], "did you mean 'lm.layers'?"),
        ([tmp_path, "--out", tmp_path / "table.txt"], "must end in .png, .pdf, .svg"),
    ):
        with pytest.raises(SystemExit) as end:
            run_script("table1_perplexity.py", *words, monkeypatch=monkeypatch)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_table_2(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, folder = tmp_path / "table.png", tmp_path / "run"
    small = {"generation.prompts": 8, "generation.samples": 4, "generation.lengths": [6, 10]}
    shutil.copytree(tiny_run.folder, folder)
    config = tiny_run.config.override(
        small | {"generation.context": 8, "mixing.variants": ["soft", "oracle"]}
    )
    (folder / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(SystemExit):
        run_script("table2_generation.py", tmp_path / "nothing", "--out", out, monkeypatch=monkeypatch)
    probekit.evaluate(folder, quiet=True)
    run_script("table2_generation.py", folder, "--out", out, monkeypatch=monkeypatch)
    table = pd.read_csv(out.with_suffix(".csv")).set_index(["metric", "texts", "length", "name"]).value
    measured = probekit.load_run(folder).generation_metrics()["metrics"]
    assert len(measured) > 20
    for row in measured:
        name = "oracle (true actions)" if row["actions"] == "true" and row["variant"] == "oracle" else None
        key = row["metric"], row["texts"], row["length"], name or row["variant"]
        assert table[key] == pytest.approx(row["value"], nan_ok=True)
    assert "oracle (true actions)" in table.index.get_level_values("name")
    assert ("perplexity", "test documents", 0, "soft") in table.index
    assert_belongs_together(out)


def test_table_3(tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Config, "from_preset", lambda name: tiny_config)
    out, runs = tmp_path / "table.png", tmp_path / "runs"
    only = ("--seeds", 1, "--runs", runs, "--out", out, "--only", "joint", "planner's own loss alone")
    run_script("table3_joint.py", *only, monkeypatch=monkeypatch)
    table = pd.read_csv(out.with_suffix(".csv"))
    whole = table[table.seed.isna()].set_index(["what", "name"])
    sweep = probekit.Sweep.open(runs)
    assert len(sweep.runs) == 3
    perplexity = sweep.table().set_index(["variant", "member", "seed"]).value
    difference = perplexity["joint", "joint", 0] - perplexity["soft", "soft--planner-frozen", 0]
    assert whole.value["difference", "joint"] == pytest.approx(difference)
    readers = pd.DataFrame(
        sweep.runs[next(p for p in sweep.runs if p.member == "joint")].evaluation()["planner"]
    )
    accuracy = readers[(readers.reader == "planner after joint") & (readers.metric == "accuracy")].value
    assert whole.value["planner accuracy", "joint"] == pytest.approx(accuracy.item())
    assert_belongs_together(out)
    with pytest.raises(SystemExit):
        run_script("table3_joint.py", "--only", "nothing", monkeypatch=monkeypatch)


@pytest.fixture(scope="module")
def fractions(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> probekit.Sweep:
    """A sweep over the mixing fraction, with generated text."""
    less = {"corpus.planted.documents": 120, "mixing.variants": ["mixed"]}
    less |= {"generation.prompts": 4, "generation.samples": 4, "generation.lengths": [8, 16]}
    config = tiny_config.override(less | {"generation.context": 8})
    members = grid(config, {"mixing.fraction": [1, 0, 0.5]})
    out = tmp_path_factory.mktemp("sweeps") / "fractions"
    done = probekit.sweep(config, members, [0, 1], out, generation=True, quiet=True)
    for number, run in enumerate(done.runs.values()):  # so few texts have no MAUVE
        found = run.generation_metrics()
        mauve = {
            "metric": "mauve",
            "variant": "mixed",
            "actions": "planner",
            "texts": "samples",
            "length": 16,
        }
        mauve |= {"value": 0.5 + 0.05 * number, "value_low": 0.4, "value_high": 0.9, "documents": 4}
        found["metrics"].append(mauve)
        write_json(run.folder / "generation.json", found)
    return done


def test_figure_4(fractions: probekit.Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "figure4.png"
    script = "figure4_mixing_fraction.py"
    run_script(script, "--runs", fractions.folder, "--out", out, monkeypatch=monkeypatch)
    assert_belongs_together(out)
    table = pd.read_csv(out.with_suffix(".csv"), dtype={"seed": str})
    metrics = {"perplexity", "rouge2", "mauve", "levenshtein", "latent_perplexity", "plan_following"}
    assert set(table.metric) == metrics
    assert set(zip(table.fraction, table.seed, strict=True)) == {
        (fraction, seed) for fraction in (0.0, 0.5, 1.0) for seed in ("0", "1", "mean")
    }
    assert set(table[table.texts != "test documents"].length) == {16}
    rows = table.set_index(["metric", "texts", "fraction", "seed"])
    evaluated = {
        (place.member.partition("=")[2], str(place.seed)): pd.DataFrame(run.evaluation()["perplexity"])
        .set_index("variant")
        .perplexity["mixed"]
        for place, run in fractions.runs.items()
    }
    for seed in ("0", "1"):
        gain = 100 * (1 - evaluated["1", seed] / evaluated["0", seed])
        found = rows.loc[("perplexity", "test documents", 1.0, seed)]
        assert found.improvement == pytest.approx(gain), "less perplexity is up"
        assert found.low <= found.improvement <= found.high
        assert rows.loc[("perplexity", "test documents", 0.0, seed)].improvement == 0.0
    mean = rows.loc[("perplexity", "test documents", 1.0, "mean")]
    logarithms = [np.log(evaluated["1", s] / evaluated["0", s]) for s in ("0", "1")]
    assert mean.improvement == pytest.approx(100 * (1 - np.exp(np.mean(logarithms))))
    assert mean.seeds == 2
    # Values by the order of runs: seed 0 of 1, 0, 0.5, then seed 1. More of it is better.
    mauve = rows.loc[("mauve", "samples", 1.0, "0")]
    assert mauve.improvement == pytest.approx(100 * (0.5 / 0.55 - 1))
    assert np.isnan(mauve.low)
    average = rows.loc[("mauve", "samples", 1.0, "mean")]
    assert average.improvement == pytest.approx(100 * ((0.5 + 0.65) / (0.55 + 0.7) - 1))


def test_figure_4_of_generated_text_is_as_computed_by_hand(
    fractions: probekit.Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "figure4.png"
    run_script(
        "figure4_mixing_fraction.py", "--runs", fractions.folder, "--out", out, monkeypatch=monkeypatch
    )
    table = pd.read_csv(out.with_suffix(".csv"), dtype={"seed": str})
    for metric, sign in (("levenshtein", -1), ("latent_perplexity", -1)):
        ratio = {}
        for place, run in fractions.runs.items():
            made = pd.read_parquet(run.folder / "generation.parquet").query(
                "variant == 'mixed' and actions == 'planner' and texts == 'continuations' and length == 16 "
                "and metric == @metric"
            )
            ratio[place.member.partition("=")[2], place.seed] = made[["sum", "count"]].sum()
        pooled = {f: sum(ratio[f, seed] for seed in (0, 1)) for f in ("0", "0.5")}
        value = {f: sums["sum"] / sums["count"] for f, sums in pooled.items()}
        if metric == "latent_perplexity":
            value = {f: np.exp(v) for f, v in value.items()}
        row = table.query(
            "metric == @metric and texts == 'continuations' and fraction == 0.5 and seed == 'mean'"
        ).iloc[0]
        assert row.value == pytest.approx(value["0.5"])
        assert row.improvement == pytest.approx(100 * sign * (value["0.5"] / value["0"] - 1))


def test_figure_4_needs_its_sweep(
    fractions: probekit.Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    folder = shutil.copytree(fractions.folder, tmp_path / "copy")
    shutil.rmtree(folder / "mixing.fraction=0")

    def refused(folder: Path) -> str:
        with pytest.raises(SystemExit):
            run_script("figure4_mixing_fraction.py", "--runs", folder, monkeypatch=monkeypatch)
        return capsys.readouterr().err

    assert "has no finished run with mixing.fraction 0" in refused(folder)
    assert "does not exist; make one with `probekit sweep" in refused(tmp_path / "no")
    record = read_json(folder / "sweep.json")
    record["members"] = {"a": {"mixing.fraction": 0.5, "lm.layers": 2}}
    write_json(folder / "sweep.json", record)
    assert "sweeps over mixing.fraction, lm.layers, not over mixing.fraction alone" in refused(folder)


@pytest.mark.parametrize("picture", FIGURES, ids=lambda path: path.stem)
def test_kept_figures_have_their_numbers_and_manifest(picture: Path):
    assert_belongs_together(picture)


def assert_belongs_together(picture: Path) -> None:
    assert picture.read_bytes().startswith(b"\x89PNG")
    manifest = json.loads(picture.with_suffix(".json").read_text("utf-8"))
    digest = hashlib.sha256(picture.with_suffix(".csv").read_bytes()).hexdigest()
    assert manifest["numbers_sha256"] == digest
    assert (ROOT / manifest["script"]).is_file()
    made = [json.dumps(run["config"], sort_keys=True) for run in manifest["runs"]]
    assert len(set(made)) == len(made), "a run was read twice"


@pytest.mark.parametrize("script", sorted((ROOT / "analyses").glob("*.py")), ids=lambda path: path.stem)
def test_make_figures_runs_every_script(script: Path):
    assert f"$(DRAW)/{script.name}" in (ROOT / "Makefile").read_text("utf-8")
