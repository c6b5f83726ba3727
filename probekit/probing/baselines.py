"""Baselines and ceilings on the grid's own examples: what can be predicted without any activation.

The prior, the bigram (given the label of the last sentence that ends before the position) and the skip n-gram
(given the last tokens up to it) are counted on the training documents and those that probes are fitted on;
their smoothing is chosen on validation documents. "bigram (current action)", planners and two of the ceilings
know the whole sentence before the anchor, however far before it a probe reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from probekit.config import ProbeSettings
from probekit.data.corpus import Corpus
from probekit.evaluation.action_metrics import fit_bigram, prior_log_probabilities
from probekit.evaluation.baselines import SkipNgram, contexts, planner_log_probabilities, planners
from probekit.planted.ceilings import ceiling_log_probabilities, has_ceiling, position_ceiling
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON, Grid, document_numbers
from probekit.probing.results import CEILING, DocumentSums, Facts
from probekit.probing.targets import NO_LABEL, Examples, find_examples, reached
from probekit.run.run import Run

CHUNK_EXAMPLES = 512
"""Examples predicted at once; a document with more is predicted whole."""

MOST_EXAMPLES = 1_000_000
"""Baselines are counted on at most this many examples, drawn by whole documents."""

ORDER = 3
"""Most tokens that the skip n-gram is given."""

Predict = Callable[[slice], np.ndarray]
"""Log-probabilities `[examples, classes]` in nats of some test examples, all those of a document together."""


class Baseline(NamedTuple):
    """A reader of no activations, and its loss on validation examples where gains may be measured over it."""

    predict: Predict
    validation_cross_entropy: float | None = None


def baseline_sums(run: Run, grid: Grid) -> list[DocumentSums]:
    """Scores every baseline on the grid's test examples, in rows for every distance and horizon."""
    training = counted_examples(run.corpus, run.config.probe, grid, run.config.seed)
    scored = []
    for horizon in grid.horizons:
        for name, baseline in _of_sentences(run, grid, training, horizon).items():
            scored.append(_scored(grid, horizon, grid.distances, name, baseline))
        for distance in grid.distances:
            for name, baseline in _of_positions(run, grid, training, horizon, distance).items():
                scored.append(_scored(grid, horizon, [distance], name, baseline))
    return scored


def counted_examples(corpus: Corpus, settings: ProbeSettings, grid: Grid, seed: int) -> Examples:
    """Examples to count in, which all distances reach and all horizons label.

    Of the documents, those that the grid's probes are fitted on come first, so that no probe wins by having
    seen more; others are drawn while there are at most `MOST_EXAMPLES`.
    """
    fitted_on = np.unique(grid.examples[FITTED_ON].document)
    documents = np.concatenate([corpus.documents("train"), corpus.documents(FITTED_ON)])
    order = np.random.default_rng(seed).permutation(np.setdiff1d(documents, fitted_on))
    order = np.concatenate([fitted_on, order])
    ends = corpus.document_sentences if settings.anchors == "sentence" else corpus.document_tokens
    drawn = np.sort(order[np.cumsum(ends[order + 1] - ends[order]) <= MOST_EXAMPLES])
    examples = find_examples(corpus, drawn, grid.target, grid.horizons, settings.anchors)
    usable = reached(corpus, examples, max(grid.distances)) & (examples.labels != NO_LABEL).all(axis=1)
    return examples[usable]


def _of_sentences(run: Run, grid: Grid, training: Examples, horizon: int) -> dict[str, Baseline]:
    """Readers of whole sentences, for which the distance makes no difference."""
    corpus, target, h = run.corpus, grid.target, grid.horizons.index(horizon)
    chosen, test = grid.examples[CHOSEN_ON], grid.examples[TESTED_ON]
    prior = prior_log_probabilities(training.labels[:, h], target.classes)
    loss = float(-prior[chosen.labels[:, h]].mean())
    baselines = {"prior": Baseline(lambda rows: np.tile(prior, (len(test[rows]), 1)), loss)}
    if target.of_sentences is not None:
        previous = [
            corpus.previous_labels(target.of_sentences, examples.sentence)
            for examples in (training, chosen, test)
        ]
        baselines["bigram (current action)"] = _bigram(grid, training, h, *previous)
    if target.name != "action":
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
    if has_ceiling(run.config) and run.config.probe.anchors == "sentence":
        for name in ("ceiling (actions)", "ceiling (words)"):
            baselines[name] = Baseline(partial(of_test, partial(ceiling, name)))
    return baselines


