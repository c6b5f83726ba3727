"""Peak memory of `probekit probe`: does it grow with the corpus?

    python benchmarks/memory.py [--device cuda] [--quick] [--repeats 3] [--out FOLDER]

Two planted corpora, one eight times as large, with a barely trained tiny LM each; each command runs in a
process of its own. Softmax probes hold the examples they are fitted on, up to `probe.max_examples`, here as
many as the smaller corpus has; closed-form probes hold none and take all. The memory of importing the
libraries is reported separately.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Options, Row, keep, parse_options, peak_memory

from probekit import cli
from probekit.config import Config
from probekit.run.run import Run
from probekit.training.train import train

TIMES = 8
"""How many times larger the second corpus is."""
DOCUMENTS = 2000
QUICK_DOCUMENTS = 60

COMMANDS = {
    "softmax probes, 4,000 examples": ["--probe.variants", "none", "--probe.max_examples", "4000"],
    "ridge probes, all examples": [
        *("--probe.variants", "none", "--probe.solvers", "ridge"),
        *("--probe.max_examples", "1000000000"),
    ],
}
"""Options of `probekit probe`, by workload."""


def train_barely(documents: int, share: float, quick: bool, device: torch.device, folder: Path) -> Run:
    """Makes a run on a planted corpus.

    Args:
        documents: How many.
        share: Share of a pass over them that each stage takes.
        quick: Make the LM tiny.
        device: Where to train.
        folder: The run's folder.
    """
    settings: dict[str, Any] = {
        "device": str(device),
        "corpus.planted.documents": documents,
        "mixing.variants": ["fixed"],
        "training.lm.epochs": share,
        "training.planner.epochs": share,
        "training.adapter.epochs": share,
    }
    if quick:
        settings |= {"lm.layers": 2, "lm.width": 16, "lm.heads": 2, "planner.width": 16}
        settings |= {"lm.vocabulary": 400, "evaluation.resamples": 100, "conditioning.skip_layers": 0}
    return train(Config.from_preset("demo").override(settings), folder, quiet=True)


def prepare_imports(device: str) -> Callable[[], Any]:
    """The call imports what the command does."""

    def call() -> None:
        for name in ("probekit.probing.probe", "transformer_lens.model_bridge", "transformers"):
            importlib.import_module(name)

    return call


def prepare_probe(device: str, folder: str, options: list[str]) -> Callable[[], Any]:
    """The call is the command."""

    def call() -> None:
        if code := cli.main(["probe", folder, *options]):
            raise RuntimeError(f"probekit probe {folder} ended with code {code}")

    return call


def measure(runs: dict[int, Run], commands: dict[str, list[str]], options: Options) -> list[Row]:
    """Measures each command on each corpus; ratios are to the smallest corpus."""
    imports = _highest([peak_memory(prepare_imports, options.device) for _ in range(options.repeats)])
    rows = [{"workload": "imports alone"} | imports]
    for workload, words in commands.items():
        first: Row | None = None
        for documents, run in runs.items():
            print(f"{workload}, {documents:,} documents ...", flush=True)
            found = _highest(
                [
                    peak_memory(prepare_probe, options.device, folder=str(run.folder), options=words)
                    for _ in range(options.repeats)
                ]
            )
            table = run.probes()
            row = {
                "workload": workload,
                "documents": documents,
                "tokens": len(run.corpus.tokens),
                "fitted_on": int(table.fitted_on.max()),
                "tested_on": int(table.examples.max()),
                **found,
                "above_imports_megabytes": found["peak_megabytes"] - imports["peak_megabytes"],
            }
            first = first or row
            for key in ("peak_megabytes", "above_imports_megabytes"):
                row[key.replace("megabytes", "ratio")] = row[key] / first[key]
            rows.append(row)
    return rows


def _highest(measured: list[dict[str, float]]) -> Row:
    """The highest peaks of several measurements."""
    return {key: max(each[key] for each in measured) for key in measured[0] if key.startswith("peak")}


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Trains both runs, measures, prints and writes."""
    options = parse_options(__doc__, arguments)
    documents = QUICK_DOCUMENTS if options.quick else DOCUMENTS
    with tempfile.TemporaryDirectory() as folder:
        runs = {}
        for times in (1, TIMES):
            print(f"train on {documents * times:,} documents ...", flush=True)
            place = Path(folder) / f"documents{documents * times}"
            runs[documents * times] = train_barely(
                documents * times, 1 / times, options.quick, options.device, place
            )
        commands = dict(list(COMMANDS.items())[:1]) if options.quick else COMMANDS
        rows = measure(runs, commands, options)
    keep("memory", options, {"commands": commands, "times": TIMES}, rows)
    return rows


if __name__ == "__main__":
    main()
