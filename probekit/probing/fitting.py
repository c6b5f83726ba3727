"""Fitting and scoring all cells of a grid for one variant, in batches of probes.

Solvers that need all their examples at once hold those of the two splits they are fitted and chosen on, which
`probe.max_examples` bounds; closed-form solvers alone hold sums. Test examples are scored as they are read.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from probekit import distributed
from probekit.config import Position, ProbeSettings, SolverName
from probekit.data.corpus import Corpus
from probekit.evaluation.action_metrics import prior_log_probabilities
from probekit.probing.activations import Activations, Stack
from probekit.probing.controls import (
    block_ends,
    control_labels,
    control_numbers,
    prequential_code,
    prior_code,
)
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, LENSES, TESTED_ON, Grid
from probekit.probing.logit_lens import LogitLens
from probekit.probing.memory import HeldActivations, HeldSubset
from probekit.probing.results import LINEAR_SOLVERS, Cell, DocumentSums, Facts, row_slices
from probekit.probing.solvers import (
    L1Probes,
    LDAProbes,
    MeanDifferenceProbes,
    MLPProbes,
    Moments,
    RegressionProbes,
    RidgeProbes,
    SoftmaxProbes,
)
from probekit.probing.solvers.closed_form import fit_together
from probekit.probing.targets import Target
from probekit.progress import Meter, Progress

ClosedForm = RidgeProbes | LDAProbes
Classifiers = SoftmaxProbes | L1Probes | MLPProbes | LogitLens | ClosedForm
Probes = Classifiers | RegressionProbes

_SOLVERS: dict[str, Callable[[ProbeSettings, int], Classifiers]] = {
    "softmax": lambda settings, seed: SoftmaxProbes(settings.l2, settings.max_iterations),
    "l1": lambda settings, seed: L1Probes(settings.l1),
    "mlp": lambda settings, seed: MLPProbes(settings.hidden, seed=seed),
    "ridge": lambda settings, seed: RidgeProbes(settings.l2),
    "lda": lambda settings, seed: LDAProbes(settings.shrinkage),
    "mean-difference": lambda settings, seed: MeanDifferenceProbes(),
}
"""New batches of probes by the name of their solver, from settings and a seed."""

CLOSED_FORM: frozenset[SolverName] = frozenset({"ridge", "lda", "mean-difference"})
"""Solvers that need sums over their examples, not the examples."""

ON_PATH: frozenset[SolverName] = frozenset({"softmax", "l1"})
"""Solvers that choose along a path of penalties, and fit the control task at the penalty of the real one."""

SUMS_BYTES = defaultdict(lambda: 1 << 30, cpu=1 << 26)
"""About the sums of probes that are solved together, by device type; what is solved is let go at once."""

FACTS = {"nonzero": "nonzero_", "iterations": "n_iter_", "converged": "converged_"}
"""Columns of the results, and the attributes in which solvers that have such a thing keep it."""


@dataclass(frozen=True)
class ProbingTask:
    """What a batch of probes predicts: the target at a horizon, or the control task.

    Attributes:
        horizon: Horizon of the target; None for the control task.
        labels: By split, `[examples]`, or `[positions, examples]` where they depend on what is read.
        target: Says which vectors labels number; None: labels are themselves what is predicted.
        level: What is subtracted from numbers and vectors, shaped so that it can be.
    """

    horizon: int | None
    labels: Mapping[str, np.ndarray]
    target: Target | None = None
    level: np.ndarray | None = None

    @classmethod
    def control(cls, labels: Mapping[str, np.ndarray], target: Target) -> Self:
        """The control task of labels; of numbers less the mean of those fitted on, which R2 compares with."""
        level = None
        if target.kind != "classes":
            known = labels[FITTED_ON]
            level = target.values(known).mean(axis=known.ndim - 1, keepdims=True, dtype=np.float64)
        return cls(None, labels, target, level)

    def of(self, split: str, rows: slice, probes: slice, device: torch.device) -> Tensor:
        """Labels of some examples `[examples]`, or `[probes, examples]` for some probes of a stack.

        Vectors have a further axis.
        """
        labels = self.labels[split][..., rows]
        values = labels if self.target is None else self.target.values(labels)
        if self.level is not None:
            values = (values - self.level).astype(values.dtype)
        if labels.ndim == 2:
            values = values[np.arange(probes.start, probes.stop) % len(labels)]
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def target_tasks(grid: Grid) -> list[ProbingTask]:
    """The grid's target at every horizon."""
    return [
        ProbingTask(horizon, {split: grid.labels(split, horizon) for split in grid.examples}, grid.target)
        for horizon in grid.horizons
    ]


