"""Where sentences end, in documents and in text that is being generated, and which tokens they hold.

Nothing here imports torch, so that the processes that tokenise documents stay small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sentencex import get_sentence_boundaries
from tokenizers import Tokenizer

from probekit.data.chats import ChatEncoder
from probekit.data.documents import VISIBLE, Document, read_batch
from probekit.errors import ProbekitError
from probekit.io import read_array

# sentencex accepts any string, and splits what it does not know ("DE" and "german" too) by English rules.
_LANGUAGE_CODE = re.compile(r"[a-z]{2,3}(-[a-z0-9]+)*")
# A capital, a space of several bytes and a period ("C\u00a0.") make sentencex panic: it gets plain spaces.
_WIDE_SPACE = re.compile(r"[^\S\x00-\x7f]")
# sentencex sees this many characters at once: its time grows with the square of their number.
_WINDOW = 16_384
# What sentencex takes for the end of a sentence and no reader does: abbreviations of languages whose list
# there lacks them, initials and numbers that go on without white space, words of saying after a quotation.
_ABBREVIATIONS = {
    "ar": "د أ م ص هـ",
    "fr": "m mm art chap éd vol",
    "hi": "डॉ श्री पं प्रो",
    "pl": "godz prof tzn",
    "pt": "r n av",
    "sv": "kl t.ex",
    "tr": "vb dr",
}
_TITLES = {code: {f"{word}." for word in words.split()} for code, words in _ABBREVIATIONS.items()}
_LAST_WORD = re.compile(r"[^\s'’(«“\"-]+$")
_INITIAL = re.compile(r"(?:^|[\W\d_])[^\W\d_]\.$")
_QUOTATION = re.compile(r"[。！？!?.…][」』”’\"»]+$")
# An ellipsis ends a sentence before a capital, as three full stops do, for which sentencex knows it.
_ELLIPSIS = re.compile(r"(?<![.!?])…(?:\s?»|[”’\")])*\s+(?=[“«„¿¡\"'(—–]*\s?([^\W\d_]))")
# Ordinals with a full stop: before the name of a month in German, before any word in lower case in others.
_ORDINAL = re.compile(r"(?:^|[^\w.,])\d{1,4}\.$")
_ORDINALS = frozenset(["cs", "da", "et", "fi", "hr", "hu", "is", "lv", "nb", "nn", "no", "pl", "sk", "sl"])
_MONTH = re.compile(
    r"(Jan(uar)?|Jän(ner)?|Feb(ruar)?|März?|Apr(il)?|Mai|Juni?|Juli?|Aug(ust)?|Sept?(ember)?|Okt(ober)?"
    r"|Nov(ember)?|Dez(ember)?)\b"
)
_SAYING = re.compile(r"[—–-]\s*")
_EMOJI = re.compile(r"(?:[\u2600-\u27bf\U0001f000-\U0001faff\ufe0f\u200d]+\s*)+(?=[\w\"“«¿¡(])")
_JOINED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
# Stands for the text to come. Not `The`: after a title (`Mr. The`) the splitter would start a sentence there.
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
        language: Lower-case language code. A language that sentencex has no rules for is split by those of a
            related one, or of English.

    Returns:
        [sentences, 2] character offsets: the first sentence starts at 0, each starts where the one before it
        ends, the last ends at `len(text)`, and each holds a visible character. A text without any has none:
        [0, 2].

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
        if VISIBLE.search(line):
            starts += (offset + start for start in _visible_starts(line, language))
            starts += (offset + found.end() for found in _ELLIPSIS.finditer(line) if found[1].isupper())
        offset += len(line)
    return _partition(np.unique(np.array(starts, dtype=np.int64)), len(text))


def opening(text: str, sentences: int, language: str = "en") -> str:
    """The first sentences of a text, without the white space behind them; all of it if it has no more."""
    ends = sentence_spans(text, language)[:, 1]
    return text if len(ends) <= sentences else text[: ends[sentences - 1]].rstrip()


def complete_spans(text: str, language: str = "en") -> NDArray[np.int64]:
    """The finished sentences of a text; its next token belongs to the sentence after them.

    A sentence counts as finished if the splitter would start a new one were a capitalised word appended; a
    line break always finishes one. More text can revise this: `3.` is finished until ` 14` follows, `etc.`
    until a word in lower case does, and a closing quotation mark belongs to the sentence before it. So the
    finished sentences of a longer text need not begin with these: call this again for every token.

    Args:
        text: Any text.
        language: As for `sentence_spans`.

    Returns:
        [sentences, 2] character offsets, as from `sentence_spans`.
    """
    return np.minimum(sentence_spans(text + _NEXT_WORD, language)[:-1], len(text))


def align(text: str, spans: NDArray[np.int64], token_offsets: ArrayLike) -> Alignment:
    """Assigns every token of a document to one of its sentences.

    A token belongs to the sentence of its first visible character (a byte-level BPE token may begin with the
    space before its word), or of its first character if it is all white space, but never to an earlier
    sentence than the token before it. A sentence left without a token is merged into the one before it or,
    at the start of the text, into the one after it.

    Args:
        text: The document.
        spans: Its sentences, from `sentence_spans`.
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
    plain = _WIDE_SPACE.sub(" ", line)
    begin, size = 0, _WINDOW
    while begin < len(line):
        # Only the starts are used: sentencex's segments were not lossless in every version.
        found = get_sentence_boundaries(language, plain[begin : begin + size])
        starts = [boundary["start_index"] for boundary in found]
        for start in starts:
            if (visible := VISIBLE.search(line, begin + start)) and not _goes_on(
                line[max(0, visible.start() - 40) : visible.start()], line[visible.start() :][:20], language
            ):
                follows = VISIBLE.search(line, 0, visible.start())
                emoji = _EMOJI.match(line, visible.start()) if follows else None
                yield emoji.end() if emoji else visible.start()
        if begin + size >= len(line):
            return
        # The last segment may go on after the window: the next one starts with it, or is larger if it is all.
        begin, size = begin + starts[-1], size if starts[-1] else 2 * size


