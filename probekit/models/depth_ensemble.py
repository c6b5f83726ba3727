"""Depth ensembles: normalisations of late layers, a router that weighs them, and their losses.

The logits of k layers over a vocabulary of 50,000 take k times the memory of the LM's own. The losses apply
the head to a few tokens at a time and take gradients at once: what is kept is as large as the hidden states.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probekit.config import DepthSettings, DistillationSettings, MemberName
from probekit.errors import ProbekitError
from probekit.models.backends import Hook
from probekit.models.locations import NORM_IN, NORM_OUT, hook_name
from probekit.models.unembedding import find_unembedding, rows_at_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from probekit.models.frozen_lm import FrozenLM


@dataclass(frozen=True)
class Member:
    """A kind of tuning that is trained and compared.

    Attributes:
        reads: Which layers it reads: `last`, the last one alone; `late`, the last k; `repeated`, the last one
            k times, for as many parameters without any depth.
        distilled: Whether the layers learn from the last one.
    """

    reads: str
    distilled: bool = False

    def layers(self, depth: int, k: int) -> tuple[int, ...]:
        """The layers it reads of an LM of some depth, the last one last."""
        last = depth - 1
        return {"last": (last,), "late": (*range(depth - k, depth),), "repeated": (last,) * k}[self.reads]


MEMBERS: dict[MemberName, Member] = {
    "plain": Member("last"),
    "repeated": Member("repeated"),
    "ensemble": Member("late"),
    "distilled": Member("late", distilled=True),
}
"""The members of `depth.members`, by name."""


@dataclass(frozen=True)
class LateLayers:
    """Late layers, normalised and mixed.

    Attributes:
        states: Every layer's normalised states, which the head turns into its logits `[layers, ..., width]`.
        weights: The router's `[..., layers]`; they add up to 1.
        mixed: The weighted sum of the states, which the head turns into the ensemble's logits `[..., width]`.
    """

    states: Tensor
    weights: Tensor
    mixed: Tensor


class DepthEnsemble(nn.Module):
    """Normalisations of late layers, and the router.

    A layer's normalisation is the LM's own final norm, frozen, with a trainable scale and shift after it: as
    expressive as one with its own weights, whatever the norm, and equal to the LM's before training.

    Args:
        norm: The LM's final norm; copied.
        layers: Which layer each normalisation reads, the last one last; a layer may appear several times.
        depth: Layers of the LM.
        width: Features of the residual stream.
        top_k: How many weights of a token are kept; None keeps all.
        last_weight: About the weight that the last layer has before training, the others sharing the rest.
        seed: Seed of the router, which starts small.

    Attributes:
        layers: As given.
        read_names: Hooks that are read, each once, in the order in which they fire.
        names: Full TransformerLens names of all hooks it needs: those that are read, and the one it changes.
        trained: The trained parameters.
    """

    def __init__(
        self,
        norm: nn.Module,
        layers: Sequence[int],
        *,
        depth: int,
        width: int,
        top_k: int | None = None,
        last_weight: float = 0.9,
        seed: int = 0,
    ) -> None:
        super().__init__()
        k = len(layers)
        self.layers = tuple(layers)
        self._hook_of = [NORM_IN if i == depth - 1 else hook_name("hook_resid_post", i) for i in layers]
        self.read_names = tuple(dict.fromkeys(self._hook_of))
        self.names = (*self.read_names, NORM_OUT)
        self._top_k = None if top_k is None or top_k >= k else top_k
        self.norm = copy.deepcopy(norm).float().requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(k, width))
        self.shift = nn.Parameter(torch.zeros(k, width))
        self.router: nn.Linear | None = None
        if k > 1:
            self.router = nn.Linear(width, k)
            with torch.no_grad():
                generator = torch.Generator().manual_seed(seed)
                self.router.weight.copy_(0.1 / width * torch.randn(k, width, generator=generator))
                self.router.bias.fill_(math.log((1.0 - last_weight) / (k - 1)))
                self.router.bias[-1] = math.log(last_weight)

    @property
    def trained(self) -> list[nn.Parameter]:
        """Scales, shifts, and the router's weights."""
        router = [] if self.router is None else [*self.router.parameters()]
        return [self.scale, self.shift, *router]

    def forward(self, hidden: Mapping[str, Tensor]) -> LateLayers:
        """Normalises, weighs and mixes the activations `[..., width]` at all of `read_names`."""
        normed = {name: self.norm(hidden[name]) for name in self.read_names}
        each = zip(self._hook_of, self.scale, self.shift, strict=True)
        states = torch.stack([normed[hook] * scale + shift for hook, scale, shift in each])
        weights = self._weights(normed[NORM_IN])
        mixed = torch.einsum("...k,k...d->...d", weights.to(states.dtype), states)
        return LateLayers(states, weights, mixed)

    def hooks(self) -> list[Hook]:
        """The hooks with which a forward pass computes the ensemble's logits."""
        hidden: dict[str, Tensor] = {}

        def mix(activation: Tensor, hook: Any = None) -> Tensor:
            return self(hidden).mixed.to(activation.dtype)

        return [*self.reading_hooks(hidden), (NORM_OUT, mix)]

    def reading_hooks(self, hidden: dict[str, Tensor]) -> list[Hook]:
        """Hooks that put the activations that `forward` needs into a dictionary."""

        def reader(name: str) -> Hook:
            def keep(activation: Tensor, hook: Any = None) -> None:
                hidden[name] = activation

            return name, keep

        return [reader(name) for name in self.read_names]

    def _weights(self, last: Tensor) -> Tensor:
        """Weights of the layers for tokens, given their normalised last layer `[..., layers]`."""
        if self.router is None:
            return last.new_ones(*last.shape[:-1], 1)
        scores = self.router(last).float()
        if self._top_k is not None:
            # A softmax over the kept scores alone keeps the largest weights and renormalises them.
            kept = scores.topk(self._top_k, dim=-1)
            scores = torch.full_like(scores, -torch.inf).scatter(-1, kept.indices, kept.values)
        return scores.softmax(dim=-1)