def control_task(corpus: Corpus, grid: Grid, seed: int) -> ProbingTask:
    """The control task: labels that can only be predicted by memorising tokens; see `control_labels`."""
    known = grid.labels(FITTED_ON, grid.horizons[0])

    def make(positions: np.ndarray) -> np.ndarray:
        if grid.target.kind != "classes":
            return control_numbers(corpus, positions, known, seed)
        prior = np.exp(prior_log_probabilities(known, grid.target.classes))
        return control_labels(corpus, positions, prior, seed)

    labels = {
        split: np.stack([make(examples.last_read(p)) for p in grid.positions])
        for split, examples in grid.examples.items()
    }
    return ProbingTask.control(labels, grid.target)


@dataclass(frozen=True)
class FitJob:
    """What is fitted for one variant.

    Attributes:
        grid: The grid.
        settings: Solvers and penalties.
        control: The control task, or None.
        seed: Seed of what is drawn, and of the solvers that draw.
        device: Where to fit and score.
        progress: Shows the tokens that are read and the probes that are fitted.
        name: What progress calls the job.
        folder: Where activations are held for which memory has no room.
        tokens_read: By position, the median number of tokens that the LM had read there of test examples.
        variant: Whose activations are read.
        meter: Counts the tokens that are read; None where there are none to count.
        lens: The LM's own head; None unless a solver is a lens.
    """

    grid: Grid
    settings: ProbeSettings
    control: ProbingTask | None
    seed: int
    device: torch.device
    progress: Progress
    name: str
    folder: Path
    tokens_read: Mapping[Position, int]
    variant: str = "none"
    meter: Meter | None = None
    lens: LogitLens | None = None

    def read(self, activations: Activations, split: str) -> Iterator[tuple[slice, list[Tensor]]]:
        """Reads this process's share of a split, a chunk at a time; every stack `[probes, chunk, width]`."""
        examples, unit = self.grid.examples[split], activations.unit
        total, name = activations.size(examples), f"{self.name}: read the split {split!r}"
        meter = self.meter if self.meter is not None and unit == "tokens" else Meter(self.progress)
        with self.progress.task(name, total=total, unit=unit) as task, meter.reading(task) as done:
            # Other processes read as many.
            for rows, stacks in activations.chunks(examples, lambda read: done(read * distributed.count())):
                yield rows, [values.flatten(0, 1) for values in stacks]

    def solver(self, name: SolverName, teachers: Sequence[Tensor] = ()) -> Any:
        """A new batch of probes, not fitted; of numbers and vectors ridge regressions.

        Args:
            name: The solver.
            teachers: What a tuned lens learns from.
        """
        target = self.grid.target
        if target.kind != "classes":
            return RegressionProbes(self.settings.l2, target.outputs if target.kind == "vectors" else None)
        if name in LENSES and self.lens is not None:
            return self.lens.tuned(teachers, self.seed) if name == "tuned-lens" else copy.copy(self.lens)
        return _SOLVERS[name](self.settings, self.seed)


