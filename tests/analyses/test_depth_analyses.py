"""The scripts that draw the figures of depth ensembles: their numbers against the runs' files."""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shared.depth
import shared.script
from matplotlib.figure import Figure
from shared.depth import layer_style
from test_analyses import assert_belongs_together, run_script

import probekit
from probekit.config import Config
from probekit.io import read_json, write_json
from probekit.run.run import Run

Draw = Callable[..., tuple[pd.DataFrame, Figure]]

LATE = ("ensemble", "distilled")


@pytest.fixture(scope="module")
def depth_config(tiny_config: Config) -> Iterator[Config]:
    """What every preset is in this file."""
    less = {"corpus.planted.documents": 100, "training.lm.batch_size": 64, "training.depth.batch_size": 32}
    less |= {"training.depth.learning_rate": 3e-2, "evaluation.questions": 20, "depth.layers": 3}
    config = tiny_config.override(less)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, "from_preset", lambda name: config)
        yield config


def shuffle_choices(folder: Path) -> None:
    """Lets all that predict solve other questions: so little trained, they solve the same."""
    generator = np.random.default_rng(0)
    for path in sorted(folder.glob("*/seed*/choices.parquet")):
        choices = pd.read_parquet(path)
        choices.assign(solved=generator.random(len(choices)) < 0.5).to_parquet(path, index=False)


