"""The probe grid against scikit-learn, planted signals, shuffled labels and the planted ceilings."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from probed_tables import cell, cells, check_ceilings, copied, rewritten, table_of
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.preprocessing import StandardScaler

from probekit import progress
from probekit.errors import ProbekitError
from probekit.io import read_tensors, write_tensors
from probekit.probing import grid as grid_module
from probekit.probing.activations import ActivationReader
from probekit.probing.controls import control_labels
from probekit.probing.grid import Grid, make_grid
from probekit.probing.probe import ProbeResults, _grid_notes, probe
from probekit.probing.results import COLUMNS
from probekit.probing.targets import find_target
from probekit.run.run import Run

DISTANCES, HORIZONS = (1, 3), (1, 2)
WIDE: dict[str, Any] = {
    "probe.variants": ["none", "random", "soft", "fixed"],
    "probe.locations": ["hook_resid_post", "attn.hook_z:before", "attn.hook_z"],
    "probe.positions": [*DISTANCES, 500],
    "probe.horizons": list(HORIZONS),
    "probe.solvers": ["softmax", "ridge"],
    "probe.l2": [0.03, 0.3],
    "probe.code_length": False,
}
"""A grid with cells of every kind."""
SMALL: dict[str, Any] = {
    "probe.variants": ["random", "soft"],
    "probe.locations": ["hook_resid_post", "mlp.hook_post", "hook_embed"],
    "probe.layers": [0, 2],
    "probe.positions": list(DISTANCES),
    "probe.solvers": ["softmax", "lda"],
    "probe.l2": [0.1],
    "probe.max_examples": 150,
    "probe.seeds": [0, 5],
}
"""A small one, of two widths, with documents and weights drawn at random."""
PLAIN = {"probe.control": False, "probe.code_length": False, "probe.variants": ["none"], "probe.l2": [0.1]}
METRICS = ["accuracy", "top5", "cross_entropy", "bits"]
KEY = ["reader", "solver", "variant", "seed", "location", "layer", "distance", "position", "horizon"]


def same(found: pd.DataFrame, expected: pd.DataFrame, **tolerance: Any) -> None:
    pd.testing.assert_frame_equal(found.reset_index(drop=True), expected.reset_index(drop=True), **tolerance)


# Runs that tests share


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
    return probe(copied(loud_run, tmp_path_factory.mktemp("wide")), WIDE, quiet=True)


@pytest.fixture(scope="module")
def grid(loud_run: Run) -> Grid:
    """The examples of the wide grid."""
    run = loud_run.with_settings(WIDE)
    return make_grid(run.corpus, run.config.probe, find_target(run.corpus, "action"), run.config.seed)


@pytest.fixture(scope="module")
def small(loud_run: Run, tmp_path_factory) -> pd.DataFrame:
    return table_of(loud_run, tmp_path_factory.mktemp("small"), SMALL)


# The table


def test_one_row_for_each_reader_and_cell(wide: ProbeResults):
    assert not wide.table.duplicated(KEY).any()
    counts = wide.table.reader.value_counts()
    assert (
        counts["probe"] == 2 * 4 * 3 * 3 * 3 * 2
    )  # solvers, variants, locations, layers, distances, horizons
    readers = {"prior", "bigram", "bigram (current action)", "skip n-gram", "token embedding"}
    readers |= {f"ceiling ({of})" for of in ("actions", "words", "tokens read")}
    for reader in readers:
        assert counts[reader] == 2 * 2  # distances that are not empty, horizons
    for reader in ("planner", "planner after joint"):  # they plan the next sentence alone
        assert counts[reader] == 2
    assert set(counts.index) == {"probe", "planner", "planner after joint", *readers}


def test_columns_and_types(wide: ProbeResults):
    assert {name: str(kind) for name, kind in wide.table.dtypes.items()} == COLUMNS
    assert (wide.table.target == "action").all()
    assert wide.table.equals(wide.table.sort_values(KEY, kind="stable", ignore_index=True))


def test_the_parquet_file_holds_the_table(wide: ProbeResults, loud_run: Run):
    read = pd.read_parquet(wide.folder / "results.parquet")
    pd.testing.assert_frame_equal(read, wide.table, check_exact=True)
    same(Run.open(wide.folder.parent).probes(), wide.table, check_exact=True)
    written = json.loads((wide.folder / "settings.json").read_text())
    assert written["probe"]["positions"] == [*DISTANCES, 500]
    assert written["documents"] == {"0": {"probe": 32, "validation": 16, "test": 16}}
    assert written["notes"] == wide.notes


def test_all_cells_share_their_examples(wide: ProbeResults, loud_run: Run):
    corpus, count = loud_run.corpus, 0
    for document in corpus.documents("test").tolist():
        first, last = corpus.document_sentences[document : document + 2].tolist()
        begin = int(corpus.document_tokens[document])
        count += sum(corpus.first_token[j] - 3 > begin for j in range(first, last - 1))
    filled = wide.table[wide.table.accuracy.notna()]
    assert (filled.examples == count).all()
    assert (filled.documents == 16).all()


def test_cells_say_how_much_the_lm_had_read(wide: ProbeResults, loud_run: Run, grid: Grid):
    """The windows are of 48 tokens, and later ones begin 24 tokens apart."""
    examples, corpus = grid.examples["test"], loud_run.corpus
    read = []
    for distance in DISTANCES:
        before = examples.start - distance - corpus.document_tokens[examples.document]
        read.append(np.where(before < 48, before, 24 + before % 24) + 1)
        rows = cells(wide.table, reader="probe", distance=distance)
        assert set(rows.tokens_read) == {int(np.median(read[-1]))}
    most = np.sort(np.max(read, axis=0))
    half, tenth = most[(len(most) - 1) // 2], most[(len(most) - 1) // 10]
    expected = f"read {tenth} tokens or fewer at a tenth of the test examples, {half} or fewer at half"
    assert sum(expected in note for note in wide.notes) == 1


def test_cells_with_too_few_examples_are_empty(wide: ProbeResults):
    far, near = wide.table[wide.table.distance == 500], wide.table[wide.table.distance != 500]
    assert (far.reader == "probe").all()
    assert (far.examples == 0).all()
    filled = [name for name in COLUMNS if name not in (*KEY, "target", "injected", "examples")]
    assert far[filled].isna().all(axis=None)
    assert near[METRICS].notna().all(axis=None)
    probes = near[near.reader == "probe"]
    assert probes[["validation_cross_entropy", "fitted_on", "l2", "control_accuracy"]].notna().all(axis=None)
    assert probes.tokens_read.notna().all()
    assert not near.injected.isna().any()
    for horizon in HORIZONS:
        assert any(f"position 500, horizon {horizon} is empty" in note for note in wide.notes)


def test_constant_activations_are_noted(wide: ProbeResults):
    """At distance 1 there is a full stop, always, whose embedding holds no information."""
    constant = wide.table[wide.table.constant.fillna(False)]
    assert set(constant.reader) == {"token embedding"}
    assert set(constant.distance) == {1}
    assert (
        "constant activations, which hold no information: hook_embed, layer 0, position 1 (token embedding)"
        in (wide.notes)
    )
    assert constant.bits.abs().max() < 0.05


# Again, in parts, from a store


@pytest.mark.parametrize("solvers", [["softmax", "lda"], ["lda"]])
def test_activations_that_do_not_fit_into_memory_are_spilled_and_the_text_is_read_once(
    small: pd.DataFrame, loud_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solvers: list[str]
):
    passes = []
    read = ActivationReader.chunks

    def counted(self: ActivationReader, *given):
        passes.append([place for block in self.stacks for place in block.points])
        return read(self, *given)

    monkeypatch.setattr(ActivationReader, "chunks", counted)
    run = copied(loud_run, tmp_path)
    table = probe(run, SMALL | {"probe.memory": 1e-9, "probe.solvers": solvers}, quiet=True).table
    if "softmax" in solvers:
        assert len(passes) == 2 * 3 * (1 + 2)  # seeds, splits, the token embedding and two variants
        assert [*run.folder.rglob("tmp*")] == []
    else:  # the sums of one place at a time
        assert all(len(places) == 1 for places in passes)
        assert len(passes) == 2 * 3 * (1 + 2 * 5)
    expected = small[small.solver.isna() | small.solver.isin(solvers)]
    if "softmax" not in solvers:  # the token embedding is read by the first solver
        table, expected = (part[part.reader == "probe"] for part in (table, expected))
    own = [name for name in COLUMNS if not name.startswith("gain")]  # gains hold for all cells together
    same(table[own], expected[own], rtol=1e-4, atol=1e-5)


def test_a_store_gives_the_same_table_and_saves_the_forward_passes(
    small: pd.DataFrame, loud_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = copied(loud_run, tmp_path)
    same(probe(run, SMALL, store=True, quiet=True).table, small, check_exact=True)
    assert {path.name for path in (run.folder / "activations").iterdir()} == {
        f"{variant}-seed{seed}" for variant in ("random", "soft") for seed in (0, 5)
    }

    read = ActivationReader.read

    def only_embeddings(self: ActivationReader, *given):
        assert [block.points for block in self.stacks] == [(("hook_embed", 0),)]
        return read(self, *given)

    monkeypatch.setattr(ActivationReader, "read", only_embeddings)
    again = probe(run, SMALL | {"probe.memory": 1e-9}, store=True, quiet=True).table
    same(again, small, rtol=1e-4, atol=1e-5)


def test_each_seed_is_a_grid_of_its_own(small: pd.DataFrame, loud_run: Run, tmp_path: Path):
    assert set(small.seed.dropna()) == {0, 5}
    for seed in (0, 5):
        alone = table_of(loud_run, tmp_path / str(seed), SMALL | {"probe.seeds": None, "seed": seed})
        own = [name for name in COLUMNS if not name.startswith("gain") and "_low" not in name]
        own = [name for name in own if "_high" not in name]  # the run's seed draws the resamples
        probes, expected = (
            cells(table, seed=seed).sort_values(KEY, ignore_index=True)[own] for table in (alone, small)
        )
        same(probes, expected, rtol=1e-9, atol=1e-12)
    losses = [cells(small, reader="probe", seed=seed).cross_entropy.to_numpy() for seed in (0, 5)]
    assert (losses[0] != losses[1]).all(), "other documents, other random weights"


def test_progress_counts_tokens_and_shows_closed_form_probes_first(
    loud_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    run = copied(loud_run, tmp_path)
    settings = SMALL | {"probe.variants": ["soft"], "probe.seeds": [0], "probe.control": False}
    table = probe(run, settings | {"probe.code_length": False}).table
    shown = capsys.readouterr().err
    (tokens,) = re.findall(r"each variant reads ([\d,]+) tokens in windows of up to 48", shown)
    assert f"grid of seed 0: {5 * 2 * 2} probes" in shown
    assert re.search(r"reading takes about .* in all, at [\d,]+ tokens a second; fitting comes on top", shown)
    assert re.search(rf"read {tokens} tokens in .*, [\d,]+ a second; peak memory [\d.]+ GB", shown)
    first, others = shown.index("soft: test cross-entropy of closed-form"), shown.index("soft: fit softmax")
    assert first < others
    row = cell(table, solver="lda", location="mlp.hook_post", layer=2, distance=3)
    assert f"{row.cross_entropy:.3f}" in shown[first:others]


def test_notes_of_all_seeds_are_shown(grid: Grid):
    notes = {0: ("of both", "of 0"), 5: ("of both", "of 5")}
    grids = {seed: replace(grid, notes=of_seed) for seed, of_seed in notes.items()}
    assert _grid_notes(grids) == ["of both", "of 0 (seed 0)", "of 5 (seed 5)"]


# Each number by hand


def activations(
    run: Run, grid: Grid, variant: str, place: tuple[str, int], distance: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Of the examples of every split."""
    reader = ActivationReader(run, variant, [place], [distance], seed)
    return {
        split: torch.cat([blocks[0][0, 0] for _, blocks in reader.chunks(examples)]).double().numpy()
        for split, examples in grid.examples.items()
    }


