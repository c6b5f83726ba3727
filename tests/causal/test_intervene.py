"""Interventions as a whole: which rows there are, and effects that are known beforehand."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import probekit
from probekit.causal import intervene as intervene_module
from probekit.causal.boundaries import EditedLM, draw_boundaries
from probekit.causal.erasure import leace, read_moments
from probekit.causal.intervene import InterventionResults, intervene
from probekit.data.corpus import export_sentences
from probekit.errors import ProbekitError
from probekit.io import read_json, read_tensors, write_json, write_tensors
from probekit.models.mixing import VARIANTS, Oracle, Variant
from probekit.probing.grid import make_grid
from probekit.probing.probe import probe
from probekit.probing.record import read_probe_record
from probekit.probing.score import score
from probekit.probing.targets import find_target
from probekit.progress import Progress, without_bars_of_transformers
from probekit.run.run import Run

FEW = {
    "intervene.distances": [1, 3],
    "intervene.strengths": [1.0],
    "intervene.boundaries": 12,
    "evaluation.resamples": 100,
}
HEADS = ("attn.hook_z", 2)


def cell(table: pd.DataFrame, **of: Any) -> pd.Series:
    """Values by metric of one condition at one hook point."""
    rows = table[np.logical_and.reduce([table[name] == value for name, value in of.items()])]
    assert rows.metric.is_unique
    return rows.set_index("metric").value


@pytest.fixture(scope="module")
def results(probed_run: Run, tmp_path_factory: pytest.TempPathFactory) -> InterventionResults:
    folder = tmp_path_factory.mktemp("results") / "run"
    shutil.copytree(probed_run.folder, folder)
    return intervene(folder, FEW, quiet=True)


def test_every_condition_has_its_rows(results: InterventionResults):
    table = results.table
    cells = table[["kind", "condition", "layer", "distance"]].drop_duplicates()
    assert cells.groupby(["kind", "condition"]).size().to_dict() == dict.fromkeys(
        [
            *(("erase", name) for name in ("erase", "random", "random subspace")),
            *(("patch", name) for name in ("patch", "random", "same label")),
            *(("steer", f"{which} label") for which in ("wrong", "true")),
            *(("steer", f"random ({which})") for which in ("wrong", "true")),
        ],
        3 * 2,
    )
    assert table.value.notna().all()
    assert (table.value_low <= table.value).all()
    assert (table.value <= table.value_high).all()
    assert table.documents.max() == 12
    assert results.notes == []
    assert not table.injected.any()
    direct = table[table.readout_direct]
    assert set(zip(direct.layer, direct.distance, strict=True)) == {(2, 1), (2, 3)}


@pytest.fixture
def labelled(probed_copy: Run, quick_probes: dict[str, Any], tmp_path: Path) -> Run:
    """Probes of a column of labels that copies the actions."""
    path = export_sentences(probed_copy.corpus, tmp_path / "sentences.csv")
    pd.read_csv(path).assign(copied=lambda table: table.action).to_csv(path, index=False)
    of_labels = {"probe.labels": str(path), "probe.target": "copied", "probe.positions": [1, 2, 3]}
    probe(probed_copy, quick_probes | {"probe.variants": ["none"]} | of_labels, quiet=True)
    return probed_copy


def test_a_class_added_after_probing_shifts_no_names(labelled: Run):
    """Probes keep the names of their classes; what needs the labels themselves refuses changed ones."""
    path = Path(str(read_probe_record(labelled.folder).config.probe.labels))
    text = ["A plan of some words. And"]
    before = score(labelled, text, quiet=True)
    table = pd.read_csv(path)
    table.assign(copied=table.copied.where(table.index > 0, -1)).to_csv(path, index=False)
    pd.testing.assert_frame_equal(score(labelled, text, quiet=True), before)
    with pytest.raises(
        ProbekitError, match=r"has changed since .*probes was made of it; run `probekit probe"
    ):
        intervene(labelled, FEW, quiet=True)
    path.unlink()
    pd.testing.assert_frame_equal(score(labelled, text, quiet=True), before)


def test_labels_that_copy_actions_have_the_effects_of_actions(results: InterventionResults, labelled: Run):
    pd.testing.assert_frame_equal(intervene(labelled, FEW, quiet=True).table, results.table)
    with pytest.raises(ProbekitError, match=r"'codebook', which changes the plan, but .* 'copied'"):
        intervene(labelled, FEW | {"intervene.kinds": ["codebook"]}, quiet=True)


def test_sentences_toward_a_label_are_judged_by_their_words(labelled: Run):
    few = FEW | {"intervene.layers": [2], "intervene.distances": [1], "intervene.kinds": ["steer"]}
    found = intervene(labelled, few | {"intervene.samples": 6, "intervene.strengths": [30.0]}, quiet=True)
    follows = found.table[found.table.metric == "plan_following"]
    assert follows.value.between(0, 1).all()
    assert len(follows) == 4
    assert any("labelled by a classifier of words" in note for note in found.notes)


def test_equal_settings_give_equal_results_and_followed_plans_are_counted(probed_copy: Run):
    few = FEW | {"intervene.layers": [2], "intervene.distances": [1], "intervene.kinds": ["steer", "erase"]}
    few |= {"intervene.samples": 6, "intervene.strengths": [30.0]}
    table, again = (intervene(probed_copy, few, quiet=True).table for _ in range(2))
    pd.testing.assert_frame_equal(table, again)
    follows = table[table.metric.str.startswith("plan_following")]
    assert (follows.documents == 6).all()
    assert set(follows.kind) == {"steer"}
    wrong, random, true = (
        cell(follows, condition=name) for name in ("wrong label", "random (wrong)", "true label")
    )
    expected = wrong.plan_following - random.plan_following
    assert wrong.plan_following_over_random == pytest.approx(expected)
    assert wrong.plan_following_unedited == random.plan_following_unedited
    assert follows.value[follows.metric != "plan_following_over_random"].between(0, 1).all()
    assert 0 <= true.plan_following_unedited <= 1


def test_random_changes_are_as_large_and_differences_those_of_the_values(results: InterventionResults):
    """All are of the same boundaries, so that the difference of two means is the mean difference."""
    pairs = {"erase": "random", "wrong label": "random (wrong)", "true label": "random (true)"}
    checked = 0
    for _, rows in results.table.groupby(["kind", "layer", "distance"]):
        values = rows.set_index(["condition", "metric"]).value
        for condition, control in (pairs | {"patch": "random"}).items():
            if (condition, "next_loss_over_random") not in values:
                continue
            expected = values[condition, "next_loss"] - values[control, "next_loss"]
            assert values[condition, "next_loss_over_random"] == pytest.approx(expected)
            assert values[condition, "moved"] == pytest.approx(values[control, "moved"], rel=1e-3)
            checked += 1
    assert checked == 4 * 3 * 2


def test_erasing_leaves_the_prior_everywhere(results: InterventionResults):
    wide = results.table[results.table.condition == "erase"].pivot_table(
        "value", ["layer", "distance"], "metric"
    )
    np.testing.assert_allclose(wide.refitted_accuracy, wide.prior_accuracy)
    assert (wide.erased_dimensions == 7).all()


def test_layers_that_were_probed_are_changed_a_group_at_a_time(
    results: InterventionResults, probed_copy: Run, monkeypatch: pytest.MonkeyPatch
):
    """Unset layers are those of the probes, and memory that is too small for two changes nothing."""
    groups, read = [], intervene_module.read_moments
    monkeypatch.setattr(
        intervene_module,
        "read_moments",
        lambda run, variant, points, *more: groups.append(points) or read(run, variant, points, *more),
    )
    table = intervene(probed_copy, FEW | {"probe.memory": 1e-6}, quiet=True).table
    pd.testing.assert_frame_equal(table, results.table)
    assert groups == [[("hook_resid_post", layer)] for layer in range(3)]
    path = probed_copy.folder / "probes" / "settings.json"
    record = read_json(path)
    record["probe"]["layers"] = [1]
    write_json(path, record)
    few = FEW | {"intervene.kinds": ["erase"], "intervene.distances": [1]}
    assert set(intervene(probed_copy, few, quiet=True).table.layer) == {1}


def test_probes_to_steer_along_are_looked_for_before_the_work(
    probed_copy: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(intervene_module, "EditedLM", None)
    far = FEW | {"intervene.direction": "probe", "intervene.distances": [1, 9]}
    with pytest.raises(ProbekitError, match=r"has no softmax probe of 'none' at .* position [3-9]"):
        intervene(probed_copy, far, quiet=True)


@pytest.mark.parametrize("function", [probekit.intervene, probekit.continuation])
def test_several_processes_are_refused(
    function: Callable[..., object], probed_run: Run, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ProbekitError, match="runs in one process, but there are 2"):
        function(probed_run)


def test_without_a_span_far_edits_of_the_last_layer_do_nothing(probed_copy: Run):
    settings = FEW | {"intervene.span": False, "intervene.layers": [2]}
    table = intervene(probed_copy, settings, quiet=True).table
    silent = table[table.metric.isin(["next_loss", "other_loss", "first_kl", "readout_kl"])]
    assert silent[silent.distance == 3].value.abs().max() < 1e-5
    assert silent[(silent.distance == 1) & (silent.metric != "other_loss")].value.abs().max() > 1e-3
    assert table[table.distance == 3].readout_direct.sum() == 0


def test_the_last_layer_changes_the_first_token_alone(results: InterventionResults):
    rest = results.table[results.table.metric == "rest_loss"]
    assert rest.value[rest.layer == 2].abs().max() < 5e-6
    assert rest.value[rest.layer == 0].abs().max() > 5e-5
    assert set(rest.documents) <= set(range(1, 13))


def test_all_directions_move_as_far_as_the_mean_vectors(probed_copy: Run):
    few = FEW | {"intervene.kinds": ["steer"], "intervene.layers": [1], "intervene.steps": 4}
    found = {
        direction: cell(
            intervene(probed_copy, few | {"intervene.direction": direction}, quiet=True).table,
            condition="wrong label",
            distance=3,
        )
        for direction in ("means", "probe", "gradient")
    }
    assert found["probe"].moved == pytest.approx(found["means"].moved, rel=1e-4)
    assert found["probe"].readout_kl != pytest.approx(found["means"].readout_kl, rel=1e-2)
    # A path that turns ends nearer to where it began.
    assert 0.5 * found["means"].moved < found["gradient"].moved < found["means"].moved
    assert found["gradient"].readout_target != pytest.approx(found["probe"].readout_target, rel=1e-2)


def test_variants_stand_side_by_side(probed_copy: Run):
    few = FEW | {"intervene.distances": [1], "intervene.kinds": ["erase"], "intervene.layers": [1]}
    intervene(probed_copy, few, quiet=True)
    few |= {"intervene.layers": [1, 2], "intervene.kinds": ["erase", "codebook"]}
    soft = intervene(probed_copy, few | {"intervene.variant": "soft"}, quiet=True).table
    assert probed_copy.interventions().variant.unique().tolist() == ["none", "soft"]
    # The adapter writes into the last layer of three.
    injected = soft.groupby(["kind", soft.layer.fillna(-1)]).injected.agg(["min", "max"])
    assert injected["min"].equals(injected["max"])
    assert injected["max"].to_dict() == {("erase", 1): False, ("erase", 2): True, ("codebook", -1): True}
    plan = cell(soft, kind="codebook", condition="true label")
    assert plan.moved > 0
    assert plan.readout_target == plan.readout_true


# A construction whose truth is known


@pytest.fixture
def conditioned(probed_copy: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A variant conditioned on the true action, which is all that the last layer's attention reads."""
    monkeypatch.setitem(VARIANTS, "oracle", Variant(Oracle(), Oracle()))
    model, width = probed_copy.plain_model(), 32
    last = model.transformer.h[2].attn
    with torch.no_grad():
        last.c_attn.weight[:, 2 * width :] = 0
        last.c_attn.bias[2 * width :] = 0
    with without_bars_of_transformers():
        model.save_pretrained(probed_copy.folder / "lm")
    path = probed_copy.folder / "adapters" / "oracle.safetensors"
    tensors = read_tensors(path)
    k, dimensions = tensors["adapter.codebook"].shape
    drawn = torch.randn(1, dimensions, width, generator=torch.Generator().manual_seed(0))
    tensors["adapter.codebook"], tensors["adapter.projections"] = torch.eye(k, dimensions), 3 * drawn
    write_tensors(path, tensors)
    run = Run.open(probed_copy.folder)
    one = {"probe.l2": [0.01], "probe.control": False, "probe.code_length": False, "probe.layers": [2]}
    probe(run, one | {"probe.positions": [1, 2, 3], "probe.variants": ["oracle"]}, quiet=True)
    return run


