"""What all benchmarks share: options, races, the machine's own limit, peak memory, and results.

A claim of speed is a ratio between contestants that ran in turns in one run, and a share of the rate at which
this machine multiplies matrices, measured in the same run. Where the results of contestants differ, `compare`
refuses the ratio.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from probekit.config import Config
from probekit.distributed import compute_device
from probekit.io import read_json, write_json
from probekit.run.folder import provenance

RESULTS = Path(__file__).parent / "results"
SAME = 0.01
"""The largest relative difference in quality at which contestants are compared."""
REFERENCE = "probekit"
"""The contestant whose time is the unit of all ratios."""

SQUARE = (2048, 2048, 2048)
"""A product that every machine computes fast."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """The options of every benchmark."""

    device: torch.device
    quick: bool
    repeats: int
    out: Path | None
    only: str = ""


def parse_options(description: str | None, arguments: Sequence[str] | None = None) -> Options:
    """Parses a command line; None takes the process's own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 or auto (cpu)")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, in seconds; says nothing about speed"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each contestant (3)")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of results ({RESULTS.parent.name}/{RESULTS.name}; none with --quick)",
    )
    parser.add_argument("--only", default="", help="only workloads whose name contains this")
    given = parser.parse_args(arguments)
    if given.repeats < 1:
        parser.error(f"--repeats is {given.repeats}; it must be 1 or more")
    out = given.out or (None if given.quick else RESULTS)
    return Options(compute_device(given.device), given.quick, given.repeats, out, given.only)


# Time


@dataclass(frozen=True)
class Contestant:
    """Work to be timed, and what is run once before: by default the same work."""

    run: Callable[[], Any]
    warm_up: Callable[[], Any] | None = None


@dataclass
class Outcome:
    """Seconds of every timed run, and the result of the last."""

    times: list[float] = field(default_factory=list)
    result: Any = None

    def columns(self, scale: float = 1.0) -> Row:
        """The smallest and the median time in seconds, times `scale`."""
        median = statistics.median(self.times)
        return {"seconds": min(self.times) * scale, "median_seconds": median * scale}


def race(contestants: Mapping[str, Contestant], repeats: int, device: torch.device) -> dict[str, Outcome]:
    """Times contestants in turns, every other round backwards, so that disturbances affect all of them."""
    outcomes = {name: Outcome() for name in contestants}
    for contestant in contestants.values():
        (contestant.warm_up or contestant.run)()
    gc.collect()
    for turn in range(repeats):
        for name in list(contestants)[:: -1 if turn % 2 else 1]:
            outcomes[name].result = None  # two results at once may not fit
            seconds, outcomes[name].result = timed(contestants[name].run, device)
            outcomes[name].times.append(seconds)
    return outcomes


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Returns the seconds that a call took, including the device's work, and its result."""
    _synchronise(device)
    begun = time.perf_counter()
    result = call()
    _synchronise(device)
    return time.perf_counter() - begun, result


@cache
def matrix_rate(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    batch: int = 1,
    repeats: int = 5,
) -> float:
    """Measures floating-point operations a second of [batch, m, k] x [batch, k, n]: the largest of repeats.

    Args:
        device: Where.
        dtype: Of the factors.
        shape: m, k and n.
        batch: Products in one call.
        repeats: Measurements, each over enough calls to be timed well.
    """
    m, k, n = shape
    a = torch.ones(batch, m, k, device=device, dtype=dtype)
    b = torch.ones(batch, k, n, device=device, dtype=dtype)
    out = torch.empty(batch, m, n, device=device, dtype=dtype)
    calls = 1
    while timed(partial(_multiply, a, b, out, calls), device)[0] < 0.05:
        calls *= 2
    seconds = min(timed(partial(_multiply, a, b, out, calls), device)[0] for _ in range(repeats))
    return 2.0 * batch * m * k * n * calls / seconds


def best_matrix_rate(
    options: Options, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]
) -> float:
    """Measures the larger of the rates at a shape and at a square one: the limit for shares."""
    if options.quick:
        return matrix_rate(device, dtype, (64, 64, 64), repeats=1)
    return max(matrix_rate(device, dtype, each) for each in (shape, SQUARE))


def _multiply(a: Tensor, b: Tensor, out: Tensor, calls: int) -> None:
    for _ in range(calls):
        torch.bmm(a, b, out=out)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Memory

# On Linux a process inherits the peak of the one that starts it (ru_maxrss survives exec), so a small process
# starts the one that is measured.
_STARTER = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:]).returncode)"


