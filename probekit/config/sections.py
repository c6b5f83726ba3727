"""Every setting, by section: its type, default and documentation, which is the help text of the commands."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeVar

from pydantic import Field, model_validator

from probekit.config.types import (
    AtLeastTwo,
    BosRule,
    Column,
    Compression,
    Count,
    LabelsPath,
    MemberName,
    NoneOrTwo,
    Positive,
    PositiveNumber,
    PositiveShare,
    ProbedName,
    Range,
    ReadAt,
    Seed,
    Settings,
    Several,
    Share,
    SolverName,
    Temperature,
    VariantName,
    Weight,
)

S = TypeVar("S")


def _heads_divide_width(section: S) -> S:
    width, heads = section.width, section.heads  # type: ignore[attr-defined]
    if width % heads:
        raise ValueError(f"heads {heads} does not divide width {width}")
    return section


class PlantedSettings(Settings):
    """The synthetic corpus with a known plan (`corpus.reader: planted`)."""

    documents: Annotated[int, Field(ge=4)] = 6000
    """Number of documents to generate."""
    actions: Annotated[int, Field(ge=2, le=4096)] = 24
    """Number of planted actions."""
    types: Positive = 4
    """Number of hidden document types, each with its own action-to-action transitions."""
    examples: Positive = 1
    """Examples in a document, each on a line and with a chain of actions of its own, all of the document's
    type; above 1, what is said of the sentences of a document holds for each example."""
    successors: Positive = 3
    """Actions that can follow an action within one document type; fewer means a more certain plan."""
    sentences: Range = (10, 16)
    """Fewest and most sentences in a document, at least 2."""
    words: Range = (4, 8)
    """Fewest and most words in a sentence."""
    vocabulary: AtLeastTwo = 240
    """Number of distinct words."""
    concentration: PositiveNumber = 0.05
    """Dirichlet concentration of an action's distribution over words; smaller means words that say more."""
    seed: Seed = 0
    """Seed of the planted plan and its documents."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.successors > self.actions:
            raise ValueError(f"successors {self.successors} exceeds actions {self.actions}")
        if self.sentences[0] < 2:
            raise ValueError(f"sentences begins at {self.sentences[0]}; a document needs at least 2")
        if self.examples > 1 and self.sentences[0] < self.sentences[1]:
            raise ValueError(
                f"sentences is {self.sentences[0]} to {self.sentences[1]}; examples {self.examples} need one "
                "length, such as 3 3, so that it is known where they end"
            )
        return self


class CorpusSettings(Settings):
    """Where text comes from and how documents are split."""

    reader: Literal[
        "auto", "planted", "text", "lines", "wikitext", "jsonl", "csv", "parquet", "huggingface"
    ] = "auto"
    """Format: the planted corpus, text files (a document each, or one a line), WikiText files (articles split
    at ` = Title = `), JSON lines, CSV (or TSV) or Parquet with a text column, or a Hugging Face dataset;
    auto: by the ending of each file, which may be compressed (.gz, .zst)."""
    path: str | None = None
    """File or folder to read; for `huggingface`, the dataset's hub name or local folder."""
    separator: str | None = None
    """Line that separates documents in text files, such as <|endoftext|>, or an empty text for blank lines;
    unset: a file is one document."""
    text_column: Column = "text"
    """Column that holds the text, or a chat: a list of {role, content} that the tokenizer's chat template
    writes out (jsonl, csv, parquet, huggingface)."""
    group_column: Column | None = None
    """Column that holds a group, such as an author or a topic (jsonl, csv, parquet, huggingface). No group is
    in two splits, and intervals resample groups. Unset: every text, with its copies, is a group."""
    split_column: Column | None = None
    """Column that holds train, probe, validation or test; unset: the splits are drawn at random."""
    distinct: bool = False
    """Read a text that several rows hold once, such as that of a table of labels with several rows a text."""
    missing: Literal["refuse", "skip"] = "refuse"
    """What to do with rows that hold no text; those that are skipped are counted among the blank ones."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset, such as 20231101.en."""
    dataset_split: str = "train"
    """Split of a Hugging Face dataset to read. all: every split, with a column `split` that says which; its
    `train` is `probe` here, where probes are fitted."""
    encoding: str = "utf-8"
    """Character encoding of text files."""
    language: str = "en"
    """Language code for the sentence splitter."""
    max_documents: Positive | None = None
    """Read at most this many documents."""
    max_sentences: Annotated[int, Field(ge=2)] | None = None
    """Read at most this many sentences of each text: as intervals resample documents, many openings tell more
    than a few whole texts. Chats are read whole."""
    probe_fraction: Share = 0.2
    """Share of documents that LM and planner are not trained on; probes are fitted on them."""
    validation_fraction: PositiveShare = 0.1
    """Share of documents that hyperparameters and early stopping are chosen on."""
    test_fraction: PositiveShare = 0.1
    """Share of documents that every reported number is computed on."""
    seed: Seed = 0
    """Seed of the splits, the encoder and the codebook. It is separate from the run's seed,
    so that runs with different seeds share the corpus."""
    planted: PlantedSettings = PlantedSettings()

    @model_validator(mode="after")
    def _leaves_training_documents(self) -> Self:
        held_out = self.probe_fraction + self.validation_fraction + self.test_fraction
        if held_out > 1.0 + 1e-9:
            raise ValueError(
                f"probe_fraction + validation_fraction + test_fraction is {held_out:g}; it must be at "
                "most 1, and below to leave training documents"
            )
        return self


