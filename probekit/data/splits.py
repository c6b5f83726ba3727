"""Which documents belong together, and the splits, which no group of documents crosses.

Documents are of one group if they share a value of the group column, or have texts that differ in case, white
space and punctuation alone, but not in the signs and decimal points of numbers. Groups are also what
intervals resample: two copies are one observation.
"""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from probekit.config import CorpusSettings
from probekit.errors import ProbekitError

SPLITS = ("train", "probe", "validation", "test")


@dataclass
class DocumentKeys:
    """What decides which documents belong together, and in which split they are.

    Attributes:
        texts: Digest of each document's text `[documents]`, 8 bytes each.
        normalised: Digest of its words `[documents]`.
        documents: The document of each row that names a group or a split `[rows]`; several can have one.
        groups: Digest of the row's group; that of the text where it names none `[rows]`.
        splits: The row's split as a number in `SPLITS` `[rows]`.
    """

    texts: bytearray = field(default_factory=bytearray)
    normalised: bytearray = field(default_factory=bytearray)
    documents: list[int] = field(default_factory=list)
    groups: bytearray = field(default_factory=bytearray)
    splits: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts) // 8

    def fingerprint(self) -> str:
        """A digest of all of it."""
        rows = self.groups + np.array([self.documents, self.splits], np.int64).tobytes()
        return hashlib.sha256(self.texts + rows).hexdigest()


def digest(text: str) -> bytes:
    """A digest of a text, of 8 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def normalised(text: str) -> str:
    """A text without its case, white space and punctuation; the text itself where nothing is left.

    Numbers keep their signs and decimal points: `-5` is not `5`, nor `1.5` what `1 5` is.
    """
    return _not_of_words().sub(" ", text.casefold()).strip() or text


@lru_cache(maxsize=1)
def _not_of_words() -> re.Pattern[str]:
    """White space and punctuation; the vowel signs of Hindi and the plus of sums are neither."""
    blank = (chr(c) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c))[0] in "PZ")
    of_number = r"(?<![^\W\d_])[-–.](?=\d)|(?<=\d),(?=\d)"  # not in covid-19, nor at a sentence's end
    return re.compile(f"(?:(?!{of_number})[\\s{re.escape(''.join(blank))}])+")


def _numbers(digests: bytearray) -> np.ndarray:
    return np.frombuffer(bytes(digests), dtype=">u8").astype(np.uint64)


def group_documents(keys: DocumentKeys) -> np.ndarray:
    """The group of each document, by the number of the group's first document `[documents]`."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(keys)
    _, words = np.unique(_numbers(keys.normalised), return_inverse=True)
    _, named = np.unique(_numbers(keys.groups), return_inverse=True)
    document = np.concatenate([np.arange(count), np.array(keys.documents, np.int64)])
    shared = count + np.concatenate([words, named + words.max(initial=-1) + 1])
    size = int(shared.max(initial=count - 1)) + 1
    graph = coo_array((np.ones(len(shared), bool), (document, shared)), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    _, first, group = np.unique(component[:count], return_index=True, return_inverse=True)
    return first[group].astype(np.int64)


def split_documents(
    settings: CorpusSettings, keys: DocumentKeys, group: np.ndarray, name: Callable[[int], str] = str
) -> np.ndarray:
    """Splits documents by group, whatever the order of reading: by the split column, or else at random.

    Args:
        settings: The columns, the shares and the seed.
        keys: What is known of each document.
        group: The group of each document, as from `group_documents` `[documents]`.
        name: Names a document, for errors.

    Returns:
        The number in `SPLITS` of each document `[documents]`.

    Raises:
        ProbekitError: There are too few groups for the shares, or a group is in two splits.
    """
    if settings.split_column is not None:
        return _given_splits(settings, keys, group, name)
    digests = _numbers(keys.texts)
    if settings.group_column is not None:
        digests = np.full(len(group), np.iinfo(np.uint64).max)
        np.minimum.at(digests, keys.documents, _numbers(keys.groups))
    of_group = np.full(len(group), np.iinfo(np.uint64).max)
    np.minimum.at(of_group, group, digests)
    return _drawn_splits(settings, of_group[group])


def _drawn_splits(settings: CorpusSettings, digests: np.ndarray) -> np.ndarray:
    shares = [settings.probe_fraction, settings.validation_fraction, settings.test_fraction]
    unique, inverse = np.unique(digests, return_inverse=True)
    counts = [round(share * len(unique)) for share in shares]
    counts.insert(0, len(unique) - sum(counts))
    if counts[0] < 0:  # shares that are rounded up
        counts[int(np.argmax(counts))] += counts[0]
        counts[0] = 0
    what, remedy = "distinct documents", "or cut text files into documents by corpus.separator"
    if settings.group_column is not None:
        what = f"groups of corpus.group_column {settings.group_column!r}"
        remedy = "or give each text its split in a corpus.split_column"
    training = max(0.0, 1.0 - sum(shares))  # none is needed where nothing is trained
    for name, count, share in zip(SPLITS, counts, [training, *shares], strict=True):
        if share > 1e-9 and count < 1:
            raise ProbekitError(
                f"the corpus has {len(unique)} {what}, which leaves none for the split {name!r}; give more "
                "of them, change corpus.probe_fraction, corpus.validation_fraction and corpus.test_fraction, "
                f"{remedy}"
            )
    order = np.random.default_rng(settings.seed).permutation(len(unique))
    split_of_unique = np.empty(len(unique), dtype=np.uint8)
    split_of_unique[order] = np.repeat(np.arange(len(SPLITS)), counts)
    return split_of_unique[inverse]


def _given_splits(
    settings: CorpusSettings, keys: DocumentKeys, group: np.ndarray, name: Callable[[int], str]
) -> np.ndarray:
    """The splits that the rows name, which must be the same throughout a group."""
    document, given = np.array(keys.documents, np.int64), np.array(keys.splits)
    named_by = np.zeros(len(group), np.int64)
    named_by[group[document]] = np.arange(len(document))  # a row of each group
    row = named_by[group[document]]
    if len(other := np.flatnonzero(given != given[row])):
        one, two = sorted((int(other[0]), int(row[other[0]])))
        raise ProbekitError(
            f"corpus.split_column {settings.split_column!r} puts {name(document[one])} in "
            f"{SPLITS[given[one]]!r} and {name(document[two])} in {SPLITS[given[two]]!r}, but they are of "
            "one group, or differ in case, white space and punctuation alone; no group may be in two splits"
        )
    return given[named_by[group]].astype(np.uint8)


def group_note(groups: int, documents: int) -> str | None:
    """A line for the user where some documents share a group, else None."""
    if groups == documents:
        return None
    return (
        f"{documents:,} documents are {groups:,} groups: some share a value of corpus.group_column, or are "
        "copies of one text (but for case, white space, punctuation); intervals resample groups, and no "
        "group is in two splits"
    )
