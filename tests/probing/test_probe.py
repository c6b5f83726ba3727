"""The probe grid against scikit-learn, planted signals, shuffled labels and the planted ceilings."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from sklearn.preprocessing import StandardScaler

from probekit.corpus.examples import cut_windows
from probekit.errors import ProbekitError
from probekit.evaluation.baselines import planner_log_probabilities
from probekit.evaluation.ceilings import ceiling_log_probabilities
from probekit.models.mixing import Soft
from probekit.models.planned_lm import PlannedLM
from probekit.probing.activations import read_activations
from probekit.probing.probe import ProbeResults, _enough, probe
from probekit.probing.targets import targets
from probekit.progress import Progress
from probekit.run import Run
from probekit.storage import read_tensors, write_tensors

WIDE = {
    "probe.variants": ["none", "soft", "fixed"],
    "probe.locations": ["hook_resid_post", "mlp.hook_post"],
    "probe.distances": [1, 40, 500],
    "probe.horizons": [1, 2],
}
METRICS = ["accuracy", "top5", "cross_entropy", "bits"]


def copied(run: Run, folder: Path) -> Run:
    return Run.open(shutil.copytree(run.folder, folder / "run"))


def rewritten(run: Run, folder: Path, file: str, change) -> Run:
    """A copy of a run with one array of its corpus changed."""
    run = copied(run, folder)
    path = run.folder / "corpus" / file
    np.save(path, change(np.array(np.load(path))))
    return run


@pytest.fixture(scope="module")
def loud_run(tiny_run: Run, tmp_path_factory) -> Run:
    """The tiny run with adapters that cannot be overheard."""
    run = copied(tiny_run, tmp_path_factory.mktemp("loud"))
    for path in (run.folder / "adapters").glob("*.safetensors"):
        tensors = read_tensors(path)
        tensors["adapter.projections"] *= 300
        write_tensors(path, tensors)
    return run


@pytest.fixture(scope="module")
def wide(loud_run: Run, tmp_path_factory) -> ProbeResults:
    """A grid with cells of every kind."""
    return probe(copied(loud_run, tmp_path_factory.mktemp("probed")), WIDE, quiet=True)


def cells(table: pd.DataFrame, **values) -> pd.DataFrame:
    for name, value in values.items():
        table = table[table[name] == value]
    return table


def cell(table: pd.DataFrame, **values) -> pd.Series:
    (row,) = (row for _, row in cells(table, **values).iterrows())
    return row


def test_one_row_for_each_reader_and_cell(wide: ProbeResults):
    key = ["reader", "variant", "location", "layer", "distance", "horizon"]
    assert not wide.table.duplicated(key).any()
    counts = wide.table.reader.value_counts()
    assert counts["probe"] == 3 * 2 * 3 * 3 * 2  # variants, locations, layers, distances, horizons
    for reader in ("prior", "bigram", "ceiling (actions)", "ceiling (words)"):
        assert counts[reader] == 3 * 2
    assert counts["planner"] == 3  # it plans the next sentence alone
    assert wide.table[wide.table.reader != "probe"][["variant", "location", "layer"]].isna().all(axis=None)


def test_the_parquet_file_holds_the_table(wide: ProbeResults):
    read = pd.read_parquet(wide.folder / "results.parquet")
    pd.testing.assert_frame_equal(read, wide.table, check_exact=True)
    written = json.loads((wide.folder / "settings.json").read_text())
    assert written["probe"]["distances"] == [1, 40, 500]
    assert written["documents"] == {"probe": 32, "validation": 16, "test": 16}


def test_the_same_seed_gives_the_same_table(wide: ProbeResults, loud_run: Run, tmp_path: Path):
    again = probe(copied(loud_run, tmp_path), WIDE, quiet=True)
    pd.testing.assert_frame_equal(again.table, wide.table, check_exact=True)


def test_cells_with_too_few_examples_are_empty(wide: ProbeResults):
    far, near = wide.table[wide.table.distance == 500], wide.table[wide.table.distance != 500]
    assert (far.examples == 0).all()
    assert far[METRICS].isna().all(axis=None)
    assert near[METRICS].notna().all(axis=None)
    probes = far[far.reader == "probe"]
    for column in ("l2", "iterations", "converged", "validation_cross_entropy", "fitted_on", "documents"):
        assert probes[column].isna().all()
        assert near[near.reader == "probe"][column].notna().all()


def test_injected_marks_where_the_targets_action_was_added(wide: ProbeResults):
    for row in wide.table.itertuples():
        added = (
            row.reader == "probe"
            and row.variant == "soft"  # fixed adds the same for every action
            and row.layer >= 2  # conditioning.skip_layers
            and row.distance == row.horizon == 1
        )
        assert row.injected == added


def test_unreached_layers_read_the_same_in_every_variant(wide: ProbeResults):
    probes = wide.table[wide.table.reader == "probe"].set_index(["location", "layer", "distance", "horizon"])
    none, soft = (probes[probes.variant == variant].drop(columns="variant") for variant in ("none", "soft"))
    below = none.index.get_level_values("layer") < 2
    pd.testing.assert_frame_equal(none[below], soft[below])
    filled = none.accuracy.notna() & ~below
    assert (none.cross_entropy[filled] != soft.cross_entropy[filled]).all()


@pytest.mark.parametrize("distance", [1, 40])
@pytest.mark.parametrize("horizon", [1, 2])
def test_baselines_are_scored_on_each_cells_own_examples(
    wide: ProbeResults, tiny_run: Run, distance: int, horizon: int
):
    corpus = tiny_run.corpus
    documents = corpus.documents("test")
    examples = targets(corpus, documents, distance, horizon)
    sentences = corpus.sentences(documents)
    rows = [int(np.flatnonzero(sentences == anchor)[0]) for anchor in examples.anchor]
    train = targets(corpus, corpus.documents("train"), 1, horizon).action
    shares = (np.bincount(train, minlength=8) + 0.5) / (len(train) + 4)
    readers = ceiling_log_probabilities(tiny_run.config, corpus, documents, horizon)
    readers["prior"] = np.tile(np.log(shares), (len(sentences), 1))
    if horizon == 1:
        readers["planner"] = planner_log_probabilities(tiny_run.planner(), corpus, documents)
    prior = -np.log(shares[examples.action]).mean()
    for reader, log_probabilities in readers.items():
        row = cell(wide.table, reader=reader, distance=distance, horizon=horizon)
        p = np.exp(log_probabilities[rows])
        p /= p.sum(axis=1, keepdims=True)
        loss = log_loss(examples.action, p, labels=range(8))
        assert row.accuracy == accuracy_score(examples.action, p.argmax(axis=1))
        assert row.top5 == top_k_accuracy_score(examples.action, p, k=5, labels=range(8))
        assert row.cross_entropy == pytest.approx(loss)
        assert row.bits == pytest.approx((prior - loss) / np.log(2), abs=1e-7)
        assert row.examples == len(examples)
        assert row.documents == len(set(examples.document))
        for metric in METRICS:
            assert row[f"{metric}_low"] <= row[metric] <= row[f"{metric}_high"]


def test_the_bigram_knows_the_action_before_the_target_sentence(wide: ProbeResults, tiny_run: Run):
    corpus = tiny_run.corpus
    for horizon in (1, 2):
        train, test = (targets(corpus, corpus.documents(name), 1, horizon) for name in ("train", "test"))
        counts = np.full((8, 8), 0.3)
        np.add.at(counts, (corpus.actions[train.anchor - 1], train.action), 1)
        shares = counts / counts.sum(axis=1, keepdims=True)
        loss = log_loss(test.action, shares[corpus.actions[test.anchor - 1]], labels=range(8))
        row = cell(wide.table, reader="bigram", distance=1, horizon=horizon)
        # Smoothed in another way, so not quite the same.
        assert row.cross_entropy == pytest.approx(loss, rel=0.03)


@pytest.mark.parametrize(
    ("location", "layer", "distance", "horizon"), [("hook_resid_post", 2, 1, 2), ("mlp.hook_post", 1, 40, 1)]
)
def test_probes_against_scikit_learn(
    wide: ProbeResults, loud_run: Run, location: str, layer: int, distance: int, horizon: int
):
    corpus = loud_run.corpus
    X, y = {}, {}
    for split in ("probe", "validation", "test"):
        documents = corpus.documents(split)
        examples = targets(corpus, documents, distance, horizon)
        with Progress(quiet=True).task("read") as task:
            read = read_activations(
                loud_run.model("soft"),
                Soft(),
                corpus,
                cut_windows(corpus, documents, 48, 24),
                examples.position,
                [(location, layer)],
                batch_size=1,
                precision="float32",
                task=task,
            )
        X[split], y[split] = read.values[location, layer].double().numpy(), examples.action
    assert set(y["probe"]) == set(range(8))
    scaler = StandardScaler().fit(X["probe"])
    losses = {}
    for l2 in loud_run.config.probe.l2:
        model = LogisticRegression(C=1 / (len(y["probe"]) * l2), tol=1e-8, max_iter=5000)
        model.fit(scaler.transform(X["probe"]), y["probe"])
        losses[l2] = [
            log_loss(y[split], model.predict_proba(scaler.transform(X[split])), labels=range(8))
            for split in ("validation", "test")
        ]
    best = min(losses, key=lambda l2: losses[l2][0])
    row = cell(
        wide.table,
        reader="probe",
        variant="soft",
        location=location,
        layer=layer,
        distance=distance,
        horizon=horizon,
    )
    assert row.l2 == best
    assert row.converged
    assert row.fitted_on == len(y["probe"])
    assert row.validation_cross_entropy == pytest.approx(losses[best][0], rel=1e-3)
    assert row.cross_entropy == pytest.approx(losses[best][1], rel=1e-3)


def test_an_action_written_into_a_layer_is_found_from_there_on(tiny_run: Run, tmp_path: Path, monkeypatch):
    """Every position is given the action of the next token's sentence in the residual stream of layer 1."""

    def write(self: PlannedLM, batch, mixing, scores=None):
        directions = torch.nn.functional.one_hot(batch.actions[batch.sentence], 32).float()
        return [("blocks.1.hook_resid_post", lambda activation, hook: activation + 10 * directions)]

    monkeypatch.setattr(PlannedLM, "hooks", write)
    settings = {"probe.locations": ["hook_resid_pre", "hook_resid_post"], "probe.distances": [1, 3]}
    table = probe(copied(tiny_run, tmp_path), settings | {"probe.variants": ["none"]}, quiet=True).table
    written = {("hook_resid_post", 1), ("hook_resid_pre", 2), ("hook_resid_post", 2)}
    for row in table[table.reader == "probe"].itertuples():
        ceiling = cell(table, reader="ceiling (actions)", distance=row.distance)
        if row.distance == 1 and (row.location, row.layer) in written:
            assert row.accuracy > 0.98
            assert row.bits > ceiling.bits_high
        else:
            assert row.accuracy < ceiling.accuracy_high
            assert row.bits < ceiling.bits
    # Three tokens before, the sentence's own action is written: as good as the bigram, and no better.
    bigram = cell(table, reader="bigram", distance=3)
    best = cells(table, reader="probe", distance=3, location="hook_resid_post", layer=1).iloc[0]
    assert best.accuracy == pytest.approx(bigram.accuracy, abs=0.1)
    assert best.bits > 0.5 * bigram.bits


