"""Fitting and scoring against each cell done alone, on activations that are not a model's."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from probekit.config import Config
from probekit.probing import fitting
from probekit.probing.activations import Stack
from probekit.probing.controls import block_ends, prequential_code, prior_code
from probekit.probing.fitting import (
    CLOSED_FORM,
    FitJob,
    ProbingTask,
    fit,
    fit_sums,
    hold,
    score,
    target_tasks,
)
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON, Grid
from probekit.probing.results import DocumentSums, Facts
from probekit.probing.solvers import (
    L1Probes,
    LDAProbes,
    MeanDifferenceProbes,
    MLPProbes,
    RidgeProbes,
    SoftmaxProbes,
)
from probekit.probing.targets import Examples, Target
from probekit.progress import Progress

CLASSES, DISTANCES, HORIZONS = 4, (1, 3), (1, 2)
SPLITS = {FITTED_ON: 12, CHOSEN_ON: 6, TESTED_ON: 6}
"""Documents of every split."""
BLOCKS = [Stack(5, (("a", 0), ("a", 1))), Stack(3, (("b", 2),))]
CELLS = [(b, p, d) for b, block in enumerate(BLOCKS) for p in range(len(block.points)) for d in range(2)]


@dataclass
class Source:
    """Activations of every split, for every block `[hook points, distances, examples, width]`."""

    values: dict[str, list[Tensor]]
    splits: dict[str, Examples]
    stacks: list[Stack]
    rows: int = 7
    passes: int = 0
    dtype: torch.dtype = torch.float32
    unit: str = "examples"

    def size(self, examples: Examples) -> int:
        return len(examples)

    def chunks(
        self, examples: Examples, done: Callable[[int], None] = lambda read: None
    ) -> Iterator[tuple[slice, list[Tensor]]]:
        (split,) = (name for name, known in self.splits.items() if known is examples)
        self.passes += 1
        for start in range(0, len(examples), self.rows):
            part = slice(start, min(start + self.rows, len(examples)))
            yield part, [values[:, :, part] for values in self.values[split]]


def make_examples(documents: int, first: int, generator: np.random.Generator) -> Examples:
    """Documents of 5 to 12 examples, not in the order of their numbers."""
    numbers = first + generator.permutation(documents)
    document = np.repeat(numbers, generator.integers(5, 13, size=documents))
    anchor = np.arange(len(document)) + 1000 * first
    labels = generator.integers(CLASSES, size=(len(document), len(HORIZONS)))
    return Examples.of_tokens(document, anchor, anchor // 9, labels)


@pytest.fixture(scope="module")
def grid() -> Grid:
    generator = np.random.default_rng(0)
    examples = {
        split: make_examples(documents, 100 * number, generator)
        for number, (split, documents) in enumerate(SPLITS.items(), 1)
    }
    target = Target("made up", CLASSES, lambda start, sentence, horizon: start)
    return Grid(target, DISTANCES, HORIZONS, examples, {}, ())


@pytest.fixture(scope="module")
def control(grid: Grid) -> ProbingTask:
    """Labels of the control task that differ by distance."""
    generator = np.random.default_rng(5)
    return ProbingTask(
        None,
        {split: generator.integers(CLASSES, size=(2, len(e))) for split, e in grid.examples.items()},
    )


@pytest.fixture(scope="module")
def activations(grid: Grid, control: ProbingTask) -> Source:
    """Noise, in which every cell encodes something else: one or the other horizon, or the control task."""
    generator = torch.Generator().manual_seed(1)
    values: dict[str, list[Tensor]] = {}
    for split, examples in grid.examples.items():
        labels = torch.from_numpy(np.concatenate([examples.labels.T, control.labels[split]]))
        values[split] = []
        for b, block in enumerate(BLOCKS):
            shape = len(block.points), len(DISTANCES), len(examples), block.width
            X = torch.randn(shape, generator=generator)
            for number, (_, p, d) in enumerate(cell for cell in CELLS if cell[0] == b):
                encoded = labels[number % 2] if b == 0 else labels[2 + d]
                X[p, d, :, :3] += (2 + number) * torch.nn.functional.one_hot(encoded, CLASSES)[:, :3]
            values[split].append(3 * X + 10)
    return Source(values, grid.examples, BLOCKS)


def make_job(grid: Grid, control: ProbingTask | None, **settings: Any) -> FitJob:
    probe = Config().override({f"probe.{name}": value for name, value in settings.items()}).probe
    quiet = Progress(quiet=True)
    cpu, folder = torch.device("cpu"), Path(tempfile.gettempdir())
    return FitJob(grid, probe, control, 3, cpu, quiet, "test", folder, {1: 40, 3: 38})


def rows_of(scored: list[DocumentSums]) -> dict[tuple[Any, ...], tuple[Facts, dict[str, np.ndarray]]]:
    """Head and sums by document of every row, by solver, hook point, distance and horizon."""
    found = {}
    for part in scored:
        for number, head in enumerate(part.readers):
            key = (head["solver"], (head["location"], head["layer"]), head["position"], head["horizon"])
            assert key not in found
            found[key] = head, {name: sums[:, number] for name, sums in part.sums.items()}
    return found


def fitted_rows(
    activations: Source, job: FitJob
) -> dict[tuple[Any, ...], tuple[Facts, dict[str, np.ndarray]]]:
    solvers = job.settings.solvers
    if CLOSED_FORM.issuperset(solvers):
        found = fit_sums(activations, job, solvers)
    else:
        found = fit(hold(activations, job, [FITTED_ON, CHOSEN_ON]), job, solvers)
    return rows_of(score(activations, job, found))


def alone(activations: Source, cell: tuple[int, int, int], split: str) -> Tensor:
    block, point, distance = cell
    return activations.values[split][block][point, distance][None]


def by_document(grid: Grid, values: np.ndarray) -> np.ndarray:
    """Sums of values of the test examples by document, in the order of first appearance."""
    document = grid.examples[TESTED_ON].document
    return np.array([values[document == number].sum() for number in dict.fromkeys(document.tolist())])


MAKE = {
    "softmax": lambda: SoftmaxProbes((0.01, 0.3)),
    "ridge": lambda: RidgeProbes((0.01, 0.3)),
    "lda": lambda: LDAProbes((0.1, 0.9)),
    "mean-difference": MeanDifferenceProbes,
    "l1": lambda: L1Probes((0.003, 0.03)),
    "mlp": lambda: MLPProbes(6, seed=3),
}
SETTINGS = {"l2": [0.01, 0.3], "l1": [0.003, 0.03], "shrinkage": [0.1, 0.9], "hidden": 6}


@pytest.fixture(scope="module")
def together(activations: Source, grid: Grid, control: ProbingTask) -> dict:
    """Rows of all solvers in one go, with control task and code length."""
    return fitted_rows(activations, make_job(grid, control, solvers=list(MAKE), **SETTINGS))


@pytest.mark.parametrize("solver", MAKE)
def test_every_cell_is_as_if_it_were_fitted_alone(
    solver: str, together: dict, activations: Source, grid: Grid, control: ProbingTask
):
    for cell in CELLS:
        X = {split: alone(activations, cell, split) for split in SPLITS}
        point, distance = BLOCKS[cell[0]].points[cell[1]], DISTANCES[cell[2]]
        asked = {split: torch.from_numpy(labels[cell[2]]) for split, labels in control.labels.items()}
        for h, horizon in enumerate(HORIZONS):
            head, sums = together[solver, point, distance, horizon]
            y = {split: torch.from_numpy(e.labels[:, h].copy()) for split, e in grid.examples.items()}
            probe = MAKE[solver]().fit(X[FITTED_ON], y[FITTED_ON], CLASSES, X[CHOSEN_ON], y[CHOSEN_ON])
            log_p = probe.log_probabilities(X[TESTED_ON])[0]
            nats = -log_p.gather(1, y[TESTED_ON][:, None])[:, 0].double().numpy()
            np.testing.assert_allclose(sums["cross_entropy"], by_document(grid, nats), rtol=2e-3)
            correct = (log_p.argmax(1) == y[TESTED_ON]).numpy()
            assert np.abs(sums["correct"] - by_document(grid, correct)).sum() <= 1
            assert head["validation_cross_entropy"] == pytest.approx(float(probe.validation_loss_), rel=1e-3)
            assert head["fitted_on"] == len(grid.examples[FITTED_ON])
            assert head["seed"] == 3
            assert not head["constant"]

            on_control = MAKE[solver]()
            if isinstance(probe, SoftmaxProbes) and isinstance(on_control, SoftmaxProbes):
                on_control.fit_at(X[FITTED_ON], asked[FITTED_ON], CLASSES, probe.penalty_)
                assert head["l2"] == pytest.approx(probe.penalty_.item())
                assert head["converged"]
                assert head["iterations"] > 0
            elif isinstance(probe, L1Probes):
                on_control = L1Probes([probe.penalty_.item()])
                on_control.fit(X[FITTED_ON], asked[FITTED_ON], CLASSES, X[CHOSEN_ON], asked[CHOSEN_ON])
                assert head["l1"] == pytest.approx(probe.penalty_.item())
                assert head["nonzero"] == probe.nonzero_.item()
            else:
                on_control.fit(X[FITTED_ON], asked[FITTED_ON], CLASSES, X[CHOSEN_ON], asked[CHOSEN_ON])
            hits = (on_control.log_probabilities(X[TESTED_ON])[0].argmax(1) == asked[TESTED_ON]).numpy()
            assert np.abs(sums["control_correct"] - by_document(grid, hits)).sum() <= 1


@pytest.mark.parametrize("sums", [1, 1000], ids=["each probe", "some of a stack"])
def test_sums_of_some_probes_at_a_time_are_those_of_all(
    sums: int, activations: Source, grid: Grid, control: ProbingTask, monkeypatch: pytest.MonkeyPatch
):
    job = make_job(grid, control, solvers=["ridge", "lda"], **SETTINGS)
    whole = fit_sums(activations, job, job.settings.solvers)
    expected = rows_of(score(activations, job, whole))
    monkeypatch.setitem(fitting.SUMS_BYTES, "cpu", sums)
    parts = fit_sums(activations, job, job.settings.solvers)
    assert len(parts) > len(whole)
    found = rows_of(score(activations, job, parts))
    assert found.keys() == expected.keys()
    for key, (head, of_documents) in expected.items():
        assert found[key][0] == {name: pytest.approx(value) for name, value in head.items()}
        for name, values in of_documents.items():
            np.testing.assert_allclose(found[key][1][name], values, rtol=1e-5, atol=1e-6)


def test_each_cell_reads_what_was_written_there(together: dict, grid: Grid):
    """An index that is off by one would move the signal to another cell."""
    for number, (b, p, d) in enumerate(CELLS):
        point, distance = BLOCKS[b].points[p], DISTANCES[d]
        accuracy = [
            together["softmax", point, distance, horizon][1]["correct"].sum() / len(grid.examples[TESTED_ON])
            for horizon in HORIZONS
        ]
        on_control = together["softmax", point, distance, 1][1]["control_correct"].sum()
        if b == 0:
            encoded = number % 2
            assert accuracy[encoded] > accuracy[1 - encoded] + 0.15
            assert on_control < 0.5 * len(grid.examples[TESTED_ON])
        else:
            assert max(accuracy) < 0.5
            assert on_control > 0.5 * len(grid.examples[TESTED_ON])


def test_code_length_is_that_of_the_documents_in_their_order(together: dict, activations: Source, grid: Grid):
    examples = grid.examples[FITTED_ON]
    ends = block_ends(examples.document)
    for cell in CELLS:
        for h, horizon in enumerate(HORIZONS):
            point, distance = BLOCKS[cell[0]].points[cell[1]], DISTANCES[cell[2]]
            head, _ = together["softmax", point, distance, horizon]
            y = torch.from_numpy(examples.labels[:, h].copy())
            X, l2 = alone(activations, cell, FITTED_ON), torch.tensor([head["l2"]], dtype=torch.float64)
            bits = prequential_code(X, y, CLASSES, l2, ends).item()
            assert head["code_length"] == pytest.approx(bits, rel=1e-3)
            prior = prior_code(examples.labels[:, h], CLASSES, ends)
            assert head["compression"] == pytest.approx(prior / bits, rel=1e-3)


@pytest.mark.parametrize("solvers", [["ridge"], ["lda"], ["lda", "ridge"]])
def test_streaming_equals_holding(
    solvers: list[str], together: dict, activations: Source, grid: Grid, control: ProbingTask
):
    """Sums over chunks give the probes that all examples at once give, the control task's too."""
    before = activations.passes
    streamed = fitted_rows(activations, make_job(grid, control, solvers=solvers, **SETTINGS))
    assert activations.passes == before + 3, "a pass for each split feeds every solver and horizon"
    held = {key: row for key, row in together.items() if key[0] in solvers}
    assert set(streamed) == set(held)
    for key, (head, sums) in streamed.items():
        expected_head, expected = held[key]
        assert set(head) == set(expected_head)
        for name in ("l2", "shrinkage"):
            assert head.get(name) == expected_head.get(name)
        assert head["validation_cross_entropy"] == pytest.approx(
            expected_head["validation_cross_entropy"], rel=1e-4
        )
        np.testing.assert_allclose(sums["cross_entropy"], expected["cross_entropy"], rtol=1e-4)
        for name in ("correct", "top5", "control_correct"):
            assert np.abs(sums[name] - expected[name]).sum() <= 1


