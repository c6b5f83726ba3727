"""Ways of steering, against PyTorch's own gradients and against steps that are taken one by one."""

import pytest
import torch

from probekit.causal.changes import along_gradient, along_weights, straight, uphill
from probekit.probing.results import LinearProbe

WIDTH, CLASSES, SCENES = 6, 5, 40


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PROBE = LinearProbe(drawn(WIDTH, CLASSES, seed=0), drawn(CLASSES, seed=1))
X, TARGET = drawn(SCENES, WIDTH, seed=2), torch.arange(SCENES) % CLASSES
LENGTHS = torch.arange(1.0, CLASSES + 1)


def by_autograd(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probability of each target and its gradient, in float64."""
    x = x.double().requires_grad_()
    log_p = (
        (x @ PROBE.coef.double() + PROBE.intercept.double()).log_softmax(1).gather(1, TARGET[:, None])[:, 0]
    )
    (found,) = torch.autograd.grad(log_p.sum(), x)
    return log_p.detach(), found


def test_uphill_is_the_gradient_over_the_probability_of_the_others():
    log_p, expected = by_autograd(X)
    found = uphill(PROBE, X, TARGET).double() * (1 - log_p.exp())[:, None]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_uphill_is_there_where_the_probe_is_sure():
    sure = X + 3 * (PROBE.coef.T[TARGET] - PROBE.coef.T.mean(0))
    log_p, expected = by_autograd(sure)
    nearly = (log_p < -1e-11) & (PROBE.log_probabilities(sure).gather(1, TARGET[:, None])[:, 0] == 0)
    assert nearly.any()
    found = uphill(PROBE, sure, TARGET).double()
    scaled = expected / -torch.expm1(log_p)[:, None]
    torch.testing.assert_close(found[nearly], scaled[nearly], atol=1e-3, rtol=1e-3)
    assert (found.norm(dim=1) > 0.1).all()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("strength", [2.0, -0.5])
def test_steps_follow_the_gradient_and_are_as_long_as_the_way(steps: int, strength: float):
    expected, gone = X.double(), torch.zeros(SCENES).double()
    for _ in range(steps):
        _, gradient = by_autograd(expected)
        step = strength * LENGTHS[TARGET, None] / steps * gradient / gradient.norm(dim=1, keepdim=True)
        expected, gone = expected + step, gone + step.norm(dim=1)
    found = along_gradient(PROBE, LENGTHS, steps)(X, TARGET, strength)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(gone, abs(strength) * LENGTHS[TARGET].double())
    assert ((found - X).norm(dim=1) <= gone + 1e-4).all()


def test_more_steps_of_the_same_way_tell_the_target_better():
    def told(moved: torch.Tensor) -> float:
        return PROBE.log_probabilities(moved).gather(1, TARGET[:, None]).mean().item()

    one, many = (told(along_gradient(PROBE, LENGTHS, steps)(X, TARGET, 1.0)) for steps in (1, 20))
    fixed = told(along_weights(PROBE, LENGTHS)(X, TARGET, 1.0))
    assert told(X) < fixed < one < many


def test_straight_ways_are_as_long():
    vectors = drawn(CLASSES, WIDTH, seed=3)
    torch.testing.assert_close(straight(vectors)(X, TARGET, 2.0), X + 2 * vectors[TARGET])
    added = along_weights(PROBE, LENGTHS)(X, TARGET, 2.0) - X
    torch.testing.assert_close(added.norm(dim=1), 2 * LENGTHS[TARGET])
    centred = (PROBE.coef.T - PROBE.coef.T.mean(0))[TARGET]
    torch.testing.assert_close(torch.cosine_similarity(added, centred), torch.ones(SCENES))


def test_actions_that_nothing_is_known_of_are_not_moved_to():
    for way in (along_gradient(PROBE, 0 * LENGTHS, 3), along_weights(PROBE, 0 * LENGTHS)):
        assert torch.equal(way(X, TARGET, 4.0), X)