class ActionSettings(Settings):
    """How sentences become actions."""

    encoder: str = "tfidf"
    """Sentence encoder: `tfidf` (TF-IDF + truncated SVD, fitted on the corpus) or the hub name or folder of
    a sentence-transformers model."""
    dimensions: Positive = 64
    """Dimensions of the `tfidf` encoder's embeddings."""
    long_sentences: Literal["cut", "mean"] = "cut"
    """What a pre-trained encoder does with sentences that are longer than it reads: it reads their beginning,
    or their pieces, whose embeddings are averaged. Either way they are counted."""
    k: Annotated[int, Field(ge=8, le=4096)] = 256
    """Number of clusters of the codebook."""
    labels: Literal["clusters", "planted", "none"] = "clusters"
    """What a sentence's action is: its nearest cluster, or (planted corpus only) the action planted there;
    none: nothing is clustered and sentences have no action, for probes of other targets."""
    fit_sentences: Annotated[int, Field(ge=8)] = 200_000
    """The encoder and k-means are fitted on at most this many training sentences, drawn at random."""


class LanguageModelSettings(Settings):
    """The base LM: a pre-trained one by name, or a new GPT-2 of the given size."""

    name: str | None = None
    """Hub name, local folder or GGUF file of an LM that TransformerLens can bridge; unset: train a new
    GPT-2."""
    revision: str | None = None
    """Revision (branch, tag or commit) of a hub model."""
    trust_remote_code: bool = False
    """Let the model's folder run its own Python code. Only for models whose code you have read."""
    bos: BosRule | Literal["auto"] = "auto"
    """Where the LM reads the beginning-of-sequence token (for want of one, the end-of-sequence token): at the
    start of every window, only at that of a document, or never. auto: every-window where the tokenizer adds
    it by itself (Llama, Gemma), document where it is also the end-of-sequence token (GPT-2, any new LM), else
    none (Qwen, BLOOM)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Numbers in which the LM's weights are held. auto: the checkpoint's own, but on a CPU bfloat16 in place
    of any half precision if the CPU has units for it, else float32. Whatever is trained stays float32."""
    device_map: str | None = None
    """Where accelerate places an LM that one GPU cannot hold: auto (GPUs, then main memory, then disk), or
    a device; unset: all of it on `device`."""
    compress: Compression | None = None
    """Compress the weights of the layers' linear maps once they are loaded, to see what is lost: int8 (each
    output's weights rounded to 255 levels), prune=0.5 (this share of each map's, the smallest, set to 0), or
    rank=64 (the nearest maps of this rank). They keep their dtype, so that nothing is saved."""
    layers: Positive = 4
    """Layers of a new LM."""
    width: Positive = 128
    """Residual stream width (d_model) of a new LM."""
    heads: Positive = 4
    """Attention heads of a new LM."""
    positions: AtLeastTwo = 128
    """Positions of a new LM: the longest window it can read, in tokens."""
    vocabulary: Annotated[int, Field(ge=257)] = 4096
    """Vocabulary size of the byte-level BPE tokenizer trained for a new LM."""

    _check_heads = model_validator(mode="after")(_heads_divide_width)


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

    _check_heads = model_validator(mode="after")(_heads_divide_width)


