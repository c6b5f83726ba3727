"""Builds a corpus folder from text: documents, tokens, sentences, embeddings, actions.

Every pass streams the documents in batches and appends to arrays on disk: memory grows by a few numbers for
each document and sentence alone. What is fitted is fitted on a bounded sample. Large corpora are cut and
embedded by all cores, which leave the same bits as one.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from probekit import io as storage
from probekit.config import Config, CorpusSettings
from probekit.data.codebook import fit_codebook, in_order, label_centroids, processes_for
from probekit.data.corpus import SPLITS, Corpus, ranges
from probekit.data.encoders import (
    EMBEDDED_AT_ONCE,
    Embedder,
    SentenceEncoder,
    TfidfEncoder,
    encoder_source,
    pretrained_encoder,
)
from probekit.data.readers import DocumentTexts, sentence_texts, write_documents
from probekit.data.sentences import Cutter
from probekit.data.tokenizer import pretrained_tokenizer, separator_id, train_tokenizer
from probekit.errors import ProbekitError
from probekit.io import (
    ArrayAppender,
    atomic_folder,
    link_or_copy,
    read_array,
    read_json,
    write_array,
    write_json,
)
from probekit.progress import Progress
from probekit.run.provenance import digest_of, installed_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


FOLDER = "PROBEKIT_CACHE"
"""The environment variable that says where things are kept; `off`: nowhere."""

SECONDS_WORTH_KEEPING = 10.0
"""What was made sooner is made again."""

_PACKAGES = (
    *("probekit", "numpy", "scipy", "scikit-learn", "sentencex"),
    *("tokenizers", "transformers", "torch", "sentence-transformers"),
)
"""What the bits of a corpus depend on."""
_TEXTS = "documents.arrow"


@dataclass(frozen=True)
class Entry:
    """Where what is made of some documents is kept, or would be.

    Attributes:
        folder: The entry's folder.
        made_from: What its name is a digest of.
    """

    folder: Path
    made_from: dict[str, Any]

    @classmethod
    def of(cls, config: Config, folder: Path, fingerprint: str, device: str) -> Self | None:
        """The entry of a corpus whose documents were read; None where nothing is kept.

        Args:
            config: The settings.
            folder: Where it is being written, with the tokenizer of a pre-trained LM.
            fingerprint: Digest of the documents' texts.
            device: Where a pre-trained sentence encoder computes.
        """
        cache = cache_folder()
        if cache is None:
            return None
        made_from = _made_from(config, folder, device) | {"texts": fingerprint}
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        return cls(cache / "corpora" / digest[:32], made_from)

    def take(self, folder: Path) -> bool:
        """Links or copies what is kept into a folder, if it is there and whole."""
        if not self.folder.is_dir():
            return False
        kept = self.folder / "corpus"
        checksums: dict[str, str] = {}
        try:
            checksums = read_json(self.folder / "entry.json")["checksums"]
            whole = checksums == _checksums(kept)
        except (ProbekitError, OSError, KeyError, TypeError):
            whole = False
        if not whole:
            shutil.rmtree(self.folder, ignore_errors=True)
            return False
        try:
            for name in checksums:
                link_or_copy(kept / name, folder / name)
        except FileNotFoundError:  # another process has just removed it
            for name in checksums:  # what is linked must not be written to
                (folder / name).unlink(missing_ok=True)
            return False
        return True

    def keep(self, folder: Path) -> None:
        """Links or copies a corpus but for its texts into the cache; one that takes nothing is left alone."""
        with suppress(OSError), atomic_folder(self.folder) as partial:
            checksums = _checksums(folder)
            for name in checksums:
                link_or_copy(folder / name, partial / "corpus" / name)
            write_json(partial / "entry.json", {"checksums": checksums, "made_from": self.made_from})


def cache_folder() -> Path | None:
    """Where things are kept between runs; None where nothing is."""
    chosen = os.environ.get(FOLDER)
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "probekit"


def _made_from(config: Config, folder: Path, device: str) -> dict[str, Any]:
    """All that decides what is made of documents, but for their texts."""
    used = {"language", "probe_fraction", "validation_fraction", "test_fraction", "seed"}
    planted = config.corpus.planted.model_dump(mode="json") if config.corpus.reader == "planted" else None
    new = config.lm.name is None
    return {
        "corpus": config.corpus.model_dump(mode="json", include=used) | {"planted": planted},
        "actions": config.actions.model_dump(mode="json"),
        "tokenizer": config.lm.vocabulary if new else _checksums(folder / "tokenizer"),
        "encoder": None if config.actions.encoder == "tfidf" else [_encoder(config.actions.encoder), device],
        "code": digest_of([*sorted(Path(__file__).parent.glob("*.py")), Path(storage.__file__)]),
        "versions": {name: installed_version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def _encoder(name: str) -> str | dict[str, str]:
    """What a sentence-transformers model is now: its revision on the hub, or its files."""
    source = encoder_source(name)
    return _checksums(Path(source.name)) if source.revision is None else source.revision


def _checksums(folder: Path) -> dict[str, str]:
    """A digest of every file below a folder, but for documents' texts."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _TEXTS)
    return {path.relative_to(folder).as_posix(): digest_of([path]) for path in files}


