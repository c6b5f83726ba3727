"""Subnetworks as a whole: planted heads are found, rows and notes, the chosen mask and its controls."""

import shutil
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import probekit
from probekit.causal.subnetwork import SubnetworkResults, checks, results_table, subnetwork
from probekit.io import read_tensors, write_tensors
from probekit.probing.activations import ActivationReader
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
    return subnetwork(folder, FEW | {"subnetwork.variant": "soft"}, quiet=True)


# Constructions whose truth is known


def test_the_head_that_alone_carries_the_information_is_found(planted: Callable[..., Run]):
    results = subnetwork(planted({(1, 1): slice(0, 32)}), FEW, quiet=True)
    assert results.mask.component[results.mask.removed].tolist() == ["head 1.1"]
    # Heads that write nothing change nothing.
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
    best = values(results, "alone")
    assert best.equals(without[best.index].rename("value"))
    assert results.table[results.table.condition == "random"].removed.eq(1).all()


def test_information_that_is_carried_twice_is_found_by_a_refitted_probe(planted: Callable[..., Run]):
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
    assert any("not gone, but moved" in note for note in results.notes)


def read_half(run: Run) -> None:
    """Saves a probe that does not read what the second head writes, but is as good as that allows."""
    settings = run.config.probe.model_copy(update={"positions": (1,)})
    grid = make_grid(run.corpus, settings, find_target(run.corpus, "action"), 0)
    reader, parts = ActivationReader(run, "none", [("hook_resid_post", 2)], (1,)), []
    for split in ("probe", "validation"):
        (states,) = reader.read(grid.examples[split])
        states[..., 16:] = 0
        parts += [states[0], torch.from_numpy(grid.labels(split, 1))]
    fitted = SoftmaxProbes([0.01]).fit(*parts[:2], run.corpus.k, *parts[2:])
    path = run.folder / "probes" / "none-seed0.safetensors"
    coef, intercept = sorted(read_tensors(path))
    write_tensors(path, {coef: fitted.coef_[0], intercept: fitted.intercept_[0]})


def test_a_penalty_above_the_information_removes_nothing(probed_copy: Run):
    dear = FEW | {"subnetwork.penalties": [10.0], "subnetwork.documents": 6, "subnetwork.steps": 12}
    results = subnetwork(probed_copy, dear | {"subnetwork.learning_rate": 1.0}, quiet=True)
    assert not results.mask.removed.any()
    assert results.notes == ["no mask was better than to remove nothing, on validation documents"]
    changes = results.table[results.table.metric.str.endswith("_change")]
    assert (changes.value == 0).all()
    assert results.candidates.removed.tolist() == [0, 0]


# Any run


def test_rows_are_complete_and_add_up(soft: SubnetworkResults):
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
    assert soft.mask.component.tolist()[-2:] == ["adapter 2.0", "adapter 2.1"]
    assert soft.mask.gate.between(0, 1).all()
    assert (soft.mask.removed == (soft.mask.gate <= 0.5)).all()


def test_losses_are_those_of_evaluation(soft: SubnetworkResults):
    """Of the whole LM, over all tokens of the same documents."""
    run = Run.open(soft.folder.parents[1])
    found = probekit.evaluate(run, {"evaluation.resamples": 100}, quiet=True).losses
    own = found[found.variant == "soft"]
    assert len(own) == 16
    whole, corpus = values(soft, "whole"), run.corpus
    first = corpus.document_sentences[corpus.documents("test")]
    after = corpus.document_sentences[corpus.documents("test") + 1]
    second = corpus.first_token[np.minimum(first + 1, len(corpus.first_token) - 1)]
    tokens = {
        "first_loss": (after - first - 1).sum(),
        "other_loss": (second - corpus.first_token[first]).sum(),
    }
    tokens["rest_loss"] = own.tokens.sum() - sum(tokens.values())
    total = sum(whole[name] * count for name, count in tokens.items())
    assert total == pytest.approx(own.loss.sum(), rel=1e-5)


