"""Interventions as a whole: what is written, what is known of it beforehand, and what is refused."""

import shutil
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import probekit
from probekit.causal.erasure import leace, moments_at
from probekit.causal.intervene import InterventionResults, intervene
from probekit.causal.scenes import Stage, draw_scenes
from probekit.errors import ProbekitError
from probekit.io import read_json, read_tensors, write_tensors
from probekit.models.mixing import VARIANTS, Oracle, Variant
from probekit.probing.grid import make_grid
from probekit.probing.probe import probe
from probekit.probing.results import Cell, SavedProbes
from probekit.probing.targets import find_target
from probekit.progress import Progress, without_bars_of_transformers
from probekit.run.run import Run

FEW = {
    "intervene.distances": [1, 3],
    "intervene.strengths": [1.0],
    "intervene.scenes": 12,
    "evaluation.resamples": 100,
}
LAST = ("hook_resid_post", 2)


def cell(table: pd.DataFrame, **of: Any) -> pd.Series:
    """Values by metric of one condition at one place."""
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
    cells = table.groupby(["kind", "condition"])[["layer", "distance"]].apply(
        lambda g: len(g.drop_duplicates())
    )
    assert cells.to_dict() == dict.fromkeys(
        [
            *(("erase", name) for name in ("erase", "random", "random subspace")),
            *(("patch", name) for name in ("patch", "random", "same action")),
            *(("steer", f"{which} action") for which in ("wrong", "true")),
            *(("steer", f"random ({which})") for which in ("wrong", "true")),
        ],
        3 * 2,
    )
    assert table.value.notna().all()
    assert (table.value_low <= table.value).all()
    assert (table.value <= table.value_high).all()
    assert table.documents.max() == 12
    assert not table.injected.any()
    direct = table[table.readout_direct]
    assert set(zip(direct.layer, direct.distance, strict=True)) == {(2, 1), (2, 3)}


def test_what_was_found_is_written_whole_and_read_back(results: InterventionResults):
    run = Run.open(results.folder.parents[1])
    assert results.folder == run.folder / "interventions" / "none"
    pd.testing.assert_frame_equal(run.interventions(), results.table)
    written = read_json(results.folder / "settings.json")
    assert written["intervene"]["distances"] == [1, 3]
    assert written["notes"] == results.notes == []


def test_the_same_settings_give_the_same_results_and_plans_are_followed(probed_copy: Run):
    few = FEW | {"intervene.layers": [2], "intervene.distances": [1], "intervene.kinds": ["steer", "erase"]}
    few |= {"intervene.samples": 6, "intervene.strengths": [30.0]}
    table, again = (intervene(probed_copy, few, quiet=True).table for _ in range(2))
    pd.testing.assert_frame_equal(table, again)
    follows = table[table.metric.str.startswith("plan_following")]
    assert (follows.documents == 6).all()
    assert set(follows.kind) == {"steer"}
    wrong, random, true = (
        cell(follows, condition=name) for name in ("wrong action", "random (wrong)", "true action")
    )
    expected = wrong.plan_following - random.plan_following
    assert wrong.plan_following_over_random == pytest.approx(expected)
    assert wrong.plan_following_unedited == random.plan_following_unedited
    assert follows.value[follows.metric != "plan_following_over_random"].between(0, 1).all()
    assert 0 <= true.plan_following_unedited <= 1


def test_random_changes_are_as_large(results: InterventionResults):
    moved = results.table[results.table.metric == "moved"].pivot_table(
        "value", ["layer", "distance"], ["kind", "condition"]
    )
    for first, second in (
        (("erase", "erase"), ("erase", "random")),
        (("patch", "patch"), ("patch", "random")),
        (("steer", "wrong action"), ("steer", "random (wrong)")),
        (("steer", "true action"), ("steer", "random (true)")),
    ):
        np.testing.assert_allclose(moved[first], moved[second], rtol=1e-3)