def test_shuffled_labels_are_not_read(tiny_run: Run, tmp_path: Path):
    run = rewritten(tiny_run, tmp_path, "actions.npy", np.random.default_rng(1).permutation)
    # Shuffled actions are impossible under the planted model, which hence has no ceiling for them.
    settings = {"actions.labels": "clusters", "probe.locations": ["hook_resid_post", "hook_resid_mid"]}
    table = probe(run, settings | {"probe.variants": ["none"]}, quiet=True).table
    assert set(table.reader) == {"probe", "prior", "bigram", "planner", "planner after joint"}
    probes = table[table.reader == "probe"]
    assert len(probes) == 18
    assert (probes.bits_low <= 0).all()
    for row in probes.itertuples():
        prior = cell(table, reader="prior", distance=row.distance)
        assert row.accuracy_low <= prior.accuracy_high


def test_no_probe_beats_the_ceiling(wide: ProbeResults):
    table = wide.table[wide.table.accuracy.notna()]
    for row in table[table.reader == "probe"].itertuples():
        for ceiling in ("ceiling (actions)", "ceiling (words)"):
            best = cell(table, reader=ceiling, distance=row.distance, horizon=row.horizon)
            assert row.bits_low <= best.bits
            assert row.accuracy_low <= best.accuracy


