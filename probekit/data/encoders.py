"""Sentence encoders: TF-IDF with truncated SVD, fitted on the corpus, or a sentence-transformers model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from probekit.config import ActionSettings
from probekit.data import hub
from probekit.data.readers import read_batch, sentence_texts
from probekit.errors import ProbekitError
from probekit.io import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


EMBEDDED_AT_ONCE = 1024
"""Sentences in a batch."""

MAX_WORDS = 100_000
"""The most frequent words of the sample that TF-IDF knows; bounds memory, not quality."""

# Scripts that write no spaces (Thai to Khmer, kana, Han) give a word for each character, all others a word
# for each run of letters, digits and the marks on them. `\w` has no marks: without them Hindi falls apart.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_MARKS = r"\u0300-\u036f\u0591-\u05c7\u0610-\u065f\u0900-\u0963\u0966-\u0dff"
WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[\w{_MARKS}])+")
"""A word, in every script."""


class TfidfEncoder:
    """Word counts, dampened and weighted by rarity, projected onto their main directions (LSA).

    Args:
        words: Known words, in the order of their columns.
        idf: Float32 [words], weight of each word.
        components: Float32 [dimensions, words], the directions.
        batch_size: Sentences embedded at once.
    """

    def __init__(
        self, words: Sequence[str], idf: np.ndarray, components: np.ndarray, batch_size: int
    ) -> None:
        self.dimensions = len(components)
        self.components = components
        self._words = list(words)
        self._projection = np.ascontiguousarray(components.T)
        self._vectorizer = _vectorizer(vocabulary=self._words)
        self._vectorizer.idf_ = idf
        self._batch_size = batch_size

    @classmethod
    def fit(cls, sentences: Sequence[str], dimensions: int, batch_size: int, seed: int) -> Self:
        """Learns words, weights and directions from sentences.

        Raises:
            ProbekitError: The sentences have too few words, or are too few, for so many dimensions.
        """
        vectorizer = _vectorizer(max_features=MAX_WORDS)
        try:
            counts = vectorizer.fit_transform(sentences)
        except ValueError:
            raise ProbekitError(
                f"the {len(sentences)} sentences to fit the encoder on hold no word; check corpus.path"
            ) from None
        most = min(counts.shape)
        if dimensions > most:
            raise ProbekitError(
                f"actions.dimensions is {dimensions}, but {counts.shape[0]} sentences with {counts.shape[1]} "
                f"distinct words allow at most {most}; set it to {most} or less, or give more text"
            )
        # One thread, so that sums are taken in one order and the same seed gives the same bits.
        with threadpool_limits(1):
            svd = TruncatedSVD(dimensions, random_state=seed).fit(counts)
        components = svd.components_.astype(np.float32)
        return cls(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, components, batch_size)

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Float32 [sentences, dimensions]; each row depends on its own sentence alone, to the bit."""
        embeddings = np.empty((len(sentences), self.dimensions), np.float32)
        for start in range(0, len(sentences), self._batch_size):
            batch = sentences[start : start + self._batch_size]
            vectors = self.counts(batch) @ self._projection
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            embeddings[start : start + len(batch)] = vectors / np.where(norms > 0, norms, 1)
        return embeddings

    def counts(self, sentences: Sequence[str]) -> csr_matrix:
        """The weighted word counts of sentences, float32 [sentences, words]."""
        return self._vectorizer.transform(sentences)

    def save(self, folder: Path) -> None:
        """Writes the words as JSON, their weights and the directions as safetensors."""
        import torch

        from probekit.io import atomic_folder, write_json, write_tensors

        arrays = {"idf": self._vectorizer.idf_, "components": self.components}
        with atomic_folder(folder) as partial:
            write_json(partial / "encoder.json", {"kind": "tfidf", "batch_size": self._batch_size})
            write_json(partial / "words.json", self._words)
            write_tensors(
                partial / "encoder.safetensors",
                {name: torch.from_numpy(array) for name, array in arrays.items()},
            )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote."""
        from probekit.io import read_json, read_tensors

        tensors = read_tensors(folder / "encoder.safetensors")
        return cls(
            read_json(folder / "words.json"),
            tensors["idf"].numpy(),
            tensors["components"].numpy(),
            read_json(folder / "encoder.json")["batch_size"],
        )


@dataclass(frozen=True)
class Embedder:
    """Embeds the sentences of a corpus that is being built, a batch of documents at a time.

    Attributes:
        documents: File of the documents.
        folder: Folder of the corpus, with the sentences' spans.
        encoder: Where a `TfidfEncoder` was saved.
    """

    documents: Path
    folder: Path
    encoder: Path

    def __call__(self, batch: int, first: int) -> NDArray[np.float32]:
        """The embeddings of a batch of documents, by its number and that of its first document."""
        rows = read_batch(self.documents, batch)
        bounds = np.load(self.folder / "document_sentences.npy", mmap_mode="r")[first : first + len(rows) + 1]
        spans = np.load(self.folder / "spans.npy", mmap_mode="r")[bounds[0] : bounds[-1]]
        return _saved(self.encoder).encode(sentence_texts(rows, np.diff(bounds), spans))


@lru_cache(maxsize=1)
def _saved(folder: Path) -> TfidfEncoder:
    """As `TfidfEncoder.load`, without torch."""
    tensors = load_file(folder / "encoder.safetensors")
    words, facts = (json.loads((folder / name).read_text("utf-8")) for name in ("words.json", "encoder.json"))
    return TfidfEncoder(words, tensors["idf"], tensors["components"], facts["batch_size"])


def _vectorizer(**arguments: Any) -> TfidfVectorizer:
    return TfidfVectorizer(token_pattern=WORD.pattern, sublinear_tf=True, dtype=np.float32, **arguments)


class SentenceEncoder(Protocol):
    """Turns sentences into vectors whose nearness is likeness.

    Attributes:
        dimensions: Width of an embedding.
    """

    dimensions: int

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Float32 [sentences, dimensions]; rows have norm 1, or 0 for a sentence with no known word."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what `load_encoder` needs to make the same encoder again."""
        ...


