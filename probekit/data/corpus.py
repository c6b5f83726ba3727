"""A built corpus on disk, its splits, and tables that show it: sizes, lengths, actions, all sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from probekit.config import BosRule, user_path
from probekit.data.codebook import Codebook, nearest_sentences
from probekit.data.documents import DocumentFile
from probekit.data.sentences import sentences_of_batch
from probekit.data.special_tokens import bos_rule_for, separator_id
from probekit.data.splits import SPLITS
from probekit.data.tokenizer import load_tokenizer
from probekit.errors import ProbekitError
from probekit.io import atomic_path, read_array, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ARRAYS = ("tokens", "document_tokens", "document_sentences", "first_token", "spans", "split", "group")
"""Files that every corpus has, without their ending."""

FEW_DOCUMENTS = 40
"""Fewer test documents are warned of: 95 % intervals cover 91 % at 40, 88 % at 9 (simulated)."""

MORE_DOCUMENTS = "give more documents, or a larger corpus.test_fraction"
"""The remedy if all test documents are few."""

MORE_GROUPS = "give examples of more groups"
"""The remedy if the groups are few that examples are in."""


def too_few(documents: int, remedy: str = MORE_DOCUMENTS, what: str = "test documents") -> str | None:
    """A warning and its remedy if there are too few test documents for trustworthy intervals, else None."""
    if documents >= FEW_DOCUMENTS:
        return None
    return f"Only {documents} {what}: intervals from resampling so few are too narrow to trust; {remedy}"


def too_few_groups(groups: int, documents: int) -> str | None:
    """`too_few` of the groups that test documents are in; each is one where there are as many."""
    if groups == documents:
        return too_few(groups)
    return too_few(groups, MORE_GROUPS, "groups of test documents")


def too_few_tested(corpus: Corpus) -> str | None:
    """`too_few_groups` of a corpus's test split."""
    return too_few_groups(corpus.group_count("test"), len(corpus.documents("test")))