def logistic(X: np.ndarray, y: np.ndarray, l2: float, weights: np.ndarray | None = None):
    """scikit-learn's probe: a function from activations to probabilities."""
    scaler = StandardScaler().fit(X if weights is None else X[weights == 1])
    model = LogisticRegression(C=1 / (len(X) * l2), tol=1e-8, max_iter=5000)
    model.fit(scaler.transform(X), y, sample_weight=weights)
    return lambda other: model.predict_proba(scaler.transform(other))


@pytest.mark.parametrize(
    ("variant", "place", "distance", "horizon"),
    [
        ("soft", ("hook_resid_post", 2), 1, 2),
        ("random", ("attn.hook_z", 1), 3, 1),
        ("fixed", ("attn.hook_z:before", 2), 1, 1),
    ],
)
def test_probes_against_scikit_learn(
    wide: ProbeResults,
    loud_run: Run,
    grid: Grid,
    variant: str,
    place: tuple[str, int],
    distance: int,
    horizon: int,
):
    X = activations(loud_run, grid, variant, place, distance)
    y = {split: grid.labels(split, horizon) for split in X}
    assert set(y["probe"]) == set(range(8))
    losses = {}
    for l2 in WIDE["probe.l2"]:
        predict = logistic(X["probe"], y["probe"], l2)
        losses[l2] = [
            log_loss(y[split], predict(X[split]), labels=range(8)) for split in ("validation", "test")
        ]
    best = min(losses, key=lambda l2: losses[l2][0])
    at = {"variant": variant, "location": place[0], "layer": place[1]}
    row = cell(wide.table, reader="probe", solver="softmax", distance=distance, horizon=horizon, **at)
    assert row.l2 == best
    assert row.converged
    assert row.fitted_on == len(y["probe"])
    assert row.validation_cross_entropy == pytest.approx(losses[best][0], rel=1e-3)
    assert row.cross_entropy == pytest.approx(losses[best][1], rel=1e-3)


