"""Settings of the text, and of what its sentences become."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from probekit.config.base import Positive, Seed, Settings, Share, SomeShare


class PlantedSettings(Settings):
    """The synthetic corpus with a known plan (`corpus.reader: planted`)."""

    documents: Annotated[int, Field(ge=4)] = 6000
    """Number of documents to generate."""
    actions: Annotated[int, Field(ge=2, le=4096)] = 24
    """Number of planted actions."""
    types: Positive = 4
    """Number of hidden document types, each with its own action-to-action transitions."""
    successors: Positive = 3
    """Actions that can follow an action within one document type; fewer means a more certain plan."""
    min_sentences: Annotated[int, Field(ge=2)] = 10
    """Fewest sentences in a document."""
    max_sentences: Annotated[int, Field(ge=2)] = 16
    """Most sentences in a document."""
    min_words: Positive = 4
    """Fewest words in a sentence."""
    max_words: Positive = 8
    """Most words in a sentence."""
    vocabulary: Annotated[int, Field(ge=2)] = 240
    """Number of distinct words."""
    concentration: Annotated[float, Field(gt=0.0)] = 0.05
    """Dirichlet concentration of an action's distribution over words; smaller means more telling words."""
    seed: Seed = 0
    """Seed of the generator."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for low, high in (
            ("min_sentences", "max_sentences"),
            ("min_words", "max_words"),
            ("successors", "actions"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} exceeds {high} {getattr(self, high)}")
        return self


class CorpusSettings(Settings):
    """Where text comes from and how documents are split."""

    reader: Literal["planted", "text", "wikitext", "jsonl", "parquet", "huggingface"] = "text"
    """Format: the planted corpus, text files (a document each), WikiText files (articles split at
    ` = Title = `), JSON lines or Parquet with a text column, or a Hugging Face dataset."""
    path: str | None = None
    """File or folder to read; for `huggingface`, the dataset's hub name or local folder."""
    separator: str | None = None
    """Line that separates documents in text files, such as <|endoftext|>, or an empty text for blank lines;
    unset: a file is one document."""
    text_column: str = "text"
    """Column that holds the text (jsonl, parquet, huggingface)."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset, such as 20231101.en."""
    dataset_split: str = "train"
    """Split of a Hugging Face dataset to read."""
    encoding: str = "utf-8"
    """Character encoding of text files."""
    decode_errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not valid in the encoding: stop and say where (strict), or replace them."""
    language: str = "en"
    """Language code for the sentence splitter."""
    max_documents: Positive | None = None
    """Read at most this many documents."""
    probe_fraction: Share = 0.2
    """Share of documents kept from all training of LM and planner; probes are fitted on them."""
    validation_fraction: SomeShare = 0.1
    """Share of documents on which whatever is chosen is chosen."""
    test_fraction: SomeShare = 0.1
    """Share of documents on which every reported number is computed."""
    seed: Seed = 0
    """Seed of the splits, the encoder and the codebook; apart from the run's seed, so that runs with other
    seeds share the corpus."""
    planted: PlantedSettings = PlantedSettings()

    @model_validator(mode="after")
    def _leaves_training_documents(self) -> Self:
        held_out = self.probe_fraction + self.validation_fraction + self.test_fraction
        if held_out >= 1.0:
            raise ValueError(
                f"probe_fraction + validation_fraction + test_fraction is {held_out:g}; it must be below 1 "
                "to leave training documents"
            )
        return self


class ActionSettings(Settings):
    """How sentences become actions."""

    encoder: str = "tfidf"
    """Sentence encoder: `tfidf` (TF-IDF + truncated SVD, fitted on the corpus) or the hub name or folder of
    a sentence-transformers model."""
    dimensions: Positive = 64
    """Dimensions of the `tfidf` encoder's embeddings."""
    k: Annotated[int, Field(ge=8, le=4096)] = 256
    """Number of clusters of the codebook."""
    labels: Literal["clusters", "planted"] = "clusters"
    """What a sentence's action is: its nearest cluster, or (planted corpus only) the action planted there."""
    fit_sentences: Annotated[int, Field(ge=8)] = 200_000
    """The encoder and k-means are fitted on at most this many training sentences, drawn at random."""
    batch_size: Positive = 1024
    """Sentences embedded at once."""
