"""Results against sums over every example, numbers worked out by hand, and what was scored before."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probekit.errors import ProbekitError
from probekit.probing import results
from probekit.probing.activations import ActivationReader
from probekit.probing.grid import TESTED_ON, make_grid
from probekit.probing.probe import probe
from probekit.probing.results import (
    COLUMNS,
    METRICS,
    SCORES,
    Cell,
    DocumentSums,
    Facts,
    SavedProbes,
    ScoredExamples,
    row_slices,
    table_of,
)
from probekit.probing.targets import Target, find_target
from probekit.run.run import Run
from probekit.statistics import Resampling, bootstrap_ratio, simultaneous_ratios

COUNTS = np.array([9, 4, 12, 7, 8, 3, 10, 6, 5, 11])
RESAMPLING = Resampling(resamples=300, seed=4)
DISTANCES, HORIZONS = (1, 2), (1, 3)
EXAMPLES = np.repeat(np.arange(len(COUNTS)), COUNTS)
FREE = {"prior": 2.0, "bigram": 1.6, "skip n-gram": 1.8}
"""Model-free baselines and what each loses on the test, in nats."""


def made_up(group: np.ndarray, *labels: np.ndarray, classes: int = 7) -> ScoredExamples:
    """Test examples with labels at the horizons 1 and 3."""
    target = Target("made up", classes, lambda start, sentence, horizon: start)
    return ScoredExamples(target, group, dict(zip(HORIZONS, labels, strict=False)))


def sums_of(readers: list[Facts], loss: float, generator: Any, *, control: bool = False) -> DocumentSums:
    shape = len(COUNTS), len(readers)
    made = DocumentSums(readers)
    made.sums["correct"] = generator.binomial(COUNTS[:, None], 0.4, size=shape).astype(float)
    made.sums["top5"] = np.minimum(COUNTS[:, None], made.sums["correct"] + 2)
    made.sums["cross_entropy"] = COUNTS[:, None] * (loss + 0.2 * generator.normal(size=shape))
    if control:
        made.sums["control_correct"] = generator.binomial(COUNTS[:, None], 0.2, size=shape).astype(float)
    return made


def make_scored(seed: int = 0, **validation: float) -> list[DocumentSums]:
    """Baselines, and probes at two layers in two variants; that of soft at layer 1 is injected."""
    generator = np.random.default_rng(seed)
    known = {"prior": 2.1, "bigram": 1.7, "skip n-gram": 1.9} | validation
    made = []
    for horizon, distance in itertools.product(HORIZONS, DISTANCES):
        cell = {"position": distance, "horizon": horizon}
        for reader, loss in FREE.items():
            loss_known = {"reader": reader, "validation_cross_entropy": known[reader]}
            made.append(sums_of([loss_known | cell], loss, generator))
        made.append(sums_of([{"reader": "planner"} | cell], 1.2, generator))
        made.append(sums_of([{"reader": "ceiling (tokens read)"} | cell], 1.0, generator))
    for variant in ("soft", "none"):
        for horizon in reversed(HORIZONS):
            readers = [
                {"reader": "probe", "solver": "softmax", "variant": variant, "seed": 7}
                | {"location": "hook_resid_post", "layer": layer, "position": distance, "horizon": horizon}
                | {"injected": variant == "soft" and layer == 1 and distance == 1, "constant": False}
                | {"l2": 0.1, "iterations": 9, "converged": True, "validation_cross_entropy": 1.5}
                | {"fitted_on": 400, "code_length": 1.5, "compression": 2.0}
                for layer in (1, 0)
                for distance in DISTANCES
            ]
            made.append(sums_of(readers, 1.5, generator, control=True))
    return made


TESTED = made_up(EXAMPLES, *(np.arange(len(EXAMPLES)) % n for n in (7, 3)))
EMPTY: list[Facts] = [
    {"reader": "probe", "solver": "softmax", "variant": "none", "seed": 7, "location": "hook_resid_post"}
    | {"layer": layer, "position": 9, "horizon": 1, "examples": 3}
    for layer in (0, 1)
]


@pytest.fixture(scope="module")
def scored() -> list[DocumentSums]:
    return make_scored()


@pytest.fixture(scope="module")
def table(scored: list[DocumentSums]) -> pd.DataFrame:
    return table_of(scored, TESTED, EMPTY, RESAMPLING)


def sums_by_row(scored: list[DocumentSums]) -> dict[tuple[Any, ...], tuple[Facts, dict[str, np.ndarray]]]:
    """Head and sums of every row, by what names it."""
    found = {}
    for one in scored:
        for number, head in enumerate(one.readers):
            key = head["reader"], head.get("variant"), head.get("layer"), head["position"], head["horizon"]
            found[key] = head, {name: sums[:, number] for name, sums in one.sums.items()}
    return found


def row_of(table: pd.DataFrame, key: tuple[Any, ...]) -> pd.Series:
    reader, variant, layer, distance, horizon = key
    rows = table[(table.reader == reader) & (table.distance == distance) & (table.horizon == horizon)]
    if variant is not None:
        rows = rows[(rows.variant == variant) & (rows.layer == layer)]
    ((_, row),) = rows.iterrows()
    return row


def test_every_metric_and_its_interval(table: pd.DataFrame, scored: list[DocumentSums]):
    rows = sums_by_row(scored)
    for key, (_, sums) in rows.items():
        row = row_of(table, key)
        prior = rows["prior", None, None, *key[3:]][1]
        measured = {METRICS[score]: sums[score] for score in METRICS}
        measured["bits"] = (prior["cross_entropy"] - sums["cross_entropy"]) / np.log(2)
        if "control_correct" in sums:
            measured["selectivity"] = sums["correct"] - sums["control_correct"]
            assert row.control_accuracy == pytest.approx(sums["control_correct"].sum() / COUNTS.sum())
        else:
            assert np.isnan([row.selectivity, row.selectivity_low, row.control_accuracy]).all()
        if key[0] == "probe":
            ceiling = rows["ceiling (tokens read)", None, None, *key[3:]][1]
            gap = sums["cross_entropy"] - ceiling["cross_entropy"]
            measured["shortfall"] = gap / np.log(2)
            planner = rows["planner", None, None, *key[3:]][1]
            measured["over_planner"] = (planner["cross_entropy"] - sums["cross_entropy"]) / np.log(2)
        else:
            assert np.isnan([row.shortfall, row.shortfall_low, row.over_planner, row.over_planner_high]).all()
        for name, values in measured.items():
            expected = bootstrap_ratio(values, COUNTS, **RESAMPLING)
            assert row[name] == pytest.approx(values.sum() / COUNTS.sum(), abs=1e-12)
            assert row[f"{name}_low"] == pytest.approx(expected.low, abs=1e-12)
            assert row[f"{name}_high"] == pytest.approx(expected.high, abs=1e-12)
        assert (row.examples, row.documents) == (COUNTS.sum(), len(COUNTS))


def test_gain_is_over_the_strongest_baseline_that_needs_no_model(
    table: pd.DataFrame, scored: list[DocumentSums]
):
    """The planner is stronger than the bigram, and needs a model."""
    rows = sums_by_row(scored)
    probes = [key for key, (head, _) in rows.items() if key[0] == "probe" and not head["injected"]]
    bigrams = [rows["bigram", None, None, *key[3:]][1]["cross_entropy"] for key in probes]
    own = [rows[key][1]["cross_entropy"] for key in probes]
    gains = (np.stack(bigrams, axis=1) - np.stack(own, axis=1)) / np.log(2)
    together = simultaneous_ratios(gains, COUNTS, **RESAMPLING)
    for number, key in enumerate(probes):
        row = row_of(table, key)
        assert row.gain_over == "bigram"
        assert row.gain == pytest.approx(gains[:, number].sum() / COUNTS.sum())
        assert row.gain == pytest.approx(row.bits - row_of(table, ("bigram", None, None, *key[3:])).bits)
        assert row.gain_low == pytest.approx(together.low[number])
        assert row.gain_high == pytest.approx(together.high[number])


def test_the_strongest_baseline_is_chosen_on_validation():
    """Not on the test, where the bigram remains the strongest."""
    table = table_of(make_scored(**{"skip n-gram": 1.0}), TESTED, [], RESAMPLING)
    probes = table[(table.reader == "probe") & ~table.injected]
    assert (probes.gain_over == "skip n-gram").all()
    for row in probes.itertuples():
        bits = row_of(table, ("skip n-gram", None, None, row.distance, row.horizon)).bits
        assert row.gain == pytest.approx(row.bits - bits)


def test_only_probes_without_injection_have_a_gain(table: pd.DataFrame):
    without = table[table.gain.isna()]
    assert without.gain_over.isna().all()
    assert without[["gain_low", "gain_high"]].isna().all(axis=None)
    assert set(without.reader) == {*FREE, "planner", "ceiling (tokens read)", "probe"}
    probes = without[without.reader == "probe"]
    assert (probes.injected | (probes.distance == 9)).all()
    assert probes.injected.sum() == 2


def test_a_cell_that_is_injected_changes_no_other_cells_gain(table: pd.DataFrame):
    scored = make_scored()
    for one in scored:
        for number, head in enumerate(one.readers):
            if head.get("injected"):
                one.sums["cross_entropy"][:, number] = np.random.default_rng(8).exponential(9, len(COUNTS))
    again = table_of(scored, TESTED, EMPTY, RESAMPLING)
    columns = ["gain", "gain_low", "gain_high", "gain_over"]
    pd.testing.assert_frame_equal(again[columns], table[columns])


def test_without_a_ceiling_nothing_falls_short(table: pd.DataFrame):
    scored = [one for one in make_scored() if one.readers[0]["reader"] != "ceiling (tokens read)"]
    without = table_of(scored, TESTED, EMPTY, RESAMPLING)
    known = [name for name in COLUMNS if not name.startswith("shortfall")]
    assert without.drop(columns=known).isna().all(axis=None)
    others = table[table.reader != "ceiling (tokens read)"].reset_index(drop=True)
    pd.testing.assert_frame_equal(without[known], others[known])


def test_empty_cells_have_counts_and_nothing_else(table: pd.DataFrame):
    empty = table[table.distance == 9]
    assert len(empty) == 2
    assert (empty.examples == 3).all()
    named = ["reader", "solver", "variant", "seed", "location", "layer", "position", "distance", "horizon"]
    assert empty[named].notna().all(axis=None)
    assert not empty.injected.any()
    assert empty.drop(columns=[*named, "injected", "examples"]).isna().all(axis=None)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_the_readers_makes_no_difference(table: pd.DataFrame, seed: int):
    scored = make_scored()
    order = np.random.default_rng(seed).permutation(len(scored))
    again = table_of([scored[number] for number in order], TESTED, EMPTY[::-1], RESAMPLING)
    pd.testing.assert_frame_equal(again, table)


# Sums by document


def random_case(readers: int, lengths: list[int], classes: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Documents of examples, log-probabilities and labels."""
    generator = np.random.default_rng(seed)
    document = np.repeat(np.arange(len(lengths)), lengths)
    logits = torch.from_numpy(generator.normal(size=(readers, len(document), classes)))
    return document, logits.log_softmax(-1).numpy(), generator.integers(classes, size=len(document))


