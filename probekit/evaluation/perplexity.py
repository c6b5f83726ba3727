"""Perplexity: next-token losses summed by document, over the same tokens for all that is compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from probekit.corpus.examples import Windows, collate
from probekit.corpus.store import Corpus
from probekit.devices import autocast
from probekit.models.mixing import Mixing
from probekit.models.planned_lm import PlannedLM, token_losses
from probekit.progress import Task


@dataclass(frozen=True)
class Pass:
    """What every setting is evaluated on.

    Attributes:
        corpus: The corpus.
        windows: Windows over the evaluated documents; they score every token of theirs once.
        batch_size: Windows in one forward pass.
        precision: The setting `training.precision`.
        device: Where to compute.
    """

    corpus: Corpus
    windows: Windows
    batch_size: int
    precision: str
    device: torch.device

    @property
    def documents(self) -> np.ndarray:
        """The evaluated documents, sorted `[documents]`."""
        return np.unique(self.windows.document)

    @property
    def tokens(self) -> np.ndarray:
        """Scored tokens of each document `[documents]`."""
        return self._by_document(self.windows.document, self.windows.scored)

    def document_losses(self, model: PlannedLM, mixing: Mixing, task: Task) -> np.ndarray:
        """Sum of next-token losses of each document, in nats `[documents]`."""
        losses = np.zeros(len(self.windows))
        # Windows of a length go together, so that little is padded.
        order = np.argsort(self.windows.length, kind="stable")
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = collate(self.corpus, self.windows[rows]).to(self.device)
            with torch.no_grad(), autocast(self.device, self.precision):
                logits = model(batch, mixing)
            losses[rows] = token_losses(logits, batch.targets).double().sum(dim=1).cpu().numpy()
            task.advance(len(rows))
        return self._by_document(self.windows.document, losses)

    def _by_document(self, document: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(np.searchsorted(self.documents, document), weights=values)
