"""`probekit evaluate --generation`: generated text against true text, in its words and in its plan.

Every variant continues the beginnings of test documents, and writes samples from nothing. Continuations are
compared with the documents' own, cut at the same numbers of tokens: ROUGE-2, edit distance of the sequences
of actions, and whether sentences have the actions that were planned. Samples are compared as a whole with
beginnings of test documents, by MAUVE. Latent perplexity measures how usual a sequence of actions is. True
text in the place of generated text gives the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.config import Config
from probekit.data.corpus import Corpus
from probekit.data.encoders import check_encoder
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
from probekit.evaluation.evaluate import variants_and_actions
from probekit.evaluation.perplexity import window_and_stride
from probekit.generation.generate import generate
from probekit.generation.metrics import (
    FEATURES,
    FEW_TEXTS,
    LEAST_TEXTS,
    LabelledTexts,
    Labeller,
    MetricSums,
    cluster_texts,
    edit_distances,
    latent_losses,
    mauve_interval,
    normalised_edit_distances,
    plans_followed,
    plans_followed_by_chance,
    rouge2,
    text_features,
)
from probekit.generation.prompts import Plan, Prompt, document_prompts
from probekit.io import write_json, write_table
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import over_seeds

TRANSFORMS = {"latent_perplexity": np.exp}
"""Applied to the mean that a metric is made from, where the metric is not the mean itself."""

ACTIONS = {
    "none": "no actions",
    "constant": "no actions",
    "planner": "the planner's actions",
    "true": "true actions",
}
"""Whose actions a text is conditioned on, as the progress display says it."""

KEYS = ["variant", "actions", "texts", "length", "metric"]
"""Columns that identify a row of the results."""

Tokens = Sequence[np.ndarray]
"""Token ids of each text, without the separator."""


@dataclass(frozen=True)
class GenerationEvaluation:
    """Metrics of generated text.

    Attributes:
        metrics: One row for each variant, source of actions, kind of texts (continuations, samples), length
            and metric: `value` over all seeds with a 95 % interval from resampling documents (`value_low`,
            `value_high`), `seed_spread`, the standard deviation of the seeds' own values, and how many of the
            texts were `empty`. Variant "true" is true text in the place of generated text, "other document"
            the true continuation of another document.
        values: The same, MAUVE aside, by seed and document: `sum` and `count`. Samples have a number for a
            document.
        settings: How it was measured.
        notes: What could not be measured as asked.
    """

    metrics: pd.DataFrame
    values: pd.DataFrame
    settings: dict[str, Any]
    notes: list[str]


def evaluate_generation(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> GenerationEvaluation:
    """Generates text with every variant and measures it; writes `generation.json` and `generation.parquet`.

    Args:
        run: The run or its folder.
        settings: Settings to replace for this evaluation, by dotted name, such as `generation.lengths`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run lacks a stage, or test documents that are long enough.
    """
    run = Run.at(run, settings)
    run.require_causal()
    run.check_writable()
    if run.config.method == "planner":
        run.require("planner")
    progress, chosen = Progress(quiet=quiet), run.config.generation
    seeds = list(chosen.seeds or (run.config.seed,))
    with progress.task("label true texts"):
        true = TrueTexts(run)
    values = [frame.assign(variant=name, actions="true", seed=seeds[0]) for name, frame in true.references()]
    samples: dict[tuple[str, str], list[Tokens]] = {}
    for variant, actions, _ in variants_and_actions(run):
        measured, samples[variant, actions] = _measured(run, variant, actions, seeds, true, progress)
        values += measured
    table = pd.concat(values, ignore_index=True)
    resampling = {"resamples": run.config.evaluation.resamples, "seed": run.config.seed}
    rows = over_seeds(by_group(table, run.corpus), KEYS, TRANSFORMS, **resampling)
    empty = table.groupby(KEYS)["empty"].sum().reset_index()
    metrics = rows[rows.seed.isna()].drop(columns="seed").merge(empty, on=KEYS)
    mauve, mauve_notes = _mauve(run, true, samples, progress)
    notes = []
    if (found := len(true.prompts)) < (wanted := chosen.prompts):
        notes.append(f"{found:,} prompts in place of {wanted:,}: no more test documents are long enough")
    evaluation = GenerationEvaluation(
        pd.concat([metrics, pd.DataFrame(mauve)], ignore_index=True),
        table,
        chosen.model_dump(mode="json")
        | {
            "split": "test",
            "prompts": found,
            "true_samples": len(true.samples),
            "seeds": seeds,
            "resamples": run.config.evaluation.resamples,
            "rouge2": "F-measure, no stemming",
            "labels": "nearest centroid",
            "features": FEATURES,
        },
        [*notes, *mauve_notes],
    )
    write_table(run.folder / "generation.parquet", table)
    # What does not exist is null: JSON knows no NaN.
    records = evaluation.metrics.astype(object).replace({np.nan: None}).to_dict(orient="records")
    record = {"settings": evaluation.settings, "notes": evaluation.notes, "metrics": records}
    write_json(run.folder / "generation.json", record)
    return evaluation


def by_group(values: pd.DataFrame, corpus: Corpus) -> pd.DataFrame:
    """Values with the number of each document's group in place of its own; samples keep their numbers."""
    of_documents = (values.texts == "continuations") | (values.variant == "true")
    return pd.concat([corpus.by_group(values[of_documents]), values[~of_documents]]).sort_index()


