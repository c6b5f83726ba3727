"""What a corpus looks like: sizes, sentence lengths, the share of each action, its nearest sentences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from probekit.corpus.actions import nearest_sentences
from probekit.corpus.store import SPLITS, Corpus
from probekit.errors import ProbekitError
from probekit.storage import atomic_path


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
    document = corpus.document_of(np.arange(len(corpus.first_token)))
    stop = np.append(corpus.first_token[1:], corpus.document_tokens[-1])
    lengths = np.minimum(stop, corpus.document_tokens[document + 1]) - corpus.first_token
    quantiles = [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0]
    return pd.Series(np.quantile(lengths, quantiles), index=quantiles, name="tokens")


def action_table(corpus: Corpus, nearest: int = 2) -> pd.DataFrame:
    """For every action, the share of training sentences it has and the sentences nearest to its embedding.

    Args:
        corpus: The corpus.
        nearest: Sentences to show for each action.

    Returns:
        Columns `sentences`, `share` and `nearest` (a list of texts), most frequent action first.
    """
    train = corpus.sentences(corpus.documents("train"))
    counts = np.bincount(corpus.actions[train], minlength=corpus.k)
    closest = nearest_sentences(corpus.embeddings, corpus.actions, corpus.codebook, nearest)
    table = pd.DataFrame(
        {
            "sentences": counts,
            "share": counts / max(1, len(train)),
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
    """Writes a row for every sentence, in the corpus's order: columns of labels to probe for can be added.

    Args:
        corpus: The corpus.
        path: Where, ending in .csv, .jsonl or .parquet.

    Raises:
        ProbekitError: The suffix is another one.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ProbekitError(f"--export is {str(path)!r}; it must end in {', '.join(WRITERS)}")
    sentences = np.arange(len(corpus.first_token))
    document = corpus.document_of(sentences)
    table = pd.DataFrame(
        {
            "document": document,
            "split": np.array(SPLITS)[corpus.split[document]],
            "sentence": sentences - corpus.document_sentences[document],
            "action": corpus.actions,
            "text": _texts(corpus),
        }
    )
    with atomic_path(path) as temporary:
        WRITERS[path.suffix](table, temporary)
    return path


def _texts(corpus: Corpus) -> list[str]:
    return [
        row["text"][start:end].strip()
        for first, rows in corpus.texts.batches()
        for number, row in enumerate(rows, first)
        for start, end in corpus.spans[
            corpus.document_sentences[number] : corpus.document_sentences[number + 1]
        ]
    ]
