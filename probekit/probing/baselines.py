"""Baselines and ceilings on the grid's own examples: what is read without any activation.

The prior, the bigram (given the label of the last sentence that is wholly read at the position) and the skip
n-gram (given the last tokens up to it) are fitted on the training documents and those that probes are fitted
on, and chosen on validation documents. "bigram (current action)", planners and two of the ceilings
know all of the sentence before the anchor, however far before it a probe reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from probekit.config import ProbeSettings
from probekit.data.corpus import Corpus
from probekit.evaluation.action_metrics import fit_bigram, prior_log_probabilities
from probekit.evaluation.baselines import SkipNgram, contexts, planner_log_probabilities, planners
from probekit.planted.ceilings import ceiling_log_probabilities, has_ceiling, position_ceiling
from probekit.probing.activations import CHUNK_EXAMPLES
from probekit.probing.fitting import document_numbers
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON, Grid
from probekit.probing.results import Row, Tally
from probekit.probing.targets import NO_LABEL, Examples, find_examples, reached
from probekit.run.run import Run

MOST_EXAMPLES = 1_000_000
"""Baselines are fitted on at most this many training examples, drawn by whole documents."""

ORDER = 3
"""Most tokens that the skip n-gram looks at."""

Predict = Callable[[slice], np.ndarray]
"""Log-probabilities `[examples, classes]` of some of the test examples, all those of a document together."""

Reading = tuple[Predict, float | None]
"""What a baseline predicts, and its cross-entropy on validation examples where it may be compared by that."""


def baseline_tallies(run: Run, grid: Grid) -> list[Tally]:
    """Scores every baseline on the grid's test examples, in rows for every distance and horizon."""
    training = _training(run.corpus, run.config.probe, grid, run.config.seed)
    tallies = []
    for h, horizon in enumerate(grid.horizons):
        for reader, (predict, loss) in _by_sentence(run, grid, training, h, horizon).items():
            heads = [_head(reader, distance, horizon, loss) for distance in grid.distances]
            tallies.append(_tally(run.corpus, grid, horizon, heads, predict))
        for distance in grid.distances:
            for reader, (predict, loss) in _by_position(run, grid, training, h, distance).items():
                heads = [_head(reader, distance, horizon, loss)]
                tallies.append(_tally(run.corpus, grid, horizon, heads, predict))
    return tallies


def _training(corpus: Corpus, settings: ProbeSettings, grid: Grid, seed: int) -> Examples:
    """Examples to count in, that all distances reach and all horizons label.

    Of the training documents and those that probes are fitted on: no probe is to win by having seen more.
    """
    documents = np.concatenate([corpus.documents("train"), corpus.documents(FITTED_ON)])
    order = np.random.default_rng(seed).permutation(documents)
    ends = corpus.document_sentences if settings.anchors == "sentence" else corpus.document_tokens
    drawn = np.sort(order[np.cumsum(ends[order + 1] - ends[order]) <= MOST_EXAMPLES])
    examples = find_examples(corpus, drawn, grid.target, grid.horizons, settings.anchors)
    usable = reached(corpus, examples, max(grid.distances)) & (examples.labels != NO_LABEL).all(axis=1)
    return examples[usable]


def _by_sentence(run: Run, grid: Grid, training: Examples, h: int, horizon: int) -> Mapping[str, Reading]:
    """Readers that know whole sentences, so that the distance makes no difference to them."""
    corpus, target, test = run.corpus, grid.target, grid.examples[TESTED_ON]
    chosen, classes = grid.examples[CHOSEN_ON], grid.target.classes
    prior = prior_log_probabilities(training.labels[:, h], classes)
    readers: dict[str, Reading] = {
        "prior": (
            lambda rows: np.tile(prior, (len(test[rows]), 1)),
            float(-prior[chosen.labels[:, h]].mean()),
        )
    }
    if target.of_sentences is not None:
        known = partial(corpus.previous_labels, target.of_sentences)
        told = [known(examples.sentence) for examples in (training, chosen, test)]
        readers["bigram (current action)"] = _bigram(grid, training, h, *told)
    if target.name != "action":
        return readers
    for name, read in _planned(run, horizon).items():
        readers[name] = _of_documents(corpus, test, read), None
    return readers