def test_differences_are_those_of_the_values(results: InterventionResults):
    """On the same scenes, so that the difference of two means is the mean difference."""
    for (_, layer, distance), rows in results.table.groupby(["kind", "layer", "distance"]):
        values = rows.set_index(["condition", "metric"]).value
        pairs = {"erase": "random", "wrong action": "random (wrong)", "true action": "random (true)"}
        for condition, control in (pairs | {"patch": "random"}).items():
            if (condition, "next_loss_over_random") in values:
                expected = values[condition, "next_loss"] - values[control, "next_loss"]
                assert values[condition, "next_loss_over_random"] == pytest.approx(expected), (
                    layer,
                    distance,
                )


def test_erasing_leaves_the_prior_everywhere(results: InterventionResults):
    wide = results.table[results.table.condition == "erase"].pivot_table(
        "value", ["layer", "distance"], "metric"
    )
    np.testing.assert_allclose(wide.refitted_accuracy, wide.prior_accuracy)
    assert (wide.erased_dimensions == 7).all()


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


def test_directions_of_probes_are_as_long_as_the_way_between_means(probed_copy: Run):
    few = FEW | {"intervene.kinds": ["steer"], "intervene.layers": [1], "intervene.steps": 4}
    found = {
        direction: cell(
            intervene(probed_copy, few | {"intervene.direction": direction}, quiet=True).table,
            condition="wrong action",
            distance=3,
        )
        for direction in ("means", "probe", "gradient")
    }
    assert found["probe"].moved == pytest.approx(found["means"].moved, rel=1e-4)
    assert found["probe"].readout_kl != pytest.approx(found["means"].readout_kl, rel=1e-2)
    # A way that turns ends nearer to where it began.
    assert 0.5 * found["means"].moved < found["gradient"].moved < found["means"].moved
    assert found["gradient"].readout_target != pytest.approx(found["probe"].readout_target, rel=1e-2)


def test_other_variants_stand_beside(probed_copy: Run):
    few = FEW | {
        "intervene.layers": [1, 2],
        "intervene.distances": [1],
        "intervene.kinds": ["erase", "codebook"],
    }
    intervene(probed_copy, FEW | {"intervene.layers": [1], "intervene.kinds": ["erase"]}, quiet=True)
    soft = intervene(probed_copy, few | {"intervene.variant": "soft"}, quiet=True).table
    assert probed_copy.interventions().variant.unique().tolist() == ["none", "soft"]
    # The adapter writes into the last layer of three.
    injected = soft.groupby(["kind", soft.layer.fillna(-1)]).injected.agg(["min", "max"])
    assert injected["min"].equals(injected["max"])
    assert injected["max"].to_dict() == {("erase", 1): False, ("erase", 2): True, ("codebook", -1): True}
    plan = cell(soft, kind="codebook", condition="true action")
    assert plan.moved > 0
    assert plan.readout_target == plan.readout_true


# A construction whose truth is known


