"""Targets of two classes and of numbers: planted signals, shuffled labels, baselines, and what is refused."""

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import softmax
from scipy.stats import spearmanr
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score, roc_curve
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from probekit.config import Config, ProbeSettings
from probekit.data.corpus import Corpus
from probekit.errors import ProbekitError
from probekit.probing import baselines
from probekit.probing import probe as probing
from probekit.probing.activations import Stack
from probekit.probing.controls import control_labels, control_numbers
from probekit.probing.fitting import FitJob, ProbingTask, fit_sums, score
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON, Grid, make_grid
from probekit.probing.results import DocumentSums, main_metric, table_of
from probekit.probing.targets import Examples, Target, sentence_target
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import Resampling

RESAMPLING = Resampling(resamples=400, seed=1)
STACK = Stack(6, (("a", 0), ("a", 1)))
SIGNAL = 0.8
"""The share of a number's variance that the planted activations of layer 1 hold."""


@dataclass
class Source:
    """Activations `[hook points, distances, examples, width]` by split."""

    values: dict[str, Tensor]
    splits: dict[str, Examples]
    dtype: torch.dtype = torch.float32
    unit: str = "examples"

    @property
    def stacks(self) -> list[Stack]:
        return [STACK]

    def size(self, examples: Examples) -> int:
        return len(examples)

    def chunks(self, examples: Examples, done: Any = None) -> Iterator[tuple[slice, list[Tensor]]]:
        (split,) = (name for name, known in self.splits.items() if known is examples)
        for start in range(0, len(examples), 70):
            part = slice(start, min(start + 70, len(examples)))
            yield part, [self.values[split][:, :, part]]


def made_up(kind: str, *, shuffled: bool = False, groups: int = 60, seed: int = 0) -> tuple[Grid, Source]:
    """Labels by groups that lie apart from each other; layer 1 holds them linearly, layer 0 nothing."""
    generator = np.random.default_rng(seed)
    examples, values = {}, {}
    for number, split in enumerate((FITTED_ON, CHOSEN_ON, TESTED_ON)):
        count = groups * 8
        group = generator.integers(groups, size=count) + 1000 * number
        effect = generator.normal(size=4000)
        y = 1987 + 4 * (generator.normal(size=count) + 0.7 * effect[group])
        noise = generator.normal(size=count) * y.std() * np.sqrt(1 / SIGNAL - 1)
        X = torch.from_numpy(generator.normal(size=(2, 1, count, 6)))
        X[1, 0, :, 2] = torch.from_numpy(50 + y + noise)
        labels = (y > 1987).astype(np.int64) if kind == "classes" else y
        labels = generator.permutation(labels) if shuffled else labels
        row = np.arange(count)
        examples[split] = Examples(row, row, row + 1, row, group, labels[:, None])
        values[split] = X.float()
    target = Target("made up", 2 if kind == "classes" else 0, lambda start, sentence, horizon: start)
    grid = Grid(replace(target, kind=kind), (1,), (1,), examples, {}, ())
    return grid, Source(values, examples)


def fitted_table(grid: Grid, source: Source, *, control: ProbingTask | None = None, **settings: Any) -> tuple:
    given = {"l2": [1e-3], "solvers": ["ridge"]} | settings
    probe = Config().override({f"probe.{name}": value for name, value in given.items()}).probe
    quiet, cpu = Progress(quiet=True), torch.device("cpu")
    folder = Path(tempfile.gettempdir())
    job = FitJob(grid, probe, control, 3, cpu, quiet, "test", folder, {1: 9})
    found = fit_sums(source, job, probe.solvers)
    scored = score(source, job, found)
    tested = grid.tested()
    name = "mean" if grid.target.kind == "numbers" else "prior"
    labels = grid.labels(FITTED_ON, 1)
    loss = "squared_error" if name == "mean" else "cross_entropy"
    simple = DocumentSums([{"reader": name, "position": 1, "horizon": 1, f"validation_{loss}": 9.0}], tested)
    whole = slice(0, len(tested.group))
    shares = np.log(np.bincount(labels.astype(int)) / len(labels)) if name == "prior" else None
    guess = np.full(whole.stop, labels.mean()) if shares is None else np.tile(shares, (whole.stop, 1))
    simple.add(whole, guess[None], tested.labels[1])
    table = table_of([*scored, simple], tested, [], RESAMPLING)
    return found[0].probes, table[table.reader == "probe"].set_index("layer"), table