def check_generation(run: Run | str | Path, settings: Mapping[str, Any] | None = None) -> None:
    """Checks before any other work that text can be generated and measured.

    Raises:
        ProbekitError: Fewer than two test documents are long enough, or the corpus's encoder is gone.
    """
    run = Run.at(run, settings)
    run.require_causal()
    continued_documents(run)
    check_encoder(run.folder / "corpus" / "encoder")


def _measured(
    run: Run, variant: Any, actions: str, seeds: Sequence[int], true: TrueTexts, progress: Progress
) -> tuple[list[pd.DataFrame], list[Tokens]]:
    """Values of all that a variant writes, and its samples `[seeds]`; none where it needs true actions."""
    nothing = [Prompt(np.array([run.corpus.separator]), "")] * run.config.generation.samples
    plan: Plan = "given" if actions == "true" else "planner"
    write = partial(generate, run, variant=variant, tokens=true.longest, plan=plan, progress=progress)
    whose = f"({variant}, {ACTIONS[actions]})"
    values: list[pd.DataFrame] = []
    samples: list[Tokens] = []
    for seed in seeds:
        row = {"variant": variant, "actions": actions, "seed": seed}
        continued = write(true.prompts, seed=seed, title=f"continuations {whose}")
        tokens, plans = [text.tokens for text in continued], [text.plan for text in continued]
        values.append(true.continuation_values(tokens, plans).assign(**row))
        if actions != "true":  # a text from nothing has no true plan
            written = write(nothing, seed=seed, title=f"samples {whose}")
            samples.append([text.tokens for text in written])
            values.append(true.sample_values(samples[-1]).assign(**row))
    return values, samples


