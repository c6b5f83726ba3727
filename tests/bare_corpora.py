"""Corpora of numbers alone, for tests that walk through every token."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from probekit.data.codebook import Codebook
from probekit.data.corpus import SPLITS, Corpus


def bare_corpus(documents: Sequence[tuple[str, list[int]]], actions: int | None = 3, lead: int = 0) -> Corpus:
    """A corpus of some documents.

    Args:
        documents: Of each document its split and the tokens of each sentence.
        actions: Number of actions, drawn at random; None: every sentence has one of its own.
        lead: Tokens before the first sentence of a document that has one.
    """
    sizes = [1 + (lead + sum(sentences) if sentences else 0) for _, sentences in documents]
    starts = np.cumsum([0, *sizes])
    first = [
        start + 1 + lead + sum(sentences[:j])
        for start, (_, sentences) in zip(starts, documents, strict=False)
        for j in range(len(sentences))
    ]
    drawn = np.random.default_rng(0).integers(actions or 1, size=len(first))
    k = max(1, len(first)) if actions is None else actions
    return Corpus(
        folder=Path("nowhere"),
        tokens=np.arange(starts[-1]),
        document_tokens=starts,
        document_sentences=np.cumsum([0, *(len(sentences) for _, sentences in documents)]),
        first_token=np.array(first, dtype=np.int64),
        spans=np.zeros((len(first), 2), dtype=np.int64),
        split=np.array([SPLITS.index(split) for split, _ in documents], dtype=np.uint8),
        group=np.arange(len(documents)),
        embeddings=np.zeros((len(first), 1), dtype=np.float32),
        actions=(np.arange(len(first)) if actions is None else drawn).astype(np.int32),
        codebook=Codebook(np.zeros((k, 1), dtype=np.float32)),
        facts={"bos": "document", "chats": 0},
    )
