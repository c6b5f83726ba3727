"""Targets: what probes predict. A target makes the examples; all later code only sees those.

An example is a range of tokens of a document, which probes read near, and one label for every horizon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from probekit.config import Position, before_last
from probekit.data.corpus import Corpus, ranges
from probekit.data.tokenizer import vocabulary_size
from probekit.errors import ProbekitError

NO_LABEL = -1
"""The label of an example that has none; it is left out."""

LARGEST_SLIP = 0.05
"""The largest share of labels that may be slips of the pen."""

MOST_TOKENS = 1000
"""The target `token` has this many classes at most: the most frequent tokens of the training documents."""

MOST_CLASSES = 4096
"""A column with more classes is refused where it holds words; where it holds numbers, it is of numbers."""

LAST_POSITION = 15
"""The target `sentence-position` counts sentences from 0 to this one, which stands for all later ones."""

Labels = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""Labels of examples, given their first tokens, the sentences that hold these, and the horizon."""


@dataclass(frozen=True)
class Ranges:
    """Ranges of tokens with a label each, in the order of the corpus: arrays `[ranges]`.

    Attributes:
        document: Document of each range.
        start: Its first token, in `corpus.tokens`.
        stop: The token after its last one.
        labels: Its label.
        second: Of pairs, the first token of the other range and the token after its last one `[ranges, 2]`.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    labels: np.ndarray
    second: np.ndarray | None = None

    def of(self, documents: np.ndarray) -> np.ndarray:
        """Numbers of the ranges of some documents, in their order."""
        return ranges(
            np.searchsorted(self.document, documents), np.searchsorted(self.document, documents, side="right")
        )


@dataclass(frozen=True)
class Target:
    """What probes predict.

    Attributes:
        name: The setting `probe.target`.
        classes: Number of classes; 0 of numbers and vectors.
        labels: Labels `[examples]` of first tokens `[examples]` in sentences `[examples]` at a horizon;
            `NO_LABEL` where there is none. Or the ranges that are labelled: then only these are examples.
        of_sentences: The label of every sentence of the corpus, if the target labels sentences.
        names: Names of the classes; empty where numbers are enough.
        kind: Whether labels are classes; or numbers: float64, NaN where there is none; or vectors: labels
            are rows of `vectors`.
        notes: Lines to show the user.
        positions: Where probes read if `probe.positions` is unset.
        tokens: Ids of the tokens `[classes]`, if classes are tokens.
        vectors: The vectors, of any floating type `[rows, outputs]`; empty for other kinds.
    """

    name: str
    classes: int
    labels: Labels | Ranges
    of_sentences: np.ndarray | None = None
    names: tuple[str, ...] = ()
    kind: Literal["classes", "numbers", "vectors"] = "classes"
    notes: tuple[str, ...] = ()
    positions: tuple[Position, ...] = (1, 2, 3, 4, 6, 8)
    tokens: np.ndarray | None = None
    vectors: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @property
    def spans(self) -> int:
        """How many ranges an example has: 2 if labels are of pairs."""
        return 2 if isinstance(self.labels, Ranges) and self.labels.second is not None else 1

    def example_counts(
        self, corpus: Corpus, anchors: Literal["start", "token"], *, first: bool = True
    ) -> np.ndarray:
        """Examples with a label that each document has `[documents]`, less its first one unless `first`."""
        documents = len(corpus.split)
        if not isinstance(self.labels, Ranges):
            every = corpus.document_sentences if anchors == "start" else corpus.document_tokens
            found = np.diff(every) - (not first)
            if self.of_sentences is not None:
                missing = np.flatnonzero(~labelled(self.of_sentences))
                document = corpus.document_of(missing)
                lost = corpus.stops(missing) - corpus.first_token[missing]
                if anchors == "start":
                    lost = np.where(missing == corpus.document_sentences[document], int(first), 1)
                found = found - np.bincount(document, lost, minlength=documents).astype(np.int64)
            return np.maximum(found, 0)
        lengths = None if anchors == "start" else self.labels.stop - self.labels.start
        return np.bincount(self.labels.document, lengths, minlength=documents).astype(np.int64)

    def extent(self, corpus: Corpus) -> Literal["sentences", "texts", "spans", "pairs"]:
        """What a label is of."""
        if not isinstance(self.labels, Ranges):
            return "sentences"
        if self.labels.second is not None:
            return "pairs"
        begin, end = (corpus.document_tokens[self.labels.document + behind] for behind in (0, 1))
        whole = (self.labels.start == begin + 1) & (self.labels.stop == end)
        return "texts" if whole.all() else "spans"

    @property
    def outputs(self) -> int:
        """How many numbers a probe predicts for an example."""
        return {"classes": self.classes, "numbers": 1, "vectors": self.vectors.shape[1]}[self.kind]

    def values(self, labels: np.ndarray) -> np.ndarray:
        """What probes predict of labels `[...]`: these, or the vectors that they number `[..., outputs]`."""
        return self.vectors[labels] if self.kind == "vectors" else labels

    def mean(self, labels: np.ndarray) -> np.ndarray:
        """The mean of what probes predict of labels `[examples]`, which are no classes `[1 or outputs]`."""
        return np.atleast_1d(self.values(labels).mean(0, dtype=np.float64))

    def name_of(self, label: int) -> str:
        """The name of a class, or its number."""
        return self.names[label] if self.names else str(label)


@dataclass(frozen=True)
class Examples:
    """Examples that all cells of a grid share.

    Attributes:
        document: Document of each example `[examples]`; those of one document are together.
        start: First token of the range, in `corpus.tokens` `[examples]`.
        stop: The token after its last one `[examples]`.
        sentence: The sentence that holds the first token `[examples]`.
        group: What splits and intervals keep together `[examples]`.
        labels: One label for every horizon `[examples, horizons]`.
        second: Of pairs of ranges, `start` and `stop` of the other one `[examples, 2]`. Both are read at a
            position, and their activations joined, as in edge probing (Tenney et al. 2019).
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    sentence: np.ndarray
    group: np.ndarray
    labels: np.ndarray
    second: np.ndarray | None = None

    @classmethod
    def of_tokens(
        cls, document: np.ndarray, start: np.ndarray, sentence: np.ndarray, labels: np.ndarray
    ) -> Examples:
        """Examples of single tokens, whose groups are their documents."""
        return cls(document, start, start + 1, sentence, document, labels)

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: slice | np.ndarray) -> Examples:
        given = {name: value[rows] for name, value in vars(self).items() if value is not None}
        return Examples(**given)

    def unpaired(self) -> Examples:
        """The ranges as examples of their own, those of a pair one after the other."""
        if self.second is None:
            return self
        every = self[np.repeat(np.arange(len(self)), 2)]
        bounds = zip((self.start, self.stop), self.second.T, strict=True)
        start, stop = (np.stack(both, axis=1).ravel() for both in bounds)
        return replace(every, start=start, stop=stop, second=None)

    def bounds(self, position: Position) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last token that a probe reads at a position, in `corpus.tokens` `[examples]`."""
        if self.second is not None:
            first, last = (at.reshape(-1, 2) for at in self.unpaired().bounds(position))
            return first.min(axis=1), last.max(axis=1)
        if position == "mean":
            return self.start, self.stop - 1
        if isinstance(position, int):
            at = self.start - position
        else:
            behind = before_last(position)
            at = self.start if behind is None else self.stop - 1 - behind
        return at, at

    def last_read(self, position: Position) -> np.ndarray:
        """The last token that a probe reads at a position, in `corpus.tokens` `[examples]`."""
        return self.bounds(position)[1]


def find_examples(
    corpus: Corpus,
    documents: np.ndarray,
    target: Target,
    horizons: Sequence[int],
    anchors: Literal["start", "token"] = "start",
) -> Examples:
    """Makes an example of every sentence or token of some documents; labels that do not exist are `NO_LABEL`.

    Args:
        corpus: The corpus.
        documents: Numbers of the documents, in the order of the examples `[documents]`.
        target: What is predicted.
        horizons: 1 is the example's own sentence (or token), 2 the next one.
        anchors: Every sentence is an example, or every token of one.
    """
    if isinstance(target.labels, Ranges):
        return _of_ranges(corpus, documents, target.labels, horizons, anchors)
    first, last = corpus.document_sentences[documents], corpus.document_sentences[documents + 1]
    if anchors == "start":
        sentence = ranges(first, last)
        document = np.repeat(documents, last - first)
        start, stop = np.asarray(corpus.first_token[sentence]), corpus.stops(sentence)
    else:
        has_sentence = last > first
        documents, first = documents[has_sentence], first[has_sentence]
        begin, end = np.asarray(corpus.first_token[first]), corpus.document_tokens[documents + 1]
        document, start = np.repeat(documents, end - begin), ranges(begin, end)
        sentence = np.searchsorted(corpus.first_token, start, side="right") - 1
        stop = start + 1
    labels = [target.labels(start, sentence, horizon) for horizon in horizons]
    return Examples(document, start, stop, sentence, corpus.group[document], np.stack(labels, axis=1))


def _of_ranges(
    corpus: Corpus, documents: np.ndarray, labelled: Ranges, horizons: Sequence[int], anchors: str
) -> Examples:
    """An example of every labelled range of some documents, or of every token of each."""
    if tuple(horizons) != (1,):
        raise ProbekitError(
            f"probe.horizons is {', '.join(map(str, horizons))}, but the labels are of texts or spans, of "
            "which there is no next one; give 1"
        )
    rows = labelled.of(documents)
    start, stop = labelled.start[rows], labelled.stop[rows]
    if anchors == "token":
        if labelled.second is not None:
            raise ProbekitError("probe.anchors is 'token', but the labels are of pairs of spans; give start")
        rows, start = np.repeat(rows, stop - start), ranges(start, stop)
        stop = start + 1
    document = labelled.document[rows]
    sentence = np.searchsorted(corpus.first_token, start, side="right") - 1
    second = None if labelled.second is None else labelled.second[rows]
    labels = labelled.labels[rows][:, None]
    return Examples(document, start, stop, sentence, corpus.group[document], labels, second)


def labelled(labels: np.ndarray) -> np.ndarray:
    """Which labels exist."""
    return ~np.isnan(labels) if labels.dtype.kind == "f" else labels != NO_LABEL


def reached(corpus: Corpus, examples: Examples, position: Position) -> np.ndarray:
    """Whether the document of each example has a token at a position `[examples]`, bool.

    The separator in front of a document is not one of its tokens: nothing has been read there.
    """
    every = examples.unpaired()
    at = every.last_read(position)
    begin, end = (corpus.document_tokens[every.document + behind] for behind in (0, 1))
    within = (at > begin) & (at < end)
    return within if examples.second is None else within.reshape(-1, 2).all(axis=1)


def are_numbers(values: np.ndarray) -> bool:
    """Whether numbers are no classes: some have fractions, or more are different than there can be."""
    different = np.unique(values)
    return len(different) > MOST_CLASSES or bool((different % 1 != 0).any())


def vary(numbers: np.ndarray) -> bool:
    """Whether numbers have a variance that is neither 0 nor, in float64, infinite: else R2 is undefined."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(0 < np.var(numbers) < np.inf)