def test_erasing_behind_the_adapter_removes_the_plan(conditioned: Run):
    point = {"intervene.locations": ["attn.hook_z"], "intervene.variant": "oracle", "intervene.layers": [2]}
    few = FEW | point | {"intervene.kinds": ["erase", "codebook"], "intervene.distances": [1]}
    table = intervene(conditioned, few, quiet=True).table
    found = cell(table, condition="erase")
    # The heads' outputs are the plan alone: a probe reads all of it, and, erased, no more than the prior.
    assert found.fitted_accuracy == 1.0
    assert found.refitted_accuracy == found.prior_accuracy < 0.5
    corpus = conditioned.corpus
    boundaries = draw_boundaries(corpus, corpus.actions, corpus.documents("test"), 12, 48, 1, 0)
    lm = EditedLM(conditioned, "oracle", boundaries, [HEADS])
    known = np.exp(lm.outcomes().label[np.arange(12), boundaries.label]).mean()
    assert known > 0.9
    assert known + found.readout_true < 0.4
    # Every activation becomes the mean of all: nothing else is left of it.
    (activations,) = lm.activations(HEADS, (1,))
    assert erased(conditioned, activations).std(0).max() < 1e-3 * activations.std(0).max()
    # The plan that it already has changes nothing.
    same = cell(table, kind="codebook", condition="true label")
    assert same.drop("moved").abs().max() < 1e-4
    assert same.moved == 0
    wrong = cell(table, kind="codebook", condition="wrong label")
    assert wrong.readout_target > 0.8
    assert wrong.readout_true < -0.8


