"""Sentence encoders: TF-IDF with truncated SVD, fitted on the corpus, or a sentence-transformers model.

Importing this module does not import torch, so that the processes that embed sentences
stay small.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from safetensors.numpy import load_file
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from probekit.data import hub
from probekit.data.sentences import sentences_of_batch
from probekit.errors import ProbekitError, one_line
from probekit.io import atomic_folder, read_json, write_json, write_tensors

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


LongSentences = Literal["cut", "mean"]
"""The values of `actions.long_sentences`."""

EMBEDDED_AT_ONCE = 1024
"""Sentences in a batch, which a pre-trained encoder sorts by length."""
_IN_ONE_PASS = 32
"""Sentences in a forward pass of a pre-trained encoder: few, so that they are hardly padded."""
MAX_WORDS = 100_000
"""The most frequent words of the sample that TF-IDF knows; bounds memory, not quality."""

# In scripts without spaces (Thai to Khmer, kana, Han) every character is a word; in all others, a run of
# letters, digits and the marks on them. `\w` does not match marks; without them Hindi words would fall apart.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_MARKS = r"\u0300-\u036f\u0591-\u05c7\u0610-\u065f\u0900-\u0963\u0966-\u0dff"
WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[\w{_MARKS}])+")
"""Matches a word in any script."""


class TfidfEncoder:
    """Latent semantic analysis: log-scaled TF-IDF counts of words, projected by a truncated SVD.

    Args:
        words: Known words, in the order of their columns.
        idf: Float32 [words], weight of each word.
        components: Float32 [dimensions, words], the right singular vectors.
    """

    def __init__(self, words: Sequence[str], idf: np.ndarray, components: np.ndarray) -> None:
        self.dimensions = len(components)
        self.components = components
        self._words = list(words)
        self._projection = np.ascontiguousarray(components.T)
        self._vectorizer = _vectorizer(vocabulary=self._words)
        self._vectorizer.idf_ = idf

    @classmethod
    def fit(cls, sentences: Sequence[str], dimensions: int, seed: int) -> Self:
        """Fits words, weights and singular vectors to sentences.

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
        return cls(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_, components)

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Float32 [sentences, dimensions]; each row depends on its own sentence alone, to the bit."""
        embeddings = np.empty((len(sentences), self.dimensions), np.float32)
        for start in range(0, len(sentences), EMBEDDED_AT_ONCE):
            batch = sentences[start : start + EMBEDDED_AT_ONCE]
            vectors = self.counts(batch) @ self._projection
            norms = np.linalg.norm(vectors, axis=1, keepdims=True)
            embeddings[start : start + len(batch)] = vectors / np.where(norms > 0, norms, 1)
        return embeddings

    def counts(self, sentences: Sequence[str]) -> csr_matrix:
        """The weighted word counts of sentences, float32 [sentences, words]."""
        return self._vectorizer.transform(sentences)

    def save(self, folder: Path) -> None:
        """Writes the words as JSON, their weights and the singular vectors as safetensors."""
        import torch

        arrays = {"idf": self._vectorizer.idf_, "components": self.components}
        with atomic_folder(folder) as partial:
            write_json(partial / "encoder.json", {"kind": "tfidf"})
            write_json(partial / "words.json", self._words)
            write_tensors(
                partial / "encoder.safetensors",
                {name: torch.from_numpy(array) for name, array in arrays.items()},
            )

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote."""
        tensors = load_file(folder / "encoder.safetensors")
        return cls(read_json(folder / "words.json"), tensors["idf"], tensors["components"])


def _vectorizer(**arguments: Any) -> TfidfVectorizer:
    return TfidfVectorizer(token_pattern=WORD.pattern, sublinear_tf=True, dtype=np.float32, **arguments)


_load_tfidf = lru_cache(maxsize=1)(TfidfEncoder.load)


def embed_batch(folder: Path, batch: int, first: int) -> np.ndarray:
    """TF-IDF embeddings of a batch of the documents of a corpus that is being built.

    Args:
        folder: The corpus, with its sentences and its encoder.
        batch: Number of the batch in the file of documents.
        first: Number of its first document.

    Returns:
        Float32 [sentences, dimensions].
    """
    return _load_tfidf(folder / "encoder").encode(sentences_of_batch(folder, batch, first))


