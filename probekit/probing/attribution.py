"""Attribution: how much each token of a text contributes to what is read of one activation.

Two methods that replace the same thing, the embeddings of tokens, by the same baseline:

- integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365): the gradient of the score, averaged on
  the straight path from the baseline to the text, times the difference of the two. The contributions of all
  tokens add up to the difference of the scores of text and baseline.
- occlusion: the score of the text, less that of the text with this one token replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probekit.data.corpus import Corpus
from probekit.data.windows import chunks
from probekit.models.backends import Backend, Hook
from probekit.models.conditioning import EMBEDDING

TOKENS = 2048
"""Tokens in a forward pass."""

GRADIENT_TOKENS = 512
"""Tokens in a forward pass whose intermediate values are kept for the gradient."""


@dataclass(frozen=True)
class EmbeddingScore:
    """A score of the activation at one token, as a function of the embeddings of all tokens.

    Attributes:
        backend: The LM.
        tokens: What it reads `[positions]`.
        name: The hook of the activation.
        at: The position at which it is read.
        score: Of activations `[inputs, width]`, the score of each `[inputs]`.
    """

    backend: Backend
    tokens: Tensor
    name: str
    at: int
    score: Callable[[Tensor], Tensor]

    def __call__(self, embeddings: Tensor) -> Tensor:
        """The score of each input `[inputs]`, given embeddings `[inputs, positions, width]`."""
        read: list[Tensor] = []

        def put(activation: Tensor, hook: object = None) -> Tensor:
            return embeddings

        def keep(activation: Tensor, hook: object = None) -> None:
            read.append(activation[:, self.at])

        hooks: list[Hook] = [(EMBEDDING, put), (self.name, keep)]
        self.backend(self.tokens.expand(len(embeddings), -1), hooks, 1)
        return self.score(read[0])


def token_embeddings(backend: Backend, ids: Tensor) -> Tensor:
    """The embeddings of tokens, as the first block is given them: `[tokens]` to `[tokens, width]`."""
    found: list[Tensor] = []

    def keep(activation: Tensor, hook: object = None) -> None:
        found.append(activation[:, 0])

    with torch.no_grad():
        for part in ids.split(TOKENS):
            backend(part[:, None], [(EMBEDDING, keep)], 1)
    return torch.cat(found)


def neutral_token(corpus: Corpus) -> int:
    """The most frequent token of a corpus, but for the separator."""
    counts = np.bincount(corpus.tokens)
    counts[corpus.separator] = 0
    return int(counts.argmax())


def integrated_gradients(
    score: Callable[[Tensor], Tensor], embeddings: Tensor, baseline: Tensor, steps: int
) -> Tensor:
    """The contribution of each token by integrated gradients, in units of the score.

    The integral is by Gauss-Legendre quadrature, which needs fewer steps than evenly spaced ones do.

    Args:
        score: Of embeddings `[inputs, positions, width]`, the score of each input `[inputs]`.
        embeddings: Of the text `[positions, width]`.
        baseline: What they are compared with `[positions, width]`.
        steps: Points of the path at which the gradient is taken.

    Returns:
        The contributions `[positions]`.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    share = torch.from_numpy((nodes + 1) / 2).to(embeddings)[:, None, None]
    weight = torch.from_numpy(weights / 2).to(embeddings)
    difference = embeddings - baseline
    mean = torch.zeros_like(embeddings)
    for part in chunks(steps, max(1, GRADIENT_TOKENS // len(embeddings))):
        path = (baseline + share[part] * difference).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(path).sum(), path)
        mean += torch.einsum("n,npw->pw", weight[part], gradient)
    return (difference * mean).sum(1)


def occlusion(score: Callable[[Tensor], Tensor], embeddings: Tensor, baseline: Tensor) -> Tensor:
    """By how much the score falls if a token's embedding alone is replaced by the baseline.

    Args:
        score: Of embeddings `[inputs, positions, width]`, the score of each input `[inputs]`.
        embeddings: Of the text `[positions, width]`.
        baseline: What replaces them `[positions, width]`.

    Returns:
        The difference for each token `[positions]`.
    """
    count = len(embeddings)
    found = []
    with torch.no_grad():
        whole = score(embeddings[None])
        for part in chunks(count, max(1, TOKENS // count)):
            rows = torch.arange(count, device=embeddings.device)[part]
            replaced = embeddings.repeat(len(rows), 1, 1)
            replaced[torch.arange(len(rows), device=embeddings.device), rows] = baseline[rows]
            found.append(whole - score(replaced))
    return torch.cat(found)
