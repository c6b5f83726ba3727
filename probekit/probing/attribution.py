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
from itertools import pairwise
from typing import NamedTuple

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

NODES = 4
"""Points at which the gradient is taken on a part of the path."""

PARTS = 8
"""Parts of the path at first: so many that what happens on it can hardly cancel unseen."""

TOLERANCE = 1e-3
"""By how much the contributions may miss the difference of the score; of one above 1, this share of it."""


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
            read.append(activation.flatten(2)[:, self.at])

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

    The path is cut in halves where the contributions miss the difference of the score most: real LMs turn
    sharply somewhere on it, and points at fixed places would pass that by. In every part the integral is by
    Gauss-Legendre quadrature. It ends where the misses of all parts add up to `TOLERANCE`.

    Args:
        score: Of embeddings `[inputs, positions, width]`, the score of each input `[inputs]`.
        embeddings: Of the text `[positions, width]`.
        baseline: What they are compared with `[positions, width]`.
        steps: Most points of the path at which the gradient is taken.

    Returns:
        The contributions `[positions]`.
    """
    nodes, weights = np.polynomial.legendre.leggauss(min(NODES, steps))
    places = torch.from_numpy((nodes + 1) / 2).to(embeddings)
    weight = torch.from_numpy(weights / 2).to(embeddings)
    difference = embeddings - baseline

    def score_at(share: float) -> float:
        with torch.no_grad():
            return float(score((baseline + share * difference)[None]))

    def part_of(start: float, end: float, score_start: float, score_end: float) -> _Part:
        path = baseline + (start + (end - start) * places)[:, None, None] * difference
        found = torch.zeros_like(embeddings)
        for at in chunks(len(path), max(1, GRADIENT_TOKENS // len(embeddings))):
            given = path[at].requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(score(given).sum(), given)
            found += torch.einsum("n,npw->pw", weight[at], gradient)
        contributions = (end - start) * (difference * found).sum(1)
        missed = abs(float(contributions.double().sum()) - (score_end - score_start))
        return _Part(missed, start, end, score_start, score_end, contributions)

    marks = np.linspace(0.0, 1.0, 1 + max(1, min(PARTS, steps // len(places)))).tolist()
    scores = [score_at(mark) for mark in marks]
    ends = zip(pairwise(marks), pairwise(scores), strict=True)
    parts = [part_of(*between, *scored) for between, scored in ends]
    taken = len(parts) * len(places)
    enough = TOLERANCE * max(1.0, abs(scores[-1] - scores[0]))
    while sum(part.missed for part in parts) > enough and taken + 2 * len(places) <= steps:
        worst = parts.pop(max(range(len(parts)), key=lambda number: parts[number].missed))
        middle = (worst.start + worst.end) / 2
        score_middle = score_at(middle)
        parts.append(part_of(worst.start, middle, worst.score_start, score_middle))
        parts.append(part_of(middle, worst.end, score_middle, worst.score_end))
        taken += 2 * len(places)
    return torch.stack([part.contributions for part in parts]).sum(0)


class _Part(NamedTuple):
    """A part of the path from the baseline to the text."""

    missed: float  # by how much the contributions miss the difference of the scores at its ends
    start: float  # as a share of the path, as is end
    end: float
    score_start: float
    score_end: float
    contributions: Tensor  # of the tokens `[positions]`


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
