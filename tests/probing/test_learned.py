"""What probes read of an LM that has learned something, and of labels that say nothing."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from probed_tables import cell, cells, check_ceilings, copied, rewritten, table_of
from scipy.stats import binom

from probekit.config import Config
from probekit.data.corpus import export_sentences
from probekit.models.backends import BridgeBackend
from probekit.models.conditioning import new_adapter
from probekit.models.mixing import VARIANTS, Oracle, Variant
from probekit.models.planned_lm import PlannedLM
from probekit.probing.probe import probe
from probekit.probing.results import Cell, SavedProbes
from probekit.run.run import Run
from probekit.training.train import train

PLAIN = {"probe.control": False, "probe.code_length": False, "probe.variants": ["none"], "probe.l2": [0.1]}


@pytest.fixture(scope="module")
def learned_run(tmp_path_factory) -> Run:
    """A larger planted run, whose LM has learned something that is worth reading."""
    planted = {"documents": 500, "actions": 8, "types": 2, "successors": 2, "vocabulary": 40}
    planted |= {"words": (3, 4), "concentration": 0.1}
    settings = {f"corpus.planted.{name}": value for name, value in planted.items()} | {
        "device": "cpu",
        "corpus.probe_fraction": 0.5,
        "corpus.test_fraction": 0.2,
        "actions.k": 8,
        "actions.dimensions": 16,
        "lm.layers": 3,
        "lm.width": 32,
        "lm.heads": 2,
        "lm.positions": 48,
        "lm.vocabulary": 600,
        "planner.width": 32,
        "training.window": 48,
        "training.planner.epochs": 1,
        "evaluation.resamples": 300,
        "mixing.variants": ["none"],
        "conditioning.skip_layers": 1,
    }
    config = Config.from_preset("demo").override(settings)
    return train(config, tmp_path_factory.mktemp("learned") / "run", quiet=True)


@pytest.fixture(scope="module")
def learned(learned_run: Run, tmp_path_factory) -> pd.DataFrame:
    settings = {
        "probe.variants": ["none", "random"],
        "probe.locations": ["hook_resid_pre", "hook_resid_post"],
        "probe.positions": [1, 3],
        "probe.l2": [0.01, 0.1],
    }
    return table_of(learned_run, tmp_path_factory.mktemp("read"), settings)


def test_an_action_written_into_a_layer_is_found_from_there_on(
    learned_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The heads of layer 1 get the true action of the sentence of the next token at every position."""
    monkeypatch.setitem(VARIANTS, "oracle", Variant(Oracle(), Oracle()))
    run = copied(learned_run, tmp_path).with_settings({"mixing.variants": ["oracle"]})
    centroids = torch.from_numpy(run.corpus.codebook.centroids)
    adapter = new_adapter(run.config.conditioning, centroids, run.frozen_lm(), seed=0)
    adapter.projections.data[0] *= 1000
    adapter.projections.data[1] = 0  # layers 1 and 2 are conditioned
    run.save_adapter("oracle", PlannedLM(BridgeBackend(run.frozen_lm().bridged), None, adapter, 1.0))
    run.mark_finished("adapter/oracle", {})
    settings = PLAIN | {
        "probe.variants": ["oracle"],
        "probe.locations": ["hook_resid_pre", "attn.hook_z:before", "attn.hook_z", "hook_resid_post"],
        "probe.positions": [1, 3],
        "probe.l2": [1e-3],
    }
    table = probe(run, settings, quiet=True).table
    written = {("attn.hook_z", 1), ("hook_resid_post", 1), ("hook_resid_pre", 2), ("hook_resid_post", 2)}
    probes = cells(table, reader="probe")
    assert len(probes) == 4 * 3 * 2
    # The heads of layer 2 mix what was added at their own position with what was added at earlier ones.
    probes = probes[(probes.layer < 2) | ~probes.location.str.startswith("attn")]
    for row in probes.itertuples():
        ceiling = cell(table, reader="ceiling (tokens read)", distance=row.distance)
        if row.distance == 1 and (row.location, row.layer) in written:
            assert row.accuracy > 0.95, (row.location, row.layer)
            assert row.bits > ceiling.bits_high
        else:
            assert row.accuracy < ceiling.accuracy_high
            assert row.bits < ceiling.bits
    # Three tokens before, the sentence's own action is written: as good as the bigram, and no better.
    bigram = cell(table, reader="bigram (current action)", distance=3)
    best = cell(probes, distance=3, location="attn.hook_z", layer=1)
    assert best.bits == pytest.approx(bigram.bits, abs=0.1)
    before = cell(probes, distance=3, location="attn.hook_z:before", layer=1)
    assert before.bits < best.bits - 0.3


