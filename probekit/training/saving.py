"""What a stage leaves: its model, kept on the way and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from probekit import distributed
from probekit.distributed import precision_of
from probekit.run.run import Run
from probekit.run.stages import stage_settings

T = TypeVar("T")


@dataclass(frozen=True)
class Saving(Generic[T]):
    """How a stage's model is kept, on the way and at the end; all processes call this together.

    Attributes:
        run: The run.
        stage: The stage's name.
        save: Writes the model, and what was tuned of its LM, to a run.
        tuned: What was tuned of its LM, on the first process.
    """

    run: Run
    stage: str
    save: Callable[[Run, T, dict[str, Tensor]], None]
    tuned: Callable[[], dict[str, Tensor]] = dict
    begun: float = field(default_factory=time.monotonic)

    def checkpoint(self, model: T, step: int) -> None:
        """Keeps it as it is behind a step."""
        tuned = self.tuned()
        if distributed.is_first():
            facts = {"seconds": round(time.monotonic() - self.begun, 1)} | arithmetic_of(self.run, self.stage)
            with self.run.checkpoint(self.stage, step, facts) as checkpoint:
                self.save(checkpoint, model, tuned)

    def final(self, model: T) -> None:
        """Keeps it as the stage leaves it."""
        tuned = self.tuned()
        if distributed.is_first():
            self.save(self.run, model, tuned)


def arithmetic_of(run: Run, stage: str) -> dict[str, str]:
    """What the arithmetic of a stage's forward passes came to, if it has any."""
    if "training.precision" not in stage_settings(run.config, stage):
        return {}
    return {"precision": precision_of(run.device, run.config.training.precision)}
