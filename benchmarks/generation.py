"""Generating text with and without cached keys and values; perplexity by windows and token by token.

    python benchmarks/generation.py [--device cuda] [--quick] [--repeats 3] [--out FOLDER] [--only TEXT]

A GPT-2 with random weights, and a planner and an adapter of one training step, generate text from nothing
with soft mixing; without the cache the plain module reads the whole window again for every token. Both
perplexities score the same tokens in windows of one length, as many in a batch: one with windows that
advance by half their length, the other with a window that ends right before each token, timed on some
documents and scaled to the tokens of all. How far their values are apart is reported for a small trained LM,
since random weights make nothing of their context.
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
from random_lm import random_gpt2

from probekit.config import Config
from probekit.data.readers import read_documents
from probekit.data.tokenizer import train_tokenizer
from probekit.data.windows import cut_windows
from probekit.evaluation.perplexity import EvaluationPass, own_losses
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
    """The LM, and how much it generates and scores."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    positions: int
    batches: tuple[tuple[int, int], ...]  # texts generated at once, and tokens of each
    window: int  # tokens in a window of the perplexities
    documents: int  # planted, a fifth of them for testing
    sentences: int  # in each
    sampled: int  # test documents that are scored with a pass for each token

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
    layers=12, width=768, heads=12, vocabulary=50_257, positions=1024, batches=((1, 512), (8, 128)),
    window=128, documents=60, sentences=50, sampled=1,
)  # fmt: skip
SMALL = Shape(
    layers=4, width=64, heads=4, vocabulary=1536, positions=64, batches=(),
    window=64, documents=800, sentences=50, sampled=20,
)  # fmt: skip
QUICK = Shape(
    layers=2, width=16, heads=2, vocabulary=400, positions=32, batches=((1, 24), (2, 12)),
    window=32, documents=40, sentences=12, sampled=2,
)  # fmt: skip


def random_run(shape: Shape, device: torch.device, folder: Path) -> Run:
    """Makes a run whose LM has random weights; planner and adapter are trained for a step."""
    settings = Config.from_preset("demo").override(shape.corpus | {"device": str(device)})
    lm, texts = folder / "lm", [document.text for document in read_documents(settings.corpus)]
    tokenizer = train_tokenizer(texts, min(shape.vocabulary, 1536), lm)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = shape.layers, shape.width, shape.heads, shape.vocabulary, shape.positions
    with without_bars_of_transformers():
        random_gpt2(*sizes, **ends).save_pretrained(lm)
    changed = {"lm.name": str(lm), "conditioning.skip_layers": min(2, shape.layers - 1)}
    for stage in ("planner", "adapter"):
        changed |= {f"training.{stage}.epochs": 1e-6, f"training.{stage}.batch_size": 1}
    return train(settings.override(changed), folder / "random", quiet=True)


def trained_run(shape: Shape, quick: bool, device: torch.device, folder: Path) -> Run:
    """Makes a run whose small LM is trained, on the same kind of text."""
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


# Writing


def writing(run: Run, shape: Shape, options: Options) -> list[Row]:
    """Measures generation for each number of texts, with the cache and without."""
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
    """Measures perplexity with windows that advance by half their length, and with a pass for each token."""
    workload = f"perplexity, {name}"
    if options.only not in workload:
        return []
    print(f"{workload} ...", flush=True)
    everything = run.corpus.documents("test")
    sample = everything[: shape.sampled]
    model = run.model("soft")

    def scoring(documents: np.ndarray, stride: int) -> EvaluationPass:
        windows = cut_windows(run.corpus, documents, shape.window, stride)
        evaluation, training = run.config.evaluation, run.config.training
        return EvaluationPass(run.corpus, windows, evaluation.batch_size, training.precision, run.device)

    def work(scored: EvaluationPass) -> Callable[[], float]:
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
            # Not comparable as an error: a longer context gives another perplexity.
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