def _planned(run: Run, horizon: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Planners and ceilings: log-probabilities for all sentences of documents `[sentences, actions]`."""
    readers: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    if horizon == 1:
        for name, (planner, corpus) in planners(run).items():
            readers[name] = partial(planner_log_probabilities, planner, corpus)
    if has_ceiling(run.config) and run.config.probe.anchors == "sentence":

        def ceiling(name: str, documents: np.ndarray) -> np.ndarray:
            return ceiling_log_probabilities(run.config, run.corpus, documents, horizon)[name]

        for name in ("ceiling (actions)", "ceiling (words)"):
            readers[name] = partial(ceiling, name)
    return readers


def _by_position(run: Run, grid: Grid, training: Examples, h: int, distance: int) -> Mapping[str, Reading]:
    """Readers that know what is to be read up to the position, and no more."""
    corpus, target, horizon = run.corpus, grid.target, grid.horizons[h]
    chosen, test = grid.examples[CHOSEN_ON], grid.examples[TESTED_ON]
    readers: dict[str, Reading] = {"skip n-gram": _skip_ngram(corpus, grid, training, h, distance)}
    if target.of_sentences is not None:
        read = [
            corpus.previous_labels(target.of_sentences, next_sentences(corpus, examples.anchor - distance))
            for examples in (training, chosen, test)
        ]
        readers["bigram"] = _bigram(grid, training, h, *read)
    # With anchors at every token, the number of sentences ahead, which the ceiling is told, is news from
    # distance 2 on: no reader of a position knows it, and probes far below could hide a leak.
    if _has_ceiling(run, grid) and (run.config.probe.anchors == "sentence" or distance == 1):
        readers["ceiling (tokens read)"] = _position_ceiling(run, grid, distance, horizon), None
    return readers


def next_sentences(corpus: Corpus, positions: np.ndarray) -> np.ndarray:
    """The sentence that holds the token after each position: the one before it is wholly read `[rows]`."""
    return np.searchsorted(corpus.first_token, positions + 1, side="right") - 1


def _bigram(
    grid: Grid, training: Examples, h: int, fit: np.ndarray, choose: np.ndarray, test: np.ndarray
) -> Reading:
    """A bigram, given the labels that it knows in training, validation and test examples."""
    labels = grid.examples[CHOSEN_ON].labels[:, h]
    bigram = fit_bigram(fit, training.labels[:, h], grid.target.classes, (choose, labels))
    loss = float(-bigram.table[choose, labels].mean())
    return lambda rows: bigram.log_probabilities(test[rows]), loss


def _skip_ngram(corpus: Corpus, grid: Grid, training: Examples, h: int, distance: int) -> Reading:
    chosen, test = grid.examples[CHOSEN_ON], grid.examples[TESTED_ON]
    fitted = SkipNgram.fit(
        contexts(corpus, training.anchor - distance, ORDER),
        training.labels[:, h],
        grid.target.classes,
        (contexts(corpus, chosen.anchor - distance, ORDER), chosen.labels[:, h]),
    )
    return (
        lambda rows: fitted.log_probabilities(contexts(corpus, test.anchor[rows] - distance, ORDER)),
        fitted.validation_cross_entropy,
    )


def _position_ceiling(run: Run, grid: Grid, distance: int, horizon: int) -> Predict:
    test = grid.examples[TESTED_ON]

    def predict(rows: slice) -> np.ndarray:
        read, asked = test.anchor[rows] - distance, test.sentence[rows] + horizon - 1
        return position_ceiling(run.config, run.corpus, read, asked)

    return predict


def _of_documents(corpus: Corpus, test: Examples, read: Callable[[np.ndarray], np.ndarray]) -> Predict:
    """From predictions for all sentences of documents to those for some examples."""

    def predict(rows: slice) -> np.ndarray:
        documents = np.unique(test.document[rows])
        return read(documents)[np.searchsorted(corpus.sentences(documents), test.sentence[rows])]

    return predict


def _has_ceiling(run: Run, grid: Grid) -> bool:
    return grid.target.name == "action" and has_ceiling(run.config)


def _head(reader: str, distance: int, horizon: int, loss: float | None) -> Row:
    head: Row = {"reader": reader, "distance": distance, "horizon": horizon}
    return head if loss is None else head | {"validation_cross_entropy": loss}


def whole_documents(number: np.ndarray) -> Iterator[slice]:
    """Cuts examples `[examples]`, of documents numbered in their order, into parts of whole documents."""
    ends = np.append(np.flatnonzero(np.diff(number)) + 1, len(number))
    start = 0
    while start < len(number):
        end = int(np.searchsorted(ends, start + CHUNK_EXAMPLES))
        stop = int(ends[min(end, len(ends) - 1)])
        yield slice(start, stop)
        start = stop


def _tally(corpus: Corpus, grid: Grid, horizon: int, heads: list[Row], predict: Predict) -> Tally:
    test = grid.examples[TESTED_ON]
    number, labels = document_numbers(test.document), grid.labels(TESTED_ON, horizon)
    one = Tally(heads[:1], int(number.max()) + 1)
    for rows in whole_documents(number):
        one.add(number[rows], predict(rows)[None], labels[rows])
    whole = Tally(heads, int(number.max()) + 1)
    whole.sums = {score: np.repeat(sums, len(heads), axis=1) for score, sums in one.sums.items()}
    return whole
