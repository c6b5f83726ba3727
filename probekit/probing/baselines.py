"""Baselines and ceilings on the grid's own examples: what can be predicted without any activation.

The prior, the bigram (given the label of the last sentence read whole) and the skip n-gram (given the last
tokens read) are counted on the training documents and those that probes are fitted on; their smoothing is
chosen on validation documents. No bigram is given the label that is asked for, where a probe has read that
sentence. "bigram (current action)", planners and two of the ceilings know the whole sentence before the
example, and nothing of its own, however far before or behind its first token a probe reads. A number's prior
is the mean, its bigram a least-squares line from the number of the last sentence; a vector's is ridge from
the vector of that. A file's labels, clusters and vectors are also predicted from the bag of words: how often
each token of the document occurs up to the last token read; vectors also from that of the last sentence only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probekit.config import Position, ProbeSettings
from probekit.data.corpus import Corpus, ranges
from probekit.evaluation.action_metrics import fit_bigram, prior_log_probabilities
from probekit.evaluation.baselines import SkipNgram, contexts, planner_log_probabilities, planners
from probekit.planted.ceilings import ceiling_log_probabilities, has_ceiling, position_ceiling
from probekit.probing.activations import chunk_slices
from probekit.probing.fitting import predicted
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON, Grid
from probekit.probing.results import CEILING, LAST_BAG, DocumentSums, Facts, ScoredExamples
from probekit.probing.solvers import Moments, RegressionProbes, RidgeProbes
from probekit.probing.targets import Examples, find_examples, labelled, reached
from probekit.run.run import Run

CHUNK_EXAMPLES = 512
"""Examples predicted at once; a document with more is predicted whole."""

MOST_EXAMPLES = 1_000_000
"""Baselines are counted on at most this many examples, drawn by whole documents."""

ORDER = 3
"""Most tokens that the skip n-gram is given."""

BEFORE_ALONE = ("ceiling (actions)", "ceiling (words)")
"""Ceilings that hold where nothing of the example itself has been read."""

BAG = 1024
"""Counts of a bag of words: tokens whose ids are equal modulo this are counted as one word."""

MOST_BAGS = 50_000
"""Bags of words are fitted on about this many examples, spread evenly over those that are counted."""

BAG_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Penalties of their ridge probes, per example."""

Predict = Callable[[slice], np.ndarray]
"""Log-probabilities `[examples, classes]` in nats of some test examples, all those of a document together; or
numbers `[examples]`, or vectors `[examples, outputs]`."""


class Baseline(NamedTuple):
    """A reader of no activations, and its loss on validation examples where gains may be measured over it."""

    predict: Predict
    validation_loss: float | None = None


def baseline_sums(run: Run, grid: Grid) -> list[DocumentSums]:
    """Scores every baseline on the grid's test examples, in rows for every position and horizon."""
    training = counted_examples(run.corpus, run.config.probe, grid, run.config.seed)
    scored, tested = [], grid.tested()
    for horizon in grid.horizons:
        for name, baseline in _of_sentences(run, grid, training, horizon).items():
            if positions := grid.positions if name not in BEFORE_ALONE else _before(grid):
                scored.append(_scored(grid, tested, horizon, positions, name, baseline))
        for position in grid.positions:
            for name, baseline in _at_position(run, grid, training, horizon, position).items():
                scored.append(_scored(grid, tested, horizon, [position], name, baseline))
    return scored


def counted_examples(corpus: Corpus, settings: ProbeSettings, grid: Grid, seed: int) -> Examples:
    """Examples to count in, which all positions reach and all horizons label.

    Of the documents, those that the grid's probes are fitted on come first, so that no probe wins by having
    seen more; others are drawn while there are at most `MOST_EXAMPLES`.
    """
    fitted_on = np.unique(grid.examples[FITTED_ON].document)
    documents = np.concatenate([corpus.documents("train"), corpus.documents(FITTED_ON)])
    order = np.random.default_rng(seed).permutation(np.setdiff1d(documents, fitted_on))
    order = np.concatenate([fitted_on, order])
    anchors = grid.target.example_counts(corpus, settings.anchors)
    drawn = np.sort(order[np.cumsum(anchors[order]) <= MOST_EXAMPLES])
    examples = find_examples(corpus, drawn, grid.target, grid.horizons, settings.anchors)
    near = [reached(corpus, examples, position) for position in grid.positions]
    return examples[np.all(near, axis=0) & labelled(examples.labels).all(axis=1)]