def test_control_task_and_selectivity_by_hand(wide: ProbeResults, loud_run: Run, grid: Grid):
    """Labels of the last word-like token, memorised with the penalty of the real task."""
    at = {"variant": "soft", "location": "hook_resid_post", "layer": 1, "distance": 3, "horizon": 2}
    row = cell(wide.table, reader="probe", solver="softmax", **at)
    X = activations(loud_run, grid, "soft", ("hook_resid_post", 1), 3)
    counts = np.bincount(grid.labels("probe", 1), minlength=8) + 0.5
    y = {
        split: control_labels(loud_run.corpus, e.start - 3, counts / counts.sum(), 0)
        for split, e in grid.examples.items()
    }
    found = logistic(X["probe"], y["probe"], row.l2)(X["test"]).argmax(axis=1)
    accuracy = accuracy_score(y["test"], np.unique(y["probe"])[found])
    assert row.control_accuracy == pytest.approx(accuracy, abs=1.5 / row.examples)
    assert row.selectivity == pytest.approx(row.accuracy - row.control_accuracy)


def test_the_token_embedding_by_hand(wide: ProbeResults, loud_run: Run, grid: Grid):
    embedding = loud_run.plain_model().get_input_embeddings().weight.detach().double().numpy()
    tokens = {split: loud_run.corpus.tokens[e.start - 3] for split, e in grid.examples.items()}
    row = cell(wide.table, reader="token embedding", distance=3, horizon=2)
    losses = {}
    for l2 in WIDE["probe.l2"]:
        predict = logistic(embedding[tokens["probe"]], grid.labels("probe", 2), l2)
        losses[l2] = [
            log_loss(grid.labels(split, 2), predict(embedding[tokens[split]]), labels=range(8))
            for split in ("validation", "test")
        ]
    best = min(losses, key=lambda l2: losses[l2][0])
    assert (row.solver, row.location, row.layer, row.l2) == ("softmax", "hook_embed", 0, best)
    assert row.cross_entropy == pytest.approx(losses[best][1], rel=1e-3)
    rows = cells(wide.table, reader="token embedding")
    assert rows[["variant", "control_accuracy", "code_length", "gain"]].isna().all(axis=None)


