"""Erasers against the authors' own implementation, random subspaces against projections, refitted probes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, LogisticRegression

from probekit.causal.erasure import (
    Eraser,
    RandomErasers,
    erased_moments,
    erasure_accuracies,
    inlp,
    leace,
    least_squares_predictions,
)
from probekit.probing.solvers import Moments

CLASSES, WIDTH, EXAMPLES = 4, 12, 4000


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations whose means differ by class, and the classes, which are not equally frequent."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (EXAMPLES,), generator=generator).clamp(max=2 + (torch.arange(EXAMPLES) % 2))
    mixing = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.double)
    means = 2 * torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.double)
    noise = torch.randn(EXAMPLES, WIDTH, generator=generator, dtype=torch.double)
    return noise @ mixing + means[y] + 5, y


def moments_of(x: torch.Tensor, y: torch.Tensor, classes: int = CLASSES) -> Moments:
    moments = Moments.zeros(1, WIDTH, classes, dtype=torch.double)
    for rows in torch.arange(len(y)).chunk(7):
        moments.add(x[None, rows], y[rows])
    return moments


def one_round(moments: Moments) -> Eraser:
    return inlp(moments, 1)


def refitted(x: torch.Tensor, y: torch.Tensor) -> float:
    """Accuracy of a probe that is fitted to the activations."""
    return LogisticRegression(C=1e6, max_iter=2000).fit(x, y).score(x, y)


def test_leace_is_that_of_its_authors(data):
    concept_erasure = pytest.importorskip("concept_erasure", reason="the reference is a test extra")
    x, y = data
    reference = concept_erasure.LeaceFitter(
        WIDTH, CLASSES, dtype=torch.double, shrinkage=False, constrain_cov_trace=False, svd_tol=1e-8
    )
    reference.update(x, torch.nn.functional.one_hot(y, CLASSES).double())
    eraser = leace(moments_of(x, y))
    assert eraser.rank == CLASSES - 1
    torch.testing.assert_close(eraser(x), reference.eraser(x), rtol=1e-4, atol=1e-4)


def test_a_refitted_probe_is_at_the_prior(data):
    x, y = data
    erased = leace(moments_of(x, y))(x)
    prior = torch.bincount(y).max().item() / len(y)
    assert refitted(x, y) > 0.7
    assert refitted(erased, y) == pytest.approx(prior, abs=0.02)
    cross = (erased - erased.mean(0)).T @ torch.nn.functional.one_hot(y, CLASSES).double()
    assert (cross / len(y)).abs().max() < 1e-5 * x.std()


def ill_conditioned() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations in float32 with variances from 2e-6 to 349, as of an LM's embeddings; classes."""
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    noise = torch.randn(EXAMPLES, WIDTH, generator=generator, dtype=torch.double)
    noise += torch.randn(CLASSES, WIDTH, generator=generator, dtype=torch.double)[y]
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.double)).Q
    scale = torch.logspace(np.log10(2e-6), np.log10(349), WIDTH, dtype=torch.double).sqrt()
    return (noise * scale @ rotation + 3).float(), y


def test_ill_conditioned_activations_are_erased_as_in_float64():
    """Against P = W^-1 U U' W with W = cov^-1/2 and U of whitened class means, from all examples at once."""
    x, y = ill_conditioned()
    exact = x.double()
    centred = exact - exact.mean(0)
    values, vectors = np.linalg.eigh((centred.T @ centred / len(x)).numpy())
    whiten, colour = (vectors * values**power @ vectors.T for power in (-0.5, 0.5))
    one_hot = torch.nn.functional.one_hot(y, CLASSES).double()
    left, singular, _ = np.linalg.svd(whiten @ (centred.T @ one_hot).numpy(), full_matrices=False)
    basis = left[:, singular > 1e-8 * singular[0]]
    eraser = leace(moments_of(x, y))
    projection = (eraser.left @ eraser.right).numpy()
    expected = colour @ basis @ basis.T @ whiten
    assert np.linalg.norm(projection - expected) < 1e-6 * np.linalg.norm(expected)
    erased = eraser(exact)
    cross = torch.from_numpy(whiten) @ (erased - erased.mean(0)).T @ one_hot / len(x)
    assert cross.abs().max() < 1e-6


def test_rounds_of_null_space_projection_erase_more_and_more(data):
    x, y = data
    accuracies = [refitted(x, y)]
    for rounds in (1, 2, 3):
        eraser = inlp(moments_of(x, y), rounds)
        assert eraser.rank == rounds * (CLASSES - 1)
        torch.testing.assert_close(eraser.left, eraser.right.T)
        once = eraser(x)
        torch.testing.assert_close(eraser(once), once, rtol=1e-4, atol=1e-4)
        accuracies.append(refitted(once, y))
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < accuracies[0] - 0.2