def _of_sentences(run: Run, grid: Grid, training: Examples, horizon: int) -> dict[str, Baseline]:
    """Readers of whole sentences, for which the position makes no difference."""
    corpus, target, h = run.corpus, grid.target, grid.horizons.index(horizon)
    chosen, test = grid.examples[CHOSEN_ON], grid.examples[TESTED_ON]
    baselines = _prior(grid, training, h)
    if target.kind != "classes":
        return baselines
    if target.of_sentences is not None:
        previous = [
            corpus.previous_labels(target.of_sentences, examples.sentence)
            for examples in (training, chosen, test)
        ]
        baselines["bigram (current action)"] = _bigram(grid, training, h, *previous)
    if target.name != "action" or target.of_sentences is None:
        return baselines

    def of_test(predict: Callable[[np.ndarray], np.ndarray], rows: slice) -> np.ndarray:
        """From predictions for all sentences of documents to those for test examples."""
        documents = np.unique(test.document[rows])
        return predict(documents)[np.searchsorted(corpus.sentences(documents), test.sentence[rows])]

    def ceiling(name: str, documents: np.ndarray) -> np.ndarray:
        return ceiling_log_probabilities(run.config, corpus, documents, horizon)[name]

    if horizon == 1:
        for name, (planner, read) in planners(run).items():
            predict = partial(planner_log_probabilities, planner, read)
            baselines[name] = Baseline(partial(of_test, predict))
    if has_ceiling(run.config) and run.config.probe.anchors == "start":
        for name in BEFORE_ALONE:
            baselines[name] = Baseline(partial(of_test, partial(ceiling, name)))
    return baselines


def prior_sums(grid: Grid) -> list[DocumentSums]:
    """The scores of the prior (or mean) of the examples to fit on, at every position and horizon."""
    tested, fitted_on = grid.tested(), grid.examples[FITTED_ON]
    return [
        _scored(grid, tested, horizon, grid.positions, name, baseline)
        for h, horizon in enumerate(grid.horizons)
        for name, baseline in _prior(grid, fitted_on, h).items()
    ]


def _prior(grid: Grid, training: Examples, h: int) -> dict[str, Baseline]:
    """The class prior or mean of some examples; of vectors always the mean of those to fit on."""
    target, chosen, test = grid.target, grid.examples[CHOSEN_ON].labels[:, h], grid.examples[TESTED_ON]
    if target.kind == "classes":
        prior = prior_log_probabilities(training.labels[:, h], target.classes)
        loss = float(-prior[chosen].mean())
        return {"prior": Baseline(lambda rows: np.tile(prior, (len(test[rows]), 1)), loss)}
    vectors = target.kind == "vectors"
    mean = target.mean((grid.examples[FITTED_ON] if vectors else training).labels[:, h])
    errors = (target.values(chosen).reshape(len(chosen), -1) - mean) ** 2

    def predict(rows: slice) -> np.ndarray:
        return np.tile(mean, (len(test[rows]), 1) if vectors else len(test[rows]))

    return {"mean": Baseline(predict, float(errors.sum(1).mean()))}


def _before(grid: Grid) -> list[Position]:
    """The positions before the examples' first tokens."""
    return [position for position in grid.positions if isinstance(position, int) and position > 0]


