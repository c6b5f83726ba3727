"""The depth ensemble's stage: norms, router, and whatever is tuned with them, on next-token loss."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.config import MemberName
from probekit.data.windows import IGNORE, Batch, Windows, collate
from probekit.models.depth_ensemble import (
    MEMBERS,
    DepthEnsemble,
    DepthLoss,
    LateLayers,
    layer_losses,
    new_ensemble,
)
from probekit.models.frozen_lm import FrozenLM
from probekit.models.mixing import evaluation_mixing
from probekit.models.planned_lm import PlannedLM
from probekit.models.planner import Planner
from probekit.models.tuning import Tuning
from probekit.training.planner import OutOfFold
from probekit.training.trainer import Group, Stage, Trainer


class DepthTraining:
    """The training of one member: what is trained and how, and the loss.

    Args:
        trainer: What every stage needs, with the corpus as the LM's planner reads it.
        member: Which layers it reads, and whether they learn from the last one.
        lm: The LM, frozen.
        conditioned: The same, conditioned by an adapter or not.
        tuning: The same LM, and what is to be trained of it; None: nothing.
        fold_planners: For every fold a planner that has not seen its documents; scores them in training.

    Attributes:
        model: The LM with its ensemble.
        ensemble: The ensemble.

    Raises:
        ProbekitError: The LM does not support an ensemble; or it is to be tuned, but only TransformerLens has
            the places that are read.
    """

    def __init__(
        self,
        trainer: Trainer,
        member: MemberName,
        lm: FrozenLM,
        conditioned: PlannedLM,
        tuning: Tuning | None = None,
        fold_planners: Sequence[Planner] = (),
    ) -> None:
        config = trainer.config
        depth = config.depth
        model = lm.plain if tuning is None else tuning.model
        self.ensemble = new_ensemble(member, depth, lm, model, config.seed).to(trainer.device)
        adapter = conditioned.adapter
        names = [*(() if adapter is None else adapter.names), *self.ensemble.names]
        backend = lm.backend_for(names, None if tuning is None else model)
        self.model = PlannedLM(
            backend, conditioned.planner, adapter, float(conditioned.temperature), depth=self.ensemble
        )
        self._trainer, self._member, self._tuning = trainer, member, tuning
        self._head = model.get_output_embeddings()
        self._mixing = evaluation_mixing(depth.variant)
        self._loss = DepthLoss(depth.distillation if MEMBERS[member].distilled else None, depth.layer_loss)
        self._task_loss = DepthLoss()
        self._train, self._validation = trainer.windows("train"), trainer.windows("validation")
        self._out_of_fold: OutOfFold | None = None
        if fold_planners:
            self._out_of_fold = OutOfFold(fold_planners, trainer.corpus, config.seed)

    def run(self) -> DepthEnsemble:
        """Trains the ensemble and leaves it in evaluation mode."""
        training = self._trainer.config.training
        groups = [Group(self.ensemble.trained, training.depth.learning_rate)]
        if self._tuning is not None:
            groups.append(Group(self._tuning.parameters, training.base.learning_rate))
        self._trainer.optimise(
            Stage(
                f"depth/{self._member}",
                training.depth,
                groups,
                len(self._train),
                self.loss,
                lambda: self._trainer.mean_loss(
                    self._validation, training.depth.batch_size, self.validation_loss
                ),
                observed=self.observed,
                documents=self._train.document,
            )
        )
        return self.ensemble.eval()

    def loss(self, rows: np.ndarray, step: np.ndarray) -> Tensor:
        """Loss of some windows, as `Stage.loss` has it."""
        total = self._summed(self._loss, self._batch(self._train[rows]), training=True)
        return total / int(self._train.scored[step].sum())

    def validation_loss(self, windows: Windows) -> Tensor:
        """The ensemble's next-token loss, summed over windows: the only criterion of model selection."""
        return self._summed(self._task_loss, self._batch(windows))

    @torch.no_grad()
    def observed(self, rows: np.ndarray) -> dict[str, float]:
        """Losses of the ensemble and of its layers on some windows, and the router's weights.

        `sparsity` is 1 less the entropy of a token's weights as a share of the largest there can be, averaged
        over tokens: 0 where all layers weigh the same, 1 where one has all weight.
        """
        batch = self._batch(self._train[rows])
        with self._trainer.autocast():
            late, targets = self._scored(batch, training=True)
            losses = layer_losses(self._head, late, targets).mean(dim=1)
        found: dict[str, Any] = {"ensemble_loss": losses[0].item()}
        if (count := len(self.ensemble.layers)) > 1:
            entropy = torch.special.entr(late.weights).sum(dim=-1).mean().item()
            found["sparsity"] = 1.0 - entropy / float(np.log(count))
        for place, weight in enumerate(late.weights.mean(dim=0).tolist()):
            number = place - count  # -1: the last one
            found |= {f"layer_loss{number}": losses[1 + place].item(), f"weight{number}": weight}
        return found

    def _summed(self, loss: DepthLoss, batch: Batch, *, training: bool = False) -> Tensor:
        with self._trainer.autocast():
            late, targets = self._scored(batch, training=training)
            return loss(self._head, late, targets)

    def _scored(self, batch: Batch, *, training: bool) -> tuple[LateLayers, Tensor]:
        """Late layers, and next tokens, at the positions that are scored."""
        scores = self._out_of_fold.scores(batch) if training and self._out_of_fold is not None else None
        # A frozen LM needs no graph: what is trained lies after it.
        frozen = torch.no_grad() if self._tuning is None else contextlib.nullcontext()
        scored = batch.targets != IGNORE
        with frozen:
            hidden = self.model.late_hidden(batch, self._mixing, scores)
        return self.ensemble({name: h[scored] for name, h in hidden.items()}), batch.targets[scored]

    def _batch(self, windows: Windows) -> Batch:
        return collate(self._trainer.corpus, windows).to(self._trainer.device)