@dataclass(frozen=True)
class Fitted:
    """A batch of fitted probes.

    Attributes:
        stack: Number of the stack.
        rows: Which of the stack's probes, of which there is one for each hook point and position, in this
            order.
        solver: How they were fitted.
        horizon: What they predict.
        probes: The probes.
        control: The same for the control task; None where there is none.
        code: Prequential code length in bits per example `[probes]`; None where it was not measured.
        constant: Whether a probe's activations are the same in all examples `[probes]`, bool.
    """

    stack: int
    rows: slice
    solver: SolverName
    horizon: int
    probes: Probes
    control: Probes | None
    code: Tensor | None
    constant: Tensor

    def cells(self, stacks: Sequence[Stack], grid: Grid) -> list[Cell]:
        """The cell of each probe."""
        return [
            Cell(location, layer, position, self.horizon, self.solver)
            for location, layer in stacks[self.stack].points
            for position in grid.positions
        ][self.rows]

    def weights(self, stacks: Sequence[Stack], grid: Grid) -> dict[str, Tensor]:
        """The weights by the names they are saved under, if the probes are linear."""
        weights: dict[str, Tensor] = {}
        if self.solver in LINEAR_SOLVERS and not isinstance(self.probes, LogitLens):
            # float32 would round the level of large numbers, such as dates in seconds.
            kept = torch.float32 if grid.target.kind == "classes" else torch.float64
            rows = zip(self.cells(stacks, grid), self.probes.coef_, self.probes.intercept_, strict=True)
            for cell, coef, intercept in rows:
                # Cloned: a view of a row would keep the whole batch in memory.
                weights[f"{cell.key}|coef"] = coef.detach().float().cpu().clone()
                weights[f"{cell.key}|intercept"] = intercept.detach().to(kept).cpu().clone()
        return weights


def hold(activations: Activations, job: FitJob, splits: Sequence[str]) -> HeldActivations:
    """Reads all activations of some splits, and holds them."""
    grid, memory = job.grid, 1e9 * job.settings.memory
    examples = {split: grid.examples[split] for split in splits}
    held = HeldActivations(activations, examples, len(grid.positions), memory, job.folder, job.device)
    for split in splits:
        for rows, chunk in job.read(activations, split):
            held.write(split, rows, chunk)
    return held


def fit(held: HeldActivations | HeldSubset, job: FitJob, solvers: Sequence[SolverName]) -> list[Fitted]:
    """Fits solvers at all hook points, positions and horizons, to activations of two splits."""
    tasks = target_tasks(job.grid)
    fitted: list[Fitted] = []
    probes = len(job.grid.positions) * sum(len(stack.points) for stack in held.stacks)
    total = len(tasks) * len(solvers) * probes
    with job.progress.task(f"{job.name}: fit {', '.join(solvers)}", total=total, unit="probes") as progress:
        for stack, rows in held.groups():
            fitted += _fit_group(held, job, solvers, tasks, stack, rows, progress.advance)
    return fitted


def _fit_group(
    held: HeldActivations | HeldSubset,
    job: FitJob,
    solvers: Sequence[SolverName],
    tasks: Sequence[ProbingTask],
    stack: int,
    rows: slice,
    done: Callable[[int], None],
) -> list[Fitted]:
    """Fits some probes of a stack, whose activations are let go before those of the next are loaded."""
    X, X_chosen = (held.load(split, stack, rows) for split in (FITTED_ON, CHOSEN_ON))
    constant = torch.stack([(x == x[:1]).all() for x in X])
    teachers = _teachers(held, job, stack, rows) if "tuned-lens" in solvers else []
    fitted = []
    for solver in solvers:
        for task in tasks:
            found = _fit_batch(job, solver, task, X, X_chosen, rows, teachers)
            fitted.append(Fitted(stack, rows, solver, task.horizon or 0, *found, constant))
            done(len(constant))
    return fitted


def _teachers(held: HeldActivations | HeldSubset, job: FitJob, stack: int, rows: slice) -> list[Tensor]:
    """What leaves the last layer where some probes read, at the examples to fit and to choose on."""
    positions, points = len(job.grid.positions), held.stacks[stack].points
    last = max(range(len(points)), key=lambda i: (points[i][1], points[i][0] == "hook_resid_post"))
    own = np.arange(rows.start, rows.stop) % positions
    of_last = slice(last * positions, (last + 1) * positions)
    return [held.load(split, stack, of_last)[own] for split in (FITTED_ON, CHOSEN_ON)]


