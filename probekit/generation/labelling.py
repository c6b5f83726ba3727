"""Actions of any text's sentences, by a run's tokenizer, sentence splitter, encoder and codebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from probekit.data.encoders import WORD
from probekit.data.sentences import complete_spans, sentence_spans
from probekit.evaluation.action_metrics import NO_ACTION, Integers
from probekit.models.replanning import decoded
from probekit.run.run import Run


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, each cut at some number of tokens, and the actions of their sentences.

    Attributes:
        texts: The text of the first tokens, one of each.
        actions: Actions of the sentences that lie wholly within them `[sentences]`, one array of each. The
            last sentence of a text that was cut is left out, as it may be incomplete. Of a text without a
            whole sentence the first one counts, with all its text, beyond the cut too.
        merged: How many of the first sentences form one with the end of the context, and so had no action
            planned: 1, or mostly 0 `[texts]`.
    """

    texts: list[str]
    actions: list[Integers]
    merged: list[int]

    @property
    def empty(self) -> np.ndarray:
        """Which texts are blank `[texts]`."""
        return np.array([not text.strip() for text in self.texts], dtype=bool)


class Labeller:
    """Labels the sentences of any text with their actions, as the corpus's own are with nearest centroids."""

    def __init__(self, run: Run) -> None:
        self._corpus, self._encoder = run.corpus, run.encoder()
        self._language = run.config.corpus.language

    def cut(
        self,
        tokens: Sequence[np.ndarray],
        lengths: Sequence[int],
        contexts: Sequence[np.ndarray] | None = None,
    ) -> dict[int, LabelledTexts]:
        """Cuts texts at each length and labels what is left.

        A sentence is embedded once, from all its text within the longest length, and counts at every length
        that holds all of it; a first sentence counts at any length.

        Args:
            tokens: Each text's tokens; one of the longest length or more is taken to be cut off there.
            lengths: In tokens.
            contexts: Tokens that each text continues, without the separator; they are not embedded.
        """
        longest, tokenizer = max(lengths), self._corpus.tokenizer
        before = [[] for _ in tokens] if contexts is None else [context.tolist() for context in contexts]
        splits = [
            self._split(decoded(tokenizer, context), decoded(tokenizer, [*context, *ids[:longest].tolist()]))
            for context, ids in zip(before, tokens, strict=True)
        ]
        actions = self._actions([split.sentences for split in splits])
        cuts = {}
        for length in lengths:
            texts, kept = [], []
            for context, ids, split, own in zip(before, tokens, splits, actions, strict=True):
                text = decoded(tokenizer, [*context, *ids[:length].tolist()])[split.begin :]
                ends = split.ends[:-1] if len(ids) >= longest else split.ends
                whole = max(int((ends <= len(text)).sum()), min(1, len(split.ends)))
                texts.append(text)
                kept.append(own[:whole])
            cuts[length] = LabelledTexts(texts, kept, [split.merged for split in splits])
        return cuts

    def last_actions(self, texts: Sequence[str]) -> Integers:
        """The action of each text's last sentence `[texts]`, -1 for a blank text."""
        spans = [sentence_spans(text, self._language)[-1:] for text in texts]
        last = self._actions([_stripped(text, span) for text, span in zip(texts, spans, strict=True)])
        return np.array([int(own[0]) if len(own) else NO_ACTION for own in last], np.int64)

    def _split(self, context: str, whole: str) -> _Split:
        """Splits a text, which goes on from its context, together with it."""
        begin = len(context)
        spans = sentence_spans(whole, self._language)
        ends = np.array([len(whole[:end].rstrip()) for _, end in spans], np.int64) - begin
        own = int((ends <= 0).sum())
        if own < len(spans) and not WORD.search(whole[begin : spans[own, 1]]):
            own += 1  # punctuation that the context's last sentence lacked
        merged = max(len(complete_spans(context, self._language)) - own, 0) if own < len(spans) else 0
        return _Split(begin, _stripped(whole, np.maximum(spans[own:], begin)), ends[own:], merged)

    def _actions(self, sentences: Sequence[Sequence[str]]) -> list[Integers]:
        """The actions of each text's sentences."""
        together = [sentence for own in sentences for sentence in own]
        if not together:
            return [np.zeros(0, np.int64) for _ in sentences]
        labels = self._corpus.codebook.nearest(self._encoder.encode(together)).astype(np.int64)
        return np.split(labels, np.cumsum([len(own) for own in sentences])[:-1])


class _Split(NamedTuple):
    """The sentences of a text behind its context.

    Attributes:
        begin: Characters of the context.
        sentences: The text's own sentences, or its part of them, without surrounding white space.
        ends: Where each ends, in characters of the text `[sentences]`.
        merged: How many of them continue a sentence that was complete at the end of the context.
    """

    begin: int
    sentences: list[str]
    ends: np.ndarray
    merged: int


def _stripped(text: str, spans: np.ndarray) -> list[str]:
    return [text[start:end].strip() for start, end in spans]