def _at_position(
    run: Run, grid: Grid, training: Examples, horizon: int, position: Position
) -> dict[str, Baseline]:
    """Readers of the tokens up to the last one that is read at a position, and no more."""
    corpus, target, h = run.corpus, grid.target, grid.horizons.index(horizon)
    chosen, test = grid.examples[CHOSEN_ON], grid.examples[TESTED_ON]

    def last_tokens(examples: Examples) -> np.ndarray:
        return contexts(corpus, examples.last_read(position), ORDER)

    baselines: dict[str, Baseline] = {}
    if target.kind == "classes":
        ngram = SkipNgram.fit(
            last_tokens(training),
            training.labels[:, h],
            target.classes,
            (last_tokens(chosen), chosen.labels[:, h]),
        )
        baselines["skip n-gram"] = Baseline(
            lambda rows: ngram.log_probabilities(last_tokens(test[rows])), ngram.validation_cross_entropy
        )
    if target.of_sentences is not None:
        name, baseline = _previous(corpus, grid, training, h, position)
        baselines[name] = baseline
    of_clusters = target.name == "action" and not has_ceiling(run.config)
    if run.config.probe.labels is not None or target.kind == "vectors" or of_clusters:
        baselines["bag of words"] = _bag_of_words(corpus, grid, training, h, position)
    if target.kind == "vectors":
        baselines[LAST_BAG] = _bag_of_words(corpus, grid, training, h, position, last=True)
    if target.name == "action" and has_ceiling(run.config):
        asked, at = test.sentence + horizon - 1, test.last_read(position)
        # With anchors at every token, the ceiling is given the number of sentences ahead. From distance 2 on
        # no reader of a position knows that, so probes far below this ceiling could hide a leak.
        exact = run.config.probe.anchors == "start" or (at >= test.start - 1).all()
        # Nothing is left to predict behind the sentence that is asked for.
        if exact and (at < corpus.stops(asked)).all():
            baselines[CEILING] = Baseline(
                lambda rows: position_ceiling(run.config, corpus, at[rows], asked[rows])
            )
    return baselines


def _previous(
    corpus: Corpus, grid: Grid, training: Examples, h: int, position: Position
) -> tuple[str, Baseline]:
    """A reader of the label of the last sentence that has been read whole, and that is not asked for."""
    target, of_sentences = grid.target, grid.target.of_sentences
    assert of_sentences is not None  # noqa: S101 - the caller's condition

    def label(examples: Examples) -> np.ndarray:
        following = next_sentences(corpus, examples.last_read(position))
        following = np.minimum(following, examples.sentence + grid.horizons[h] - 1)
        return corpus.previous_labels(of_sentences, following)

    def vector(examples: Examples) -> np.ndarray:
        """The vector, or zeros and a mark."""
        rows = label(examples)
        exists = labelled(rows)[:, None]
        return np.hstack([np.where(exists, target.values(np.maximum(rows, 0)), 0.0), ~exists])

    if target.kind == "vectors":
        return "previous vector", _ridge(grid, training, h, vector)
    previous = [label(part) for part in (training, grid.examples[CHOSEN_ON], grid.examples[TESTED_ON])]
    name, fit = ("bigram", _bigram) if target.kind == "classes" else ("previous number", _line)
    return name, fit(grid, training, h, *previous)


def next_sentences(corpus: Corpus, tokens: np.ndarray) -> np.ndarray:
    """The sentence that holds the token after each one; the sentence before it has been read `[rows]`."""
    return np.searchsorted(corpus.first_token, tokens + 1, side="right") - 1


def _bigram(
    grid: Grid, training: Examples, h: int, fit: np.ndarray, choose: np.ndarray, test: np.ndarray
) -> Baseline:
    """A bigram, given the previous labels of training, validation and test examples."""
    labels = grid.examples[CHOSEN_ON].labels[:, h]
    bigram = fit_bigram(fit, training.labels[:, h], grid.target.classes, (choose, labels))
    loss = float(-bigram.table[choose, labels].mean())
    return Baseline(lambda rows: bigram.log_probabilities(test[rows]), loss)


def _line(
    grid: Grid, training: Examples, h: int, fit: np.ndarray, choose: np.ndarray, test: np.ndarray
) -> Baseline:
    """A line by least squares, given the previous numbers; the mean of such examples where there is none."""
    labels, known = training.labels[:, h], labelled(fit)
    level = labels[~known].mean() if (~known).any() else labels.mean()
    x, y = fit[known], labels[known]
    centre = x.mean() if len(x) else 0.0
    variance = ((x - centre) ** 2).sum()
    slope = ((x - centre) * y).sum() / variance if variance > 0 else 0.0

    def predict(previous: np.ndarray) -> np.ndarray:
        exists = labelled(previous)
        line = slope * (np.where(exists, previous, centre) - centre) + (y.mean() if len(y) else level)
        return np.where(exists, line, level)

    loss = float(((predict(choose) - grid.examples[CHOSEN_ON].labels[:, h]) ** 2).mean())
    return Baseline(lambda rows: predict(test[rows]), loss)


