"""The training loop of every stage: AdamW, warm-up and cosine, clipping, selection on validation, resume.

A stage (`Stage`) says what is trained and on which loss; `Trainer` runs it. Its state is written to a file
every few minutes and on Ctrl-C or SIGTERM, and training continues from there to the same bits.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from probekit import distributed
from probekit.config import Config, StageSettings
from probekit.data.corpus import Corpus
from probekit.data.windows import Windows, chunks, cut_windows
from probekit.distributed import Holding, Stopped, autocast
from probekit.errors import ProbekitError
from probekit.io import read_metadata, read_tensors, write_tensors
from probekit.progress import Progress, Task

WARMUP = 0.05
"""Share of the steps in which a learning rate rises linearly; then it falls along a cosine to zero."""

LARGEST_GRADIENT = 1.0
"""The gradient of each group of parameters is scaled down to this norm if it is larger."""

LOGGED_STEPS = 100
"""Rows of training loss that a stage leaves in the metrics."""

SHOWN_DOCUMENTS = 8
"""Documents of a batch that an error names."""


@dataclass(frozen=True)
class Group:
    """Parameters with one learning rate, whose gradient is clipped apart from that of other groups.

    So a planner's large gradient does not shrink the adapter's.

    Attributes:
        parameters: The parameters.
        learning_rate: Their peak learning rate.
        frozen: How long they stay frozen: up to 1 a share of the steps, above 1 a number of steps. Warm-up
            and cosine fill the remaining steps.
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
        groups: The trained parameters.
        examples: Number of training examples; batches are rows of them.
        loss: Loss of some rows, scaled so that the losses of a step's micro-batches add up to the step's
            loss; called with the micro-batch's rows and the whole step's.
        validation_loss: Computes the loss on validation documents.
        observed: What is logged besides the training loss; called with a step's rows after the step.
        keep: Writes a checkpoint after a step, if `checkpoints` asks for it; all processes call it together.
        documents: Document of every example, for the error that names them.
        generators: Random generators of the loss, besides the global one.
        checkpoints: How many checkpoints are kept.
    """

    name: str
    settings: StageSettings
    groups: Sequence[Group]
    examples: int
    loss: Callable[[np.ndarray, np.ndarray], Tensor]
    validation_loss: Callable[[], float]
    observed: Callable[[np.ndarray], dict[str, float]] | None = None
    keep: Callable[[int], None] | None = None
    documents: np.ndarray | None = None
    generators: Sequence[torch.Generator] = ()
    checkpoints: int = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, group by group."""
        return [parameter for group in self.groups for parameter in group.parameters]


@dataclass
class TrainState:
    """How far a stage is: finished steps, the best validation loss, and the epoch that reached it."""

    step: int = 0
    best: float = float("inf")
    best_epoch: int = 0


