"""In-context learning beside Bayes, on a planted corpus whose documents hold several examples of one type.

A *prompt* is some examples, a line each. Behind it stands the *query*, the last example of a test document.
How well is the query predicted, by the number of examples before it? Whoever knows the planted model can say
what they are worth: they tell the type, and nothing else of them matters. The LM is compared with this exact
posterior, and so are probes of its activations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.special import logsumexp

from probekit.config import Config, PlantedSettings, ProbedName
from probekit.data.special_tokens import bos_rule_for
from probekit.data.tokenizer import encoded
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import prior_log_probabilities
from probekit.evaluation.baselines import NO_TOKEN, SkipNgram, contexts
from probekit.evaluation.multiple_choice import ChoiceReader, Question
from probekit.evaluation.perplexity import own_losses
from probekit.io import atomic_folder, write_table
from probekit.models.decoding import GrowingText
from probekit.models.language_model import longest_window
from probekit.planted.corpus import FloatArray, IntArray, PlantedModel
from probekit.planted.posteriors import log_joint_by_type
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON
from probekit.probing.solvers import SoftmaxProbes
from probekit.probing.texts import activations
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import bootstrap_ratios, paired_differences

Example = list[IntArray]
"""Word ids of each sentence."""

LM, EXACT, TOLD, KNOWN = "LM", "exact posterior", "exact posterior, told", "type known"
NGRAM, PROBE, RANDOM = "n-gram", "probe", "probe, random weights"
"""Readers: the LM and probes of it, and what they are compared with."""

WORDS, TYPE, ACTION = "word_loss", "type_bits", "action_bits"
LOWER_IS_BETTER = {WORDS: True, TYPE: False, ACTION: False}
"""Measures."""

PROBED: dict[ProbedName, str] = {"none": PROBE, "random": RANDOM}
"""LMs that are probed, and what the readers are called."""

COMPARED: dict[str, Callable[[str, int, str], tuple[str, int, str]]] = {
    "gain": lambda condition, examples, reader: (condition, 0, reader),
    "behind_exact": lambda condition, examples, reader: (condition, examples, EXACT),
    "behind_told": lambda condition, examples, reader: (condition, examples, TOLD),
}
"""With which condition, number of examples and reader the columns of the table compare a row."""

ORDER = 6
"""Longest context of the n-gram, in tokens."""

PERMUTED = 6
"""Most sentences of an example whose every order the posterior that is told goes through."""


@dataclass(frozen=True)
class InContext:
    """What examples in the prompt are worth, to the LM and to those who know the planted model.

    Measures: `word_loss`, cross-entropy of the query in nats per word, full stops included; `type_bits` and
    `action_bits`, what is known of the document's type and of the action of the query's last sentence at the
    token before this sentence, in bits over the frequencies in the training documents. Readers:

    - `LM`: the LM's next-token loss. `probe`: softmax probes of the layer that is best on validation
      documents, fitted for each number of examples on prompts of one type. `probe, random weights`: the same
      of an LM that was not trained.
    - `exact posterior`: knows the planted model, and takes all examples for ones of the query's type in their
      true order, as in training. `exact posterior, told`: also knows what the condition does to them: nobody
      can be better but by chance. `type known`: knows the query's type.
    - `n-gram`: of tokens, counted on training documents.

    Conditions: `same type`, the document's own examples; `other order`, with the sentences of each in a
    random order; `another type`, the examples of another test document, of another type.

    Attributes:
        table: One row for each measure, condition, number of examples and reader: `value` with its 95 %
            interval from resampling documents; paired over documents, `gain`, by how much the reader is
            better than without examples, `behind_exact` and `behind_told`, by how much it is worse than the
            exact posterior and than the one that is told; `too_good`, whether the whole interval of the
            latter is below zero, for a reader that does not know the type.
        values: The same for each document: `sum` and `count`, whose ratio of sums is `value`.
    """

    table: pd.DataFrame
    values: pd.DataFrame

    def write(self, folder: Path) -> None:
        """Writes both tables as Parquet, in place of an earlier folder."""
        with atomic_folder(folder) as made:
            write_table(made / "results.parquet", self.table)
            write_table(made / "values.parquet", self.values)


@dataclass(frozen=True)
class Queries:
    """Documents of a split, as examples.

    Attributes:
        model: What they were drawn from.
        documents: Their numbers in the corpus, [documents].
        examples: Of each document, the last one being the query.
        types: Hidden types, [documents].
        actions: Actions of the queries' last sentences, [documents].
    """

    model: PlantedModel
    documents: np.ndarray
    examples: list[list[Example]]
    types: IntArray
    actions: IntArray

    @classmethod
    def of(cls, run: Run, model: PlantedModel, split: str) -> Queries:
        """Those of a run."""
        corpus, size = run.corpus, model.example_length or 1
        numbers = corpus.documents(split)
        texts = [corpus.texts[int(number)] for number in numbers]
        sentences = [model.parse(text.text) for text in texts]
        return cls(
            model,
            numbers,
            [[own[at : at + size] for at in range(0, len(own), size)] for own in sentences],
            np.array([text.kind for text in texts]),
            np.array(corpus.actions[corpus.document_sentences[numbers + 1] - 1], np.int64),
        )

    @property
    def labels(self) -> dict[str, IntArray]:
        """What is predicted at the token before the query's last sentence, by measure."""
        return {TYPE: self.types, ACTION: self.actions}

    @property
    def query(self) -> list[Example]:
        """The last example of each document."""
        return [examples[-1] for examples in self.examples]

    @property
    def before(self) -> list[list[Example]]:
        """The examples before it."""
        return [examples[:-1] for examples in self.examples]

    def prompts(self, given: Sequence[Sequence[Example]], count: int) -> list[str]:
        """The first examples that each query is given, a line each."""
        return ["".join(f"{self.text(example)}\n" for example in examples[:count]) for examples in given]

    def text(self, sentences: Example) -> str:
        """Sentences as they are written."""
        return " ".join(self.model.spell(words) for words in sentences)