def new_ensemble(
    member: MemberName, settings: DepthSettings, lm: FrozenLM, model: PreTrainedModel, seed: int
) -> DepthEnsemble:
    """An untrained ensemble that fits an LM.

    Args:
        member: Which layers it reads.
        settings: Their number, and the router's settings.
        lm: The LM.
        model: The same LM, not bridged.
        seed: Seed of the router.

    Raises:
        ProbekitError: The LM has too few layers, no final norm, or logits that are more than its head.
    """
    depth = lm.layers
    if settings.layers > depth:
        raise ProbekitError(
            f"depth.layers is {settings.layers}, but the LM has {depth} layers; it must be at most {depth}"
        )
    return DepthEnsemble(
        final_norm(lm, model),
        MEMBERS[member].layers(depth, settings.layers),
        depth=depth,
        width=model.get_output_embeddings().in_features,
        top_k=settings.top_k,
        last_weight=settings.last_weight,
        seed=seed,
    )


def final_norm(lm: FrozenLM, model: PreTrainedModel) -> nn.Module:
    """The norm before the head of an LM whose logits are the head of that norm.

    Raises:
        ProbekitError: There is none, or the logits are capped or scaled after the head.
    """
    unembed = find_unembedding(lm, model)
    if unembed.cap is not None or unembed.scale != 1:
        raise ProbekitError(
            f"{type(model).__name__} does more to its logits than its head does (it caps or scales them), so "
            "late layers have no logits of their own by that head alone; choose an LM whose head comes last"
        )
    return unembed.norm


