"""Fitting and scoring the probes of one variant: activations stream in, sums by document come out.

Solvers that need all their examples at once hold those of the splits they are fitted and chosen on, which
`probe.max_examples` bounds. Closed-form solvers hold sufficient statistics alone. Test examples are scored as
they stream by, and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probekit import distributed
from probekit.config import ProbeSettings, SolverName
from probekit.data.corpus import Corpus
from probekit.evaluation.action_metrics import prior_log_probabilities
from probekit.probing.activations import Activations, Stack
from probekit.probing.controls import block_ends, control_labels, prequential_code, prior_code
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON, Grid
from probekit.probing.results import Row, Tally, row_slices
from probekit.probing.solvers import LDAProbes, MLPProbes, Moments, RidgeProbes, SoftmaxProbes
from probekit.progress import Progress

ClosedForm = RidgeProbes | LDAProbes
Probes = SoftmaxProbes | MLPProbes | ClosedForm

CLOSED_FORM: frozenset[SolverName] = frozenset({"ridge", "lda"})
"""Solvers that need sums over their examples, and not the examples."""


@dataclass(frozen=True)
class Question:
    """What a batch of probes is asked.

    Attributes:
        horizon: Of the target; None for the control task.
        labels: By split, `[examples]`, or `[distances, examples]` where they depend on what is read.
    """

    horizon: int | None
    labels: Mapping[str, np.ndarray]

    def asked(self, split: str, rows: slice, places: int, device: torch.device) -> Tensor:
        """Labels of some examples for all probes of a block, `[examples]` or `[probes, examples]`."""
        labels = torch.from_numpy(np.ascontiguousarray(self.labels[split][..., rows])).to(device)
        return labels if labels.ndim == 1 else labels.repeat(places, 1)


def target_questions(grid: Grid) -> list[Question]:
    """The grid's target at every horizon."""
    return [
        Question(horizon, {split: grid.labels(split, horizon) for split in grid.examples})
        for horizon in grid.horizons
    ]


def control_question(corpus: Corpus, grid: Grid, seed: int) -> Question:
    """The control task: labels that only memory of tokens can tell (Hewitt and Liang 2019)."""
    prior = np.exp(prior_log_probabilities(grid.labels(FITTED_ON, grid.horizons[0]), grid.target.classes))
    return Question(
        None,
        {
            split: np.stack(
                [control_labels(corpus, grid.positions(split, d), prior, seed) for d in grid.distances]
            )
            for split in grid.examples
        },
    )


@dataclass(frozen=True)
class Fitted:
    """A batch of fitted probes: all places of a block at all distances, in this order.

    Attributes:
        block: The places' block, by number.
        solver: How they were fitted.
        horizon: What they read.
        probes: The probes.
        control: The same for the control task; None where there is none.
        code: Prequential code length in bits per example `[probes]`; None where it was not measured.
        constant: Whether a probe's activations are the same in all examples `[probes]`, bool.
    """

    block: int
    solver: SolverName
    horizon: int
    probes: Probes
    control: Probes | None
    code: Tensor | None
    constant: Tensor


@dataclass(frozen=True)
class Work:
    """What is to be done for one variant.

    Attributes:
        grid: The grid.
        settings: Solvers and penalties.
        control: The control task, or None.
        seed: Of the solvers that need one.
        device: Where to fit and score.
        progress: Told of every example that is read, and of every probe that is fitted.
        name: What the work is called there.
    """

    grid: Grid
    settings: ProbeSettings
    control: Question | None
    seed: int
    device: torch.device
    progress: Progress
    name: str

    def read(self, activations: Activations, split: str) -> Iterator[tuple[slice, list[Tensor]]]:
        """This process's share of the activations of a split, a chunk at a time."""
        examples = self.grid.examples[split]
        with self.progress.task(f"{self.name}: read the split {split!r}", total=len(examples)) as task:
            for rows, blocks in activations.chunks(examples):
                yield rows, blocks
                task.advance((rows.stop - rows.start) * distributed.count())  # others read as many


def fit(activations: Activations, work: Work) -> list[Fitted]:
    """Fits every solver of the settings at all places, distances and horizons."""
    if CLOSED_FORM.issuperset(work.settings.solvers):
        return _fit_sums(activations, work)
    return _fit_examples(activations, work)


