"""The whole chain against truth, on a tiny LM: shuffled labels are not read, and what a hook writes is.

Labels that nothing predicts must give the prior at the nominal rate, for texts, sentences and spans, classes
and numbers, at every kind of position. A signal written into the residual stream must be found from there on,
at the tokens at which it was written, and read no better than its noise allows.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from probekit.config import Position
from probekit.data.corpus import Corpus
from probekit.probing.activations import ActivationReader, HookPoint, Stack
from probekit.probing.baselines import prior_sums
from probekit.probing.fitting import FitJob, fit_sums, score
from probekit.probing.grid import TESTED_ON, Grid, make_grid
from probekit.probing.results import table_of
from probekit.probing.targets import Examples, Ranges, Target, sentence_target
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import Resampling

POINTS: list[HookPoint] = [("hook_resid_post", layer) for layer in range(3)]
SHUFFLES = 10


def probed(run: Run, grid: Grid, source: Any, solver: str) -> pd.DataFrame:
    """The rows of probes."""
    quiet, folder = Progress(quiet=True), Path(tempfile.gettempdir())
    read = dict.fromkeys(grid.positions, 0)
    settings = run.config.probe.model_copy(update={"l2": (1e-3, 1e-2, 1e-1), "solvers": (solver,)})
    job = FitJob(grid, settings, None, 0, run.device, quiet, "test", folder, read)
    fitted = fit_sums(source, job, [solver])
    scored = score(source, job, fitted)
    resampling = Resampling(resamples=200, seed=0)
    table = table_of([*prior_sums(grid), *scored], grid.tested(), [], resampling)
    return table[table.reader == "probe"]


@pytest.fixture(scope="module")
def run(tiny_run: Run) -> Run:
    """The tiny run with most documents in the splits that probes use, 50 of them to test on."""
    shared = tiny_run.with_settings({})
    split = np.random.default_rng(0).permutation(np.repeat([1, 2, 3], [70, 40, 50]))
    shared.corpus = replace(tiny_run.corpus, split=split.astype(tiny_run.corpus.split.dtype))
    return shared


# Shuffled labels


@dataclass
class Held:
    """Activations by split, which do not depend on labels."""

    values: dict[str, Tensor]
    grid: Grid
    stacks: list[Stack]
    dtype: torch.dtype = torch.float32
    unit: str = "examples"

    def size(self, examples: Examples) -> int:
        return len(examples)

    def chunks(self, examples: Examples, done: Any = None) -> Iterator[tuple[slice, list[Tensor]]]:
        (split,) = (name for name, known in self.grid.examples.items() if known is examples)
        yield slice(0, len(examples)), [self.values[split]]


def random_ranges(corpus: Corpus, what: str) -> Ranges:
    """Whole documents, or two spans of a few tokens in each, that overlap now and then."""
    generator = np.random.default_rng(0)
    first, end = corpus.document_tokens[:-1] + 1, corpus.document_tokens[1:]
    document = np.arange(len(first))
    if what == "spans":
        document = np.repeat(document, 3)
        start = generator.integers(first[document] + 2, end[document] - 4)
        order = np.lexsort((start, document))
        document, start = document[order], start[order]
        return Ranges(
            document, start, start + generator.integers(1, 4, size=len(start)), np.zeros(len(start))
        )
    return Ranges(document, first, end, np.zeros(len(first)))


WHERE: dict[str, list[Position]] = {
    "sentences": [2, 1, 0, "last", "mean"],
    "texts": ["first", "last", "mean"],
    "spans": [2, "first", "last", "mean"],
}


@pytest.mark.parametrize("kind", ["classes", "numbers"])
@pytest.mark.parametrize("what", list(WHERE))
def test_shuffled_labels_give_the_prior_at_the_nominal_rate(run: Run, what: str, kind: str):
    corpus, generator = run.corpus, np.random.default_rng(1)
    classes = 3 if kind == "classes" else 0
    dtype = np.int64 if classes else np.float64
    if what == "sentences":
        target = sentence_target(corpus, "noise", classes, np.zeros(len(corpus.first_token), dtype))
    else:
        ranges = random_ranges(corpus, what)
        ranges = replace(ranges, labels=ranges.labels.astype(dtype))
        target = Target("noise", classes, ranges, kind=kind, positions=("last",))
    settings = run.config.probe.model_copy(update={"positions": tuple(WHERE[what]), "solvers": ("ridge",)})
    grid = make_grid(corpus, settings, target, 0)
    assert list(grid.positions) == WHERE[what]
    reader = ActivationReader(run, "none", POINTS, grid.positions)
    values = {split: reader.read(examples)[0] for split, examples in grid.examples.items()}
    rows = []
    for shuffle in range(SHUFFLES):
        drawn = {}
        for split, examples in grid.examples.items():
            noise = generator.normal(size=len(examples))
            labels = np.digitize(noise, [-0.5, 1.0]) if classes else noise
            drawn[split] = replace(examples, labels=labels[:, None])
        shuffled = replace(grid, examples=drawn)
        solver = "ridge" if kind == "numbers" or shuffle % 2 else "lda"
        rows.append(probed(run, shuffled, Held(values, shuffled, reader.stacks), solver))
    found = pd.concat(rows)
    assert len(found) == SHUFFLES * 3 * len(WHERE[what])
    metric = "bits" if classes else "r2"
    assert (found[f"{metric}_low"] <= 0).mean() >= 0.9
    assert found[metric].mean() < 0.01
    assert found[metric].min() > -0.5


def test_labels_of_texts_that_are_shuffled_are_the_prior_for_every_token(run: Run):
    """Examples of a document share a label: only intervals that resample documents keep to the rate."""
    corpus, generator = run.corpus, np.random.default_rng(2)
    settings = run.config.probe.model_copy(update={"positions": (1, 0), "solvers": ("lda",)})
    grid = make_grid(
        corpus, settings, sentence_target(corpus, "noise", 2, np.zeros(len(corpus.first_token), int)), 0
    )
    reader = ActivationReader(run, "none", POINTS, grid.positions)
    values = {split: reader.read(examples)[0] for split, examples in grid.examples.items()}
    rows = []
    for _ in range(2 * SHUFFLES):
        of_document = generator.integers(2, size=len(corpus.split))
        drawn = {
            split: replace(examples, labels=of_document[examples.document][:, None])
            for split, examples in grid.examples.items()
        }
        shuffled = replace(grid, examples=drawn)
        rows.append(probed(run, shuffled, Held(values, shuffled, reader.stacks), "lda"))
    found = pd.concat(rows)
    assert (found.bits_low <= 0).mean() >= 0.9
    assert (found.auroc_low <= 0.5).mean() >= 0.9


# Signals that a hook writes


class Writing(ActivationReader):
    """Adds a direction, times a number that each token has, to what leaves layer 1."""

    def __init__(self, run: Run, positions: tuple[Position, ...], numbers: np.ndarray) -> None:
        super().__init__(run, "none", POINTS, positions)
        plain, width = self._forward, self.stacks[0].width
        generator = torch.Generator().manual_seed(0)
        directions = 30 * torch.linalg.qr(torch.randn(width, numbers.shape[1], generator=generator))[0].T
        written = torch.from_numpy(numbers).float()

        def forward(tokens: Tensor, hooks: list[Any], *given: Any) -> None:
            at = self.first[:, None] + torch.arange(tokens.shape[1])

            def write(activation: Tensor, hook: Any = None) -> Tensor:
                return activation + written[at.clamp(max=len(written) - 1)] @ directions

            plain(tokens, [("blocks.1.hook_resid_post", write), *hooks], *given)

        self._forward_hooked = forward
        self._plain = plain

    def _inputs(self, batch: Any) -> Any:
        self.first = torch.from_numpy(np.asarray(batch.start))
        return super()._inputs(batch)

    def _pass(self, *given: Any) -> None:
        self._forward = self._forward_hooked
        try:
            super()._pass(*given)
        finally:
            self._forward = self._plain


def of_tokens(corpus: Corpus, of_sentences: np.ndarray) -> np.ndarray:
    """What each token's sentence has; zeros for tokens outside sentences `[tokens, features]`."""
    sentence = np.searchsorted(corpus.first_token, np.arange(len(corpus.tokens)), side="right") - 1
    return np.where((sentence >= 0)[:, None], of_sentences[np.maximum(sentence, 0)], 0.0)