def bags_of_words(
    corpus: Corpus, examples: Examples, positions: np.ndarray, *, last: bool = False
) -> np.ndarray:
    """Log of one and how often each token occurs in the document up to positions `[examples, bag]`.

    Args:
        corpus: The corpus.
        examples: The examples.
        positions: Last token of each that counts, in `corpus.tokens` `[examples]`.
        last: Count those of the sentence that holds the position alone.
    """
    size = min(BAG, len(corpus.tokenizer))
    first = corpus.document_tokens[examples.document] + 1
    if last:
        first = np.maximum(first, corpus.first_token[next_sentences(corpus, positions - 1)])
    row = np.repeat(np.arange(len(positions)), positions + 1 - first)
    token = corpus.tokens[ranges(first, positions + 1)].astype(np.int64) % size
    return np.log1p(np.bincount(row * size + token, minlength=len(positions) * size).reshape(-1, size))


def _bag_of_words(
    corpus: Corpus, grid: Grid, training: Examples, h: int, position: Position, *, last: bool = False
) -> Baseline:
    """A ridge probe of the bag of words, of the whole document or its last sentence up to a position."""
    return _ridge(
        grid, training, h, lambda part: bags_of_words(corpus, part, part.last_read(position), last=last)
    )


def _ridge(grid: Grid, training: Examples, h: int, features: Callable[[Examples], np.ndarray]) -> Baseline:
    """A ridge probe of features `[examples, width]`, its penalty chosen on validation examples."""
    target, test = grid.target, grid.examples[TESTED_ON]
    classes, outputs = target.kind == "classes", target.outputs
    probe = (
        RidgeProbes(BAG_PENALTIES)
        if classes
        else RegressionProbes(BAG_PENALTIES, outputs if target.kind == "vectors" else None)
    )

    def parts(examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(examples), CHUNK_EXAMPLES):
            part = examples[start : start + CHUNK_EXAMPLES]
            yield (
                torch.from_numpy(features(part))[None],
                torch.from_numpy(target.values(part.labels[:, h])),
            )

    moments: Moments | None = None
    for X, y in parts(training[:: -(-len(training) // MOST_BAGS)]):
        if classes:
            moments = moments or Moments.zeros(1, X.shape[2], target.classes)
            moments.add(X, y)
        else:
            moments = moments or Moments.zeros(1, X.shape[2], 1, numbers=outputs)
            moments.add_numbers(X, y.reshape(1, -1, outputs))
    assert moments is not None  # noqa: S101 - a grid has examples
    probe.fit_moments(moments)
    for X, y in parts(grid.examples[CHOSEN_ON]):
        probe.observe_validation(X, y)
    probe.choose()

    def predict(rows: slice) -> np.ndarray:
        X = torch.cat([X for X, _ in parts(test[rows])], 1)
        return predicted(probe, X)[0].numpy()

    return Baseline(predict, float(probe.validation_loss_))


def _scored(
    grid: Grid, tested: ScoredExamples, horizon: int, positions: Sequence[Position], name: str, of: Baseline
) -> DocumentSums:
    """The scores of a baseline that predicts the same at all of the positions."""
    readers: list[Facts] = [
        {"reader": name, "position": position, "horizon": horizon} for position in positions
    ]
    if of.validation_loss is not None:
        loss = "cross_entropy" if grid.target.kind == "classes" else "squared_error"
        readers = [reader | {f"validation_{loss}": of.validation_loss} for reader in readers]
    once, labels = DocumentSums(readers[:1], tested), grid.labels(TESTED_ON, horizon)
    document = grid.examples[TESTED_ON].document
    for rows in chunk_slices(document, CHUNK_EXAMPLES, len(document)):
        once.add(rows, of.predict(rows)[None], grid.target.values(labels[rows]))
    repeated = DocumentSums(readers)
    repeated.sums = {score: np.repeat(sums, len(readers), axis=1) for score, sums in once.sums.items()}
    return repeated
