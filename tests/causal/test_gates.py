"""Hard concrete gates, against their distribution: draws, expected counts, gradients."""

import pytest
import torch

from probekit.causal.components import begun, drawn, expected_count, settled

LOCATIONS = torch.tensor([-4.0, -1.0, 0.0, 0.7, 4.0])


def draws(count: int = 20_000) -> torch.Tensor:
    return drawn(LOCATIONS, count, torch.Generator().manual_seed(0))


def test_the_expected_count_is_how_often_draws_are_not_zero():
    found = draws()
    assert ((found >= 0) & (found <= 1)).all()
    assert expected_count(LOCATIONS).item() == pytest.approx(
        (found > 0).float().sum(1).mean().item(), abs=0.02
    )
    # By symmetry a draw is 1 as often as one of the opposite location is 0.
    ones = (found == 1).float().mean(0)
    zeros = 1 - torch.stack([expected_count(-location[None]) for location in LOCATIONS])
    torch.testing.assert_close(ones, zeros, atol=0.02, rtol=0)


def test_settled_gates_are_the_medians_on_which_side_draws_are():
    found = settled(LOCATIONS)
    assert found[[0, 2, 4]].tolist() == [0.0, 0.5, 1.0]
    sides = [0, 1, 3, 4]  # the median of the symmetrical one is on neither
    assert torch.equal(found[sides] > 0.5, draws().median(0).values[sides] > 0.5)


def test_before_training_little_is_removed():
    assert settled(begun(3)).max() < 0.05
    assert drawn(begun(3), 5000, torch.Generator().manual_seed(0)).mean() < 0.2


def test_draws_are_the_seeds_and_their_gradient_is_that_of_the_mean():
    assert torch.equal(draws(10), draws(10))
    locations = torch.zeros(1, requires_grad=True)
    drawn(locations, 50_000, torch.Generator().manual_seed(0)).mean().backward()

    def mean(at: float) -> float:
        return drawn(torch.tensor([at]), 50_000, torch.Generator().manual_seed(0)).mean().item()

    assert locations.grad is not None
    assert locations.grad.item() == pytest.approx((mean(0.05) - mean(-0.05)) / 0.1, rel=1e-2)
