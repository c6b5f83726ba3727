"""Ridge and LDA probes against scikit-learn, and cases with known answers."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestCentroid
from sklearn.preprocessing import StandardScaler

from probekit.errors import ProbekitError
from probekit.probing.solvers import LDAProbes, MeanDifferenceProbes, Moments, RidgeProbes, closed_form
from probekit.probing.solvers import base as batch

WIDTH, CLASSES = 10, 5
SOLVERS = [RidgeProbes([1e-2, 1.0]), LDAProbes([0.02, 0.9]), MeanDifferenceProbes()]


def planted(probes=40, examples=400, signal=0.5, seed=0, dtype=torch.float64):
    """Activations around class means, of uneven scale and offset, classes of uneven share; two halves."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1.0, CLASSES + 1).pow(-0.7)
    y = torch.multinomial(weights, 2 * examples * probes, replacement=True, generator=generator)
    y = y.view(probes, 2 * examples)
    means = torch.randn(probes, CLASSES, WIDTH, generator=generator) * signal
    mixing = torch.eye(WIDTH) + 0.5 * torch.randn(probes, WIDTH, WIDTH, generator=generator)
    noise = torch.randn(probes, 2 * examples, WIDTH, generator=generator) @ mixing
    scale = torch.logspace(-2, 2, WIDTH)
    X = ((means.gather(1, y[..., None].expand(-1, -1, WIDTH)) + noise) * scale + 3 * scale).to(dtype)
    return X[:, :examples], y[:, :examples], X[:, examples:], y[:, examples:]


def in_parts(X: torch.Tensor, y: torch.Tensor) -> Moments:
    """Moments by way of uneven chunks."""
    moments = Moments.zeros(len(X), WIDTH, CLASSES, dtype=batch.solver_dtype(X))
    for rows in torch.arange(X.shape[1]).split([7, 150, 1, 42, 100, 60, 40]):
        moments.add(X[:, rows], y[:, rows])
    return moments