def _of_positions(
    run: Run, grid: Grid, training: Examples, horizon: int, distance: int
) -> dict[str, Baseline]:
    """Readers of the tokens up to the position, and no more."""
    corpus, target, h = run.corpus, grid.target, grid.horizons.index(horizon)
    chosen, test = grid.examples[CHOSEN_ON], grid.examples[TESTED_ON]
    last_tokens = partial(contexts, corpus, order=ORDER)
    ngram = SkipNgram.fit(
        last_tokens(training.positions(distance)),
        training.labels[:, h],
        target.classes,
        (last_tokens(chosen.positions(distance)), chosen.labels[:, h]),
    )
    baselines = {
        "skip n-gram": Baseline(
            lambda rows: ngram.log_probabilities(last_tokens(test[rows].positions(distance))),
            ngram.validation_cross_entropy,
        )
    }
    if target.of_sentences is not None:
        previous = [
            corpus.previous_labels(target.of_sentences, next_sentences(corpus, examples.positions(distance)))
            for examples in (training, chosen, test)
        ]
        baselines["bigram"] = _bigram(grid, training, h, *previous)
    # With anchors at every token, the ceiling is given the number of sentences ahead. From distance 2 on no
    # reader of a position knows that, so probes far below this ceiling could hide a leak.
    exact = run.config.probe.anchors == "sentence" or distance == 1
    if target.name == "action" and has_ceiling(run.config) and exact:

        def ceiling(rows: slice) -> np.ndarray:
            asked = test.sentence[rows] + horizon - 1
            return position_ceiling(run.config, corpus, test[rows].positions(distance), asked)

        baselines[CEILING] = Baseline(ceiling)
    return baselines


def next_sentences(corpus: Corpus, positions: np.ndarray) -> np.ndarray:
    """The sentence that holds the token after each position; the one before it has been read `[rows]`."""
    return np.searchsorted(corpus.first_token, positions + 1, side="right") - 1


def _bigram(
    grid: Grid, training: Examples, h: int, fit: np.ndarray, choose: np.ndarray, test: np.ndarray
) -> Baseline:
    """A bigram, given the previous labels of training, validation and test examples."""
    labels = grid.examples[CHOSEN_ON].labels[:, h]
    bigram = fit_bigram(fit, training.labels[:, h], grid.target.classes, (choose, labels))
    loss = float(-bigram.table[choose, labels].mean())
    return Baseline(lambda rows: bigram.log_probabilities(test[rows]), loss)


def _scored(
    grid: Grid, horizon: int, distances: tuple[int, ...] | list[int], name: str, of: Baseline
) -> DocumentSums:
    """The scores of a baseline that predicts the same at all of the distances."""
    readers: list[Facts] = [
        {"reader": name, "distance": distance, "horizon": horizon} for distance in distances
    ]
    if of.validation_cross_entropy is not None:
        readers = [r | {"validation_cross_entropy": of.validation_cross_entropy} for r in readers]
    number = document_numbers(grid.examples[TESTED_ON].document)
    labels, documents = grid.labels(TESTED_ON, horizon), int(number.max()) + 1
    once = DocumentSums(readers[:1], documents)
    for rows in whole_documents(number):
        once.add(number[rows], of.predict(rows)[None], labels[rows])
    repeated = DocumentSums(readers, documents)
    repeated.sums = {score: np.repeat(sums, len(readers), axis=1) for score, sums in once.sums.items()}
    return repeated


def whole_documents(number: np.ndarray) -> Iterator[slice]:
    """Cuts examples `[examples]`, of documents numbered in their order, into parts of whole documents."""
    ends = np.append(np.flatnonzero(np.diff(number)) + 1, len(number))
    start = 0
    while start < len(number):
        end = int(np.searchsorted(ends, start + CHUNK_EXAMPLES))
        stop = int(ends[min(end, len(ends) - 1)])
        yield slice(start, stop)
        start = stop