def peak_memory(
    prepare: Callable[..., Callable[[], Any]], device: torch.device, **arguments: Any
) -> dict[str, float]:
    """Measures the peak memory of a call in a fresh process.

    Args:
        prepare: A function at the top of a benchmark's file that prepares what is not measured and returns
            the call. It is given the device's name and the arguments.
        device: Where the call computes.
        arguments: Plain values that can be written as JSON.

    Returns:
        `peak_megabytes`, the process's peak resident memory, and `added_megabytes`, how far that is above the
        memory before the call (not on Linux: above the peak before the call); on a GPU also
        `peak_device_megabytes` and `added_device_megabytes`, the same of what PyTorch allocated there.
    """
    code = prepare.__code__
    job = {
        "file": code.co_filename,
        "function": code.co_name,
        "device": str(device),
        "arguments": arguments,
    }
    command = [sys.executable, "-c", _STARTER, sys.executable, __file__, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        raise RuntimeError(f"the process whose memory was measured failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(job: Row) -> dict[str, float]:
    device = torch.device(job["device"])
    spec = importlib.util.spec_from_file_location("measured", job["file"])
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{job['file']} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    sys.modules["measured"] = module  # dataclasses look up types there
    spec.loader.exec_module(module)
    call = getattr(module, job["function"])(job["device"], **job["arguments"])
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or the call would use resident free memory
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _peak_resident()
    call()
    found = {"peak_megabytes": _peak_resident(), "added_megabytes": _peak_resident() - before}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        found |= {"peak_device_megabytes": peak / 1e6, "added_device_megabytes": (peak - held) / 1e6}
    return found


def _peak_resident() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# Results


def run_workloads(
    benchmark: str,
    options: Options,
    workloads: Mapping[str, Any],
    measure: Callable[[str, Any, Options], list[Row]],
    settings: Row,
) -> list[Row]:
    """Measures the workloads that `--only` leaves, and keeps their rows."""
    rows = []
    for name, workload in workloads.items():
        if options.only in name:
            print(f"{name} ...", flush=True)
            rows += measure(name, workload, options)
    keep(benchmark, options, settings, rows)
    return rows


def compare(rows: list[Row], same: float = SAME) -> None:
    """Adds `ratio`, the time over the reference's, to the rows of one workload.

    Args:
        rows: A row for each contestant, with `contestant`, `seconds` and `difference`, the share by which its
            result differs from the reference's (None where it has none); changed in place. `ratio` is None
            where the difference is larger than `same`.
        same: The largest difference.
    """
    (reference,) = (row for row in rows if row["contestant"] == REFERENCE)
    for row in rows:
        comparable = row["difference"] is None or row["difference"] <= same
        row["ratio"] = row["seconds"] / reference["seconds"] if comparable else None


def machine(device: torch.device) -> Row:
    """Describes the machine, and how busy it is."""
    origin = provenance(Config.from_dict({"device": str(device)}))
    found = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": origin["versions"],
        "git_commit": origin["git_commit"],
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def keep(name: str, options: Options, settings: Row, rows: list[Row]) -> Path | None:
    """Prints the results and writes them to `<out>/<name>-<cpu|cuda>.json`, unless `out` is None.

    Workloads that `--only` left out keep their rows of an earlier run.
    """
    where = machine(options.device)
    show(name, where, rows)
    if options.out is None:
        return None
    path = options.out / f"{name}-{options.device.type}.json"
    how = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "repeats": options.repeats}
    how |= {"threads": where["threads"], "load_average": where["load_average"]}
    kept: list[Row] = []
    if options.only and path.exists() and (earlier := read_json(path))["quick"] == options.quick:
        again = {row["workload"] for row in rows}
        kept = [row for row in earlier["rows"] if row["workload"] not in again]
    results = {"benchmark": name, "quick": options.quick, "machine": where, "settings": settings}
    write_json(path, results | {"rows": [*kept, *(row | how for row in rows)]})
    print(path)
    return path


def show(name: str, where: Row, rows: list[Row]) -> None:
    """Prints a table for each workload; values that all its rows share are in the title."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(
        f"[bold]{name}[/bold] on {where.get('gpu', where['processor'])}, {where['cores']} cores, "
        f"{where['threads']} threads, load {where['load_average']:.1f}",
        highlight=False,
    )
    for workload in dict.fromkeys(row["workload"] for row in rows):
        part = [row for row in rows if row["workload"] == workload]
        columns = list(dict.fromkeys(key for row in part for key in row if key != "workload"))
        shared = [c for c in columns if len(part) > 1 and len({_shown(row.get(c)) for row in part}) == 1]
        facts = ", ".join(f"{c} {_shown(part[0].get(c))}" for c in shared if _shown(part[0].get(c)))
        table = Table(title=f"{workload}: {facts}" if facts else workload, title_justify="left")
        columns = [c for c in columns if c not in shared]
        for column in columns:
            table.add_column(column.replace("_", " "), justify="left" if column == "contestant" else "right")
        for row in part:
            table.add_row(*(_shown(row.get(column)) for column in columns))
        console.print(table)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