@pytest.fixture(scope="module")
def table_1(depth_config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """A sweep over tunings as the script of Table 1 trains it, and the table."""
    folder = tmp_path_factory.mktemp("depth")
    out, name = folder / "table.png", "depth_table1_parameters.py"
    words = ["--preset", "demo", "--seeds", 2, "--tunings", "frozen", "lora", "--runs", folder, "--out", out]
    with pytest.MonkeyPatch.context() as patch:
        run_script(name, *words, monkeypatch=patch)
        shuffle_choices(folder / "demo")
        run_script(name, folder / "demo", "--out", out, monkeypatch=patch)
    assert_belongs_together(out)
    return folder / "demo", pd.read_csv(out.with_suffix(".csv"))


@pytest.fixture
def draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Runs a script; its numbers and the figure."""

    def run(name: str, *words: object) -> tuple[pd.DataFrame, Figure]:
        kept, save, out = [], shared.script.save_figure, tmp_path / "figure.png"
        for module in (shared.script, shared.depth):
            monkeypatch.setattr(
                module, "save_figure", lambda figure, *a, **b: kept.append(figure) or save(figure, *a, **b)
            )
        run_script(name, *words, "--out", out, monkeypatch=monkeypatch)
        for module in (shared.script, shared.depth):
            monkeypatch.setattr(module, "save_figure", save)
        assert_belongs_together(out)
        return pd.read_csv(out.with_suffix(".csv")), kept[0]

    return run


def runs_of(folder: Path, member: str) -> dict[int, Run]:
    return {p.seed: run for p, run in probekit.Sweep.open(folder).runs.items() if p.member == member}


def logged(run: Run, member: str) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by the name of what was logged."""
    rows = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["stage"] == f"depth/{member}" and "ensemble_loss" in row:
            for name in row.keys() - {"stage", "step", "loss"}:
                found.setdefault(name, []).append((row["step"], row[name]))
    return found


def averaged(values: list[float], window: int) -> list[float]:
    reach = window // 2
    return [np.mean(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]


def in_table(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of what is logged under a name."""
    quantity, layer = re.fullmatch(r"(.*?)(-\d+)?", name).groups()
    rows = table[table.quantity == quantity]
    return rows[rows.layer.isna() if layer is None else rows.layer == int(layer)]


def ratio(runs: dict[int, Run], metric: str, variant: str) -> dict[int, float]:
    """Perplexity or accuracy of every seed, and under -1 over all of them."""
    sums = {}
    for seed, run in runs.items():
        if metric == "perplexity":
            rows = run.losses().query("variant == @variant")
            sums[seed] = rows.loss.sum(), rows.tokens.sum()
        else:
            rows = run.choices().query("variant == @variant")
            sums[seed] = rows.solved.sum(), len(rows)
    sums[-1] = tuple(map(sum, zip(*sums.values(), strict=True)))
    each = {seed: total / count for seed, (total, count) in sums.items()}
    return {seed: np.exp(value) if metric == "perplexity" else value for seed, value in each.items()}


def test_table_1(table_1: tuple[Path, pd.DataFrame]):
    folder, table = table_1
    assert set(table.runs) == {"demo, frozen", "demo, lora"}
    rows = table.assign(seed=table.seed.fillna(-1)).set_index(["runs", "metric", "name", "seed"]).sort_index()
    names = ("none", "plain", "repeated", *LATE)
    pairs = (("ensemble", "plain"), ("ensemble", "repeated"), ("distilled", "ensemble"))
    for tuning, metric in itertools.product(("frozen", "lora"), ("perplexity", "accuracy")):
        runs = runs_of(folder, tuning)
        expected = {name: ratio(runs, metric, name) for name in names}
        wanted = {name: expected[name] for name in names}
        wanted |= {
            f"{first} − {second}": {
                seed: expected[first][seed] - expected[second][seed] for seed in (0, 1, -1)
            }
            for first, second in pairs
        }
        for name, by_seed in wanted.items():
            for seed, value in by_seed.items():
                row = rows.loc[(f"demo, {tuning}", metric, name, seed)]
                assert row.value == pytest.approx(value, abs=1e-12)
                assert row.value_low <= row.value + 1e-12
                assert row.value <= row.value_high + 1e-12
                assert row.seeds == (2 if seed == -1 else 1)
                assert (
                    row.documents
                    == (runs[0].losses() if metric == "perplexity" else runs[0].choices()).document.nunique()
                )


def test_table_1_counts_what_is_trained(table_1: tuple[Path, pd.DataFrame]):
    folder, table = table_1
    counted = table[table.seed.isna()].set_index(["runs", "metric", "name"])
    for tuning in ("frozen", "lora"):
        run = runs_of(folder, tuning)[0]
        lm = sum(p.numel() for p in run.plain_model().parameters())
        for member in ("plain", "repeated", *LATE):
            own = sum(p.numel() for p in run.model(member).depth.trained)
            path = folder / tuning / "seed0" / "depth" / member / "adapter_model.safetensors"
            assert path.is_file() == (tuning == "lora")
            if path.is_file():
                from safetensors.numpy import load_file

                own += sum(array.size for array in load_file(path).values())
            row = counted.loc[(f"demo, {tuning}", "perplexity", member)]
            assert row.parameters == own
            assert row.share == pytest.approx(own / lm)
        assert counted.loc[(f"demo, {tuning}", "accuracy", "none")].parameters == 0


def test_figure_1(table_1: tuple[Path, pd.DataFrame], draw: Draw):
    folder, _ = table_1
    table, figure = draw("depth_figure1_losses.py", folder, "--window", 3)
    for tuning, member in itertools.product(("frozen", "lora"), ("plain", *LATE)):
        own = table[(table.runs == f"demo, {tuning}") & (table.member == member)]
        each = {seed: logged(run, member) for seed, run in runs_of(folder, tuning).items()}
        names = [name for name in each[0] if "loss" in name]
        assert len(names) == (2 if member == "plain" else 4)
        for name in names:
            lines = in_table(own, name)
            values = {seed: [value for _, value in found[name]] for seed, found in each.items()}
            values[None] = list(np.mean([*values.values()], axis=0))
            for seed, expected in values.items():
                rows = lines[lines.seed.isna() if seed is None else lines.seed == seed]
                assert rows.step.tolist() == [step for step, _ in each[0][name]]
                assert rows.value.tolist() == pytest.approx(expected)
                assert rows.smoothed.tolist() == pytest.approx(averaged(expected, 3))
    first, second = figure.axes[:2]
    assert first.get_ylim() == second.get_ylim()
    # Of each line two thin ones, for the seeds; the layers' in their colours.
    labels = [line.get_label() for line in second.lines]
    assert labels.count("_seed") == 2 * 5
    drawn = {line.get_label(): line for line in second.lines}
    assert drawn["last layer − 1"].get_color() == layer_style(-2)["color"]
    expected = in_table(table[(table.runs == "demo, frozen") & (table.member == "distilled")], "layer_loss-2")
    np.testing.assert_allclose(drawn["last layer − 1"].get_ydata(), expected[expected.seed.isna()].smoothed)


def test_figure_4(table_1: tuple[Path, pd.DataFrame], draw: Draw):
    folder, _ = table_1
    table, figure = draw("depth_figure4_routing.py", folder / "frozen" / "seed1", "--window", 1)
    assert set(table.runs) == {"seed1"}
    for member in ("repeated", *LATE):
        own = table[table.member == member]
        found = logged(runs_of(folder, "frozen")[1], member)
        for name in ("sparsity", "weight-1", "weight-2", "weight-3"):
            rows = in_table(own, name)
            assert [*zip(rows[rows.seed == 1].step, rows[rows.seed == 1].value, strict=True)] == [
                (step, pytest.approx(value)) for step, value in found[name]
            ]
            assert rows[rows.seed.isna()].value.tolist() == rows[rows.seed == 1].smoothed.tolist()
        assert own[own.quantity == "weight"].groupby(
            ["seed", "step"], dropna=False
        ).value.sum().to_numpy() == pytest.approx(1)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["sparsity of the routing", *(f"{m}: mean weight" for m in ("repeated", *LATE))]
    assert [line.get_label() for line in figure.axes[0].lines] == ["repeated", *LATE]


def test_figure_2(table_1: tuple[Path, pd.DataFrame], draw: Draw):
    folder, _ = table_1
    table, figure = draw("depth_figure2_solved.py", folder)
    layer_of = {"last layer": 2, "last layer − 1": 1, "last layer − 2": 0}
    for tuning, member in itertools.product(("frozen", "lora"), LATE):
        own = table[(table.runs == f"demo, {tuning}") & (table.member == member)]
        share = own[own.what == "share"].set_index(["name", own.seed[own.what == "share"].fillna(-1)])
        totals: dict[str, list[float]] = {}
        solvers = []
        for seed, run in runs_of(folder, tuning).items():
            choices = run.choices()
            sets = {
                name: {*choices[(choices.variant == f"{member}, layer {layer}") & choices.solved].question}
                for name, layer in layer_of.items()
            }
            whole = {*choices[(choices.variant == member) & choices.solved].question}
            questions, every, last = (
                choices.question.nunique(),
                set().union(*sets.values()),
                sets["last layer"],
            )
            expected = {name: len(solved) for name, solved in sets.items()} | {
                "the ensemble": len(whole),
                "any layer": len(every),
                "all layers": len(set.intersection(*sets.values())),
                "any layer but not the last one": len(every - last),
                "any layer but not the ensemble": len(every - whole),
                "the ensemble but not the last layer": len(whole - last),
                "the last layer but not the ensemble": len(last - whole),
            }
            for name, number in expected.items():
                assert share.loc[(name, seed)].value == pytest.approx(number / questions)
                totals.setdefault(name, []).append(number / questions)
            for question in range(questions):
                names = [name for name, solved in sets.items() if question in solved]
                solvers.append(" & ".join(names) or "none")
        assert {*share.index.get_level_values(0)} == {*totals}
        for name, values in totals.items():
            row = share.loc[(name, -1)]
            assert row.value == pytest.approx(np.mean(values))
            assert row.value_low <= row.value <= row.value_high
        counted = own[own.what == "questions"].set_index("name").value
        assert counted.to_dict() == (pd.Series(solvers).value_counts() / 2).to_dict()
    of_last = table[(table.what == "share") & (table.name == "last layer") & table.seed.isna()].iloc[0]
    value, low, high = 100 * of_last[["value", "value_low", "value_high"]]
    told = f"last layer: {value:.1f} % [{low:.1f}, {high:.1f}]"
    assert told in figure.subfigs[0].get_supxlabel()


def test_figure_2_of_four_layers_is_an_upset_diagram(
    table_1: tuple[Path, pd.DataFrame], tmp_path: Path, draw: Draw
):
    folder = shutil.copytree(table_1[0] / "frozen" / "seed0", tmp_path / "four")
    choices = pd.read_parquet(folder / "choices.parquet")
    fourth = choices[choices.layer == 0].assign(layer=-1, solved=lambda rows: rows.question % 2 == 0)
    pd.concat([choices, fourth], ignore_index=True).to_parquet(folder / "choices.parquet")
    table, figure = draw("depth_figure2_solved.py", folder)
    bars, matrix, _ = figure.subfigs[0].axes
    assert [label.get_text() for label in matrix.get_yticklabels()][-1] == "last layer − 3"
    own = table[(table.member == "ensemble") & (table.what == "questions")]
    assert [bar.get_height() for bar in bars.patches] == own.value.tolist()
    assert own.value.sum() == choices.question.nunique()
    even = own[own.name.str.contains("last layer − 3")].value.sum()
    assert even == choices.question.nunique() / 2


@pytest.fixture(scope="module")
def grid(depth_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over k and Top-K as the script of Figure 5 trains it."""
    folder = tmp_path_factory.mktemp("grids") / "grid"
    words = ["--preset", "demo", "--seeds", 2, "--layers", 1, 2, "--runs", folder]
    words += ["--out", folder.parent / "a.png"]
    with pytest.MonkeyPatch.context() as patch:
        run_script("depth_figure5_grid.py", *words, monkeypatch=patch)
    shuffle_choices(folder)
    return folder


def test_figure_5(grid: Path, draw: Draw):
    table, figure = draw("depth_figure5_grid.py", "--runs", grid)
    members = {(1, 1): "layers=1,top_k=1", (2, 1): "layers=2,top_k=1", (2, 2): "layers=2,top_k=2"}
    rows = table.assign(
        seed=table.seed.fillna(-1), layers=table.layers.fillna(0), top_k=table.top_k.fillna(0)
    )
    rows = rows.set_index(["metric", "what", "layers", "top_k", "seed"]).sort_index()
    assert {*probekit.Sweep.open(grid).members} == {"plain", *members.values()}
    for axes, (metric, digits) in zip(figure.axes, (("perplexity", 2), ("accuracy", 3)), strict=False):
        plain = ratio(runs_of(grid, "plain"), metric, "plain")
        written = {}
        for (layers, kept), member in members.items():
            cell = ratio(runs_of(grid, member), metric, "ensemble")
            for seed in (0, 1, -1):
                value, difference = (
                    rows.loc[(metric, what, layers, kept, seed)] for what in ("value", "difference")
                )
                assert value.value == pytest.approx(cell[seed])
                assert difference.value == pytest.approx(cell[seed] - plain[seed], abs=1e-12)
                assert difference.value_low <= difference.value + 1e-12
                assert difference.value <= difference.value_high + 1e-12
            written[kept - 0.5, 2.5 - layers] = f"{cell[-1]:.{digits}f}"  # fewer layers lie lower
        assert rows.loc[(metric, "value", 0, 0, -1)].value == pytest.approx(plain[-1])
        assert {text.get_position(): text.get_text() for text in axes.texts} == written
        assert f"plain: {plain[-1]:.{digits}f}" in axes.get_title()


def test_figure_5_draws_a_sweep_that_was_stopped(grid: Path, tmp_path: Path, draw: Draw, capsys):
    folder = shutil.copytree(grid, tmp_path / "grid")
    shutil.rmtree(folder / "plain" / "seed1")
    shutil.rmtree(folder / "layers=1,top_k=1")
    table, _ = draw("depth_figure5_grid.py", "--runs", folder)
    assert "not finished, and not drawn: layers=1,top_k=1/seed0, plain/seed1" in capsys.readouterr().out
    means = table[table.seed.isna() & (table.layers == 2)]
    assert set(means[means.what == "value"].seeds) == {2}
    assert set(means[means.what == "difference"].seeds) == {1}, "only seeds that plain has, too"


def refused(name: str, *words: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a script ends."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        run_script(name, *words, monkeypatch=patch)
    assert end.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert not usage or usage[0].startswith("usage:")
    return line


SCRIPTS = (
    "depth_figure1_losses.py",
    "depth_figure2_solved.py",
    "depth_figure4_routing.py",
    "depth_table1_parameters.py",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_folders_are_refused_in_one_line(name: str, tiny_run: Run, table_1, tmp_path: Path, capsys):
    assert "give sweeps or runs, or --preset" in refused(name, capsys=capsys)
    assert "nothing does not exist" in refused(name, tmp_path / "nothing", capsys=capsys)
    assert "is a run by method planner, which has no depth ensemble" in refused(
        name, tiny_run.folder, capsys=capsys
    )
    folder = table_1[0] / "frozen"
    same = refused(name, folder / "seed0", folder / "seed0", capsys=capsys)
    assert "several folders are called seed0" in same


def test_what_a_run_lacks_is_refused_in_one_line(grid: Path, table_1, tmp_path: Path, capsys):
    lone, one_layer = grid / "plain" / "seed0", grid / "layers=1,top_k=1" / "seed0"
    for name, folder, message in (
        (SCRIPTS[0], lone, "has depth.members plain; ensemble is needed too"),
        (SCRIPTS[1], lone, "has depth.members plain; the figure needs two layers or more"),
        (SCRIPTS[2], lone, "has depth.members plain; the figure needs a router"),
        (SCRIPTS[1], one_layer, "has depth.layers 1; the figure needs two layers or more"),
        (SCRIPTS[2], one_layer, "has depth.layers 1; the figure needs a router"),
        ("depth_figure5_grid.py", None, "sweeps over training.base.tuning too"),
    ):
        words = ["--runs", table_1[0]] if folder is None else [folder]
        assert message in refused(name, *words, capsys=capsys)
    folder = shutil.copytree(table_1[0] / "frozen" / "seed0", tmp_path / "run")
    state = read_json(folder / "run.json")
    for file in ("choices.parquet", "losses.parquet"):
        (folder / file).unlink()
    for name in (SCRIPTS[1], SCRIPTS[3]):
        assert f"does not exist; run `probekit evaluate {folder}`" in refused(name, folder, capsys=capsys)
    del state["stages"]["depth/distilled"]
    write_json(folder / "run.json", state)
    for name in SCRIPTS[:3]:
        assert "lacks the stage 'depth/distilled'" in refused(name, folder, capsys=capsys)
    assert "must be a whole number, 1 or more" in refused(SCRIPTS[0], folder, "--window", 0, capsys=capsys)


def test_figure_5_needs_cells_and_a_reference(grid: Path, tmp_path: Path, capsys):
    folder = shutil.copytree(grid, tmp_path / "grid")
    record = read_json(folder / "sweep.json")
    shutil.copytree(folder / "layers=2,top_k=2", folder / "another")
    again = record | {"members": record["members"] | {"another": record["members"]["layers=2,top_k=2"]}}
    write_json(folder / "sweep.json", again)
    name = "depth_figure5_grid.py"
    message = "layers=2,top_k=2 and another both have depth.layers 2 and depth.top_k 2"
    assert message in refused(name, "--runs", folder, capsys=capsys)
    write_json(folder / "sweep.json", record)
    shutil.rmtree(folder / "plain")
    assert "has no finished run with the member plain" in refused(name, "--runs", folder, capsys=capsys)