TOKENIZER_CHARACTERS = 100_000_000
"""The tokenizer of a new LM is trained on about so many characters at most: it learns nothing from more."""

_ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class _Begun:
    """A corpus whose documents are written and split.

    Attributes:
        config: The settings.
        folder: Where the corpus is being written.
        texts: Its documents.
        split: Of each document, its number in `SPLITS`.
        characters: Of all documents.
        encoder: The pre-trained one; None: it is to be fitted.
        progress: Told of every stage.
    """

    config: Config
    folder: Path
    texts: DocumentTexts
    split: np.ndarray
    characters: int
    encoder: SentenceEncoder | None
    progress: Progress

    @property
    def processes(self) -> int:
        return processes_for(self.characters)

    @property
    def train(self) -> np.ndarray:
        """Whether each document is one to train on."""
        return self.split == SPLITS.index("train")


def write_corpus(config: Config, folder: Path, progress: Progress, device: str = "cpu") -> Corpus:
    """Builds the corpus that the settings describe, or takes it from the cache, and opens it.

    Args:
        config: The sections `corpus`, `actions` and `lm` (for its tokenizer) are used.
        folder: Written whole or not at all.
        progress: Told of every stage.
        device: Where a pre-trained sentence encoder computes.

    Raises:
        ProbekitError: The text cannot be read or is too small for the settings.
    """
    if config.actions.labels == "planted" and config.corpus.reader != "planted":
        raise ProbekitError(
            f"actions.labels is 'planted', but corpus.reader is {config.corpus.reader!r}: only the planted "
            "corpus knows its actions; use clusters"
        )
    # What can be missing is looked for before a text is read, which may take hours.
    encoder = pretrained_encoder(config.actions, device)
    tokenizer = None if config.lm.name is None else pretrained_tokenizer(config.lm)
    with atomic_folder(folder) as partial:
        facts, digests, characters = write_documents(config.corpus, partial / "documents.arrow", progress)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial / "tokenizer")
        entry = Entry.of(config, partial, facts["fingerprint"], device)
        if entry is not None and entry.take(partial):
            progress.say(f"the same text and settings as in {entry.folder}: taken from there")
            write_json(partial / "facts.json", read_json(partial / "facts.json") | facts)
        else:
            since = time.monotonic()
            split = _write_splits(config.corpus, partial, digests)
            texts = DocumentTexts(partial / "documents.arrow")
            begun = _Begun(config, partial, texts, split, characters, encoder, progress)
            facts |= _write_tokens(begun, tokenizer or _new_tokenizer(begun))
            write_json(partial / "facts.json", facts | _write_actions(begun))
            if entry is not None and time.monotonic() - since > SECONDS_WORTH_KEEPING:
                entry.keep(partial)
    return Corpus.open(folder)


