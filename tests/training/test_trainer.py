"""The optimisation loop against loops and schedules written out by hand."""

import itertools
import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from probekit.config import Config, StageSettings
from probekit.distributed import Stopped
from probekit.errors import ProbekitError
from probekit.progress import Progress
from probekit.training import trainer as training
from probekit.training.trainer import LOGGED_STEPS, Group, Stage, StateFile, Trainer, checkpoint_steps

QUIET = Progress(quiet=True)


def optimise(
    stage: Stage,
    seed: int,
    log: Callable[[dict[str, Any]], None],
    state: StateFile | None = None,
    accumulate: int = 1,
) -> float:
    """Trains a stage that needs no corpus."""
    config = Config().override({"seed": seed, "training.accumulate": accumulate})
    corpus: Any = None
    return Trainer(config, corpus, torch.device("cpu"), log, QUIET, state).optimise(stage)


class Toy:
    """Least squares in float64, with a matrix, a vector and a second learning rate."""

    def __init__(
        self, examples: int = 22, settings: StageSettings | None = None, frozen: float = 0.0
    ) -> None:
        draw = torch.Generator().manual_seed(1)
        self.X = torch.randn(examples, 3, dtype=torch.float64, generator=draw)
        self.Y = torch.randn(examples, 2, dtype=torch.float64, generator=draw)
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64, generator=draw))
        self.bias = nn.Parameter(torch.randn(2, dtype=torch.float64, generator=draw))
        self.settings = settings or StageSettings(batch_size=5, epochs=3, learning_rate=0.1)
        self.accumulate = 1
        self.frozen = frozen
        self.steps: list[np.ndarray] = []
        self.micros: list[np.ndarray] = []
        self.log: list[dict[str, Any]] = []

    def loss(self, rows: np.ndarray, step: np.ndarray) -> torch.Tensor:
        if not self.steps or self.steps[-1] is not step:
            self.steps.append(step)
        self.micros.append(rows)
        return ((self.X[rows] @ self.weight + self.bias - self.Y[rows]) ** 2).sum() / len(step)

    @property
    def groups(self) -> list[Group]:
        rate = self.settings.learning_rate
        return [Group([self.weight], rate), Group([self.bias], rate / 4, self.frozen)]

    def train(
        self,
        seed: int = 0,
        loss: Callable[[np.ndarray, np.ndarray], torch.Tensor] | None = None,
        validation_loss: Callable[[], float] | None = None,
    ) -> float:
        stage = Stage(
            "toy",
            self.settings,
            self.groups,
            len(self.X),
            loss or self.loss,
            # The last state is kept where every pass is better than the one before.
            validation_loss or iter(range(0, -1000, -1)).__next__,
        )
        return optimise(stage, seed, self.log.append, accumulate=self.accumulate)


