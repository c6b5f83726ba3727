"""What every stage of training needs, and what is done alike in all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probekit import processes
from probekit.config import Config
from probekit.corpus.examples import Windows, chunks, cut_windows
from probekit.corpus.store import Corpus
from probekit.devices import autocast
from probekit.progress import Progress
from probekit.training.loop import optimise
from probekit.training.stage import Stage
from probekit.training.state import StateFile


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
        return optimise(stage, self.config.seed, self.log, self.progress, self.state)

    def windows(self, split: str) -> Windows:
        """The training windows of a split; they do not overlap."""
        window = self.config.training.window
        return cut_windows(self.corpus, self.corpus.documents(split), window, window)

    def mean_loss(self, windows: Windows, batch_size: int, losses: Callable[[Windows], Tensor]) -> float:
        """Mean loss of the scored tokens of windows, a batch at a time, without gradients."""
        batches = chunks(len(windows), batch_size)
        own = processes.share(batches)
        with torch.no_grad():
            total = sum(losses(windows[rows]).sum().item() for rows in own)
            if self.config.lm.sharded and len(own) < math.ceil(len(batches) / processes.count()):
                losses(windows[batches[0]])  # others have one more to run, which takes all processes
        return processes.total(total, self.device) / int(windows.scored.sum())

    def autocast(self) -> Any:
        """The arithmetic of forward passes."""
        # Of a sharded LM no process is to hold all weights, cast ones neither.
        keep_casts = not self.config.lm.sharded
        return autocast(self.device, self.config.training.precision, keep_casts=keep_casts)
