"""The text that the lens shows: cut like a run's corpus, and what is known to be true of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from probekit.config import Position, VariantName, user_path
from probekit.data.corpus import SPLITS, Corpus
from probekit.data.sentences import align, complete_spans, sentence_spans
from probekit.errors import ProbekitError
from probekit.probing.label_table import labels_digest
from probekit.probing.labels import target_of
from probekit.probing.record import ProbeRecord
from probekit.probing.targets import (
    LAST_POSITION,
    NO_LABEL,
    Examples,
    Ranges,
    Target,
    find_examples,
    labelled,
    sentence_target,
)
from probekit.run.run import Run

LIMIT = 2000
"""Default for the largest number of tokens of a text."""


def given_text(given: str | Path) -> str:
    """Returns the text that the user means: that of a file, or the string itself.

    Whatever exists is read. A `Path`, or a string without white space that contains a slash or ends in .txt
    or .md, is the name of a file; any other string is the text.

    Raises:
        ProbekitError: The file does not exist, is a folder or is not UTF-8; or the text is not valid Unicode.
    """
    if isinstance(given, str) and any("\ud800" <= character <= "\udc7f" for character in given):
        raise ProbekitError("--text is not valid Unicode; give it as UTF-8")
    names_nothing = "\0" in str(given)
    path = Path(str(given)) if names_nothing else user_path(given)
    try:
        exists = bool(str(given).strip()) and path.exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        exists = False
    one_word = str(given).split() == [str(given)]
    looks_like_file = one_word and not names_nothing and ("/" in str(given) or path.suffix in (".txt", ".md"))
    if not (exists or isinstance(given, Path) or looks_like_file):
        try:
            str(given).encode()
        except UnicodeEncodeError:
            raise ProbekitError("--text is not valid Unicode; give it as UTF-8") from None
        return str(given)
    try:
        # Line ends unchanged and no byte order mark, as the corpus's own files are read.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ProbekitError(
            f"--text {path}: is not UTF-8 (byte {error.start:,}); convert it, or give another file"
        ) from None
    except FileNotFoundError:
        raise ProbekitError(
            f"--text {path}: does not exist; give a file, or a text of several words"
        ) from None
    except OSError as error:
        raise ProbekitError(f"--text {path}: cannot be read ({error.strerror})") from None


@dataclass(frozen=True)
class Text:
    """A text, cut into tokens and sentences as a run's corpus was.

    Attributes:
        corpus: A corpus with this text as its only document: separator, tokens, and one more token, so that
            the LM reads the last token too. If the last sentence is complete, that token begins one more
            sentence, with an embedding of zeros and action 0, which nothing before it can see.
        pieces: The text that each token adds; joined they are the text `[tokens]`.
        first_token: Each sentence's first token `[sentences]`.
        document: The number of the same document in the run's corpus; None if it is no document of it.
        actions: True actions: those of the corpus's document, else the nearest centroids; `NO_LABEL` in a
            corpus without actions `[sentences]`.
        known: Whether a sentence has a word that the encoder knows; if not, its nearest centroid means
            nothing `[sentences]`.
        embeddings: By the encoder of the corpus, or the variant's own `[sentences, dimensions]`.
        encodings: By the encoder of the corpus `[sentences, dimensions]`.
        first_number: The number of its first sentence: that in the run's corpus, or of no sentence there.
    """

    corpus: Corpus
    pieces: list[str]
    first_token: np.ndarray
    document: int | None
    actions: np.ndarray
    known: np.ndarray
    embeddings: np.ndarray
    encodings: np.ndarray
    first_number: int


class TextRun(Run):
    """A run whose corpus is one text; it shares the models that another run has loaded."""

    def __init__(self, run: Run, text: Text) -> None:
        super().__init__(run.folder, run.config)
        vars(self).update(vars(run))
        self.corpus = text.corpus

    def corpus_of(self, variant: VariantName) -> Corpus:
        """Returns the text, which already has the variant's embeddings."""
        return self.corpus


