"""Settings of training: its stages, and what each adds."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from probekit.config.base import Positive, Settings, Share


class StageSettings(Settings):
    """One stage of training."""

    epochs: Annotated[float, Field(gt=0.0)] = 1.0
    """Passes over the training documents."""
    batch_size: Positive = 32
    """Windows (LM and adapter) or documents (planner) per optimiser step."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW weight decay, on matrices only."""
    warmup: Share = 0.05
    """Share of the steps in which the learning rate rises linearly; then it falls along a cosine to zero."""
    clip: Annotated[float, Field(gt=0.0)] = 1.0
    """Largest norm of the gradient."""
    accumulate: Positive = 1
    """Micro-batches that make up one optimiser step: less memory, the same gradient."""
    patience: Positive | None = None
    """Stop after this many passes without a better validation loss. In any case validation follows every pass
    and the best state is kept."""
    checkpoints: Annotated[int, Field(ge=0)] = 0
    """How many checkpoints are kept on the way, from before the first step to the last, evenly in the
    logarithm of the step: each a run of its own, which `probekit probe --checkpoints` probes."""

    @field_validator("checkpoints")
    @classmethod
    def _first_and_last(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one checkpoint would be that of no step; give 0, or 2 and more")
        return value


class PlannerStageSettings(StageSettings):
    """Training of the planner."""

    targets: Literal["hard", "soft"] = "hard"
    """What the planner is to predict: the sentence's action, or a softmax over the negative squared distances
    of its embedding to all centroids."""
    target_temperature: Annotated[float, Field(gt=0.0)] = 0.1
    """Temperature of soft targets; lower is nearer to hard ones."""
    folds: Annotated[int, Field(ge=0)] = 0
    """Out-of-fold predictions, for small corpora: adapters whose planner stays frozen are trained on scores
    of planners that have not seen the document, one for each of so many folds; 0: on the planner's own."""

    @field_validator("folds")
    @classmethod
    def _one_fold_is_none(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one fold leaves no documents to train on; give 0, or 2 and more")
        return value


class JointSettings(Settings):
    """What joint training (planner and adapter together) adds to the adapter stage."""

    planner_frozen: Annotated[float, Field(ge=0.0)] = 0.0
    """How long the planner, and an encoder that is trained with it, stay frozen: up to 1 a share of the steps
    (0: never, 1: to the end), above 1 a number of steps. Their warm-up begins after that."""
    planner_learning_rate: Annotated[float, Field(ge=0.0)] = 1e-4
    """Peak learning rate of the planner during joint training; gentler than the adapter's."""
    planner_loss_weight: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the planner's own cross-entropy, kept beside the next-token loss and part of the training
    loss that is shown; 0 drops it."""
    end_to_end: bool = True
    """Whether the next-token loss trains the planner too. Without it the planner has its own cross-entropy
    alone: what joint training owes to more training of the planner."""
    encoder: Literal["frozen", "trained"] = "frozen"
    """Whether the sentence encoder is trained with the planner; actions stay those of the frozen one."""
    encoder_learning_rate: Annotated[float, Field(ge=0.0)] = 1e-5
    """Peak learning rate of the sentence encoder, where it is trained."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.planner_frozen > 1 and not self.planner_frozen.is_integer():
            raise ValueError(
                f"planner_frozen is {self.planner_frozen:g}; above 1 it is a number of steps, which must be "
                "whole, and a share of the steps is at most 1"
            )
        if not self.end_to_end and self.planner_loss_weight == 0:
            raise ValueError(
                "end_to_end is false and planner_loss_weight is 0: nothing is left to train the planner on; "
                "change one of them, or choose the variant soft"
            )
        if self.encoder == "trained" and self.planner_frozen == 1:
            raise ValueError(
                "encoder is 'trained', but planner_frozen is 1, to the end: the encoder is trained with the "
                "planner; lower planner_frozen, or set encoder to frozen"
            )
        if self.encoder == "trained" and self.encoder_learning_rate == 0:
            raise ValueError(
                "encoder is 'trained', but encoder_learning_rate is 0; raise it, or set encoder to frozen"
            )
        return self


class BaseSettings(Settings):
    """What becomes of the base LM while an adapter or depth ensemble is trained; each then has its own."""

    tuning: Literal["frozen", "lora", "full"] = "frozen"
    """frozen: the adapter alone is trained; lora: low-rank updates of the linear maps too (Hu et al. 2021);
    full: all weights too."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak learning rate of the base LM (lora, full)."""
    rank: Positive = 8
    """Rank of the updates (lora)."""
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    """Updates are scaled by alpha / rank (lora)."""
    dropout: Share = 0.0
    """Dropout before the updates (lora)."""
    last_layers: Positive | None = None
    """Updates in this many of the last layers only (lora); unset: in all."""


class TrainingSettings(Settings):
    """The stages of training, in their order."""

    window: Annotated[int, Field(ge=2)] = 128
    """Tokens in a training window."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 autocast on a GPU that has it, float32 elsewhere."""
    save_minutes: Annotated[float, Field(ge=0.0)] = 5.0
    """Minutes of a stage between the states that --resume goes on from, which a kill at most costs."""
    lm: StageSettings = StageSettings(epochs=4.0)
    planner: PlannerStageSettings = PlannerStageSettings(epochs=20.0, patience=3)
    adapter: StageSettings = StageSettings()
    joint: JointSettings = JointSettings()
    depth: StageSettings = StageSettings()
    base: BaseSettings = BaseSettings()