def _write_splits(settings: CorpusSettings, folder: Path, digests: np.ndarray) -> np.ndarray:
    """Splits by content: documents with one text never part, and the order of reading does not matter."""
    shares = [settings.probe_fraction, settings.validation_fraction, settings.test_fraction]
    unique, inverse = np.unique(digests, return_inverse=True)
    counts = [round(share * len(unique)) for share in shares]
    counts.insert(0, len(unique) - sum(counts))
    for name, count, share in zip(SPLITS, counts, [1.0, *shares], strict=True):
        if share and count < 1:
            raise ProbekitError(
                f"the corpus has {len(unique)} distinct documents, which leaves none for the split {name!r}; "
                "give more documents, change corpus.probe_fraction, corpus.validation_fraction and "
                "corpus.test_fraction, or cut text files into documents by corpus.separator"
            )
    order = np.random.default_rng(settings.seed).permutation(len(unique))
    split_of_unique = np.empty(len(unique), dtype=np.uint8)
    split_of_unique[order] = np.repeat(np.arange(len(SPLITS)), counts)
    split = split_of_unique[inverse]
    write_array(folder / "split.npy", split)
    return split


def _new_tokenizer(begun: _Begun) -> PreTrainedTokenizerBase:
    with begun.progress.task("train the tokenizer"):
        vocabulary, folder = begun.config.lm.vocabulary, begun.folder / "tokenizer"
        return train_tokenizer(_tokenizer_texts(begun), vocabulary, folder)


def _tokenizer_texts(begun: _Begun) -> Iterator[str]:
    """Training documents: all of them, or, of more text than is needed, some drawn at random."""
    chosen = begun.train
    share = TOKENIZER_CHARACTERS / (begun.characters * chosen.mean())
    if share < 1:
        chosen = chosen & (np.random.default_rng(begun.config.corpus.seed).random(len(chosen)) < share)
    for first, rows in begun.texts.batches():
        yield from (row["text"] for number, row in enumerate(rows, first) if chosen[number])


def _write_tokens(begun: _Begun, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    folder, settings, texts = begun.folder, begun.config.corpus, begun.texts
    cutter = Cutter(
        documents=folder / "documents.arrow",
        tokenizer=folder / "tokenizer" / "tokenizer.json",
        split_special_tokens=tokenizer.split_special_tokens,
        separator=separator_id(tokenizer),
        language=settings.language,
        planted=settings.reader == "planted",
    )
    token_type = np.uint16 if len(tokenizer) < 2**16 else np.uint32
    document_tokens, document_sentences = [], []
    total = 0
    with ExitStack() as stack, begun.progress.task("tokenise", total=len(texts)) as task:

        def appender(name: str, dtype: Any, columns: tuple[int, ...] = ()) -> ArrayAppender:
            return stack.enter_context(ArrayAppender(folder / f"{name}.npy", dtype, columns))

        tokens, first_token = appender("tokens", token_type), appender("first_token", np.int64)
        spans = appender("spans", np.int64, (2,))
        planted = appender("planted_actions", np.int32) if cutter.planted else None
        for cut in in_order(cutter, ((batch,) for batch in range(len(texts.starts) - 1)), begun.processes):
            tokens.append(cut.tokens)
            first_token.append(cut.first_token + total)
            spans.append(cut.spans)
            if planted is not None and cut.planted_actions is not None:
                planted.append(cut.planted_actions)
            document_tokens.append(cut.document_tokens)
            document_sentences.append(cut.document_sentences)
            total += len(cut.tokens)
            task.advance(len(cut.document_tokens))
    lengths = np.concatenate(document_sentences)
    write_array(folder / "document_tokens.npy", _bounds(np.concatenate(document_tokens)))
    write_array(folder / "document_sentences.npy", _bounds(lengths))
    return {
        "tokens": total - len(texts),
        "sentences": int(lengths.sum()),
        "one_sentence_documents": int((lengths == 1).sum()),
        "vocabulary": len(tokenizer),
    }


def _write_actions(begun: _Begun) -> dict[str, Any]:
    config, folder, progress = begun.config, begun.folder, begun.progress
    settings, seed = config.actions, config.corpus.seed
    document_sentences = read_array(folder / "document_sentences.npy")
    train = np.flatnonzero(begun.train)
    candidates = ranges(document_sentences[train], document_sentences[train + 1])
    if len(candidates) < settings.k:
        raise ProbekitError(
            f"actions.k is {settings.k}, but the training documents have {len(candidates)} sentences; lower "
            "actions.k or give more text"
        )
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(candidates, size=min(settings.fit_sentences, len(candidates)), replace=False))
    encoder = begun.encoder
    if encoder is None:
        with progress.task("fit the sentence encoder"):
            sentences = _chosen_sentences(begun, sample)
            encoder = TfidfEncoder.fit(sentences, settings.dimensions, EMBEDDED_AT_ONCE, seed)
    encoder.save(folder / "encoder")
    with (
        progress.task("embed sentences", total=int(document_sentences[-1])) as task,
        ArrayAppender(folder / "embeddings.npy", np.float32, (encoder.dimensions,)) as embeddings,
    ):
        for block in _embedded(begun, encoder):
            embeddings.append(block)
            task.advance(len(block))
    with progress.task("cluster sentences into actions"):
        vectors = read_array(folder / "embeddings.npy")
        sampled = _rows(vectors, sample)
        codebook = fit_codebook(sampled, settings.k, seed)
        actions = codebook.nearest(vectors)
        facts: dict[str, Any] = {}
        if config.corpus.reader == "planted":
            facts["adjusted_rand_index"] = _agreement(folder, actions, candidates)
        if settings.labels == "planted":
            actions = np.array(read_array(folder / "planted_actions.npy"))
            codebook = label_centroids(sampled, actions[sample], config.corpus.planted.actions)
    write_array(folder / "actions.npy", actions)
    codebook.save(folder / "codebook.safetensors")
    return facts


