"""One-line plots: what is drawn is held against the run's own numbers."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure
from synthetic_probes import BASELINES, DISTANCES, LAYERS, accuracy_of, probe_table

import probekit
from probekit.errors import ProbekitError
from probekit.io import write_json
from probekit.reports.plot_over_training import draw_over_training, over_training_numbers
from probekit.reports.plot_probes import METRIC_LABELS
from probekit.run.run import Run


@pytest.fixture(scope="module")
def probed(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with made-up probes."""
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("plots") / "run"))
    (run.folder / "probes").mkdir()
    probe_table().to_parquet(run.folder / "probes" / "results.parquet")
    return run


def lines_of(figure: Figure, number: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    lines = figure.axes[number].lines
    return {str(line.get_label()): (np.array(line.get_xdata()), np.array(line.get_ydata())) for line in lines}


def test_training_draws_every_stage(tiny_run: Run):
    figure = probekit.plot_training(tiny_run)
    panels = {axes.get_title(): number for number, axes in enumerate(figure.axes) if axes.get_title()}
    assert {*panels} == {"LM", "planner", "adapters"}
    metrics = tiny_run.metrics()
    for stage in metrics.stage.unique():
        name = stage.split("/")[-1]
        panel = {"lm": "LM", "planner": "planner"}.get(stage, "adapters")
        lines = lines_of(figure, panels[panel])
        own = metrics[(metrics.stage == stage) & metrics.loss.notna()]
        steps, losses = lines[name]
        assert steps.tolist() == own.step.tolist()
        width = max(1, len(own) // 20)
        if width == 1:
            np.testing.assert_allclose(losses, own.loss)
        assert own.loss.min() <= losses.min() <= losses.max() <= own.loss.max()


def test_perplexity_has_a_line_for_each_model(tiny_run: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    rows = [
        ("none", "none", 30.0),
        ("oracle", "planner", 34.0),
        ("oracle", "true", 20.0),
        ("soft", "planner", 25.0),
    ]
    table = [
        {"variant": variant, "actions": actions, "perplexity": value, "perplexity_low": value - 1}
        | {"perplexity_high": value + 2, "documents": 16, "tokens": 99}
        for variant, actions, value in rows
    ]
    write_json(run.folder / "evaluation.json", {"settings": {}, "perplexity": table})
    axes = probekit.plot_perplexity(run).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["none", "oracle (planner actions)", "oracle (true actions)", "soft"]
    texts = [text.get_text() for text in axes.texts]
    assert texts == [f"{value:.1f} [{value - 1:.1f}, {value + 2:.1f}]" for _, _, value in rows]


def test_probes_of_several_variants_share_their_colours(probed: Run):
    figure = probekit.plot_probes(probed, ["none", "random"], "attn.hook_z", horizon=2, solver="ridge")
    maps = [axes for axes in figure.axes if axes.collections and axes.get_title()]
    assert [axes.get_title() for axes in maps] == ["none", "random"]
    assert len({axes.collections[0].get_clim() for axes in maps}) == 1
    for axes in maps:
        values = np.ma.asarray(axes.collections[0].get_array()).reshape(len(LAYERS), len(DISTANCES))
        wanted = [
            [accuracy_of(layer, distance, 2, axes.get_title()) - 0.02 for distance in DISTANCES[::-1]]
            for layer in LAYERS[::-1]
        ]
        empty = [[(layer, d) == (1, 4) for d in DISTANCES[::-1]] for layer in LAYERS[::-1]]
        assert np.ma.getmaskarray(values).tolist() == empty
        np.testing.assert_allclose(values.filled(0), np.where(empty, 0, wanted))
    assert "heads" in figure.get_suptitle()


def test_what_is_drawn_where_nothing_is_asked_for(probed: Run):
    figure = probekit.plot_probes(probed)
    assert figure.get_suptitle() == "resid post, action, horizon 1, softmax"
    assert [axes.get_title() for axes in figure.axes if axes.get_title()] == ["none"]
    assert "the target's own action" in probekit.plot_probes(probed, "soft").get_suptitle()


@pytest.mark.parametrize("metric", ["accuracy", "top5", "bits", "gain", "selectivity", "compression"])
def test_every_metric_is_drawn(metric: str, probed: Run):
    assert METRIC_LABELS[metric] in [
        axes.get_ylabel() for axes in probekit.plot_probes(probed, metric=metric).axes
    ]
    assert probekit.plot_curve(probed, metric=metric).axes[0].get_ylabel() == METRIC_LABELS[metric]


def test_the_curve_has_each_variant_at_its_best_layer_and_all_baselines(probed: Run):
    figure = probekit.plot_curve(probed)
    lines = lines_of(figure)
    assert {f"{variant}, layer 2" for variant in ("none", "random", "soft")} <= {*lines}
    assert {*BASELINES} <= {*lines}
    positions, values = lines["none, layer 2"]
    np.testing.assert_allclose(values, [accuracy_of(2, int(name)) for name in positions])
    assert [*positions] == [str(distance) for distance in DISTANCES[::-1]]
    assert "hollow" in figure.axes[0].get_title()
    alone = probekit.plot_curve(probed, "none")
    assert not any("random" in name for name in lines_of(alone))
    assert "hollow" not in alone.axes[0].get_title()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"variant": "joint"}, r"no probes of variant 'joint'; it has none, random, soft|variant 'joint'"),
        ({"location": "hook_embed"}, r"location 'hook_embed'; it has .*hook_resid_post"),
        ({"horizon": 3}, r"horizon 3; it has"),
        ({"solver": "mlp"}, r"solver 'mlp'; it has"),
        ({"metric": "loss"}, r"metric is 'loss'; it must be one of accuracy"),
    ],
)
def test_what_was_not_probed_is_refused(arguments: dict, line: str, probed: Run):
    for plot in (probekit.plot_probes, probekit.plot_curve):
        with pytest.raises(ProbekitError, match=line):
            plot(probed, **arguments)


