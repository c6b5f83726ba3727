"""Settings of probes, and of the causal tests of what they read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

T = TypeVar("T")


def _distinct(values: tuple[T, ...]) -> tuple[T, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"{value!r} is listed twice")
    return values


def _ascending(values: tuple[int, int]) -> tuple[int, int]:
    if values[0] > values[1]:
        raise ValueError(f"the fewest, {values[0]}, exceed the most, {values[1]}")
    return values


Share = Annotated[float, Field(ge=0.0, lt=1.0)]
SomeShare = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
Several = Annotated[tuple[T, ...], Field(min_length=1), AfterValidator(_distinct)]
VariantName = Literal[
    "none",
    "fixed",
    "uniform",
    "oracle",
    "predicted",
    "mixed",
    "straight-through",
    "gumbel",
    "soft",
    "joint",
]
ProbedName = Literal[VariantName, "random"]
SolverName = Literal["softmax", "ridge", "lda", "mlp"]
MemberName = Literal["plain", "repeated", "ensemble", "distilled"]
ModelName = VariantName | MemberName


class Settings(BaseModel):
    """Base of all sections: frozen, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_values_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"{str(value).lower()} is not what this setting takes")
        return value


class PlantedSettings(Settings):
    """The synthetic corpus with a known plan (`corpus.reader: planted`)."""

    documents: Annotated[int, Field(ge=4)] = 6000
    """Number of documents to generate."""
    actions: Annotated[int, Field(ge=2, le=4096)] = 24
    """Number of planted actions."""
    types: Positive = 4
    """Number of hidden document types, each with its own action-to-action transitions."""
    successors: Positive = 3
    """Actions that can follow an action within one document type; fewer means a more certain plan."""
    sentences: Range = (10, 16)
    """Fewest and most sentences in a document, at least 2."""
    words: Range = (4, 8)
    """Fewest and most words in a sentence."""
    vocabulary: Annotated[int, Field(ge=2)] = 240
    """Number of distinct words."""
    concentration: Annotated[float, Field(gt=0.0)] = 0.05
    """Dirichlet concentration of an action's distribution over words; smaller means words that say more."""
    seed: Seed = 0
    """Seed of the planted plan and its documents."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.successors > self.actions:
            raise ValueError(f"successors {self.successors} exceeds actions {self.actions}")
        if self.sentences[0] < 2:
            raise ValueError(f"sentences begins at {self.sentences[0]}; a document needs at least 2")
        return self


class CorpusSettings(Settings):
    """Where text comes from and how documents are split."""

    reader: Literal["planted", "text", "wikitext", "jsonl", "parquet", "huggingface"] = "text"
    """Format: the planted corpus, text files (a document each), WikiText files (articles split at
    ` = Title = `), JSON lines or Parquet with a text column, or a Hugging Face dataset."""
    path: str | None = None
    """File or folder to read; for `huggingface`, the dataset's hub name or local folder."""
    separator: str | None = None
    """Line that separates documents in text files, such as <|endoftext|>, or an empty text for blank lines;
    unset: a file is one document."""
    text_column: str = "text"
    """Column that holds the text (jsonl, parquet, huggingface)."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset, such as 20231101.en."""
    dataset_split: str = "train"
    """Split of a Hugging Face dataset to read."""
    encoding: str = "utf-8"
    """Character encoding of text files."""
    language: str = "en"
    """Language code for the sentence splitter."""
    max_documents: Positive | None = None
    """Read at most this many documents."""
    probe_fraction: Share = 0.2
    """Share of documents kept from all training of LM and planner; probes are fitted on them."""
    validation_fraction: SomeShare = 0.1
    """Share of documents on which whatever is chosen is chosen."""
    test_fraction: SomeShare = 0.1
    """Share of documents on which every reported number is computed."""
    seed: Seed = 0
    """Seed of the splits, the encoder and the codebook. It is separate from the run's seed,
    so that runs with different seeds share the corpus."""
    planted: PlantedSettings = PlantedSettings()

    @model_validator(mode="after")
    def _leaves_training_documents(self) -> Self:
        held_out = self.probe_fraction + self.validation_fraction + self.test_fraction
        if held_out >= 1.0:
            raise ValueError(
                f"probe_fraction + validation_fraction + test_fraction is {held_out:g}; it must be below 1 "
                "to leave training documents"
            )
        return self


class ActionSettings(Settings):
    """How sentences become actions."""

    encoder: str = "tfidf"
    """Sentence encoder: `tfidf` (TF-IDF + truncated SVD, fitted on the corpus) or the hub name or folder of
    a sentence-transformers model."""
    dimensions: Positive = 64
    """Dimensions of the `tfidf` encoder's embeddings."""
    k: Annotated[int, Field(ge=8, le=4096)] = 256
    """Number of clusters of the codebook."""
    labels: Literal["clusters", "planted"] = "clusters"
    """What a sentence's action is: its nearest cluster, or (planted corpus only) the action planted there."""
    fit_sentences: Annotated[int, Field(ge=8)] = 200_000
    """The encoder and k-means are fitted on at most this many training sentences, drawn at random."""