def in_context(
    run: Run | str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    examples: Sequence[int] | None = None,
    quiet: bool = False,
) -> InContext:
    """Measures what examples in the prompt are worth; writes `in_context/`, in place of earlier results.

    Args:
        run: The run or its folder: its corpus is planted, with `corpus.planted.examples` above 1.
        settings: Settings to replace, by dotted name, such as `probe.l2`.
        examples: Numbers of examples before the query; None: from 0 to all but the last. Without 0 there is
            no gain.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run's documents hold no examples, or not so many, or the LM cannot read them.
    """
    run = Run.at(run, settings)
    run.check_writable()
    run.require_causal()
    counts = _counts(run.config, examples)
    if run.corpus.bos_rule != (rule := bos_rule_for(run.corpus.tokenizer, "auto")):
        raise ProbekitError(
            f"lm.bos is {run.corpus.bos_rule}, but probes read their prompts as by {rule}; train an LM with "
            "lm.bos auto"
        )
    model, progress = PlantedModel.draw(run.config.corpus.planted), Progress(quiet=quiet)
    queries = {split: Queries.of(run, model, split) for split in (FITTED_ON, CHOSEN_ON, TESTED_ON)}
    test = queries[TESTED_ON]
    given = conditions(test, run.config.corpus.seed)
    prior = _prior(Queries.of(run, model, "train"))
    parts = [*_exact(run, test, given, counts, prior), *_ngram(run, test, counts)]
    total = len(counts) * len(given)
    with progress.task("read queries", total=total * len(test.documents)) as task:
        reader = _loss_reader(run)
        for condition, count in itertools.product(given, counts):
            questions = _questions(run, test, test.prompts(given[condition], count))
            losses = reader.summed_losses(questions, task)[0, :, 0]
            parts.append(_part(WORDS, condition, count, LM, losses, _words(test)))
    for lm, name in PROBED.items():
        with progress.task(name, total=len(counts)) as task:
            for count in counts:
                parts += _probed(run, queries, given, count, lm, prior)
                task.advance()
    values = pd.concat(
        [part.assign(document=run.corpus.group[test.documents]) for part in parts], ignore_index=True
    )
    resampling = run.config.resampling
    found = InContext(in_context_table(values, **resampling), values)
    found.write(run.folder / "in_context")
    return found


def _counts(config: Config, examples: Sequence[int] | None) -> list[int]:
    most = config.corpus.planted.examples - 1
    if config.corpus.reader != "planted" or not most:
        raise ProbekitError(
            "the run's documents are not several examples of a known type; train one with --preset "
            "in-context, or with --corpus.reader planted and --corpus.planted.examples above 1"
        )
    counts = sorted({*range(most + 1)} if examples is None else {*examples})
    if not counts or not 0 <= counts[0] <= counts[-1] <= most:
        raise ProbekitError(
            f"examples is {counts}; documents hold {most + 1}, one of them the query: give 0 to {most}"
        )
    return counts


