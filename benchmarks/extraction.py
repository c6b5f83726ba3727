"""Reading activations: probekit against the bare forward pass, and against what a user would do instead.

    python benchmarks/extraction.py [--device cuda] [--quick] [--repeats 3] [--out FOLDER]

A GPT-2 with random weights reads random tokens, every document one window; what is read are residual streams
of the first layers at a few positions of every window. All readers but the bare forward pass, the limit, add
up what they read; the sums must agree. A sweep of closed-form probes costs reading and adding, which grow
with the documents as the bare forward pass does, and solving, which does not. All shares of the matrix rate
are shares of the operations of the bare forward pass.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
    peak_memory,
    race,
    run_workloads,
)
from random_lm import forward_flops, product_dtype, random_corpus, random_gpt2
from torch import Tensor, nn

from probekit.config import Config, ProbeSettings
from probekit.distributed import autocast
from probekit.models.language_model import bridge
from probekit.probing.activations import ActivationReader
from probekit.probing.solvers import Moments, RidgeProbes
from probekit.probing.targets import Examples
from probekit.progress import without_bars_of_transformers
from probekit.run.run import Run

LOCATION = "hook_resid_post"
PRECISION = Config().training.precision
SAME = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
"""How far sums of activations may differ: attention kernels round differently."""


@dataclass(frozen=True)
class Shape:
    """The LM and what is read of it; a document is one window."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    window: int  # tokens
    documents: int
    batch: int  # windows in one forward pass
    read_layers: int  # the first layers, which are read
    spacing: int = 16  # tokens from one anchor to the next
    distances: tuple[int, ...] = (1, 2, 4, 8)
    classes: int = 256  # of the closed-form probes

    @property
    def anchors(self) -> np.ndarray:
        """Positions of the anchors in a document `[anchors]`."""
        return np.arange(max(self.spacing, *self.distances), self.window, self.spacing)

    @property
    def flops(self) -> float:
        """Operations of the bare forward pass."""
        return forward_flops(self.read_layers, self.width, self.window, self.documents * self.window)


GPT2 = Shape(
    layers=12, width=768, heads=12, vocabulary=50_257, window=128, documents=96, batch=8, read_layers=12
)
GRID = replace(
    GPT2, window=1024, documents=1024, batch=32, spacing=1, distances=tuple(range(1, 33)), classes=1024
)
"""A million positions, each read at 32 distances."""
QUICK = Shape(
    layers=3, width=16, heads=2, vocabulary=300, window=32, documents=6, batch=4, read_layers=3, classes=4
)


