"""Settings of probes, and of the causal tests of what they read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from probekit.config.base import Positive, ProbedName, Seed, Settings, Several, SolverName, VariantName


class ProbeSettings(Settings):
    """The probe grid."""

    target: str = "action"
    """What is read: action (of a sentence), token, sentence-position, document-type (planted corpus only), or
    a column of the file of labels."""
    labels: str | None = None
    """CSV, JSON lines or Parquet file with a row for every sentence of the corpus, in order; `probekit corpus
    RUN --export FILE` writes the table to fill in."""
    anchors: Literal["sentence", "token"] = "sentence"
    """Target tokens: the first one of every sentence, or every token."""
    variants: Several[ProbedName] = ("none", "random")
    """Variants whose activations are read; none is the base LM without conditioning, random is the same
    architecture with random weights."""
    locations: Several[str] = ("hook_resid_post",)
    """TransformerLens hooks, without the `blocks.L.` before them, that are read. With `:before` behind it,
    the conditioned location as it was before the action was added."""
    layers: Several[Annotated[int, Field(ge=0)]] | None = None
    """Layers that are read; unset: all."""
    distances: Several[Positive] = (1, 2, 3, 4, 6, 8)
    """Tokens before the target token at which activations are read; 1 is the token right before. All
    distances share the anchors that the farthest one reaches."""
    horizons: Several[Positive] = (1,)
    """Sentences ahead: 1 is the sentence that the target token is in, 2 the one after it."""
    solvers: Several[SolverName] = ("softmax",)
    """softmax: softmax regression; ridge, lda: closed form, at the cost of about one forward pass; mlp: one
    hidden layer, for what is there but not linearly."""
    l2: Several[Annotated[float, Field(gt=0.0)]] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """L2 penalties tried (softmax, ridge); each probe keeps the best on validation documents. Unit: per
    example, on standardised activations."""
    shrinkage: Several[Annotated[float, Field(gt=0.0, le=1.0)]] = (0.01, 0.1, 0.3, 0.6, 0.9)
    """Shrinkage of the covariance tried (lda), near 0 hardly any, 1 all the way to a multiple of the
    identity."""
    hidden: Positive = 64
    """Hidden units (mlp)."""
    max_iterations: Positive = 500
    """Most iterations of the softmax solver for each penalty."""
    tolerance: Annotated[float, Field(gt=0.0)] = 1e-4
    """The softmax solver stops when the norm of the gradient falls below this share of its norm at zero
    weights."""
    max_examples: Annotated[int, Field(ge=20)] = 20_000
    """Fit on at most this many examples, and choose on at most as many: all those of some documents, or, if
    a few documents have more than that, examples spread evenly over these."""
    seeds: Several[Seed] | None = None
    """Seeds of the documents drawn, of random weights, of the control task and of the MLP; every one makes
    the whole grid anew. Unset: the run's seed."""
    control: bool = True
    """Fit every probe on a control task too: random labels tied to tokens (Hewitt and Liang 2019)."""
    code_length: bool = True
    """Measure the prequential code length of softmax probes (Voita and Titov 2020)."""
    memory: Annotated[float, Field(gt=0.0)] = 4.0
    """Gigabytes that held activations may take; places beyond that are read in further passes."""


class InterventionSettings(Settings):
    """Causal tests of what probes read."""

    variant: VariantName = "none"
    """Whose activations are changed; its probes have to be there."""
    locations: Several[str] = ("hook_resid_post",)
    """TransformerLens hooks, without the `blocks.L.` before them, that are changed."""
    layers: Several[Annotated[int, Field(ge=0)]] | None = None
    """Layers that are changed, one at a time; unset: all."""
    distances: Several[Positive] = (1, 2, 4)
    """Tokens before the next sentence at which activations are changed."""
    span: bool = True
    """Change all tokens from that distance on to the next sentence, at once; or else the one alone."""
    kinds: Several[Literal["erase", "steer", "patch", "codebook"]] = ("erase", "steer", "patch")
    """erase: what a linear probe can read is taken away; steer: the direction of an action is added; patch:
    another document's activation is put in place; codebook: a conditioned variant is given another plan."""
    eraser: Literal["leace", "inlp"] = "leace"
    """LEACE (Belrose et al. 2023), or iterative null-space projection (Ravfogel et al. 2020)."""
    rounds: Positive = 2
    """Rounds of null-space projection (inlp)."""
    direction: Literal["means", "probe", "gradient"] = "means"
    """An action's direction: from the mean of all activations to the action's; its probe's weights, as long
    as that way; or in steps along the gradient of the probe's log-probability, as long in all (Dathathri et
    al. 2020)."""
    steps: Positive = 3
    """Steps along the gradient (gradient)."""
    strengths: Several[float] = (1.0, 2.0, 4.0)
    """By how much directions are multiplied."""
    scenes: Annotated[int, Field(ge=2)] = 300
    """Test documents in which one sentence boundary each is changed."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Of so many of them the next sentence is written anew, to see which action it has; this takes long."""


class SubnetworkSettings(Settings):
    """Which components (attention heads, parts of the adapter) the next action's information needs."""

    variant: VariantName = "none"
    """Whose components are removed; its probes have to be there."""
    keep: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of what is to stay, the divergence from the whole LM's next tokens but for sentences' first
    ones, beside what a probe makes of the last layer; both in nats."""
    penalties: Several[Annotated[float, Field(ge=0.0)]] = (0.003, 0.01, 0.03)
    """Penalties tried on every removed component, in nats; a mask is learned with each, and validation
    documents choose."""
    steps: Positive = 100
    """Steps of learning each mask."""
    batch_size: Positive = 16
    """Windows in each step."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 0.1
    """Learning rate of Adam on the gates."""
    draws: Positive = 5
    """Random masks that the learned one is compared with."""
    documents: Annotated[int, Field(ge=2)] = 300
    """At most so many documents of each split, to learn on, to choose on and to measure on."""
