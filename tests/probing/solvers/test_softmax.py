"""Softmax probes against scikit-learn, their own optimality conditions and cases with known answers."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from probekit.errors import ProbekitError
from probekit.probing.solvers import SoftmaxProbes
from probekit.probing.solvers import base as batch


def planted(probes=4, examples=600, width=12, classes=5, signal=1.0, seed=0, dtype=torch.float64):
    """Activations around class means, of uneven scale and offset: a training and a validation half."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.arange(1.0, classes + 1).pow(-0.7)
    y = torch.multinomial(weights, 2 * examples, replacement=True, generator=generator)
    means = torch.randn(probes, classes, width, generator=generator) * signal
    noise = torch.randn(probes, 2 * examples, width, generator=generator)
    mixing = torch.eye(width) + 0.5 * torch.randn(probes, width, width, generator=generator)
    scale = torch.logspace(-2, 2, width)
    X = ((means[:, y] + noise @ mixing) * scale + 3 * scale).to(dtype)
    return X[:, :examples], y[:examples], X[:, examples:], y[examples:]


def fit(data, l2=(1e-2,), classes=5, max_iterations=500, tolerance=1e-8):
    X, y, X_validation, y_validation = data
    return SoftmaxProbes(l2, max_iterations, tolerance).fit(X, y, classes, X_validation, y_validation)


def cross_entropy(log_p, y):
    return -log_p.gather(2, y.expand(log_p.shape[:2])[..., None]).mean((1, 2))


@pytest.mark.parametrize("l2", [1e-1, 1e-3])
def test_equals_scikit_learn(l2):
    X, y, X_validation, _ = data = planted()
    found = fit(data, [l2])
    assert found.converged_.all()
    log_p = found.log_probabilities(X_validation)
    for probe in range(len(X)):
        scaler = StandardScaler().fit(X[probe].numpy())
        oracle = LogisticRegression(C=1 / (len(y) * l2), tol=1e-10, max_iter=10_000)
        oracle.fit(scaler.transform(X[probe].numpy()), y.numpy())
        coef = found.coef_[probe].numpy().T * scaler.scale_
        assert coef == pytest.approx(oracle.coef_, abs=2e-5)
        expected = oracle.predict_log_proba(scaler.transform(X_validation[probe].numpy()))
        assert log_p[probe].numpy() == pytest.approx(expected, abs=2e-4)


def test_fit_at_fits_each_probe_at_its_own_penalty(monkeypatch):
    X, y, X_validation, y_validation = planted(probes=3)
    l2 = torch.tensor([1e-1, 1e-3, 1e-2], dtype=torch.float64)
    together = SoftmaxProbes([1.0], 500, 1e-8).fit_at(X, y, 5, l2)
    monkeypatch.setitem(batch.PIECE_BYTES, "cpu", 1)
    for found in (together, SoftmaxProbes([1.0], 500, 1e-8).fit_at(X, y, 5, l2)):
        assert torch.equal(found.penalty_, l2)
        assert found.converged_.all()
        for probe in range(3):
            part = slice(probe, probe + 1)
            alone = fit((X[part], y, X_validation[part], y_validation), [float(l2[probe])])
            assert torch.allclose(found.coef_[probe], alone.coef_[0], rtol=1e-5, atol=1e-8)
            assert torch.allclose(found.intercept_[probe], alone.intercept_[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("absent", [False, True])
def test_autograd_finds_the_objective_stationary(absent):
    X, y, *_ = data = planted()
    classes = 7 if absent else 5
    l2, n = 1e-2, len(y)
    found = fit(data, [l2], classes=classes)
    scale = X.std(1, correction=0)[..., None]
    W = (found.coef_ * scale).requires_grad_()
    mean = X.mean(1, keepdim=True)
    b = (found.intercept_ + torch.bmm(mean, found.coef_)[:, 0]).requires_grad_()
    log_p = torch.log_softmax((X - mean) / scale.mT @ W + b[:, None], -1)
    objective = cross_entropy(log_p, y).sum() + l2 / 2 * W.square().sum()
    if absent:  # the added example
        objective = objective - torch.log_softmax(b, -1)[:, 5:].mean(1).sum() / n
    objective.backward()
    assert W.grad.abs().max() < 1e-8
    assert b.grad.abs().max() < 1e-8


@pytest.mark.parametrize("limit", [1, 1 << 30])
def test_results_do_not_depend_on_the_batch(limit, monkeypatch):
    X, y, X_validation, y_validation = planted(probes=5, signal=0.5)
    X = X * torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])[:, None, None]  # one finishes at once
    labels = torch.stack([y, y.flip(0), y, y.roll(1), y])
    together = fit((X, labels, X_validation, y_validation), [1e-1, 1e-3])
    monkeypatch.setitem(batch.PIECE_BYTES, "cpu", limit)
    again = fit((X, labels, X_validation, y_validation), [1e-1, 1e-3])
    for name in ("coef_", "intercept_", "penalty_", "n_iter_", "converged_", "validation_cross_entropy_"):
        pair = getattr(together, name), getattr(again, name)
        torch.testing.assert_close(*pair, rtol=1e-9, atol=0, equal_nan=True)
    for probe in range(5):
        part = slice(probe, probe + 1)
        alone = fit((X[part], labels[part], X_validation[part], y_validation), [1e-1, 1e-3])
        assert torch.allclose(alone.coef_[0], together.coef_[probe], rtol=1e-6, atol=1e-9)
        assert alone.n_iter_[0] == together.n_iter_[probe]