@dataclass(frozen=True)
class Corpus:
    """A built corpus.

    Tokens of document i are `tokens[document_tokens[i] : document_tokens[i + 1]]`, the first of them the
    separator. Sentences of document i are rows `document_sentences[i] : document_sentences[i + 1]` of the
    sentence arrays. Tokens of sentence j begin at `tokens[first_token[j]]`. `group[i]` is the number of
    the first document of its group: copies of a text, and documents of one value of the group column.

    A corpus without actions (`actions.labels: none`) has embeddings of no dimensions, actions of -1 and an
    empty codebook.
    """

    folder: Path
    tokens: np.ndarray
    document_tokens: np.ndarray
    document_sentences: np.ndarray
    first_token: np.ndarray
    spans: np.ndarray
    split: np.ndarray
    group: np.ndarray
    embeddings: np.ndarray
    actions: np.ndarray
    codebook: Codebook
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Corpus:
        """Opens a corpus that `write_corpus` wrote; arrays are mapped, not read.

        Raises:
            ProbekitError: A file is missing or cut off.
        """
        facts = read_json(folder / "facts.json")
        parts: dict[str, Any] = {name: read_array(folder / f"{name}.npy") for name in ARRAYS}
        if facts["actions"]:
            parts |= {name: read_array(folder / f"{name}.npy") for name in ("embeddings", "actions")}
            parts["codebook"] = Codebook.load(folder / "codebook.safetensors")
        else:
            sentences = len(parts["first_token"])
            parts["embeddings"] = np.zeros((sentences, 0), np.float32)
            parts["actions"] = np.full(sentences, -1, np.int32)
            parts["codebook"] = Codebook(np.zeros((0, 0), np.float32))
        return cls(folder=folder, facts=facts, **parts)

    @property
    def has_actions(self) -> bool:
        """Whether sentences have actions."""
        return self.k > 0

    def require_actions(self) -> None:
        """Checks that sentences have actions.

        Raises:
            ProbekitError: The corpus was built without.
        """
        if not self.has_actions:
            raise ProbekitError(
                "the corpus was built without actions (actions.labels is 'none'), which this needs; build "
                "one with --actions.labels clusters in another --out"
            )

    @property
    def k(self) -> int:
        """Number of actions."""
        return len(self.codebook.centroids)

    @cached_property
    def texts(self) -> DocumentFile:
        """The documents themselves: their texts and names."""
        return DocumentFile(self.folder / "documents.arrow")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the texts."""
        return load_tokenizer(self.folder / "tokenizer")

    @cached_property
    def separator(self) -> int:
        """Id of the token before every document."""
        return separator_id(self.tokenizer)

    @property
    def bos_rule(self) -> BosRule:
        """Where the LM reads the separator."""
        rule: BosRule = self.facts["bos"]
        return rule

    def bos_rule_of_text(self, setting: BosRule | Literal["auto"]) -> BosRule:
        """Where the LM reads the separator in plain text, which in a corpus of chats is not its own rule."""
        return bos_rule_for(self.tokenizer, setting) if self.facts["chats"] else self.bos_rule

    def action_words(self, action: int) -> list[str]:
        """The words that set an action's training sentences apart; see `telling_words`."""
        words: list[str] = self.facts["action_words"][action]
        return words

    def action_name(self, action: int) -> str:
        """An action's number and its words."""
        words = ", ".join(self.action_words(action))
        return f"{action} ({words})" if words else str(action)

    def documents(self, split: str) -> np.ndarray:
        """Numbers of the documents of a split, in order."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def group_count(self, split: str) -> int:
        """Number of groups of documents in a split."""
        return len(np.unique(self.group[self.documents(split)]))

    def sentences(self, documents: np.ndarray) -> np.ndarray:
        """Numbers of all sentences of some documents, in order."""
        return ranges(self.document_sentences[documents], self.document_sentences[documents + 1])

    def document_of(self, sentences: np.ndarray) -> np.ndarray:
        """The document that holds each sentence."""
        return np.searchsorted(self.document_sentences, sentences, side="right") - 1

    def stops(self, sentences: np.ndarray) -> np.ndarray:
        """The token after the last one of each sentence."""
        following = np.append(self.first_token, self.document_tokens[-1])[sentences + 1]
        return np.minimum(following, self.document_tokens[self.document_of(sentences) + 1])

    def previous_actions(self, sentences: np.ndarray) -> np.ndarray:
        """The action before each sentence `[sentences]`, -1 for a document's first or where none is."""
        return self.previous_labels(self.known_actions, sentences)

    def previous_labels(self, labels: np.ndarray, sentences: np.ndarray) -> np.ndarray:
        """The label before each sentence, as `previous_actions`, of any labels; NaN for no number."""
        first = sentences == self.document_sentences[self.document_of(sentences)]
        missing, kind = (np.nan, np.float64) if labels.dtype.kind == "f" else (-1, np.int64)
        return np.where(first, missing, labels[np.maximum(sentences - 1, 0)]).astype(kind)

    @cached_property
    def with_action(self) -> np.ndarray:
        """Whether each sentence has an action to predict `[sentences]`.

        One that holds no word that the encoder knows has an embedding of zeros, which is nearest to some
        centroid, but says nothing.
        """
        if not self.facts.get("sentences_without_action"):
            return np.ones(len(self.first_token), dtype=bool)
        return np.asarray(self.embeddings.any(axis=1))

    @cached_property
    def known_actions(self) -> np.ndarray:
        """Each sentence's action, -1 for one that has none to predict `[sentences]`."""
        return self.actions if self.with_action.all() else np.where(self.with_action, self.actions, -1)

    def by_group(self, table: pd.DataFrame) -> pd.DataFrame:
        """A table with the number of each document's group in place of its own: what is resampled."""
        return table.assign(document=self.group[table.document])

    def sentence_texts(self, sentences: Sequence[int] | np.ndarray) -> list[str]:
        """The text of sentences, surrounding white space removed."""
        numbers = np.asarray(sentences)
        texts, read, text = [], -1, ""
        for sentence, document in zip(numbers, self.document_of(numbers), strict=True):
            if document != read:
                read, text = document, self.texts[int(document)].text
            start, end = self.spans[sentence]
            texts.append(text[start:end].strip())
        return texts