def _goes_on(before: str, after: str, language: str) -> bool:
    """Whether no reader would begin a sentence between what stands before and after."""
    said, joined = before.rstrip(), not before[-1:].isspace()
    if said.endswith("."):
        word = _LAST_WORD.search(said)
        if word and word[0].lower() in _TITLES.get(language.split("-")[0], ()):
            return True
        # `p. 5 a.C. a Roma`, `1867 r. w`: a capital would begin a sentence.
        if _INITIAL.search(said) and (joined or (after[0].islower() and after[0].title() != after[0])):
            return True
        of_language = language.split("-")[0]
        if _ORDINAL.search(said) and (
            (of_language in _ORDINALS and after[0].islower()) or (of_language == "de" and _MONTH.match(after))
        ):
            return True
        return joined and said[-2:-1].isdigit() and after[0].isdigit()
    if not _QUOTATION.search(said):
        return False
    if joined:
        return bool(_JOINED.match(after))
    saying = _SAYING.match(after)
    return bool(saying and after[saying.end() :][:1].islower())


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
    # Some tokenizers trim white space from the offsets, so that a token of white space has (n, n). It belongs
    # to the sentence before it, as the character before n does.
    trimmed = starts == ends
    return np.where(first_visible < ends, first_visible, np.maximum(starts - trimmed, 0))