class ConditioningSettings(Settings):
    """Where and how the action's embedding enters the LM."""

    kind: Literal["adapter", "embedding", "token"] = "adapter"
    """adapter: a projection added in every layer but the first ones; embedding: one projection added to the
    embedding of every token; token: a planning token before every sentence, whose embedding it is."""
    location: str = "attn.hook_z"
    """TransformerLens hook, without the `blocks.L.` before it, where an adapter adds the projected action."""
    skip_layers: Count = 2
    """Number of bottom layers to which an adapter adds nothing."""


class MixingSettings(Settings):
    """How the action that conditions the LM is chosen."""

    variants: Several[VariantName] = ("fixed", "oracle", "predicted", "soft", "joint")
    """Variants to train and compare, each with its own adapter; soft keeps the planner frozen, joint is soft
    mixing with the planner trained too. The base LM alone (none) is always evaluated."""
    temperature: PositiveNumber = 1.0
    """Temperature of the softmax over scores (soft, joint, straight-through, gumbel)."""
    learn_temperature: bool = False
    """Train the temperature with the adapter, from that value on."""
    fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Variant mixed: the share of sentences that carry the planner's action in training, drawn for each
    sentence; the others carry the true one. 0 is oracle, 1 is predicted."""


class DistillationSettings(Settings):
    """Distillation from the last layer into the earlier ones (member distilled)."""

    weight: Weight = 0.1
    """Weight of the divergences, summed over layers, added to the ensemble's cross-entropy."""
    direction: Literal["layer-from-last", "last-from-layer"] = "layer-from-last"
    """KL(layer || last), as in the paper, or KL(last || layer), usual in distillation."""


class DepthSettings(Settings):
    """Depth ensemble: late layers' logits, weighted by a router (`method: depth-ensemble`)."""

    members: Several[MemberName] = ("plain", "repeated", "ensemble", "distilled")
    """What is trained and compared: plain, the last layer alone, which is the tuned LM as it is; repeated,
    the last layer as often as there are layers in an ensemble, each time with a norm of its own: as many
    parameters, no depth; ensemble; distilled, the ensemble whose layers learn from the last one."""
    layers: Positive = 3
    """How many of the last layers are in an ensemble."""
    top_k: Positive | None = None
    """Router weights of a token that are kept and renormalised; unset: all. With 1, that weight is always 1,
    and the router learns nothing."""
    last_weight: PositiveShare = 0.9
    """Weight of the last layer before training; the others share the rest."""
    layer_loss: Weight = 0.0
    """Weight of every single layer's cross-entropy, added to the ensemble's."""
    distillation: DistillationSettings = DistillationSettings()
    variant: VariantName = "none"
    """LM of the ensemble: none, the base LM; or the LM conditioned by this variant's adapter, which is
    trained first and then frozen."""

    @model_validator(mode="after")
    def _no_more_weights_than_layers(self) -> Self:
        if self.top_k is not None and self.top_k > self.layers:
            raise ValueError(f"top_k {self.top_k} exceeds layers {self.layers}, and only these have weights")
        return self


class StageSettings(Settings):
    """One stage of training."""

    epochs: PositiveNumber = 1.0
    """Passes over the training documents."""
    batch_size: Positive = 32
    """Windows (LM and adapter) or documents (planner) per optimiser step."""
    learning_rate: PositiveNumber = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: Weight = 0.0
    """AdamW weight decay, on matrices only."""
    patience: Positive | None = None
    """Stop after this many passes without a better validation loss; unset: never. In any case, validation
    follows every pass and the best state is kept."""


