"""Transfer on planted directions that values share or do not, against fits by hand, and on a run."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import ndtr
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

import probekit
from probekit.data.corpus import export_sentences
from probekit.errors import ProbekitError
from probekit.probing.grid import FITTED_ON, TESTED_ON, make_grid
from probekit.probing.labels import target_of
from probekit.probing.probe import ProbeResults, probe
from probekit.probing.transfer import ALL, find_values
from probekit.reports.plot_probes import panels
from probekit.reports.plot_transfer import draw_transfer, save_transfer_figures
from probekit.reports.report import report
from probekit.reports.tables import transfer_notes, transfer_tables
from probekit.run.run import Run

TOPICS = np.array(["arts", "sport", "verse"])
SHIFT = 1.5
"""How far the means of the two classes are from their middle, in deviations, along the topic's direction."""

CEILING, CEILING_AUROC = ndtr(SHIFT), ndtr(2 * SHIFT / np.sqrt(2))
"""The accuracy and AUROC of the optimal classifier of two such classes."""


def planted(kind: str = "classes", seed: int = 0, count: int = 1800) -> dict[str, np.ndarray]:
    """Two topics share a direction, a third has another; layer 1 holds it and layer 0 nothing."""
    generator = np.random.default_rng(seed)
    topic = generator.integers(3, size=count)
    label = generator.integers(2, size=count)
    number = 2 * label - 1.0 if kind == "classes" else generator.normal(size=count)
    X = generator.normal(size=(2, count, 10))
    X[1, np.arange(count), np.where(topic == 2, 4, 1)] += SHIFT * number
    X[..., 7] += topic  # where a topic lies, which is the same for both classes
    return {
        "activations": X.astype(np.float32),
        "labels": label if kind == "classes" else 50 + 7 * number,
        "transfer": TOPICS[topic],
        "groups": generator.permutation(count) // 3,
        "split": None,
    }


@pytest.fixture(scope="module")
def found() -> pd.DataFrame:
    data = planted()
    del data["split"]
    return probekit.fit_grid(**data, l2=[0.01], control=False, resamples=300).transfer


def at(table: pd.DataFrame, fitted_on: str, tested_on: str, layer: int = 1) -> pd.Series:
    chosen = table[(table.fitted_on == fitted_on) & (table.tested_on == tested_on) & (table.layer == layer)]
    ((_, row),) = chosen.iterrows()
    return row


def test_a_shared_direction_transfers_and_another_does_not(found: pd.DataFrame):
    assert len(found) == 2 * 4 * 3
    assert found.by.unique().tolist() == ["transfer"]
    for fitted_on in TOPICS:
        for tested_on in TOPICS:
            row, nothing = at(found, fitted_on, tested_on), at(found, fitted_on, tested_on, layer=0)
            assert nothing.auroc_low < 0.5 < nothing.auroc_high
            shared = (fitted_on == "verse") == (tested_on == "verse")
            if shared:
                assert row.auroc == pytest.approx(CEILING_AUROC, abs=0.03)
                assert row.accuracy == pytest.approx(CEILING, abs=0.06)
                assert row.auroc_low <= CEILING_AUROC
                assert row.accuracy_low <= CEILING
            else:
                assert row.auroc_low < 0.5 < row.auroc_high
                assert row.over_own_high < -0.2
            if fitted_on == tested_on:
                assert np.isnan(row.over_own)
            elif shared:
                assert row.over_own_low <= 0.02
                assert row.over_own_high >= -0.02
    # Of two directions at once, the probe of all reads each a little worse than its own probe does.
    for tested_on in TOPICS:
        row = at(found, ALL, tested_on)
        assert row.auroc_low < CEILING_AUROC
        assert row.auroc > 0.85


