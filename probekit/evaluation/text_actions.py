"""The actions of any text, after the fact: split, embedded and labelled as the corpus's sentences were.

A sentence's action is the nearest centroid of the corpus's codebook, whatever `actions.labels` is: true and
generated text are then measured alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from probekit.config import Config
from probekit.corpus.sentences import complete_spans, sentence_spans
from probekit.corpus.store import Corpus
from probekit.corpus.tfidf import WORD
from probekit.evaluation.action_metrics import (
    NO_ACTION,
    Bigram,
    Floats,
    Integers,
    bigram_of_counts,
    log_shares,
)
from probekit.evaluation.baselines import count_labels
from probekit.evaluation.drafts import decoded
from probekit.run import Run


@dataclass(frozen=True)
class Cut:
    """Texts, each cut at some number of tokens.

    Attributes:
        texts: The text of the first tokens, one of each.
        actions: Actions of the sentences that lie wholly within them `[sentences]`, one array of each. A
            text's last sentence is left out where the text was cut, for nothing tells whether it is whole. Of
            a text with no whole sentence the first one counts, with all its text, behind the cut too.
        merged: How many of the first ones turned out to be one sentence with the end of the context, which
            had none of its own planned: 1, or mostly 0 `[texts]`.
    """

    texts: list[str]
    actions: list[Integers]
    merged: list[int]

    @property
    def empty(self) -> np.ndarray:
        """Which texts are blank `[texts]`."""
        return np.array([not text.strip() for text in self.texts], dtype=bool)


class Labeller:
    """Gives any text's sentences their actions, by a run's tokenizer, encoder and codebook."""

    def __init__(self, run: Run) -> None:
        self._corpus, self._encoder = run.corpus, run.encoder()
        self._language = run.config.corpus.language

    def cut(
        self,
        tokens: Sequence[np.ndarray],
        lengths: Sequence[int],
        contexts: Sequence[np.ndarray] | None = None,
    ) -> dict[int, Cut]:
        """Cuts texts at each length and labels what is left.

        A sentence is embedded once, from all its text within the longest length, and counts at every length
        that holds all of it; a first sentence counts at any length.

        Args:
            tokens: Each text's tokens; one that is as long as the longest length or longer was cut.
            lengths: In tokens.
            contexts: Tokens that each text goes on from, without the separator. Only what is behind them is
                embedded.
        """
        before = [np.zeros(0, np.int64)] * len(tokens) if contexts is None else contexts
        texts = [
            _Split(self._corpus, self._language, context, ids[: max(lengths)])
            for context, ids in zip(before, tokens, strict=True)
        ]
        actions = self._actions([text.sentences for text in texts])
        cuts = {}
        for length in lengths:
            shown = [text.first(length) for text in texts]
            whole = [
                text.whole(len(part), unfinished=len(ids) >= max(lengths))
                for text, part, ids in zip(texts, shown, tokens, strict=True)
            ]
            kept = [own[:n] for own, n in zip(actions, whole, strict=True)]
            cuts[length] = Cut(shown, kept, [text.merged for text in texts])
        return cuts

    def last_actions(self, texts: Sequence[str]) -> Integers:
        """The action of each text's last sentence `[texts]`, -1 for a blank text."""
        spans = [sentence_spans(text, self._language)[-1:] for text in texts]
        last = self._actions([_strip(text, span) for text, span in zip(texts, spans, strict=True)])
        return np.array([int(own[0]) if len(own) else NO_ACTION for own in last], np.int64)

    def _actions(self, sentences: Sequence[Sequence[str]]) -> list[Integers]:
        """The actions of each text's sentences."""
        together = [sentence for own in sentences for sentence in own]
        if not together:
            return [np.zeros(0, np.int64) for _ in sentences]
        labels = self._corpus.codebook.nearest(self._encoder.encode(together)).astype(np.int64)
        return np.split(labels, np.cumsum([len(own) for own in sentences])[:-1])


class _Split:
    """A text behind its context, split into sentences together with it.

    Attributes:
        sentences: Its own, or its part of them, surrounding white space removed.
        merged: How many of these are one with a sentence that was over at the end of the context.
    """

    def __init__(self, corpus: Corpus, language: str, context: np.ndarray, tokens: np.ndarray) -> None:
        self._tokenizer, self._context, self._tokens = corpus.tokenizer, context, tokens
        before, whole = self._decode(tokens[:0]), self._decode(tokens)
        self._begin = len(before)
        spans = sentence_spans(whole, language)
        ends = np.array([len(whole[:end].rstrip()) for _, end in spans], np.int64) - self._begin
        own = int((ends <= 0).sum())
        if own < len(spans) and not WORD.search(whole[self._begin : spans[own, 1]]):
            own += 1  # punctuation that the context's last sentence lacked
        self.merged = max(len(complete_spans(before, language)) - own, 0) if own < len(spans) else 0
        self.sentences = _strip(whole, np.maximum(spans[own:], self._begin))
        self._ends = ends[own:]

    def first(self, tokens: int) -> str:
        """The text of the first tokens."""
        return self._decode(self._tokens[:tokens])[self._begin :]

    def whole(self, characters: int, *, unfinished: bool) -> int:
        """How many sentences lie within the first characters, at least one where there is any.

        Args:
            characters: How many of the text's.
            unfinished: The last sentence may go on, and does not count.
        """
        ends = self._ends[:-1] if unfinished else self._ends
        return max(int((ends <= characters).sum()), min(1, len(self._ends)))

    def _decode(self, tokens: np.ndarray) -> str:
        return decoded(self._tokenizer, [*self._context.tolist(), *tokens.tolist()])


def _strip(text: str, spans: np.ndarray) -> list[str]:
    return [text[start:end].strip() for start, end in spans]


@dataclass(frozen=True)
class TrueActions:
    """What is counted over the training documents, labelled as generated text is.

    Attributes:
        bigram: Action after action; its smoothing is chosen on the validation documents.
        prior: How often an action occurs, documents' first sentences aside `[actions]`.
    """

    bigram: Bigram
    prior: Floats

    @classmethod
    def count(cls, corpus: Corpus, config: Config) -> TrueActions:
        """Counts a corpus."""
        labels = corpus.actions
        if config.actions.labels != "clusters":
            labels = corpus.codebook.nearest(corpus.embeddings)
        train, validation = (
            count_labels(corpus, corpus.documents(split), labels, corpus.k, 1)
            for split in ("train", "validation")
        )
        return cls(bigram_of_counts(train.pairs, validation.pairs), np.exp(log_shares(train.later)))
