"""The true texts that generated ones are measured against, and the measuring of texts one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from probekit.config import Config
from probekit.data.corpus import Corpus
from probekit.data.encoders import WORD
from probekit.data.sentences import complete_spans, sentence_spans
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import (
    NO_ACTION,
    Bigram,
    Floats,
    Integers,
    bigram_of_counts,
    log_shares,
)
from probekit.evaluation.baselines import count_labels
from probekit.generation.metrics import (
    Sums,
    edit_distances,
    latent_losses,
    normalised_edit_distances,
    plans_followed,
    plans_followed_by_chance,
    rouge2,
)
from probekit.generation.prompts import Prompt, document_prompts
from probekit.models.replanning import decoded
from probekit.run.run import Run


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
        (pairs, later), (validation, _) = (
            count_labels(corpus, corpus.documents(split), labels, corpus.k)
            for split in ("train", "validation")
        )
        return cls(bigram_of_counts(pairs, validation), np.exp(log_shares(later)))


Tokens = Sequence[np.ndarray]
"""Token ids of each text, without the separator."""


@dataclass(frozen=True)
class TrueTexts:
    """What generated texts are measured against.

    Attributes:
        labeller: Gives texts their actions.
        counted: What is counted over the training documents.
        lengths: Tokens at which continuations are cut.
        prompts: Beginnings of test documents.
        tokens: How the documents go on, as many tokens as the longest length.
        cuts: The same by length, labelled.
        previous: The action of each prompt's last sentence.
        samples: Beginnings of test documents, cut at the longest length.
        sampled: Of which documents they are.
    """

    labeller: Labeller
    counted: TrueActions
    lengths: tuple[int, ...]
    prompts: list[Prompt]
    tokens: list[np.ndarray]
    cuts: dict[int, Cut]
    previous: Integers
    samples: list[np.ndarray]
    sampled: np.ndarray

    @classmethod
    def of(cls, run: Run) -> TrueTexts:
        """Those of a run, as `generation` has them.

        Raises:
            ProbekitError: Fewer than two test documents are long enough.
        """
        settings = run.config.generation
        prompts, tokens = continued_documents(run)
        contexts = [prompt.tokens[1:] for prompt in prompts]
        labeller = Labeller(run)
        sampled, samples = beginnings(run, "test")
        return cls(
            labeller,
            TrueActions.count(run.corpus, run.config),
            settings.lengths,
            prompts,
            tokens,
            labeller.cut(tokens, settings.lengths, contexts),
            labeller.last_actions([prompt.text for prompt in prompts]),
            samples,
            sampled,
        )

    @property
    def longest(self) -> int:
        """Tokens of a text before it is cut."""
        return max(self.lengths)

    def continuation_values(self, tokens: Tokens, plans: Sequence[Integers] | None = None) -> pd.DataFrame:
        """The metrics of continuations of the prompts, and of the plans that they were given."""
        cuts = self.labeller.cut(tokens, self.lengths, [prompt.tokens[1:] for prompt in self.prompts])
        documents = np.array([prompt.document for prompt in self.prompts])
        rows = [
            _values("continuations", length, documents, cuts[length], self._compared(length, cuts[length]))
            for length in self.lengths
        ]
        if plans is not None and any(map(len, plans)):
            longest = cuts[self.longest]
            rows.append(
                _values("continuations", self.longest, documents, longest, self._planned(plans, longest))
            )
        return pd.concat(rows, ignore_index=True)

    def sample_values(self, tokens: Tokens, documents: np.ndarray | None = None) -> pd.DataFrame:
        """The metrics of texts that begin with nothing; without documents, their numbers stand for these."""
        length = self.longest
        cut = self.labeller.cut(tokens, [length])[length]
        none = np.full(len(tokens), NO_ACTION)
        losses = latent_losses(self.counted.bigram, cut.actions, none)
        documents = np.arange(len(tokens)) if documents is None else documents
        return _values("samples", length, documents, cut, [("latent_perplexity", losses)])

    def references(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """What true text gets in generated text's place: a variant's name, and its values.

        True text differs from itself in nothing, so only what it is measured by alone is told; what chance
        gives, by another document's continuation.
        """
        plans = [prompt.plan for prompt in self.prompts if prompt.plan is not None]
        true = self.continuation_values(self.tokens, plans)
        alone = ["latent_perplexity", "plan_following", "plan_following_by_chance"]
        samples = self.sample_values(self.samples, self.sampled)
        yield "true", pd.concat([true[true.metric.isin(alone)], samples])
        other = self.continuation_values([*self.tokens[1:], self.tokens[0]])
        yield "other document", other[other.metric != "latent_perplexity"]

    def _compared(self, length: int, cut: Cut) -> Iterator[tuple[str, Sums]]:
        true = self.cuts[length]
        rouge = [rouge2(*pair) for pair in zip(true.texts, cut.texts, strict=True)]
        yield "rouge2", Sums(np.array(rouge), np.ones(len(rouge)))
        yield "levenshtein", edit_distances(true.actions, cut.actions)
        yield "levenshtein_normalised", normalised_edit_distances(true.actions, cut.actions)
        yield "latent_perplexity", latent_losses(self.counted.bigram, cut.actions, self.previous)

    def _planned(self, plans: Sequence[Integers], cut: Cut) -> Iterator[tuple[str, Sums]]:
        actions = [own[merged:] for own, merged in zip(cut.actions, cut.merged, strict=True)]
        yield "plan_following", plans_followed(plans, actions)
        yield "plan_following_by_chance", plans_followed_by_chance(plans, actions, self.counted.prior)


def beginnings(run: Run, split: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Documents of a split and their first tokens, as many as the longest of `generation.lengths`.

    At most `generation.samples` documents, drawn at random; shorter ones are passed over.
    """
    corpus, settings = run.corpus, run.config.generation
    length = max(settings.lengths)
    documents = _shuffled(run, split, length)[: settings.samples]
    starts = corpus.document_tokens[documents] + 1
    return documents, [corpus.tokens[start : start + length] for start in starts]