def test_every_cell_is_that_of_a_fit_by_hand():
    """Softmax on the fitting examples of one topic, tested on those of another, as scikit-learn fits it."""
    data = planted(count=900)
    data["split"] = np.array(["train", "train", "train", "validation", "test"])[data["groups"] % 5]
    table = probekit.fit_grid(**data, l2=[0.02], control=False, resamples=100).transfer
    X, y = data["activations"][1], data["labels"]
    for fitted_on in (*TOPICS, ALL):
        own = (data["split"] == "train") & ((data["transfer"] == fitted_on) | (fitted_on == ALL))
        scaler = StandardScaler().fit(X[own])
        probe = LogisticRegression(C=2 / (0.02 * own.sum()), tol=1e-8).fit(scaler.transform(X[own]), y[own])
        for tested_on in TOPICS:
            there = (data["split"] == "test") & (data["transfer"] == tested_on)
            row, odds = at(table, fitted_on, tested_on), probe.decision_function(scaler.transform(X[there]))
            assert (row.examples, row.fitted_examples) == (there.sum(), own.sum())
            assert row.groups == len(np.unique(data["groups"][there]))
            assert row.auroc == pytest.approx(roc_auc_score(y[there], odds), abs=2e-3)
            assert row.accuracy == pytest.approx(((odds > 0) == y[there]).mean(), abs=0.02)
            loss = np.logaddexp(0, np.where(y[there] == 1, -odds, odds)).mean()
            assert row.cross_entropy == pytest.approx(loss, abs=5e-3)
            of_own = (data["split"] == "train") & (data["transfer"] == tested_on)
            shares = (np.bincount(y[of_own]) + 0.5) / (of_own.sum() + 1)
            assert row.bits == pytest.approx((-np.log(shares)[y[there]].mean() - loss) / np.log(2), abs=1e-2)
            if fitted_on != tested_on:
                gap = row.accuracy - at(table, tested_on, tested_on).accuracy
                assert row.over_own == pytest.approx(gap)
                assert row.over_own_low <= row.over_own <= row.over_own_high


def test_numbers_transfer_by_r2():
    data = planted("numbers", count=900)
    data["split"] = np.array(["train", "train", "train", "validation", "test"])[data["groups"] % 5]
    table = probekit.fit_grid(**data, l2=[0.01], resamples=100).transfer
    X, y = data["activations"][1], data["labels"]
    shared, other = at(table, "arts", "sport"), at(table, "arts", "verse")
    assert shared.r2 == pytest.approx(SHIFT**2 / (1 + SHIFT**2), abs=0.1)
    assert shared.over_own_low < 0.02
    assert other.r2 < 0.1
    assert other.over_own == pytest.approx(other.r2 - at(table, "verse", "verse").r2)
    assert other.over_own_high < -0.4
    train, test = data["split"] == "train", data["split"] == "test"
    own, there = train & (data["transfer"] == "arts"), test & (data["transfer"] == "sport")
    scaler = StandardScaler().fit(X[own])
    ridge = Ridge(alpha=0.01 * own.sum()).fit(scaler.transform(X[own]), y[own])
    level = y[train & (data["transfer"] == "sport")].mean()
    predicted = ridge.predict(scaler.transform(X[there]))
    expected = 1 - ((predicted - y[there]) ** 2).sum() / ((y[there] - level) ** 2).sum()
    assert shared.r2 == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("solver", ["lda", "ridge", "mean-difference", "l1", "mlp"])
def test_every_solver_transfers(solver: str):
    data = planted()
    del data["split"]
    table = probekit.fit_grid(**data, solvers=solver, control=False, resamples=100).transfer
    assert at(table, "arts", "sport").auroc > 0.95
    assert at(table, "arts", "verse").auroc_low < 0.55


def test_values_with_few_examples_or_one_label_are_left_out():
    data = planted(count=900)
    data["transfer"][:7] = "rare"
    data["transfer"] = np.where(
        (data["transfer"] == "sport") & (data["labels"] == 0), "one label", data["transfer"]
    )
    data["labels"] = np.where(data["transfer"] == "one label", 1, data["labels"])
    del data["split"]
    results = probekit.fit_grid(**data, control=False, resamples=100, l2=[0.1])
    assert "rare" not in set(results.transfer.tested_on)
    assert "one label" not in set(results.transfer.tested_on)
    assert any("rare" in note and "one label" in note for note in results.notes)
    data["transfer"] = np.where(data["transfer"] == "arts", "arts", "rare and others")
    data["split"] = np.where(data["transfer"] == "arts", "train", "test").astype(object)
    data["split"][::9] = "validation"
    data["groups"] = np.arange(900)
    with pytest.raises(
        ProbekitError, match=r"^transfer over 'transfer' needs two values with 20 examples, .* 0 of 2"
    ):
        probekit.fit_grid(**data)


# On a run