def _fit_batch(
    job: FitJob,
    solver: SolverName,
    task: ProbingTask,
    X: Tensor,
    X_chosen: Tensor,
    rows: slice,
    teachers: Sequence[Tensor] = (),
) -> tuple[Probes, Probes | None, Tensor | None]:
    """Some probes of a stack, those of the control task, and the code lengths."""
    target, control = job.grid.target, None if solver in LENSES else job.control
    classes = (target.classes,) if target.kind == "classes" else ()

    def labels(of: ProbingTask, split: str) -> Tensor:
        return of.of(split, slice(None), rows, job.device)

    def fitted(of: ProbingTask, *more: Any) -> Any:
        known, asked = labels(of, FITTED_ON), labels(of, CHOSEN_ON)
        return job.solver(solver, teachers).fit(X, known, *classes, X_chosen, asked, *more)

    if solver not in ON_PATH:
        return fitted(task), None if control is None else fitted(control), None
    # The control task has the penalty of the real one: selectivity compares probes of one family.
    probes = fitted(task, None if control is None else labels(control, FITTED_ON))
    if solver == "l1" or not job.settings.code_length:
        return probes, probes.control_, None
    ends, most = block_ends(job.grid.examples[FITTED_ON].document), job.settings.max_iterations
    code = prequential_code(X, labels(task, FITTED_ON), target.classes, probes.penalty_, ends, most)
    return probes, probes.control_, code


def fit_sums(activations: Activations, job: FitJob, solvers: Sequence[SolverName]) -> list[Fitted]:
    """Fits closed-form solvers to sums: one pass over the examples to fit on, one over those to choose on."""
    grid = job.grid
    tasks = [*target_tasks(grid), *([job.control] if job.control else [])]
    parts = [*_parts(activations.stacks, job)]
    solved, constant = _solve(activations, job, tasks, parts, solvers)
    for rows, chunk in job.read(activations, CHOSEN_ON):
        for (_, p, t), probes in solved.items():
            s, some = parts[p]
            probes.observe_validation(chunk[s][some], tasks[t].of(CHOSEN_ON, rows, some, job.device))
    for probes in solved.values():
        probes.choose()
    last = len(grid.horizons)  # the control task, if there is one
    return [
        Fitted(
            s, some, solver, horizon, solved[solver, p, t], solved.get((solver, p, last)), None, constant[p]
        )
        for solver in solvers
        for p, (s, some) in enumerate(parts)
        for t, horizon in enumerate(grid.horizons)
    ]


Part = tuple[int, slice]
"""A stack, and some of its probes, whose sums are let go as soon as they are solved."""

Solved = dict[tuple[SolverName, int, int], ClosedForm | RegressionProbes]
"""Probes of all penalties by solver, part and task."""