class LanguageModelSettings(Settings):
    """The base LM: a pre-trained one by name, or a new GPT-2 of the given size."""

    name: str | None = None
    """Hub name or local folder of a causal LM that TransformerLens can bridge; unset: train a new GPT-2."""
    revision: str | None = None
    """Revision (branch, tag or commit) of a hub model."""
    trust_remote_code: bool = False
    """Let the model's folder run its own Python code. Only for models whose code you have read."""
    device_map: str | None = None
    """Where accelerate places an LM that one GPU cannot hold: auto (GPUs, then main memory, then disk), or
    a device; unset: all of it on `device`."""
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
    patience: Positive | None = None
    """Stop after this many passes without a better validation loss; unset: never. In any case, validation
    follows every pass and the best state is kept."""


class CheckpointedStageSettings(StageSettings):
    """A stage of training that can keep checkpoints."""

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

    target_temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0: the target is the sentence's action. Above 0, such as 0.1: a softmax with this temperature over the
    negative squared distances of the sentence's embedding to all centroids."""
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
    encoder_learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    """Peak learning rate of the sentence encoder, such as 1e-5, which is then trained with the planner, while
    actions stay those of the frozen encoder; 0: the encoder stays frozen."""

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
        if self.encoder_learning_rate and self.planner_frozen == 1:
            raise ValueError(
                f"encoder_learning_rate is {self.encoder_learning_rate:g}, but planner_frozen is 1, to the "
                "end: both are trained together; lower planner_frozen, or set encoder_learning_rate to 0"
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
    accumulate: Positive = 1
    """Micro-batches in an optimiser step, in every stage: less memory, the same gradient."""
    lm: CheckpointedStageSettings = CheckpointedStageSettings(epochs=4.0)
    planner: PlannerStageSettings = PlannerStageSettings(epochs=20.0, patience=3)
    adapter: CheckpointedStageSettings = CheckpointedStageSettings()
    joint: JointSettings = JointSettings()
    depth: StageSettings = StageSettings()
    base: BaseSettings = BaseSettings()


def _no_overflow(temperature: float) -> float:
    if 0.0 < temperature < 1e-3:
        raise ValueError(f"{temperature:g} is too low to divide by; give 0.001 or more, or 0")
    return temperature


class EvaluationSettings(Settings):
    """How perplexity is measured and resampled."""

    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens in an evaluation window; unset: the training window."""
    stride: Positive | None = None
    """Tokens by which windows advance; each window scores its last `stride` tokens. Unset: half a window."""
    batch_size: Positive = 32
    """Windows in one forward pass, or texts generated at once."""
    resamples: Annotated[int, Field(ge=100)] = 2000
    """Bootstrap resamples of documents for every 95 % interval."""
    questions: Positive = 400
    """Multiple-choice questions (`method: depth-ensemble`): which of four sentences of a test document comes
    next."""
    questions_file: str | None = None
    """JSON lines of `question`, `choices` and `answer`, asked in place of those."""


class GenerationSettings(Settings):
    """How text is generated, and how generated text is measured."""

    prompts: Positive = 200
    """Test documents whose beginnings are continued, for the metrics; those too short are passed over."""
    context: Positive = 128
    """A prompt goes on to the first end of a sentence behind this many tokens of its document."""
    lengths: Several[Positive] = (128, 256)
    """Tokens of a continuation at which it is compared with the true one; the longest is how many are
    generated."""
    samples: Positive = 500
    """Texts generated with no prompt, for MAUVE and latent perplexity."""
    temperature: Annotated[float, Field(ge=0.0), AfterValidator(_no_overflow)] = 1.0
    """Divides the LM's logits before a token is drawn, at least 0.001; 0 takes the most probable one."""
    top_k: Positive | None = None
    """Draw among this many most probable tokens only."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Draw among the fewest most probable tokens whose probabilities add up to this."""
    seeds: Several[Seed] | None = None
    """Seeds of what is drawn; metrics are told for each. Unset: the run's seed."""


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
    direction: Literal["means", "probe", "gradient"] = "means"
    """An action's direction: from the mean of all activations to the action's; its probe's weights, as long
    as that way; or in steps along the gradient of the probe's log-probability, as long in all (Dathathri et
    al. 2020)."""
    steps: Positive = 3
    """Steps along the gradient (gradient)."""
    strengths: Several[float] = (1.0, 2.0, 4.0)
    """By how much directions are multiplied."""
    boundaries: Annotated[int, Field(ge=2)] = 300
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
    learning_rate: Annotated[float, Field(gt=0.0)] = 0.1
    """Learning rate of Adam on the gates."""
    draws: Positive = 5
    """Random masks that the learned one is compared with."""
    documents: Annotated[int, Field(ge=2)] = 300
    """At most so many documents of each split, to learn on, to choose on and to measure on."""