class CheckpointedStageSettings(StageSettings):
    """A stage of training that can keep checkpoints."""

    checkpoints: NoneOrTwo = 0
    """How many checkpoints to keep, from before the first step to the last, evenly spaced in the logarithm of
    the step. Each is a run of its own, which `probekit probe --checkpoints` probes."""


class PlannerStageSettings(StageSettings):
    """Training of the planner."""

    target_temperature: Weight = 0.0
    """0: the target is the sentence's action. Above 0, such as 0.1: a softmax with this temperature over the
    negative squared distances of the sentence's embedding to all centroids."""
    folds: NoneOrTwo = 0
    """Folds of out-of-fold planners, for small corpora: adapters with a frozen planner are trained on the
    scores of a planner that has not seen the document. 0: on the planner's own scores."""


class JointSettings(Settings):
    """What joint training (planner and adapter together) adds to the adapter stage."""

    planner_frozen: Weight = 0.0
    """How long the planner, and an encoder that is trained with it, stay frozen: up to 1 a share of the steps
    (0: never, 1: to the end), above 1 a number of steps. Their warm-up follows."""
    planner_learning_rate: Weight = 1e-4
    """Peak learning rate of the planner during joint training; gentler than the adapter's."""
    planner_loss_weight: Weight = 1.0
    """Weight of the planner's own cross-entropy, which is added to the next-token loss."""
    end_to_end: bool = True
    """Whether the next-token loss trains the planner too. If not, only its own cross-entropy does: a control
    for the effect of training the planner longer."""
    encoder_learning_rate: Weight = 0.0
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


class TuningSettings(Settings):
    """Tuning of the base LM together with an adapter or depth ensemble, each of which then has its own LM."""

    tuning: Literal["frozen", "lora", "full"] = "frozen"
    """frozen: the adapter alone is trained; lora: low-rank updates of the linear maps too (Hu et al. 2021);
    full: all weights too."""
    learning_rate: PositiveNumber = 1e-4
    """Peak learning rate of the base LM (lora, full)."""
    rank: Positive = 8
    """Rank of the updates (lora)."""
    last_layers: Positive | None = None
    """Updates in this many of the last layers only (lora); unset: in all."""


class TrainingSettings(Settings):
    """The stages of training, in their order."""

    window: AtLeastTwo = 128
    """Tokens in a training window."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the forward pass; auto is bfloat16 autocast on a GPU that has it, float32 elsewhere."""
    save_minutes: Weight = 5.0
    """Minutes between saved states of a stage, which --resume continues from."""
    accumulate: Positive = 1
    """Micro-batches in an optimiser step, in every stage: less memory, the same gradient."""
    lm: CheckpointedStageSettings = CheckpointedStageSettings(epochs=4.0)
    planner: PlannerStageSettings = PlannerStageSettings(epochs=20.0, patience=3)
    adapter: CheckpointedStageSettings = CheckpointedStageSettings()
    joint: JointSettings = JointSettings()
    depth: StageSettings = StageSettings()
    base: TuningSettings = TuningSettings()


class EvaluationSettings(Settings):
    """How perplexity is measured and resampled."""

    window: AtLeastTwo | None = None
    """Tokens in an evaluation window; unset: the training window."""
    stride: Positive | None = None
    """Tokens by which windows advance; each window scores its last `stride` tokens. Unset: half a window."""
    batch_size: Positive = 32
    """Windows in one forward pass, or texts generated at once."""
    resamples: Annotated[int, Field(ge=100, le=1_000_000)] = 2000
    """Bootstrap resamples of documents for every 95 % interval."""
    questions: Positive = 400
    """Multiple-choice questions (`method: depth-ensemble`): which of four sentences of a test document comes
    next."""
    questions_file: str | None = None
    """JSON lines of `question`, `choices` and `answer`, asked in place of those."""


