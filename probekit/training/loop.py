"""The optimisation loop of every stage: AdamW, warm-up and cosine, clipping, accumulation, selection."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from probekit import processes
from probekit.errors import ProbekitError
from probekit.models.sharded import gathered, is_shard, sharded_like
from probekit.progress import Progress, Task
from probekit.stopping import Holding, Stopped
from probekit.training.stage import Stage
from probekit.training.state import (
    Standing,
    StateFile,
    check_alike,
    optimiser_state,
    random_state,
    set_optimiser_state,
    set_random_state,
)

LOGGED_STEPS = 100
"""Rows of training loss that a stage leaves in the metrics."""

SHOWN_DOCUMENTS = 8
"""Documents of a batch that an error names."""


def optimise(
    stage: Stage,
    seed: int,
    log: Callable[[dict[str, Any]], None],
    progress: Progress,
    state: StateFile | None = None,
) -> float:
    """Trains the stage's parameters in place and leaves them in their best state on validation.

    Args:
        stage: What to optimise.
        seed: Seed of the order of examples and of what is random in the forward pass.
        log: Called with rows of metrics.
        progress: Shows steps, rate and time left.
        state: Where the stage's state is kept; where there is one, training goes on from it.

    Returns:
        The best validation loss.

    Raises:
        ProbekitError: The loss is no longer finite, or the memory does not suffice for a single example.
        Stopped: A signal asked to stop; the state is kept.
    """
    return _Loop(stage, seed, log, progress, state).run()


class _Loop:
    """A stage in training."""

    def __init__(
        self,
        stage: Stage,
        seed: int,
        log: Callable[[dict[str, Any]], None],
        progress: Progress,
        state: StateFile | None,
    ) -> None:
        settings = stage.settings
        self._stage, self._seed, self._log, self._progress, self._state = stage, seed, log, progress, state
        self._epoch_steps = math.ceil(stage.examples / settings.batch_size)
        self._steps = max(1, round(settings.epochs * self._epoch_steps))
        self._optimiser, self._rates = _optimiser(stage, self._steps)
        self._standing = Standing(divided=settings.accumulate)
        self._best = _copies(stage)
        self._checkpoints = frozenset(checkpoint_steps(settings.checkpoints, self._steps))
        self._device = stage.parameters[0].device
        torch.manual_seed(seed + processes.rank())
        if state is not None and (standing := state.standing).step:
            self._standing = standing
            kept = state.read()
            with state.restoring():
                self._restore(kept)

    def run(self) -> float:
        """Trains to the end."""
        begun, name = self._standing.step, self._stage.name
        log_every = max(1, self._steps // LOGGED_STEPS)
        batches = _shuffled(self._stage.examples, self._stage.settings.batch_size, self._seed, begun)
        with (
            self._progress.task(f"train {name}", total=self._steps, done=begun) as task,
            Holding.held() as holding,
        ):
            if not begun:
                self._checkpoint(0)
            for step in range(begun + 1, self._steps + 1):
                rows = next(batches)
                loss = self._step(step, rows)
                self._standing = replace(self._standing, step=step)
                if processes.is_first() and (step % log_every == 0 or step == self._steps):
                    observed = self._stage.observed(rows) if self._stage.observed else {}
                    self._log({"stage": name, "step": step, "loss": loss} | observed)
                task.advance(note=f"loss {loss:.3f}")
                ends = step % self._epoch_steps == 0 or step == self._steps
                over = ends and self._validated(task, loss)
                self._checkpoint(step, last=over)
                asked, due = self._wishes(holding)
                # Patience that has run out is not part of a state: it would be gone on with.
                if self._state and not over and (due or asked):
                    kept = self._kept()
                    if processes.is_first():
                        self._state.write(self._standing, kept)
                if asked:
                    raise asked
                if over:
                    break
        _copy_back(self._stage, self._best)
        return self._standing.best

    def _step(self, step: int, rows: np.ndarray) -> float:
        for part, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            part["lr"] = rate(step - 1)
        for group in self._stage.groups:
            for parameter in group.parameters:
                parameter.requires_grad_(step > group.frozen_steps(self._steps))
        total = self._summed(self._gradient(rows))
        if not math.isfinite(total):
            self._refuse("loss", total, step, rows)
        for group in self._stage.groups:
            nn.utils.clip_grad_norm_(group.parameters, self._stage.settings.clip)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return total

    def _gradient(self, rows: np.ndarray) -> float:
        """The loss of this process's share of a step, its gradient left at the parameters.

        It is computed in smaller parts where memory is short.
        """
        own = rows[processes.rank() :: processes.count()]
        # With a sharded LM all processes make as many passes, also one that has fewer rows.
        most = math.ceil(len(rows) / processes.count()) if self._stage.sharded else max(1, len(own))
        while True:
            parts = min(self._standing.divided, most)
            try:
                total = 0.0
                for micro in np.array_split(own, parts):
                    if not len(micro) and not self._stage.sharded:
                        continue
                    loss = self._stage.loss(micro if len(micro) else rows[:1], rows) * bool(len(micro))
                    loss.backward()
                    total += loss.item()
                return total
            except torch.OutOfMemoryError:
                if parts == most:
                    raise ProbekitError(
                        f"training of {self._stage.name}: the memory of the device does not suffice for one "
                        "example at a time; lower training.window, or take a smaller LM"
                    ) from None
                if self._stage.sharded:
                    raise ProbekitError(
                        f"training of {self._stage.name}: out of memory; processes that share a sharded LM "
                        f"cannot divide a step alone: raise the stage's accumulate, which is {parts}"
                    ) from None
            # Behind the handler, whose error holds on to what the failed pass had allocated.
            self._optimiser.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            self._standing = replace(self._standing, divided=2 * parts)
            self._progress.say(
                f"{self._stage.name}: out of memory; from here on every step is cut into {2 * parts} parts"
            )

    def _summed(self, loss: float) -> float:
        """The loss of all processes, gradients summed over them."""
        if processes.count() == 1:
            return loss
        parameters = [
            parameter
            for parameter in self._stage.parameters
            if parameter.requires_grad and not is_shard(parameter)  # whose gradients are summed already
        ]
        touched = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        touched = touched.to(self._device)
        processes.add_up([touched])
        for parameter, touches in zip(parameters, touched.tolist(), strict=True):
            if touches:  # one that no process has a gradient for stays as it is
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                processes.add_up([parameter.grad])
        return processes.total(loss, self._device)

    def _validated(self, task: Task, loss: float) -> bool:
        """Measures the validation loss and keeps the best state; whether patience has run out."""
        step, stage = self._standing.step, self._stage
        epoch = math.ceil(step / self._epoch_steps)
        validation = stage.validation_loss()
        if not math.isfinite(validation):
            self._refuse("validation loss", validation, step)
        if processes.is_first():
            self._log({"stage": stage.name, "step": step, "epoch": epoch, "validation_loss": validation})
        task.advance(0, note=f"loss {loss:.3f}, validation {validation:.3f}")
        if validation < self._standing.best:
            self._standing = replace(self._standing, best=validation, best_epoch=epoch)
            self._best = _copies(stage)
            return False
        patience = stage.settings.patience
        return patience is not None and epoch - self._standing.best_epoch >= patience

    def _refuse(self, what: str, value: float, step: int, rows: np.ndarray | None = None) -> NoReturn:
        stage, where = self._stage, ""
        if rows is not None and stage.documents is not None:
            read = [str(document) for document in np.unique(stage.documents[rows])]
            shown = [*read[:SHOWN_DOCUMENTS], *(["…"] if len(read) > SHOWN_DOCUMENTS else [])]
            where = f" (documents {', '.join(shown)} of the corpus)"
        kept = self._state.standing.step if self._state is not None else 0
        raise ProbekitError(
            f"training of {stage.name}: the {what} is {value} at step {step}{where}; lower the stage's "
            f"learning_rate ({stage.settings.learning_rate:g})"
            + (f"; the state behind step {kept} is kept" if kept else "")
        )

    def _wishes(self, holding: Holding) -> tuple[Stopped | None, bool]:
        """Whether to stop, and whether the state is due; all processes do either behind the same step."""
        own = holding.asked is not None, processes.is_first() and self._state is not None and self._state.due
        asked, due = (bool(processes.total(wish, self._device)) for wish in own)
        return (holding.asked or Stopped(signal.SIGTERM)) if asked else None, due

    def _checkpoint(self, step: int, *, last: bool = False) -> None:
        wanted = step in self._checkpoints or (last and bool(self._checkpoints))
        if self._stage.keep and wanted:
            self._stage.keep(step)

    def _kept(self) -> dict[str, Tensor]:
        """All that training goes on from, on the first process; all call this together."""
        now = {f"now.{i}": parameter for i, parameter in enumerate(self._stage.parameters)}
        best = {f"best.{i}": value for i, value in enumerate(self._best)}
        drawn = random_state(self._stage.generators)
        return gathered(now | best | drawn | optimiser_state(self._optimiser))

    def _restore(self, kept: dict[str, Tensor]) -> None:
        count = range(len(self._best))
        now, best = ([kept[f"{name}.{i}"] for i in count] for name in ("now", "best"))
        for values in (now, best):
            check_alike(values, self._best)
        _copy_back(self._stage, now)
        self._best = [sharded_like(value, own).to(own) for value, own in zip(best, self._best, strict=True)]
        set_optimiser_state(self._optimiser, kept)
        set_random_state(kept, self._stage.generators)
        if processes.rank():  # the state is the first process's
            torch.manual_seed(self._seed + processes.rank() + processes.count() * self._standing.step)


def checkpoint_steps(count: int, steps: int) -> list[int]:
    """The steps behind which checkpoints are kept: 0, and others up to the last, even in their logarithm.

    Args:
        count: How many are asked for; fewer where two would fall on one step.
        steps: Steps of the stage.
    """
    if not count:
        return []
    return sorted({0, *np.geomspace(steps, 1, count - 1).round().astype(int).tolist()})


def _optimiser(stage: Stage, steps: int) -> tuple[torch.optim.AdamW, list[Callable[[int], float]]]:
    """The optimiser, and for each of its groups the learning rate by the number of steps that are done."""
    parts: list[dict[str, Any]] = []
    rates = []
    for group in stage.groups:
        matrices = [parameter for parameter in group.parameters if parameter.ndim >= 2]
        others = [parameter for parameter in group.parameters if parameter.ndim < 2]
        for members, decay in ((matrices, stage.settings.weight_decay), (others, 0.0)):
            if members:
                parts.append({"params": members, "lr": group.learning_rate, "weight_decay": decay})
                rates.append(
                    _schedule(group.learning_rate, group.frozen_steps(steps), steps, stage.settings.warmup)
                )
    return torch.optim.AdamW(parts), rates


def _schedule(peak: float, begin: int, end: int, warmup: float) -> Callable[[int], float]:
    """Learning rate by step: linear warm-up from `begin` on, then half a cosine to zero at `end`."""
    rising = math.ceil(warmup * (end - begin))

    def rate(step: int) -> float:
        step -= begin
        if step < 0:
            return 0.0
        if step < rising:
            return peak * ((step + 1) / rising)
        return peak * (0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, end - begin - rising))))

    return rate


def _copies(stage: Stage) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in stage.parameters]


@torch.no_grad()
def _copy_back(stage: Stage, values: Sequence[Tensor]) -> None:
    for parameter, value in zip(stage.parameters, values, strict=True):
        parameter.copy_(sharded_like(value, parameter))


def _shuffled(count: int, batch_size: int, seed: int, done: int) -> Iterator[np.ndarray]:
    """Rows in batches behind those that are done, without end.

    Every pass is a new order, which the seed and the pass's number decide.
    """
    epoch, passed = divmod(done, math.ceil(count / batch_size))
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield from (order[i : i + batch_size] for i in range(passed * batch_size, count, batch_size))
        epoch, passed = epoch + 1, 0