def _parts(stacks: Sequence[Stack], job: FitJob) -> Iterator[Part]:
    """Cuts stacks into parts of about `SUMS_BYTES` of sums."""
    grid, most = job.grid, SUMS_BYTES[job.device.type]
    for s, stack in enumerate(stacks):
        probes = len(stack.points) * len(grid.positions)
        size = max(1, most // (8 * stack.width * (stack.width + grid.target.outputs)))
        for first in range(0, probes, size):
            yield s, slice(first, min(first + size, probes))


def _moments(job: FitJob, tasks: int, probes: int, width: int) -> list[Moments]:
    """Sums of a part: of classes one a task, which share mean and scatter; of others one of all tasks."""
    target = job.grid.target
    if target.kind != "classes":
        return [Moments.zeros(probes, width, 1, job.device, numbers=tasks * target.outputs)]
    own = Moments.zeros(probes, width, target.classes, job.device)
    return [own, *(own.relabelled() for _ in range(tasks - 1))]


def _solve(
    activations: Activations,
    job: FitJob,
    tasks: Sequence[ProbingTask],
    parts: Sequence[Part],
    solvers: Sequence[SolverName],
) -> tuple[Solved, list[Tensor]]:
    """Reads the examples to fit on; also says which probes' activations are constant, by part `[probes]`."""
    of_classes, of_vectors = (job.grid.target.kind == kind for kind in ("classes", "vectors"))
    stacks = activations.stacks
    moments = [_moments(job, len(tasks), some.stop - some.start, stacks[s].width) for s, some in parts]
    for rows, chunk in job.read(activations, FITTED_ON):
        for (s, some), sums in zip(parts, moments, strict=True):
            X, labels = chunk[s][some], [task.of(FITTED_ON, rows, some, job.device) for task in tasks]
            if of_classes:
                sums[0].add(X, labels[0])
                for others, y in zip(sums[1:], labels[1:], strict=True):
                    others.add_labels(X, y)
            else:
                columns = [y if of_vectors else y[..., None] for y in labels]
                sums[0].add_numbers(X, torch.cat([y.expand(*X.shape[:2], -1) for y in columns], 2))
    solved: Solved = {}
    constant = []
    for p in range(len(parts)):
        sums = moments.pop(0)
        for t, own in enumerate(sums):
            own.over_processes(labels_alone=t > 0)
        for solver in solvers:
            batches: list[Any] = [job.solver(solver) for _ in tasks]
            if of_classes:
                fit_together(batches, sums)
            else:
                for t, batch in enumerate(batches):
                    batch.fit_moments(sums[0], t)
            solved |= {(solver, p, t): batch for t, batch in enumerate(batches)}
        constant.append(sums[0].scatter.diagonal(dim1=1, dim2=2).sum(1) == 0)
    return solved, constant


def score(activations: Activations, job: FitJob, fitted: Sequence[Fitted]) -> list[DocumentSums]:
    """Scores fitted probes on the test examples as they are read.

    Args:
        activations: Where activations come from.
        job: What is fitted.
        fitted: The probes.

    Returns:
        The scores of every batch, those of the control task among them if there is one.
    """
    grid, stacks = job.grid, activations.stacks
    tested = grid.tested()
    tasks = {task.horizon: task for task in target_tasks(grid)}
    scored, controls = [], []
    for batch in fitted:
        readers = [*_facts(batch, batch.cells(stacks, grid), job)]
        scored.append(DocumentSums(readers, tested))
        controls.append(DocumentSums(readers, tested, control=True))
    for rows, chunk in job.read(activations, TESTED_ON):
        for batch, sums, control_sums in zip(fitted, scored, controls, strict=True):
            X = chunk[batch.stack][batch.rows]
            for probes, task, into in (
                (batch.probes, tasks[batch.horizon], sums),
                (batch.control, job.control, control_sums),
            ):
                if probes is not None and task is not None:
                    for part in row_slices(X.shape[0], X.shape[1], grid.target.outputs):
                        of_part = slice(rows.start + part.start, min(rows.start + part.stop, rows.stop))
                        labels = task.of(TESTED_ON, of_part, batch.rows, job.device)
                        into.add(of_part, predicted(probes, X[:, part]), labels)
    for batch, sums, control_sums in zip(fitted, scored, controls, strict=True):
        sums.over_processes(job.device)
        control_sums.over_processes(job.device)
        if batch.control is not None:
            sums.sums |= {f"control_{score}": values for score, values in control_sums.sums.items()}
    return scored


def predicted(probes: Probes, X: Tensor) -> Tensor:
    """Log-probabilities, or numbers, or vectors."""
    return probes.predict(X) if isinstance(probes, RegressionProbes) else probes.log_probabilities(X)


def _facts(fitted: Fitted, cells: Sequence[Cell], job: FitJob) -> Iterator[Facts]:
    """The cell and the fit of each probe of a batch."""
    columns = {name: getattr(fitted.probes, attribute, None) for name, attribute in FACTS.items()}
    if not isinstance(fitted.probes, MLPProbes | LogitLens):
        columns[fitted.probes.penalty_name] = fitted.probes.penalty_
    grid, examples = job.grid, job.grid.examples[FITTED_ON]
    if fitted.code is not None:
        ends = block_ends(examples.document)
        prior = prior_code(grid.labels(FITTED_ON, fitted.horizon), grid.target.classes, ends)
        columns |= {"code_length": fitted.code, "compression": prior / fitted.code}
    loss = "cross_entropy" if grid.target.kind == "classes" else "squared_error"
    columns |= {f"validation_{loss}": fitted.probes.validation_loss_, "constant": fitted.constant}
    of_all = {"reader": "probe", "variant": job.variant, "seed": job.seed, "fitted_on": len(examples)}
    for i, cell in enumerate(cells):
        known = {name: column[i].item() for name, column in columns.items() if column is not None}
        facts = {"injected": False, "tokens_read": job.tokens_read[cell.position]}
        yield of_all | vars(cell) | facts | known