def found_where_written(
    run: Run, target: Target, numbers: np.ndarray, positions: tuple[Position, ...], solver: str
):
    settings = run.config.probe.model_copy(update={"positions": positions, "solvers": (solver,)})
    grid = make_grid(run.corpus, settings, target, 0)
    assert grid.positions == positions
    return probed(run, grid, Writing(run, positions, numbers), solver), grid


def test_a_number_that_a_hook_writes_is_found_where_it_is_written(run: Run):
    """Noise leaves 0.8 of the variance to be read: from layer 1 on, at the sentence's own tokens."""
    corpus, generator, share = run.corpus, np.random.default_rng(3), 0.8
    number = generator.normal(size=len(corpus.first_token))
    noise = np.sqrt(1 / share - 1) * generator.normal(size=len(number))
    target = sentence_target(corpus, "number", 0, 100 + 5 * number)
    numbers = of_tokens(corpus, (number + noise)[:, None])
    rows, _ = found_where_written(run, target, numbers, (1, 0, "last", "mean"), "ridge")
    written = (rows.layer >= 1) & (rows.position != "1")
    assert rows.r2[written].min() > share - 0.12
    assert (rows.r2_low[written] <= share).all()
    assert (rows.r2_low[~written] <= 0).mean() >= 0.6  # of six cells that share their examples
    assert rows.r2[~written].max() < 0.05