def learning_rates(steps: int, warmup: float) -> Iterator[float]:
    """Linear warm-up to the peak, then half a cosine to zero."""
    rising = math.ceil(warmup * steps)
    for step in range(steps):
        if step < rising:
            yield (step + 1) / rising
        else:
            yield (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2


@pytest.mark.parametrize("frozen", [0, 2, 0.5, 1])
@pytest.mark.parametrize(
    ("settings", "warmup", "clip"),
    [
        (StageSettings(batch_size=5, epochs=3, learning_rate=0.1), 0.0, 1e6),
        (StageSettings(batch_size=5, epochs=3, learning_rate=0.1, weight_decay=0.5), 0.3, 1e6),
        (StageSettings(batch_size=4, epochs=2.5, learning_rate=0.05, weight_decay=0.1), 0.1, 0.7),
        (StageSettings(batch_size=50, epochs=4, learning_rate=0.1), 0.5, 1.0),
    ],
)
def test_the_loop_is_adamw_with_warmup_cosine_and_clipping(
    settings: StageSettings, warmup: float, clip: float, frozen: float, monkeypatch: pytest.MonkeyPatch
):
    """The second group is frozen for some steps, and then has a schedule of its own to the end."""
    monkeypatch.setattr(training, "WARMUP", warmup)
    monkeypatch.setattr(training, "LARGEST_GRADIENT", clip)
    toy, mine = Toy(settings=settings, frozen=frozen), Toy(settings=settings)
    toy.train()
    # Written out: decay on the matrix alone, each clipped by itself and with its own rate.
    optimiser = torch.optim.AdamW(
        [
            {"params": [mine.weight], "weight_decay": settings.weight_decay},
            {"params": [mine.bias], "weight_decay": 0.0},
        ]
    )
    peaks = (settings.learning_rate, settings.learning_rate / 4)
    total = round(settings.epochs * math.ceil(22 / settings.batch_size))
    assert len(toy.steps) == total
    late = {0: 0, 2: 2, 0.5: round(total / 2), 1: total}[frozen]
    first = learning_rates(total, warmup)
    second = itertools.chain([None] * late, learning_rates(total - late, warmup))
    for rows, *shares in zip(toy.steps, first, second, strict=True):
        optimiser.zero_grad()
        ((mine.X[rows] @ mine.weight + mine.bias - mine.Y[rows]) ** 2).sum().div(len(rows)).backward()
        if shares[1] is None:
            mine.bias.grad = None
        for group, peak, share in zip(optimiser.param_groups, peaks, shares, strict=True):
            group["lr"] = (share or 0) * peak
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(min(1.0, clip / (parameter.grad.norm().item() + 1e-6)))
        optimiser.step()
    if late == total:
        assert torch.equal(toy.bias, Toy().bias)
    torch.testing.assert_close(toy.weight, mine.weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(toy.bias, mine.bias, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("accumulate", [2, 3, 5, 50])
def test_micro_batches_make_the_same_steps(accumulate: int):
    whole, parts = Toy(), Toy()
    parts.accumulate = accumulate
    whole.train()
    parts.train()
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.bias, whole.bias, rtol=1e-10, atol=1e-12)
    assert len(parts.steps) == len(whole.steps)
    assert len(parts.micros) > len(whole.micros)
    assert max(map(len, parts.micros)) <= math.ceil(5 / min(accumulate, 5))
    assert [row["loss"] for row in parts.log if "loss" in row] == pytest.approx(
        [row["loss"] for row in whole.log if "loss" in row], rel=1e-12
    )


# Frozen for a while


@pytest.mark.parametrize(
    ("frozen", "steps"), [(0.0, 0), (0.34, 3), (0.5, 5), (1.0, 10), (2.0, 2), (30.0, 30)]
)
def test_up_to_one_it_is_a_share_of_the_steps(frozen: float, steps: int):
    assert Group([], 1.0, frozen).frozen_steps(10) == steps


def test_what_is_frozen_stays_to_the_bit_and_has_no_state(monkeypatch: pytest.MonkeyPatch):
    settings = StageSettings(batch_size=5, epochs=2, learning_rate=0.1, weight_decay=0.5)
    toy = Toy(settings=settings, frozen=4)
    toy.bias.data = toy.bias.data[None]  # a matrix, which decays
    begun, seen = toy.bias.detach().clone(), []
    step = torch.optim.AdamW.step

    def recording(self: torch.optim.AdamW, *arguments: Any, **named: Any) -> Any:
        result = step(self, *arguments, **named)
        seen.append((torch.equal(toy.bias, begun), toy.bias in self.state, toy.weight in self.state))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", recording)
    toy.train()
    assert seen == [(True, False, True)] * 4 + [(False, True, True)] * 6


# Order


@pytest.mark.parametrize(("examples", "batch_size"), [(22, 5), (20, 5), (3, 8), (1, 1)])
def test_every_pass_has_every_example_once_in_a_new_order(examples: int, batch_size: int):
    toy = Toy(examples, StageSettings(batch_size=batch_size, epochs=3))
    toy.train()
    order = np.concatenate(toy.steps).reshape(3, examples)
    assert np.array_equal(np.sort(order), np.tile(np.arange(examples), (3, 1)))
    if examples > 3:
        assert len(np.unique(order, axis=0)) == 3
    assert all(len(rows) <= batch_size for rows in toy.steps)


def test_the_seed_decides_the_order():
    def order(seed: int) -> list[int]:
        toy = Toy()
        toy.train(seed)
        return np.concatenate(toy.steps).tolist()

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_the_seed_decides_what_is_random_in_the_forward_pass():
    def weights(seed: int, before: int) -> torch.Tensor:
        torch.manual_seed(before)
        toy = Toy()

        def noisy(rows: np.ndarray, step: np.ndarray) -> torch.Tensor:
            return toy.loss(rows, step) + (torch.randn(3, 2, dtype=torch.float64) * toy.weight).sum()

        toy.train(seed, loss=noisy)
        return toy.weight.detach()

    assert torch.equal(weights(0, before=5), weights(0, before=6))


# Length


@pytest.mark.parametrize(
    ("epochs", "steps", "validations"), [(0.01, 1, 1), (0.4, 2, 1), (1, 5, 1), (1.4, 7, 2), (3, 15, 3)]
)
def test_passes_may_be_fractions_and_each_ends_in_a_validation(epochs: float, steps: int, validations: int):
    toy = Toy(settings=StageSettings(batch_size=5, epochs=epochs))
    toy.train()
    assert len(toy.steps) == steps
    rows = [row for row in toy.log if "validation_loss" in row]
    assert [row["epoch"] for row in rows] == list(range(1, validations + 1))
    assert rows[-1]["step"] == steps


# Selection


def run_scripted(losses: list[float], patience: int | None = None) -> tuple[Toy, list[torch.Tensor], float]:
    """Trains with given validation losses; also the weights at each validation, and the loss returned."""
    toy = Toy(settings=StageSettings(batch_size=5, epochs=len(losses), learning_rate=0.1, patience=patience))
    script, states = iter(losses), []

    def validation_loss() -> float:
        states.append(toy.weight.detach().clone())
        return next(script)

    best = toy.train(validation_loss=validation_loss)
    return toy, states, best


@pytest.mark.parametrize(
    ("losses", "best"), [([3, 2, 1], 2), ([1, 2, 3], 0), ([3, 1, 2, 5], 1), ([2, 1, 1], 1), ([4, 4], 0)]
)
def test_the_best_pass_is_kept_the_first_among_equals(losses: list[float], best: int):
    toy, states, loss = run_scripted(losses)
    assert loss == losses[best]
    assert torch.equal(toy.weight, states[best])
    assert all(not torch.equal(states[best], state) for i, state in enumerate(states) if i != best)


@pytest.mark.parametrize(
    ("losses", "patience", "passes"),
    [
        ([3, 4, 5, 6, 7], 1, 2),
        ([3, 4, 5, 6, 7], 2, 3),
        ([3, 4, 2, 5, 6, 7], 2, 5),
        ([3, 3, 3, 3], 2, 3),
        ([5, 4, 3, 2], 1, 4),
        ([3, 4, 5, 6, 7], None, 5),
    ],
)
def test_patience_stops_after_passes_without_a_better_one(
    losses: list[float], patience: int | None, passes: int
):
    toy, states, loss = run_scripted(losses, patience)
    assert len(states) == passes
    assert len(toy.steps) == 5 * passes
    assert loss == min(losses[:passes])
    assert torch.equal(toy.weight, states[int(np.argmin(losses[:passes]))])


# What is logged


def test_logged_losses_are_those_of_the_steps():
    toy = Toy(settings=StageSettings(batch_size=22, epochs=3, learning_rate=0.1))
    losses = []

    def loss(rows: np.ndarray, step: np.ndarray) -> torch.Tensor:
        losses.append(toy.loss(rows, step))
        return losses[-1]

    toy.train(loss=loss, validation_loss=iter([9.0, 8.0, 7.0]).__next__)
    assert toy.log == [
        row
        for i, validation in enumerate([9.0, 8.0, 7.0], 1)
        for row in (
            {"stage": "toy", "step": i, "loss": losses[i - 1].item()},
            {"stage": "toy", "step": i, "epoch": i, "validation_loss": validation},
        )
    ]


def test_a_long_stage_logs_about_a_hundred_losses_and_the_last():
    toy = Toy(settings=StageSettings(batch_size=1, epochs=29))
    toy.train()
    steps = [row["step"] for row in toy.log if "loss" in row]
    assert LOGGED_STEPS <= len(steps) <= LOGGED_STEPS * 1.2
    assert steps[-1] == 22 * 29


# Losses that are no numbers


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_and_names_stage_step_and_rate(wrong: float):
    toy = Toy(settings=StageSettings(batch_size=5, epochs=2, learning_rate=0.5))

    def loss(rows: np.ndarray, step: np.ndarray) -> torch.Tensor:
        return toy.loss(rows, step) * (wrong if len(toy.steps) == 7 else 1.0)

    with pytest.raises(ProbekitError, match=rf"toy: the loss is {wrong} at step 7; .*learning_rate \(0.5\)"):
        toy.train(loss=loss)


def test_a_validation_loss_that_is_no_number_stops_too():
    # A last step that leaves the weights infinite would else pass for no training at all.
    toy = Toy(settings=StageSettings(batch_size=22, epochs=2))
    with pytest.raises(ProbekitError, match="toy: the validation loss is nan at step 2"):
        toy.train(validation_loss=iter([1.0, math.nan]).__next__)


# Stopped, and gone on with


class Drawing(Toy):
    """Draws noise in every loss, from the global generator and from one of its own."""

    def __init__(self, settings: StageSettings, frozen: float = 0.0) -> None:
        super().__init__(settings=settings, frozen=frozen)
        self.own = torch.Generator().manual_seed(5)
        self.calls = 0
        self.stop: Callable[[], None] = lambda: None
        self.stop_at = 0

    def loss(self, rows: np.ndarray, step: np.ndarray) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            self.stop()
        noise = torch.randn(2) + torch.randn(2, generator=self.own)
        return super().loss(rows, step) + (noise * self.bias).sum() / len(step)

    def train_with(self, state: StateFile | None) -> float:
        stage = Stage(
            "toy",
            self.settings,
            self.groups,
            len(self.X),
            self.loss,
            lambda: (self.weight.detach() ** 2).sum().item(),
            generators=[self.own],
        )
        return optimise(stage, 0, self.log.append, state)


def state_file(folder: Path, settings: StageSettings, every: float = 0.0) -> StateFile:
    return StateFile(folder / "latest.safetensors", settings.model_dump(), every)


@pytest.mark.parametrize("frozen", [0, 7])
@pytest.mark.parametrize(
    "settings",
    [
        StageSettings(batch_size=5, epochs=3, learning_rate=0.1, weight_decay=0.5),
        StageSettings(batch_size=5, epochs=6, learning_rate=0.5, patience=2),
    ],
)
def test_what_was_killed_goes_on_to_the_same_bits(tmp_path: Path, settings: StageSettings, frozen: float):
    whole = Drawing(settings, frozen)
    best = whole.train_with(None)
    for killed in range(1, whole.calls + 1, 4):
        state = state_file(tmp_path / str(killed), settings)
        parts = Drawing(settings, frozen)
        parts.stop_at, parts.stop = killed, lambda: (_ for _ in ()).throw(RuntimeError("killed"))
        with pytest.raises(RuntimeError, match="killed"):
            parts.train_with(state)
        assert state.state().step == killed - 1
        again = Drawing(settings, frozen)
        assert again.train_with(state) == best
        assert torch.equal(again.weight, whole.weight)
        assert torch.equal(again.bias, whole.bias)
        assert [row for row in parts.log if row["step"] < killed] + again.log == whole.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_behind_the_step_and_the_state_is_kept(tmp_path: Path, number: signal.Signals):
    settings = StageSettings(batch_size=5, epochs=3, learning_rate=0.1)
    whole, parts, again = (Drawing(settings) for _ in range(3))
    whole.train_with(None)
    state = state_file(tmp_path, settings, every=1e9)
    parts.stop_at, parts.stop = 4, lambda: os.kill(os.getpid(), number)
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        parts.train_with(state)
    assert stopped.value.signal == number
    assert signal.getsignal(number) is before
    assert state.state().step == 4
    again.train_with(state)
    assert torch.equal(again.weight, whole.weight)


def test_who_asks_twice_does_not_wait(tmp_path: Path):
    settings = StageSettings(batch_size=5, epochs=3)
    toy, state = Drawing(settings), state_file(tmp_path, settings, every=1e9)
    toy.stop_at, toy.stop = 4, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        toy.train_with(state)
    assert not state.state().step


# Losses that are not finite


def test_a_loss_that_is_no_number_names_its_documents():
    toy = Toy()

    def loss(rows: np.ndarray, step: np.ndarray) -> torch.Tensor:
        return toy.loss(rows, step) * (math.nan if len(toy.steps) == 2 else 1.0)

    documents = np.arange(22) // 2 + 100
    stage = Stage("toy", toy.settings, toy.groups, 22, loss, lambda: 0.0, documents=documents)
    with pytest.raises(ProbekitError, match="the loss is nan at step 2 ") as error:
        optimise(stage, 0, toy.log.append)
    named = sorted({int(documents[row]) for row in toy.steps[1]})
    assert f"(documents {', '.join(map(str, named))} of the corpus)" in str(error.value)


# Checkpoints


@given(count=st.integers(2, 40), steps=st.integers(1, 10_000))
def test_checkpoints_are_from_the_first_step_to_the_last(count: int, steps: int):
    found = checkpoint_steps(count, steps)
    assert found[0] == 0
    assert found[-1] == steps
    assert len(found) <= count
    assert found == sorted(set(found))
    if count > 3:
        assert 1 in found


def test_checkpoints_are_kept_behind_their_steps():
    toy = Toy(settings=StageSettings(batch_size=5, epochs=4))
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(step: int) -> None:
        kept[step] = (len(toy.steps), toy.weight.detach().clone())

    validation_loss = iter(range(0, -9, -1)).__next__
    stage = Stage("toy", toy.settings, toy.groups, 22, toy.loss, validation_loss, keep=keep, checkpoints=4)
    begun = toy.weight.detach().clone()
    optimise(stage, 0, toy.log.append)
    assert [*kept] == [0, 1, 4, 20]
    assert [steps for steps, _ in kept.values()] == [0, 1, 4, 20]
    assert torch.equal(kept[0][1], begun)
    assert torch.equal(kept[20][1], toy.weight)


def test_other_processes_draw_other_numbers_after_a_resume(monkeypatch: pytest.MonkeyPatch):
    """The state is the first process's: its generators would draw the same in all of them."""

    def drawn(rank: int) -> list[float]:
        monkeypatch.setattr(training.distributed, "rank", lambda: rank)
        toy, generators = Toy(), [torch.Generator().manual_seed(7) for _ in range(2)]
        stage = Stage("toy", toy.settings, toy.groups, 22, toy.loss, lambda: 0.0, generators=generators)
        corpus: Any = None
        loop = training._Loop(
            Trainer(Config(), corpus, torch.device("cpu"), toy.log.append, QUIET, None), stage
        )
        loop._restore(loop._tensors())
        return [torch.rand(1, generator=one).item() for one in (torch.default_generator, *generators)]

    first, second, third = drawn(0), drawn(1), drawn(2)
    assert first[1] == first[2] == torch.rand(1, generator=torch.Generator().manual_seed(7)).item()
    assert len({*first[:2], *second, *third}) == 8