@pytest.fixture(scope="module")
def run(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the tiny run, with a table of sentences that are short or long, by topic."""
    folder = tmp_path_factory.mktemp("transfer")
    copied = Run.open(shutil.copytree(tiny_run.folder, folder / "run"))
    corpus = copied.corpus
    export_sentences(corpus, folder / "labels.csv")
    table = pd.read_csv(folder / "labels.csv")
    lengths = table.text.str.len()
    table["length"] = np.where(lengths > lengths.median(), "long", "short")
    table["topic"] = np.array(["$a_1$", "<b>", None])[table.document % 3]
    table.to_csv(folder / "labels.csv", index=False)
    settings = {
        "probe.labels": str(folder / "labels.csv"),
        "probe.target": "length",
        "probe.transfer": "topic",
    }
    settings |= {
        "probe.positions": [1, "mean"],
        "probe.variants": ["none", "random"],
        "probe.solvers": ["lda"],
    }
    return copied.with_settings(settings | {"evaluation.resamples": 100, "probe.layers": [0, 2]})


@pytest.fixture(scope="module")
def probed(run: Run) -> ProbeResults:
    return probe(run, quiet=True)


@pytest.mark.parametrize("anchors", ["start", "token"])
def test_examples_have_the_value_of_their_row(run: Run, anchors: str):
    run = run.with_settings({"probe.anchors": anchors, "probe.positions": ["last"]})
    grid = make_grid(run.corpus, run.config.probe, target_of(run.corpus, run.config), 0)
    values = find_values(run.corpus, grid, run.config)
    assert values.names == ("$a_1$", "<b>")
    for split, examples in grid.examples.items():
        assert values.of[split].tolist() == [[0, 1, -1][number % 3] for number in examples.document]


def test_a_run_has_a_table_beside_that_of_its_probes(run: Run, probed: ProbeResults):
    table = run.transfer()
    pd.testing.assert_frame_equal(table, probed.transfer)
    assert len(table) == 3 * 2 * 2 * 2 * 2  # fitted, tested, variants, layers, positions
    grid = make_grid(run.corpus, run.config.probe, target_of(run.corpus, run.config), run.config.seed)
    for split, column in ((FITTED_ON, "fitted_on"), (TESTED_ON, "tested_on")):
        count = "fitted_examples" if split == FITTED_ON else "examples"
        for number, value in enumerate(("$a_1$", "<b>")):
            expected = (grid.examples[split].document % 3 == number).sum()
            assert set(table[count][table[column] == value]) == {expected}
    # The main table is as it is without transfer, but for how moments are summed.
    copied = Run.open(shutil.copytree(run.folder, run.folder.parent / "alone"))
    settings = run.config.probe.model_dump() | {"transfer": None}
    of_probes = {f"probe.{name}": value for name, value in settings.items()} | {"evaluation.resamples": 100}
    alone = probe(copied.with_settings(of_probes), quiet=True)
    assert alone.transfer is None
    same = ["reader", "layer", "position", "accuracy", "bits", "auroc"]
    pd.testing.assert_frame_equal(probed.table[same], alone.table[same], rtol=1e-3, atol=1e-4)


def test_the_matrix_is_shown(run: Run, probed: ProbeResults, tmp_path: Path):
    best = probed.best_cells()
    shown = transfer_tables(probed.transfer, best)
    assert len(shown) == 2 * 2
    table = shown[0].cells.set_index("fitted on")
    assert table.index.tolist() == ["$a_1$", "<b>", ALL]
    assert table.columns.tolist() == ["$a_1$", "<b>"]
    cell = best[best.variant == "none"].iloc[0]
    row = probed.transfer[
        (probed.transfer.variant == "none")
        & (probed.transfer.layer == cell.layer)
        & (probed.transfer.position == cell.position)
        & (probed.transfer.fitted_on == "<b>")
        & (probed.transfer.tested_on == "$a_1$")
    ].iloc[0]
    assert table.loc["<b>", "$a_1$"].startswith(f"{row.auroc:.3f} [")
    assert len([*transfer_notes(probed.transfer, best)]) == 2
    figure = draw_transfer(probed.transfer, panels(probed.transfer.assign(reader="probe"))[0], best)
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert len(numbers) == 6
    assert f"{row.auroc:.2f}" in numbers
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["$a_1$", "<b>", ALL]
    assert all(path.is_file() for path in save_transfer_figures(probed.transfer, best, tmp_path))
    (page, _) = report(run)
    text = page.read_text("utf-8")
    assert "<h2" in text
    assert "Transfer" in text
    assert "&lt;b&gt;" in text
    assert "<b>" not in text


def test_a_column_that_is_not_there_is_refused(run: Run):
    with pytest.raises(ProbekitError, match="has no column 'genre'"):
        probe(run.with_settings({"probe.transfer": "genre"}), quiet=True)
