"""Writing text with keys and values kept and without; perplexity by windows and by a pass for each token.

    python benchmarks/generation.py [--device cuda] [--quick] [--repeats 3] [--out FOLDER] [--only TEXT]

A GPT-2 with random weights, and a planner and an adapter of one training step, write from nothing with soft
mixing; without the cache the plain module reads the whole window again for every token. Both perplexities
score the same tokens in windows of one length, as many in a batch: one with windows that advance by half
their length, the other with a window that ends right before each token. The time of the latter is that of
some documents, scaled to the tokens of all. Random weights make nothing of their context, so how far the two
are apart in value is told for a small LM that was trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import REFERENCE, Contestant, Options, Row, compare, keep, parse_options, race

from probekit.config import Config, CorpusSettings
from probekit.data.readers import read_documents
from probekit.data.tokenizer import train_tokenizer
from probekit.data.windows import cut_windows
from probekit.evaluation.perplexity import Pass, own_losses
from probekit.generation.generate import Generated, generate
from probekit.models.mixing import VARIANTS
from probekit.progress import Progress, without_bars_of_transformers
from probekit.run.run import Run
from probekit.training.train import train

UNCACHED = "without cache"
SINGLY = "a pass for each token"
SOFT = VARIANTS["soft"].evaluation


@dataclass(frozen=True)
class Shape:
    """The LM, and how much it writes and reads.

    Attributes:
        layers: Layers of the LM.
        width: Its width.
        heads: Its attention heads.
        vocabulary: Its vocabulary.
        positions: Its positions.
        batches: Texts written at once, and the tokens of each.
        window: Tokens in a window of the perplexities.
        documents: Planted documents, a fifth of them for testing.
        sentences: Sentences in each.
        sampled: Test documents that are scored with a pass for each token.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    batches: tuple[tuple[int, int], ...]
    window: int
    documents: int
    sentences: int
    sampled: int

    @property
    def corpus(self) -> dict[str, Any]:
        """Settings of the planted corpus."""
        return {
            "corpus.planted.documents": self.documents,
            "corpus.planted.sentences": (self.sentences, self.sentences),
            "corpus.test_fraction": 0.2,
            "training.window": self.window,
            "mixing.variants": ["soft"],
        }


GPT2 = Shape(
    layers=12,
    width=768,
    heads=12,
    vocabulary=50_257,
    positions=1024,
    batches=((1, 512), (8, 128)),
    window=128,
    documents=60,
    sentences=50,
    sampled=1,
)
SMALL = Shape(
    layers=4,
    width=64,
    heads=4,
    vocabulary=1024,
    positions=64,
    batches=(),
    window=64,
    documents=800,
    sentences=50,
    sampled=20,
)
QUICK = Shape(
    layers=2,
    width=16,
    heads=2,
    vocabulary=400,
    positions=32,
    batches=((1, 24), (2, 12)),
    window=32,
    documents=40,
    sentences=12,
    sampled=2,
)