def slow_sums(document: np.ndarray, log_p: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    sums = {score: np.zeros((document.max() + 1, len(log_p))) for score in SCORES}
    for reader, rows in enumerate(log_p):
        own = np.broadcast_to(labels, log_p.shape[:2])[reader]
        for row, (number, label) in enumerate(zip(document, own, strict=True)):
            rank = list(np.argsort(-rows[row])).index(label)
            sums["correct"][number, reader] += rank == 0
            sums["top5"][number, reader] += rank < 5
            sums["cross_entropy"][number, reader] -= rows[row, label]
    return sums


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    readers=st.integers(1, 3),
    cuts=st.lists(st.integers(0, 24), max_size=4),
    seed=st.integers(0, 99),
)
def test_parts_add_up_to_the_sums_of_each_document(
    lengths: list[int], readers: int, cuts: list[int], seed: int
):
    """However examples are cut into parts, within documents too."""
    document, log_p, labels = random_case(readers, lengths, 7, seed)
    found = DocumentSums([{"horizon": 1}] * readers, made_up(document, labels))
    edges = sorted({0, len(document), *(cut for cut in cuts if cut < len(document))})
    for start, stop in itertools.pairwise(edges):
        found.add(slice(start, stop), log_p[:, start:stop], labels[start:stop])
    slow = slow_sums(document, log_p, labels)
    for score, sums in slow.items():
        np.testing.assert_allclose(found.sums[score], sums, rtol=1e-12, atol=1e-12)
    pairs, counts, _ = made_up(document, labels).pairs(1)
    for (number, label), count, correct in zip(pairs, counts, found.sums["class_correct"], strict=True):
        own = (document == number) & (labels == label)
        assert own.sum() == count
        assert correct.tolist() == (log_p[:, own].argmax(2) == label).sum(1).tolist()


