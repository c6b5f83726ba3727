"""Subnetworks as a whole: planted heads are found, controls are alike, what is written, what is refused."""

import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import probekit
from probekit.causal.subnetwork import SubnetworkResults, subnetwork
from probekit.errors import ProbekitError
from probekit.io import read_json, read_tensors, write_tensors
from probekit.probing.activations import Reader
from probekit.probing.grid import make_grid
from probekit.probing.solvers import SoftmaxProbes
from probekit.probing.targets import find_target
from probekit.run.run import Run

FEW = {
    "subnetwork.steps": 20,
    "subnetwork.learning_rate": 0.5,
    "subnetwork.penalties": [0.002],
    "subnetwork.keep": 0.1,
    "subnetwork.draws": 2,
    "subnetwork.documents": 40,
    "evaluation.resamples": 100,
}


def values(results: SubnetworkResults, condition: str) -> pd.Series:
    """By metric, of a condition; of random ones the mean over draws."""
    table = results.table
    rows = table[(table.condition == condition) & table.draw.isna()]
    assert rows.metric.is_unique
    return rows.set_index("metric").value


@pytest.fixture(scope="module")
def soft(probed_run: Run, tmp_path_factory: pytest.TempPathFactory) -> SubnetworkResults:
    folder = tmp_path_factory.mktemp("results") / "run"
    shutil.copytree(probed_run.folder, folder)
    return probekit.subnetwork(folder, FEW | {"subnetwork.variant": "soft"}, quiet=True)


# Constructions whose truth is known


def test_the_head_that_alone_carries_the_information_is_found(planted: Callable[..., Run]):
    run = planted({(1, 1): slice(0, 32)})
    results = subnetwork(run, FEW, quiet=True)
    assert results.mask.component[results.mask.removed].tolist() == ["head 1.1"]
    # Heads that write nothing change nothing, whatever they are.
    alone = results.mask.set_index("component")
    others = alone.drop("head 1.1")
    assert others.alone_information.abs().max() < 1e-6
    assert others.alone_kept_kl.abs().max() < 1e-6
    assert alone.alone_information["head 1.1"] < -0.5
    whole, without = values(results, "whole"), values(results, "subnetwork")
    assert whole.bits > 1
    assert without.information < 0.2 * whole.information
    assert without.bits < 0.1
    # And nothing has moved: a probe that is fitted again reads nothing either.
    assert whole.refitted_bits > 1
    assert without.refitted_bits < 0.1
    assert not any("but moved" in note for note in results.notes)
    # The best one alone is the same one; a random one of the layer is it, or the other head.
    alike = values(results, "alone")
    assert alike.equals(without[alike.index].rename("value"))
    assert results.table[results.table.condition == "random"].removed.eq(1).all()


def test_information_that_has_another_road_is_found_by_a_probe_fitted_again(planted: Callable[..., Run]):
    run = planted({(0, 0): slice(0, 16), (1, 1): slice(16, 32)})
    read_half(run)
    results = subnetwork(run, FEW | {"subnetwork.keep": 0.0}, quiet=True)
    mask = results.mask.set_index("component").removed
    assert mask["head 0.0"]
    assert not mask["head 1.1"]
    whole, without = values(results, "whole"), values(results, "subnetwork")
    assert without.information < 0.2 * whole.information
    assert without.bits < 0.2
    assert without.refitted_bits > 0.5 * whole.refitted_bits > 0.5
    assert any("has not gone, but moved" in note for note in results.notes)


def test_where_every_component_is_worth_more_than_what_it_tells_none_is_removed(probed_copy: Run):
    dear = FEW | {"subnetwork.penalties": [10.0], "subnetwork.documents": 6, "subnetwork.steps": 12}
    results = subnetwork(probed_copy, dear | {"subnetwork.learning_rate": 1.0}, quiet=True)
    assert not results.mask.removed.any()
    assert results.notes == ["no mask was better than to remove nothing, on validation documents"]
    changes = results.table[results.table.metric.str.endswith("_change")]
    assert (changes.value == 0).all()
    assert results.candidates.removed.tolist() == [0, 0]


def read_half(run: Run) -> None:
    """Puts a probe in place that does not read what the second head writes, but is as good as that allows."""
    settings = run.config.probe.model_copy(update={"distances": (1,)})
    grid = make_grid(run.corpus, settings, find_target(run.corpus, "action"), 0)
    reader, parts = Reader(run, "none", [("hook_resid_post", 2)], (1,)), []
    for split in ("probe", "validation"):
        (states,) = reader.read(grid.examples[split])
        states[..., 16:] = 0
        parts += [states[0], torch.from_numpy(grid.labels(split, 1))]
    fitted = SoftmaxProbes([0.01]).fit(*parts[:2], run.corpus.k, *parts[2:])
    path = run.folder / "probes" / "none-seed0.safetensors"
    coef, intercept = sorted(read_tensors(path))
    write_tensors(path, {coef: fitted.coef_[0], intercept: fitted.intercept_[0]})


