"""What every stage of training needs, and what is done alike in all of them."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn

from probekit import distributed
from probekit.config import Config, StageSettings
from probekit.data.corpus import Corpus
from probekit.data.windows import Windows, chunks, cut_windows
from probekit.distributed import Holding, Stopped, autocast
from probekit.errors import ProbekitError
from probekit.io import read_metadata, read_tensors, write_tensors
from probekit.models.hook_points import gathered, is_shard, sharded_like
from probekit.progress import Progress, Task


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
        keep: Keeps a checkpoint, at the steps that the settings ask for; all processes call it together.
        documents: Document of every example, for the error that names them.
        generators: What the loss draws from beside the global generator.
        sharded: Whether an LM that is sharded over processes takes part.
        checkpoints: How many checkpoints are kept.
        accumulate: Micro-batches in an optimiser step.
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
    sharded: bool = False
    checkpoints: int = 0
    accumulate: int = 1

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, group by group."""
        return [parameter for group in self.groups for parameter in group.parameters]


REMEMBERED = {"step", "exp_avg", "exp_avg_sq"}
"""What AdamW remembers of a parameter."""


@dataclass(frozen=True)
class Standing:
    """Where a stage stands.

    Attributes:
        step: Steps that are done.
        best: The best validation loss so far.
        best_epoch: The pass behind which it was measured.
        divided: Micro-batches in a step, which may have become more where memory was short.
    """

    step: Annotated[int, Field(ge=0)] = 0
    best: float = float("inf")
    best_epoch: Annotated[int, Field(ge=0)] = 0
    divided: Annotated[int, Field(ge=1)] = 1


class StateFile:
    """The file that a stage's state is kept in.

    Args:
        path: The file.
        settings: What decides the stage's result; the state of another training is not gone on from.
        every: Seconds between two writes.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], every: float) -> None:
        self._path, self._every = path, every
        self._settings = json.loads(json.dumps(settings, default=str))
        self._written = time.monotonic()

    @property
    def standing(self) -> Standing:
        """Where the stage stands; at its beginning, where nothing is kept or it is of another training."""
        kept = self._metadata()
        if kept is None or self._difference(kept):
            return Standing()
        with self.restoring():
            return TypeAdapter(Standing).validate_python(json.loads(kept["standing"]))

    @property
    def difference(self) -> str | None:
        """A setting that was another one when the state was kept, and how many steps are lost by it.

        Settings that only one version of probekit knows are none.
        """
        kept = self._metadata()
        return None if kept is None else self._difference(kept)

    def _metadata(self) -> dict[str, str] | None:
        return read_metadata(self._path) if self._path.exists() else None

    def _difference(self, kept: Mapping[str, str]) -> str | None:
        with self.restoring():
            settings: dict[str, Any] = dict(json.loads(kept["settings"]))
        for name in settings.keys() & self._settings.keys():
            if settings[name] != self._settings[name]:
                steps = json.loads(kept["standing"])["step"]
                return (
                    f"{name} was {settings[name]!r} and is now {self._settings[name]!r}, so the {steps:,} "
                    "steps that were done do not count"
                )
        return None

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._written >= self._every

    def write(self, standing: Standing, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the state, in place of an earlier one."""
        write_tensors(
            self._path,
            tensors,
            {"standing": json.dumps(asdict(standing)), "settings": json.dumps(self._settings)},
        )
        self._written = time.monotonic()

    def forget(self) -> None:
        """Removes the state of a stage that is finished."""
        self._path.unlink(missing_ok=True)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Has what does not fit in the block told as the fault of the file.

        Raises:
            ProbekitError: It is the state of something else.
        """
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError):
            raise ProbekitError(
                f"{self._path} is no state of this training; delete it, and the stage begins anew"
            ) from None

    def read(self) -> dict[str, Tensor]:
        """The tensors of the state."""
        return read_tensors(self._path)


def random_state(generators: Iterable[torch.Generator]) -> dict[str, Tensor]:
    """The states of what draws random numbers."""
    states = {"random": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random.cuda"] = torch.cuda.get_rng_state()
    return states | {f"random.{i}": generator.get_state() for i, generator in enumerate(generators)}


def set_random_state(states: Mapping[str, Tensor], generators: Iterable[torch.Generator]) -> None:
    """Puts back what `random_state` took; on another device, that one's draws are others."""
    torch.set_rng_state(states["random"])
    if torch.cuda.is_available() and "random.cuda" in states:
        torch.cuda.set_rng_state(states["random.cuda"])
    for i, generator in enumerate(generators):
        generator.set_state(states[f"random.{i}"])