class GenerationSettings(Settings):
    """How text is generated, and how generated text is measured."""

    prompts: Positive = 200
    """Test documents whose beginnings are continued; documents that are too short are skipped."""
    context: Positive = 128
    """A prompt ends at the first end of a sentence after this many tokens of its document."""
    lengths: Several[Positive] = (128, 256)
    """Tokens of a continuation at which it is compared with the true one; the longest is how many are
    generated."""
    samples: Positive = 500
    """Texts generated with no prompt, for MAUVE and latent perplexity."""
    temperature: Temperature = 1.0
    """Divides the LM's logits before a token is drawn, at least 0.001; 0 takes the most probable one."""
    top_k: Positive | None = None
    """Draw among this many most probable tokens only."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Draw among the smallest set of most probable tokens whose probabilities add up to this."""
    seeds: Several[Seed] | None = None
    """Seeds of the drawn tokens; metrics are reported for each. Unset: the run's seed."""


class ProbeSettings(Settings):
    """The probe grid."""

    target: str = "action"
    """What is read: action, embedding (of sentences), token, sentence-position, document-type (planted corpus
    only), or a column of the table of labels."""
    kind: Literal["auto", "classes", "numbers"] = "auto"
    """What a column of labels holds: classes, or numbers, which ridge probes read. auto: numbers if some have
    fractions or more than 4,096 are different; lists of numbers are vectors, which ridge probes read, too."""
    labels: LabelsPath = None
    """Table of labels: CSV, TSV, JSON lines or Parquet, which may be compressed, or a Hugging Face dataset. A
    row labels the text or chat in `text_column`, or that of `document` (number or name); or its `sentence` of
    this number, from 0 on; or its characters from `start` to before `end`. `probekit corpus RUN --export
    FILE` writes one to fill in."""
    text_column: Column | None = None
    """Column of the table of labels that holds the documents' texts; unset: rows are found by `document`, or
    else by corpus.text_column."""
    transfer: Column | None = None
    """Column of the labels, such as topic: probes fitted on each value alone are tested on all values."""
    roles: Several[Column] | None = None
    """Of a chat, each message of these roles is labelled, such as assistant; unset: the whole chat."""
    anchors: Literal["start", "token"] = "start"
    """start: every sentence (or labelled range) is an example, and positions count from its first token;
    token: every token of it is one."""
    variants: Several[ProbedName] = ("none", "random")
    """Variants whose activations are read; none is the base LM without conditioning, random is the same
    architecture with random weights."""
    locations: Several[str] = ("hook_resid_post",)
    """TransformerLens hooks, without the `blocks.L.` before them, that are read. With `:before` after it,
    the conditioned location as it was before the action was added."""
    layers: Several[Count] | None = None
    """Layers that are read; unset: all."""
    positions: Several[ReadAt] | None = None
    """Where activations are read. A number of tokens before the example's first one: 1 is the token right
    before it, 0 the first one itself, -1 the one after it; first, last, last-1: these tokens of the example;
    mean: the mean over all its tokens. All positions share the examples that each reaches. Unset: 1 2 3 4 6
    8, or last for labels of texts and spans."""
    horizons: Several[Positive] = (1,)
    """Sentences ahead: 1 is the example's own sentence, 2 the one after it."""
    solvers: Several[SolverName] = ("softmax",)
    """softmax: softmax regression; ridge, lda, mean-difference (nearest class mean): closed form, at the cost
    of about one forward pass; l1: softmax regression on few features; mlp: one hidden layer, for information
    that is not linear; logit-lens, tuned-lens: the LM's own head (target token). Targets that are numbers
    or vectors are read by ridge alone."""
    l2: Several[PositiveNumber] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """L2 penalties tried (softmax, ridge); each probe keeps the best on validation documents. Unit: per
    example, on standardised activations."""
    l1: Several[PositiveNumber] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    """L1 penalties tried (l1), in the same way."""
    shrinkage: Several[Annotated[float, Field(gt=0.0, le=1.0)]] = (0.01, 0.1, 0.3, 0.6, 0.9)
    """Shrinkage of the covariance tried (lda), from near 0 to 1, which leaves a multiple of the identity."""
    hidden: Annotated[int, Field(ge=1, le=65_536)] = 64
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
    geometry: bool = False
    """Measure the geometry of the activations that probes are fitted and chosen on, too: effective rank,
    anisotropy, norms and rogue features. It takes more examples than the LM has features."""
    window: AtLeastTwo | None = None
    """Tokens that the LM reads at once; longer documents are read in windows that overlap by 512 tokens, or
    by half a window if that is less. Unset: 2,048, or what the LM reads, a new one what it was trained on."""
    memory: PositiveNumber = 2.0
    """Gigabytes of main memory for activations, in the LM's dtype; the rest goes into a temporary file in
    the run's folder. Closed-form solvers alone hold sums, and so do causal tests: they read further hook
    points in further passes."""