@pytest.mark.parametrize("solvers", [["softmax"], ["ridge"], ["lda", "softmax"]])
def test_without_control_there_is_no_control(activations: Source, grid: Grid, solvers: list[str]):
    settings = {"solvers": solvers, "code_length": False}
    for head, sums in fitted_rows(activations, make_job(grid, None, **settings)).values():
        assert set(sums) == {"correct", "top5", "cross_entropy", "class_correct"}
        assert "code_length" not in head


@pytest.mark.parametrize("solvers", [["softmax"], ["ridge"]])
def test_constant_activations_are_flagged(
    activations: Source, grid: Grid, control: ProbingTask, solvers: list[str]
):
    values = {split: [block.clone() for block in blocks] for split, blocks in activations.values.items()}
    for blocks in values.values():
        blocks[0][1, 0] = torch.tensor([0.1, -7.3, 1e-4, 1e4, 0.0])
    constant = Source(values, grid.examples, BLOCKS)
    rows = fitted_rows(constant, make_job(grid, control, solvers=solvers, code_length=False))
    for (_, point, distance, _), (head, _) in rows.items():
        assert head["constant"] == ((point, distance) == (("a", 1), 1))


def test_tasks_have_a_label_for_every_probe(grid: Grid, control: ProbingTask):
    first, second = target_tasks(grid)
    assert (first.horizon, second.horizon) == HORIZONS
    cpu = torch.device("cpu")
    shared = second.of(TESTED_ON, slice(2, 6), slice(0, 6), cpu)
    assert shared.tolist() == grid.examples[TESTED_ON].labels[2:6, 1].tolist()
    own = control.of(TESTED_ON, slice(2, 6), slice(1, 5), cpu)
    assert own.shape == (4, 4)  # the last distance of a point, both of the next, the first of a third
    for row, distance in enumerate((1, 0, 1, 0)):
        assert own[row].tolist() == control.labels[TESTED_ON][distance, 2:6].tolist()
