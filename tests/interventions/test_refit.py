"""Probes fitted again on erased activations, from sums, against the same from the activations."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

from probekit.interventions.erasure import erased, inlp, leace, random_subspace
from probekit.interventions.refit import accuracies, predictions
from probekit.probing.solvers import Moments

CLASSES, WIDTH = 4, 10


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (4000,), generator=generator).clamp(max=2 + (torch.arange(4000) % 2))
    means = 1.5 * torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.double)
    x = torch.randn(4000, WIDTH, generator=generator, dtype=torch.double)
    return x @ torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.double) + means[y] + 3, y


def moments_of(x: torch.Tensor, y: torch.Tensor) -> Moments:
    return Moments.zeros(1, WIDTH, CLASSES, dtype=torch.double).add(x[None], y)


@pytest.mark.parametrize("make", [leace, lambda m: inlp(m, 1), lambda m: [random_subspace(m, 3, 0)]])
def test_erased_sums_are_those_of_erased_activations(data, make):
    x, y = data
    (eraser,) = make(moments_of(x, y))
    found, true = erased(moments_of(x, y), eraser), moments_of(eraser(x), y)
    torch.testing.assert_close(found.class_counts, true.class_counts)
    for name in ("class_sums", "mean", "scatter"):
        expected = getattr(true, name)
        error = (getattr(found, name) - expected).abs().max()
        assert error < 1e-5 * getattr(moments_of(x, y), name).abs().max(), name


def test_a_random_subspace_takes_as_many_dimensions_and_tells_nothing(data):
    x, y = data
    real, random = leace(moments_of(x, y))[0], random_subspace(moments_of(x, y), CLASSES - 1, 0)
    assert random.rank == real.rank == CLASSES - 1
    assert np.linalg.matrix_rank((x - random(x)).numpy() - (x - random(x)).mean(0).numpy(), tol=1e-3) == 3
    # What is left does not vary with what was taken away.
    gone = (x - random(x)) - (x - random(x)).mean(0)
    assert (gone.T @ (random(x) - random(x).mean(0)) / len(x)).abs().max() < 1e-3 * x.var()


def test_predictions_are_those_of_least_squares(data):
    x, y = data
    told = predictions(moments_of(x[:3000], y[:3000]), x[3000:])
    one_hot = torch.nn.functional.one_hot(y[:3000], CLASSES)
    expected = LinearRegression().fit(x[:3000], one_hot).predict(x[3000:]).argmax(1)
    assert (told == expected).mean() > 0.99


def test_after_erasing_nothing_but_the_prior_is_left(data):
    x, y = data
    fitted, asked, true = moments_of(x[:3000], y[:3000]), x[3000:].float(), y[3000:].numpy()
    found = accuracies(fitted, leace(fitted)[0], asked, true)
    prior = y[:3000].bincount().argmax().item()
    np.testing.assert_array_equal(found["prior_accuracy"], true == prior)
    np.testing.assert_array_equal(found["refitted_accuracy"], found["prior_accuracy"])
    assert found["fitted_accuracy"].mean() > found["prior_accuracy"].mean() + 0.2
    # A random subspace leaves most of it.
    kept = accuracies(fitted, random_subspace(fitted, 2, 0), asked, true)["refitted_accuracy"]
    assert kept.mean() > found["prior_accuracy"].mean() + 0.1
