"""Metrics of weighted examples against scikit-learn and SciPy in every resample, and their coverage."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit
from scipy.stats import norm, t
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score, roc_curve

from probekit.evaluation import metrics
from probekit.evaluation.metrics import balanced_accuracies, rank_correlations, two_class_metrics
from probekit.statistics import resample_weights


def two_classes(generator: np.random.Generator, documents: int, examples: int) -> tuple[np.ndarray, ...]:
    """Log-odds that are too sure, classes, and documents that have effects on both."""
    effect, lean = (generator.normal(0, 0.7, documents).repeat(examples) for _ in range(2))
    positive = generator.random(len(effect)) < expit(lean - 0.5)
    scores = 1.2 * positive + effect + generator.normal(size=len(effect)) - 0.9
    return scores, positive, np.arange(documents).repeat(examples)


def slow_two_classes(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> list[float]:
    """Metrics of one cell by scikit-learn; the gaps of the calibration error are squared in sum."""
    given = {"sample_weight": weights}
    false, true, _ = roc_curve(positive, scores, **given)
    bins = np.minimum(10 * expit(scores), 9).astype(int)
    gaps = np.bincount(bins, weights * (expit(scores) - positive), minlength=10)
    return [
        roc_auc_score(positive, scores, **given),
        average_precision_score(positive, scores, **given),
        true[false <= 0.1].max(),
        (np.abs(gaps).sum() / weights.sum()) ** 2,
    ]


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_of_two_classes_are_scikit_learns_in_every_resample(ties: bool, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_WEIGHTS", 200)
    scores, positive, document = two_classes(np.random.default_rng(3), documents=20, examples=3)
    scores = scores.round(0 if ties else 6)
    cells = np.stack([scores, -scores], 1)
    found = two_class_metrics(cells, positive, document, 0.1, resamples=60, seed=2)
    (drawn,) = resample_weights(20, 60, 2)
    expected = np.array([slow_two_classes(scores, positive, weights[document]) for weights in drawn])
    value = slow_two_classes(scores, positive, np.ones(60))
    bias = expected[:, 3].mean() - value[3]
    both = min(len(np.unique(document[positive])), len(np.unique(document[~positive])))
    for number, (name, counted) in enumerate(zip(found, [both, both, both, 20], strict=True)):
        own = found[name][0]
        tail = norm.cdf(t.ppf(0.025, counted - 1) * np.sqrt(counted / (counted - 1)))
        wanted = np.array([value[number], *np.quantile(expected[:, number], [tail, 1 - tail])])
        if name == "calibration_error":
            wanted = np.sqrt(np.maximum(wanted - [bias, 2 * bias, 2 * bias], 0))
        assert own == pytest.approx((*wanted, counted), abs=1e-9)
    assert found["auroc"].value[1] == pytest.approx(1 - value[0])


def test_metrics_of_two_classes_cover_the_truth():
    generator = np.random.default_rng(0)
    scores, positive, _ = two_classes(generator, documents=200_000, examples=2)
    truth = slow_two_classes(scores, positive, np.ones(len(scores)))
    truth[3] = np.sqrt(truth[3])
    covered = np.zeros(4)
    for seed in range(150):
        scores, positive, document = two_classes(generator, documents=40, examples=4)
        found = two_class_metrics(scores[:, None], positive, document, 0.1, resamples=200, seed=seed)
        covered += [
            own.low[0] <= true <= own.high[0] for own, true in zip(found.values(), truth, strict=True)
        ]
    assert (covered / 150 >= 0.89).all(), covered / 150
    assert (covered[:2] / 150 <= 0.99).all(), covered / 150


def test_without_both_classes_nothing_is_told_of_two():
    document = np.arange(8)
    found = two_class_metrics(np.zeros((8, 1)), document < 0, document, 0.1, resamples=20, seed=0)
    for name in ("auroc", "average_precision", "recall"):
        assert np.isnan(found[name][0][:3]).all()


def test_rank_correlations_are_scipys_in_every_resample(monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_WEIGHTS", 200)
    generator = np.random.default_rng(3)
    truth, document = generator.normal(size=60).round(1), np.arange(20).repeat(3)
    cells = np.stack([truth + generator.normal(size=60), np.ones(60), generator.integers(3, size=60)], 1)
    found = rank_correlations(cells, truth, document, resamples=80, seed=2)
    (drawn,) = resample_weights(20, 80, 2)
    tail = norm.cdf(t.ppf(0.025, 19) * np.sqrt(20 / 19))
    for cell in (0, 2):
        expected = []
        for weights in drawn:
            rows = np.repeat(np.arange(60), weights[document].astype(int))
            expected.append(stats.spearmanr(cells[rows, cell], truth[rows])[0])
        own = found[cell]
        assert own.value == pytest.approx(stats.spearmanr(cells[:, cell], truth)[0], abs=1e-9)
        assert own.low == pytest.approx(np.quantile(expected, tail), abs=1e-9)
        assert own.high == pytest.approx(np.quantile(expected, 1 - tail), abs=1e-9)
    assert np.isnan(found[1][:3]).all()


def test_rank_correlations_cover_the_truth():
    generator, covered = np.random.default_rng(0), 0

    def draw(documents: int) -> tuple[np.ndarray, ...]:
        shared = generator.normal(size=(documents, 2)).repeat(4, axis=0)
        a = generator.normal(size=len(shared)) + 0.6 * shared[:, 0]
        return a, 0.5 * a + generator.normal(size=len(a)) + 0.5 * shared[:, 1], np.arange(documents).repeat(4)

    truth = stats.spearmanr(*draw(100_000)[:2])[0]
    for seed in range(200):
        a, b, document = draw(30)
        own = rank_correlations(a[:, None], b, document, resamples=200, seed=seed)[0]
        covered += own.low <= truth <= own.high
    assert 0.9 <= covered / 200 <= 0.99


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_balanced_accuracies_are_scikit_learns_in_every_resample():
    generator = np.random.default_rng(5)
    document, label = np.arange(15).repeat(4), generator.choice(3, 60, p=[0.8, 0.15, 0.05])
    predicted = np.where(generator.random((60, 2)) < 0.6, label[:, None], generator.integers(3, size=(60, 2)))
    rows, row = np.unique(3 * document + label, return_inverse=True)
    correct = np.zeros((len(rows), 2))
    np.add.at(correct, row, predicted == label[:, None])
    found = balanced_accuracies(correct, np.bincount(row), rows % 3, rows // 3, resamples=80, seed=2)
    (drawn,) = resample_weights(15, 80, 2)
    tail = norm.cdf(t.ppf(0.025, 14) * np.sqrt(15 / 14))
    for cell in range(2):
        expected = [
            balanced_accuracy_score(label[kept], predicted[kept, cell], sample_weight=weights[document][kept])
            for weights in drawn
            for kept in [weights[document] > 0]
        ]
        value = balanced_accuracy_score(label, predicted[:, cell])
        bounds = np.quantile(expected, [tail, 1 - tail])
        assert found[cell] == pytest.approx((value, *bounds, 15), abs=1e-9)
