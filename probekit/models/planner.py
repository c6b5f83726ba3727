"""The planner, and the sentence encoders with gradients that may be trained with it.

Before training, such an encoder gives the embeddings that the corpus holds. Actions stay those of the frozen
encoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probekit.config import PlannerSettings
from probekit.data.corpus import Corpus, ranges
from probekit.data.encoders import PretrainedEncoder, SentenceEncoder, TfidfEncoder
from probekit.data.windows import Batch
from probekit.io import ArrayAppender, atomic_path
from probekit.progress import Progress

SENTENCES_AT_ONCE = 256
"""Sentences in one forward pass of a pre-trained encoder; like lengths go together, for little padding."""


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
        hidden = self.read(torch.cat([start, embeddings[:, :-1]], dim=1))
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


class TrainableEncoder(nn.Module):
    """A sentence encoder as a module: sentences in, embeddings with gradients out.

    Args:
        encoder: Where the weights start; a pre-trained model is trained in place.
    """

    def __init__(self, encoder: SentenceEncoder) -> None:
        super().__init__()
        self.dimensions = encoder.dimensions
        self.vectors = _TfidfVectors(encoder) if isinstance(encoder, TfidfEncoder) else _ModelVectors(encoder)

    def forward(self, sentences: Sequence[str]) -> Tensor:
        """Embeddings `[sentences, dimensions]` of norm 1, or 0 for a sentence with no known word."""
        return F.normalize(self.vectors(sentences), dim=-1)

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """The same without gradients: float32 `[sentences, dimensions]`."""
        if not len(sentences):
            return np.zeros((0, self.dimensions), dtype=np.float32)
        with torch.no_grad():
            return self(sentences).float().cpu().numpy()


class _TfidfVectors(nn.Module):
    """The linear map of a TF-IDF encoder is trained; word counts and their weights stay."""

    def __init__(self, encoder: TfidfEncoder) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.from_numpy(encoder.components.T.copy()))
        self._counts = encoder.counts

    def forward(self, sentences: Sequence[str]) -> Tensor:
        counts = self._counts(sentences)
        words, weights, begin = (
            torch.from_numpy(array).to(self.projection.device)
            for array in (counts.indices, counts.data, counts.indptr[:-1])
        )
        return F.embedding_bag(words, self.projection, begin, mode="sum", per_sample_weights=weights)


class _ModelVectors(nn.Module):
    """A sentence-transformers model, all of it; its dropout stays off, as the planner's does."""

    def __init__(self, encoder: PretrainedEncoder) -> None:
        super().__init__()
        self.model, self._pieces = encoder.model.eval(), encoder.pieces
        # Called `tokenize` before version 5.2 of the library.
        self._prepare = getattr(self.model, "preprocess", None) or self.model.tokenize

    def forward(self, sentences: Sequence[str]) -> Tensor:
        pieces = [self._pieces(sentence) for sentence in sentences]
        vectors = self._embed([piece for own in pieces for piece in own])
        if len(vectors) == len(sentences):
            return vectors
        owner = torch.repeat_interleave(torch.tensor([len(own) for own in pieces], device=vectors.device))
        rows = F.normalize(vectors, dim=-1)
        return rows.new_zeros(len(sentences), rows.shape[1]).index_add(0, owner, rows)

    def _embed(self, sentences: Sequence[str]) -> Tensor:
        device = next(self.model.parameters()).device
        order = np.argsort([-len(sentence) for sentence in sentences], kind="stable")
        parts = []
        for start in range(0, len(order), SENTENCES_AT_ONCE):
            features = self._prepare([sentences[i] for i in order[start : start + SENTENCES_AT_ONCE]])
            features = {n: f.to(device) if isinstance(f, Tensor) else f for n, f in features.items()}
            parts.append(self.model(features)["sentence_embedding"])
        return torch.cat(parts)[torch.from_numpy(np.argsort(order)).to(device)]


def embedded_context(encoder: TrainableEncoder, corpus: Corpus, batch: Batch) -> Tensor:
    """A batch's context, embedded by an encoder `[documents, sentences, dimensions]`.

    Every sentence that the planner reads is embedded, each once; the last ones that windows touch are not
    read, and keep the embeddings of the corpus.
    """
    width = batch.context.shape[1]
    row, within = np.divmod(batch.touched.cpu().numpy(), width)
    read = np.zeros(len(batch.documents), dtype=np.int64)
    np.maximum.at(read, row, within)
    if not read.any():
        return batch.context
    first = corpus.document_sentences[batch.documents]
    embeddings = encoder(corpus.sentence_texts(ranges(first, first + read)))
    is_read = torch.from_numpy(np.arange(width) < read[:, None]).to(batch.context.device)
    return batch.context.masked_scatter(is_read.unsqueeze(-1), embeddings.to(batch.context.dtype))


def write_embeddings(path: Path, encoder: TrainableEncoder, corpus: Corpus, progress: Progress) -> None:
    """Writes an encoder's embeddings of all sentences of a corpus, in their order, as `.npy`."""
    total = len(corpus.first_token)
    with (
        progress.task("embed sentences", total=total) as task,
        atomic_path(path) as temporary,
        ArrayAppender(temporary, np.float32, (encoder.dimensions,)) as rows,
    ):
        for start in range(0, total, SENTENCES_AT_ONCE):
            sentences = np.arange(start, min(start + SENTENCES_AT_ONCE, total))
            rows.append(encoder.encode(corpus.sentence_texts(sentences)))
            task.advance(len(sentences))
