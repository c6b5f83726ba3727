"""The planner-conditioned LM: planner, mixing, adapter and bridged base LM as one module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from probekit.corpus.examples import IGNORE, Batch
from probekit.models.conditioning import Adapter
from probekit.models.language_model import Hook
from probekit.models.mixing import Mixing
from probekit.models.planner import Planner

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class PlannedLM(nn.Module):
    """An LM whose every token is conditioned on its sentence's action.

    Args:
        bridged: The base LM, frozen.
        planner: Scores actions; trained here only where the variant is joint. None where nothing is planned.
        adapter: Codebook and projections; None leaves the base LM alone.
        temperature: Of the softmax over scores.
    """

    def __init__(
        self, bridged: TransformerBridge, planner: Planner | None, adapter: Adapter | None, temperature: float
    ) -> None:
        super().__init__()
        self.bridged = bridged
        self.planner = planner
        self.adapter = adapter
        self.temperature = temperature

    def scores(self, batch: Batch) -> Tensor:
        """Planner scores of the touched sentences `[touched, actions]`, each computed once for the batch."""
        assert self.planner is not None  # noqa: S101 - only what needs scores asks for them
        return self.planner(batch.context).flatten(0, 1)[batch.touched]

    def hooks(self, batch: Batch, mixing: Mixing, scores: Tensor | None = None) -> list[Hook]:
        """The hooks that condition one forward pass over a batch.

        Args:
            batch: The batch.
            mixing: How scores become embeddings.
            scores: The planner's scores if they are known already `[touched, actions]`.
        """
        if self.adapter is None:
            return []
        if scores is None:
            scores = self.scores(batch) if mixing.needs_scores else batch.context.new_empty(0)
        embeddings = mixing(scores, batch.actions, self.adapter.codebook, self.temperature)
        return self.adapter.hooks(embeddings, batch.sentence)

    def forward(self, batch: Batch, mixing: Mixing, scores: Tensor | None = None) -> Tensor:
        """Next-token logits `[windows, positions, vocabulary]`."""
        with self.bridged.hooks(fwd_hooks=self.hooks(batch, mixing, scores)):
            return self.bridged(batch.tokens, return_type="logits")


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every next token in nats `[windows, positions]`, zero where the target is `IGNORE`."""
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(targets.shape)
