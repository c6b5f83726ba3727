"""A GPT-2 with random weights and a corpus of random tokens, for benchmarks of speed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from probekit.data.codebook import Codebook
from probekit.data.corpus import Corpus
from probekit.data.tokenizer import train_tokenizer
from probekit.distributed import autocast


def random_gpt2(layers: int, width: int, heads: int, vocabulary: int, positions: int, **settings: Any) -> Any:
    """Makes a plain Hugging Face GPT-2; equal sizes give equal weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    defaults = {"bos_token_id": 0, "eos_token_id": 0, "architectures": ["GPT2LMHeadModel"]}
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        **(defaults | settings),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


def random_corpus(
    folder: Path,
    tokens: np.ndarray,
    document_tokens: np.ndarray,
    first_tokens: list[np.ndarray],
    *,
    split: np.ndarray,
    embeddings: np.ndarray,
    actions: np.ndarray,
    centroids: np.ndarray,
) -> Corpus:
    """Makes a corpus without text, whose sentences begin at the given tokens of each document."""
    train_tokenizer(["no text is read"], 257, folder / "tokenizer")
    return Corpus(
        folder=folder,
        tokens=tokens.astype(np.uint16),
        document_tokens=document_tokens,
        document_sentences=np.cumsum([0, *map(len, first_tokens)]),
        first_token=np.concatenate(first_tokens),
        spans=np.zeros((len(actions), 2), dtype=np.int64),
        split=split.astype(np.uint8),
        group=np.arange(len(split)),
        embeddings=embeddings.astype(np.float32),
        actions=actions.astype(np.int32),
        codebook=Codebook(centroids.astype(np.float32)),
        facts={"bos": "document", "chats": 0},
    )


def forward_flops(layers: int, width: int, window: int, tokens: int) -> float:
    """Operations of the layers' forward pass: 12 width^2 weights in a layer, and attention over the window.

    A multiplication and addition count as two. Attention is counted as it is commonly computed, including
    future positions.
    """
    return float(layers * (24 * width**2 + 4 * window * width) * tokens)


def product_dtype(device: torch.device, precision: str) -> torch.dtype:
    """The type in which matrices are multiplied at a setting of `training.precision`."""
    with autocast(device, precision):
        half = torch.is_autocast_enabled(device.type)
        return torch.get_autocast_dtype(device.type) if half else torch.float32