def ranges(starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """`concatenate([arange(a, b) for a, b in zip(starts, stops)])`, vectorised."""
    lengths = stops - starts
    offsets = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.arange(lengths.sum(), dtype=np.int64) - offsets + np.repeat(starts, lengths)


def sizes(corpus: Corpus) -> pd.DataFrame:
    """Documents, sentences and tokens of every split."""
    rows = {}
    for split in SPLITS:
        documents = corpus.documents(split)
        tokens = corpus.document_tokens[documents + 1] - corpus.document_tokens[documents] - 1
        sentences = corpus.document_sentences[documents + 1] - corpus.document_sentences[documents]
        rows[split] = {
            "documents": len(documents),
            "sentences": int(sentences.sum()),
            "tokens": int(tokens.sum()),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def sentence_lengths(corpus: Corpus) -> pd.Series:
    """Quantiles of the sentences' lengths in tokens."""
    lengths = corpus.stops(np.arange(len(corpus.first_token))) - corpus.first_token
    quantiles = [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0]
    return pd.Series(np.quantile(lengths, quantiles), index=quantiles, name="tokens")


def action_table(corpus: Corpus, nearest: int = 2) -> pd.DataFrame:
    """The share of training sentences of every action, and the sentences nearest to its embedding.

    Args:
        corpus: The corpus.
        nearest: Sentences to show for each action.

    Returns:
        Columns `sentences`, `share`, `words` (those that set it apart) and `nearest` (a list of texts), most
        frequent action first.
    """
    train = corpus.sentences(corpus.documents("train"))
    actions = corpus.known_actions
    counts = np.bincount(actions[train][actions[train] >= 0], minlength=corpus.k)
    closest = nearest_sentences(corpus.embeddings, actions, corpus.codebook, nearest)
    table = pd.DataFrame(
        {
            "sentences": counts,
            "share": counts / max(1, counts.sum()),
            "words": [", ".join(corpus.action_words(action)) for action in range(corpus.k)],
            "nearest": [corpus.sentence_texts(row[row >= 0]) for row in closest],
        }
    )
    table.index.name = "action"
    return table.sort_values("sentences", ascending=False, kind="stable")


WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".jsonl": lambda table, path: table.to_json(path, orient="records", lines=True, force_ascii=False),
    ".parquet": lambda table, path: table.to_parquet(path, index=False),
}
"""Formats of the table of sentences, by suffix."""


def export_sentences(corpus: Corpus, path: str | Path) -> Path:
    """Writes a row for every sentence, in the order of the corpus, to which columns of labels can be added.

    Args:
        corpus: The corpus.
        path: Where, ending in .csv, .jsonl or .parquet.

    Raises:
        ProbekitError: The suffix is none of these.
    """
    path = user_path(path)
    if path.suffix not in WRITERS:
        raise ProbekitError(f"--export is {str(path)!r}; it must end in {', '.join(WRITERS)}")
    sentences = np.arange(len(corpus.first_token))
    document = corpus.document_of(sentences)
    table = pd.DataFrame(
        {
            "document": document,
            "name": np.array([text.name for _, batch in corpus.texts.batches() for text in batch])[document],
            "split": np.array(SPLITS)[corpus.split[document]],
            "sentence": sentences - corpus.document_sentences[document],
            **({"action": corpus.actions} if corpus.has_actions else {}),
            "text": [
                text
                for batch in enumerate(corpus.texts.starts[:-1].tolist())
                for text in sentences_of_batch(corpus.folder, *batch)
            ],
        }
    )
    with atomic_path(path) as temporary:
        WRITERS[path.suffix](table, temporary)
    return path