def _mauve(
    run: Run, true: TrueTexts, samples: Mapping[tuple[str, str], Sequence[Tokens]], progress: Progress
) -> tuple[list[dict[str, Any]], list[str]]:
    """MAUVE of samples `[seeds]` against as many beginnings of test documents, and notes.

    The reference, variant "true", is other true text, from the split `probe`, which no training has seen.
    """
    settings, seed = run.config.generation, run.config.seed
    there, length = len(true.samples), max(settings.lengths)
    size = min(there, settings.samples)
    if size < LEAST_TEXTS:
        return [], [
            f"No MAUVE: it needs {LEAST_TEXTS} texts of {length:,} tokens on either side, and {there:,} "
            f"test documents are that long, of generation.samples {settings.samples:,}; lower "
            "generation.lengths, or raise what is too low"
        ]
    notes = []
    if size < FEW_TEXTS:
        notes.append(
            f"MAUVE of {size:,} texts on either side does not tell variants apart; it takes {FEW_TEXTS}: "
            "generation.samples, and as many test documents that are long enough"
        )
    others, other = beginnings(run, "probe")
    if len(other) < size:
        notes.append(
            f"No MAUVE of true text: it needs {size:,} documents of {length:,} tokens in the split probe, "
            f"and there are {len(other):,}"
        )
    else:
        samples = {("true", "true"): [other], **samples}
    groups = {"true": run.corpus.group[others[:size]]}
    true_groups = run.corpus.group[true.sampled[:size]]
    window, _ = window_and_stride(run)

    def features(name: str, texts: Tokens) -> np.ndarray:
        with progress.task(f"features of {name}", total=size) as task:
            return text_features(run, texts[:size], window, task)

    true_features, rows = features("test documents", true.samples), []
    for (variant, actions), of_seeds in samples.items():
        if not of_seeds:
            continue
        clustered = [
            cluster_texts(features(f"texts ({variant})", texts), true_features, seed) for texts in of_seeds
        ]
        own_groups = groups.get(variant, np.arange(size))
        resampling = {"resamples": run.config.evaluation.resamples, "seed": seed}
        interval = mauve_interval(clustered, (own_groups, true_groups), **resampling)
        each = [one.mauve for one in clustered]
        rows.append(
            dict(zip(KEYS, (variant, actions, "samples", length, "mauve"), strict=True))
            | interval.columns()
            | {
                "seed_spread": float(np.std(each, ddof=1)) if len(each) > 1 else np.nan,
                "seeds": len(each),
                "empty": sum(not len(ids) for texts in of_seeds for ids in texts[:size]),
            }
        )
    return rows, notes


class TrueTexts:
    """True texts of a run under its settings `generation`, against which generated ones are measured.

    Attributes:
        labeller: Gives texts their actions.
        bigram: Action after action, counted over training documents that are labelled as generated text is.
        prior: How often an action occurs there, documents' first sentences aside `[actions]`.
        lengths: Tokens at which continuations are cut.
        longest: Tokens of a text before it is cut.
        prompts: Beginnings of test documents.
        contexts: Their tokens, without the separator.
        tokens: Their continuations, as many tokens as the longest length.
        cuts: The continuations by length, labelled.
        previous: The action of each prompt's last sentence.
        samples: Beginnings of test documents, cut at the longest length.
        sampled: The documents that they begin.

    Raises:
        ProbekitError: Fewer than two test documents are long enough.
    """

    def __init__(self, run: Run) -> None:
        self.lengths = run.config.generation.lengths
        self.longest = max(self.lengths)
        self.prompts, self.tokens = continued_documents(run)
        self.contexts = [prompt.tokens[1:] for prompt in self.prompts]
        self.labeller = Labeller(run)
        self.sampled, self.samples = beginnings(run, "test")
        self.bigram, self.prior = count_actions(run.corpus, run.config)
        self.cuts = self.labeller.cut(self.tokens, self.lengths, self.contexts)
        self.previous = self.labeller.last_actions([prompt.text for prompt in self.prompts])

    def continuation_values(self, tokens: Tokens, plans: Sequence[Integers] | None = None) -> pd.DataFrame:
        """The metrics of continuations of the prompts, and of the plans that they were given."""
        cuts = self.labeller.cut(tokens, self.lengths, self.contexts)
        documents = np.array([prompt.document for prompt in self.prompts])
        rows = []
        for length, cut in cuts.items():
            true = self.cuts[length]
            rouge = np.array([rouge2(*pair) for pair in zip(true.texts, cut.texts, strict=True)])
            metrics = {
                "rouge2": MetricSums(rouge, np.ones(len(rouge))),
                "levenshtein": edit_distances(true.actions, cut.actions),
                "levenshtein_normalised": normalised_edit_distances(true.actions, cut.actions),
                "latent_perplexity": latent_losses(self.bigram, cut.actions, self.previous),
            }
            rows.append(_values("continuations", length, documents, cut, metrics))
        if plans is not None and any(map(len, plans)):
            cut = cuts[self.longest]
            actions = [own[merged:] for own, merged in zip(cut.actions, cut.merged, strict=True)]
            metrics = {
                "plan_following": plans_followed(plans, actions),
                "plan_following_by_chance": plans_followed_by_chance(plans, actions, self.prior),
            }
            rows.append(_values("continuations", self.longest, documents, cut, metrics))
        return pd.concat(rows, ignore_index=True)

    def sample_values(self, tokens: Tokens, documents: np.ndarray | None = None) -> pd.DataFrame:
        """The metrics of texts from nothing, which are numbered in place of documents if none are given."""
        cut = self.labeller.cut(tokens, [self.longest])[self.longest]
        losses = latent_losses(self.bigram, cut.actions, np.full(len(tokens), NO_ACTION))
        documents = np.arange(len(tokens)) if documents is None else documents
        return _values("samples", self.longest, documents, cut, {"latent_perplexity": losses})

    def references(self) -> Iterator[tuple[str, pd.DataFrame]]:
        """Values of true text in the place of generated text, by the name of the variant.

        "true" has only metrics that compare a text with nothing else, as true text is equal to itself;
        "other document", another document's continuation, shows what is reached by chance.
        """
        plans = [prompt.plan for prompt in self.prompts if prompt.plan is not None]
        true = self.continuation_values(self.tokens, plans)
        alone = ["latent_perplexity", "plan_following", "plan_following_by_chance"]
        samples = self.sample_values(self.samples, self.sampled)
        yield "true", pd.concat([true[true.metric.isin(alone)], samples])
        other = self.continuation_values([*self.tokens[1:], self.tokens[0]])
        yield "other document", other[other.metric != "latent_perplexity"]


