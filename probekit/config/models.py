"""Settings of the models: base LM, planner, what is told to the LM and how, depth ensembles."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from probekit.config.base import MemberName, Positive, Settings, Several, Share, SomeShare, VariantName


class LanguageModelSettings(Settings):
    """The base LM: a pre-trained one by name, or a new GPT-2 of the given size."""

    name: str | None = None
    """Hub name or local folder of a causal LM that TransformerLens can bridge; unset: train a new GPT-2."""
    revision: str | None = None
    """Revision (branch, tag or commit) of a hub model."""
    trust_remote_code: bool = False
    """Let the model's folder run its own Python code. Only for models whose code you have read."""
    sharded: bool = False
    """Shard the weights over the processes of torchrun or accelerate, where one GPU cannot hold them."""
    layers: Positive = 4
    """Layers of a new LM."""
    width: Positive = 128
    """Residual stream width (d_model) of a new LM."""
    heads: Positive = 4
    """Attention heads of a new LM."""
    positions: Annotated[int, Field(ge=2)] = 128
    """Positions of a new LM: the longest window it can read, in tokens."""
    vocabulary: Annotated[int, Field(ge=257)] = 4096
    """Vocabulary size of the byte-level BPE tokenizer trained for a new LM."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class PlannerSettings(Settings):
    """The planner: reads the sentences so far, scores the next sentence's action."""

    width: Positive = 128
    """Width of the planner's Transformer."""
    layers: Positive = 1
    """Transformer encoder layers."""
    heads: Positive = 2
    """Attention heads."""
    pooling: Literal["mean", "last"] = "last"
    """How the context's sentence states become one vector: their mean (the paper's) or the last one."""
    dropout: Share = 0.1
    """Dropout during planner training."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        return self


class ConditioningSettings(Settings):
    """Where and how the action's embedding enters the LM."""

    kind: Literal["adapter", "embedding", "token"] = "adapter"
    """adapter: a projection added in every layer but the first ones; embedding: one projection added to the
    embedding of every token; token: a planning token before every sentence, whose embedding it is."""
    location: str = "attn.hook_z"
    """TransformerLens hook, without the `blocks.L.` before it, where an adapter adds the projected action."""
    skip_layers: Annotated[int, Field(ge=0)] = 2
    """Layers at the bottom that get no projection from an adapter."""


class MixingSettings(Settings):
    """Which ways of choosing the action are trained and compared."""

    variants: Several[VariantName] = ("fixed", "oracle", "predicted", "soft", "joint")
    """Variants to train and compare, each with its own adapter; soft keeps the planner frozen, joint is soft
    mixing with the planner trained too. The base LM alone (none) is always evaluated."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature of the softmax over scores (soft, joint, straight-through, gumbel)."""
    learn_temperature: bool = False
    """Train the temperature with the adapter, from that value on."""
    fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Variant mixed: the share of sentences that carry the planner's action in training, drawn for each
    sentence; the others carry the true one. 0 is oracle, 1 is predicted."""


class DistillationSettings(Settings):
    """How late layers learn from the last one (member distilled)."""

    weight: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the divergences, summed over layers, beside the ensemble's cross-entropy."""
    direction: Literal["layer-from-last", "last-from-layer"] = "layer-from-last"
    """KL(layer || last), which the paper has, or KL(last || layer), usual in distillation."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Divides the logits before both softmaxes."""
    detach_teacher: bool = True
    """Whether the last layer only teaches; or else it is drawn to the others, too."""


class DepthSettings(Settings):
    """Depth ensemble: late layers' logits, weighted by a router (`method: depth-ensemble`)."""

    members: Several[MemberName] = ("plain", "repeated", "ensemble", "distilled")
    """What is trained and compared: plain, the last layer alone, which is the tuned LM as it is; repeated,
    the last layer as often as there are layers in an ensemble, each time with a norm of its own: as many
    parameters, no depth; ensemble; distilled, the ensemble whose layers learn from the last one."""
    layers: Positive = 3
    """How many of the last layers are in an ensemble."""
    top_k: Positive | None = None
    """How many of a token's router weights are kept and renormalised; unset: all. A single one is always 1,
    so that with 1 the router learns nothing."""
    last_weight: SomeShare = 0.9
    """Weight that the last layer has before training; the others share the rest."""
    layer_loss: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of the cross-entropy of every single layer, beside the ensemble's."""
    distillation: DistillationSettings = DistillationSettings()
    variant: VariantName = "none"
    """Which LM it is made on: none, the base LM, or one that is conditioned by that variant's adapter, which
    is trained first and stays as it is."""

    @model_validator(mode="after")
    def _no_more_weights_than_layers(self) -> Self:
        if self.top_k is not None and self.top_k > self.layers:
            raise ValueError(f"top_k {self.top_k} exceeds layers {self.layers}, and only these have weights")
        return self
