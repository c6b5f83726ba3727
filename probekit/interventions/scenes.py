"""Where interventions are made: one sentence boundary of each document, with what is read around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probekit.corpus.examples import Windows
from probekit.corpus.store import Corpus
from probekit.errors import ProbekitError


@dataclass(frozen=True)
class Scenes:
    """One boundary of each document; the sentence that begins there is the *next* one.

    Attributes:
        windows: What is read around each boundary, all of it scored `[scenes]`.
        column: In the window, the position that predicts the next sentence's first token `[scenes]`.
        last: The position that predicts the next sentence's last token, or the window's last one `[scenes]`.
        sentence: The next sentence, in the corpus `[scenes]`.
        action: Its action `[scenes]`.
    """

    windows: Windows
    column: np.ndarray
    last: np.ndarray
    sentence: np.ndarray
    action: np.ndarray

    def __len__(self) -> int:
        return len(self.column)


def draw_scenes(
    corpus: Corpus, documents: np.ndarray, count: int, window: int, reach: int, seed: int
) -> Scenes:
    """Draws documents, and a boundary of each.

    The window begins so that about half of it lies before the boundary. Boundaries that fewer than `reach`
    tokens stand before take no part, nor do documents without another.

    Args:
        corpus: The corpus.
        documents: Numbers of documents.
        count: At most how many.
        window: Tokens that are read at once.
        reach: Tokens before the boundary that are needed.
        seed: Of both draws.

    Raises:
        ProbekitError: A window does not reach so far, or no document has such a boundary.
    """
    if reach > window:
        raise ProbekitError(
            f"intervene.distances has {reach}, but the LM reads {window} tokens at once (evaluation.window); "
            f"give at most {window}"
        )
    generator = np.random.default_rng(seed)
    rows: list[tuple[int, ...]] = []
    for document in generator.permutation(documents):
        if len(rows) == count:
            break
        begin, end = corpus.document_tokens[document : document + 2]
        first, last = corpus.document_sentences[document : document + 2]
        sentences = np.arange(first + 1, last)
        anchors = corpus.first_token[first + 1 : last]
        usable = sentences[anchors - reach > begin]
        if not len(usable):
            continue
        sentence = int(generator.choice(usable))
        anchor = int(corpus.first_token[sentence])
        behind = int(corpus.first_token[sentence + 1]) if sentence + 1 < last else int(end)
        start = max(int(begin), anchor - max(window // 2, reach))
        length = min(window, int(end) - 1 - start)
        column = anchor - 1 - start
        rows.append((document, start, length, column, min(behind - 2 - start, length - 1), sentence))
    if not rows:
        raise ProbekitError(
            f"no test document has a sentence that begins behind its first {reach} tokens; lower "
            "intervene.distances"
        )
    document, start, length, column, stop, sentence = np.array(sorted(rows), dtype=np.int64).T
    windows = Windows(document, start, length, length)
    return Scenes(windows, column, stop, sentence, corpus.actions[sentence].astype(np.int64))