def noisy(probes=6, examples=150, seed=0):
    """As `planted`, with ever more noise on training and validation examples."""
    X, y, X_validation, y_validation = planted(probes, examples, seed=seed)
    for data, share in ((X, 1), (X_validation, 0)):
        noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(share), dtype=data.dtype)
        data += noise * data.std(1, keepdim=True) * torch.logspace(-2, 1.5, probes)[:, None, None]
    return X, y, X_validation, y_validation


def ill_conditioned(probes=6, examples=400, width=40, classes=6, seed=0):
    """A few directions hold nearly all variance; the classes are told apart in the others."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(1.5, -2, width)
    means = torch.randn(probes, classes, width, generator=generator) * (scale < 1)
    y = torch.randint(0, classes, (2 * examples,), generator=generator)
    X = means[:, y] * torch.logspace(-0.7, 0.3, probes)[:, None, None]
    X = (X + torch.randn(probes, 2 * examples, width, generator=generator)) * scale
    X = X @ torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return X[:, :examples], y[:examples], X[:, examples:], y[examples:]


PATH = [1e-3, 1.0, 1e-2, 1e-4, 1e-1]


@pytest.mark.parametrize("make", [noisy, ill_conditioned])
def test_the_path_ends_where_a_weaker_penalty_is_worse(make):
    """Against a fit of every probe at every penalty."""
    X, y, X_validation, y_validation = data = make()
    classes = int(y.max()) + 1
    found = fit(data, PATH, classes, tolerance=1e-4)
    assert found.converged_.all()
    exact = torch.cat([fit(data, [l2], classes).validation_cross_entropy_ for l2 in PATH], 1)
    assert found.penalty_.tolist() == [PATH[column] for column in exact.argmin(1)]
    fitted = found.validation_cross_entropy_.isfinite()
    assert torch.allclose(found.validation_cross_entropy_[fitted], exact[fitted], rtol=0.1)
    order = sorted(range(len(PATH)), key=lambda column: -PATH[column])
    for along, seen, kept in zip(exact[:, order], fitted[:, order], exact[:, order].argmin(1), strict=True):
        assert seen[: seen.sum()].all(), "a path has no gaps"
        if not seen.all():
            assert along[seen].argmin() == kept
            assert seen.sum() > kept + 1, "it ends after a worse penalty"
    least = found.validation_cross_entropy_.nan_to_num(torch.inf).min(1).values
    log_p = found.log_probabilities(X_validation)
    assert torch.allclose(cross_entropy(log_p, y_validation), least, rtol=1e-5)
    alone = SoftmaxProbes([1.0], 500, 1e-8).fit_at(X, y, classes, found.penalty_)
    exact_loss = cross_entropy(alone.log_probabilities(X_validation), y_validation)
    assert torch.allclose(cross_entropy(log_p, y_validation), exact_loss, rtol=2e-2)


def test_the_control_task_is_fitted_at_the_penalty_of_the_real_one():
    X, y, X_validation, y_validation = noisy()
    control = torch.stack([y.roll(shift) for shift in range(6)])
    found = SoftmaxProbes(PATH, 500, 1e-7).fit(X, y, 5, X_validation, y_validation, control)
    assert found.control_ is not None
    alone = SoftmaxProbes([1.0], 500, 1e-7).fit_at(X, control, 5, found.penalty_)
    assert torch.equal(found.control_.penalty_, found.penalty_)
    assert torch.allclose(found.control_.coef_, alone.coef_)
    without = SoftmaxProbes(PATH, 500, 1e-7).fit(X, y, 5, X_validation, y_validation)
    assert without.control_ is None
    assert torch.equal(without.coef_, found.coef_)


def test_absent_classes_share_one_example():
    X, y, X_validation, y_validation = planted(examples=400, dtype=torch.float32)
    y_validation = y_validation.clone()
    y_validation[0] = 6
    found = fit((X, y, X_validation, y_validation), [1e-1], classes=8, tolerance=1e-4)
    assert found.converged_.all()
    assert found.validation_cross_entropy_.isfinite().all()
    p = found.log_probabilities(X).exp()[..., 5:]
    assert (p > 0).all()
    assert p.sum(2).mean(1) == pytest.approx(np.full(4, 1 / 401), rel=0.5)
    assert torch.allclose(p[..., :1].expand_as(p), p, rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4, -1e-6])
def test_constant_features_give_the_class_prior(value):
    _, y, _, y_validation = planted()
    X = torch.full((2, len(y), 3), value)
    found = fit((X, y, X, y_validation), [1e-4], tolerance=1e-4)
    assert found.converged_.all()
    prior = torch.bincount(y).float() / len(y)
    assert torch.allclose(found.log_probabilities(X).exp(), prior.expand(2, len(y), 5), rtol=1e-4)


def test_constant_and_nearly_collinear_features_are_no_obstacle():
    X, y, X_validation, y_validation = planted(dtype=torch.float32)

    def widen(X: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(0))
        return torch.cat([X, X + 1e-4 * X.std(1, keepdim=True) * noise, torch.full_like(X[..., :1], 7.0)], 2)

    found = fit((widen(X), y, widen(X_validation), y_validation), [2e-3], tolerance=1e-4)
    assert found.converged_.all()
    # Two copies of a feature carry half the weight each, so together they pay half of what one would.
    plain = fit((X, y, X_validation, y_validation), [1e-3], tolerance=1e-4)
    assert torch.allclose(found.validation_cross_entropy_, plain.validation_cross_entropy_, rtol=1e-3)


def test_width_above_the_number_of_examples():
    X, y, X_validation, y_validation = planted(examples=60, width=200, dtype=torch.float32)
    found = fit((X, y, X_validation, y_validation), [1e-1, 1e-4], max_iterations=200, tolerance=1e-4)
    assert found.converged_.all()
    assert found.log_probabilities(X_validation).isfinite().all()
    exact = SoftmaxProbes([1.0], 500, 1e-8).fit_at(X.double(), y, 5, torch.full((4,), 1e-2))
    Z = StandardScaler().fit_transform(X[0].double().numpy())
    oracle = LogisticRegression(C=1 / (60 * 1e-2), tol=1e-10, max_iter=10_000).fit(Z, y.numpy())
    found_log_p = exact.log_probabilities(X.double())[0].numpy()
    assert found_log_p == pytest.approx(oracle.predict_log_proba(Z), abs=1e-4)


def test_one_iteration_is_flagged_as_not_enough():
    found = fit(planted(), [1e-3], max_iterations=1)
    assert not found.converged_.any()
    assert found.n_iter_.tolist() == [2] * 4  # one to compare penalties, one to complete the fit


def test_half_precision_activations_are_solved_in_float32():
    X, y, X_validation, y_validation = planted(dtype=torch.float32)
    full = fit((X.bfloat16().float(), y, X_validation.bfloat16().float(), y_validation), tolerance=1e-4)
    half = fit((X.bfloat16(), y, X_validation.bfloat16(), y_validation), tolerance=1e-4)
    assert torch.equal(full.coef_, half.coef_)
    assert torch.equal(full.log_probabilities(X.bfloat16().float()), half.log_probabilities(X.bfloat16()))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_activations_name_the_probe(bad, monkeypatch):
    monkeypatch.setitem(batch.PIECE_BYTES, "cpu", 1)  # the index counts over chunks
    for part in (0, 2):
        data = planted()
        data[part][2, 5, 3] = bad
        with pytest.raises(ProbekitError, match="probe 2"):
            fit(data)


def test_bad_shapes_classes_and_penalties_are_refused():
    X, y, X_validation, y_validation = planted()
    with pytest.raises(ProbekitError, match="run from 0 to 4"):
        fit((X, y, X_validation, y_validation), classes=4)
    with pytest.raises(ProbekitError, match=r"classes \[599\]"):
        fit((X, y[1:], X_validation, y_validation))
    with pytest.raises(ProbekitError, match="none of them 0"):
        fit((X, y, X_validation[:, :0], y_validation[:0]))
    with pytest.raises(ProbekitError, match="above 0"):
        SoftmaxProbes([0.1, 0.0])
    for l2 in (torch.ones(3), torch.tensor([1.0, 1.0, 0.0, 1.0])):
        with pytest.raises(ProbekitError, match="above 0 for each of 4 probes"):
            SoftmaxProbes([0.1]).fit_at(X, y, 5, l2)


@pytest.mark.parametrize("width", [3, 64])
def test_probes_whose_features_are_all_constant_end_at_the_prior(width):
    """As the embedding of the full stop before every sentence: what is left of it is rounding."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 1, width, generator=generator)
    X = row.expand(2, 4001, width).contiguous()
    y = torch.randint(0, 3, (4001,), generator=generator)
    probes = SoftmaxProbes([1e-4, 1.0]).fit(X, y, 3, X[:, :50], y[:50])
    prior = torch.bincount(y, minlength=3) / len(y)
    torch.testing.assert_close(probes.log_probabilities(X[:, :1])[0, 0].exp(), prior, rtol=1e-4, atol=1e-5)
    assert (probes.coef_ == 0).all()