@pytest.mark.parametrize("what", ["sentence position", "document type"])
def test_a_class_that_a_hook_writes_is_found_where_it_is_written(run: Run, what: str):
    """One of four classes, replaced by any of them in a fifth of the cases: 0.85 is all that can be right."""
    corpus, generator, classes = run.corpus, np.random.default_rng(4), 4
    document = corpus.document_of(np.arange(len(corpus.first_token)))
    if what == "document type":
        label = generator.integers(classes, size=len(corpus.split))[document]
        replaced, other = (
            generator.random(len(corpus.split)) < 0.2,
            generator.integers(classes, size=len(corpus.split)),
        )
        shown = np.where(replaced[document], other[document], label)
    else:
        number = np.arange(len(document)) - corpus.document_sentences[document]
        label = (
            generator.permutation(64)[number % 64] % classes
        )  # a code of the position, which words do not say
        replaced = generator.random(len(label)) < 0.2
        shown = np.where(replaced, generator.integers(classes, size=len(label)), label)
    target = sentence_target(corpus, what, classes, label)
    numbers = of_tokens(corpus, np.eye(classes)[shown])
    rows, grid = found_where_written(run, target, numbers, (1, 0, "last", "mean"), "lda")
    ceiling = 0.8 + 0.2 / classes
    # A document's class is written before the sentence, too, but for its first one.
    before = (rows.position == "1") & (what == "sentence position")
    written = (rows.layer >= 1) & ~before
    right = (shown == label)[grid.examples[TESTED_ON].sentence].mean()
    assert rows.accuracy[written].min() > right - 0.08
    assert (rows.accuracy_low[written] <= ceiling).all()
    assert rows.accuracy[written].max() <= right + 0.03
    if what == "document type":
        assert rows.bits[~written].max() < 0.05
    assert (rows.bits[~written] < rows.bits[written].min() - 0.5).all()
