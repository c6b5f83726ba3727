"""Ridge on numbers against scikit-learn, and cases with known answers."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from probekit.errors import ProbekitError
from probekit.probing.solvers import LDAProbes, Moments, RegressionProbes, SoftmaxProbes

WIDTH = 8


def planted(probes: int = 3, examples: int = 300, noise: float = 1.0, seed: int = 0, level: float = 1987.0):
    """Activations of uneven scale and offset, and years that are linear in them; two halves."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(probes, 2 * examples, WIDTH, generator=generator, dtype=torch.float64)
    weights = torch.randn(probes, WIDTH, 1, generator=generator, dtype=torch.float64)
    y = (X @ weights)[..., 0] + noise * torch.randn(probes, 2 * examples, generator=generator)
    scale = torch.logspace(-2, 2, WIDTH, dtype=torch.float64)
    X, y = X * scale + 3 * scale, level + 10 * y
    return X[:, :examples], y[:, :examples], X[:, examples:], y[:, examples:]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_equals_scikit_learn(l2: float, dtype: torch.dtype):
    X, y, X_validation, y_validation = planted()
    X, X_validation = X.to(dtype), X_validation.to(dtype)
    found = RegressionProbes([l2]).fit(X, y, X_validation, y_validation)
    for probe in range(len(X)):
        scaler = StandardScaler().fit(X[probe].double())
        ridge = Ridge(alpha=l2 * X.shape[1]).fit(scaler.transform(X[probe].double()), y[probe])
        expected = ridge.predict(scaler.transform(X_validation[probe].double()))
        assert np.abs(found.predict(X_validation)[probe] - expected).max() < 2e-3
        error = ((expected - y_validation[probe].numpy()) ** 2).mean()
        assert found.validation_squared_error_[probe, 0] == pytest.approx(error, rel=1e-4)
        variance = ((y_validation[probe] - y[probe].mean()) ** 2).mean()
        assert found.validation_squared_error_[probe, 1] == pytest.approx(variance.item(), rel=1e-6)


def vectors_of(y: torch.Tensor, outputs: int = 5) -> torch.Tensor:
    """Vectors whose outputs are the numbers, each with noise and a level of its own."""
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(*y.shape, outputs, generator=generator, dtype=torch.float64)
    return y[..., None] * torch.linspace(-1, 2, outputs, dtype=torch.float64) + 10 * noise


def test_vectors_equal_the_ridge_of_scikit_learn_with_many_outputs():
    X, y, X_validation, y_validation = planted()
    y, y_validation = vectors_of(y), vectors_of(y_validation)
    for shared in (False, True):
        known = (y[0], y_validation[0]) if shared else (y, y_validation)
        found = RegressionProbes([0.03], 5).fit(X, known[0], X_validation, known[1])
        assert found.penalty_.isinf().tolist() == [False, shared, shared]
        for probe in range(1 if shared else len(X)):  # vectors of the first cannot be read from the others
            own, own_validation = y[probe], y_validation[probe]
            scaler = StandardScaler().fit(X[probe])
            ridge = Ridge(alpha=0.03 * X.shape[1]).fit(scaler.transform(X[probe]), own)
            expected = ridge.predict(scaler.transform(X_validation[probe]))
            np.testing.assert_allclose(found.predict(X_validation)[probe], expected, rtol=1e-6)
            error = ((expected - own_validation.numpy()) ** 2).sum(1).mean()
            assert found.validation_squared_error_[probe, 0] == pytest.approx(error, rel=1e-6)


def test_all_numbers_of_a_vector_have_the_penalty_that_is_best_for_them_together():
    X, y, X_validation, y_validation = planted(probes=20, examples=30, noise=4.0)
    y, y_validation = vectors_of(y), vectors_of(y_validation)
    found = RegressionProbes([1e-3, 0.3, 10.0], 5).fit(X, y, X_validation, y_validation)
    errors = (found.predict(X_validation) - y_validation).square().sum(2).mean(1)
    torch.testing.assert_close(errors, found.validation_squared_error_.amin(1))
    assert len(set(found.penalty_.tolist())) > 1