@dataclass(frozen=True)
class DepthLoss:
    """The training loss of a depth ensemble (arXiv 2410.13077).

    Attributes:
        distillation: How the layers learn from the last one; None: not at all.
        layer_loss: Weight of every layer's own cross-entropy.
    """

    distillation: DistillationSettings | None = None
    layer_loss: float = 0.0

    def __call__(self, head: nn.Module, late: LateLayers, targets: Tensor) -> Tensor:
        """The loss summed over tokens, in nats.

        Args:
            head: The LM's head, a linear map.
            late: The layers at the tokens, `states` `[layers, tokens, width]`.
            targets: The next tokens `[tokens]`.
        """
        distilled = self.distillation if late.states.shape[0] > 1 else None
        by_layer = self.layer_loss > 0 or (distilled is not None and distilled.weight > 0)
        states = late.states.transpose(0, 1) if by_layer else late.states.new_empty(len(targets), 0, 1)

        def loss(mixed: Tensor, states: Tensor, targets: Tensor, *weights: Tensor) -> Tensor:
            total = F.cross_entropy(_logits(mixed, weights), targets, reduction="sum")
            if not by_layer:
                return total
            # Flat: of a batch that is not contiguous, the head would be read anew for every token.
            logits = _logits(states.flatten(0, 1), weights).unflatten(0, states.shape[:2])
            if self.layer_loss:
                each = targets[:, None].expand(-1, logits.shape[1])
                own = F.cross_entropy(logits.flatten(0, 1), each.flatten(), reduction="sum")
                total = total + self.layer_loss * own
            if distilled is not None:
                total = total + distilled.weight * _distillation(logits, distilled)
            return total

        at_once = rows_at_once(head, 1 + states.shape[1])
        return chunked_sum(loss, (late.mixed, states, targets), tuple(head.parameters()), at_once)


def _distillation(logits: Tensor, settings: DistillationSettings) -> Tensor:
    """Divergence of the layers from the last one, summed over tokens and layers, in nats.

    Args:
        logits: `[tokens, layers, vocabulary]`.
        settings: The direction.
    """
    log_p = logits.log_softmax(dim=-1)
    layers, last = log_p[:, :-1], log_p[:, -1:].detach()  # the last layer only teaches
    p, q = (layers, last) if settings.direction == "layer-from-last" else (last, layers)
    return (p.exp() * (p - q)).sum()


def layer_losses(head: nn.Module, late: LateLayers, targets: Tensor) -> Tensor:
    """Next-token losses of the ensemble and of every layer, in nats `[1 + layers, tokens]`.

    Args:
        head: The LM's head, a linear map.
        late: The layers at the tokens, `states` `[layers, tokens, width]`.
        targets: The next tokens `[tokens]`.
    """
    states = torch.cat([late.mixed[None], late.states])
    losses = torch.empty(states.shape[:2], device=targets.device)
    at_once = rows_at_once(head, len(states))
    for start in range(0, len(targets), at_once):
        part = slice(start, start + at_once)
        found = _logits(states[:, part].flatten(0, 1), tuple(head.parameters()))
        wanted = targets[part].expand(len(states), -1)
        losses[:, part] = F.cross_entropy(found, wanted.flatten(), reduction="none").view_as(wanted)
    return losses


def _logits(states: Tensor, head: Sequence[Tensor]) -> Tensor:
    """Float32 logits of a head, given as its weights, which may be of half precision."""
    return F.linear(states.to(head[0].dtype), *head).float()


def chunked_sum(
    function: Callable[..., Tensor], rows: Sequence[Tensor], weights: Sequence[Tensor], size: int
) -> Tensor:
    """The sum of a function's values over chunks of rows, with its gradients.

    Args:
        function: Called with a chunk of every one of `rows`, and all `weights`; returns a number.
        rows: Tensors whose first axis is cut.
        weights: Tensors that are passed whole.
        size: Rows of a chunk.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, *weights)):
        return _ChunkedSum.apply(function, len(rows), size, *rows, *weights)
    total = rows[0].new_zeros((), dtype=torch.float32)
    for start in range(0, len(rows[0]), size):
        total = total + function(*(part[start : start + size] for part in rows), *weights)
    return total


class _ChunkedSum(torch.autograd.Function):
    """Takes a chunk's gradients as soon as its value is computed, and scales them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], split: int, size: int, *tensors: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[3:]
        gradients = [torch.zeros_like(t) if w else None for t, w in zip(tensors, wanted, strict=True)]
        total = tensors[0].new_zeros((), dtype=torch.float32)
        # Made once: autocast keeps its copy of every leaf as long as it is on.
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