class StateFile:
    """The file that holds a stage's state while it is trained.

    Args:
        path: The file.
        settings: What decides the stage's result; a state with other settings is ignored.
        every: Seconds between two writes.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], every: float) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings, default=str))
        self._every, self._written = every, time.monotonic()

    def state(self) -> TrainState:
        """How far the stage is; a new state if none is kept or its settings were others."""
        if not self.path.exists() or self.difference:
            return TrainState()
        return TrainState(**json.loads(read_metadata(self.path)["state"]))

    @property
    def difference(self) -> str | None:
        """A setting that has changed since the state was written, and how many steps are lost by that.

        Settings that only one version of probekit has do not count.
        """
        if not self.path.exists():
            return None
        kept = read_metadata(self.path)
        before, now = json.loads(kept["settings"]), self._settings
        for name in before.keys() & now.keys():
            if before[name] != now[name]:
                steps = json.loads(kept["state"])["step"]
                change = f"{name} was {before[name]!r} and is now {now[name]!r}"
                return f"{change}, so {steps:,} finished steps are lost"
        return None

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._written >= self._every

    def write(self, state: TrainState, tensors: Mapping[str, Tensor]) -> None:
        """Writes the state in place of an earlier one."""
        metadata = {"state": json.dumps(asdict(state)), "settings": json.dumps(self._settings)}
        write_tensors(self.path, tensors, metadata)
        self._written = time.monotonic()


@dataclass(frozen=True)
class Trainer:
    """What every stage needs.

    Attributes:
        config: All settings.
        corpus: The built corpus.
        device: Where to compute.
        log: Called with rows of metrics.
        progress: Shows the work.
        state: The file of the stage's state; None keeps no state.
    """

    config: Config
    corpus: Corpus
    device: torch.device
    log: Callable[[dict[str, Any]], None]
    progress: Progress
    state: StateFile | None = None

    def optimise(self, stage: Stage) -> float:
        """Trains the stage's parameters in place and leaves them in their best state on validation.

        Returns:
            The best validation loss.

        Raises:
            ProbekitError: The loss is no longer finite.
            Stopped: A signal asked to stop; the state is kept.
        """
        return _Loop(self, stage).run()

    def windows(self, split: str) -> Windows:
        """The training windows of a split; they do not overlap."""
        window = self.config.training.window
        found = cut_windows(self.corpus, self.corpus.documents(split), window, window)
        if not len(found):
            raise ProbekitError(
                f"the split {split!r} of the corpus holds no document with two tokens, and a stage is "
                "trained on it; give it some by corpus.split_column, or by smaller fractions of the others"
            )
        return found

    def mean_loss(self, windows: Windows, batch_size: int, losses: Callable[[Windows], Tensor]) -> float:
        """Mean loss of the scored tokens of windows, batch by batch, without gradients."""
        own = distributed.share(chunks(len(windows), batch_size))
        with torch.no_grad():
            total = sum(losses(windows[rows]).sum().item() for rows in own)
        return distributed.total(total, self.device) / int(windows.scored.sum())

    def autocast(self) -> Any:
        """The arithmetic of forward passes."""
        return autocast(self.device, self.config.training.precision)


class _Loop:
    """A stage in training."""

    def __init__(self, trainer: Trainer, stage: Stage) -> None:
        self._trainer, self._stage, self._file = trainer, stage, trainer.state
        self._seed, settings = trainer.config.seed, stage.settings
        self._epoch_steps = math.ceil(stage.examples / settings.batch_size)
        self._steps = max(1, round(settings.epochs * self._epoch_steps))
        self._optimiser, self._rates = _optimiser(stage, self._steps)
        self._checkpoints = checkpoint_steps(stage.checkpoints, self._steps)
        self._best = [parameter.detach().clone() for parameter in stage.parameters]
        self._state = self._file.state() if self._file else TrainState()
        torch.manual_seed(self._seed + distributed.rank())
        if self._file and self._state.step:
            self._restore(read_tensors(self._file.path))

    def run(self) -> float:
        """Trains to the end."""
        stage, done = self._stage, self._state.step
        log_every = max(1, self._steps // LOGGED_STEPS)
        batches = _shuffled(stage.examples, stage.settings.batch_size, self._seed, done)
        progress = self._trainer.progress.task(f"train {stage.name}", total=self._steps, done=done)
        with progress as task, Holding.held() as holding:
            if not done:
                self._checkpoint(0)
            for step in range(done + 1, self._steps + 1):
                rows = next(batches)
                loss = self._step(step, rows)
                self._state.step = step
                if distributed.is_first() and (step % log_every == 0 or step == self._steps):
                    observed = stage.observed(rows) if stage.observed else {}
                    self._trainer.log({"stage": stage.name, "step": step, "loss": loss} | observed)
                task.advance(note=f"loss {loss:.3f}")
                epoch_ends = step % self._epoch_steps == 0 or step == self._steps
                impatient = epoch_ends and self._validate(task, loss)
                self._checkpoint(step, last=impatient)
                asked, due = self._asked_to_stop(holding)
                # Once patience has run out no state is written: it would be continued.
                if self._file and distributed.is_first() and not impatient and (due or asked):
                    self._file.write(self._state, self._tensors())
                if asked:
                    raise asked
                if impatient:
                    break
        self._load(self._best)
        return self._state.best

    def _step(self, step: int, rows: np.ndarray) -> float:
        stage = self._stage
        for part, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            part["lr"] = rate(step - 1)
        for group in stage.groups:
            for parameter in group.parameters:
                parameter.requires_grad_(step > group.frozen_steps(self._steps))
        own = rows[distributed.rank() :: distributed.count()]
        total = 0.0
        micro_batches = min(self._trainer.config.training.accumulate, len(own))
        for micro in np.array_split(own, micro_batches) if len(own) else ():
            loss = stage.loss(micro, rows)
            loss.backward()
            total += loss.item()
        if distributed.count() > 1:
            total = self._add_up_gradients(total)
        if not math.isfinite(total):
            self._refuse("loss", total, step, rows)
        for group in stage.groups:
            nn.utils.clip_grad_norm_(group.parameters, LARGEST_GRADIENT)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return total

    def _add_up_gradients(self, loss: float) -> float:
        """Sums gradients over processes, and returns the loss of all."""
        parameters = [parameter for parameter in self._stage.parameters if parameter.requires_grad]
        device = self._trainer.device
        has_gradient = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        has_gradient = has_gradient.to(device)
        distributed.add_up([has_gradient])
        for parameter, processes in zip(parameters, has_gradient.tolist(), strict=True):
            if processes:  # a parameter without a gradient in any process is left alone
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                distributed.add_up([parameter.grad])
        return distributed.total(loss, device)

    def _validate(self, task: Task, loss: float) -> bool:
        """Measures the validation loss and keeps the best parameters; whether patience has run out."""
        state, stage = self._state, self._stage
        epoch = math.ceil(state.step / self._epoch_steps)
        validation = stage.validation_loss()
        if not math.isfinite(validation):
            self._refuse("validation loss", validation, state.step)
        if distributed.is_first():
            row = {"stage": stage.name, "step": state.step, "epoch": epoch, "validation_loss": validation}
            self._trainer.log(row)
        task.advance(0, note=f"loss {loss:.3f}, validation {validation:.3f}")
        if validation < state.best:
            state.best, state.best_epoch = validation, epoch
            self._best = [parameter.detach().clone() for parameter in stage.parameters]
            return False
        patience = stage.settings.patience
        return patience is not None and epoch - state.best_epoch >= patience

    def _refuse(self, what: str, value: float, step: int, rows: np.ndarray | None = None) -> NoReturn:
        stage, where = self._stage, ""
        if rows is not None and stage.documents is not None:
            documents = [str(document) for document in np.unique(stage.documents[rows])]
            more = ["…"] if len(documents) > SHOWN_DOCUMENTS else []
            where = f" (documents {', '.join([*documents[:SHOWN_DOCUMENTS], *more])} of the corpus)"
        kept = self._file.state().step if self._file else 0
        raise ProbekitError(
            f"training of {stage.name}: the {what} is {value} at step {step}{where}; lower the stage's "
            f"learning_rate ({stage.settings.learning_rate:g})"
            + (f"; the state after step {kept} is kept" if kept else "")
        )

    def _asked_to_stop(self, holding: Holding) -> tuple[Stopped | None, bool]:
        """The signal that asked to stop, and whether the state is due: the same in all processes."""
        due = distributed.is_first() and self._file is not None and self._file.due
        asked, due = (
            bool(distributed.total(own, self._trainer.device)) for own in (holding.asked is not None, due)
        )
        return (holding.asked or Stopped(signal.SIGTERM)) if asked else None, due

    def _checkpoint(self, step: int, *, last: bool = False) -> None:
        if self._stage.keep and (step in self._checkpoints or (last and self._checkpoints)):
            self._stage.keep(step)

    @torch.no_grad()
    def _load(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._stage.parameters, values, strict=True):
            parameter.copy_(value)

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors of the state: parameters, best parameters, AdamW's moments, random generators."""
        tensors: dict[str, Tensor] = {"random": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        for i, generator in enumerate(self._stage.generators):
            tensors[f"random.{i}"] = generator.get_state()
        for i, (parameter, best) in enumerate(zip(self._stage.parameters, self._best, strict=True)):
            tensors |= {f"now.{i}": parameter, f"best.{i}": best}
        for i, moments in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{name}": value for name, value in moments.items()}
        return tensors

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continues from the tensors that `_tensors` returned."""
        self._load([tensors[f"now.{i}"] for i in range(len(self._best))])
        self._best = [tensors[f"best.{i}"].to(best) for i, best in enumerate(self._best)]
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimiser."):
                _, number, name = key.split(".")
                moments.setdefault(int(number), {})[name] = value
        self._optimiser.load_state_dict(self._optimiser.state_dict() | {"state": moments})
        torch.set_rng_state(tensors["random"])
        if torch.cuda.is_available() and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])
        for i, generator in enumerate(self._stage.generators):
            generator.set_state(tensors[f"random.{i}"])
        if distributed.rank():  # the state is the first process's
            seed = self._seed + distributed.rank() + distributed.count() * self._state.step
            torch.manual_seed(seed)
            for nth, generator in enumerate(self._stage.generators, 1):
                generator.manual_seed(seed + 1_000_003 * nth)


def checkpoint_steps(count: int, steps: int) -> list[int]:
    """The steps after which checkpoints are kept: 0, and others up to the last, evenly in the logarithm.

    Args:
        count: How many are asked for; there are fewer if two would fall on one step.
        steps: Steps of the stage.
    """
    if not count:
        return []
    return sorted({0, *np.geomspace(steps, 1, count - 1).round().astype(int).tolist()})


def _optimiser(stage: Stage, steps: int) -> tuple[torch.optim.AdamW, list[Callable[[int], float]]]:
    """The optimiser, and the learning rate of each of its groups by the number of finished steps."""
    parts: list[dict[str, Any]] = []
    rates = []
    for group in stage.groups:
        matrices = [parameter for parameter in group.parameters if parameter.ndim >= 2]
        others = [parameter for parameter in group.parameters if parameter.ndim < 2]
        for members, decay in ((matrices, stage.settings.weight_decay), (others, 0.0)):
            if members:
                parts.append({"params": members, "lr": group.learning_rate, "weight_decay": decay})
                rates.append(_schedule(group.learning_rate, group.frozen_steps(steps), steps))
    return torch.optim.AdamW(parts), rates


def _schedule(peak: float, begin: int, end: int) -> Callable[[int], float]:
    """Learning rate by step: linear warm-up from `begin` on, then half a cosine to zero at `end`."""
    rising = math.ceil(WARMUP * (end - begin))

    def rate(step: int) -> float:
        step -= begin
        if step < 0:
            return 0.0
        if step < rising:
            return peak * ((step + 1) / rising)
        return peak * (0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, end - begin - rising))))

    return rate


def _shuffled(count: int, batch_size: int, seed: int, done: int) -> Iterator[np.ndarray]:
    """Rows in batches after those that are done, without end; seed and epoch decide the order of an epoch."""
    epoch, passed = divmod(done, math.ceil(count / batch_size))
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(count)
        yield from (order[i : i + batch_size] for i in range(passed * batch_size, count, batch_size))
        epoch, passed = epoch + 1, 0