class InterventionSettings(Settings):
    """Causal tests of what probes read."""

    variant: VariantName = "none"
    """Variant whose activations are changed; it must have been probed."""
    locations: Several[str] = ("hook_resid_post",)
    """TransformerLens hooks, without the `blocks.L.` before them, that are changed."""
    layers: Several[Count] | None = None
    """Layers that are changed, one at a time; unset: those that were probed."""
    distances: Several[Positive] = (1, 2, 4)
    """Tokens before the next sentence at which activations are changed."""
    span: bool = True
    """Change all tokens from that distance up to the next sentence at once; false: only the token there."""
    kinds: Several[Literal["erase", "steer", "patch", "codebook"]] = ("erase", "steer", "patch")
    """erase: what a linear probe can read is taken away; steer: the direction of an action is added; patch:
    another document's activation is put in place; codebook: a conditioned variant is given another plan."""
    eraser: Literal["leace", "inlp"] = "leace"
    """LEACE (Belrose et al. 2023), or iterative null-space projection (Ravfogel et al. 2020)."""
    direction: Literal["means", "probe", "gradient"] = "means"
    """An action's direction: means, from the mean of all activations to the action's mean; probe, the weights
    of its probe; gradient, steps along the gradient of the probe's log-probability (Dathathri et al. 2020).
    All have the length of means."""
    steps: Positive = 3
    """Steps along the gradient (gradient)."""
    strengths: Several[float] = (1.0, 2.0, 4.0)
    """Factors that directions are multiplied by."""
    boundaries: AtLeastTwo = 300
    """Test documents, in each of which one sentence boundary is changed."""
    samples: Count = 0
    """Boundaries after which the next sentence is also generated, to see which action it has; slow."""


class ContinuationSettings(Settings):
    """What the LM writes on after the activation before a sentence, alone in an empty context."""

    layers: Several[Count] | None = None
    """Layers whose activation is put there, one at a time; unset: all. All together are always tried, too."""
    horizons: Several[Positive] = (1, 2)
    """Sentences ahead: 1 compares what is written first with the next sentence, 2 the second with the one
    after it."""
    boundaries: AtLeastTwo = 200
    """Test documents, in each of which the LM writes on before one sentence."""
    tokens: Positive = 48
    """Tokens that are written; a sentence that they do not reach counts as unlike the true one."""


class SubnetworkSettings(Settings):
    """Which components (attention heads, parts of the adapter) the next action's information needs."""

    variant: VariantName = "none"
    """Variant whose components are removed; it must have been probed."""
    keep: Weight = 1.0
    """Weight of the divergence (nats) from the whole LM's predictions of all tokens but the first ones of
    sentences, relative to the information (nats) that a probe reads from the last layer."""
    penalties: Several[Weight] = (0.003, 0.01, 0.03)
    """Penalties tried on every removed component, in nats; a mask is learned with each, and validation
    documents choose."""
    steps: Positive = 100
    """Steps of learning each mask."""
    learning_rate: PositiveNumber = 0.1
    """Learning rate of Adam on the gates."""
    draws: Positive = 5
    """Random masks that the learned mask is compared with."""
    documents: AtLeastTwo = 300
    """Most documents of each split, to learn, to choose and to measure on."""
