"""Targets: which position is read, and which action it should tell of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probekit.corpus.store import Corpus


@dataclass(frozen=True)
class Targets:
    """The examples of one distance and horizon; all arrays `[examples]`.

    Attributes:
        document: Document of the example.
        anchor: Sentence that begins at the target token.
        position: Where the activation is read, in `corpus.tokens`: `distance` tokens before the anchor.
        action: The label: action of the sentence `horizon - 1` after the anchor.
    """

    document: np.ndarray
    anchor: np.ndarray
    position: np.ndarray
    action: np.ndarray

    def __len__(self) -> int:
        return len(self.action)


def targets(corpus: Corpus, documents: np.ndarray, distance: int, horizon: int) -> Targets:
    """Every example of some documents.

    Positions before a document's first token do not exist, nor do labels after its last sentence: such
    examples are left out. So is the first sentence of every document, before which nothing can be read.
    """
    anchor = corpus.sentences(documents)
    document = corpus.document_of(anchor)
    position = corpus.first_token[anchor] - distance
    labelled = anchor + horizon - 1
    there = position > corpus.document_tokens[document]
    there &= labelled < corpus.document_sentences[document + 1]
    action = corpus.actions[labelled[there]].astype(np.int64)
    return Targets(document[there], anchor[there], position[there], action)
