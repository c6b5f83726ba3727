"""Losses of late layers' logits, which are never all there at once.

The logits of k layers over a vocabulary of 50,000 take k times the memory of the LM's own. Here the head is
applied to a few tokens at a time, and where gradients are wanted they are taken at once: what is kept is of
the size of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name all of PyTorch's users know

from probekit.config import DistillationSettings
from probekit.models.depth_ensemble import Late

LOGITS = 1 << 24
"""Logits that are there at once, of all layers together: bounds the memory, whatever the number of layers."""


@dataclass(frozen=True)
class LateLoss:
    """What a depth ensemble is trained on (arXiv 2410.13077).

    Attributes:
        distillation: How the layers learn from the last one; None: not at all.
        layer_loss: Weight of every layer's own cross-entropy.
        logits: Most logits at once.
    """

    distillation: DistillationSettings | None = None
    layer_loss: float = 0.0
    logits: int = LOGITS

    def __call__(self, head: nn.Module, late: Late, targets: Tensor) -> Tensor:
        """The loss summed over tokens, in nats.

        Args:
            head: The LM's head, a linear map.
            late: Of the tokens, `states` `[layers, tokens, width]`.
            targets: The next tokens `[tokens]`.
        """
        distilled = self.distillation if late.states.shape[0] > 1 else None
        by_layer = self.layer_loss > 0 or (distilled is not None and distilled.weight > 0)
        states = late.states.transpose(0, 1) if by_layer else late.states.new_empty(len(targets), 0, 1)

        def loss(mixed: Tensor, states: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
            total = F.cross_entropy(F.linear(mixed, *weights).float(), targets, reduction="sum")
            if by_layer:
                # Flat: of a batch that is not contiguous, the head would be read anew for every token.
                logits = F.linear(states.flatten(0, 1), *weights).float().unflatten(0, states.shape[:2])
                if self.layer_loss:
                    each = targets[:, None].expand(-1, logits.shape[1])
                    own = F.cross_entropy(logits.flatten(0, 1), each.flatten(), reduction="sum")
                    total = total + self.layer_loss * own
                if distilled is not None:
                    total = total + distilled.weight * _distillation(logits, distilled)
            return total

        at_once = max(1, self.logits // (_vocabulary(head) * (1 + states.shape[1])))
        return chunked_sum(loss, (late.mixed, states, targets), tuple(head.parameters()), at_once)


def reader_losses(head: nn.Module, late: Late, targets: Tensor, *, logits: int = LOGITS) -> Tensor:
    """Next-token losses of the ensemble, and behind it of every layer, in nats `[1 + layers, tokens]`.

    Args:
        head: The LM's head, a linear map.
        late: Of the tokens, `states` `[layers, tokens, width]`.
        targets: The next tokens `[tokens]`.
        logits: Most logits at once.
    """
    readers = torch.cat([late.mixed[None], late.states])
    losses = torch.empty(readers.shape[:2], device=targets.device)
    at_once = max(1, logits // (_vocabulary(head) * len(readers)))
    for start in range(0, len(targets), at_once):
        part = slice(start, start + at_once)
        found = head(readers[:, part].flatten(0, 1)).float()
        wanted = targets[part].expand(len(readers), -1)
        losses[:, part] = F.cross_entropy(found, wanted.flatten(), reduction="none").view_as(wanted)
    return losses


def chunked_sum(
    function: Callable[..., Tensor], rows: Sequence[Tensor], weights: Sequence[Tensor], size: int
) -> Tensor:
    """The sum of a function's values over chunks of rows, with its gradients.

    Args:
        function: Called with a chunk of every one of `rows`, and all `weights`; gives a number.
        rows: Tensors whose first axis is cut.
        weights: What is given whole.
        size: Rows of a chunk.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, *weights)):
        return _ChunkedSum.apply(function, len(rows), size, *rows, *weights)
    total = rows[0].new_zeros((), dtype=torch.float32)
    for start in range(0, len(rows[0]), size):
        total = total + function(*(part[start : start + size] for part in rows), *weights)
    return total


class _ChunkedSum(torch.autograd.Function):
    """Takes a chunk's gradients as soon as its value is there, and gives all that it held back."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], split: int, size: int, *tensors: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[3:]
        gradients = [torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)]
        total = tensors[0].new_zeros((), dtype=torch.float32)
        # Made once: autocast keeps what it casts a leaf to as long as it is on, a copy for each.
        weights = [t.detach().requires_grad_(w) for t, w in zip(tensors[split:], wanted[split:], strict=True)]
        for start in range(0, len(tensors[0]), size):
            parts = zip(tensors[:split], wanted[:split], strict=True)
            rows = [t[start : start + size].detach().requires_grad_(w) for t, w in parts]
            leaves = [*rows, *weights]
            with torch.enable_grad():
                value = function(*leaves)
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(value, asked, allow_unused=True))
            for i, gradient in enumerate(gradients):
                if gradient is not None and (part := next(found)) is not None:
                    (gradient[start : start + size] if i < split else gradient).add_(part)
            total += value.detach()
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        scaled = (None if g is None else g * upstream[0] for g in ctx.saved_tensors)
        return (None, None, None, *scaled)


def _distillation(logits: Tensor, settings: DistillationSettings) -> Tensor:
    """Divergence of the layers from the last one, summed over tokens and layers, in nats.

    It is times the squared temperature, so that its gradients keep their size (Hinton et al. 2015, section
    2).

    Args:
        logits: `[tokens, layers, vocabulary]`.
        settings: Direction, temperature, and whether the last layer learns too.
    """
    log_p = (logits / settings.temperature).log_softmax(dim=-1)
    layers, last = log_p[:, :-1], log_p[:, -1:]
    if settings.detach_teacher:
        last = last.detach()
    p, q = (layers, last) if settings.direction == "layer-from-last" else (last, layers)
    return settings.temperature**2 * (p.exp() * (p - q)).sum()


def _vocabulary(head: nn.Module) -> int:
    return int(next(iter(head.parameters())).shape[0])
