"""Documents cut into tokens and sentences, a batch at a time, in whichever process.

Nothing here imports torch: processes that cut documents are to be small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sentencex import get_sentence_boundaries
from tokenizers import Tokenizer

from probekit.data.readers import Row, read_batch
from probekit.errors import ProbekitError

# sentencex takes any string: what it does not know, "DE" and "german" too, it splits by English rules.
_LANGUAGE_CODE = re.compile(r"[a-z]{2,3}(-[a-z0-9]+)*")
_VISIBLE = re.compile(r"\S")
# A capital, a space of several bytes and a period ("C\u00a0.") make sentencex panic: it gets plain spaces.
_WIDE_SPACE = re.compile(r"[^\S\x00-\x7f]")
# Characters that sentencex sees at once: its time grows with the square of their number.
_WINDOW = 16_384
# What is taken to come next before it is there. Not `The`: behind a title, as in `Mr. The`, the splitter
# would begin a sentence with that.
_NEXT_WORD = " Word"


@dataclass(frozen=True)
class Alignment:
    """Which tokens belong to which sentence.

    Attributes:
        spans: [sentences, 2] character offsets, merged so that every sentence owns a token.
        first_token: [sentences] each sentence's first token, strictly increasing from 0. The tokens of
            sentence j are `first_token[j]:first_token[j + 1]`; the last sentence's go on to the end.
    """

    spans: NDArray[np.int64]
    first_token: NDArray[np.int64]


def sentence_spans(text: str, language: str = "en") -> NDArray[np.int64]:
    """Partitions a text into sentences.

    A line break always ends a sentence. White space between sentences belongs to the one before it, white
    space at the start of the text to the first one.

    Args:
        text: Any text.
        language: Lower-case language code. A language that sentencex has no rules for is split by those of
            a kindred one, in the end English.

    Returns:
        [sentences, 2] character offsets: the first sentence starts at 0, each starts where the one before it
        ends, the last ends at `len(text)`, and each holds a visible character. A blank text has none: [0, 2].

    Raises:
        ProbekitError: `language` is not a language code.
    """
    if not _LANGUAGE_CODE.fullmatch(language):
        raise ProbekitError(
            f"corpus.language is {language!r}: it must be a lower-case language code, such as en, de or pt-br"
        )
    starts: list[int] = []
    offset = 0
    for line in text.splitlines(keepends=True):
        if not line.isspace():
            starts += (offset + start for start in _visible_starts(line, language))
        offset += len(line)
    return _partition(np.unique(np.array(starts, dtype=np.int64)), len(text))


def complete_spans(text: str, language: str = "en") -> NDArray[np.int64]:
    """The sentences of a text that are over as far as it goes; the next token is in the one after them.

    A sentence is over when the splitter, given the text and a capitalised word behind it, begins a sentence
    at that word; a line break always ends one. What comes then may tell otherwise: `3.` is over until ` 14`
    follows, `etc.` until a word in small letters does, and a closing quotation mark belongs to the sentence
    before it. So the sentences of a longer text need not begin with these: ask again for every token.

    Args:
        text: Any text.
        language: As in `sentence_spans`.

    Returns:
        [sentences, 2] character offsets, as `sentence_spans` has them.
    """
    return np.minimum(sentence_spans(text + _NEXT_WORD, language)[:-1], len(text))


def align(text: str, spans: NDArray[np.int64], token_offsets: ArrayLike) -> Alignment:
    """Gives every token of a document to one of its sentences.

    A token belongs to the sentence of its first visible character (a byte-level BPE token may begin with the
    space before its word), or of its first character if it is all white space, but never to an earlier
    sentence than the token before it. A sentence left without a token is merged into the one before it or,
    at the start of the text, into the one after it.

    Args:
        text: The document.
        spans: What `sentence_spans` gave for it.
        token_offsets: [tokens, 2] character offsets, from a fast tokenizer's `return_offsets_mapping`.
            Special tokens, whose offsets are (0, 0), go with the token before them.

    Returns:
        The alignment; it is empty if there are no sentences or no tokens.
    """
    offsets = np.asarray(token_offsets, dtype=np.int64).reshape(-1, 2)
    if not len(spans) or not len(offsets):
        return Alignment(spans[:0], np.zeros(0, dtype=np.int64))
    sentences = np.searchsorted(spans[:, 0], _anchors(text, offsets), side="right") - 1
    kept, first_token = np.unique(np.maximum.accumulate(sentences), return_index=True)
    return Alignment(_partition(spans[kept, 0], len(text)), first_token.astype(np.int64, copy=False))


def _visible_starts(line: str, language: str) -> Iterator[int]:
    """Where a line's sentences start, each moved to its first visible character."""
    for start in _boundaries(_WIDE_SPACE.sub(" ", line), language):
        if visible := _VISIBLE.search(line, start):
            yield visible.start()


def _boundaries(line: str, language: str) -> Iterator[int]:
    """Where sentencex starts its segments of a line, seen through a window.

    Only the starts are used: its segments were not lossless in every version.
    """
    begin, size = 0, _WINDOW
    while begin < len(line):
        found = get_sentence_boundaries(language, line[begin : begin + size])
        yield from (begin + boundary["start_index"] for boundary in found)
        if begin + size >= len(line):
            return
        # The last segment may go on behind the window: the next one starts with it, or grows if it is all.
        last = found[-1]["start_index"]
        begin, size = begin + last, size if last else 2 * size


def _partition(starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Contiguous spans that begin at sorted `starts`, but the first at 0, and end at `length`."""
    edges = np.append(starts, length)
    edges[0] = 0
    return np.stack([edges[:-1], edges[1:]], axis=1)


def _anchors(text: str, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """The character of each token that decides which sentence the token belongs to."""
    starts, ends = offsets.T
    visible = np.flatnonzero(~np.fromiter(map(str.isspace, text), dtype=bool, count=len(text)))
    first_visible = np.append(visible, len(text))[np.searchsorted(visible, starts)]
    # Some tokenizers trim white space from the offsets, so that a token of it has (n, n). It belongs to the
    # sentence before it, as the character before n does.
    trimmed = starts == ends
    return np.where(first_visible < ends, first_visible, np.maximum(starts - trimmed, 0))


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
