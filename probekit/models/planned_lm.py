"""The planner-conditioned LM: planner, mixing, adapter, base LM and depth ensemble as one module."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from probekit.data.windows import IGNORE, Batch
from probekit.models.backends import Backend
from probekit.models.conditioning import Adapter, Conditioned
from probekit.models.depth_ensemble import DepthEnsemble
from probekit.models.mixing import Mixing
from probekit.models.planner import Planner, TrainableEncoder

CACHED_LOGITS = 1 << 21
"""Most logits whose cross-entropy is computed at once: 8 MiB in float32 stay in a processor's cache."""

GPU_LOGITS = 1 << 27
"""The same on a GPU, where what costs is the number of kernels."""


class PlannedLM(nn.Module):
    """An LM whose every token is conditioned on its sentence's action.

    Args:
        backend: Runs the base LM, which is frozen.
        planner: Scores actions; trained here only where the variant is joint. None where nothing is planned.
        adapter: Codebook and projections; None leaves the base LM alone.
        temperature: Of the softmax over scores.
        learn_temperature: Train the temperature, from that value on.
        encoder: The sentence encoder that is trained with the planner; unset: embeddings are the corpus's.
        depth: Computes the logits from several layers; None: they are the last layer's.
    """

    def __init__(
        self,
        backend: Backend,
        planner: Planner | None,
        adapter: Adapter | None,
        temperature: float,
        *,
        learn_temperature: bool = False,
        encoder: TrainableEncoder | None = None,
        depth: DepthEnsemble | None = None,
    ) -> None:
        super().__init__()
        self.backend, self.planner, self.adapter = backend, planner, adapter
        self.encoder, self.depth = encoder, depth
        self._temperature = temperature
        self.log_temperature: nn.Parameter | None = None
        if learn_temperature:
            device = None if adapter is None else adapter.codebook.device
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature), device=device))

    @property
    def names(self) -> tuple[str, ...]:
        """Full TransformerLens names of all hooks that are used."""
        return tuple(name for part in (self.adapter, self.depth) if part is not None for name in part.names)

    @property
    def temperature(self) -> float | Tensor:
        """Of the softmax over scores; a tensor with a gradient where it is trained."""
        return self._temperature if self.log_temperature is None else self.log_temperature.exp()

    def scores(self, batch: Batch) -> Tensor:
        """Planner scores of the touched sentences `[touched, actions]`, each computed once for the batch."""
        assert self.planner is not None  # noqa: S101 - only what needs scores asks for them
        return self.planner(batch.context).flatten(0, 1)[batch.touched]

    def embeddings(self, batch: Batch, mixing: Mixing, scores: Tensor | None = None) -> Tensor:
        """Mixed action embeddings of the touched sentences `[touched, dimensions]`, empty without an adapter.

        The arguments are those of `conditioned`.
        """
        if self.adapter is None:
            return batch.context.new_empty(0)
        if scores is None:
            scores = self.scores(batch) if mixing.needs_scores else batch.context.new_empty(0)
        return mixing(scores, batch.actions, self.adapter.codebook, self.temperature)

    def forward(self, batch: Batch, mixing: Mixing, scores: Tensor | None = None) -> Tensor:
        """Next-token logits `[windows, positions, vocabulary]`; the arguments are those of `conditioned`."""
        read = self.conditioned(batch, mixing, scores)
        logits = self.backend.logits(read.tokens, read.hooks, read.positions)
        return logits if read.slots is None else read.slots.predictions(logits)

    def conditioned(self, batch: Batch, mixing: Mixing, scores: Tensor | None = None) -> Conditioned:
        """What the LM reads in one forward pass over a batch.

        Args:
            batch: The batch.
            mixing: How scores become embeddings.
            scores: The planner's scores if they are known already `[touched, actions]`.
        """
        read = self._planned(batch, mixing, scores)
        return read if self.depth is None else replace(read, hooks=[*read.hooks, *self.depth.hooks()])

    def late_hidden(self, batch: Batch, mixing: Mixing, scores: Tensor | None = None) -> dict[str, Tensor]:
        """What the depth ensemble reads at every position, by hook `[windows, positions, width]`.

        No logits are computed; the arguments are those of `conditioned`.
        """
        assert self.depth is not None  # noqa: S101 - only ensembles are asked
        read = self._planned(batch, mixing, scores)
        hidden: dict[str, Tensor] = {}
        reading = self.depth.reading_hooks(hidden)
        self.backend(read.tokens, [*read.hooks, *reading], len(reading), read.positions)
        if read.slots is None:
            return hidden
        return {name: read.slots.predictions(activation) for name, activation in hidden.items()}

    def _planned(self, batch: Batch, mixing: Mixing, scores: Tensor | None) -> Conditioned:
        """What the LM reads, conditioned on actions alone."""
        if self.adapter is None:
            return Conditioned(batch.tokens)
        return self.adapter.conditioned(batch.tokens, self.embeddings(batch, mixing, scores), batch.sentence)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every next token in nats `[windows, positions]`, zero where the target is `IGNORE`.

    Equal to `cross_entropy` of the logits in float32, which are never all in memory, nor is their gradient.
    """
    losses: Tensor = _CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
    return losses.view(targets.shape)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of rows of logits `[rows, vocabulary]`, a few rows at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return torch.cat(
            [
                nn.functional.cross_entropy(part.float(), wanted, ignore_index=IGNORE, reduction="none")
                for part, wanted in zip(*_parts(logits, targets), strict=True)
            ]
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        weights = torch.where(targets == IGNORE, 0.0, gradients[0])[:, None]
        found = torch.empty_like(logits)
        for out, part, wanted, weight in zip(*_parts(found, logits, targets, weights), strict=True):
            probabilities = part.float().softmax(dim=-1).mul_(weight)
            out.copy_(probabilities.scatter_add_(1, wanted.clamp_min(0)[:, None], -weight))
        return found, None


def _parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Tensors of as many rows, cut into parts; the first are logits."""
    at_once = CACHED_LOGITS if tensors[0].device.type == "cpu" else GPU_LOGITS
    rows = max(1, at_once // tensors[0].shape[1])
    return [tensor.split(rows) for tensor in tensors]