def test_a_planted_number_is_read_with_the_r2_that_it_must_have():
    grid, source = made_up("numbers", groups=200)
    _, rows, table = fitted_table(grid, source)
    assert rows.r2[1] == pytest.approx(SIGNAL, abs=0.03)
    assert rows.r2_low[1] < SIGNAL < rows.r2_high[1]
    assert abs(rows.r2[0]) < 0.01
    scaler = StandardScaler().fit(source.values[FITTED_ON][1, 0])
    ridge = Ridge(alpha=1e-3 * len(grid.examples[FITTED_ON]))
    ridge.fit(scaler.transform(source.values[FITTED_ON][1, 0]), grid.labels(FITTED_ON, 1))
    expected, truth = (
        ridge.predict(scaler.transform(source.values[TESTED_ON][1, 0])),
        grid.labels(TESTED_ON, 1),
    )
    error = ((expected - truth) ** 2).mean()
    level = ((truth - grid.labels(FITTED_ON, 1).mean()) ** 2).mean()
    assert rows.squared_error[1] == pytest.approx(error, rel=1e-4)
    assert rows.r2[1] == pytest.approx(1 - error / level, rel=1e-4)
    assert rows.rank_correlation[1] == pytest.approx(spearmanr(expected, truth)[0], abs=1e-4)
    assert rows.gain[1] == pytest.approx(rows.r2[1])
    assert rows.gain_over[1] == "mean"
    assert table.set_index("reader").r2["mean"] == 0
    assert main_metric(table) == "r2"
    assert rows[["accuracy", "bits", "cross_entropy"]].isna().all(axis=None)


def test_shuffled_numbers_have_no_r2():
    """Neither above nor far below zero, in any of many draws."""
    found = []
    for seed in range(12):
        _, rows, _ = fitted_table(*made_up("numbers", shuffled=True, seed=seed))
        found.append(rows)
    rows = pd.concat(found)
    assert rows.r2.abs().max() < 0.03
    assert (rows.r2_low > 0).sum() <= 3, "of 24, 0.6 are expected"
    assert (rows.gain_low > 0).sum() == 0


def test_numbers_of_the_control_task_are_read_on_their_own():
    grid, source = made_up("numbers", groups=200)
    numbers = {
        split: values[1, 0, :, 2].numpy().astype(float)[None] for split, values in source.values.items()
    }
    level = numbers[FITTED_ON].mean()
    control = ProbingTask(None, {split: values - level for split, values in numbers.items()})
    _, rows, _ = fitted_table(grid, source, control=control)
    assert rows.control_r2[1] == pytest.approx(1, abs=1e-3)
    assert rows.selectivity[1] == pytest.approx(rows.r2[1] - rows.control_r2[1])
    assert rows.selectivity_low[1] < rows.selectivity[1] < rows.selectivity_high[1] < 0


@pytest.mark.parametrize("solvers", [["ridge"], ["mean-difference"], ["lda"]])
def test_metrics_of_two_classes_are_those_of_scikit_learn(solvers: list[str]):
    grid, source = made_up("classes")
    probes, rows, table = fitted_table(grid, source, solvers=solvers)
    truth = grid.labels(TESTED_ON, 1)
    for layer in (0, 1):
        log_p = probes.log_probabilities(source.values[TESTED_ON][:, 0])[layer].double().numpy()
        odds = log_p[:, 1] - log_p[:, 0]
        false, true, _ = roc_curve(truth, odds)
        expected = {
            "auroc": roc_auc_score(truth, odds),
            "average_precision": average_precision_score(truth, odds),
            "recall": true[false <= 0.05].max(),
            "balanced_accuracy": balanced_accuracy_score(truth, odds > 0),
        }
        for name, value in expected.items():
            assert rows[name][layer] == pytest.approx(value, abs=2e-3), name
            assert rows[f"{name}_low"][layer] < value < rows[f"{name}_high"][layer], name
    assert rows.auroc_low[1] > 0.8
    assert rows.auroc_low[0] < 0.5 < rows.auroc_high[0]
    assert rows.calibration_error[0] < 0.08
    assert main_metric(table) == "auroc"


