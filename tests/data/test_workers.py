"""Work shared out to processes: the same results in the same order, whatever their number."""

import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from probekit.data import codebook as workers
from probekit.data.codebook import in_order, processes_for


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_are_in_the_order_of_their_parts(processes: int):
    found = list(in_order(divmod, ((n, 7) for n in range(100)), processes))
    assert found == [divmod(n, 7) for n in range(100)]
    assert list(in_order(divmod, [], processes)) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_parts_are_taken_as_they_are_needed(processes: int):
    taken = []

    def parts() -> Iterator[tuple[int]]:
        for n in range(1000):
            taken.append(n)
            yield (n,)

    results = in_order(operator.neg, parts(), processes)
    assert taken == []
    assert next(results) == 0
    assert len(taken) <= processes * workers._PARTS_AHEAD


@pytest.mark.parametrize("processes", [1, 2])
def test_errors_come_through(processes: int):
    with pytest.raises(ZeroDivisionError):
        list(in_order(divmod, [(1, 1), (1, 0), (1, 2)], processes))


def test_only_long_texts_are_worth_processes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "cores", lambda: 5)
    assert [processes_for(n) for n in (0, workers.MANY_CHARACTERS - 1, workers.MANY_CHARACTERS)] == [1, 1, 5]


def test_processes_end_with_their_work():
    others = {*in_order(os.getpid, [()] * 40, 2)} - {os.getpid()}
    assert others
    assert not any(_runs(process) for process in others)


def test_a_process_ends_when_the_one_that_began_it_is_killed():
    script = (
        "import os, signal\n"
        "from probekit.data.codebook import in_order\n"
        "print(next(in_order(os.getpid, [()], 2)), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert killed.stdout is not None
    worker = int(killed.stdout.readline())
    assert killed.wait() == -signal.SIGKILL
    until = time.monotonic() + 20  # left alone it would wait for half a minute longer
    while _runs(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _runs(worker)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_scripts_are_not_run_again_by_processes_and_those_import_no_torch(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print('once')\n"
        "from probekit.data.sentences import Cutter\n"
        "from probekit.data.encoders import Embedder\n"
        "from probekit.data.codebook import in_order\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(len({*in_order(os.getpid, [()] * 9, 2)} - {os.getpid()}) > 0)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert (done.stdout, done.stderr, done.returncode) == ("once\nTrue\n", "", 0)