def conditions(test: Queries, seed: int) -> dict[str, list[list[Example]]]:
    """The examples that each query is given, by condition.

    Args:
        test: The queries.
        seed: Of orders, and of the documents whose examples others are given.

    Raises:
        ProbekitError: All documents have one type.
    """
    if len({*test.types.tolist()}) < 2:
        raise ProbekitError("the test documents are all of one type; give more documents, or types")
    rng = np.random.default_rng(seed)
    shuffled = [
        [[example[at] for at in rng.permutation(len(example))] for example in examples]
        for examples in test.before
    ]
    donors = [rng.choice(np.flatnonzero(test.types != own)) for own in test.types]
    return {
        "same type": test.before,
        "other order": shuffled,
        "another type": [test.before[donor] for donor in donors],
    }


# Who knows the planted model


def _exact(
    run: Run,
    test: Queries,
    given: Mapping[str, list[list[Example]]],
    counts: Sequence[int],
    prior: Mapping[str, FloatArray],
) -> Iterator[pd.DataFrame]:
    """The exact posteriors of every condition and number of examples, and who knows the type."""
    model, query = test.model, log_joint_by_type(test.model, test.query)
    lengths = nats_of_lengths(run.config.corpus.planted)
    with np.errstate(divide="ignore"):
        known = np.log(np.eye(len(model.prior))[test.types])
    for (condition, examples), count in itertools.product(given.items(), counts):
        asked = [own[:count] for own in examples]
        for name, log_weight in (
            (EXACT, type_posterior(model, asked)),
            (TOLD, TOLD_POSTERIORS[condition](test, asked)),
            (KNOWN, known),
        ):
            if log_weight is None:
                continue
            loss, log_type, log_action = predictions(query, log_weight)
            yield _part(WORDS, condition, count, name, loss + lengths, _words(test))
            if name != KNOWN:
                yield _bits(TYPE, condition, count, name, log_type, test.types, prior[TYPE])
            yield _bits(ACTION, condition, count, name, log_action, test.actions, prior[ACTION])


def nats_of_lengths(settings: PlantedSettings) -> float:
    """Nats of the full stops of an example: how many words sentences have, which says nothing of actions."""
    fewest, most = settings.words
    return settings.sentences[0] * math.log(most - fewest + 1)