def workloads(options: Options) -> dict[str, Shape]:
    """Returns all layers, and half of them, after which a reader can stop; on a GPU also a whole grid."""
    if options.quick:
        return {"every layer": QUICK, "lower layers": replace(QUICK, read_layers=2)}
    if options.device.type == "cpu":
        return {"every layer": GPT2, "lower layers": replace(GPT2, read_layers=GPT2.layers // 2)}
    shape = replace(GPT2, documents=4096, batch=64)
    lower = replace(shape, read_layers=shape.layers // 2)
    return {"every layer": shape, "lower layers": lower, "the whole grid": GRID}


class Scene:
    """The LM and the documents, as each contestant needs them."""

    def __init__(self, shape: Shape, device: torch.device, folder: Path) -> None:
        self.shape, self.device, self.folder = shape, device, folder
        generator = np.random.default_rng(0)
        tokens = generator.integers(1, shape.vocabulary, (shape.documents, shape.window + 1))
        tokens[:, 0] = 0
        starts = np.arange(shape.documents + 1) * tokens.shape[1]
        sentences = shape.documents * len(shape.anchors)
        self.corpus = random_corpus(
            folder / "corpus",
            tokens.ravel(),
            starts,
            [start + shape.anchors for start in starts[:-1]],
            split=np.zeros(shape.documents),
            embeddings=np.zeros((sentences, 1)),
            actions=generator.integers(shape.classes, size=sentences),
            centroids=np.zeros((shape.classes, 1)),
        )
        self.windows = torch.from_numpy(tokens[:, :-1]).to(device)
        self.columns = torch.from_numpy(shape.anchors - np.array(shape.distances)[:, None]).to(device)

    @cached_property
    def model(self) -> Any:
        """The plain Hugging Face LM, with its fused attention kernel."""
        shape = self.shape
        model = random_gpt2(
            shape.layers, shape.width, shape.heads, shape.vocabulary, shape.window, attn_implementation="sdpa"
        )
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def run(self) -> Run:
        """A run with only the LM and the documents."""
        shape = self.shape
        settings = {
            "device": str(self.device),
            "training.window": shape.window,
            "evaluation.batch_size": shape.batch,
        }
        run = Run.begin(self.folder / "run", Config().override(settings))
        with without_bars_of_transformers():
            self.model.save_pretrained(run.folder / "lm")
        run.mark_finished("lm", {})
        run.__dict__["corpus"] = self.corpus  # in place of the one that the folder would hold
        return run

    @property
    def examples(self) -> Examples:
        """All anchors."""
        corpus, anchors = self.corpus, len(self.shape.anchors)
        document = np.repeat(np.arange(self.shape.documents), anchors)
        labels = corpus.actions[:, None].astype(np.int64)
        return Examples.of_tokens(document, corpus.first_token, np.arange(len(document)), labels)

    def batches(self) -> Iterator[Tensor]:
        """Yields tokens `[windows, positions]`, a batch at a time."""
        yield from self.windows.split(self.shape.batch)

    def arithmetic(self) -> Any:
        """The arithmetic of the forward passes."""
        return autocast(self.device, PRECISION)

    def zeros(self) -> Tensor:
        """Sums of what is read `[layers, distances, width]`."""
        shape = self.shape
        return torch.zeros(
            shape.read_layers, len(shape.distances), shape.width, dtype=torch.float64, device=self.device
        )

    def add(self, sums: Tensor, layer: int, activations: Tensor) -> None:
        """Adds up one layer's activations `[windows, positions, width]` at the positions that are read."""
        sums[layer] += activations[:, self.columns].float().sum((0, 2), dtype=torch.float64)


# Contestants: each takes the scene and returns the work, which returns the sums of what it read.

Work = Callable[[], Tensor | None]


def bare_forward(scene: Scene) -> Work:
    """The plain module up to the last layer that is read: no logits, no hooks, nothing read."""
    model = _body(scene, scene.shape.read_layers)

    def work() -> None:
        with torch.inference_mode(), scene.arithmetic():
            for tokens in scene.batches():
                model(tokens, use_cache=False)

    return work


def hidden_states(scene: Scene) -> Work:
    """Hugging Face's `output_hidden_states`; it runs all layers, whichever are wanted."""
    model = _body(scene, scene.shape.layers)

    def work() -> Tensor:
        sums = scene.zeros()
        with torch.inference_mode(), scene.arithmetic():
            for tokens in scene.batches():
                states = model(tokens, use_cache=False, output_hidden_states=True).hidden_states
                for layer in range(scene.shape.read_layers):
                    scene.add(sums, layer, states[layer + 1])
        return sums

    return work


def transformer_lens(scene: Scene) -> Work:
    """`run_with_cache`, of the residual streams alone and without attention maps.

    It stops after the last layer that is read, but computes logits where that is the LM's last.
    """
    names = [f"blocks.{layer}.{LOCATION}" for layer in range(scene.shape.read_layers)]
    bridged = bridge(copy.deepcopy(scene.model), scene.corpus.tokenizer, "gpt2")

    def work() -> Tensor:
        sums = scene.zeros()
        with torch.inference_mode(), scene.arithmetic():
            for tokens in scene.batches():
                _, cache = bridged.run_with_cache(
                    tokens,
                    names_filter=names,
                    output_attentions=False,
                    stop_at_layer=scene.shape.read_layers,
                    return_type=None,
                )
                for layer, name in enumerate(names):
                    scene.add(sums, layer, cache[name])
        return sums

    return work


def probekit_reader(scene: Scene) -> Work:
    """The reader of `probekit probe`."""
    reader = _reader(scene)

    def work() -> Tensor:
        sums = scene.zeros()
        for _, (block,) in reader.chunks(scene.examples):
            sums += block.sum(2, dtype=torch.float64)
        return sums

    return work


def closed_form_sums(scene: Scene) -> Work:
    """Reading, and adding up the sums from which closed-form probes are solved."""
    reader = _reader(scene)

    def work() -> None:
        _moments(scene, reader)

    return work


def closed_form_solve(scene: Scene) -> Work:
    """Solving ridge probes with every default penalty: once, however many examples there were."""
    moments = _moments(scene, _reader(scene))

    def work() -> None:
        RidgeProbes(ProbeSettings().l2).fit_moments(moments)

    return work


SOLVE = "probekit, closed form: solve"
CONTESTANTS: dict[str, Callable[[Scene], Work]] = {
    "probekit": probekit_reader,
    "bare forward": bare_forward,
    "output_hidden_states": hidden_states,
    "TransformerLens": transformer_lens,
    "probekit, closed form: read and add": closed_form_sums,
    SOLVE: closed_form_solve,
}


def _body(scene: Scene, layers: int) -> Any:
    """A copy of the plain module's first layers, without its final norm: the residual stream."""
    model = copy.deepcopy(scene.model.transformer)
    model.h = nn.ModuleList(model.h[:layers])
    model.config.num_hidden_layers = layers
    model.ln_f = nn.Identity()
    return model


def _reader(scene: Scene) -> ActivationReader:
    places = [(LOCATION, layer) for layer in range(scene.shape.read_layers)]
    return ActivationReader(scene.run, "none", places, scene.shape.distances)


def _moments(scene: Scene, reader: ActivationReader) -> Moments:
    shape, examples = scene.shape, scene.examples
    probes = shape.read_layers * len(shape.distances)
    labels = torch.from_numpy(examples.labels[:, 0]).to(scene.device)
    moments = Moments.zeros(probes, shape.width, shape.classes, scene.device)
    for rows, (block,) in reader.chunks(examples):
        moments.add(block.flatten(0, 1), labels[rows])
    return moments


def measure(name: str, shape: Shape, options: Options) -> list[Row]:
    """Measures a workload."""
    dtype = product_dtype(options.device, PRECISION)
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(shape, options.device, Path(folder))
        works = {contestant: Contestant(make(scene)) for contestant, make in CONTESTANTS.items()}
        outcomes = race(works, options.repeats, options.device)
    product = (shape.batch * shape.window, shape.width, 4 * shape.width)
    rate = best_matrix_rate(options, options.device, dtype, product)
    sums = outcomes[REFERENCE].result
    rows = []
    for contestant, outcome in outcomes.items():
        row = {"workload": name} | asdict(shape)
        row |= {"dtype": str(dtype).removeprefix("torch."), "contestant": contestant} | outcome.columns()
        if contestant != SOLVE:
            row["tokens_per_second"] = shape.documents * shape.window / row["seconds"]
            row["matrix_rate_share"] = shape.flops / row["seconds"] / rate
        row["difference"] = None if outcome.result is None else _difference(outcome.result, sums)
        if shape.read_layers == shape.layers and (contestant == REFERENCE or not options.quick):
            row |= peak_memory(prepare, options.device, shape=asdict(shape), name=contestant)
        rows.append(row)
    compare(rows, SAME[dtype])
    bare = next(row["seconds"] for row in rows if row["contestant"] == "bare forward")
    for row in rows:
        row["ratio_to_bare_forward"] = row["seconds"] / bare
    return rows


def _difference(sums: Tensor, reference: Tensor) -> float:
    """The largest difference in any layer, as a share of that layer's largest sum."""
    apart = (sums - reference).abs().amax((1, 2)) / reference.abs().amax((1, 2))
    return float(apart.max())


def prepare(device: str, shape: dict[str, Any], name: str) -> Callable[[], Any]:
    """Prepares a scene; the call is one contestant's work."""
    folder = tempfile.TemporaryDirectory()
    distances = tuple(shape["distances"])
    scene = Scene(Shape(**(shape | {"distances": distances})), torch.device(device), Path(folder.name))
    work = CONTESTANTS[name](scene)

    def call(_: Any = folder) -> None:  # the folder is removed with the call
        work()

    return call


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measures all workloads, prints and writes them."""
    options = parse_options(__doc__, arguments)
    settings = {"location": LOCATION, "ratio": f"seconds over those of {REFERENCE}"}
    return run_workloads("extraction", options, workloads(options), measure, settings)


if __name__ == "__main__":
    main()
