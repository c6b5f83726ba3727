"""MLP probes on labels that are there but not linear, and on cases with known answers."""

import pytest
import torch

from probekit.errors import ProbekitError
from probekit.probing.solvers import MLPProbes, SoftmaxProbes
from probekit.probing.solvers import base as batch


def exclusive_or(probes=3, examples=800, dtype=torch.float32):
    """Whether just one of two features is above its middle, among others of uneven scale; two halves."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(probes, 2 * examples, 5, generator=generator)
    y = ((X[..., 0] > 0) ^ (X[..., 3] > 0)).long()
    X = ((X + 3) * torch.logspace(-2, 2, 5)).to(dtype)
    return X[:, :examples], y[:, :examples], X[:, examples:], y[:, examples:]


def fit(data, classes=2, **options):
    X, y, X_validation, y_validation = data
    options = {"hidden": 32, "learning_rate": 1e-2, "max_epochs": 40} | options
    return MLPProbes(**options).fit(X, y, classes, X_validation, y_validation)


def accuracy(probes, X, y):
    return (probes.log_probabilities(X).argmax(2) == y).float().mean(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_reads_what_no_linear_probe_can(dtype):
    X, y, X_validation, y_validation = data = exclusive_or(dtype=dtype)
    linear = SoftmaxProbes([1e-2]).fit(X, y, 2, X_validation, y_validation)
    assert (accuracy(linear, X_validation, y_validation) < 0.6).all()
    assert (accuracy(fit(data), X_validation, y_validation) > 0.93).all()


def test_fit_is_deterministic_and_follows_the_seed():
    data = exclusive_or(examples=200)
    first, again, other = (fit(data, max_epochs=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.hidden_coef_, again.hidden_coef_)
    assert not torch.allclose(first.hidden_coef_, other.hidden_coef_)


def test_a_probe_does_not_depend_on_its_company(monkeypatch):
    X, y, X_validation, y_validation = exclusive_or(examples=200, dtype=torch.float64)
    y = torch.stack([y[0], y[1].roll(1), y[2]])  # the second stops early
    together = fit((X, y, X_validation, y_validation))
    assert len(together.n_iter_.unique()) > 1
    monkeypatch.setitem(batch.PIECE_BYTES, "cpu", 1)
    apart = fit((X, y, X_validation, y_validation))
    for name in ("hidden_coef_", "coef_", "intercept_", "n_iter_", "converged_", "validation_loss_"):
        assert torch.allclose(getattr(together, name).double(), getattr(apart, name).double(), rtol=1e-6), (
            name
        )


def test_the_state_kept_is_the_best_on_validation():
    """Noise: the longer it is fitted, the worse it gets."""
    X, y, X_validation, y_validation = exclusive_or(examples=200)
    data = X, y.roll(1, dims=1), X_validation, y_validation
    kept = fit(data)
    assert kept.converged_.all()
    assert not fit(data, patience=40).converged_.any()
    log_p = kept.log_probabilities(X_validation)
    loss = -log_p.gather(2, y_validation[..., None]).mean((1, 2))
    assert torch.allclose(kept.validation_loss_, loss, rtol=1e-4)
    epochs = [fit(data, max_epochs=n).validation_loss_ for n in range(1, 8)]
    assert torch.allclose(torch.stack(epochs).amin(0), kept.validation_loss_)


def test_begins_as_the_class_prior_and_keeps_absent_classes_possible():
    X, y, X_validation, y_validation = exclusive_or(examples=399)
    found = fit((X, y, X_validation, y_validation), classes=4, learning_rate=1e-12, max_epochs=1)
    p = found.log_probabilities(X_validation).exp()
    counts = torch.stack([torch.bincount(row, minlength=4) for row in y]).float()
    counts[:, 2:] = 0.5
    assert torch.allclose(p, (counts / 400)[:, None].expand_as(p), rtol=1e-3)
    y_validation = y_validation.clone()
    y_validation[:, 0] = 3
    assert fit((X, y, X_validation, y_validation), classes=4).validation_loss_.isfinite().all()


def test_constant_features_give_the_class_prior():
    _, y, _, y_validation = exclusive_or(examples=400)
    X = torch.full((3, 400, 2), 0.1)
    found = fit((X, y, X, y_validation), learning_rate=1e-3).log_probabilities(X).exp()
    prior = torch.stack([torch.bincount(row, minlength=2) for row in y]).float() / 400
    assert torch.allclose(found, prior[:, None].expand_as(found), atol=0.03)


def test_bad_input_is_refused():
    X, y, X_validation, y_validation = exclusive_or(examples=20)
    X = X.clone()
    X[2, 3, 1] = torch.inf
    for data in ((X, y, X_validation, y_validation), (X_validation, y_validation, X, y)):
        with pytest.raises(ProbekitError, match="probe 2"):
            fit(data)
    with pytest.raises(ProbekitError, match="hidden 0"):
        MLPProbes(0)