def test_the_same_seed_gives_the_same_and_variants_stand_side_by_side(probed_copy: Run):
    few = FEW | {"subnetwork.documents": 6, "subnetwork.steps": 4}
    first, second = (subnetwork(probed_copy, few, quiet=True) for _ in range(2))
    pd.testing.assert_frame_equal(first.table, second.table)
    pd.testing.assert_frame_equal(first.mask, second.mask)
    other = subnetwork(probed_copy, few | {"subnetwork.variant": "oracle"}, quiet=True)
    assert probed_copy.subnetworks().variant.unique().tolist() == ["none", "oracle"]
    assert len(probed_copy.subnetwork_masks()) == len(first.mask) + len(other.mask)


# The table and its notes

COUNTED = np.zeros((5, 12), dtype=bool)
"""The masks of the whole LM, a subnetwork of two, those best removed alone, and two draws."""
for row, removed in enumerate([[], [0, 4], [0, 5], [1, 5], [0, 6]]):
    COUNTED[row, removed] = True


def table_of(bits: list[float], refitted: list[float], draws: int = 2) -> pd.DataFrame:
    """Of twelve documents with equal values."""
    each = np.ones(12)
    by_metric = {"bits": bits, "refitted_bits": refitted}
    sums = {name: (np.array(v)[: 3 + draws, None] * each, each) for name, v in by_metric.items()}
    return results_table(sums, COUNTED[: 3 + draws], {"resamples": 100, "seed": 0})


def test_a_row_counts_what_it_shares_with_the_subnetwork():
    table = table_of([2, 1, 1, 1, 1], [2, 1, 1, 1, 1])
    counts = table.groupby("condition")[["removed", "shared"]].first()
    expected = {"whole": [0, 0], "subnetwork": [2, 2], "alone": [2, 1], "random": [2, 0.5]}
    assert counts.T.to_dict("list") == expected
    assert (table.components == 12).all()


@pytest.mark.parametrize(
    ("refitted", "notes"),
    [
        ([2, 0.5, 1, 1.5, 1.5], []),
        ([2, 1.9, 1, 2, 2], ["but moved"]),
        ([2, 0.5, 1, 0.5, 0.5], ["at random"]),
        ([2, 1.9, 1, 1.5, 1.5], ["but moved", "at random"]),
    ],
)
def test_notes(refitted: list[float], notes: list[str]):
    found = checks(table_of([2, 0.4, 1, 1, 1], refitted), COUNTED)
    assert len(found) == len(notes)
    for note, part in zip(found, notes, strict=True):
        assert part in note


def test_notes_where_draws_or_the_mask_compare_nothing():
    table = table_of([2, 0.4, 1, 1, 1], [2, 0.5, 1, 1.5, 1.5])
    forced = np.repeat(COUNTED[1:2], 5, axis=0)
    assert "2 of the 2 components are in every random draw" in checks(table, forced)[0]
    nothing = "no mask was better than to remove nothing, on validation documents"
    assert checks(table, np.zeros_like(COUNTED)) == [nothing]


def test_intervals_over_random_include_the_variation_of_draws():
    """All documents are equal: what is not known is what other draws would have done."""
    table = table_of([2, 0.4, 1, 0.9, 1.3], [2, 0.5, 1, 1.5, 1.5])
    rows = table[(table.metric.str.startswith("bits")) & table.draw.isna()].set_index(["condition", "metric"])
    half = stats.t.ppf(0.975, 1) * 0.2  # the mean of two draws is off by half of their difference
    for name in (("random", "bits"), ("random", "bits_change"), ("subnetwork", "bits_over_random")):
        row = rows.loc[name]
        assert row.value_high - row.value == pytest.approx(half)
        assert row.value - row.value_low == pytest.approx(half)
    assert rows.loc[("subnetwork", "bits_over_random")].value == pytest.approx(0.4 - 1.1)
    # What one mask does is known of all documents.
    assert rows.loc[("subnetwork", "bits_change")].value_high == pytest.approx(-1.6)


def test_one_draw_gives_no_interval_over_random():
    table = table_of([2, 0.4, 1, 1], [2, 0.4, 1, 1], draws=1)
    assert table[table.metric == "bits_over_random"].value_high.isna().all()
    masks = COUNTED[:4]
    assert ["no interval" in note for note in checks(table, masks)] == [True]
