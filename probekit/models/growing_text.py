"""Texts that grow, and what an LM reads of them to predict their next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.corpus.examples import IGNORE, Batch


@dataclass(eq=False)
class Text:
    """A text that grows, as the LM reads it.

    Attributes:
        tokens: Ids, the separator first.
        carried: Which of `embeddings` each position carries, position t for token t + 1. There are as many
            as tokens when logits are asked for.
        embeddings: Mixed action embeddings `[dimensions]`; none where nothing is conditioned.
    """

    tokens: list[int]
    carried: list[int]
    embeddings: list[Tensor]


def window_start(length: int, window: int) -> int:
    """First of the tokens that are read of a text to predict the one after it.

    Args:
        length: Tokens of the text.
        window: Most tokens that are read at once.
    """
    step = window - window // 2
    return step * max(0, -(-(length - window) // step))


@dataclass(frozen=True)
class GrowingWindows:
    """What is read of some texts, padded at the end, where nothing before it can see.

    Attributes:
        tokens: `[texts, positions]`.
        sentence: For every position, the row of `embeddings` that it carries `[texts, positions]`.
        embeddings: `[sentences, dimensions]`; None where nothing is conditioned.
        lengths: Tokens of each that are no padding `[texts]`.
    """

    tokens: Tensor
    sentence: Tensor
    embeddings: Tensor | None
    lengths: Tensor

    def batch(self, targets: Tensor | None = None) -> Batch:
        """The same as a batch, which is to be mixed by `Known(embeddings)`.

        Args:
            targets: Next tokens, `IGNORE` where not scored `[texts, positions]`; unset: nothing is scored.
        """
        sentences = torch.zeros(0 if self.embeddings is None else len(self.embeddings)).to(self.tokens)
        return Batch(
            tokens=self.tokens,
            targets=torch.full_like(self.tokens, IGNORE) if targets is None else targets,
            document=np.arange(len(self.tokens)),
            context=torch.zeros(0, device=self.tokens.device),
            touched=sentences,
            actions=sentences,
            begun=sentences.bool(),
            sentence=self.sentence,
        )


class Known:
    """The mixing of embeddings that are mixed already.

    Args:
        embeddings: `[sentences, dimensions]`; None where nothing is conditioned, and so nothing mixed.
    """

    needs_scores = False

    def __init__(self, embeddings: Tensor | None) -> None:
        self._embeddings = embeddings

    def __call__(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Any) -> Tensor:
        """Mixes as `Mixing` has it."""
        assert self._embeddings is not None  # noqa: S101 - nothing is mixed where nothing is conditioned
        return self._embeddings


def read_windows(texts: Sequence[Text], window: int, device: torch.device) -> GrowingWindows:
    """What is read of some texts.

    Args:
        texts: At least one.
        window: Most tokens that are read at once.
        device: Where the tensors are to be.
    """
    starts = [window_start(len(text.tokens), window) for text in texts]
    lengths = np.array([len(text.tokens) for text in texts]) - starts
    places = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1) + np.array(starts)[:, None]
    tokens = np.stack([np.array(text.tokens)[place] for text, place in zip(texts, places, strict=True)])
    sentence = np.zeros_like(places)
    embeddings: list[Tensor] = []
    for row, text in enumerate(texts):
        if text.embeddings:
            used, found = np.unique(np.array(text.carried)[places[row]], return_inverse=True)
            sentence[row] = found + len(embeddings)
            embeddings += [text.embeddings[i] for i in used]
    return GrowingWindows(
        torch.from_numpy(tokens).to(device),
        torch.from_numpy(sentence).to(device),
        torch.stack(embeddings) if embeddings else None,
        torch.from_numpy(lengths).to(device),
    )