def cut_text(run: Run, text: str, variant: VariantName, limit: int = LIMIT) -> Text:
    """Cuts a text into tokens and sentences, and assigns actions to the sentences.

    Special tokens in the text are read as ordinary text.

    Args:
        run: The run whose tokenizer, encoder and codebook are used.
        text: The text.
        variant: The variant whose planner will read it.
        limit: The largest number of tokens.

    Raises:
        ProbekitError: The text is blank or has too many tokens.
    """
    language, corpus = run.config.corpus.language, run.corpus
    spans = sentence_spans(text, language)
    if not len(spans):
        raise ProbekitError("--text is blank: it has no sentence to read")
    encoded = corpus.tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids, offsets = encoded["input_ids"], np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    if len(ids) > limit:
        raise ProbekitError(
            f"--text has {len(ids):,} tokens, more than --limit {limit:,}; shorten it, or raise that"
        )
    aligned = align(text, spans, offsets)
    sentences = [text[start:end].strip() for start, end in aligned.spans]
    encodings = embeddings = np.zeros((len(sentences), 0), np.float32)
    if corpus.has_actions:
        encodings = run.encoder().encode(sentences)
        own_encoder = run.corpus_of(variant) is not corpus
        embeddings = run.encoder(variant).encode(sentences) if own_encoder else encodings

    document = _document_of(corpus, np.array(ids), aligned.first_token)
    if document is not None:  # planted actions are not always those of the nearest centroids
        actions = np.array(corpus.actions[slice(*corpus.document_sentences[document : document + 2])])
    elif corpus.has_actions:
        actions = corpus.codebook.nearest(encodings)
    else:
        actions = np.full(len(sentences), NO_LABEL)

    more = int(len(complete_spans(text, language)) == len(spans))
    tokens = np.array([corpus.separator, *ids, corpus.separator])
    first = aligned.first_token + 1
    alone = replace(
        corpus,
        tokens=tokens,
        document_tokens=np.array([0, len(tokens)]),
        document_sentences=np.array([0, len(first) + more]),
        first_token=np.append(first, np.full(more, len(tokens) - 1)),
        spans=np.concatenate([aligned.spans, np.full((more, 2), len(text))]),
        split=np.array([SPLITS.index("test")], np.uint8),
        embeddings=np.pad(embeddings, ((0, more), (0, 0))),
        actions=np.pad(actions, (0, more)),
        facts={"bos": corpus.bos_rule_of_text(run.config.lm.bos)},
    )
    # Characters that the tokenizer leaves out go with the token after them.
    ends = np.maximum.accumulate(offsets[:, 1])
    ends[-1] = len(text)
    pieces = [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    known = np.any(encodings != 0, axis=1)
    number = len(corpus.first_token) if document is None else int(corpus.document_sentences[document])
    actions = actions.astype(np.int64)
    return Text(alone, pieces, aligned.first_token, document, actions, known, embeddings, encodings, number)


def _document_of(corpus: Corpus, ids: np.ndarray, first_token: np.ndarray) -> int | None:
    """The first document of a corpus with these tokens and sentences."""
    for document in np.flatnonzero(np.diff(corpus.document_tokens) == len(ids) + 1).tolist():
        start, end = corpus.document_tokens[document : document + 2]
        own = slice(*corpus.document_sentences[document : document + 2])
        same_tokens = np.array_equal(corpus.tokens[start + 1 : end], ids)
        if same_tokens and np.array_equal(corpus.first_token[own] - start - 1, first_token):
            return document
    return None


# What is known to be true


@dataclass(frozen=True)
class Truth:
    """What is known to be true of a text.

    Attributes:
        labels: What a probe at each position should read at each token: the label of the range that holds
            it, or at a position before a range that of the one that begins next. NaN where there is none, or
            none is known `[positions, tokens]`.
        fitted: Whether probes at each position were fitted at such tokens `[positions, tokens]`.
        of_sentences: The label of each sentence, if sentences are labelled `[sentences]`.
        words: Where the labels are from.
    """

    labels: np.ndarray
    fitted: np.ndarray
    of_sentences: np.ndarray
    words: str


def find_truth(
    run: Run, cut: Text, record: ProbeRecord, positions: Sequence[Position], horizon: int
) -> Truth:
    """Finds what is known to be true of a text.

    Args:
        run: The run that was probed.
        cut: The text.
        record: How its probes were made.
        positions: Where they read.
        horizon: Sentences (or tokens) ahead that they predict.
    """
    examples, words = _examples(run, cut, record, horizon)
    label = np.where(labelled(examples.labels[:, 0]), examples.labels[:, 0], np.nan)
    tokens, by_token = np.arange(len(cut.pieces)), record.config.probe.anchors == "token"
    labels = np.full((len(positions), len(tokens)), np.nan)
    fitted = np.zeros(labels.shape, bool)
    for position, own, fits in zip(positions, labels, fitted, strict=True):
        before = isinstance(position, int) and position > 0
        # The number of the range: the next one to begin, or the one that holds the token (or that far ahead).
        at = tokens + (position if by_token and isinstance(position, int) else 0)
        number = np.searchsorted(examples.start, at, side="right") - (by_token or not before)
        exists = (number >= 0) & (number < len(label))
        if by_token or not before:
            exists[exists] = examples.stop[number[exists]] > at[exists]
        own[exists] = label[number[exists]]
        read = examples.last_read(position)
        inside = (read >= 0) & (read < len(tokens)) & (position != "mean")
        own[read[inside]], fits[read[inside]] = label[inside], True
    of_sentences = np.full(len(cut.first_token), np.nan)
    if record.extent == "sentences" and horizon == 1:
        begins = np.searchsorted(examples.start, cut.first_token)
        known = np.isin(cut.first_token, examples.start)
        of_sentences[known] = label[begins[known]]
    return Truth(labels, fitted, of_sentences, words)


def _examples(run: Run, cut: Text, record: ProbeRecord, horizon: int) -> tuple[Examples, str]:
    """The examples of a text, in tokens of it and in their order, and where their labels are from."""
    config, corpus, alone = record.config.probe, run.corpus, cut.corpus
    classes, sentences = record.classes, len(cut.first_token)
    documents, shift = np.array([0]), 1
    split = "" if cut.document is None else SPLITS[corpus.split[cut.document]]
    own = f"The text is document {cut.document:,} of the corpus, of the split {split!r}" if split else ""
    if config.labels is not None or config.target == "document-type":
        if own and labels_digest(record.config) == record.origin.get("labels"):
            target, words = target_of(corpus, record.config), f"{own}: true labels are those of the corpus."
            documents, shift = np.array([cut.document]), 1 + int(corpus.document_tokens[cut.document])
            alone = corpus
        else:
            words = "True labels are known of the run's own documents alone, not of this text."
            unknown = NO_LABEL if classes else np.nan
            whole = np.ones(int(record.extent == "texts"), np.int64)
            ranges = Ranges(0 * whole, whole, whole * (len(cut.pieces) + 1), whole * unknown)
            target = Target(config.target, len(classes), ranges)
            if record.extent == "sentences":
                nothing = np.full(len(alone.first_token), unknown)
                target = sentence_target(alone, config.target, len(classes), nothing)
    elif config.target == "token":
        number_of = {token: number for number, token in enumerate(classes)}
        names = corpus.tokenizer.convert_ids_to_tokens(alone.tokens.tolist())
        class_of = np.array([number_of.get(token, NO_LABEL) for token in names[:-1]] + [NO_LABEL] * horizon)
        words = "True labels are the tokens of the text itself."
        target = Target("token", len(classes), lambda start, sentence, ahead: class_of[start + ahead - 1])
    else:
        actions, words = np.where(cut.known, cut.actions, NO_LABEL), "Sentences are numbered from 0."
        if config.target == "action":
            words = "A sentence's true action is the one whose centroid is nearest to it."
            words = f"{own}: true actions are those of the corpus." if own else words
        elif config.target == "embedding":
            words = "What is true is the embedding of the text's own sentence."
            actions = np.where(cut.known, cut.first_number + np.arange(sentences), NO_LABEL)
        else:
            actions = np.minimum(np.arange(sentences), LAST_POSITION)
        actions = np.pad(actions, (0, len(alone.first_token) - sentences), constant_values=NO_LABEL)
        vectors = alone.embeddings if config.target == "embedding" else None
        target = sentence_target(alone, config.target, len(classes), actions, vectors=vectors)
    found = find_examples(alone, documents, target, [horizon], config.anchors)
    start = found.start - shift
    # The token behind the text belongs to none of its sentences.
    stop = np.maximum(start + 1, np.minimum(found.stop - shift, len(cut.pieces)))
    order = np.argsort(start, kind="stable")
    return replace(found, start=start, stop=stop)[order], words