def test_runs_without_results_are_refused(tiny_run: Run, tmp_path: Path):
    with pytest.raises(ProbekitError, match="probekit evaluate"):
        probekit.plot_perplexity(tiny_run)
    with pytest.raises(ProbekitError, match="probekit probe"):
        probekit.plot_probes(tiny_run)
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    (run.folder / "metrics.jsonl").write_text("")
    with pytest.raises(ProbekitError, match="no training losses"):
        probekit.plot_training(run)


def test_a_target_with_control_characters_is_drawn(probed: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(probed.folder, tmp_path / "run"))
    path = run.folder / "probes" / "results.parquet"
    pd.read_parquet(path).assign(target="a\x07$b").to_parquet(path)
    assert "a‹U+0007›$b" in probekit.plot_probes(run).get_suptitle()


def test_a_notebook_shows_the_picture_where_pyplot_was_never_used(tiny_run: Run):
    figure = probekit.plot_training(tiny_run)
    shown, _ = DisplayFormatter().format(figure)
    assert shown["image/png"].startswith(b"\x89PNG")


MEASURED = {
    ("none", "none", "perplexity"): 30.0,
    ("mixed", "planner", "perplexity"): 25.0,
    ("mixed", "planner", "mauve"): 0.5,
}
"""Of a sweep, at a share of 0 and seed 0: lower by the share, half the seed and the length of texts."""


@pytest.fixture
def swept() -> pd.DataFrame:
    """The table of a sweep over shares, not in their order."""
    rows = [
        {"member": f"f={share}", "mixing.fraction": share, "variant": variant, "actions": actions}
        | {"metric": metric, "texts": "samples" if metric == "mauve" else "test documents"}
        | {"length": length, "documents": 16, "seed": seed}
        | {"value": value - 0.5 * (seed or 0) - share - length}
        for share in (1.0, 0.0, 0.5)
        for (variant, actions, metric), value in MEASURED.items()
        for length in ((8, 16) if metric == "mauve" else (0,))
        for seed in (0, 1, None)
    ]
    table = pd.DataFrame(rows).astype({"seed": "Int64"})
    bounds = np.where(table.metric == "mauve", np.nan, 1.0)
    return table.assign(value_low=table.value - bounds, value_high=table.value + 2 * bounds)