def _agreement(folder: Path, clusters: np.ndarray, sentences: np.ndarray) -> float:
    from sklearn.metrics import adjusted_rand_score

    planted = read_array(folder / "planted_actions.npy")
    return float(adjusted_rand_score(planted[sentences], clusters[sentences]))


def _embedded(begun: _Begun, encoder: SentenceEncoder) -> Iterator[np.ndarray]:
    """The embeddings of all sentences, some at a time."""
    if isinstance(encoder, TfidfEncoder):
        work = Embedder(begun.folder / "documents.arrow", begun.folder, begun.folder / "encoder")
        yield from in_order(work, enumerate(begun.texts.starts[:-1].tolist()), begun.processes)
        return
    size, waiting = EMBEDDED_AT_ONCE, list[str]()
    for sentences in _sentences(begun):
        waiting += sentences
        whole = len(waiting) - len(waiting) % size
        yield from (encoder.encode(waiting[start : start + size]) for start in range(0, whole, size))
        del waiting[:whole]
    if waiting:
        yield encoder.encode(waiting)


def _sentences(begun: _Begun) -> Iterator[list[str]]:
    """All sentences, those of a batch of documents at a time."""
    document_sentences = read_array(begun.folder / "document_sentences.npy")
    spans = read_array(begun.folder / "spans.npy")
    for first, rows in begun.texts.batches():
        bounds = document_sentences[first : first + len(rows) + 1]
        yield sentence_texts(rows, np.diff(bounds), spans[bounds[0] : bounds[-1]])


def _chosen_sentences(begun: _Begun, chosen: np.ndarray) -> list[str]:
    """Sentences by their numbers, which are in order."""
    texts: list[str] = []
    first = 0
    for sentences in _sentences(begun):
        here = chosen[slice(*np.searchsorted(chosen, [first, first + len(sentences)]))] - first
        texts += [sentences[n] for n in here.tolist()]
        first += len(sentences)
    return texts


def _rows(mapped: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Rows of a mapped array, without those between them."""
    rows = np.empty((len(chosen), *mapped.shape[1:]), mapped.dtype)
    for part in np.array_split(np.arange(len(chosen)), len(chosen) // _ROWS_AT_ONCE + 1):
        rows[part] = mapped[chosen[part]]
    return rows


def _bounds(lengths: np.ndarray) -> np.ndarray:
    """Where each of several things of these lengths begins, and at the end where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