# Conditioning


def test_injected_marks_where_the_targets_action_was_added(wide: ProbeResults, loud_run: Run, grid: Grid):
    """Position t carries the action of the sentence that holds token t + 1, in the top layer alone."""
    first_token, test = loud_run.corpus.first_token, grid.examples["test"]
    for row in wide.table[wide.table.accuracy.notna()].itertuples():
        conditioned = row.reader == "probe" and row.variant == "soft"  # fixed adds the same for every action
        # conditioning.skip_layers leaves the top layer alone.
        conditioned = conditioned and row.layer == 2 and row.location != "attn.hook_z:before"
        carried = [
            first_token[sentence + row.horizon - 1] <= anchor - row.distance + 1
            for anchor, sentence in zip(test.start, test.sentence, strict=True)
        ]
        assert row.injected == (conditioned and any(carried))
    assert wide.table.injected.sum() == 2 * 2  # locations, solvers; at distance and horizon 1


def test_every_token_as_anchor_depends_on_its_own_sentence(loud_run: Run, tmp_path: Path):
    """Most tokens lie within their sentence, whose action was added long before."""
    settings = PLAIN | {
        "probe.variants": ["soft", "none"],
        "probe.anchors": "token",
        "probe.solvers": ["ridge"],
    }
    settings |= {"probe.positions": [1, 4], "probe.horizons": [1, 2], "probe.max_examples": 600}
    table = table_of(loud_run, tmp_path, settings)
    probes = cells(table, reader="probe", layer=2)
    assert cells(probes, variant="soft", horizon=1).injected.all()
    # The next sentence's action is added from the last token of this one on: nearer than any distance.
    assert not cells(probes, variant="soft", horizon=2).injected.any()
    assert not probes[(probes.variant == "none")].injected.any()
    assert not table[table.layer < 2].injected.any()
    corpus = loud_run.corpus
    tested = corpus.documents("test")
    assert (
        table.examples > 0.5 * (corpus.document_tokens[tested + 1] - corpus.document_tokens[tested]).sum()
    ).all()


