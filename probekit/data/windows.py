"""Windows of tokens, and batches of them with sentences and actions.

`special_tokens.bos_rule_for` decides where an LM reads a beginning-of-sequence token; it is put there here.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from probekit.data.corpus import Corpus, ranges

IGNORE = -100
"""Target of a position whose loss does not count: the default `ignore_index` of PyTorch's cross-entropy."""


@dataclass(frozen=True)
class Windows:
    """Windows over documents' tokens; every token but the separator is scored in exactly one window.

    Attributes:
        document: Document of each window `[windows]`.
        start: Where its inputs begin in `corpus.tokens` `[windows]`.
        length: Number of its inputs `[windows]`; its targets are the same tokens shifted by one.
        scored: How many of its last targets count `[windows]`.
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    scored: np.ndarray

    def __len__(self) -> int:
        return len(self.document)

    def __getitem__(self, rows: np.ndarray | slice) -> Windows:
        return Windows(*(getattr(self, field.name)[rows] for field in fields(self)))


def chunks(count: int, size: int) -> list[slice]:
    """Slices that cut `count` rows into batches of `size`."""
    return [slice(i, i + size) for i in range(0, count, size)]


def cut_windows(
    corpus: Corpus, documents: np.ndarray, window: int, stride: int, *, to_end: bool = False
) -> Windows:
    """Cuts documents into windows of at most `window` inputs that advance by `stride` tokens.

    A document's first window scores all its targets, each later one its last `stride`. The last one is
    shorter: if it were moved back to full length, its last position would always be a document's end, and an
    LM would learn so. A document without targets has no window.

    An LM that never reads the separator begins with a document's first token, which it does not predict. For
    one that reads it in every window, a later window's first input, which must not be scored, is replaced by
    it (`input_tokens`): such windows advance by less than their length.

    Args:
        corpus: The corpus.
        documents: Numbers of the documents, ascending.
        window: Most inputs.
        stride: Tokens by which windows advance.
        to_end: Whether a document's last token, which predicts nothing, is an input too.
    """
    begin = corpus.document_tokens[documents] + (corpus.bos_rule == "none")
    targets = np.maximum(corpus.document_tokens[documents + 1] - begin - (not to_end), 0)
    if corpus.bos_rule == "every-window":
        stride = min(stride, window - 1)
    windows = (targets > 0) + np.ceil(np.maximum(targets - window, 0) / stride).astype(np.int64)
    document = np.repeat(documents, windows)
    number = ranges(np.zeros_like(windows), windows)
    start = number * stride
    length = np.minimum(window, np.repeat(targets, windows) - start)
    scored = np.where(number == 0, length, length - (window - stride))
    return Windows(document, np.repeat(begin, windows) + start, length, scored)


def beginnings(corpus: Corpus, windows: Windows) -> np.ndarray:
    """How many sentences with an action have their first token scored in each window `[windows]`."""
    last = windows.start + windows.length
    begun, before = (
        np.searchsorted(corpus.first_token, at, side="right") for at in (last, last - windows.scored)
    )
    with_action = np.append(0, np.cumsum(corpus.with_action))
    return with_action[begun] - with_action[before]


@dataclass(frozen=True)
class Batch:
    """A batch of windows, padded at the end.

    Attributes:
        tokens: Inputs `[windows, positions]`.
        targets: Next tokens, `IGNORE` at padding and where not scored `[windows, positions]`.
        document: Document of each window `[windows]`, on the CPU.
        context: Sentence embeddings of the batch's documents, from each document's beginning to the last
            sentence that a window touches `[documents, sentences, dimensions]`.
        touched: The sentences that windows touch, as rows of `context` flattened over its first two
            dimensions `[touched]`.
        actions: True actions of the touched sentences `[touched]`.
        begins: Whether a touched sentence has an action to predict, and its first token is scored in the
            batch `[touched]`; each is scored in exactly one window.
        sentence: For every position, the row of `touched` whose sentence holds the next token
            `[windows, positions]`: position t carries the action of token t + 1, a document's last one that
            of its own sentence.
    """

    tokens: Tensor
    targets: Tensor
    document: np.ndarray
    context: Tensor
    touched: Tensor
    actions: Tensor
    begins: Tensor
    sentence: Tensor

    @property
    def documents(self) -> np.ndarray:
        """The document of each row of `context` `[documents]`."""
        return np.unique(self.document)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "document"}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items()})


def input_tokens(corpus: Corpus, windows: Windows) -> Tensor:
    """The inputs of windows alone, padded at the end `[windows, positions]`.

    For an LM that reads the separator in every window, it takes the place of a later window's first token.
    """
    return _tokens_at(corpus, windows, _indices(windows)[0])


def close_texts(tokens: Tensor, lengths: Tensor, closing: int) -> tuple[Tensor, Tensor]:
    """Puts a token at the end of every text.

    Args:
        tokens: The texts, padded at the end `[texts, positions]`.
        lengths: Tokens of each text `[texts]`.
        closing: Id of the token to put there.

    Returns:
        The tokens, and which of them are no padding, bool; both `[texts, positions + 1]`.
    """
    tokens = torch.nn.functional.pad(tokens, (0, 1)).scatter(1, lengths[:, None], closing)
    return tokens, torch.arange(tokens.shape[1], device=tokens.device) <= lengths[:, None]


def _tokens_at(corpus: Corpus, windows: Windows, index: np.ndarray) -> Tensor:
    tokens = corpus.tokens[index].astype(np.int64)
    if corpus.bos_rule == "every-window":
        tokens[:, 0] = corpus.tokens[corpus.document_tokens[windows.document]]
    return torch.from_numpy(tokens)


def collate(corpus: Corpus, windows: Windows) -> Batch:
    """Reads windows from the corpus into a batch."""
    index, inside = _indices(windows)
    positions = np.arange(index.shape[1])
    scored = inside & (positions >= (windows.length - windows.scored)[:, None])
    next_tokens = corpus.tokens[np.minimum(index + 1, len(corpus.tokens) - 1)].astype(np.int64)
    next_sentence = np.searchsorted(corpus.first_token, index + 1, side="right") - 1
    touched, sentence = np.unique(next_sentence, return_inverse=True)

    # The context: embeddings of each document's sentences up to the last one touched.
    documents, row = np.unique(corpus.document_of(touched), return_inverse=True)
    first = corpus.document_sentences[documents]
    within = touched - first[row]
    needed = np.zeros(len(documents), dtype=np.int64)
    np.maximum.at(needed, row, within + 1)
    context = np.zeros((len(documents), needed.max(), corpus.embeddings.shape[1]), dtype=np.float32)
    context[np.arange(needed.max()) < needed[:, None]] = corpus.embeddings[ranges(first, first + needed)]
    return Batch(
        tokens=_tokens_at(corpus, windows, index),
        targets=torch.from_numpy(np.where(scored, next_tokens, IGNORE)),
        document=windows.document,
        context=torch.from_numpy(context),
        touched=torch.from_numpy(row * context.shape[1] + within),
        actions=torch.from_numpy(corpus.actions[touched].astype(np.int64)),
        begins=torch.from_numpy(
            np.isin(corpus.first_token[touched], index[scored] + 1) & corpus.with_action[touched]
        ),
        sentence=torch.from_numpy(sentence.reshape(index.shape)),
    )


def _indices(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the inputs in the corpus's tokens, and which are not padding `[windows, positions]`."""
    positions = np.arange(windows.length.max())
    inside = positions < windows.length[:, None]
    return np.where(inside, windows.start[:, None] + positions, windows.start[:, None]), inside


def document_batch(corpus: Corpus, documents: np.ndarray) -> tuple[Tensor, Tensor]:
    """All sentences of some documents, padded at the end, as the planner reads them.

    Returns:
        Embeddings `[documents, sentences, dimensions]` and actions `[documents, sentences]`, `IGNORE` at
        padding and for a sentence that has none to predict.
    """
    first, last = corpus.document_sentences[documents], corpus.document_sentences[documents + 1]
    filled = np.arange((last - first).max()) < (last - first)[:, None]
    rows = ranges(first, last)
    embeddings = np.zeros((*filled.shape, corpus.embeddings.shape[1]), dtype=np.float32)
    actions = np.full(filled.shape, IGNORE, dtype=np.int64)
    embeddings[filled] = corpus.embeddings[rows]
    actions[filled] = np.where(corpus.with_action[rows], corpus.actions[rows], IGNORE)
    return torch.from_numpy(embeddings), torch.from_numpy(actions)
