"""The optimisation loop of every stage: AdamW, warm-up and cosine, clipping, accumulation, selection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probekit.config import StageSettings
from probekit.errors import ProbekitError
from probekit.progress import Progress

LOGGED_STEPS = 100
"""Rows of training loss that a stage leaves in the metrics."""


@dataclass(frozen=True)
class Group:
    """Parameters that are trained alike; they are clipped together, apart from those of other groups.

    So a planner's large gradient does not shrink the adapter's.

    Attributes:
        parameters: The parameters.
        learning_rate: Their peak learning rate.
        frozen: How long they stay as they are: up to 1 a share of the steps, above 1 a number of steps. Their
            gradients, state and schedule begin after that: warm-up and cosine fill the steps that are left.
    """

    parameters: Sequence[nn.Parameter]
    learning_rate: float
    frozen: float = 0.0

    def frozen_steps(self, steps: int) -> int:
        """For how many of a stage's steps they are frozen."""
        return round(self.frozen * steps if self.frozen <= 1 else self.frozen)


@dataclass(frozen=True)
class Stage:
    """What is optimised.

    Attributes:
        name: Appears in progress and metrics.
        settings: The optimiser's settings.
        groups: The parameters, those that are trained alike together.
        examples: Number of training examples; batches are rows of them.
        loss: Loss of some rows, divided so that the losses of a step's micro-batches add up to the step's
            loss: called with the micro-batch's rows and the whole step's.
        validation_loss: Computes the loss on validation documents.
        observed: What else is logged with a training loss: called with the step's rows, behind the step.
    """

    name: str
    settings: StageSettings
    groups: Sequence[Group]
    examples: int
    loss: Callable[[np.ndarray, np.ndarray], Tensor]
    validation_loss: Callable[[], float]
    observed: Callable[[np.ndarray], dict[str, float]] | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, group by group."""
        return [parameter for group in self.groups for parameter in group.parameters]


def optimise(stage: Stage, seed: int, log: Callable[[dict[str, Any]], None], progress: Progress) -> float:
    """Trains the stage's parameters in place and leaves them in their best state on validation.

    Args:
        stage: What to optimise.
        seed: Seed of the order of examples and of what is random in the forward pass.
        log: Called with rows of metrics.
        progress: Shows steps, rate and time left.

    Returns:
        The best validation loss.

    Raises:
        ProbekitError: The loss is no longer finite.
    """
    torch.manual_seed(seed)
    steps_per_epoch = math.ceil(stage.examples / stage.settings.batch_size)
    steps = max(1, round(stage.settings.epochs * steps_per_epoch))
    optimiser, scheduler = _optimiser(stage, steps)
    batches = _shuffled(stage.examples, stage.settings.batch_size, seed)
    best, best_epoch, best_state = math.inf, 0, _state(stage)
    log_every = max(1, steps // LOGGED_STEPS)
    with progress.task(f"train {stage.name}", total=steps) as task:
        for step in range(1, steps + 1):
            for group in stage.groups:
                for parameter in group.parameters:
                    parameter.requires_grad_(step > group.frozen_steps(steps))
            rows = next(batches)
            loss = _step(stage, rows, optimiser, step)
            scheduler.step()
            if step % log_every == 0 or step == steps:
                observed = stage.observed(rows) if stage.observed else {}
                log({"stage": stage.name, "step": step, "loss": loss} | observed)
            task.advance(note=f"loss {loss:.3f}")
            if step % steps_per_epoch and step != steps:
                continue
            epoch = math.ceil(step / steps_per_epoch)
            validation = _finite(stage, "validation loss", stage.validation_loss(), step)
            log({"stage": stage.name, "step": step, "epoch": epoch, "validation_loss": validation})
            task.advance(0, note=f"loss {loss:.3f}, validation {validation:.3f}")
            if validation < best:
                best, best_epoch, best_state = validation, epoch, _state(stage)
            elif stage.settings.patience and epoch - best_epoch >= stage.settings.patience:
                break
    with torch.no_grad():
        for parameter, value in zip(stage.parameters, best_state, strict=True):
            parameter.copy_(value)
    return best


def _step(stage: Stage, rows: np.ndarray, optimiser: torch.optim.Optimizer, step: int) -> float:
    total = 0.0
    for micro in np.array_split(rows, min(stage.settings.accumulate, len(rows))):
        loss = stage.loss(micro, rows)
        loss.backward()
        total += loss.item()
    _finite(stage, "loss", total, step)
    for group in stage.groups:
        nn.utils.clip_grad_norm_(group.parameters, stage.settings.clip)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return total


def _finite(stage: Stage, what: str, value: float, step: int) -> float:
    if not math.isfinite(value):
        raise ProbekitError(
            f"training of {stage.name}: the {what} is {value} at step {step}; lower the stage's "
            f"learning_rate ({stage.settings.learning_rate:g})"
        )
    return value


def _optimiser(stage: Stage, steps: int) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    parts: list[dict[str, Any]] = []
    schedules = []
    for group in stage.groups:
        matrices = [parameter for parameter in group.parameters if parameter.ndim >= 2]
        others = [parameter for parameter in group.parameters if parameter.ndim < 2]
        for members, decay in ((matrices, stage.settings.weight_decay), (others, 0.0)):
            if members:
                parts.append({"params": members, "lr": group.learning_rate, "weight_decay": decay})
                schedules.append(_schedule(group.frozen_steps(steps), steps, stage.settings.warmup))
    optimiser = torch.optim.AdamW(parts)
    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, schedules)


def _schedule(begin: int, end: int, warmup: float) -> Callable[[int], float]:
    """Share of the peak rate by step: linear warm-up from `begin` on, then half a cosine to zero at `end`."""
    rising = math.ceil(warmup * (end - begin))

    def share_of_peak(step: int) -> float:
        step -= begin
        if step < 0:
            return 0.0
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, end - begin - rising)))

    return share_of_peak


def _state(stage: Stage) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in stage.parameters]


def _shuffled(count: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Rows in batches, without end; every pass is a new order that the seed and the pass's number decide."""
    epoch = 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield from (order[i : i + batch_size] for i in range(0, count, batch_size))
        epoch += 1
