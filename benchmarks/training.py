"""Training: adapters and joint training against plain fine-tuning of the same base LM.

    python benchmarks/training.py [--device cuda] [--quick] [--repeats 3] [--out FOLDER]

A GPT-2 with random weights reads random tokens: the same windows in batches of the same size, AdamW, clipped
gradients. Plain fine-tuning trains all weights of the Hugging Face module with its fused attention kernel,
without sentences. probekit trains an adapter on soft mixing, with the planner frozen or trained (`joint`).
Through the bridge, the same adapter is trained with TransformerLens hooks; its losses must agree with those
of the plain module, which probekit uses where hooks allow.
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
    parse_options,
    race,
    run_workloads,
)
from random_lm import forward_flops, product_dtype, random_corpus, random_gpt2

from probekit.config import Config, VariantName
from probekit.data.corpus import SPLITS, Corpus
from probekit.data.windows import Windows, input_tokens
from probekit.models.backends import BridgeBackend
from probekit.models.frozen_lm import FrozenLM
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
    """The LM, the planner's actions, and the windows."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    window: int  # tokens
    batch: int  # windows in an optimiser step
    steps: int  # of the optimiser
    document_windows: int = 2  # windows in a document
    sentence: int = 16  # tokens in a sentence
    actions: int = 24
    dimensions: int = 64  # of sentence embeddings

    @property
    def tokens(self) -> int:
        """Tokens in one run."""
        return self.steps * self.batch * self.window

    @property
    def flops(self) -> float:
        """Operations of plain fine-tuning; the backward pass takes twice those of the forward pass."""
        head = 2.0 * self.width * self.vocabulary * self.tokens
        return 3.0 * (forward_flops(self.layers, self.width, self.window, self.tokens) + head)


DEMO = Shape(layers=4, width=64, heads=4, vocabulary=1536, window=64, batch=32, steps=60, sentence=8)
GPT2 = Shape(
    layers=4, width=768, heads=12, vocabulary=50_257, window=128, batch=8, steps=4,
    document_windows=4, actions=1024, dimensions=768,
)  # fmt: skip
QUICK = Shape(
    layers=3, width=16, heads=2, vocabulary=300, window=16, batch=4, steps=3,
    sentence=5, actions=8, dimensions=8,
)  # fmt: skip


def workloads(options: Options) -> dict[str, Shape]:
    """Returns the demo's LM, and one of GPT-2's width; on a GPU with all of its layers."""
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
        shape, off = self.shape, dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return random_gpt2(
            shape.layers,
            shape.width,
            shape.heads,
            shape.vocabulary,
            shape.window,
            attn_implementation="sdpa",
            **off,
        ).to(self.device)

    @cached_property
    def base(self) -> FrozenLM:
        """The frozen LM, plain and bridged."""
        return FrozenLM(lambda: copy.deepcopy(self.model), self.model.config, self.corpus.tokenizer, "gpt2")

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
        return random_corpus(
            folder,
            tokens,
            starts,
            [1 + start + shape.sentence * np.arange(n) for start, n in zip(starts, counts, strict=False)],
            split=np.append(np.zeros(len(lengths) - 1), SPLITS.index("validation")),
            embeddings=generator.normal(size=(sentences, shape.dimensions)),
            actions=generator.integers(shape.actions, size=sentences),
            centroids=generator.normal(size=(shape.actions, shape.dimensions)) / shape.dimensions**0.5,
        )


# Contestants: each takes the scene and returns the work, which returns the last loss if it is comparable.

Work = Callable[[], float | None]


def plain(scene: Scene) -> Work:
    """Fine-tuning of all weights: Hugging Face's own loss in a plain loop."""
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
            loss.item()

    return work


def _inputs(scene: Scene, windows: Windows) -> torch.Tensor:
    return input_tokens(scene.corpus, windows).to(scene.device)


def _adapter(scene: Scene, variant: VariantName, *, bridged: bool) -> Work:
    trainer = scene.trainer()
    codebook = torch.from_numpy(scene.corpus.codebook.centroids)
    planner = Planner(scene.config.planner, codebook, seed=0).to(scene.device)
    training = AdapterTraining(trainer, variant, scene.base, planner)
    if bridged:
        training.model.backend = BridgeBackend(scene.base.bridged)

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
    """Measures a workload."""
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(shape, options.device, Path(folder))
        works = {contestant: Contestant(make(scene)) for contestant, make in CONTESTANTS.items()}
        # Every run continues from the weights of the one before, for all contestants.
        outcomes = race(works, options.repeats, options.device)
        dtype = product_dtype(options.device, scene.config.training.precision)
    product = (shape.batch * shape.window, shape.width, 4 * shape.width)
    rate = best_matrix_rate(options, options.device, dtype, product)
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
    settings = {
        "ratio": f"seconds over those of {REFERENCE}",
        "speed_of_plain": f"tokens a second over those of {PLAIN}",
    }
    return run_workloads("training", options, workloads(options), measure, settings)


if __name__ == "__main__":
    main()
