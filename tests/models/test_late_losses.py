"""Losses in chunks against the same written out at once, gradients too."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from probekit.config import DistillationSettings
from probekit.models.depth_ensemble import DepthLoss, LateLayers, chunked_sum, reader_losses

K, TOKENS, WIDTH, VOCABULARY = 3, 11, 5, 13


def parts(k: int = K, *, bias: bool = False) -> tuple[nn.Linear, dict[str, Tensor], Tensor]:
    """A head, what an ensemble is made of, and targets."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).double()
    leaves = {
        "states": torch.randn(k, TOKENS, WIDTH, dtype=torch.double, requires_grad=True),
        "scores": torch.randn(TOKENS, k, dtype=torch.double, requires_grad=True),
    }
    return head, leaves, torch.randint(VOCABULARY, (TOKENS,))


def late(leaves: dict[str, Tensor]) -> LateLayers:
    weights = leaves["scores"].softmax(-1)
    return LateLayers(leaves["states"], weights, torch.einsum("nk,knd->nd", weights, leaves["states"]))


def plainly(head: nn.Linear, leaves: dict[str, Tensor], targets: Tensor, loss: DepthLoss) -> Tensor:
    """The paper's loss with all logits at once, token by token and layer by layer."""
    weights = leaves["scores"].softmax(-1)
    logits = [head(state) for state in leaves["states"]]
    ensemble = sum(weights[:, i : i + 1] * one for i, one in enumerate(logits))
    total = F.cross_entropy(ensemble, targets, reduction="sum")
    for one in logits:
        total = total + loss.layer_loss * F.cross_entropy(one, targets, reduction="sum")
    if (distilled := loss.distillation) is not None:
        softened = [F.softmax(one, dim=-1) for one in logits]
        last = softened[-1].detach()
        for p in softened[:-1]:
            forward = (p * (p / last).log()).sum()
            backward = (last * (last / p).log()).sum()
            divergence = forward if distilled.direction == "layer-from-last" else backward
            total = total + distilled.weight * divergence
    return total


LOSSES = [
    DepthLoss(),
    DepthLoss(layer_loss=0.3),
    DepthLoss(DistillationSettings(weight=0.7)),
    DepthLoss(DistillationSettings(weight=0.7, direction="last-from-layer")),
    DepthLoss(DistillationSettings(weight=0.7), layer_loss=0.1),
    DepthLoss(DistillationSettings(weight=0.0)),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("at_once", [1, 4 * VOCABULARY, 10**9])
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradients_are_those_of_all_logits_at_once(loss: DepthLoss, at_once: int, bias: bool):
    head, leaves, targets = parts(bias=bias)
    asked = [*leaves.values(), *head.parameters()]
    expected = plainly(head, leaves, targets, loss)
    wanted = torch.autograd.grad(expected, asked)
    found = DepthLoss(loss.distillation, loss.layer_loss, at_once)(head, late(leaves), targets)
    gradients = torch.autograd.grad(3.0 * found, asked)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, 3.0 * other, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_takes_no_place():
    head, leaves, targets = parts()
    head.requires_grad_(False)
    DepthLoss(layer_loss=0.5)(head, late(leaves), targets).backward()
    assert head.weight.grad is None
    assert leaves["states"].grad.abs().min() > 0


def test_one_layer_is_not_distilled():
    head, leaves, targets = parts(k=1)
    found = DepthLoss(DistillationSettings(weight=5.0))(head, late(leaves), targets)
    assert found.item() == pytest.approx(
        F.cross_entropy(head(leaves["states"][0]), targets, reduction="sum").item()
    )


def test_without_gradients_the_same_number():
    head, leaves, targets = parts()
    loss = DepthLoss(DistillationSettings(), layer_loss=0.2, logits=40)
    with torch.no_grad():
        bare = loss(head, late(leaves), targets)
    assert bare.item() == pytest.approx(loss(head, late(leaves), targets).item())
    assert not bare.requires_grad


@pytest.mark.parametrize("at_once", [1, 10**9])
def test_readers_are_the_ensemble_and_its_layers(at_once: int):
    head, leaves, targets = parts()
    found = reader_losses(head, late(leaves), targets, logits=at_once)
    for reader, state in zip(found, [late(leaves).mixed, *leaves["states"]], strict=True):
        each = [-math.log(F.softmax(head(s), -1)[t].item()) for s, t in zip(state, targets, strict=True)]
        assert reader.tolist() == pytest.approx(each, rel=1e-5)


def test_never_more_rows_at_once_than_allowed():
    seen = []

    def function(rows: Tensor, weight: Tensor) -> Tensor:
        seen.append(len(rows))
        return (rows @ weight).square().sum()

    rows, weight = torch.randn(10, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    chunked_sum(function, [rows], [weight], 4).backward()
    assert seen == [4, 4, 2]
    expected = torch.autograd.grad((rows @ weight).square().sum(), [rows, weight])
    torch.testing.assert_close(rows.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])


def test_autocast_keeps_one_copy_of_a_trained_head():
    """It keeps what it cast a leaf to: there must not be a leaf for every chunk."""
    seen = set()

    def function(rows: Tensor, weight: Tensor) -> Tensor:
        seen.add(id(weight))
        return F.linear(rows, weight).float().square().sum()

    rows, weight = torch.randn(10, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        chunked_sum(function, [rows], [weight], 2).backward()
    assert len(seen) == 1