def nearly_two_classes(name: str, names: Sequence[str], counts: np.ndarray) -> str | None:
    """A line where all classes but two are so rare that they may be slips of the pen."""
    order = np.argsort(-counts, kind="stable")
    if len(order) < 3 or counts[order[2:]].sum() > LARGEST_SLIP * counts.sum():
        return None
    shown = ", ".join(f"{names[number]!r} {counts[number]:,}" for number in order[:5].tolist())
    return (
        f"{name!r} has {len(order):,} classes ({shown}{', …' if len(order) > 5 else ''}), so AUROC and other "
        "metrics of two classes are left out; if it is to have two, correct the others or leave them out"
    )


def find_target(corpus: Corpus, name: str) -> Target:
    """Finds one of `TARGETS` by name.

    Raises:
        ProbekitError: There is no such target, or the corpus does not know it.
    """
    if name not in TARGETS:
        raise ProbekitError(
            f"probe.target is {name!r}; it must be one of {', '.join(TARGETS)}, or a column of the file that "
            "probe.labels names"
        )
    return TARGETS[name](corpus)


def _action(corpus: Corpus) -> Target:
    corpus.require_actions()
    highest = int(corpus.actions.max(initial=0))
    if highest >= corpus.k:
        raise ProbekitError(
            f"{corpus.folder / 'actions.npy'} holds action {highest}, but the codebook has {corpus.k}; "
            "build the corpus again"
        )
    return sentence_target(corpus, "action", corpus.k, corpus.known_actions)


