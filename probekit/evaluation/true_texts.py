"""The true texts that generated ones are measured against, and the measuring of texts one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from probekit.corpus.store import Corpus
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import NO_ACTION, Integers
from probekit.evaluation.action_sequences import (
    Sums,
    edit_distances,
    latent_losses,
    normalised_edit_distances,
    plans_followed,
    plans_followed_by_chance,
)
from probekit.evaluation.prompts import Prompt, document_prompts
from probekit.evaluation.text_actions import Cut, Labeller, TrueActions
from probekit.evaluation.text_metrics import rouge2
from probekit.run import Run

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