class PretrainedEncoder:
    """A sentence-transformers model, saved by name and revision, not copied.

    Args:
        name: Hub name or local folder.
        device: Where it computes, as torch names it.
        revision: Revision on the hub; the newest if None.
        long_sentences: What is done with sentences that are longer than it reads (`actions.long_sentences`).

    Attributes:
        model: The sentence-transformers module.
        longest: Tokens that it reads of a sentence, without special ones; None: as many as there are.
        long: How many of the sentences that were encoded are longer.
        cuts: Whether of those only the beginning is read.

    Raises:
        ProbekitError: sentence-transformers is not installed, or cannot find or load the model.
    """

    def __init__(
        self, name: str, device: str, revision: str | None = None, long_sentences: LongSentences = "cut"
    ) -> None:
        library, source = _find(name, revision)
        try:
            self.model = library(source.name, device=device, trust_remote_code=False, **source.arguments)
        except (OSError, ValueError) as error:
            raise ProbekitError(
                f"actions.encoder is {name!r}, which sentence-transformers cannot load "
                f"({one_line(error)}); name one of its models, or 'tfidf'"
            ) from None
        self._name, self._revision, self.cuts = source.name, source.revision, long_sentences == "cut"
        self.longest, self.long = _longest(self.model), 0
        self.dimensions = self._embed([""]).shape[1]

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """Float32 [sentences, dimensions]; the batch of a sentence changes its row by rounding alone."""
        pieces = [self._pieces(sentence) for sentence in sentences]
        self.long += sum(len(own) > 1 for own in pieces)
        if self.cuts:
            return self._embed(sentences).reshape(len(sentences), self.dimensions)
        rows = self._embed([piece for own in pieces for piece in own]).reshape(-1, self.dimensions)
        embeddings = np.empty((len(sentences), self.dimensions), np.float32)
        begin = 0
        for number, own in enumerate(pieces):
            mean = rows[begin : begin + len(own)].mean(axis=0)
            embeddings[number] = mean / max(np.linalg.norm(mean), 1e-12) if len(own) > 1 else mean
            begin += len(own)
        return embeddings

    def pieces(self, sentence: str) -> list[str]:
        """What is embedded of a sentence: its pieces, or all of it as one."""
        return [sentence] if self.cuts else self._pieces(sentence)

    def _pieces(self, sentence: str) -> list[str]:
        """A sentence in pieces of at most as many tokens as are read, cut between words."""
        # No token is shorter than a byte.
        if self.longest is None or len(sentence.encode("utf-8", "replace")) <= self.longest:
            return [sentence]
        found = self.model.tokenizer(
            sentence, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
        )
        words, offsets, begin = found.word_ids(), found["offset_mapping"], [0]
        while begin[-1] + self.longest < len(words):
            stop = begin[-1] + self.longest
            while stop > begin[-1] and words[stop] == words[stop - 1]:
                stop -= 1
            begin.append(stop if stop > begin[-1] else begin[-1] + self.longest)
        edges = [0, *(offsets[token][0] for token in begin[1:]), len(sentence)]
        return [sentence[a:b] for a, b in pairwise(edges)]

    def save(self, folder: Path) -> None:
        """Writes where the model is, not its weights."""
        facts = {
            "kind": "pretrained",
            "name": self._name,
            "revision": self._revision,
            "dimensions": self.dimensions,
            "long_sentences": "cut" if self.cuts else "mean",
        }
        with atomic_folder(folder) as partial:
            write_json(partial / "encoder.json", facts)

    @classmethod
    def load(cls, folder: Path, device: str) -> Self:
        """Loads the model that `save` named, at the same revision.

        Raises:
            ProbekitError: The model is gone, or another one has taken its folder.
        """
        facts: dict[str, Any] = read_json(folder / "encoder.json")
        encoder = cls(facts["name"], device, facts["revision"], facts["long_sentences"])
        if encoder.dimensions != facts["dimensions"]:
            raise ProbekitError(
                f"the sentence encoder {facts['name']!r} has {encoder.dimensions} dimensions, but had "
                f"{facts['dimensions']} when {folder} was written; put the old model back"
            )
        return encoder

    def _embed(self, sentences: Sequence[str]) -> np.ndarray:
        embeddings = self.model.encode(
            list(sentences),
            batch_size=_IN_ONE_PASS,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return embeddings.astype(np.float32, copy=False)


SentenceEncoder = TfidfEncoder | PretrainedEncoder
"""Maps sentences to vectors that are near where these are similar, of norm 1, or 0 without a known word."""


def _longest(model: SentenceTransformer) -> int | None:
    """Tokens that a model reads of a sentence, without special ones, if its tokenizer says where they are."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None or not getattr(tokenizer, "is_fast", False) or not model.max_seq_length:
        return None
    return max(1, model.max_seq_length - tokenizer.num_special_tokens_to_add())


def _find(name: str, revision: str | None) -> tuple[type[SentenceTransformer], hub.Source]:
    """The class of sentence-transformers, and where a model of it is."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ProbekitError(
            f"actions.encoder is {name!r}, which needs sentence-transformers; "
            "pip install sentence-transformers"
        ) from None
    # As in sentence-transformers, a bare name is one of its own models.
    full_name = name if "/" in name or Path(name).is_dir() else f"sentence-transformers/{name}"
    return SentenceTransformer, hub.find(full_name, setting="actions.encoder", revision=revision)


def load_encoder(folder: Path, device: str) -> SentenceEncoder:
    """Reads what an encoder's `save` wrote; its embeddings are those of the encoder that was saved."""
    kind = read_json(folder / "encoder.json")["kind"]
    return TfidfEncoder.load(folder) if kind == "tfidf" else PretrainedEncoder.load(folder, device)


def check_encoder(folder: Path) -> None:
    """Refuses a saved encoder that cannot be loaded here, before long work that needs it.

    Raises:
        ProbekitError: Its library is not installed, or its model is gone.
    """
    facts = read_json(folder / "encoder.json")
    if facts["kind"] == "pretrained":
        _find(facts["name"], facts["revision"])
