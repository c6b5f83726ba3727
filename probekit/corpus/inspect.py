"""What a corpus looks like: sizes, sentence lengths, the share of each action, its nearest sentences."""

from __future__ import annotations

import numpy as np
import pandas as pd

from probekit.corpus.actions import nearest_sentences
from probekit.corpus.store import SPLITS, Corpus


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