# What is there, and what is not


def test_no_probe_beats_the_ceiling(learned: pd.DataFrame):
    check_ceilings(learned)


def test_a_trained_model_is_read_and_one_with_random_weights_is_not(learned: pd.DataFrame):
    """Of the full stop before a sentence random attention makes little; trained attention gathers words."""
    at = {"reader": "probe", "distance": 1, "layer": 0}
    for variant in ("none", "random"):
        stop = cell(learned, location="hook_resid_pre", variant=variant, **at)
        assert stop.bits_low <= 0
        assert abs(stop.bits) < 0.02
    random = cell(learned, location="hook_resid_post", variant="random", **at)
    trained = cell(learned, location="hook_resid_post", variant="none", **at)
    assert random.bits_high < 0.2
    assert trained.bits_low > 0.3
    assert trained.gain_high < 0, "counting the last tokens gives more"
    assert trained.code_length < random.code_length
    # At distance 3 there are words, whose embeddings hold information even under random weights.
    assert cell(learned, location="hook_resid_pre", variant="random", **at | {"distance": 3}).bits_low > 0.3


def test_shuffled_labels_are_not_read(learned_run: Run, tmp_path: Path):
    """Probes of labels that nothing predicts exceed the prior as often as chance allows."""
    settings = PLAIN | {
        "actions.labels": "clusters",  # shuffled actions are impossible under the planted model
        "probe.locations": ["hook_resid_post", "attn.hook_z"],
        "probe.positions": [1, 3, 5],
        "probe.horizons": [1, 2],
        "probe.solvers": ["softmax", "lda"],
        "probe.max_examples": 1000,
        "probe.code_length": True,
    }
    found = []
    for seed in range(3):
        shuffle = np.random.default_rng(seed).permutation
        run = rewritten(learned_run, tmp_path / str(seed), "actions.npy", shuffle)
        table = probe(run, settings, quiet=True).table
        counted = {"prior", "bigram", "bigram (current action)", "skip n-gram", "bag of words"}
        assert set(table.reader) == counted | {"probe", "token embedding", "planner"}
        probes = table[table.reader == "probe"]
        found.append(probes.assign(chance=cell(table, reader="prior", distance=1, horizon=1).accuracy))
        labels = np.bincount(run.corpus.actions, minlength=8) / len(run.corpus.actions)
        entropy = -(labels * np.log2(labels)).sum()
        assert probes.code_length[probes.solver == "softmax"].min() > 0.98 * entropy
    probes = pd.concat(found)
    assert len(probes) == 3 * 2 * 3 * 3 * 2 * 2
    beyond = int((probes.bits_low > 0).sum())
    assert beyond <= binom.ppf(0.999, len(probes), 0.025)
    assert (probes.gain_low > 0).sum() == 0
    likely = int((probes.accuracy_low > probes.chance).sum())
    assert likely <= binom.ppf(0.999, len(probes), 0.025)
    assert probes.bits.mean() < 0


# Other targets


def test_a_column_of_labels_that_the_token_before_determines(learned_run: Run, tmp_path: Path):
    """Labels of a sentence are which token came two tokens before it: there to be read at distance 2."""
    run = copied(learned_run, tmp_path)
    corpus, path = run.corpus, tmp_path / "labels.csv"
    export_sentences(corpus, path)
    table = pd.read_csv(path)
    before = corpus.tokens[np.maximum(corpus.first_token - 2, 0)]
    common = np.unique(before[1:], return_counts=True)
    known = common[0][np.argsort(-common[1])[:3]]
    table["before"] = np.select([before == token for token in known], ["one", "two", "three"], "other")
    table.to_csv(path, index=False)
    settings = PLAIN | {"probe.target": "before", "probe.labels": str(path), "probe.positions": [1, 2]}
    settings |= {"probe.layers": [0], "probe.locations": ["hook_resid_pre", "hook_embed"]}
    found = probe(run, settings | {"probe.l2": [1e-3]}, quiet=True).table
    assert (found.target == "before").all()
    counted = {"prior", "bigram", "bigram (current action)", "skip n-gram", "bag of words"}
    assert set(found.reader) == counted | {"probe", "token embedding"}
    assert (cells(found, reader="skip n-gram").accuracy > 0.99).all(), "the tokens before determine it"
    for reader in ("probe", "token embedding"):
        rows = cells(found, reader=reader, location="hook_embed")
        assert cell(rows, distance=2).accuracy > 0.99
        assert abs(cell(rows, distance=1).bits) < 0.05
        assert rows.validation_cross_entropy.notna().all()


