"""Runs commands in this process, and looks at what came of them and of the folders that they were given."""

import contextlib
import hashlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest

from probekit.cli import main

Capture = pytest.CaptureFixture[str]

ONE_CELL = ["--probe.layers", "0", "--probe.positions", "1", "--probe.variants", "none"]
ONE_CELL += ["--probe.l2", "0.1", "--probe.code_length", "false", "--evaluation.resamples", "100"]
"""A probe grid that is fitted at once."""

TWO_CELLS = ["--probe.variants", "none", "--probe.layers", "1", "--probe.positions", "1", "2"]
TWO_CELLS += ["--probe.control", "false", "--probe.code_length", "false"]
"""One at each of two positions, with probes of the LM alone."""

SECONDS = 60
"""After so many a command counts as hanging."""


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["probekit.probing.probe", "probekit.sweeps"])
"""Its server imports PyTorch once, for all commands that are run in processes of their own."""


class Hung(BaseException):
    """Nothing catches it."""


@dataclass(frozen=True)
class Ran:
    """What a command did.

    Attributes:
        words: Its arguments.
        code: Its exit code.
        errors: What it wrote to standard error.
    """

    words: tuple[str, ...]
    code: int
    errors: str

    def refused(self, *names: str) -> bool:
        """Whether it was refused in one line, which holds one of these names, if there are any."""
        lines = [line for line in self.errors.splitlines() if not line.startswith("probekit: note: ")]
        one = len(lines) == 1 and lines[0].startswith("probekit: error: ")
        return self.code == 2 and one and (not names or any(name in lines[0] for name in names))


def ran(*words: object) -> Ran:
    """Runs a command; an exception that comes out of it fails the test with all of its arguments."""
    errors, typed = io.StringIO(), tuple(map(str, words))
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()), _watched():
        try:
            code = main(typed)
        except SystemExit as left:  # --help and --version
            code = int(left.code or 0)
        except Exception as error:
            error.add_note(f"probekit {' '.join(map(repr, typed))}")
            raise
    return Ran(typed, code, errors.getvalue())


def started(*words: object) -> multiprocessing.process.BaseProcess:
    """A command in a process of its own, which may be killed."""
    process = FORKS.Process(target=_exits, args=(list(map(str, words)),))
    process.start()
    return process


def _exits(words: list[str]) -> None:
    sys.exit(main(words))


def in_two_processes(*words: str | Path) -> str:
    """What a script, or a module after `-m`, prints in two processes that work together."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *map(str, words)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def printed(capsys: Capture, *words: str | Path) -> str:
    """Standard output of a command that succeeds, silently on standard error."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, ""), captured.err
    return captured.out


def refused(capsys: Capture, *words: str | Path) -> str:
    """The one line on standard error of a command that ends with code 2."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    (line,) = captured.err.splitlines()
    assert line.startswith("probekit: error: ")
    return line.removeprefix("probekit: error: ")


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    def hung(number: int, frame: FrameType | None) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def hashes(folder: Path) -> dict[str, str]:
    """A digest of every file in a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
