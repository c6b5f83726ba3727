"""`probekit corpus` on large texts: time and cores of each stage, and peak memory.

    python benchmarks/corpus.py [--quick] [--repeats 3] [--only sentences] [--out FOLDER]

Random text, once, twice and four times as much of it, is built into a corpus by the command itself. Memory is
the resident memory of all processes of the command, shared pages counted for each. `cores_used` is seconds of
CPU over seconds of the clock; `cores_wanted` also counts the time that runnable threads waited for a core. It
reads /proc and needs Linux. Of several repeats the fastest is reported, and the largest memory.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from harness import Options, Row, keep, parse_options

SENTENCES = 250_000
QUICK_SENTENCES = 300
TIMES = (1, 2, 4)
"""How many times as much text."""
SETTINGS = {"actions.k": "1024"}
QUICK_SETTINGS = {"actions.k": "8", "actions.dimensions": "8", "lm.vocabulary": "300"}

WORDS, TOPICS, TOPIC_WORDS = 200_000, 200, 400
"""Words of the language; topics of documents, and words that belong to each."""
DONE = re.compile(r"(?P<stage>.+): done in (?P<seconds>[\d.]+) s")
INTERVAL = 0.05
"""Seconds between samples."""


def write_text(path: Path, sentences: int, seed: int = 0) -> None:
    """Writes documents as JSON lines: frequencies of words by Zipf's law, a topic for each document.

    Args:
        path: The file.
        sentences: How many in all; a document has 10 to 60.
        seed: Of everything.
    """
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    lengths = np.clip(rng.poisson(np.linspace(3, 8, WORDS)), 1, 14)
    words = ["".join(letters[np.minimum(rng.geometric(0.12, n) - 1, 25)]) for n in lengths]
    topics = rng.integers(100, WORDS, (TOPICS, TOPIC_WORDS))
    with path.open("w", encoding="utf-8") as file:
        while sentences > 0:
            count = min(sentences, int(rng.integers(10, 61)))
            sizes = np.clip(rng.lognormal(2.9, 0.5, count).astype(int), 3, 80)
            total = int(sizes.sum())
            own = topics[rng.integers(TOPICS)][_zipf(rng, TOPIC_WORDS, total)]
            ids = np.where(rng.random(total) < 0.35, own, _zipf(rng, WORDS, total))
            ends = np.where(rng.random(count) < 0.2, ".\n", ". ").tolist()
            parts = np.split(ids, np.cumsum(sizes)[:-1])
            text = "".join(
                " ".join(words[n] for n in part.tolist()).capitalize() + end
                for part, end in zip(parts, ends, strict=True)
            )
            file.write(json.dumps({"text": text}) + "\n")
            sentences -= count


def _zipf(rng: np.random.Generator, ranks: int, size: int) -> np.ndarray:
    """Ranks, from 0 on, by the Zipf-Mandelbrot law."""
    heights = np.cumsum(1 / (np.arange(ranks) + 2.7))
    return np.searchsorted(heights, heights[-1] * rng.random(size))


class Sample(NamedTuple):
    """What the processes of a command had used at a moment."""

    time: float  # of `time.monotonic`
    cpu: float  # seconds so far, including processes that have ended
    waited: float  # seconds for which threads have waited for a core
    resident: int  # bytes of memory


class Watched(NamedTuple):
    """A command that was watched: begin and end, its stages (name, when done, seconds), and the samples."""

    begun: float
    ended: float
    stages: list[tuple[str, float, float]]
    samples: list[Sample]

    def row(self, begin: float, end: float) -> Row:
        """Summarises a stretch of time."""
        times = [sample.time for sample in self.samples]
        spent = np.array([[sample.cpu, sample.waited] for sample in self.samples])
        cpu, waited = (float(np.diff(np.interp([begin, end], times, column))[0]) for column in spent.T)
        peaks = [
            sample.resident for sample in self.samples if begin - INTERVAL <= sample.time <= end + INTERVAL
        ]
        return {
            "seconds": end - begin,
            "cpu_seconds": cpu,
            "cores_used": cpu / max(end - begin, INTERVAL),
            "cores_wanted": (cpu + waited) / max(end - begin, INTERVAL),
            "peak_megabytes": max(peaks, default=0) / 1e6,
        }


def watch(command: Sequence[str], environment: dict[str, str]) -> Watched:
    """Runs a command of probekit and samples all its processes meanwhile.

    Raises:
        RuntimeError: It failed.
    """
    begun = time.monotonic()
    process = subprocess.Popen(  # noqa: S603 - ourselves
        command, env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    stages: list[tuple[str, float, float]] = []
    said: list[str] = []

    def listen() -> None:
        for line in process.stderr or ():
            said.append(line)
            if found := DONE.match(line):
                stages.append((found["stage"], time.monotonic(), float(found["seconds"])))

    listener = threading.Thread(target=listen)
    listener.start()
    cpu: dict[int, float] = {}
    waited: dict[int, float] = {}
    samples = [Sample(begun, 0.0, 0.0, 0)]
    while process.poll() is None:
        family = _family(process.pid)
        cpu |= {pid: _cpu(stat) for pid, stat in family.items()}
        for pid in family:
            waited |= _waited(pid)
        resident = sum(int(stat[21]) for stat in family.values()) * os.sysconf("SC_PAGE_SIZE")
        samples.append(Sample(time.monotonic(), sum(cpu.values()), sum(waited.values()), resident))
        time.sleep(INTERVAL)
    listener.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{''.join(said)}")
    return Watched(begun, time.monotonic(), stages, samples)


def _family(root: int) -> dict[int, list[str]]:
    """The fields of /proc/PID/stat, from `state` on, of a process and all its descendants."""
    found: dict[int, list[str]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            # After the name, which may contain anything.
            found[int(path.parent.name)] = path.read_text("utf-8", "replace").rpartition(")")[2].split()
    family = {root}
    while more := {pid for pid, stat in found.items() if int(stat[1]) in family} - family:
        family |= more
    return {pid: found[pid] for pid in family if pid in found}


def _cpu(stat: list[str]) -> float:
    """Seconds of CPU, user and system."""
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


def _waited(pid: int) -> dict[int, float]:
    """Seconds for which each thread of a process has waited for a core."""
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with suppress(OSError):
            found[int(path.parent.name)] = int(path.read_text("utf-8").split()[1]) / 1e9
    return found


def measure(sentences: int, options: Options, folder: Path) -> list[Row]:
    """Measures a size: a summary, and a row for each stage."""
    text = folder / f"{sentences}.jsonl"
    write_text(text, sentences)
    settings = QUICK_SETTINGS if options.quick else SETTINGS
    words = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "probekit", "corpus", "--corpus.reader=jsonl", f"--corpus.path={text}"]
    builds = [
        watch([*command, *words, f"--out={folder / f'run{sentences}-{turn}'}"], dict(os.environ))
        for turn in range(options.repeats)
    ]
    first = min(builds, key=lambda build: build.ended - build.begun)
    size = {"sentences": sentences, "megabytes_of_text": text.stat().st_size / 1e6}
    total = first.row(first.begun, first.ended)
    total["peak_megabytes"] = max(sample.resident for build in builds for sample in build.samples) / 1e6
    rows: list[Row] = [{"workload": "all"} | size | total]
    for stage, done, seconds in first.stages:
        rows.append(
            {"workload": f"{sentences:,} sentences", "stage": stage} | first.row(done - seconds, done)
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Measures all sizes, prints and writes them."""
    options = parse_options(__doc__, arguments)
    rows: list[Row] = []
    for times in TIMES:
        sentences = times * (QUICK_SENTENCES if options.quick else SENTENCES)
        print(f"{sentences:,} sentences ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(sentences, options, Path(folder))
    totals = [row for row in rows if row["workload"] == "all"]
    for row in totals:
        row["peak_ratio"] = row["peak_megabytes"] / totals[0]["peak_megabytes"]
    rows.sort(key=lambda row: row["workload"] != "all")
    settings = QUICK_SETTINGS if options.quick else SETTINGS
    keep("corpus", options, {"settings": settings, "times": TIMES}, rows)
    return rows


if __name__ == "__main__":
    main()