def test_best_cells_are_chosen_on_validation():
    rows = [
        # variant, location, layer, validation loss, test accuracy, injected
        ("none", "a", 0, 1.5, 0.9, False),
        ("none", "a", 1, 1.2, 0.3, False),  # best on validation, worst on test
        ("none", "b", 0, 2.0, 0.5, False),
        ("none", "b", 1, np.nan, np.nan, False),
        ("soft", "a", 0, 0.1, 0.99, True),
        ("soft", "a", 1, 1.9, 0.2, False),
        ("soft", "b", 0, np.nan, np.nan, False),
    ]
    columns = ["variant", "location", "layer", "validation_cross_entropy", "accuracy", "injected"]
    table = pd.DataFrame(rows, columns=columns).assign(reader="probe")
    prior = pd.DataFrame([{"reader": "prior", "injected": False, "validation_cross_entropy": 0.0}])
    best = ProbeResults(pd.concat([table, prior]), Path()).best_cells()
    found = best[["variant", "location", "layer"]].to_numpy().tolist()
    assert found == [["none", "a", 1], ["none", "b", 0], ["soft", "a", 1]]


@pytest.mark.parametrize("most", [1, 11, 12, 100, 250, 100_000])
def test_examples_are_drawn_by_whole_documents(tiny_run: Run, most: int):
    corpus = tiny_run.corpus
    documents = corpus.documents("probe")
    drawn = {}
    for seed in range(4):
        run = Run(tiny_run.folder, tiny_run.config.override({"probe.max_examples": most, "seed": seed}))
        chosen = _enough(run, documents)
        assert set(chosen) <= set(documents)
        assert (np.diff(chosen) > 0).all()
        assert len(targets(corpus, chosen, 1, 1)) <= most
        others = np.setdiff1d(documents, chosen)
        longest = np.diff(corpus.document_sentences)[documents].max() - 1
        assert not len(others) or len(targets(corpus, chosen, 1, 1)) > most - longest
        exactly = tiny_run.config.override(
            {"probe.max_examples": max(1, len(targets(corpus, chosen, 1, 1))), "seed": seed}
        )
        assert _enough(Run(tiny_run.folder, exactly), documents).tolist() == chosen.tolist()
        drawn[seed] = chosen.tolist()
    distinct = len(set(map(tuple, drawn.values())))
    assert distinct == {1: 1, 100: 4, 250: 4, 100_000: 1}.get(most, distinct)


