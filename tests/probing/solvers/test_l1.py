"""L1 probes against scikit-learn, and cases with known answers."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from probekit.errors import ProbekitError
from probekit.probing.solvers import L1Probes
from probekit.probing.solvers import base as batch

INFORMATIVE = 4


def planted(classes=2, probes=2, examples=300, width=30, signal=1.0, seed=0):
    """Correlated activations of uneven scale; the class moves `INFORMATIVE` of them. Two halves."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (2 * examples,), generator=generator)
    means = torch.zeros(probes, classes, width)
    means[..., :INFORMATIVE] = signal * torch.randn(probes, classes, INFORMATIVE, generator=generator)
    noise = torch.randn(probes, 2 * examples, width, generator=generator)
    noise = noise + 0.5 * torch.randn(probes, 2 * examples, 1, generator=generator)
    X = (means[:, y] + noise) * torch.logspace(-1, 2, width) + 5.0
    return X[:, :examples], y[:examples], X[:, examples:], y[examples:]


def objective(Z: np.ndarray, y: np.ndarray, coef: np.ndarray, intercept: np.ndarray, l1: float) -> float:
    """On standardised activations, weights `[width, classes]`."""
    log_p = torch.log_softmax(torch.from_numpy(Z @ coef + intercept), 1).numpy()
    return float(-log_p[np.arange(len(y)), y].mean() + l1 * np.abs(coef).sum())


@pytest.mark.parametrize(
    ("classes", "solver", "l1"),
    [
        *((2, "liblinear", l1) for l1 in (0.1, 0.01, 0.001)),
        (2, "saga", 0.01),
        (4, "saga", 0.1),
        (4, "saga", 0.03),
    ],
)
def test_equals_scikit_learn(classes, solver, l1):
    X, y, X_validation, y_validation = planted(classes)
    found = L1Probes([l1], tolerance=1e-3).fit(X, y, classes, X_validation, y_validation)
    assert found.converged_.all()
    log_p = found.log_probabilities(X_validation)
    for probe, raw in enumerate(X.double().numpy()):
        scaler = StandardScaler().fit(raw)
        Z = scaler.transform(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            oracle = LogisticRegression(
                C=1 / (len(y) * l1),
                l1_ratio=1.0,
                solver=solver,
                tol=1e-7,
                max_iter=3000,
                intercept_scaling=1000.0,  # liblinear penalises the intercept
            ).fit(Z, y)
        theirs = oracle.coef_.T, oracle.intercept_
        if classes == 2:
            theirs = tuple(np.stack([-part.T[0] / 2, part.T[0] / 2], -1) for part in theirs)
        coef, intercept = found.coef_[probe].double().numpy(), found.intercept_[probe].double().numpy()
        ours = coef * scaler.scale_[:, None], intercept + scaler.mean_ @ coef
        best = objective(Z, y.numpy(), *theirs, l1)
        assert objective(Z, y.numpy(), *ours, l1) == pytest.approx(best, rel=1e-4)
        assert abs(int(found.nonzero_[probe]) - np.any(oracle.coef_ != 0, 0).sum()) <= 1
        if classes == 2:
            Z_validation = scaler.transform(X_validation[probe].numpy())
            expected = roc_auc_score(y_validation, oracle.decision_function(Z_validation))
            score = log_p[probe, :, 1] - log_p[probe, :, 0]
            assert roc_auc_score(y_validation, score) == pytest.approx(expected, abs=1e-3)


def test_the_penalty_is_the_best_on_validation():
    data = planted(signal=0.3)
    penalties = [1e-3, 1e-1, 1e-2, 3e-2]
    found = L1Probes(penalties).fit(*data[:2], 2, *data[2:])
    alone = torch.cat(
        [L1Probes([l1]).fit(*data[:2], 2, *data[2:]).validation_cross_entropy_ for l1 in penalties], 1
    )
    assert found.penalty_.tolist() == pytest.approx([penalties[i] for i in alone.argmin(1)])
    assert found.validation_cross_entropy_.amin(1).tolist() == pytest.approx(alone.amin(1).tolist(), abs=1e-3)


def test_few_features_are_used_and_the_informative_are_among_them():
    data = planted(examples=1000, width=100, signal=2.0)
    found = L1Probes([0.05]).fit(*data[:2], 2, *data[2:])
    assert (found.nonzero_ <= 2 * INFORMATIVE).all()
    assert (found.coef_[:, :INFORMATIVE] != 0).any(1).any(1).all()


def test_a_strong_penalty_gives_the_class_prior():
    X, y, *validation = planted(3)
    found = L1Probes([10.0]).fit(X, y, 3, *validation)
    assert found.nonzero_.tolist() == [0, 0]
    prior = torch.bincount(y) / len(y)
    assert torch.allclose(found.log_probabilities(X).exp(), prior.expand(*X.shape[:2], 3), atol=1e-4)


@pytest.mark.parametrize("limit", [100_000, 1 << 30])
def test_results_do_not_depend_on_the_batch(limit, monkeypatch):
    data = [
        torch.cat(parts) for parts in zip(planted(signal=0.2)[::2], planted(signal=2.0)[::2], strict=True)
    ]
    _, y, _, y_validation = planted()
    monkeypatch.setitem(batch.PIECE_BYTES, "cpu", limit)
    found = L1Probes([1e-1, 1e-2, 1e-3]).fit(data[0], y, 2, data[1], y_validation)
    for probe in range(4):
        at = slice(probe, probe + 1)
        alone = L1Probes([1e-1, 1e-2, 1e-3]).fit(data[0][at], y, 2, data[1][at], y_validation)
        assert torch.allclose(alone.coef_[0], found.coef_[probe], rtol=1e-2, atol=1e-3)
        assert alone.penalty_[0] == found.penalty_[probe]


def test_the_control_task_is_fitted_at_the_penalty_of_the_real_one():
    X, y, *validation = planted()
    control = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
    found = L1Probes([1e-1, 1e-2]).fit(X, y, 2, *validation, control)
    assert found.control_ is not None
    for probe, l1 in enumerate(found.penalty_.tolist()):
        alone = L1Probes([l1]).fit(X, control, 2, *validation)
        assert torch.allclose(found.control_.coef_[probe], alone.coef_[probe], rtol=0.05, atol=1e-3)


def test_absent_classes_share_one_example_and_constant_features_have_no_weight():
    X, y, *validation = planted(3)
    X[..., 0] = 7.0
    found = L1Probes([1e-3]).fit(X, y, 5, *validation)
    added = torch.cat([X, X.mean(1, keepdim=True)], 1)
    p = found.log_probabilities(added).exp()[..., 3:].sum(1)
    assert torch.allclose(p, torch.full_like(p, 0.5), atol=1e-2)
    assert (found.coef_[:, 0] == 0).all()


def test_too_few_iterations_are_flagged():
    data = planted()
    assert not L1Probes([1e-3], max_iterations=2).fit(*data[:2], 2, *data[2:]).converged_.any()


def test_bad_input_is_refused():
    X, y, *validation = planted()
    with pytest.raises(ProbekitError, match="all above 0"):
        L1Probes([0.1, 0.0])
    with pytest.raises(ProbekitError, match="classes run from 0 to 1"):
        L1Probes([0.1]).fit(X, y, 1, *validation)
    X[1, 3, 2] = torch.nan
    with pytest.raises(ProbekitError, match="probe 1: its activations are not all finite"):
        L1Probes([0.1]).fit(X, y, 2, *validation)
