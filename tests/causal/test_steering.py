"""Methods of steering, against PyTorch's own gradients and against steps taken one by one."""

import pytest
import torch

from probekit.causal.changes import along_gradient, along_vectors, along_weights, log_odds_gradient
from probekit.probing.results import LinearProbe

WIDTH, CLASSES, EXAMPLES = 6, 5, 40


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PROBE = LinearProbe(drawn(WIDTH, CLASSES, seed=0), drawn(CLASSES, seed=1))
X, TARGET = drawn(EXAMPLES, WIDTH, seed=2), torch.arange(EXAMPLES) % CLASSES
LENGTHS = torch.arange(1.0, CLASSES + 1)
CENTRED = (PROBE.coef.T - PROBE.coef.T.mean(0))[TARGET]


def by_autograd(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each target and its gradient, in float64."""
    x = x.double().requires_grad_()
    scores = x @ PROBE.coef.double() + PROBE.intercept.double()
    log_p = scores.log_softmax(1).gather(1, TARGET[:, None])[:, 0]
    (found,) = torch.autograd.grad(log_p.sum(), x)
    return log_p.detach(), found


def target_log_p(x: torch.Tensor) -> torch.Tensor:
    return PROBE.log_probabilities(x).gather(1, TARGET[:, None])[:, 0]


def test_the_gradient_of_the_log_odds():
    log_p, expected = by_autograd(X)
    found = log_odds_gradient(PROBE, X, TARGET).double() * (1 - log_p.exp())[:, None]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_it_does_not_vanish_where_the_probe_is_certain():
    certain = X + 3 * CENTRED
    log_p, expected = by_autograd(certain)
    nearly = (log_p < -1e-11) & (target_log_p(certain) == 0)
    assert nearly.any()
    found = log_odds_gradient(PROBE, certain, TARGET).double()
    scaled = expected / -torch.expm1(log_p)[:, None]
    torch.testing.assert_close(found[nearly], scaled[nearly], atol=1e-3, rtol=1e-3)
    assert (found.norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("strength", [2.0, -0.5])
def test_steps_follow_the_gradient_and_their_lengths_add_up(steps: int, strength: float):
    expected, path = X.double(), torch.zeros(EXAMPLES).double()
    for _ in range(steps):
        _, gradient = by_autograd(expected)
        step = strength * LENGTHS[TARGET, None] / steps * gradient / gradient.norm(dim=1, keepdim=True)
        expected, path = expected + step, path + step.norm(dim=1)
    found = along_gradient(PROBE, LENGTHS, steps)(X, TARGET, strength)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(path, abs(strength) * LENGTHS[TARGET].double())
    assert ((found - X).norm(dim=1) <= path + 1e-4).all()


def test_more_steps_of_a_path_as_long_reach_the_target_better():
    one, many = (target_log_p(along_gradient(PROBE, LENGTHS, n)(X, TARGET, 1.0)).mean() for n in (1, 20))
    fixed = target_log_p(along_weights(PROBE, LENGTHS)(X, TARGET, 1.0)).mean()
    assert target_log_p(X).mean() < fixed < one < many


def test_fixed_directions_and_their_lengths():
    vectors = drawn(CLASSES, WIDTH, seed=3)
    torch.testing.assert_close(along_vectors(vectors)(X, TARGET, 2.0), X + 2 * vectors[TARGET])
    added = along_weights(PROBE, LENGTHS)(X, TARGET, 2.0) - X
    torch.testing.assert_close(added.norm(dim=1), 2 * LENGTHS[TARGET])
    torch.testing.assert_close(torch.cosine_similarity(added, CENTRED), torch.ones(EXAMPLES))


def test_actions_without_examples_are_not_steered_to():
    for method in (along_gradient(PROBE, 0 * LENGTHS, 3), along_weights(PROBE, 0 * LENGTHS)):
        assert torch.equal(method(X, TARGET, 4.0), X)
