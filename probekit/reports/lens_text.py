"""One text as a corpus of its own, so that whatever reads the documents of a run can read it too."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from probekit.config import VariantName
from probekit.data.corpus import SPLITS, Corpus
from probekit.data.sentences import align, complete_spans, sentence_spans
from probekit.errors import ProbekitError
from probekit.run.run import LOADED, Run

LIMIT = 2000
"""The most tokens of a text, if not said otherwise: what a page can show and a reader take in."""

PATH_SUFFIXES = (".txt", ".md")
"""What ends so, and has no white space, is the name of a file."""

JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji need to look as they should."""

NAMED = {"\t": "⇥", "\n": "↵", "\r": "↩", "\u2028": "↵", "\u2029": "↵"}
"""What is shown for some characters that would not be seen. A line break always ends a sentence."""


@dataclass(frozen=True)
class Text:
    """A text, cut into tokens and sentences as a run's corpus was.

    Attributes:
        corpus: It alone, as the only document: separator, tokens, and one token that ends it, so that the LM
            reads the last token too. Where its last sentence is over, that token begins one more sentence,
            with an embedding of zeros and the action 0, which nothing that comes before it can see.
        pieces: The text that each token adds; together they are the text `[tokens]`.
        first_token: Number of each sentence's first token among them `[sentences]`.
        document: Which document of the corpus it is, to the last token; None for any other text.
        actions: True actions: those that the corpus has of the document, else the nearest centroids
            `[sentences]`.
        known: Whether the corpus's encoder makes anything of a sentence: of one without a word that it knows,
            the nearest centroid tells nothing `[sentences]`.
        embeddings: By the encoder of the corpus, or the variant's own `[sentences, dimensions]`.
    """

    corpus: Corpus
    pieces: list[str]
    first_token: np.ndarray
    document: int | None
    actions: np.ndarray
    known: np.ndarray
    embeddings: np.ndarray

    @property
    def over(self) -> bool:
        """Whether the last sentence is over, so that the next token would begin another."""
        return len(self.corpus.first_token) > len(self.first_token)


class TextRun(Run):
    """A run whose corpus is one text.

    Args:
        run: The run; what it has loaded is shared.
        text: The text, with the embeddings of the variant that is to read it.
    """

    def __init__(self, run: Run, text: Text) -> None:
        super().__init__(run.folder, run.config)
        vars(self).update({name: vars(run)[name] for name in LOADED if name in vars(run)})
        self.corpus = text.corpus

    def corpus_of(self, variant: VariantName) -> Corpus:
        """The text, whose embeddings are the variant's already."""
        return self.corpus


def given_text(given: str | Path) -> str:
    """The text that is meant: that of a file, or what is given itself.

    What exists is read. A path, or a string without white space that has a slash or ends in .txt or .md, is
    the name of a file; every other string is the text.

    Raises:
        ProbekitError: The file does not exist, is a folder, or is not UTF-8; or the text is no valid Unicode.
    """
    path = _named_file(given)
    if path is None:
        text = str(given)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ProbekitError("--text is not valid Unicode; give it as UTF-8") from None
        return text
    try:
        # Line ends as they are, no byte order mark: as the corpus's own files are read.
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


def cut_text(run: Run, text: str, variant: VariantName, limit: int = LIMIT) -> Text:
    """Cuts a text into tokens and sentences, and finds the sentences' actions.

    What reads like a special token is text like all else.

    Args:
        run: The run whose tokenizer, encoder and codebook are used.
        text: The text.
        variant: Whose planner is to read it.
        limit: The most tokens.

    Raises:
        ProbekitError: It has no sentence, or too many tokens.
    """
    language, corpus = run.config.corpus.language, run.corpus
    whole = sentence_spans(text, language)
    if not len(whole):
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
    aligned = align(text, whole, offsets)
    sentences = [text[start:end].strip() for start, end in aligned.spans]
    labelled = run.encoder().encode(sentences)
    document = _document_of(corpus, np.array(ids), aligned.first_token)
    # Planted actions are not always those of the nearest centre.
    actions = corpus.codebook.nearest(labelled) if document is None else _recorded(corpus, document)
    embeddings = labelled if run.corpus_of(variant) is corpus else run.encoder(variant).encode(sentences)
    over = len(complete_spans(text, language)) == len(whole)
    more = int(over)
    tokens = np.array([corpus.separator, *ids, corpus.separator])
    first = aligned.first_token + 1
    alone = replace(
        corpus,
        tokens=tokens,
        document_tokens=np.array([0, len(tokens)]),
        document_sentences=np.array([0, len(first) + more]),
        first_token=np.append(first, [len(tokens) - 1] * more),
        spans=np.concatenate([aligned.spans, [[len(text), len(text)]] * more]) if over else aligned.spans,
        split=np.array([SPLITS.index("test")], np.uint8),
        embeddings=np.pad(embeddings, ((0, more), (0, 0))),
        actions=np.pad(actions, (0, more)),
        facts={},
    )
    known = np.any(labelled != 0, axis=1)
    return Text(
        alone,
        _pieces(text, offsets),
        aligned.first_token,
        document,
        actions.astype(np.int64),
        known,
        embeddings,
    )


def _document_of(corpus: Corpus, ids: np.ndarray, first_token: np.ndarray) -> int | None:
    """The document of a corpus that has these tokens, cut into sentences alike; of several the first."""
    for document in np.flatnonzero(np.diff(corpus.document_tokens) == len(ids) + 1).tolist():
        start, end = corpus.document_tokens[document : document + 2]
        own = slice(*corpus.document_sentences[document : document + 2])
        if np.array_equal(corpus.tokens[start + 1 : end], ids) and np.array_equal(
            corpus.first_token[own] - start - 1, first_token
        ):
            return document
    return None


def _recorded(corpus: Corpus, document: int) -> np.ndarray:
    """The actions that a corpus has of a document `[sentences]`."""
    return np.array(corpus.actions[slice(*corpus.document_sentences[document : document + 2])])


def visible(text: str) -> str:
    """A text with symbols for what would not be seen, or would change how the rest is shown.

    No control character and no line break is left.
    """
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character in NAMED:
        return NAMED[character]
    if unicodedata.category(character) in ("Cc", "Cf") and character not in JOINERS:
        return f"‹U+{ord(character):04X}›"
    return character


def _pieces(text: str, offsets: np.ndarray) -> list[str]:
    """The text that each token adds; what a tokenizer leaves out goes with the token behind it."""
    ends = np.maximum.accumulate(offsets[:, 1])
    ends[-1] = len(text)
    return [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _named_file(given: str | Path) -> Path | None:
    """The file that is named, if one is; it may not exist."""
    path = Path(given)
    try:
        there = bool(str(given).strip()) and path.exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        there = False
    if isinstance(given, Path) or there:
        return path
    words = given.split()
    looks_like_one = words == [given] and ("/" in given or given.endswith(PATH_SUFFIXES))
    return path if looks_like_one else None