def test_shuffled_classes_have_an_auroc_of_a_half():
    covered = []
    for seed in range(12):
        _, rows, _ = fitted_table(*made_up("classes", shuffled=True, seed=seed), solvers=["mean-difference"])
        covered += ((rows.auroc_low <= 0.5) & (rows.auroc_high >= 0.5)).tolist()
    assert sum(covered) >= 20, "of 24, 22.8 are expected"


def test_one_class_in_the_test_split_tells_nothing():
    grid, source = made_up("classes")
    test = grid.examples[TESTED_ON]
    single = replace(test, labels=np.ones_like(test.labels))
    grid = replace(grid, examples=dict(grid.examples) | {TESTED_ON: single})
    _, rows, _ = fitted_table(grid, replace(source, splits=grid.examples))
    assert rows.accuracy.notna().all()
    bounds = rows.columns[rows.columns.str.endswith(("_low", "_high"))]
    assert rows[bounds].isna().all(axis=None)
    assert rows[["auroc", "gain", "gain_over"]].isna().all(axis=None)


# On a run


def word_counts(corpus: Corpus) -> np.ndarray:
    """How many words each sentence has, less for some that has no number."""
    texts = corpus.sentence_texts(np.arange(len(corpus.first_token)))
    counts = np.array([len(text.split()) for text in texts], float)
    counts[::29] = np.nan
    return counts


@pytest.fixture(scope="module")
def numbers(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, pd.DataFrame, Target]:
    """A copy of the tiny run whose sentences' lengths are probed, as a column of a file of labels."""
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("numbers") / "run"))
    target = sentence_target(run.corpus, "words", 0, word_counts(run.corpus))
    settings = {
        "probe.variants": ["none"],
        "probe.solvers": ["ridge"],
        "probe.positions": [1, 3],
        "probe.horizons": [1, 2],
        "probe.labels": "made-up.csv",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "target_of", lambda corpus, config: target)
        patch.setattr(probing, "origin", lambda run: {})
        table = probing.probe(run.with_settings(settings), quiet=True).table
    return run.with_settings(settings), table, target


def test_numbers_of_sentences_are_probed_beside_their_baselines(
    numbers: tuple[Run, pd.DataFrame, Target],
):
    _, table, _ = numbers
    assert set(table.reader) == {"probe", "mean", "previous number", "bag of words", "token embedding"}
    assert table.r2.notna().all()
    assert table.squared_error_high.notna().all()
    assert (table.r2[table.reader == "mean"] == 0).all()
    probes = table[table.reader == "probe"]
    assert set(probes.gain_over) <= {"mean", "previous number", "bag of words"}
    assert probes[["r2_low", "selectivity", "control_r2", "gain_low"]].notna().all(axis=None)
    for row in probes.itertuples():
        own = table[(table.position == row.position) & (table.horizon == row.horizon)].set_index("reader")
        free = own.loc[["mean", "previous number", "bag of words"]]
        assert row.gain_over == free.validation_squared_error.idxmin()
        assert row.gain == pytest.approx(row.r2 - free.r2[row.gain_over])


def test_the_previous_number_is_a_line_by_least_squares(numbers: tuple[Run, pd.DataFrame, Target]):
    run, table, target = numbers
    grid = make_grid(run.corpus, run.config.probe, target, run.config.seed)
    training = baselines.counted_examples(run.corpus, run.config.probe, grid, run.config.seed)
    counts = word_counts(run.corpus)
    test = grid.examples[TESTED_ON]

    def before(examples: Examples) -> np.ndarray:  # right before a sentence, the last one has been read
        first = run.corpus.document_sentences[run.corpus.document_of(examples.sentence)]
        return np.where(examples.sentence == first, np.nan, counts[examples.sentence - 1])

    x, y = before(training), training.labels[:, 0]
    line = LinearRegression().fit(x[~np.isnan(x), None], y[~np.isnan(x)])
    x_test, truth = before(test), test.labels[:, 0]
    expected = np.where(np.isnan(x_test), y[np.isnan(x)].mean(), line.predict(np.nan_to_num(x_test)[:, None]))
    row = table[(table.reader == "previous number") & (table.position == "1") & (table.horizon == 1)].iloc[0]
    assert row.squared_error == pytest.approx(((expected - truth) ** 2).mean())
    mean = ((truth - y.mean()) ** 2).mean()
    assert row.r2 == pytest.approx(1 - row.squared_error / mean)