def erased(run: Run, activations: torch.Tensor) -> torch.Tensor:
    """Activations as an eraser of the run's own examples leaves them."""
    one = run.config.probe.model_copy(update={"positions": (1,), "horizons": (1,)})
    grid = make_grid(run.corpus, one, find_target(run.corpus, "action"), 0)
    moments = read_moments(run, "oracle", [HEADS], grid, Progress(quiet=True))
    assert moments[HEADS, 1].dtype == torch.float64
    return leace(moments[HEADS, 1])(activations)


def test_erasers_are_fitted_on_their_split_alone(conditioned: Run):
    """Other actions in the test documents change no eraser."""
    before = erased(conditioned, torch.eye(32))
    actions = conditioned.corpus.actions.copy()
    test = conditioned.corpus.sentences(conditioned.corpus.documents("test"))
    actions[test] = (actions[test] + 1) % conditioned.corpus.k
    np.save(conditioned.folder / "corpus" / "actions.npy", actions)
    again = Run.open(conditioned.folder)
    assert (again.corpus.actions[test] == actions[test]).all()
    torch.testing.assert_close(erased(again, torch.eye(32)), before)


def test_boundaries_without_donors_are_refused_before_the_lm_is_run(
    probed_run: Run, monkeypatch: pytest.MonkeyPatch
):
    def loaded(*_: object) -> None:
        raise AssertionError("an LM was loaded for nothing")

    monkeypatch.setattr(EditedLM, "__init__", loaded)
    with pytest.raises(ProbekitError, match="of 2 boundaries none has both a donor"):
        intervene(probed_run, {"intervene.boundaries": 2, "intervene.kinds": ["erase", "patch"]}, quiet=True)
