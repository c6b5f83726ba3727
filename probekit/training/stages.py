"""The stages of training: a new LM, the planner, and an adapter for each variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probekit.config import Config, VariantName
from probekit.corpus.examples import IGNORE, Windows, begun_sentences, collate, cut_windows, document_batch
from probekit.corpus.store import Corpus
from probekit.devices import autocast
from probekit.errors import ProbekitError
from probekit.models.conditioning import new_adapter
from probekit.models.language_model import new_model
from probekit.models.mixing import VARIANTS
from probekit.models.planned_lm import PlannedLM, token_losses
from probekit.models.planner import Planner
from probekit.progress import Progress
from probekit.training.loop import Stage, optimise

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Trainer:
    """What every stage needs.

    Attributes:
        config: All settings.
        corpus: The built corpus.
        device: Where to compute.
        log: Takes rows of metrics.
        progress: Shows the work.
    """

    config: Config
    corpus: Corpus
    device: torch.device
    log: Callable[[dict[str, Any]], None]
    progress: Progress

    def train_language_model(self) -> PreTrainedModel:
        """Trains a new LM on next-token loss, as the plain Hugging Face module."""
        settings = self.config.training.lm
        model = new_model(self.config.lm, self.corpus.tokenizer, self.config.seed).to(self.device)
        train, validation = self._windows("train"), self._windows("validation")

        def losses(windows: Windows) -> Tensor:
            batch = collate(self.corpus, windows).to(self.device)
            with self._autocast():
                logits = model(batch.tokens, use_cache=False).logits
            return token_losses(logits, batch.targets)

        model.train()
        optimise(
            Stage(
                "lm",
                settings,
                [(parameter, settings.learning_rate) for parameter in model.parameters()],
                len(train),
                lambda rows, step: losses(train[rows]).sum() / int(train.scored[step].sum()),
                lambda: self._mean_loss(validation, settings.batch_size, losses),
            ),
            self.config.seed,
            self.log,
            self.progress,
        )
        return model.eval()

    def train_planner(self) -> Planner:
        """Trains the planner on the cross-entropy of every sentence's action.

        Documents of one sentence are left out: they have no next sentence to plan.

        Raises:
            ProbekitError: A split has no other documents.
        """
        settings, corpus = self.config.training.planner, self.corpus
        planner = Planner(
            self.config.planner, torch.from_numpy(corpus.codebook.centroids), self.config.seed
        ).to(self.device)
        lengths = np.diff(corpus.document_sentences)
        longer = {split: corpus.documents(split) for split in ("train", "validation")}
        longer = {split: documents[lengths[documents] > 1] for split, documents in longer.items()}
        for split, documents in longer.items():
            if not len(documents):
                raise ProbekitError(
                    f"all documents of the split {split!r} have one sentence: there is no next one to plan; "
                    "give longer documents"
                )
        train, validation = longer.values()

        def loss(documents: np.ndarray) -> Tensor:
            embeddings, actions = (tensor.to(self.device) for tensor in document_batch(corpus, documents))
            with self._autocast():
                scores = planner(embeddings)
            return torch.nn.functional.cross_entropy(
                scores.flatten(0, 1).float(), actions.flatten(), ignore_index=IGNORE, reduction="sum"
            )

        def validation_loss() -> float:
            planner.eval()
            with torch.no_grad():
                chunks = _chunks(len(validation), settings.batch_size)
                total = sum(loss(validation[rows]).item() for rows in chunks)
            planner.train()
            return total / int(lengths[validation].sum())

        planner.train()
        optimise(
            Stage(
                "planner",
                settings,
                [(parameter, settings.learning_rate) for parameter in planner.parameters()],
                len(train),
                lambda rows, step: loss(train[rows]) / int(lengths[train[step]].sum()),
                validation_loss,
            ),
            self.config.seed,
            self.log,
            self.progress,
        )
        return planner.eval()

    def train_adapter(self, variant: VariantName, bridged: TransformerBridge, planner: Planner) -> PlannedLM:
        """Trains an adapter, and in a joint variant the planner with it, on next-token loss.

        Args:
            variant: Which way of choosing the action.
            bridged: The frozen base LM.
            planner: Trained in place where the variant is joint.
        """
        settings, joint = self.config.training.adapter, self.config.training.joint
        chosen = VARIANTS[variant]
        codebook = torch.from_numpy(self.corpus.codebook.centroids)
        adapter = new_adapter(self.config.conditioning, codebook, bridged, self.config.seed).to(self.device)
        model = PlannedLM(bridged, planner, adapter, self.config.mixing.temperature)
        train, validation = self._windows("train"), self._windows("validation")
        begun = begun_sentences(self.corpus, train)
        parameters = [(parameter, settings.learning_rate) for parameter in adapter.parameters()]
        planner.requires_grad_(chosen.joint).eval()
        if chosen.joint:
            parameters += [(parameter, joint.planner_learning_rate) for parameter in planner.parameters()]

        def loss(rows: np.ndarray, step: np.ndarray) -> Tensor:
            batch = collate(self.corpus, train[rows]).to(self.device)
            with self._autocast():
                scores = model.scores(batch) if chosen.training.needs_scores else None
                logits = model(batch, chosen.training, scores)
            total = token_losses(logits, batch.targets).sum() / int(train.scored[step].sum())
            if chosen.joint and joint.planner_loss_weight and scores is not None and batch.begun.any():
                own = torch.nn.functional.cross_entropy(
                    scores[batch.begun].float(), batch.actions[batch.begun], reduction="sum"
                )
                total = total + joint.planner_loss_weight * own / max(1, int(begun[step].sum()))
            return total

        def losses(windows: Windows) -> Tensor:
            batch = collate(self.corpus, windows).to(self.device)
            with self._autocast():
                return token_losses(model(batch, chosen.evaluation), batch.targets)

        optimise(
            Stage(
                f"adapter/{variant}",
                settings,
                parameters,
                len(train),
                loss,
                lambda: self._mean_loss(validation, settings.batch_size, losses),
            ),
            self.config.seed,
            self.log,
            self.progress,
        )
        planner.requires_grad_(False)
        return model.eval()

    def _windows(self, split: str) -> Windows:
        window = self.config.training.window
        return cut_windows(self.corpus, self.corpus.documents(split), window, window)

    def _mean_loss(self, windows: Windows, batch_size: int, losses: Callable[[Windows], Tensor]) -> float:
        with torch.no_grad():
            total = sum(losses(windows[rows]).sum().item() for rows in _chunks(len(windows), batch_size))
        return total / int(windows.scored.sum())

    def _autocast(self) -> Any:
        return autocast(self.device, self.config.training.precision)


def _chunks(count: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, count, size)]
