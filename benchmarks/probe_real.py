"""`probekit probe --model` on a real LM and real text, against bare forward passes over the same tokens.

    python benchmarks/probe_real.py --lm FOLDER --text FILE [--articles 500] [--runs FOLDER] [--out FOLDER]

FILE holds JSON lines with the field `text`, from which articles are drawn. Each contestant is a process of
its own: the default grid (softmax probes of every layer at six distances, with the control task and the code
length, for the LM and for random weights); the same with closed-form probes alone; and, after each of these,
the LM's blocks as transformers runs them, without the head, in the same windows, batches and dtype. Two such
passes, one for each LM, are the unit. Commands include starting Python, loading and building the corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from harness import REFERENCE, Row, parse_options, run_workloads

COMMANDS = {
    REFERENCE: [],
    "closed form alone": [
        *("--probe.solvers", "ridge"),
        *("--probe.control", "false", "--probe.code_length", "false"),
    ],
}
"""Options of `probekit probe`, by contestant."""

LMS = 2
"""The grid reads `none` and `random`."""


def bare_pass(folder: Path) -> None:
    """Reads once what each LM of a finished run reads for its probes, and does nothing with it."""
    from transformers import AutoModel

    from probekit.data.windows import input_tokens
    from probekit.probing.activations import Placement, batches, probing_windows
    from probekit.probing.grid import make_grid
    from probekit.probing.targets import find_target
    from probekit.run.run import Run

    run = Run.open(folder)
    model = AutoModel.from_pretrained(run.config.lm.name, dtype=run.dtype).eval()
    settings = run.config.probe
    grid = make_grid(run.corpus, settings, find_target(run.corpus, settings.target), run.config.seed)
    tokens, begun = 0, (time.perf_counter(), time.process_time())
    for examples in grid.examples.values():
        windows = Placement.of(run.corpus, examples, grid.positions, *probing_windows(run)).windows
        for rows in batches(windows.length, run.config.evaluation.batch_size * run.config.training.window):
            with torch.inference_mode():
                model(input_tokens(run.corpus, windows[rows]))
            tokens += int(windows.length[rows].sum())
    seconds, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
    print(json.dumps({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu, "dtype": str(run.dtype)}))


def timed_command(command: Sequence[str]) -> Row:
    """Runs a command in a process of its own: its seconds, those of the processor, and its peak memory."""
    begun = time.perf_counter()
    process = subprocess.Popen(command)  # noqa: S603 - ourselves
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_megabytes": used.ru_maxrss * 1024 / 1e6,
    }


def measure(lm: str, text: Path, folder: Path) -> list[Row]:
    """Measures all contestants in turns."""
    found: dict[str, Row] = {}
    bare: list[Row] = []
    probekit = [sys.executable, "-m", "probekit", "probe", "--model", lm, "--corpus", str(text)]
    for name, options in reversed(COMMANDS.items()):
        run = folder / name.replace(" ", "-")
        found[name] = timed_command([*probekit, "--out", str(run), "--overwrite", *options])
        again = [sys.executable, __file__, "--bare", str(run)]
        done = subprocess.run(again, capture_output=True, text=True, check=True)  # noqa: S603 - ourselves
        bare.append(json.loads(done.stdout.splitlines()[-1]))
    tokens = bare[0]["tokens"]
    passes = {name: LMS * float(np.mean([row[name] for row in bare])) for name in ("seconds", "cpu_seconds")}
    rows: list[Row] = [
        {"contestant": "bare passes", **passes},
        *({"contestant": name} | found[name] for name in COMMANDS),
    ]
    for row in rows:
        row |= {"workload": Path(lm).name, "tokens": tokens, "dtype": bare[0]["dtype"]}
        row |= {"ratio": row["seconds"] / passes["seconds"]}
        row |= {"cpu_ratio": row["cpu_seconds"] / passes["cpu_seconds"]}
    return rows


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Draws the articles, measures, prints and writes the results."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--bare", type=Path)
    parser.add_argument("--lm", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--articles", type=int, default=500)
    parser.add_argument("--runs", type=Path, default=Path("runs/probe_real"))
    given, others = parser.parse_known_args(arguments)
    if given.bare is not None:
        bare_pass(given.bare)
        return []
    options = parse_options(__doc__, others)
    lines = given.text.read_text("utf-8").splitlines()
    drawn = np.random.default_rng(0).permutation(len(lines))[: given.articles]
    given.runs.mkdir(parents=True, exist_ok=True)
    text = given.runs / "articles.jsonl"
    text.write_text("".join(f"{lines[number]}\n" for number in sorted(drawn)), "utf-8")
    settings = {"text": given.text.name, "articles": given.articles}
    settings |= {"ratio": "seconds over those of bare passes, one for each LM"}
    return run_workloads(
        "probe_real",
        options,
        {given.lm.name: str(given.lm)},
        lambda name, lm, options: measure(lm, text, given.runs),
        settings,
    )


if __name__ == "__main__":
    main()