def _token(corpus: Corpus) -> Target:
    counts = np.zeros(vocabulary_size(corpus.tokenizer), dtype=np.int64)
    documents = corpus.documents("train")
    if not len(documents):  # nothing is to be trained
        documents = corpus.documents("probe")
    for start in range(0, len(documents), 256):
        part = documents[start : start + 256]
        tokens = corpus.tokens[ranges(corpus.document_tokens[part] + 1, corpus.document_tokens[part + 1])]
        counts += np.bincount(tokens, minlength=len(counts))
    frequent = np.argsort(-counts, kind="stable")[: min(MOST_TOKENS, int((counts > 0).sum()))]
    class_of = np.full(len(counts), NO_LABEL, dtype=np.int64)
    class_of[frequent] = np.arange(len(frequent))

    def labels(start: np.ndarray, sentence: np.ndarray, horizon: int) -> np.ndarray:
        token = start + horizon - 1
        exists = token < corpus.document_tokens[corpus.document_of(sentence) + 1]
        return np.where(exists, class_of[corpus.tokens[np.where(exists, token, 0)]], NO_LABEL)

    names = tuple(corpus.tokenizer.convert_ids_to_tokens(frequent.tolist()))
    return Target("token", len(frequent), labels, names=names, tokens=frequent)


def _sentence_position(corpus: Corpus) -> Target:
    def labels(start: np.ndarray, sentence: np.ndarray, horizon: int) -> np.ndarray:
        document = corpus.document_of(sentence)
        asked = sentence + horizon - 1
        position = np.minimum(asked - corpus.document_sentences[document], LAST_POSITION)
        return np.where(asked < corpus.document_sentences[document + 1], position, NO_LABEL)

    return Target("sentence-position", LAST_POSITION + 1, labels)