def predictions(query: FloatArray, log_weight: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """What follows for queries from what is known of their types.

    Args:
        query: `log_joint_by_type` of the queries, [documents, sentences + 1, types, actions].
        log_weight: Log-probabilities of the types before the query is read, [documents, types].

    Returns:
        Nats of all words of a query, [documents]; and, given the query up to its last sentence,
        log-probabilities of its type, [documents, types], and of that sentence's action,
        [documents, actions].
    """
    last = log_weight[:, :, None] + query[:, -2]
    so_far = logsumexp(last, axis=(1, 2))[:, None]
    loss = -logsumexp(log_weight + logsumexp(query[:, -1], axis=-1), axis=-1)
    return loss, logsumexp(last, axis=2) - so_far, logsumexp(last, axis=1) - so_far


def type_posterior(model: PlantedModel, given: Sequence[Sequence[Example]]) -> FloatArray:
    """Log-probabilities of the type that all examples share, [documents, types]."""
    return _normalised(np.log(model.prior) + _evidence(model, given))


def _evidence(model: PlantedModel, given: Sequence[Sequence[Example]]) -> FloatArray:
    """Log-probability of all words of the examples under each type, [documents, types]."""
    document = np.repeat(np.arange(len(given)), [len(examples) for examples in given])
    evidence = np.zeros((len(given), len(model.prior)))
    if len(document):
        flat = list(itertools.chain.from_iterable(given))
        np.add.at(evidence, document, logsumexp(log_joint_by_type(model, flat)[:, -1], axis=-1))
    return evidence


def of_any_order(test: Queries, given: Sequence[Sequence[Example]]) -> FloatArray | None:
    """Log-probabilities of the type if sentences of examples may have any order, [documents, types].

    None where examples have more than `PERMUTED` sentences, which have too many orders.
    """
    model = test.model
    if (model.example_length or 1) > PERMUTED:
        return None
    evidence = np.zeros((len(given), len(model.prior)))
    orders = list(itertools.permutations(range(model.example_length or 1)))
    for at in range(len(given[0])):
        found = [
            _evidence(model, [[[examples[at][place] for place in order]] for examples in given])
            for order in orders
        ]
        evidence += logsumexp(found, axis=0) - math.log(len(orders))
    return _normalised(np.log(model.prior) + evidence)


def of_another_type(test: Queries, given: Sequence[Sequence[Example]]) -> FloatArray:
    """Log-probabilities of the query's type if all examples are of one other type, [documents, types].

    The document that gave them was drawn from all of another type.
    """
    number = np.bincount(test.types, minlength=len(test.model.prior)).astype(float)
    others = np.where(np.eye(len(number), dtype=bool), 0.0, number)
    with np.errstate(divide="ignore"):
        log_share = np.log(others / others.sum(axis=1, keepdims=True))  # [type of the query, of the examples]
    evidence = logsumexp(log_share + _evidence(test.model, given)[:, None, :], axis=-1)
    return _normalised(np.log(test.model.prior) + evidence)


TOLD_POSTERIORS: dict[str, Callable[[Queries, Sequence[Sequence[Example]]], FloatArray | None]] = {
    "same type": lambda test, given: type_posterior(test.model, given),
    "other order": of_any_order,
    "another type": of_another_type,
}
"""The posterior of the query's type that knows how the examples of a condition were chosen."""


def _normalised(log_weight: FloatArray) -> FloatArray:
    return log_weight - logsumexp(log_weight, axis=-1, keepdims=True)


# Who has read training documents


def _questions(run: Run, test: Queries, prompts: Sequence[str]) -> list[Question]:
    """The tokens of prompts, and those of the query after each."""
    tokenizer, separator, questions = run.corpus.tokenizer, run.corpus.separator, []
    window = longest_window(run.frozen_lm().config)
    for document, prompt, query in zip(test.documents.tolist(), prompts, test.query, strict=True):
        ids = encoded(tokenizer, prompt + test.text(query))
        size = len(encoded(tokenizer, prompt))
        if len(ids) > window:
            raise ProbekitError(
                f"document {document}: examples and query have {len(ids):,} tokens, but the LM reads "
                f"{window:,} at once; give fewer examples, or train one with larger lm.positions and "
                "training.window"
            )
        context, choice = np.array([separator, *ids[:size]]), np.array(ids[size:])
        questions.append(Question(context, (choice,), 0, document))
    return questions


def _loss_reader(run: Run) -> ChoiceReader:
    return ChoiceReader(
        own_losses(run.model("none")),
        lambda contexts: [GrowingText(context.tolist(), [0] * len(context), []) for context in contexts],
        longest_window(run.frozen_lm().config),
        run.corpus.bos_rule,
        run.config.evaluation.batch_size,
        run.device,
    )


def _ngram(run: Run, test: Queries, counts: Sequence[int]) -> Iterator[pd.DataFrame]:
    """The losses of a token n-gram, whose order validation documents choose."""
    corpus, rows = run.corpus, {}
    for split in ("train", CHOSEN_ON):
        documents = corpus.documents(split)
        bounds = zip(corpus.document_tokens[documents], corpus.document_tokens[documents + 1], strict=True)
        positions = np.concatenate([np.arange(start, stop - 1) for start, stop in bounds])
        rows[split] = contexts(corpus, positions, ORDER), np.asarray(corpus.tokens[positions + 1], np.int64)
    ngram = SkipNgram.fit(*rows["train"], len(corpus.tokenizer), rows[CHOSEN_ON])
    for count in counts:
        losses = []
        for question in _questions(run, test, test.prompts(test.before, count)):
            (choice,) = question.choices
            ids = np.concatenate([np.full(ORDER, NO_TOKEN), question.context, choice])
            targets = np.arange(len(ids) - len(choice), len(ids))
            read = ids[targets[:, None] - 1 - np.arange(ORDER)]
            losses.append(-ngram.log_probabilities(read)[np.arange(len(choice)), choice].sum())
        yield _part(WORDS, "same type", count, NGRAM, np.array(losses), _words(test))


def _probed(
    run: Run,
    queries: Mapping[str, Queries],
    given: Mapping[str, list[list[Example]]],
    count: int,
    lm: ProbedName,
    prior: Mapping[str, FloatArray],
) -> Iterator[pd.DataFrame]:
    """What probes read before the last sentence of the query, fitted on prompts of one type."""
    plain, settings = run.frozen_lm(lm, run.config.seed).plain, run.config.probe

    def read(split: Queries, examples: list[list[Example]]) -> torch.Tensor:
        prompts = zip(split.prompts(examples, count), split.query, strict=True)
        texts = [prompt + split.text(query[:-1]) for prompt, query in prompts]
        batch_size = run.config.evaluation.batch_size
        return activations(plain, run.corpus.tokenizer, texts, batch_size=batch_size, quiet=True).values

    fitted, chosen = (read(queries[split], queries[split].before) for split in (FITTED_ON, CHOSEN_ON))
    tested = {condition: read(queries[TESTED_ON], examples) for condition, examples in given.items()}
    for measure, level in prior.items():
        labels = {split: own.labels[measure] for split, own in queries.items()}
        y, y_chosen = (torch.from_numpy(labels[split]) for split in (FITTED_ON, CHOSEN_ON))
        probes = SoftmaxProbes(settings.l2, settings.max_iterations)
        probes.fit(fitted, y, len(level), chosen, y_chosen)
        layer = int(probes.validation_loss_.argmin())
        for condition, values in tested.items():
            found = probes.log_probabilities(values)[layer].double().numpy()
            yield _bits(measure, condition, count, PROBED[lm], found, labels[TESTED_ON], level)


# Values and tables


def _prior(train: Queries) -> dict[str, FloatArray]:
    """Log frequencies of labels in the training documents, by measure."""
    classes = {TYPE: len(train.model.prior), ACTION: len(train.model.emission)}
    return {
        measure: prior_log_probabilities(labels, classes[measure]) for measure, labels in train.labels.items()
    }


def _words(test: Queries) -> IntArray:
    """Number of words of each query."""
    return np.array([sum(map(len, query)) for query in test.query])


def _bits(
    measure: str,
    condition: str,
    count: int,
    reader: str,
    log_probabilities: FloatArray,
    labels: IntArray,
    prior: FloatArray,
) -> pd.DataFrame:
    """Bits over the prior of each document's label."""
    own = log_probabilities[np.arange(len(labels)), labels]
    return _part(measure, condition, count, reader, (own - prior[labels]) / math.log(2), np.ones(len(labels)))


def _part(
    measure: str, condition: str, count: int, reader: str, sums: FloatArray, counts: np.ndarray
) -> pd.DataFrame:
    """The values of a row of the table."""
    key = {"measure": measure, "condition": condition, "examples": count, "reader": reader}
    return pd.DataFrame(key | {"sum": sums, "count": counts})


def in_context_table(values: pd.DataFrame, **resampling: Any) -> pd.DataFrame:
    """A row for each measure, condition, number of examples and reader; see `InContext`.

    Args:
        values: A row for each of these and each document (or group), over seeds too if there are several.
        **resampling: See `Resampling`.
    """
    parts = []
    for measure, own in values.groupby("measure", sort=False):
        # Not a mean over documents: a long query counts for more words.
        wide = own.pivot_table(
            index="document",
            columns=["condition", "examples", "reader"],
            values=["sum", "count"],
            aggfunc="sum",
            sort=False,
        )
        sums, counts = wide["sum"], wide["count"]
        found = bootstrap_ratios(sums, counts, **resampling)
        part = sums.columns.to_frame(index=False).assign(measure=measure)
        part["value"], part["value_low"], part["value_high"] = found.value, found.low, found.high
        for name, other in COMPARED.items():
            compared = [other(*key) for key in sums.columns]
            there = np.array([key in sums.columns for key in compared])
            first, second = sums.loc[:, there], sums[[key for key in compared if key in sums.columns]]
            if LOWER_IS_BETTER[str(measure)] == (name == "gain"):
                first, second = second, first
            difference = paired_differences(first, second, counts.loc[:, there], **resampling)
            for end, bound in (("", difference.value), ("_low", difference.low), ("_high", difference.high)):
                part.loc[there, name + end] = bound
        parts.append(part.assign(documents=found.documents))
    table = pd.concat(parts, ignore_index=True)
    table["too_good"] = (table.behind_told_high < 0) & (table.reader != KNOWN)
    table.insert(0, "measure", table.pop("measure"))
    return table