def check_alike(values: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Refuses tensors of other types and shapes.

    Raises:
        ValueError: Some are.
    """
    for value, other in zip(values, others, strict=True):
        if (value.dtype, value.shape) != (other.dtype, other.shape):
            raise ValueError(f"{value.dtype} {list(value.shape)} is not {other.dtype} {list(other.shape)}")


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of every parameter, by number and name."""
    remembered = optimiser.state_dict()["state"]
    return {
        f"optimiser.{i}.{name}": value for i, values in remembered.items() for name, value in values.items()
    }


def set_optimiser_state(optimiser: torch.optim.Optimizer, states: Mapping[str, Tensor]) -> None:
    """Puts back what `optimiser_state` took.

    Raises:
        ValueError: It was of an optimiser of other parameters.
    """
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    remembered: dict[int, dict[str, Tensor]] = {}
    for key, value in states.items():
        kind, _, rest = key.partition(".")
        if kind == "optimiser":
            number, _, name = rest.partition(".")
            if value.ndim:  # the others are counts of steps
                own = parameters[int(number)]
                check_alike([value], [own])
                value = sharded_like(value, own)
            remembered.setdefault(int(number), {})[name] = value
    if any(values.keys() != REMEMBERED for values in remembered.values()):
        raise ValueError("something is missing")
    optimiser.load_state_dict(optimiser.state_dict() | {"state": remembered})


WARMUP = 0.05
"""Share of the steps in which a learning rate rises linearly; then it falls along a cosine to zero."""

LARGEST_GRADIENT = 1.0
"""The gradient of each group of parameters is scaled down to this norm where it is larger."""

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
        self._standing = Standing(divided=stage.accumulate)
        self._best = _copies(stage)
        self._checkpoints = frozenset(checkpoint_steps(stage.checkpoints, self._steps))
        self._device = stage.parameters[0].device
        torch.manual_seed(seed + distributed.rank())
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
                if distributed.is_first() and (step % log_every == 0 or step == self._steps):
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
                    if distributed.is_first():
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
            nn.utils.clip_grad_norm_(group.parameters, LARGEST_GRADIENT)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return total

    def _gradient(self, rows: np.ndarray) -> float:
        """The loss of this process's share of a step, its gradient left at the parameters.

        It is computed in smaller parts where memory is short.
        """
        own = rows[distributed.rank() :: distributed.count()]
        # With a sharded LM all processes make as many passes, also one that has fewer rows.
        most = math.ceil(len(rows) / distributed.count()) if self._stage.sharded else max(1, len(own))
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
                        f"cannot divide a step alone: raise training.accumulate, which is {parts}"
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
        if distributed.count() == 1:
            return loss
        parameters = [
            parameter
            for parameter in self._stage.parameters
            if parameter.requires_grad and not is_shard(parameter)  # whose gradients are summed already
        ]
        touched = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        touched = touched.to(self._device)
        distributed.add_up([touched])
        for parameter, touches in zip(parameters, touched.tolist(), strict=True):
            if touches:  # one that no process has a gradient for stays as it is
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                distributed.add_up([parameter.grad])
        return distributed.total(loss, self._device)

    def _validated(self, task: Task, loss: float) -> bool:
        """Measures the validation loss and keeps the best state; whether patience has run out."""
        step, stage = self._standing.step, self._stage
        epoch = math.ceil(step / self._epoch_steps)
        validation = stage.validation_loss()
        if not math.isfinite(validation):
            self._refuse("validation loss", validation, step)
        if distributed.is_first():
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
        own = (
            holding.asked is not None,
            distributed.is_first() and self._state is not None and self._state.due,
        )
        asked, due = (bool(distributed.total(wish, self._device)) for wish in own)
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
        if distributed.rank():  # the state is the first process's
            torch.manual_seed(self._seed + distributed.rank() + distributed.count() * self._standing.step)


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
                rates.append(_schedule(group.learning_rate, group.frozen_steps(steps), steps, WARMUP))
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


@dataclass(frozen=True)
class Trainer:
    """What every stage needs.

    Attributes:
        config: All settings.
        corpus: The built corpus.
        device: Where to compute.
        log: Takes rows of metrics.
        progress: Shows the work.
        state: Where the stage's state is kept on the way; None keeps none.
    """

    config: Config
    corpus: Corpus
    device: torch.device
    log: Callable[[dict[str, Any]], None]
    progress: Progress
    state: StateFile | None = None

    def optimise(self, stage: Stage) -> float:
        """Runs a stage; see `loop.optimise`."""
        stage = replace(stage, accumulate=self.config.training.accumulate)
        return optimise(stage, self.config.seed, self.log, self.progress, self.state)

    def windows(self, split: str) -> Windows:
        """The training windows of a split; they do not overlap."""
        window = self.config.training.window
        return cut_windows(self.corpus, self.corpus.documents(split), window, window)

    def mean_loss(self, windows: Windows, batch_size: int, losses: Callable[[Windows], Tensor]) -> float:
        """Mean loss of the scored tokens of windows, a batch at a time, without gradients."""
        batches = chunks(len(windows), batch_size)
        own = distributed.share(batches)
        with torch.no_grad():
            total = sum(losses(windows[rows]).sum().item() for rows in own)
            if self.config.lm.sharded and len(own) < math.ceil(len(batches) / distributed.count()):
                losses(windows[batches[0]])  # others have one more to run, which takes all processes
        return distributed.total(total, self.device) / int(windows.scored.sum())

    def autocast(self) -> Any:
        """The arithmetic of forward passes."""
        # Of a sharded LM no process is to hold all weights, cast ones neither.
        keep_casts = not self.config.lm.sharded
        return autocast(self.device, self.config.training.precision, keep_casts=keep_casts)