def _fit_examples(activations: Activations, work: Work) -> list[Fitted]:
    """Holds the examples of two splits, for solvers that need them all at once."""
    held = {split: _held(activations, work, split) for split in (FITTED_ON, CHOSEN_ON)}
    questions, solvers = target_questions(work.grid), work.settings.solvers
    probes = (
        len(questions) * len(solvers) * sum(values.shape[0] * values.shape[1] for values in held[FITTED_ON])
    )
    fitted = []
    with work.progress.task(f"{work.name}: fit probes", total=probes) as task:
        for number, block in enumerate(activations.stacks):
            X = {split: values[number].flatten(0, 1) for split, values in held.items()}
            constant = torch.stack([(probe == probe[:1]).all() for probe in X[FITTED_ON]])
            for solver in solvers:
                for question in questions:
                    fitted.append(_fit_batch(work, solver, question, X, number, len(block.points), constant))
                    task.advance(len(constant))
    return fitted


def _fit_batch(
    work: Work,
    solver: SolverName,
    question: Question,
    X: Mapping[str, Tensor],
    block: int,
    places: int,
    constant: Tensor,
) -> Fitted:
    """Fits the probes of a block, and those of the control task beside them."""

    def asked(question: Question) -> list[Tensor]:
        return [question.asked(split, slice(None), places, work.device) for split in X]

    settings, classes = work.settings, work.grid.target.classes
    y, y_chosen = asked(question)
    probes = _solver(solver, work).fit(X[FITTED_ON], y, classes, X[CHOSEN_ON], y_chosen)
    control = code = None
    if work.control is not None:
        control = _solver(solver, work)
        y_control, y_control_chosen = asked(work.control)
        if isinstance(probes, SoftmaxProbes) and isinstance(control, SoftmaxProbes):
            # With the penalty of the real task: selectivity is about one and the same family of probes.
            control.fit_at(X[FITTED_ON], y_control, classes, probes.l2_)
        else:
            control.fit(X[FITTED_ON], y_control, classes, X[CHOSEN_ON], y_control_chosen)
    if settings.code_length and isinstance(probes, SoftmaxProbes):
        ends = block_ends(work.grid.examples[FITTED_ON].document)
        code = prequential_code(X[FITTED_ON], y, classes, probes.l2_, ends, settings.max_iterations).total
    return Fitted(block, solver, question.horizon or 0, probes, control, code, constant)


def _fit_sums(activations: Activations, work: Work) -> list[Fitted]:
    """One pass over the examples to fit on, one over those to choose on; none are held."""
    grid, device = work.grid, work.device
    questions = [*target_questions(grid), *([work.control] if work.control else [])]
    places = [len(block.points) for block in activations.stacks]
    moments: dict[tuple[int, int], Moments] = {}
    for b, block in enumerate(activations.stacks):
        shape = places[b] * len(grid.distances), block.width, grid.target.classes
        moments[b, 0] = Moments.zeros(*shape, device)
        moments |= {(b, q): moments[b, 0].relabelled() for q in range(1, len(questions))}
    for rows, blocks in work.read(activations, FITTED_ON):
        for (b, q), sums in moments.items():
            add = sums.add_labels if q else sums.add
            add(blocks[b].flatten(0, 1), questions[q].asked(FITTED_ON, rows, places[b], device))
    for (_, q), sums in moments.items():
        sums.over_processes(labels_alone=q > 0)
    solved: dict[tuple[SolverName, int, int], ClosedForm] = {
        (solver, *key): _closed_form(solver, work.settings).fit_moments(sums)
        for key, sums in moments.items()
        for solver in work.settings.solvers
    }
    for rows, blocks in work.read(activations, CHOSEN_ON):
        for (_, b, q), probes in solved.items():
            y = questions[q].asked(CHOSEN_ON, rows, places[b], device)
            probes.observe_validation(blocks[b].flatten(0, 1), y)
    for probes in solved.values():
        probes.choose()
    last = len(questions) - 1
    return [
        Fitted(
            b,
            solver,
            horizon,
            solved[solver, b, q],
            solved[solver, b, last] if work.control else None,
            None,
            moments[b, q].scatter.diagonal(dim1=1, dim2=2).sum(1) == 0,
        )
        for solver in work.settings.solvers
        for b in range(len(places))
        for q, horizon in enumerate(grid.horizons)
    ]