@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({"probe.target": "token", "probe.anchors": "token", "probe.positions": [1]}, 0.5),
        ({"probe.target": "token", "probe.anchors": "start", "probe.positions": [1]}, 0.1),
        ({"probe.target": "sentence-position"}, 0.1),
        ({"probe.target": "document-type", "probe.positions": [2]}, 0.05),
    ],
)
def test_other_targets_are_read(learned_run: Run, tmp_path: Path, settings: dict, least: float):
    common = {"probe.layers": [1], "probe.max_examples": 4000, "probe.positions": [1, 2]}
    common |= {"probe.solvers": ["ridge"], "probe.horizons": [1, 2]}
    table = table_of(learned_run, tmp_path, PLAIN | common | settings)
    assert (table.target == settings["probe.target"]).all()
    assert set(table.reader) == {"probe", "token embedding", "prior", "skip n-gram"}
    for row in cells(table, reader="probe", horizon=1).itertuples():
        assert row.bits_low > least, row.bits_low


def test_a_token_is_read_from_its_own_embedding(learned_run: Run, tmp_path: Path):
    """Word for word, and by no more than the baseline that is a probe of that embedding."""
    settings = PLAIN | {"probe.target": "token", "probe.anchors": "token", "probe.max_examples": 4000}
    settings |= {"probe.positions": [0, "last", "mean", 1], "probe.l2": [1e-4]}
    settings |= {"probe.locations": ["hook_embed"]}
    table = table_of(learned_run, tmp_path, settings)
    probes, baseline = (
        cells(table, reader=name).set_index("position") for name in ("probe", "token embedding")
    )
    assert probes.index.tolist() == ["0", "1", "last", "mean"]
    assert probes.distance.tolist() == [0, 1, pd.NA, pd.NA]
    for position in ("0", "last", "mean"):
        assert probes.accuracy[position] > 0.99  # some tokens are too rare to be learned
        assert cell(table, reader="skip n-gram", position=position).accuracy > 0.99
        assert probes.bits[position] == pytest.approx(baseline.bits[position], abs=1e-6)
        assert probes.accuracy[position] == probes.accuracy["0"]
    assert probes.accuracy["1"] < 0.9
    saved = SavedProbes(tmp_path / "run" / "probes", "none", 0)
    assert {str(one.position) for one in saved.cells} == {*probes.index}
    assert all(Cell.of(one.key) == one for one in saved.cells)


def test_the_words_of_a_sentence_say_its_action(learned_run: Run, tmp_path: Path):
    """More than the token before it, and their mean more than the first alone; nothing beats its ceiling."""
    settings = PLAIN | {"probe.positions": [1, 0, "last", "mean"], "probe.locations": ["hook_resid_post"]}
    table = table_of(learned_run, tmp_path, settings | {"probe.layers": [2], "probe.solvers": ["ridge"]})
    probes = cells(table, reader="probe").set_index("position")
    assert (probes.loc[["0", "last", "mean"]].bits_low > probes.bits_high["1"]).all()
    words = cells(table, reader="token embedding").set_index("position")
    assert words.bits_low["mean"] > words.bits_high["0"]
    assert (probes.shortfall_high > 0).all()
    # Nothing of the sentence is in what the bigram knows, wherever the probe reads.
    assert len({*cells(table, reader="bigram").cross_entropy}) == 1
    assert (probes.loc[["last", "mean"]].tokens_read > probes.tokens_read["0"]).all()