def test_a_bag_of_words_counts_the_tokens_up_to_the_position(tiny_run: Run):
    corpus = tiny_run.corpus
    documents = np.array([3, 3, 9])
    positions = corpus.document_tokens[documents] + [1, 20, 7]
    examples = Examples.of_tokens(documents, positions, positions, np.zeros((3, 1), int))
    bags = np.expm1(baselines.bags_of_words(corpus, examples, positions))
    for bag, document, position in zip(bags, documents, positions, strict=True):
        read = corpus.tokens[corpus.document_tokens[document] + 1 : position + 1]
        np.testing.assert_allclose(bag, np.bincount(read, minlength=len(corpus.tokenizer))[: baselines.BAG])


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_a_bag_of_words_reads_what_counting_tokens_gives(tiny_run: Run, kind: str):
    """How often the most frequent token came so far: linear in the logarithm of its count."""
    corpus, settings = tiny_run.corpus, ProbeSettings(solvers=("ridge",), positions=(1,))
    token = np.bincount(corpus.tokens[1:]).argsort()[-2]
    ends = np.asarray(corpus.first_token) - 1
    start = corpus.document_tokens[corpus.document_of(np.arange(len(ends)))] + 1
    seen = np.array([(corpus.tokens[a : b + 1] == token).sum() for a, b in zip(start, ends, strict=True)])
    labels = np.log1p(seen) if kind == "numbers" else (seen > np.median(seen)).astype(np.int64)
    target = sentence_target(corpus, "seen", 0 if kind == "numbers" else 2, labels)
    grid = make_grid(corpus, settings, target, 0)
    training = baselines.counted_examples(corpus, settings, grid, 0)
    found = baselines._bag_of_words(corpus, grid, training, 0, 1)
    predicted, truth = found.predict(slice(None)), grid.labels(TESTED_ON, 1)
    if kind == "numbers":
        assert ((predicted - truth) ** 2).mean() < 0.01 * truth.var()
        assert found.validation_loss < 0.01 * truth.var()
    else:
        assert roc_auc_score(truth, predicted[:, 1] - predicted[:, 0]) > 0.97
        assert np.allclose(softmax(predicted, axis=1).sum(1), 1)


def test_control_numbers_are_tied_to_tokens_as_control_classes_are(tiny_run: Run):
    corpus, positions = tiny_run.corpus, np.arange(1, 900)
    numbers = np.arange(8.0).repeat(5)
    found = control_numbers(corpus, positions, numbers, seed=3)
    classes = control_labels(corpus, positions, np.full(8, 1 / 8), seed=3)
    np.testing.assert_array_equal(found, classes)


def test_solvers_of_classes_are_refused_for_numbers(tiny_run: Run):
    target = sentence_target(tiny_run.corpus, "words", 0, word_counts(tiny_run.corpus))
    for solvers in (("softmax",), ("ridge", "lda", "mlp")):
        with pytest.raises(
            ProbekitError, match=r"^probe\.solvers has .* 'words' holds numbers; give .* ridge$"
        ):
            make_grid(tiny_run.corpus, ProbeSettings(solvers=solvers), target, 0)


def test_notes_name_a_class_that_is_nearly_all_and_one_that_is_all(tiny_run: Run):
    corpus = tiny_run.corpus
    rare = np.zeros(len(corpus.first_token), np.int64)
    rare[::9] = 1
    names = ("no", "yes")
    found = make_grid(corpus, ProbeSettings(), sentence_target(corpus, "rare", 2, rare, names), 0).notes
    assert any("% of the test examples at horizon 1 have the class no" in note for note in found)
    test = np.isin(corpus.document_of(np.arange(len(rare))), corpus.documents("test"))
    single = np.where(test, 1, rare)
    found = make_grid(corpus, ProbeSettings(), sentence_target(corpus, "rare", 2, single, names), 0).notes
    assert any("have the label yes: nothing can be told" in note for note in found)