def test_groups_need_not_be_together():
    generator = np.random.default_rng(4)
    _, log_p, labels = random_case(2, [40], 2)
    group = generator.integers(5, size=40)
    found = DocumentSums([{"horizon": 1}] * 2, made_up(group, labels, classes=2))
    for part in (slice(0, 17), slice(17, 40)):
        found.add(part, log_p[:, part], labels[part])
    for score, sums in slow_sums(group, log_p, labels).items():
        np.testing.assert_allclose(found.sums[score], sums)
    np.testing.assert_allclose(found.sums["log_odds"].T, log_p[..., 1] - log_p[..., 0], rtol=1e-6)


def test_readers_may_have_labels_of_their_own_and_tensors():
    document, log_p, _ = random_case(3, [2, 5, 1], 6)
    labels = np.random.default_rng(1).integers(6, size=(3, 8))
    readers = [{"a": i, "horizon": 1} for i in range(3)]
    found = DocumentSums(readers, made_up(document, labels[0]))
    found.add(slice(0, 8), torch.from_numpy(log_p), torch.from_numpy(labels))
    for score, sums in slow_sums(document, log_p, labels).items():
        np.testing.assert_allclose(found.sums[score], sums)
    assert found.readers == readers


@pytest.mark.parametrize(("readers", "examples", "classes"), [(1, 1, 1), (3, 100, 7), (50, 9, 10)])
def test_slices_cover_all_examples_and_stay_small(
    readers: int, examples: int, classes: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(results, "ELEMENTS", 100)
    slices = row_slices(readers, examples, classes)
    assert np.concatenate([np.arange(examples)[part] for part in slices]).tolist() == list(range(examples))
    for part in slices[:-1]:
        size = part.stop - part.start
        assert size == 1 or size * readers * classes <= 100
        assert (size + 1) * readers * classes > 100


# Saved probes


@pytest.fixture(scope="module")
def probed(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("kept") / "run"))
    settings = {
        "probe.solvers": ["softmax", "ridge", "mlp"],
        "probe.locations": ["hook_resid_post", "attn.hook_z"],
        "probe.variants": ["none", "soft"],
        "probe.control": False,
        "probe.code_length": False,
    }
    probe(run, settings, quiet=True)
    return run.with_settings(settings)


