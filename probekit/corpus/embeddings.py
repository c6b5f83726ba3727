"""Sentence encoders: TF-IDF with truncated SVD, fitted on the corpus, or a sentence-transformers model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from probekit import hub
from probekit.config import ActionSettings
from probekit.corpus.tfidf import TfidfEncoder
from probekit.errors import ProbekitError
from probekit.storage import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


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
    return PretrainedEncoder(settings.encoder, settings.batch_size, device)


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
            "pip install 'probekit[encoders]'"
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