def test_a_sweep_is_a_line_for_each_variant_with_its_intervals(swept: pd.DataFrame):
    figure = probekit.plot_sweep(swept)
    axes, lines = figure.axes[0], lines_of(figure)
    assert {*lines} == {"none", "mixed", "_seed"}
    shares, values = lines["mixed"]
    assert shares.tolist() == [0.0, 0.5, 1.0]
    np.testing.assert_allclose(values, [25.0, 24.5, 24.0])
    corners = axes.collections[1].get_paths()[0].vertices
    assert {(0.0, 24.0), (0.0, 27.0), (0.5, 23.5), (0.5, 26.5), (1.0, 23.0), (1.0, 26.0)} == {
        (float(x), float(y)) for x, y in corners
    }
    thin = [own.get_ydata().tolist() for own in axes.lines if own.get_label() == "_seed"]
    assert thin == [[value - share for share in shares] for value in (30.0, 29.5, 25.0, 24.5)]
    assert axes.get_xlabel() == "mixing.fraction"
    assert axes.get_title() == "16 test documents, 2 seeds"


def test_a_sweep_of_what_has_no_interval_shows_the_longest_texts(swept: pd.DataFrame):
    figure = probekit.plot_sweep(swept, "mauve")
    assert not figure.axes[0].collections
    np.testing.assert_allclose(lines_of(figure)["mixed, samples"][1], [-15.5, -16.0, -16.5])


def test_only_metrics_of_a_sweep_over_one_setting_are_plotted(swept: pd.DataFrame):
    with pytest.raises(ProbekitError, match=r"metric is 'rouge2', but the sweep has perplexity, mauve"):
        probekit.plot_sweep(swept, "rouge2")
    with pytest.raises(ProbekitError, match=r"the sweep is over mixing\.fraction, lm\.layers; only"):
        probekit.plot_sweep(swept.assign(**{"lm.layers": 2}))
    with pytest.raises(ProbekitError, match="the sweep is over nothing"):
        probekit.plot_sweep(swept.drop(columns="mixing.fraction"))


STEPS = (0, 1, 10, 100)


@pytest.fixture
def checkpoints() -> pd.DataFrame:
    """Accuracies grow with the steps; baselines do not."""
    parts = []
    for place, step in enumerate(STEPS):
        part = probe_table(("none",), seeds=(0, 1)).assign(step=step)
        of_probes = part.reader == "probe"
        part.loc[of_probes, ["accuracy", "accuracy_low", "accuracy_high"]] *= 0.5 + place / 6
        part["validation_cross_entropy"] = 2.0 - part.accuracy
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


LOSSES = pd.DataFrame(
    {
        "step": [1, 10, 50, 50, 100, 100],
        "loss": [5, 4, 3, np.nan, 2, np.nan],
        "validation_loss": [np.nan] * 3 + [3.1, np.nan, 2.2],
    }
)


def test_numbers_are_means_over_seeds(checkpoints: pd.DataFrame):
    numbers = over_training_numbers(checkpoints, location="attn.hook_z", solver="ridge")
    probes = numbers[numbers.reader == "probe"].set_index(["step", "layer", "position"]).value
    for place, step in enumerate(STEPS):
        for layer in LAYERS:
            for distance in DISTANCES:
                if (layer, distance) == (1, 4):
                    assert np.isnan(probes[step, layer, str(distance)])
                    continue
                expected = accuracy_of(layer, distance) + 0.005 - 0.02
                assert probes[step, layer, str(distance)] == pytest.approx(expected * (0.5 + place / 6))


def test_lines_go_through_the_numbers(checkpoints: pd.DataFrame):
    numbers = over_training_numbers(checkpoints)
    figure = draw_over_training(numbers, LOSSES)
    by_layer, by_position, losses, _ = figure.axes
    assert by_position.get_title() == "by position, layer 2"
    probes = numbers[(numbers.reader == "probe") & (numbers.position == "1")]
    drawn = {line.get_label(): line.get_xydata() for line in by_layer.get_lines()}
    for layer in LAYERS:
        np.testing.assert_allclose(drawn[f"layer {layer}"], probes[probes.layer == layer][["step", "value"]])
    known = numbers[(numbers.reader == "bigram") & (numbers.position == "1")]
    assert drawn["bigram"][0][1] == pytest.approx(known.value.iloc[-1])
    trained = next(line for line in losses.get_lines() if line.get_label() == "training")
    assert trained.get_ydata().tolist() == [5, 4, 3, 2]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"metric": "f1"}, "metric is 'f1'; it must be one of accuracy"),
        ({"location": "hook_q"}, "nothing was probed at 'hook_q'"),
    ],
)
def test_what_is_not_there_is_named(checkpoints: pd.DataFrame, asked: dict[str, str], said: str):
    with pytest.raises(ProbekitError, match=said):
        over_training_numbers(checkpoints, **asked)