def test_unreached_places_read_the_same_in_every_variant(wide: ProbeResults):
    at = ["solver", "location", "layer", "distance", "horizon"]
    probes = wide.table[wide.table.reader == "probe"].set_index(at)
    none, soft = (
        probes[probes.variant == variant].drop(columns=["variant", "injected", *_gains()])
        for variant in ("none", "soft")
    )
    layer, location = (none.index.get_level_values(name) for name in ("layer", "location"))
    unreached = (layer < 2) | (location == "attn.hook_z:before")
    pd.testing.assert_frame_equal(none[unreached], soft[unreached])
    filled = none.accuracy.notna() & ~unreached
    assert filled.sum() == 2 * 2 * 2 * 2
    assert (none.cross_entropy[filled] != soft.cross_entropy[filled]).all()


def _gains() -> list[str]:
    return ["gain", "gain_low", "gain_high", "gain_over"]


def test_no_probe_beats_the_ceiling(wide: ProbeResults):
    check_ceilings(wide.table)


# Choice and refusal


def test_best_cells_are_chosen_on_validation():
    rows = [
        # variant, location, layer, seed, validation loss, test accuracy, injected
        ("none", "a", 0, 0, 1.5, 0.9, False),
        ("none", "a", 1, 0, 1.2, 0.3, False),  # best on validation, worst on test
        ("none", "a", 0, 1, 1.1, 0.9, False),  # best in one seed, not on average
        ("none", "a", 1, 1, 1.3, 0.3, False),
        ("none", "b", 0, 0, 2.0, 0.5, False),
        ("none", "b", 1, 0, np.nan, np.nan, False),
        ("soft", "a", 0, 0, 0.1, 0.99, True),
        ("soft", "a", 1, 0, 1.9, 0.2, False),
        ("soft", "b", 0, 0, np.nan, np.nan, False),
    ]
    columns = ["variant", "location", "layer", "seed", "validation_cross_entropy", "accuracy", "injected"]
    table = pd.DataFrame(rows, columns=columns).assign(
        reader="probe", solver="softmax", horizon=1, position="1"
    )
    other = table[table.variant == "none"].assign(solver="ridge")
    other["validation_cross_entropy"] *= -1
    prior = pd.DataFrame([{"reader": "prior", "injected": False, "validation_cross_entropy": 0.0}])
    best = ProbeResults(pd.concat([table, other, prior]), Path()).best_cells()
    found = best[["solver", "variant", "location", "layer", "seed"]].to_numpy().tolist()
    assert sorted(found) == [
        ["ridge", "none", "a", 0, 0],
        ["ridge", "none", "a", 0, 1],
        ["ridge", "none", "b", 0, 0],
        ["softmax", "none", "a", 1, 0],
        ["softmax", "none", "a", 1, 1],
        ["softmax", "none", "b", 0, 0],
        ["softmax", "soft", "a", 1, 0],
    ]