def random_run(shape: Shape, device: torch.device, folder: Path) -> Run:
    """A run whose LM has random weights; planner and adapter are trained for a step."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = Config.from_preset("demo").override(shape.corpus | {"device": str(device)})
    lm = folder / "lm"
    tokenizer = train_tokenizer(_texts(settings.corpus), min(shape.vocabulary, 1024), lm)
    size = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.positions,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["GPT2LMHeadModel"],
    )
    torch.manual_seed(0)
    with without_bars_of_transformers():
        GPT2LMHeadModel(size).save_pretrained(lm)
    hardly = {
        f"training.{stage}.{name}": value
        for stage in ("planner", "adapter")
        for name, value in {"epochs": 1e-6, "batch_size": 1}.items()
    }
    skipped = {"conditioning.skip_layers": min(2, shape.layers - 1)}
    return train(settings.override({"lm.name": str(lm), **hardly, **skipped}), folder / "random", quiet=True)


def trained_run(shape: Shape, quick: bool, device: torch.device, folder: Path) -> Run:
    """A run whose small LM was trained, on the same kind of text."""
    size = {
        "lm.layers": shape.layers,
        "lm.width": shape.width,
        "lm.heads": shape.heads,
        "lm.vocabulary": shape.vocabulary,
        "lm.positions": shape.positions,
        "conditioning.skip_layers": min(2, shape.layers - 1),
        "device": str(device),
    }
    settings = Config.from_preset("demo").override(shape.corpus | size)
    if quick:
        settings = settings.override({"training.lm.epochs": 1, "training.planner.epochs": 1})
    return train(settings, folder / "trained", quiet=True)


def _texts(settings: CorpusSettings) -> list[str]:
    return [document.text for document in read_documents(settings)]


# Writing


def writing(run: Run, shape: Shape, options: Options) -> list[Row]:
    """A row for each number of texts, with the cache and without."""
    rows: list[Row] = []
    for texts, tokens in shape.batches:
        workload = f"{tokens} tokens, batch {texts}"
        if options.only not in workload:
            continue
        print(f"{workload} ...", flush=True)
        work = {name: partial(_write, run, texts, cache=name == REFERENCE) for name in (REFERENCE, UNCACHED)}
        contestants = {
            name: Contestant(partial(write, tokens=tokens), partial(write, tokens=2))
            for name, write in work.items()
        }
        outcomes = race(contestants, options.repeats, options.device)
        true = _ids(outcomes[REFERENCE].result)
        found = [
            {
                "workload": workload,
                "contestant": name,
                **outcome.columns(),
                "tokens_a_second": texts * tokens / min(outcome.times),
                "difference": float((_ids(outcome.result) != true).mean()),
            }
            for name, outcome in outcomes.items()
        ]
        compare(found)
        rows += found
    return rows


def _write(run: Run, texts: int, *, tokens: int, cache: bool) -> list[Generated]:
    return generate(run, [""] * texts, variant="soft", tokens=tokens, cache=cache)


def _ids(texts: list[Generated]) -> np.ndarray:
    return np.concatenate([text.tokens for text in texts])


# Perplexity


def perplexities(name: str, run: Run, shape: Shape, options: Options) -> list[Row]:
    """A row for windows that advance by half their length, and one for a pass for each token."""
    workload = f"perplexity, {name}"
    if options.only not in workload:
        return []
    print(f"{workload} ...", flush=True)
    everything = run.corpus.documents("test")
    sample = everything[: shape.sampled]
    model = run.model("soft")

    def scoring(documents: np.ndarray, stride: int) -> Pass:
        windows = cut_windows(run.corpus, documents, shape.window, stride)
        evaluation, training = run.config.evaluation, run.config.training
        return Pass(run.corpus, windows, evaluation.batch_size, training.precision, run.device)

    def work(scored: Pass) -> Callable[[], float]:
        def call() -> float:
            with Progress(quiet=True).task("score") as task:
                (losses,) = scored.document_losses(own_losses(model), SOFT, task)
            return float(np.exp(losses.sum() / scored.tokens.sum()))

        return call

    half = shape.window // 2
    passes = {REFERENCE: scoring(everything, half), SINGLY: scoring(sample, 1)}
    warm_up = work(scoring(sample[:1], half))
    contestants = {each: Contestant(work(scored), warm_up) for each, scored in passes.items()}
    outcomes = race(contestants, options.repeats, options.device)
    tokens = passes[REFERENCE].tokens.sum()
    values = {REFERENCE: work(scoring(sample, half))(), SINGLY: outcomes[SINGLY].result}
    rows = [
        {
            "workload": workload,
            "contestant": each,
            "stride": half if each == REFERENCE else 1,
            "measured_tokens": int(passes[each].tokens.sum()),
            "tokens": int(tokens),
            **outcome.columns(scale=float(tokens / passes[each].tokens.sum())),
            "sample_tokens": int(passes[SINGLY].tokens.sum()),
            "sample_perplexity": values[each],
            "perplexity_difference": values[each] - values[REFERENCE],
            # A longer context is no error: both are perplexities of the same tokens.
            "difference": None,
        }
        for each, outcome in outcomes.items()
    ]
    compare(rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Makes the runs, measures, prints and writes."""
    options = parse_options(__doc__, arguments)
    large, small = (QUICK, QUICK) if options.quick else (GPT2, SMALL)
    with tempfile.TemporaryDirectory() as folder:
        print("make the runs ...", flush=True)
        random = random_run(large, options.device, Path(folder))
        rows = writing(random, large, options) + perplexities("random weights", random, large, options)
        trained = trained_run(small, options.quick, options.device, Path(folder))
        rows += perplexities("small trained LM", trained, small, options)
    keep("generation", options, {"large": asdict(large), "small": asdict(small)}, rows)
    return rows


if __name__ == "__main__":
    main()