def test_classes_without_examples_and_constant_activations(data):
    x, y = data
    x = x.clone()
    x[:, 3] = 7.0
    eraser = leace(moments_of(x, y, classes=CLASSES + 2))
    assert eraser.rank == CLASSES - 1
    assert eraser(x).isfinite().all()
    assert torch.allclose(eraser(x)[:, 3], x[:, 3], atol=1e-5)


@pytest.mark.parametrize("make", [leace, one_round])
def test_erased_sums_are_those_of_erased_activations(data, make):
    x, y = data
    eraser = make(moments_of(x, y))
    found, true = erased_moments(moments_of(x, y), eraser), moments_of(eraser(x), y)
    torch.testing.assert_close(found.class_counts, true.class_counts)
    for name in ("class_sums", "mean", "scatter"):
        error = (getattr(found, name) - getattr(true, name)).abs().max()
        assert error < 1e-5 * getattr(moments_of(x, y), name).abs().max(), name


def generators(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng([0, n]) for n in range(count)]


@pytest.mark.parametrize("rank", [1, 3, WIDTH - 1])
def test_random_erasers_are_projections_onto_random_subspaces(data, rank):
    """Drawn without the subspaces, against subspaces: of one activation, in whitened coordinates."""
    x, y = data
    drawn = 20_000
    values, vectors = torch.linalg.eigh(moments_of(x, y).scatter[0] / len(x))
    whiten = vectors / values.sqrt() @ vectors.T
    erased = RandomErasers(moments_of(x, y), rank)(x[:1].expand(drawn, -1), generators(drawn))
    found = ((x[:1] - erased) @ whiten).numpy()
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
    # As in an orthogonal projection, what is lost is orthogonal to what is left.
    np.testing.assert_allclose((found * (z - found)).sum(1), 0, atol=1e-8 * scale**2)


def test_random_erasers_erase_no_more_dimensions_than_vary(data):
    x, y = data
    x = x.clone()
    x[:, 3] = 7.0
    eraser = RandomErasers(moments_of(x, y), WIDTH)
    assert (eraser.dimensions, eraser.rank) == (WIDTH - 1, WIDTH - 1)
    torch.testing.assert_close(eraser(x[:5], generators(5)), x.mean(0).expand(5, -1))
    some, none = (RandomErasers(moments_of(x, y), rank) for rank in (2, 0))
    torch.testing.assert_close(some(x[:5], generators(5))[:, 3], x[:5, 3])
    torch.testing.assert_close(none(x[:5], generators(5)), x[:5])
    torch.testing.assert_close(some(x.mean(0)[None], generators(1)), x.mean(0)[None])
    constant = torch.ones(40, WIDTH, dtype=torch.double)
    eraser = RandomErasers(moments_of(constant, y[:40]), 3)
    torch.testing.assert_close(eraser(constant[:2], generators(2)), constant[:2])


def test_predictions_are_those_of_least_squares(data):
    x, y = data
    found = least_squares_predictions(moments_of(x[:3000], y[:3000]), x[3000:], torch.tensor(1e-3))
    one_hot = torch.nn.functional.one_hot(y[:3000], CLASSES)
    expected = LinearRegression().fit(x[:3000], one_hot).predict(x[3000:]).argmax(1)
    assert (found == expected).mean() > 0.99


def test_after_erasure_of_all_that_varies_rounding_says_nothing():
    """A class has one activation: what erasure leaves of it differs between classes by rounding alone."""
    generator = torch.Generator().manual_seed(0)
    y = torch.multinomial(torch.tensor([0.5, 0.2, 0.2, 0.1]), 400, replacement=True, generator=generator)
    x = (5 + torch.randn(4, WIDTH, generator=generator))[y]
    moments = moments_of(x[:300], y[:300])
    found = erasure_accuracies(moments, leace(moments), x[300:], y[300:].numpy())
    assert found["fitted_accuracy"].all()
    np.testing.assert_array_equal(found["refitted_accuracy"], found["prior_accuracy"])


def test_after_erasure_only_the_prior_is_left(data):
    x, y = data
    moments, labels = moments_of(x[:3000], y[:3000]), y[3000:].numpy()
    found = erasure_accuracies(moments, leace(moments), x[3000:].float(), labels)
    np.testing.assert_array_equal(found["prior_accuracy"], labels == y[:3000].bincount().argmax().item())
    np.testing.assert_array_equal(found["refitted_accuracy"], found["prior_accuracy"])
    assert found["fitted_accuracy"].mean() > found["prior_accuracy"].mean() + 0.2
