"""Documents cut into tokens and sentences, a batch at a time, in whichever process.

Nothing here imports torch: processes that cut documents are to be small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from probekit.corpus.documents import Row, read_batch
from probekit.corpus.sentences import align, sentence_spans
from probekit.errors import ProbekitError

_CHARACTERS_AT_ONCE = 1 << 20
"""Tokens take a hundred times the memory of their characters before they are arrays."""


@dataclass(frozen=True)
class Cut:
    """A batch of documents, cut.

    Attributes:
        tokens: [tokens], before each document's own the separator.
        document_tokens: [documents] tokens of each, the separator included.
        document_sentences: [documents] sentences of each.
        first_token: [sentences] each sentence's first token, as a position in `tokens`.
        spans: [sentences, 2] character offsets in the document.
        planted_actions: [sentences], of planted corpora only.
    """

    tokens: NDArray[np.uint32]
    document_tokens: NDArray[np.int64]
    document_sentences: NDArray[np.int64]
    first_token: NDArray[np.int64]
    spans: NDArray[np.int64]
    planted_actions: NDArray[np.int32] | None


@dataclass(frozen=True)
class Cutter:
    """Cuts the batches of a file of documents.

    Attributes:
        documents: The file.
        tokenizer: File of the fast tokenizer, `tokenizer.json`.
        split_special_tokens: Whether special tokens that are written out in a text are text.
        separator: The token before every document.
        language: Of the sentence splitter.
        planted: Whether the documents carry their plan.
    """

    documents: Path
    tokenizer: Path
    split_special_tokens: bool
    separator: int
    language: str
    planted: bool

    def __call__(self, batch: int) -> Cut:
        """Cuts a batch, by its number.

        Raises:
            ProbekitError: The splitter finds other sentences than were planted.
        """
        rows = read_batch(self.documents, batch)
        texts = [row["text"] for row in rows]
        tokenizer = _tokenizer(self.tokenizer, self.split_special_tokens)
        tokens, first_token, spans = [], [], []
        begin = 0
        for text, (ids, offsets) in zip(texts, _encoded(tokenizer, texts), strict=True):
            aligned = align(text, sentence_spans(text, self.language), offsets)
            tokens.append(np.insert(ids, 0, self.separator))
            first_token.append(aligned.first_token + begin + 1)
            spans.append(aligned.spans)
            begin += len(tokens[-1])
        sentences = np.array([len(each) for each in spans], dtype=np.int64)
        return Cut(
            tokens=np.concatenate(tokens),
            document_tokens=np.array([len(each) for each in tokens], dtype=np.int64),
            document_sentences=sentences,
            first_token=np.concatenate(first_token),
            spans=np.concatenate(spans),
            planted_actions=_planted(rows, sentences) if self.planted else None,
        )


@lru_cache(maxsize=1)
def _tokenizer(file: Path, split_special_tokens: bool) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = split_special_tokens
    return tokenizer


def _encoded(
    tokenizer: Tokenizer, texts: list[str]
) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.int64]]]:
    """The tokens of each text and their character offsets [tokens, 2]."""
    ends = np.cumsum([len(text) for text in texts])
    for part in np.split(np.arange(len(texts)), np.flatnonzero(np.diff(ends // _CHARACTERS_AT_ONCE)) + 1):
        for encoding in tokenizer.encode_batch([texts[n] for n in part], add_special_tokens=False):
            ids = np.array(encoding.ids, dtype=np.uint32)
            yield ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def _planted(rows: list[Row], sentences: NDArray[np.int64]) -> NDArray[np.int32]:
    for row, found in zip(rows, sentences.tolist(), strict=True):
        if len(row["actions"]) != found:
            raise ProbekitError(
                f"document {row['name']!r} was planted with {len(row['actions'])} sentences, but the "
                f"splitter finds {found}; corpus.language must be 'en' for the planted corpus"
            )
    return np.concatenate([row["actions"] for row in rows]).astype(np.int32)
