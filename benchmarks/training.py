"""Training: adapters and joint training against plain fine-tuning of the same base LM.

    python benchmarks/training.py [--device cuda] [--quick] [--repeats 3] [--out FOLDER]

A GPT-2 with random weights reads random tokens: the same windows in batches of the same size, AdamW, clipped
gradients. Plain fine-tuning trains all weights of the Hugging Face module with its fused attention kernel,
and knows nothing of sentences. probekit trains an adapter on soft mixing, with the planner frozen or trained
too (`joint`). Through the bridge, the same adapter is trained with TransformerLens hooks; its losses have to
agree with those of the plain module, on which probekit trains where hooks allow.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    REFERENCE,
    Contestant,
    Options,
    Row,
    best_matrix_rate,
    compare,
    keep,
    parse_options,
    race,
)

from probekit.config import Config, VariantName
from probekit.data.codebook import Codebook
from probekit.data.corpus import SPLITS, Corpus
from probekit.data.tokenizer import train_tokenizer
from probekit.data.windows import Windows, input_tokens
from probekit.models.base_lm import TUNINGS, BaseLM
from probekit.models.planner import Planner
from probekit.progress import Progress
from probekit.training.adapter import AdapterTraining
from probekit.training.trainer import Trainer

PLAIN = "plain fine-tuning"
BRIDGE = "probekit through the bridge"
SAME = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""How far losses may differ: attention kernels round differently."""


@dataclass(frozen=True)
class Shape:
    """The LM, the planner's actions, and the windows.

    Attributes:
        layers: Layers of the LM.
        width: Its width.
        heads: Its attention heads.
        vocabulary: Its vocabulary.
        window: Tokens in a window.
        batch: Windows in an optimiser step.
        steps: Optimiser steps.
        document_windows: Windows in a document.
        sentence: Tokens in a sentence.
        actions: Actions of the codebook.
        dimensions: Dimensions of sentence embeddings.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    window: int
    batch: int
    steps: int
    document_windows: int = 2
    sentence: int = 16
    actions: int = 24
    dimensions: int = 64

    @property
    def tokens(self) -> int:
        """Tokens that are trained on in one run."""
        return self.steps * self.batch * self.window

    @property
    def flops(self) -> float:
        """Of plain fine-tuning: the backward pass takes twice what the forward pass takes.

        A product's multiplication and addition count as two. Attention is counted as it is commonly computed,
        future positions included.
        """
        layer = 24 * self.width**2 + 4 * self.window * self.width
        return 3.0 * self.tokens * (self.layers * layer + 2 * self.width * self.vocabulary)


DEMO = Shape(layers=4, width=64, heads=4, vocabulary=1024, window=64, batch=32, steps=60, sentence=8)
GPT2 = Shape(
    layers=4, width=768, heads=12, vocabulary=50_257, window=128, batch=8, steps=4,
    document_windows=4, actions=1024, dimensions=768,
)  # fmt: skip
QUICK = Shape(
    layers=3,
    width=16,
    heads=2,
    vocabulary=300,
    window=16,
    batch=4,
    steps=3,
    sentence=5,
    actions=8,
    dimensions=8,
)


def workloads(options: Options) -> dict[str, Shape]:
    """The demo's LM, and one of GPT-2's width; on a GPU with all of its layers."""
    if options.quick:
        return {"tiny": QUICK}
    if options.device.type == "cpu":
        return {"demo": DEMO, "GPT-2 small, 4 layers": GPT2}
    large = replace(GPT2, layers=12, batch=32, steps=40)
    return {"demo": replace(DEMO, steps=100), "GPT-2 small": large}


class Scene:
    """The LM, the windows and the planner, as each contestant needs them."""

    def __init__(self, shape: Shape, device: torch.device, folder: Path) -> None:
        self.shape, self.device = shape, device
        self.corpus = self._corpus(folder)
        stage = {"epochs": 1, "batch_size": shape.batch, "learning_rate": 1e-4}
        self.config = Config.from_preset("demo").override(
            {
                "device": str(device),
                "training.window": shape.window,
                **{f"training.adapter.{name}": value for name, value in stage.items()},
            }
        )
        self.rows: list[Row] = []

    @cached_property
    def model(self) -> Any:
        """The plain Hugging Face LM, with its fused attention kernel."""
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = self.shape
        config = GPT2Config(
            vocab_size=shape.vocabulary,
            n_positions=shape.window,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
            architectures=["GPT2LMHeadModel"],
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return GPT2LMHeadModel(config).to(self.device)

    @cached_property
    def base(self) -> BaseLM:
        """The frozen LM, plain and bridged."""
        return BaseLM(lambda: copy.deepcopy(self.model), self.corpus.tokenizer, "gpt2")

    def trainer(self) -> Trainer:
        """What a stage needs; its rows are kept."""
        return Trainer(self.config, self.corpus, self.device, self.rows.append, Progress(quiet=True))

    def loss(self) -> float:
        """The last training loss that was logged."""
        return [row["loss"] for row in self.rows if "loss" in row][-1]

    def _corpus(self, folder: Path) -> Corpus:
        """Random documents that fill the steps, and one of a sentence to validate on, which takes no time."""
        shape, generator = self.shape, np.random.default_rng(0)
        lengths = np.full(shape.steps * shape.batch // shape.document_windows + 1, shape.document_windows)
        lengths = 1 + lengths * shape.window
        lengths[-1] = 1 + shape.sentence
        counts = -(-(lengths - 1) // shape.sentence)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        tokens = generator.integers(1, shape.vocabulary, starts[-1])
        tokens[starts[:-1]] = 0
        sentences = int(counts.sum())
        train_tokenizer(["no text is read"], 257, folder / "tokenizer")
        return Corpus(
            folder=folder,
            tokens=tokens.astype(np.uint16),
            document_tokens=starts,
            document_sentences=np.concatenate([[0], np.cumsum(counts)]),
            first_token=np.concatenate(
                [1 + begin + shape.sentence * np.arange(n) for begin, n in zip(starts, counts, strict=False)]
            ),
            spans=np.zeros((sentences, 2), dtype=np.int64),
            split=np.append(np.zeros(len(lengths) - 1), SPLITS.index("validation")).astype(np.uint8),
            embeddings=generator.normal(size=(sentences, shape.dimensions)).astype(np.float32),
            actions=generator.integers(shape.actions, size=sentences).astype(np.int32),
            codebook=Codebook(
                generator.normal(size=(shape.actions, shape.dimensions)).astype(np.float32)
                / shape.dimensions**0.5
            ),
            facts={},
        )


# Contestants: each is given the scene and returns the work, which returns the last loss if that compares.

Work = Callable[[], float | None]


def plain(scene: Scene) -> Work:
    """Fine-tuning of all weights: Hugging Face's own loss, in the loop that anybody would write."""
    model = copy.deepcopy(scene.model).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    train = scene.trainer().windows("train")

    def work() -> None:
        order = np.random.default_rng(0).permutation(len(train))
        for start in range(0, len(order), scene.shape.batch):
            tokens = _inputs(scene, train[order[start : start + scene.shape.batch]])
            with scene.trainer().autocast():
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            loss.item()  # as is shown

    return work