@pytest.mark.parametrize("solver", ["softmax", "ridge"])
@pytest.mark.parametrize("variant", ["none", "soft"])
def test_kept_probes_have_the_accuracy_of_the_table(variant: str, solver: str, probed: Run):
    table = probed.probes()
    grid = make_grid(probed.corpus, probed.config.probe, find_target(probed.corpus, "action"), 0)
    saved = SavedProbes(probed.folder / "probes", variant, 0)
    points = [("hook_resid_post", 2), ("attn.hook_z", 1)]
    (blocks,) = [ActivationReader(probed, variant, points, grid.positions).read(grid.examples[TESTED_ON])]
    labels = torch.from_numpy(grid.labels(TESTED_ON, 1))
    for (location, layer), activations in zip(points, (part for b in blocks for part in b), strict=True):
        for distance, X in zip(grid.positions, activations, strict=True):
            found = saved[Cell(location, layer, distance, solver=solver)].log_probabilities(X)
            row = table[
                (table.reader == "probe") & (table.variant == variant) & (table.solver == solver)
                & (table.location == location) & (table.layer == layer) & (table.distance == distance)
            ]  # fmt: skip
            accuracy = (found.argmax(-1) == labels).float().mean().item()
            assert accuracy == pytest.approx(row.accuracy.item(), abs=1e-6)


def test_only_linear_probes_are_kept(probed: Run):
    saved = SavedProbes(probed.folder / "probes", "none", 0)
    assert {cell.solver for cell in saved.cells} == {"softmax", "ridge"}
    assert len(saved.cells) == 2 * 2 * 3 * len(probed.config.probe.positions)
    assert all(Cell.of(cell.key) == cell for cell in saved.cells)
    cells = [Cell("hook_resid_post", layer, 1) for layer in range(3)]
    X = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    together = saved.stacked(cells).log_probabilities(X)
    for one, cell, x in zip(together, cells, X, strict=True):
        np.testing.assert_allclose(one, saved[cell].log_probabilities(x), rtol=1e-5)


@pytest.mark.parametrize(
    ("variant", "seed", "cell", "said"),
    [
        ("joint", 0, None, r"no linear probes of 'joint' with seed 0 .*probekit probe"),
        ("none", 7, None, r"with seed 7"),
        ("none", 0, Cell("hook_resid_post", 9, 1), r"layer 9.*layers 0, 1, 2"),
        ("none", 0, Cell("hook_resid_mid", 1, 1), r"locations attn\.hook_z, hook_resid_post"),
    ],
)
def test_what_is_not_kept(variant: str, seed: int, cell: Cell | None, said: str, probed: Run):
    with pytest.raises(ProbekitError, match=said):
        SavedProbes(Path(probed.folder) / "probes", variant, seed)[cell or Cell("x", 0, 1)]