def test_vectors_of_several_tasks_in_parts_change_nothing():
    X, y, X_validation, y_validation = planted()
    y, y_validation = vectors_of(y), vectors_of(y_validation)
    both = torch.cat([y.flip(1), y], 2)
    moments = Moments.zeros(len(X), WIDTH, 1, dtype=torch.float64, numbers=10)
    for start, stop in itertools.pairwise([0, 7, 150, 151, 300]):
        moments.add_numbers(X[:, start:stop], both[:, start:stop])
    found = RegressionProbes([0.1], 5).fit_moments(moments, target=1)
    for rows in torch.arange(X_validation.shape[1]).split([11, 200, 89]):
        found.observe_validation(X_validation[:, rows], y_validation[:, rows])
    whole = RegressionProbes([0.1], 5).fit(X, y, X_validation, y_validation)
    torch.testing.assert_close(found.choose().coef_, whole.coef_)


def test_chooses_the_penalty_that_is_best_on_validation():
    X, y, X_validation, y_validation = planted(probes=20, examples=30, noise=4.0)
    found = RegressionProbes([1e-3, 0.3, 10.0]).fit(X, y, X_validation, y_validation)
    errors = (found.predict(X_validation) - y_validation).square().mean(1)
    assert torch.allclose(errors, found.validation_squared_error_.amin(1), rtol=1e-4)
    assert len(set(found.penalty_.tolist())) > 1


def test_the_mean_is_kept_where_nothing_can_be_read():
    X, y, _, _ = planted(examples=60)
    level = y.mean(1, keepdim=True)
    found = RegressionProbes([1e-4, 1.0]).fit(X, y, X, 2 * level - y)
    assert found.penalty_.isinf().all()
    assert (found.coef_ == 0).all()
    assert torch.allclose(found.predict(X), level.expand_as(y))


def test_parts_and_several_numbers_at_once_change_nothing():
    X, y, X_validation, y_validation = planted()
    both = torch.stack([y.flip(1), y], 2)
    moments = Moments.zeros(len(X), WIDTH, 1, numbers=2)
    for start, stop in itertools.pairwise([0, 7, 150, 151, 300]):
        moments.add_numbers(X[:, start:stop].float(), both[:, start:stop])
    found = RegressionProbes([0.1]).fit_moments(moments, target=1)
    for rows in torch.arange(X_validation.shape[1]).split([11, 200, 89]):
        found.observe_validation(X_validation[:, rows], y_validation[:, rows])
    whole = RegressionProbes([0.1]).fit(X, y, X_validation, y_validation)
    assert torch.allclose(found.choose().predict(X_validation), whole.predict(X_validation), rtol=1e-6)
    assert torch.allclose(found.validation_squared_error_, whole.validation_squared_error_, rtol=1e-4)


def test_features_without_variation_take_no_part():
    X, y, X_validation, y_validation = planted()
    X[0, :, 3], X[1] = 5.0, 7.0
    found = RegressionProbes([0.1]).fit(X, y, X_validation, y_validation)
    assert found.coef_[0, 3] == 0
    assert (found.coef_[1] == 0).all()
    assert torch.allclose(found.predict(X_validation)[1], y[1].mean().expand(300))


def test_what_is_not_finite_is_refused():
    X, y, X_validation, y_validation = planted()
    for values in (X[1], y[1]):
        kept = values.clone()
        values[4] = torch.nan
        with pytest.raises(ProbekitError, match=r"probe 1: .* not all finite"):
            RegressionProbes([0.1]).fit(X, y, X_validation, y_validation)
        values.copy_(kept)
    with pytest.raises(ProbekitError, match="l2 is"):
        RegressionProbes([])


def test_an_eigenproblem_that_does_not_converge_is_solved_otherwise(monkeypatch):
    """Divide and conquer fails; regressions and classifiers are those that they are without."""

    def fitted():
        X, y, X_validation, y_validation = planted(probes=2)
        numbers = RegressionProbes([0.01]).fit(X, y, X_validation, y_validation)
        classes = [(part > part.mean()).long() for part in (y, y_validation)]
        return numbers.predict(X), *(
            solver.fit(X, classes[0], 2, X_validation, classes[1]).coef_
            for solver in (LDAProbes([0.1]), SoftmaxProbes([0.1], tolerance=1e-8))
        )

    def failing(matrix):
        raise torch.linalg.LinAlgError("failed to converge")

    expected = fitted()
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    torch.testing.assert_close(fitted(), expected)