def continued_documents(run: Run) -> tuple[list[Prompt], list[np.ndarray]]:
    """Beginnings of test documents, drawn at random, and how the documents go on.

    Raises:
        ProbekitError: Fewer than two are long enough.
    """
    corpus, settings = run.corpus, run.config.generation
    longest, wanted = max(settings.lengths), settings.prompts
    candidates = _shuffled(run, "test", settings.context + longest)
    prompts: list[Prompt] = []
    tokens: list[np.ndarray] = []
    for start in range(0, len(candidates), wanted):
        found = document_prompts(
            corpus,
            candidates[start : start + wanted],
            settings.context,
            longest,
            run.config.corpus.language,
        )
        prompts, tokens = prompts + found[0], tokens + found[1]
        if len(prompts) >= wanted:
            break
    if len(prompts) < 2:
        test = corpus.documents("test")
        most = _sizes(corpus, test).max()
        raise ProbekitError(
            f"{len(prompts)} of the {len(test):,} test documents go on for {longest:,} tokens behind the "
            f"first end of a sentence after {settings.context:,} (the longest has {most:,}), and it takes "
            "two; lower generation.lengths or generation.context"
        )
    return prompts[:wanted], tokens[:wanted]


def _shuffled(run: Run, split: str, least: int) -> np.ndarray:
    """Documents of a split with at least so many tokens, in random order, one for all runs on a corpus."""
    documents = run.corpus.documents(split)
    long = documents[_sizes(run.corpus, documents) >= least]
    return np.random.default_rng(run.config.corpus.seed).permutation(long)


def _sizes(corpus: Corpus, documents: np.ndarray) -> np.ndarray:
    """Tokens of documents, without the separator."""
    return corpus.document_tokens[documents + 1] - corpus.document_tokens[documents] - 1


def _values(
    texts: str, length: int, documents: np.ndarray, cut: Cut, metrics: Iterator[tuple[str, Sums]] | list
) -> pd.DataFrame:
    common = {"texts": texts, "length": length, "document": documents, "empty": cut.empty}
    return pd.concat(
        [
            pd.DataFrame(common | {"metric": name, "sum": sums.sums, "count": sums.counts})
            for name, sums in metrics
        ],
        ignore_index=True,
    )
