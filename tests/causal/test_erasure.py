"""Erasers against the authors' own implementation, and against probes that are fitted again."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from probekit.causal.erasure import inlp, leace
from probekit.probing.solvers import Moments

CLASSES, WIDTH, EXAMPLES = 4, 12, 3000


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations of two probes, in which classes are told by their means, and their classes."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (EXAMPLES,), generator=generator)
    mixing = torch.randn(2, WIDTH, WIDTH, generator=generator, dtype=torch.double)
    means = 2 * torch.randn(2, CLASSES, WIDTH, generator=generator, dtype=torch.double)
    noise = torch.randn(2, EXAMPLES, WIDTH, generator=generator, dtype=torch.double)
    return noise @ mixing + means[:, y] + 5, y


def moments_of(X: torch.Tensor, y: torch.Tensor, classes: int = CLASSES) -> Moments:
    moments = Moments.zeros(len(X), WIDTH, classes, dtype=torch.double)
    for rows in torch.arange(len(y)).chunk(7):
        moments.add(X[:, rows], y[rows])
    return moments


def test_leace_is_that_of_its_authors(data):
    concept_erasure = pytest.importorskip("concept_erasure", reason="the reference is a test extra")
    X, y = data
    for x, eraser in zip(X, leace(moments_of(X, y)), strict=True):
        reference = concept_erasure.LeaceFitter(
            WIDTH, CLASSES, dtype=torch.double, shrinkage=False, constrain_cov_trace=False, svd_tol=1e-8
        )
        reference.update(x, torch.nn.functional.one_hot(y, CLASSES).double())
        assert eraser.rank == CLASSES - 1
        torch.testing.assert_close(eraser(x), reference.eraser(x), rtol=1e-4, atol=1e-4)


def refitted(x: torch.Tensor, y: torch.Tensor) -> float:
    """Accuracy of a probe that is fitted on activations as they are."""
    return LogisticRegression(C=1e6, max_iter=2000).fit(x, y).score(x, y)


def test_a_probe_fitted_again_is_at_the_prior(data):
    X, y = data
    prior = torch.bincount(y).max().item() / len(y)
    for x, eraser in zip(X, leace(moments_of(X, y)), strict=True):
        assert refitted(x, y) > 0.7
        assert refitted(eraser(x), y) == pytest.approx(prior, abs=0.02)
        cross = (eraser(x) - eraser(x).mean(0)).T @ torch.nn.functional.one_hot(y, CLASSES).double()
        assert (cross / len(y)).abs().max() < 1e-5 * x.std()


def test_rounds_of_null_space_projection_take_more_and_more(data):
    X, y = data
    moments = moments_of(X, y)
    accuracies = [refitted(X[0], y)]
    for rounds in (1, 2, 3):
        eraser = inlp(moments, rounds)[0]
        assert eraser.rank == rounds * (CLASSES - 1)
        torch.testing.assert_close(eraser.left, eraser.right.T)
        once = eraser(X[0])
        torch.testing.assert_close(eraser(once), once, rtol=1e-4, atol=1e-4)
        accuracies.append(refitted(once, y))
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < accuracies[0] - 0.2


def test_leace_changes_least(data):
    """Less than projecting orthogonally, which takes as much away."""
    X, y = data
    moments = moments_of(X, y)
    for x, least, projected in zip(X, leace(moments), inlp(moments, 3), strict=True):
        assert (least(x) - x).square().sum() < (projected(x) - x).square().sum()
        assert torch.allclose(least(x).mean(0), x.mean(0), atol=1e-4)


def test_classes_without_examples_and_flat_activations(data):
    X, y = data
    X = X.clone()
    X[:, :, 3] = 7.0
    for x, eraser in zip(X, leace(moments_of(X, y, classes=CLASSES + 2)), strict=True):
        assert eraser.rank == CLASSES - 1
        assert eraser(x).isfinite().all()
        assert torch.allclose(eraser(x)[:, 3], x[:, 3], atol=1e-5)