def test_layers_of_the_settings_and_locations_without_one(loud_run: Run, tmp_path: Path):
    settings = PLAIN | {"probe.layers": [2, 0], "probe.positions": [2], "probe.solvers": ["ridge"]}
    settings |= {"probe.locations": ["ln_final.hook_out", "hook_resid_post", "hook_embed"]}
    run = copied(loud_run, tmp_path)
    table = probe(run.folder, settings, quiet=True).table
    places = cells(table, reader="probe")[["location", "layer"]].to_numpy().tolist()
    assert places == [
        ["hook_embed", 0],
        ["hook_resid_post", 0],
        ["hook_resid_post", 2],
        ["ln_final.hook_out", 2],
    ]
    again = probe(run.folder, settings | {"probe.layers": [1]}, quiet=True)
    same(pd.read_parquet(again.folder / "results.parquet"), again.table)
    assert set(cells(again.table, location="hook_resid_post").layer) == {1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"probe.variants": ["none", "gumbel"]},
            r"probe\.variants has 'gumbel'.*not trained.*none, random, fixed, oracle",
        ),
        ({"probe.layers": [0, 3]}, r"probe\.layers has 3, but the LM's layers are 0 to 2"),
        ({"probe.locations": ["hook_nothing"]}, r"probe\.locations is 'hook_nothing'.*hook_resid_post"),
        (
            {"probe.locations": ["attn.hook_pattern"]},
            r"probe\.locations is 'attn\.hook_pattern'.*hook_resid_post",
        ),
        (
            {"probe.locations": ["hook_nothing:before"]},
            r"probe\.locations is 'hook_nothing'.*hook_resid_post",
        ),
        ({"probe.positions": [500, 600]}, r"no position and horizon has 20 examples.*probe\.positions"),
        ({"probe.max_examples": 12}, r"probe\.max_examples is 12"),
        (
            {"probe.max_examples": 60, "probe.positions": [1, 54], "probe.seeds": [0, 2]},
            r"probe\.max_examples is 60, so few .* empty for some of probe\.seeds",
        ),
        ({"probe.target": "plan"}, r"probe\.target is 'plan'; it must be one of action, token"),
        ({"probe.window": 64}, r"probe\.window is 64, but the LM reads at most 48"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    tiny_run: Run, settings: dict, message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grid_module, "LEAST_DOCUMENTS", 1)
    with pytest.raises(ProbekitError, match=message):
        probe(tiny_run, settings, quiet=True)
    assert not (tiny_run.folder / "probes").exists()


def test_a_corpus_without_documents_for_probes_is_refused(tiny_run: Run, tmp_path: Path):
    run = rewritten(tiny_run, tmp_path, "split.npy", lambda split: np.where(split == 1, 0, split))
    with pytest.raises(ProbekitError, match=r"corpus\.probe_fraction above 0"):
        probe(run, quiet=True)
