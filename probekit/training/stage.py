"""What a stage of training optimises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from probekit.config import StageSettings


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

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters, group by group."""
        return [parameter for group in self.groups for parameter in group.parameters]