def _values(
    texts: str, length: int, documents: np.ndarray, cut: LabelledTexts, metrics: Mapping[str, MetricSums]
) -> pd.DataFrame:
    common = {"texts": texts, "length": length, "document": documents, "empty": cut.empty}
    parts: Iterable[pd.DataFrame] = (
        pd.DataFrame(common | {"metric": name, "sum": found.sums, "count": found.counts})
        for name, found in metrics.items()
    )
    return pd.concat(parts, ignore_index=True)


def count_actions(corpus: Corpus, config: Config) -> tuple[Bigram, Floats]:
    """The bigram and the prior `[actions]` of training documents, labelled as generated text is."""
    labels = corpus.actions
    if config.actions.labels != "clusters":
        labels = corpus.codebook.nearest(corpus.embeddings)
    (pairs, later), (validation, _) = (
        count_labels(corpus, corpus.documents(split), labels, corpus.k) for split in ("train", "validation")
    )
    return bigram_of_counts(pairs, validation), np.exp(log_shares(later))


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
    """Beginnings of test documents, drawn at random, and their true continuations.

    Raises:
        ProbekitError: Fewer than two are long enough.
    """
    corpus, settings = run.corpus, run.config.generation
    longest, language = max(settings.lengths), run.config.corpus.language
    candidates = _shuffled(run, "test", settings.context + longest)
    prompts, tokens = document_prompts(
        corpus, candidates, settings.context, longest, language, settings.prompts
    )
    if len(prompts) < 2:
        test = corpus.documents("test")
        raise ProbekitError(
            f"{len(prompts)} of the {len(test):,} test documents go on for {longest:,} tokens after the "
            f"first end of a sentence after {settings.context:,} (the longest has "
            f"{_sizes(corpus, test).max():,}), and it takes two; lower generation.lengths or "
            "generation.context"
        )
    return prompts, tokens


def _shuffled(run: Run, split: str, least: int) -> np.ndarray:
    """Documents of a split with at least so many tokens, in a random order that the corpus's seed fixes."""
    documents = run.corpus.documents(split)
    long = documents[_sizes(run.corpus, documents) >= least]
    return np.random.default_rng(run.config.corpus.seed).permutation(long)


def _sizes(corpus: Corpus, documents: np.ndarray) -> np.ndarray:
    """Tokens of documents, without the separator."""
    return corpus.document_tokens[documents + 1] - corpus.document_tokens[documents] - 1