def unscaled(probes, probe: int) -> np.ndarray:
    """The weights of a probe's scores on raw activations, [classes, width]."""
    return (probes.coef_[probe].double() * float(probes.temperature_[probe])).numpy().T


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def cross_entropy(log_p, y):
    return -log_p.gather(2, y.expand(log_p.shape[:2])[..., None]).mean((1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_ridge_equals_scikit_learn(l2, dtype):
    X, y, X_validation, y_validation = planted(dtype=dtype)
    found = (
        RidgeProbes([l2]).fit_moments(in_parts(X, y)).observe_validation(X_validation, y_validation).choose()
    )
    for probe, (raw, classes) in enumerate(zip(X.double().numpy(), y.numpy(), strict=True)):
        scaler = StandardScaler().fit(raw)
        oracle = Ridge(alpha=l2 * len(classes)).fit(scaler.transform(raw), np.eye(CLASSES)[classes])
        share = np.bincount(classes) / len(classes)
        assert close(unscaled(found, probe) * scaler.scale_ * np.sqrt(share / CLASSES)[:, None], oracle.coef_)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shrinkage", [1.0, 0.3, 0.01])
def test_lda_equals_scikit_learn(shrinkage, dtype, monkeypatch):
    monkeypatch.setattr(closed_form, "TEMPERATURES", (1.0,))
    X, y, X_validation, y_validation = planted(dtype=dtype)
    found = LDAProbes([shrinkage]).fit_moments(in_parts(X, y))
    log_p = found.observe_validation(X_validation, y_validation).choose().log_probabilities(X_validation)
    for probe, (raw, classes) in enumerate(zip(X.double().numpy(), y.numpy(), strict=True)):
        scaler = StandardScaler().fit(raw)
        oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
        oracle.fit(scaler.transform(raw), classes)
        assert close(unscaled(found, probe) * scaler.scale_, oracle.coef_)
        expected = oracle.predict_log_proba(scaler.transform(X_validation[probe].double().numpy()))
        assert log_p[probe].numpy() == pytest.approx(expected, abs=2e-3)


def test_mean_difference_predicts_the_nearest_mean(monkeypatch):
    monkeypatch.setattr(closed_form, "TEMPERATURES", (1.0,))
    X, y, X_validation, y_validation = planted(probes=4, signal=2.0)
    y = torch.arange(400).expand(4, 400) % CLASSES  # even shares: then the prior moves no boundary
    found = MeanDifferenceProbes().fit(X, y, CLASSES, X_validation, y_validation)
    predicted = found.log_probabilities(X_validation).argmax(2)
    for probe, raw in enumerate(X.numpy()):
        scaler = StandardScaler().fit(raw)
        oracle = NearestCentroid().fit(scaler.transform(raw), y[probe].numpy())
        expected = oracle.predict(scaler.transform(X_validation[probe].numpy()))
        assert (predicted[probe].numpy() == expected).mean() > 0.99  # all but ties


def test_mean_difference_of_two_classes_reads_along_the_difference_of_their_means():
    X, y, X_validation, y_validation = planted(probes=4, signal=1.0)
    y, y_validation = (y > 0).long(), (y_validation > 0).long()
    log_p = MeanDifferenceProbes().fit(X, y, 2, X_validation, y_validation).log_probabilities(X_validation)
    for probe, raw in enumerate(X.numpy()):
        scaler, labels = StandardScaler().fit(raw), y[probe].numpy()
        Z = scaler.transform(raw)
        along = Z[labels == 1].mean(0) - Z[labels == 0].mean(0)
        expected = scaler.transform(X_validation[probe].numpy()) @ along
        scores = (log_p[probe, :, 1] - log_p[probe, :, 0]).numpy()
        assert np.corrcoef(scores, expected)[0, 1] == pytest.approx(1.0)
        truth = y_validation[probe].numpy()
        assert roc_auc_score(truth, scores) == pytest.approx(roc_auc_score(truth, expected))


def test_mean_difference_keeps_its_direction_where_the_prior_is_better():
    X, y, X_validation, y_validation = planted(probes=4, signal=0.0)
    found = MeanDifferenceProbes().fit(X, y, CLASSES, X_validation, y_validation)
    assert found.temperature_.isfinite().all()
    assert (found.coef_ != 0).all()


def test_mean_difference_is_calibrated_where_its_assumption_holds(monkeypatch):
    """Isotropic noise: with a temperature of 1, its loss is that of the true posterior."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.float64)
    means *= 0.5 / means.std(0)  # even scales, so that standardising keeps the noise isotropic
    y = torch.randint(CLASSES, (1, 20_000), generator=generator)
    X = means[y] + torch.randn(1, 20_000, WIDTH, generator=generator, dtype=torch.float64)
    posterior = torch.log_softmax(-0.5 * (X[..., None, :] - means).square().sum(-1), -1)
    monkeypatch.setattr(closed_form, "TEMPERATURES", (1.0,))
    found = MeanDifferenceProbes().fit(X, y, CLASSES, X, y)
    assert found.validation_cross_entropy_.item() == pytest.approx(
        cross_entropy(posterior, y).item(), abs=5e-3
    )


@pytest.mark.parametrize("solver", [RidgeProbes, LDAProbes])
def test_penalty_and_temperature_are_those_best_on_validation(solver, monkeypatch):
    halves = [planted(probes=4, examples=40, signal=signal) for signal in (0.2, 2.0)]
    X, y, X_validation, y_validation = data = [torch.cat(parts) for parts in zip(*halves, strict=True)]
    penalties = [1e-2, 1e-3, 1e-1]
    found = solver(penalties).fit(X, y, CLASSES, X_validation, y_validation)
    chosen = list(zip(found.penalty_.tolist(), found.temperature_.tolist(), strict=True))
    assert all(len(set(kept)) > 1 for kept in zip(*chosen, strict=True))
    candidates = {}
    for pair in itertools.product(penalties, closed_form.TEMPERATURES):
        with monkeypatch.context() as patch:
            patch.setattr(closed_form, "TEMPERATURES", pair[1:])
            alone = solver(pair[:1]).fit(*data[:2], CLASSES, *data[2:])
        candidates[pair] = cross_entropy(alone.log_probabilities(X_validation), y_validation)
    losses = torch.stack(list(candidates.values()))
    assert chosen == [list(candidates)[i] for i in losses.argmin(0)]
    by_penalty = losses.view(len(penalties), -1, len(X)).amin(1).T
    assert torch.allclose(found.validation_cross_entropy_, by_penalty, rtol=1e-6)
    kept = cross_entropy(found.log_probabilities(X_validation), y_validation)
    assert torch.allclose(kept, losses.amin(0), rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=10)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_validation_examples_may_come_in_parts(solver, sizes):
    X, y, X_validation, y_validation = planted(probes=2, examples=sum(sizes))
    whole = solver.fit(X, y, CLASSES, X_validation, y_validation).validation_cross_entropy_
    solver.fit_moments(Moments.zeros(2, WIDTH, CLASSES, dtype=torch.float64).add(X, y))
    for part, labels in zip(X_validation.split(sizes, 1), y_validation.split(sizes, 1), strict=True):
        solver.observe_validation(part, labels)
    assert torch.allclose(solver.choose().validation_cross_entropy_, whole, rtol=1e-9)


@pytest.mark.parametrize(
    "make", [lambda: RidgeProbes([1e-2, 1.0]), lambda: LDAProbes([0.02, 0.9]), MeanDifferenceProbes]
)
def test_tasks_that_share_activations_are_solved_as_if_alone(make, monkeypatch):
    monkeypatch.setitem(batch.PIECE_BYTES, "cpu", 8 * 4 * WIDTH * (WIDTH + CLASSES) * 3)  # probes by threes
    X, y, X_validation, y_validation = planted(probes=7, examples=60)
    labels = [(y, y_validation), (y.flip(1), y_validation.flip(1))]
    moments = Moments.zeros(7, WIDTH, CLASSES, dtype=torch.float64)
    both = [moments, moments.relabelled()]
    moments.add(X, y)
    both[1].add_labels(X, y.flip(1))
    together = [make(), make()]
    closed_form.fit_together(together, both)
    held_once = together[0]._solved.basis is together[1]._solved.basis
    assert held_once == isinstance(together[0], RidgeProbes)
    for found, (fitted_on, chosen_on) in zip(together, labels, strict=True):
        alone = make().fit(X, fitted_on, CLASSES, X_validation, chosen_on)
        found.observe_validation(X_validation, chosen_on).choose()
        assert torch.equal(found.coef_, alone.coef_)
        assert torch.equal(found.intercept_, alone.intercept_)


@pytest.mark.parametrize("solver", SOLVERS)
def test_results_do_not_depend_on_memory(solver, monkeypatch):
    data = planted(probes=3)
    coef = solver.fit(*data[:2], CLASSES, *data[2:]).coef_
    monkeypatch.setitem(batch.PIECE_BYTES, "cpu", 1000)
    assert torch.allclose(solver.fit(*data[:2], CLASSES, *data[2:]).coef_, coef, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("signal", [0.3, 20.0])
def test_absent_classes_share_one_example(solver, signal):
    X, y, X_validation, y_validation = planted(probes=4, signal=signal)
    X_validation[:, 1] = X.mean(1)  # where every class scores far below 0, the score of none
    y_validation = y_validation.clone()
    y_validation[:, 0] = CLASSES + 1
    found = solver.fit(X, y, CLASSES + 3, X_validation, y_validation)
    assert found.validation_cross_entropy_.isfinite().all()
    p = found.log_probabilities(X).exp()[..., CLASSES:]
    assert torch.allclose(p, torch.full_like(p, 1 / 401 / 3))
    assert torch.allclose(found.log_probabilities(X).exp().sum(2), torch.ones(4, 400, dtype=X.dtype))
    loss = cross_entropy(found.log_probabilities(X_validation), y_validation)
    assert torch.allclose(loss, found.validation_cross_entropy_.amin(1), rtol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e4 / 3, -1e-6])
def test_constant_features_give_the_class_prior(solver, value, monkeypatch):
    monkeypatch.setattr(closed_form, "TEMPERATURES", (1.0,))
    _, y, _, y_validation = planted(probes=2)
    X = torch.full((2, y.shape[1], 3), value, dtype=torch.float64)
    found = solver.fit(X, y, CLASSES, X, y_validation).log_probabilities(X).exp()
    assert (solver.coef_ == 0).all()  # rounding is not blown up
    prior = torch.stack([torch.bincount(row, minlength=CLASSES) for row in y]).double() / y.shape[1]
    assert torch.allclose(found, prior[:, None].expand_as(found), rtol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS[:2])
def test_noise_is_never_worse_than_the_prior_on_validation(solver):
    X, y, X_validation, y_validation = planted(signal=0.0, examples=60)
    found = solver.fit(X, y, CLASSES, X_validation, y_validation)
    prior = torch.stack([torch.bincount(row, minlength=CLASSES) for row in y]).double() / y.shape[1]
    loss = -prior.gather(1, y_validation).log().mean(1)
    assert (found.validation_cross_entropy_.amin(1) <= loss + 1e-9).all()
    assert found.temperature_.isinf().any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_features_and_classes_than_examples(solver):
    X = torch.randn(2, 30, 50, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30)
    found = solver.fit(X, y, 1024, X + 0.1, y)
    assert found.log_probabilities(X).isfinite().all()
    assert (found.log_probabilities(X).argmax(2) == y).float().mean() > 0.9


def test_bad_input_is_refused():
    X, y, X_validation, y_validation = planted(probes=3)
    X = X.clone()
    X[1, 5, 3] = torch.nan
    for solver in SOLVERS:
        with pytest.raises(ProbekitError, match="probe 1"):
            solver.fit(X, y, CLASSES, X_validation, y_validation)
        with pytest.raises(ProbekitError, match="probe 1"):
            solver.fit(X_validation, y_validation, CLASSES, X, y)
        with pytest.raises(ProbekitError, match="probe 0"):
            solver.fit_moments(Moments.zeros(2, WIDTH, CLASSES))
    for penalties in ([], [0.1, 0.0]):
        with pytest.raises(ProbekitError, match="above 0"):
            RidgeProbes(penalties)
    with pytest.raises(ProbekitError, match="at most 1"):
        LDAProbes([0.5, 1.5])
