"""Probes fitted again on erased activations, from sums, against the same from the activations."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

from probekit.causal.erasure import RandomErasers, accuracies, erased, inlp, leace, predictions
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


@pytest.mark.parametrize("make", [leace, lambda m: inlp(m, 1)])
def test_erased_sums_are_those_of_erased_activations(data, make):
    x, y = data
    (eraser,) = make(moments_of(x, y))
    found, true = erased(moments_of(x, y), eraser), moments_of(eraser(x), y)
    torch.testing.assert_close(found.class_counts, true.class_counts)
    for name in ("class_sums", "mean", "scatter"):
        expected = getattr(true, name)
        error = (getattr(found, name) - expected).abs().max()
        assert error < 1e-5 * getattr(moments_of(x, y), name).abs().max(), name


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([0, n]) for n in range(count)]


@pytest.mark.parametrize("rank", [1, 3, WIDTH - 1])
def test_random_erasers_take_what_projections_onto_random_subspaces_do(data, rank):
    """Drawn without the subspaces, against subspaces: of one activation, in whitened coordinates."""
    x, y = data
    drawn = 20_000
    values, vectors = torch.linalg.eigh(moments_of(x, y).scatter[0] / len(x))
    whiten = vectors / values.sqrt() @ vectors.T
    taken = RandomErasers(moments_of(x, y), rank)(x[:1].expand(drawn, -1), generators(drawn))
    found = ((x[:1] - taken) @ whiten).numpy()
    z = ((x[:1] - x.mean(0)) @ whiten).numpy()[0]
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(drawn, WIDTH, rank)))[0]
    expected = np.einsum("nij,nkj,k->ni", basis, basis, z)
    scale = np.linalg.norm(z)
    for power in (1, 2, 3):
        # Along the activation, whose shares are a Beta variable, and in all directions.
        along = [((part @ z / scale**2) ** power).mean() for part in (found, expected)]
        assert along[0] == pytest.approx(along[1], abs=0.01)
    np.testing.assert_allclose(found.mean(0), expected.mean(0), atol=0.02 * scale)
    np.testing.assert_allclose(np.cov(found.T), np.cov(expected.T), atol=0.02 * scale**2)
    # As an orthogonal projection: what is lost is at a right angle to what is left.
    np.testing.assert_allclose((found * (z - found)).sum(1), 0, atol=1e-8 * scale**2)


def test_random_erasers_take_no_more_dimensions_than_vary(data):
    x, y = data
    x = x.clone()
    x[:, 3] = 7.0
    eraser = RandomErasers(moments_of(x, y), WIDTH)
    assert (eraser.dimensions, eraser.rank) == (WIDTH - 1, WIDTH - 1)
    erased_all = eraser(x[:5], generators(5))
    torch.testing.assert_close(erased_all, x.mean(0).expand(5, -1))
    some = RandomErasers(moments_of(x, y), 2)(x[:5], generators(5))
    torch.testing.assert_close(some[:, 3], x[:5, 3])
    none = RandomErasers(moments_of(x, y), 0)(x[:5], generators(5))
    torch.testing.assert_close(none, x[:5])
    constant = torch.ones(40, WIDTH, dtype=torch.double)
    torch.testing.assert_close(
        RandomErasers(moments_of(constant, y[:40]), 3)(constant[:2], generators(2)), constant[:2]
    )
    at_mean = RandomErasers(moments_of(x, y), 2)(x.mean(0)[None], generators(1))
    torch.testing.assert_close(at_mean, x.mean(0)[None])


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