def _document_type(corpus: Corpus) -> Target:
    kinds = [document.kind for _, documents in corpus.texts.batches() for document in documents]
    types = np.array([NO_LABEL if kind is None else kind for kind in kinds], dtype=np.int64)
    if (types == NO_LABEL).all():
        raise ProbekitError("probe.target is 'document-type', which only the planted corpus knows")

    def labels(start: np.ndarray, sentence: np.ndarray, horizon: int) -> np.ndarray:
        return types[corpus.document_of(sentence)]

    return Target("document-type", int(types.max()) + 1, labels)


def _embedding(corpus: Corpus) -> Target:
    corpus.require_actions()
    # Zeros are the embedding of a sentence that holds no word that the encoder knows.
    rows = np.where(corpus.embeddings.any(axis=1), np.arange(len(corpus.first_token)), NO_LABEL)
    return sentence_target(corpus, "embedding", 0, rows, vectors=corpus.embeddings)


TARGETS: dict[str, Callable[[Corpus], Target]] = {
    "action": _action,
    "token": _token,
    "sentence-position": _sentence_position,
    "document-type": _document_type,
    "embedding": _embedding,
}
"""Targets that need no file: a sentence's action, a token (as in Future Lens, arXiv 2311.04897), a sentence's
number in its document, the planted corpus's hidden document type, and a sentence's embedding, a vector."""


def sentence_target(
    corpus: Corpus,
    name: str,
    classes: int,
    of_sentences: np.ndarray,
    names: tuple[str, ...] = (),
    vectors: np.ndarray | None = None,
) -> Target:
    """A target that labels every sentence `[sentences]` with a class, a row of some vectors, or a number."""
    has_codes = classes or vectors is not None
    missing, dtype = (NO_LABEL, np.int64) if has_codes else (np.nan, np.float64)

    def labels(start: np.ndarray, sentence: np.ndarray, horizon: int) -> np.ndarray:
        asked = sentence + horizon - 1
        exists = asked < corpus.document_sentences[corpus.document_of(sentence) + 1]
        return np.where(exists, of_sentences[np.where(exists, asked, 0)], missing).astype(dtype)

    found = Target(name, classes, labels, of_sentences, names, "classes" if classes else "numbers")
    return found if vectors is None else replace(found, kind="vectors", vectors=vectors)
