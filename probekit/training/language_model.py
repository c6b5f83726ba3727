"""Training of a new LM on next-token loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from probekit.data.windows import Windows, collate
from probekit.models.planned_lm import token_losses
from probekit.training.trainer import Group, Stage, Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_language_model(
    trainer: Trainer, model: PreTrainedModel, keep: Callable[[PreTrainedModel, int], None] | None = None
) -> PreTrainedModel:
    """Trains a new LM on next-token loss, as the plain Hugging Face module, and leaves it in evaluation mode.

    Args:
        trainer: What every stage needs.
        model: The LM, on the trainer's device.
        keep: Keeps the LM as it is after a step.
    """
    settings, corpus = trainer.config.training.lm, trainer.corpus
    train, validation = trainer.windows("train"), trainer.windows("validation")

    def losses(windows: Windows) -> Tensor:
        batch = collate(corpus, windows).to(trainer.device)
        with trainer.autocast():
            logits = model(batch.tokens, use_cache=False).logits
        return token_losses(logits, batch.targets)

    model.train()
    trainer.optimise(
        Stage(
            "lm",
            settings,
            [Group(list(model.parameters()), settings.learning_rate)],
            len(train),
            lambda rows, step: losses(train[rows]).sum() / int(train.scored[step].sum()),
            lambda: trainer.mean_loss(validation, settings.batch_size, losses),
            keep=keep and partial(keep, model),
            checkpoints=settings.checkpoints,
            documents=train.document,
        )
    )
    return model.eval()
