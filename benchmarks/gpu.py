"""Everything to measure on one GPU, in ten minutes: the tests marked gpu, the benchmarks, one table.

    python benchmarks/gpu.py [--minutes 10] [--device cuda] [--quick] [--out FOLDER]

The table shows each contestant's time relative to probekit's, and its memory; the rest is in the files in
benchmarks/results. Benchmarks for which no time was left are named.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness import RESULTS, Row
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent

BENCHMARKS = {
    "training": ("--repeats", "2"),
    "extraction": ("--repeats", "2"),
    "fit_grid": ("--repeats", "1"),
    "depth_ensemble": ("--repeats", "1"),
    "generation": ("--repeats", "1"),
    "memory": ("--repeats", "1"),
}
"""In the order of importance, since time may run out."""

COLUMNS = {
    "seconds": "{:.3g}",
    "ratio": "{:.2f}",
    "tokens_per_second": "{:,.0f}",
    "tokens_a_second": "{:,.0f}",
    "matrix_rate_share": "{:.0%}",
    "peak_device_megabytes": "{:,.0f}",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; the exit code is 1 if a test or a benchmark failed."""
    given = _options(arguments)
    until = time.monotonic() + 60 * given.minutes
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", str(HERE.parent / "tests")]
    outcomes: dict[str, str] = {"tests": _run(tests, until)}
    for name, options in BENCHMARKS.items():
        command = [sys.executable, str(HERE / f"{name}.py"), "--device", given.device, *options]
        command += ["--out", str(given.out), *(["--quick"] if given.quick else [])]
        outcomes[name] = _run(command, until)
    kind = given.device.partition(":")[0]
    table = Table(
        "benchmark", "workload", "contestant", *(c.replace("_", " ") for c in COLUMNS), title="One GPU"
    )
    for name in BENCHMARKS:
        for row in _rows(given.out / f"{name}-{kind}.json"):
            table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
    for name, how in outcomes.items():
        print(f"{name}: {how}")
    return int(any(how.startswith("failed") for how in outcomes.values()))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="the time for everything (10)")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:1; cpu tries the script (cuda)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes that say nothing about speed")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of results ({RESULTS.name})")
    return parser.parse_args(arguments)


def _run(command: list[str], until: float) -> str:
    """Runs a command in the time that is left, and describes the outcome."""
    begun, left = time.monotonic(), until - time.monotonic()
    if left <= 0:
        return "no time was left"
    try:
        code = subprocess.run(command, timeout=left, check=False).returncode  # noqa: S603 - our own scripts
    except subprocess.TimeoutExpired:
        return f"stopped after {left:.0f} s, when the time was up"
    # pytest ends with 5 where no test was chosen.
    how = {0: "done", 5: "found nothing to do"}.get(code, f"failed with exit code {code}")
    return f"{how} in {time.monotonic() - begun:.0f} s"


def _rows(path: Path) -> list[list[str]]:
    if not path.exists():
        return []
    rows: list[Row] = json.loads(path.read_text("utf-8"))["rows"]
    return [
        [path.stem.rpartition("-")[0], row["workload"], row.get("contestant", "")]
        + [form.format(row[name]) if row.get(name) is not None else "" for name, form in COLUMNS.items()]
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