def test_probes_are_fitted_on_the_documents_drawn(tiny_run: Run, tmp_path: Path):
    settings = {"probe.max_examples": 100, "probe.distances": [1], "probe.variants": ["none"]}
    results = probe(copied(tiny_run, tmp_path), settings, quiet=True)
    fitted_on = results.table.fitted_on.dropna()
    assert 88 < fitted_on.iloc[0] <= 100
    assert set(fitted_on) == {fitted_on.iloc[0]}
    documents = json.loads((results.folder / "settings.json").read_text())["documents"]
    assert 100 / 15 <= documents["probe"] <= 100 / 9
    assert (results.table.examples == 200).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"probe.variants": ["none", "gumbel"]},
            r"probe\.variants has 'gumbel'.*not trained.*none, fixed, oracle",
        ),
        ({"probe.layers": [0, 3]}, r"probe\.layers has 3, but the LM's layers are 0 to 2"),
        ({"probe.locations": ["hook_nothing"]}, r"probe\.locations is 'hook_nothing'.*hook_resid_post"),
        (
            {"probe.locations": ["attn.hook_pattern"]},
            r"probe\.locations is 'attn\.hook_pattern'.*hook_resid_post",
        ),
        ({"probe.distances": [500, 600]}, r"no distance and horizon has 20 examples.*probe\.distances"),
        ({"probe.max_examples": 12}, r"no distance and horizon has 20 examples.*probe\.max_examples"),
        ({"evaluation.window": 64}, r"evaluation\.window is 64, but the LM reads at most 48"),
    ],
)
def test_what_cannot_be_probed_is_refused(tiny_run: Run, settings: dict, message: str):
    with pytest.raises(ProbekitError, match=message):
        probe(tiny_run, settings, quiet=True)
    assert not (tiny_run.folder / "probes").exists()


def test_a_corpus_without_documents_for_probes_is_refused(tiny_run: Run, tmp_path: Path):
    run = rewritten(tiny_run, tmp_path, "split.npy", lambda split: np.where(split == 1, 0, split))
    with pytest.raises(ProbekitError, match=r"corpus\.probe_fraction above 0"):
        probe(run, quiet=True)


def test_layers_of_the_settings(tiny_run: Run, tmp_path: Path):
    settings = {"probe.layers": [2, 0], "probe.distances": [2], "probe.variants": ["joint"]}
    table = probe(copied(tiny_run, tmp_path).folder, settings, quiet=True).table
    assert table[table.reader == "probe"].layer.tolist() == [0, 2]