@pytest.fixture
def told(probed_copy: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A variant that is told the true action, loudly, and whose last layer's attention says nothing else."""
    monkeypatch.setitem(VARIANTS, "oracle", Variant(Oracle(), Oracle()))
    model = probed_copy.plain_model()
    last, width = model.transformer.h[2].attn, 32
    with torch.no_grad():
        last.c_attn.weight[:, 2 * width :] = 0
        last.c_attn.bias[2 * width :] = 0
    with without_bars_of_transformers():
        model.save_pretrained(probed_copy.folder / "lm")
    path = probed_copy.folder / "adapters" / "oracle.safetensors"
    tensors = read_tensors(path)
    k, dimensions = tensors["adapter.codebook"].shape
    drawn = torch.Generator().manual_seed(0)
    tensors["adapter.codebook"] = torch.eye(k, dimensions)
    tensors["adapter.projections"] = 3 * torch.randn(1, dimensions, width, generator=drawn)
    write_tensors(path, tensors)
    run = Run.open(probed_copy.folder)
    one = {"probe.l2": [0.01], "probe.control": False, "probe.code_length": False, "probe.layers": [2]}
    probe(run, one | {"probe.distances": [1, 2, 3], "probe.variants": ["oracle"]}, quiet=True)
    return run


def test_erasing_where_the_adapter_writes_takes_the_plan_away(told: Run):
    place = {"intervene.locations": ["attn.hook_z"], "intervene.variant": "oracle", "intervene.layers": [2]}
    few = FEW | place | {"intervene.kinds": ["erase", "codebook"], "intervene.distances": [1]}
    table = intervene(told, few, quiet=True).table
    found = cell(table, condition="erase")
    # A head reads the plan and nothing else there: a probe knows all, and, erased, no more than the prior.
    assert found.fitted_accuracy == 1.0
    assert found.refitted_accuracy == found.prior_accuracy < 0.5
    scenes = draw_scenes(told.corpus, told.corpus.documents("test"), 12, 48, 1, 0)
    reader = SavedProbes(told.folder / "probes", "oracle", 0)[Cell(*LAST, 1)]
    stage = Stage(told, "oracle", scenes, [("attn.hook_z", 2)], (LAST, reader))
    known = np.exp(stage.play().readout[np.arange(12), scenes.action]).mean()
    assert known > 0.9
    assert known + found.readout_true < 0.4
    # Every activation becomes the mean of all: that is all that is left of it.
    mean = stage.activations(("attn.hook_z", 2), (1,))
    erased = read_erased(told, mean[0])
    assert erased.std(0).max() < 1e-3 * mean[0].std(0).max()
    # The plan that it has already changes nothing.
    same = cell(table, kind="codebook", condition="true action")
    assert same.drop("moved").abs().max() < 1e-4
    assert same.moved == 0
    wrong = cell(table, kind="codebook", condition="wrong action")
    assert wrong.readout_target > 0.8
    assert wrong.readout_true < -0.8


def read_erased(run: Run, activations: torch.Tensor) -> torch.Tensor:
    """Activations as an eraser of the run's own examples leaves them."""
    one = run.config.probe.model_copy(update={"distances": (1,), "horizons": (1,)})
    grid = make_grid(run.corpus, one, find_target(run.corpus, "action"), 0)
    place = ("attn.hook_z", 2)
    moments = moments_at(run, "oracle", [place], grid, Progress(quiet=True))
    return leace(moments[place, 1])[0](activations)


def test_sums_are_of_the_split_to_fit_on_alone(told: Run):
    """Other actions in the test documents change the scenes, and no eraser."""
    before = read_erased(told, torch.eye(32))
    actions = told.corpus.actions.copy()
    test = told.corpus.sentences(told.corpus.documents("test"))
    actions[test] = (actions[test] + 1) % told.corpus.k
    np.save(told.folder / "corpus" / "actions.npy", actions)
    again = Run.open(told.folder)
    assert (again.corpus.actions[test] == actions[test]).all()
    torch.testing.assert_close(read_erased(again, torch.eye(32)), before)


# Bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"intervene.variant": "fixed"}, r"probekit probe .* --probe\.variants none oracle soft fixed"),
        ({"intervene.variant": "gumbel"}, r"intervene\.variant is 'gumbel', which this run has not trained"),
        ({"intervene.layers": [3]}, r"intervene\.layers has 3, but the LM's layers are 0 to 2"),
        ({"intervene.locations": ["hook_z"]}, r"intervene\.locations is 'hook_z'"),
        ({"intervene.distances": [60]}, r"intervene\.distances has 60, but the LM reads 48 tokens at once"),
        (
            {"intervene.strengths": [1e30], "intervene.kinds": ["steer"]},
            r"intervene\.strengths, which has 1e\+30",
        ),
        ({"intervene.kinds": ["codebook"]}, r"variant 'none' is told no actions"),
        *(
            (
                {"intervene.kinds": ["steer"], "intervene.direction": direction, "intervene.distances": [5]},
                r"has no softmax probe of 'none' at hook_resid_post, layer 0, distance 4",
            )
            for direction in ("probe", "gradient")
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str, probed_copy: Run):
    with pytest.raises(ProbekitError, match=said):
        intervene(probed_copy, FEW | settings, quiet=True)
    assert not (probed_copy.folder / "interventions").exists()


def test_fewer_scenes_than_asked_for_are_told(probed_copy: Run):
    few = FEW | {"intervene.scenes": 100, "intervene.layers": [0], "intervene.kinds": ["patch"]}
    results = probekit.intervene(probed_copy, few, quiet=True)
    assert results.notes == ["16 scenes, for no more test documents have one; intervene.scenes asks for 100"]