# Any run


def test_rows_are_there_and_add_up(soft: SubnetworkResults):
    table = soft.table
    assert table.documents.eq(16).all()
    assert table.value.notna().all()
    assert (table.value_low <= table.value + 1e-9).all()
    assert (table.value <= table.value_high + 1e-9).all()
    names = {(row.condition, row.draw) for row in table.fillna({"draw": -1}).itertuples()}
    assert names == {("whole", -1), ("subnetwork", -1), ("alone", -1), *(("random", n) for n in (-1, 0, 1))}
    whole, mask, random = (values(soft, name) for name in ("whole", "subnetwork", "random"))
    metrics = list(whole.index)
    assert {"first_loss", "rest_loss", "other_loss", "kept_kl", "bits", "refitted_bits"} <= {*metrics}
    draws = table[(table.condition == "random") & table.draw.notna()]
    for name in metrics:
        assert mask[f"{name}_change"] == pytest.approx(mask[name] - whole[name])
        assert mask[f"{name}_over_random"] == pytest.approx(mask[name] - random[name])
        assert random[name] == pytest.approx(draws[draws.metric == name].value.mean())
    assert whole.kept_kl == pytest.approx(0, abs=1e-6)
    assert (table.removed[table.condition != "whole"] == soft.mask.removed.sum()).all()
    assert (table[table.condition == "subnetwork"].shared == soft.mask.removed.sum()).all()


def test_losses_are_those_of_evaluation(soft: SubnetworkResults):
    """Of the whole LM, over all tokens of the same documents."""
    run = Run.open(soft.folder.parents[1])
    found = probekit.evaluate(run, {"evaluation.resamples": 100}, quiet=True).losses
    own = found[found.variant == "soft"]
    assert len(own) == 16
    whole = values(soft, "whole")
    corpus, tokens = run.corpus, {}
    first = corpus.document_sentences[corpus.documents("test")]
    after = corpus.document_sentences[corpus.documents("test") + 1]
    tokens["first_loss"] = (after - first - 1).sum()
    second = corpus.first_token[np.minimum(first + 1, len(corpus.first_token) - 1)]
    tokens["other_loss"] = (second - corpus.first_token[first]).sum()
    tokens["rest_loss"] = own.tokens.sum() - sum(tokens.values())
    assert sum(whole[name] * count for name, count in tokens.items()) == pytest.approx(
        own.loss.sum(), rel=1e-5
    )


def test_what_was_found_is_written_and_read_back(soft: SubnetworkResults):
    run = Run.open(soft.folder.parents[1])
    assert soft.folder == run.folder / "subnetworks" / "soft"
    pd.testing.assert_frame_equal(run.subnetworks(), soft.table)
    pd.testing.assert_frame_equal(run.subnetwork_masks(), soft.mask)
    assert soft.mask.component.tolist()[-2:] == ["adapter 2.0", "adapter 2.1"]
    assert soft.mask.gate.between(0, 1).all()
    assert (soft.mask.removed == (soft.mask.gate <= 0.5)).all()
    written = read_json(soft.folder / "settings.json")
    assert written["subnetwork"]["variant"] == "soft"
    assert written["notes"] == soft.notes


def test_the_same_seed_gives_the_same_and_variants_stand_side_by_side(probed_copy: Run):
    few = FEW | {"subnetwork.documents": 6, "subnetwork.steps": 4}
    first, second = (subnetwork(probed_copy, few, quiet=True) for _ in range(2))
    pd.testing.assert_frame_equal(first.table, second.table)
    pd.testing.assert_frame_equal(first.mask, second.mask)
    other = subnetwork(probed_copy, few | {"seed": 0, "subnetwork.variant": "oracle"}, quiet=True)
    assert probed_copy.subnetworks().variant.unique().tolist() == ["none", "oracle"]
    assert len(probed_copy.subnetwork_masks()) == len(first.mask) + len(other.mask)


# Bad input


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"subnetwork.variant": "sft"}, r"subnetwork\.variant is 'sft'"),
        (
            {"subnetwork.variant": "gumbel"},
            r"subnetwork\.variant is 'gumbel', which this run has not trained",
        ),
        ({"subnetwork.variant": "joint"}, r"no linear probes of 'joint' .* --probe\.variants .*soft joint"),
        ({"subnetwork.penalties": [-1.0]}, r"subnetwork\.penalties"),
        ({"subnetwork.documents": 1}, r"subnetwork\.documents is 1"),
        ({"subnetwork.strength": 1}, r"unknown setting 'subnetwork\.strength'"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], said: str, probed_copy: Run):
    with pytest.raises(ProbekitError, match=said):
        subnetwork(probed_copy, FEW | settings, quiet=True)
    assert not (probed_copy.folder / "subnetworks").exists()
