"""The planner: reads a document's sentences so far and scores the next sentence's action.

After arXiv 2410.12492, section 3: sentence embeddings with sinusoidal positions, a small Transformer encoder,
pooling, and a linear map to the K actions whose weights start as the codebook. Here the encoder is causal, so
that one pass scores every sentence of a document; the paper encodes every context on its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from probekit.config import PlannerSettings


class Planner(nn.Module):
    """Scores the action of every sentence of a document from the sentences before it.

    Args:
        settings: Width, layers, heads, pooling and dropout.
        codebook: Action embeddings `[actions, dimensions]`, the first weights of the output map.
        seed: Seed of all other weights.
    """

    def __init__(self, settings: PlannerSettings, codebook: Tensor, seed: int) -> None:
        super().__init__()
        actions, dimensions = codebook.shape
        self.pooling = settings.pooling
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.start = nn.Parameter(torch.randn(dimensions) / math.sqrt(dimensions))
            self.read = nn.Linear(dimensions, settings.width)
            layer = nn.TransformerEncoderLayer(
                settings.width,
                settings.heads,
                dim_feedforward=4 * settings.width,
                dropout=settings.dropout,
                batch_first=True,
                norm_first=True,
            )
            self.encoder = nn.TransformerEncoder(
                layer, settings.layers, norm=nn.LayerNorm(settings.width), enable_nested_tensor=False
            )
            self.to_dimensions = nn.Linear(settings.width, dimensions)
            self.to_scores = nn.Linear(dimensions, actions)
        with torch.no_grad():
            self.to_scores.weight.copy_(codebook)
            self.to_scores.bias.zero_()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores (logits) of every sentence's action.

        Args:
            embeddings: Sentence embeddings `[documents, sentences, dimensions]`, padded at the end. What is
                after a sentence never changes its scores, so padding needs no mask.

        Returns:
            Scores `[documents, sentences, actions]`; those of sentence j come from sentences 0 to j - 1,
            those of sentence 0 from a learned vector that stands for the beginning of a document.
        """
        documents, sentences, dimensions = embeddings.shape
        start = self.start.expand(documents, 1, dimensions)
        context = torch.cat([start, embeddings[:, :-1]], dim=1)
        hidden = self.read(context)
        hidden = hidden + sinusoidal_positions(sentences, hidden.shape[-1]).to(hidden)
        causal = nn.Transformer.generate_square_subsequent_mask(
            sentences, device=hidden.device, dtype=hidden.dtype
        )
        hidden = self.encoder(hidden, mask=causal, is_causal=True)
        if self.pooling == "mean":
            lengths = torch.arange(1, sentences + 1, device=hidden.device).unsqueeze(-1)
            hidden = hidden.cumsum(dim=1) / lengths
        return self.to_scores(self.to_dimensions(hidden))


def sinusoidal_positions(length: int, width: int) -> Tensor:
    """Sinusoidal position embeddings `[length, width]` (Vaswani et al. 2017, section 3.5), for any length."""
    position = torch.arange(length, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10_000.0) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate[: width // 2])
    return table
