"""The adapter's stage: one adapter for each variant, and whatever is trained with it, on next-token loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from probekit import distributed
from probekit.config import VariantName
from probekit.data.encoders import load_encoder
from probekit.data.windows import Batch, Windows, beginnings, collate
from probekit.models.conditioning import new_adapter
from probekit.models.frozen_lm import FrozenLM
from probekit.models.mixing import VARIANTS, training_mixing
from probekit.models.planned_lm import PlannedLM, token_losses
from probekit.models.planner import Planner, TrainableEncoder, embedded_context
from probekit.models.tuning import Tuning
from probekit.progress import without_bars_of_transformers
from probekit.training.planner import OutOfFold, PlannerLoss
from probekit.training.trainer import Group, Stage, Trainer


class AdapterTraining:
    """The training of one variant: what is trained and how, and the loss.

    Args:
        trainer: What every stage needs.
        variant: Which way of choosing the action.
        lm: The frozen base LM.
        planner: Trained in place where the variant is joint.
        tuning: The same LM, and what is to be trained of it; None: nothing.
        fold_planners: For every fold a planner that has not seen its documents; scores them in training,
            unless the variant is joint.

    Attributes:
        model: What is trained, all of it in one module.

    Raises:
        ProbekitError: The base LM is to be tuned, or accelerate placed it, but actions enter where only the
            bridge has a hook.
    """

    def __init__(
        self,
        trainer: Trainer,
        variant: VariantName,
        lm: FrozenLM,
        planner: Planner,
        tuning: Tuning | None = None,
        fold_planners: Sequence[Planner] = (),
    ) -> None:
        config, corpus = trainer.config, trainer.corpus
        chosen = VARIANTS[variant]
        codebook = torch.from_numpy(corpus.codebook.centroids)
        adapter = new_adapter(config.conditioning, codebook, lm, config.seed).to(trainer.device)
        trains_encoder = chosen.joint and config.training.joint.encoder_learning_rate > 0
        self.model = PlannedLM(
            lm.backend_for(adapter.names, None if tuning is None else tuning.model),
            planner,
            adapter,
            config.mixing.temperature,
            learn_temperature=config.mixing.learn_temperature and chosen.tempered,
            encoder=_encoder(trainer) if trains_encoder else None,
        )
        self._trainer, self._variant = trainer, variant
        self._adapter, self._planner, self._tuning = adapter, planner, tuning
        self._mixing = training_mixing(variant, config.mixing, config.seed + distributed.rank())
        self._joint = chosen.joint
        self._out_of_fold = None
        if fold_planners and chosen.out_of_fold:
            self._out_of_fold = OutOfFold(fold_planners, corpus, config.seed)
        self._planner_loss = PlannerLoss(config.training.planner, codebook.to(trainer.device))
        self._train, self._validation = trainer.windows("train"), trainer.windows("validation")
        self._beginnings = beginnings(corpus, self._train)

    def run(self, keep: Callable[[PlannedLM, int], None] | None = None) -> PlannedLM:
        """Trains the model and leaves it frozen but for the adapter, in evaluation mode."""
        settings = self._trainer.config.training.adapter
        self._planner.requires_grad_(False).eval()
        self._trainer.optimise(
            Stage(
                f"adapter/{self._variant}",
                settings,
                self.groups(),
                len(self._train),
                self.loss,
                lambda: self._trainer.mean_loss(
                    self._validation, settings.batch_size, self.validation_losses
                ),
                keep=keep and partial(keep, self.model),
                checkpoints=settings.checkpoints,
                documents=self._train.document,
                generators=self._mixing.generators,
            )
        )
        for module in (self._planner, self.model.encoder):
            if module is not None:
                module.requires_grad_(False)
        return self.model.eval()

    def groups(self) -> list[Group]:
        """All that is trained: the adapter first, then what the settings and the variant add."""
        training = self._trainer.config.training
        adapter = list(self._adapter.parameters())
        if self.model.log_temperature is not None:
            adapter.append(self.model.log_temperature)
        groups = [Group(adapter, training.adapter.learning_rate)]
        joint = training.joint
        for module, rate in (
            (self._planner if self._joint else None, joint.planner_learning_rate),
            (self.model.encoder, joint.encoder_learning_rate),
        ):
            if module is not None:
                groups.append(Group(list(module.parameters()), rate, joint.planner_frozen))
        if self._tuning is not None:
            groups.append(Group(self._tuning.parameters, training.base.learning_rate))
        return groups

    def loss(self, rows: np.ndarray, step: np.ndarray) -> Tensor:
        """Next-token loss of some windows, with the planner's own loss; scaled as `Stage.loss` asks."""
        batch = collate(self._trainer.corpus, self._train[rows]).to(self._trainer.device)
        with self._trainer.autocast():
            scores = self._scores(batch) if self._mixing.needs_scores else None
            logits = self.model(batch, self._mixing, self._mixed(scores))
        total = token_losses(logits, batch.targets).sum() / int(self._train.scored[step].sum())
        return total + self._own_loss(batch, scores) / max(1, int(self._beginnings[step].sum()))

    def validation_losses(self, windows: Windows) -> Tensor:
        """Next-token losses of windows `[windows, positions]`, actions chosen as in evaluation."""
        batch = collate(self._trainer.corpus, windows).to(self._trainer.device)
        with self._trainer.autocast():
            logits = self.model(self._read(batch), VARIANTS[self._variant].evaluation)
        return token_losses(logits, batch.targets)

    def _mixed(self, scores: Tensor | None) -> Tensor | None:
        """The scores as they are mixed: without a gradient where the next-token loss is not to train them."""
        if scores is None or self._trainer.config.training.joint.end_to_end:
            return scores
        return scores.detach()

    def _scores(self, batch: Batch) -> Tensor:
        """Scores of the touched sentences, as they are in training `[touched, actions]`."""
        if self._out_of_fold is not None:
            return self._out_of_fold.scores(batch)
        return self.model.scores(self._read(batch))

    def _read(self, batch: Batch) -> Batch:
        """The batch with sentences embedded by the trained encoder; unchanged while it is frozen."""
        encoder = self.model.encoder
        if encoder is None or not next(encoder.parameters()).requires_grad:
            return batch
        return replace(batch, context=embedded_context(encoder, self._trainer.corpus, batch))

    def _own_loss(self, batch: Batch, scores: Tensor | None) -> Tensor | float:
        """The planner's weighted own loss over sentences that begin in a batch; none while it is frozen."""
        weight = self._trainer.config.training.joint.planner_loss_weight
        if scores is None or not scores.requires_grad or not weight or not batch.begins.any():
            return 0.0
        embeddings = batch.context.flatten(0, 1)[batch.touched[batch.begins]]
        return weight * self._planner_loss(scores[batch.begins], batch.actions[batch.begins], embeddings)


def _encoder(trainer: Trainer) -> TrainableEncoder:
    """The corpus's sentence encoder, to be trained."""
    with without_bars_of_transformers():
        encoder = load_encoder(trainer.corpus.folder / "encoder", str(trainer.device))
    return TrainableEncoder(encoder).to(trainer.device)