def pretrained_encoder(settings: ActionSettings, device: str) -> PretrainedEncoder | None:
    """The encoder that the settings name; None for TF-IDF, which is fitted on the corpus.

    Args:
        settings: Which encoder.
        device: Where it computes, as torch names it.

    Raises:
        ProbekitError: It cannot be loaded.
    """
    if settings.encoder == "tfidf":
        return None
    return PretrainedEncoder(settings.encoder, EMBEDDED_AT_ONCE, device)


def load_encoder(folder: Path, device: str) -> SentenceEncoder:
    """Reads what an encoder's `save` wrote; embeddings are those of the encoder that was saved."""
    facts = read_json(folder / "encoder.json")
    match facts.get("kind"):
        case "tfidf":
            return TfidfEncoder.load(folder)
        case "pretrained":
            return PretrainedEncoder.load(folder, device)
    raise ProbekitError(
        f"{folder / 'encoder.json'} names no kind of encoder; run the step that writes it again"
    )


def check_encoder(folder: Path) -> None:
    """Refuses an encoder that `save` wrote but that cannot be loaded here, before long work that needs it.

    Raises:
        ProbekitError: Its library is not installed, or its model is gone.
    """
    facts = read_json(folder / "encoder.json")
    if facts.get("kind") == "pretrained":
        _library(facts["name"])
        encoder_source(facts["name"], facts["revision"])


def _library(name: str) -> type[SentenceTransformer]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ProbekitError(
            f"actions.encoder is {name!r}, which needs sentence-transformers: "
            "pip install 'probekit-lm[encoders]'"
        ) from None
    return SentenceTransformer


def encoder_source(name: str, revision: str | None = None) -> hub.Source:
    """Where a sentence-transformers model is, and its revision on the hub."""
    # The library's own rule: a bare name is one of its own models.
    full_name = name if "/" in name or Path(name).is_dir() else f"sentence-transformers/{name}"
    return hub.find(full_name, setting="actions.encoder", revision=revision)


class PretrainedEncoder:
    """A sentence-transformers model. Saved by name and revision, not copied.

    Args:
        name: Hub name or local folder.
        batch_size: Sentences embedded at once.
        device: Where it computes, as torch names it.
        revision: Revision on the hub; the newest if None.

    Attributes:
        model: The sentence-transformers module.
    """

    def __init__(self, name: str, batch_size: int, device: str, revision: str | None = None) -> None:
        library, source = _library(name), encoder_source(name, revision)
        try:
            self.model = library(source.name, device=device, trust_remote_code=False, **source.arguments)
        except (OSError, ValueError) as error:
            raise ProbekitError(
                f"actions.encoder is {name!r}, which sentence-transformers cannot load "
                f"({' '.join(str(error).split())}); name one of its models, or 'tfidf'"
            ) from None
        self._name, self._revision, self._batch_size = source.name, source.revision, batch_size
        self.dimensions = self._embed([""]).shape[1]

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Float32 [sentences, dimensions]; a row depends on its batch by rounding alone."""
        return self._embed(sentences).reshape(len(sentences), self.dimensions)

    def save(self, folder: Path) -> None:
        """Writes where the model is, not its weights."""
        facts = {
            "kind": "pretrained",
            "name": self._name,
            "revision": self._revision,
            "dimensions": self.dimensions,
            "batch_size": self._batch_size,
        }
        with atomic_folder(folder) as partial:
            write_json(partial / "encoder.json", facts)

    @classmethod
    def load(cls, folder: Path, device: str) -> Self:
        """Loads the model that `save` named, at the same revision.

        Raises:
            ProbekitError: It is gone, or another model has taken its folder.
        """
        facts: dict[str, Any] = read_json(folder / "encoder.json")
        encoder = cls(facts["name"], facts["batch_size"], device, facts["revision"])
        if encoder.dimensions != facts["dimensions"]:
            raise ProbekitError(
                f"the sentence encoder {facts['name']!r} has {encoder.dimensions} dimensions, but had "
                f"{facts['dimensions']} when {folder} was written; put the old model back"
            )
        return encoder

    def _embed(self, sentences: Sequence[str]) -> np.ndarray:
        embeddings = self.model.encode(
            list(sentences),
            batch_size=self._batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return embeddings.astype(np.float32, copy=False)