def _inputs(scene: Scene, windows: Windows) -> torch.Tensor:
    return input_tokens(scene.corpus, windows).to(scene.device)


def _adapter(scene: Scene, variant: VariantName, *, bridged: bool) -> Work:
    trainer = scene.trainer()
    codebook = torch.from_numpy(scene.corpus.codebook.centroids)
    planner = Planner(scene.config.planner, codebook, seed=0).to(scene.device)
    base = TUNINGS["frozen"](scene.base.plain, scene.config.training.base, 0)
    training = AdapterTraining(trainer, variant, scene.base, planner, None if bridged else base)

    def work() -> float | None:
        training.run()
        return scene.loss() if variant == "soft" else None

    return work


CONTESTANTS: dict[str, Callable[[Scene], Work]] = {
    REFERENCE: lambda scene: _adapter(scene, "soft", bridged=False),
    "probekit, joint": lambda scene: _adapter(scene, "joint", bridged=False),
    BRIDGE: lambda scene: _adapter(scene, "soft", bridged=True),
    PLAIN: plain,
}


def measure(name: str, shape: Shape, options: Options) -> list[Row]:
    """The rows of a workload."""
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(shape, options.device, Path(folder))
        works = {contestant: make(scene) for contestant, make in CONTESTANTS.items()}
        # Every run goes on with the weights that the one before left, as all contestants' do.
        outcomes = race(
            {n: Contestant(work, work) for n, work in works.items()}, options.repeats, options.device
        )
        with scene.trainer().autocast():
            device = options.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    rate = best_matrix_rate(
        options, options.device, dtype, (shape.batch * shape.window, shape.width, 4 * shape.width)
    )
    rows = []
    for contestant, outcome in outcomes.items():
        row = {"workload": name} | asdict(shape)
        row |= {"dtype": str(dtype).removeprefix("torch."), "contestant": contestant} | outcome.columns()
        row["tokens_per_second"] = shape.tokens / row["seconds"]
        if contestant == PLAIN:
            row["matrix_rate_share"] = shape.flops / row["seconds"] / rate
        loss, reference = outcome.result, outcomes[REFERENCE].result
        row["difference"] = None if loss is None else abs(loss / reference - 1)
        rows.append(row)
    compare(rows, SAME[dtype])
    bare = next(row["seconds"] for row in rows if row["contestant"] == PLAIN)
    for row in rows:
        row["speed_of_plain"] = bare / row["seconds"]
    return rows


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measures all workloads, prints and writes them."""
    options = parse_options(__doc__, arguments)
    rows = []
    for name, shape in workloads(options).items():
        if options.only not in name:
            continue
        print(f"{name} ...", flush=True)
        rows += measure(name, shape, options)
    told = {
        "ratio": f"seconds over those of {REFERENCE}",
        "speed_of_plain": f"tokens a second over those of {PLAIN}",
    }
    keep("training", options, told, rows)
    return rows


if __name__ == "__main__":
    main()