class TokenizedBatch(NamedTuple):
    """The tokens and sentences of a batch of documents.

    Attributes:
        tokens: [tokens], each document's own after a separator.
        document_tokens: [documents] number of tokens of each, the separator included.
        document_sentences: [documents] number of sentences of each.
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


def tokenize_batch(folder: Path, batch: int, separator: int, language: str) -> TokenizedBatch:
    """Tokenises a batch of the documents of a corpus that is being built, and splits them into sentences.

    A special token that is written out in a text is plain text, but for those that a chat template writes.

    Args:
        folder: The corpus, with its documents and its tokenizer.
        batch: Number of the batch in the file of documents.
        separator: The token put before every document.
        language: Of the sentence splitter.

    Raises:
        ProbekitError: The splitter finds other sentences than were planted.
    """
    documents = read_batch(folder / "documents.arrow", batch)
    tokens, first_token, spans = [], [], []
    begin = 0
    for document in documents:
        # One at a time: an encoding takes a hundred times the memory of its text.
        ids, offsets = _encoded(folder, document, separator)
        aligned = align(document.text, sentence_spans(document.text, language), offsets)
        tokens.append(np.array([separator, *ids], dtype=np.uint32))
        first_token.append(aligned.first_token + begin + 1)
        spans.append(aligned.spans)
        begin += len(tokens[-1])
    sentences = np.array([len(each) for each in spans], dtype=np.int64)
    return TokenizedBatch(
        tokens=np.concatenate(tokens),
        document_tokens=np.array([len(each) for each in tokens], dtype=np.int64),
        document_sentences=sentences,
        first_token=np.concatenate(first_token),
        spans=np.concatenate(spans),
        planted_actions=_planted_actions(documents, sentences),
    )


def token_spans(folder: Path, document: Document, separator: int) -> NDArray[np.int64]:
    """Where the visible characters of each token of a document begin and end `[tokens, 2]`.

    Args:
        folder: The corpus, with its tokenizer.
        document: The document.
        separator: The token put before every document.
    """
    offsets = np.asarray(_encoded(folder, document, separator)[1], dtype=np.int64).reshape(-1, 2)
    return np.stack([_anchors(document.text, offsets), offsets[:, 1]], axis=1)


def tokens_of(spans: ArrayLike, start: int, end: int) -> NDArray[np.int64]:
    """The tokens that hold some of a text's characters.

    Args:
        spans: Where the characters of each token begin and end `[tokens, 2]`.
        start: The first character.
        end: The character after the last one.
    """
    bounds = np.asarray(spans, dtype=np.int64).reshape(-1, 2)
    return np.flatnonzero((bounds[:, 0] < end) & (bounds[:, 1] > start))


def _encoded(folder: Path, document: Document, separator: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a document behind the separator, and the characters that each stands for."""
    file = folder / "tokenizer" / "tokenizer.json"
    if document.special is not None:
        return _chat_encoder(file).encode(document.text, document.special, separator)
    encoding = _tokenizer(file).encode(document.text, add_special_tokens=False)
    return encoding.ids, encoding.offsets


@lru_cache(maxsize=1)
def _tokenizer(file: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


@lru_cache(maxsize=1)
def _chat_encoder(file: Path) -> ChatEncoder:
    return ChatEncoder(Tokenizer.from_file(str(file)))


def _planted_actions(documents: list[Document], sentences: NDArray[np.int64]) -> NDArray[np.int32] | None:
    if documents[0].actions is None:
        return None
    actions = [document.actions or () for document in documents]
    for document, planted, found in zip(documents, actions, sentences.tolist(), strict=True):
        if len(planted) != found:
            raise ProbekitError(
                f"document {document.name!r} was planted with {len(planted)} sentences, but the splitter "
                f"finds {found}; corpus.language must be 'en' for the planted corpus"
            )
    return np.concatenate(actions).astype(np.int32)


def sentences_of_batch(folder: Path, batch: int, first: int) -> list[str]:
    """The sentences of a batch of the documents of a corpus, surrounding white space removed.

    Args:
        folder: The corpus, whose documents are tokenised.
        batch: Number of the batch in the file of documents.
        first: Number of its first document.
    """
    documents = read_batch(folder / "documents.arrow", batch)
    bounds = read_array(folder / "document_sentences.npy")[first : first + len(documents) + 1]
    spans = read_array(folder / "spans.npy")[bounds[0] : bounds[-1]].tolist()
    owners = np.repeat(np.arange(len(documents)), np.diff(bounds)).tolist()
    return [documents[owner].text[a:b].strip() for owner, (a, b) in zip(owners, spans, strict=True)]