def score(activations: Activations, work: Work, fitted: Sequence[Fitted], head: Row) -> list[Tally]:
    """Scores fitted probes on the test examples, as they stream by.

    Args:
        activations: Where activations come from.
        work: What is to be done.
        fitted: The probes.
        head: What every row of results begins with.
    """
    grid = work.grid
    number = document_numbers(grid.examples[TESTED_ON].document)
    documents = int(number.max()) + 1
    tallies = [
        Tally(_heads(batch, activations.stacks[batch.block], grid, head), documents) for batch in fitted
    ]
    controls = [Tally(tally.heads, documents, ["correct"]) for tally in tallies]
    asked = {question.horizon: question for question in target_questions(grid)}
    for rows, blocks in work.read(activations, TESTED_ON):
        for batch, tally, on_control in zip(fitted, tallies, controls, strict=True):
            X, places = blocks[batch.block].flatten(0, 1), len(activations.stacks[batch.block].points)
            tasks = [(batch.probes, asked[batch.horizon], tally), (batch.control, work.control, on_control)]
            for probes, question, into in tasks:
                if probes is not None and question is not None:
                    labels = question.asked(TESTED_ON, rows, places, work.device)
                    _add(into, probes, X, number[rows], labels, grid.target.classes)
    for tally in (*tallies, *controls):
        tally.over_processes(work.device)
    for batch, tally, on_control in zip(fitted, tallies, controls, strict=True):
        if batch.control is not None:
            tally.sums["control_correct"] = on_control.sums["correct"]
    return tallies


def _add(tally: Tally, probes: Probes, X: Tensor, document: np.ndarray, labels: Tensor, classes: int) -> None:
    for part in row_slices(X.shape[0], X.shape[1], classes):
        log_probabilities = probes.log_probabilities(X[:, part])
        tally.add(document[part], log_probabilities, labels[..., part])


def document_numbers(document: np.ndarray) -> np.ndarray:
    """The documents of examples `[examples]`, numbered from 0 in the order in which they appear."""
    return np.cumsum(np.diff(document, prepend=document[:1]) != 0)


def _heads(fitted: Fitted, block: Stack, grid: Grid, head: Row) -> list[Row]:
    """The beginnings of the rows of a batch of probes, with what is known of the fits."""
    cells = [(place, distance) for place in block.points for distance in grid.distances]
    columns = {name: getattr(fitted.probes, attribute, None) for name, attribute in FACTS.items()}
    if fitted.code is not None:
        ends = block_ends(grid.examples[FITTED_ON].document)
        prior = prior_code(grid.labels(FITTED_ON, fitted.horizon), grid.target.classes, ends)
        columns |= {"code_length": fitted.code, "compression": prior / fitted.code}
    rows = []
    for i, ((location, layer), distance) in enumerate(cells):
        row = head | {"solver": fitted.solver, "location": location, "layer": layer, "distance": distance}
        row |= {"horizon": fitted.horizon, "fitted_on": len(grid.examples[FITTED_ON])}
        row |= {name: column[i].item() for name, column in columns.items() if column is not None}
        losses = fitted.probes.validation_cross_entropy_[i]
        row |= {"validation_cross_entropy": float(losses.min()), "constant": bool(fitted.constant[i])}
        rows.append(row)
    return rows


FACTS = {"l2": "l2_", "shrinkage": "shrinkage_", "iterations": "n_iter_", "converged": "converged_"}
"""Columns of the results, and where solvers that have such a thing keep it."""


def _solver(name: SolverName, work: Work) -> Probes:
    settings = work.settings
    if name in CLOSED_FORM:
        return _closed_form(name, settings)
    if name == "mlp":
        return MLPProbes(settings.hidden, seed=work.seed)
    return SoftmaxProbes(settings.l2, settings.max_iterations)


def _closed_form(name: SolverName, settings: ProbeSettings) -> ClosedForm:
    return RidgeProbes(settings.l2) if name == "ridge" else LDAProbes(settings.shrinkage)


def _held(activations: Activations, work: Work, split: str) -> list[Tensor]:
    """All activations of a split, for every block `[places, distances, examples, width]`."""
    examples, distances = len(work.grid.examples[split]), len(work.grid.distances)
    held = [
        torch.zeros(len(block.points), distances, examples, block.width, device=work.device)
        for block in activations.stacks
    ]
    for rows, blocks in work.read(activations, split):
        for whole, part in zip(held, blocks, strict=True):
            whole[:, :, rows] = part
    distributed.add_up(held)  # what another process has read is zero here
    return held
