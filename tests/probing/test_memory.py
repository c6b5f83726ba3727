"""Activations that memory has no room for: the same to the bit, in a file that nothing leaves behind."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.probing.activations import Stack
from probekit.probing.memory import HeldActivations
from probekit.probing.targets import Examples

STACKS = [Stack(5, (("a", 0), ("a", 1), ("a", 2))), Stack(3, (("b", 2),))]
DISTANCES = 2
SIZES = {"probe": 11, "validation": 7}


@dataclass
class Source:
    """Random activations, read a few examples at a time."""

    dtype: torch.dtype
    stacks: list[Stack] = field(default_factory=lambda: STACKS)
    unit: str = "examples"

    def values(self, split: str) -> list[Tensor]:
        """For every stack `[probes, examples, width]`."""
        generator = torch.Generator().manual_seed(len(split))
        shapes = [(len(s.points) * DISTANCES, SIZES[split], s.width) for s in STACKS]
        return [torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes]

    def parts(self, split: str) -> Iterator[tuple[slice, list[Tensor]]]:
        for start in range(0, SIZES[split], 4):
            rows = slice(start, min(start + 4, SIZES[split]))
            yield rows, [values[:, rows] for values in self.values(split)]


def splits() -> dict[str, Examples]:
    return {
        split: Examples.of_tokens(*3 * [np.arange(size)], np.zeros((size, 1), np.int64))
        for split, size in SIZES.items()
    }


def held(source: Source, examples: dict[str, Examples], memory: float, folder: Path) -> HeldActivations:
    made = HeldActivations(source, examples, DISTANCES, memory, folder, torch.device("cpu"))
    for split in examples:
        for rows, chunk in source.parts(split):
            made.write(split, rows, chunk)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory", [1e9, 2500, 700, 1])
def test_what_is_spilled_is_what_was_read(dtype: torch.dtype, memory: float, tmp_path: Path):
    source, examples = Source(dtype), splits()
    made = held(source, examples, memory, tmp_path)
    assert [*tmp_path.iterdir()] == []
    covered: list[tuple[int, int]] = []
    for stack, probes in made.groups():
        covered += [(stack, probe) for probe in range(probes.start, probes.stop)]
        for split in examples:
            found = made.load(split, stack, probes)
            assert found.dtype == torch.float32
            assert torch.equal(found, source.values(split)[stack][probes].float())
    assert covered == [(0, probe) for probe in range(6)] + [(1, 0), (1, 1)]
    assert len([*made.groups()]) == {1e9: 2, 2500: 7, 700: 8, 1: 8}[memory]


@pytest.mark.parametrize("memory", [1e9, 1])
def test_it_is_read_again_as_it_was_written(memory: float, tmp_path: Path):
    source, examples = Source(torch.float32), splits()
    made = held(source, examples, memory, tmp_path)
    chunks = zip(made.chunks(examples["probe"]), source.parts("probe"), strict=True)
    for (rows, found), (expected_rows, expected) in chunks:
        assert rows == expected_rows
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.flatten(0, 1), other)


def test_what_another_process_has_read_is_zero(tmp_path: Path):
    source, examples = Source(torch.float32), splits()
    made = HeldActivations(source, examples, DISTANCES, 1, tmp_path, torch.device("cpu"))
    rows, chunk = next(source.parts("probe"))
    made.write("probe", rows, chunk)
    found = made.load("probe", 0, slice(0, 6))
    assert torch.equal(found[:, rows], chunk[0])
    assert not found[:, rows.stop :].any()


def test_a_disk_that_is_too_small_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 100))
    source, examples = Source(torch.float32), splits()
    assert held(source, examples, 1e9, tmp_path)  # nothing is written
    with pytest.raises(ProbekitError, match=r"the activations take .* GB free; raise probe\.memory"):
        held(source, examples, 1, tmp_path)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_memory as test
import torch
made = test.held(test.Source(torch.float32), test.splits(), 1, Path(sys.argv[1]))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_file(tmp_path: Path):
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path, here], check=False)
    assert done.returncode == -9
    assert [*tmp_path.iterdir()] == []


def test_room_for_the_file_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that fills in the middle would end a long pass; one that reserves nothing is used."""
    reserved: list[int] = []

    def reserve(code: int) -> None:
        def call(file: int, start: int, size: int) -> None:
            reserved.append(start + size)
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "posix_fallocate", call, raising=False)

    reserve(errno.ENOSPC)
    with pytest.raises(ProbekitError, match=r"No space left on device\); raise probe.memory, or read fewer"):
        held(Source(torch.float32), splits(), 0.0, tmp_path)
    reserve(errno.EOPNOTSUPP)
    source = Source(torch.float32)
    found = held(source, splits(), 0.0, tmp_path)
    assert reserved[0] == reserved[1] == sum(v.nbytes for split in SIZES for v in source.values(split))
    for number, values in enumerate(source.values("probe")):
        assert torch.equal(found.load("probe", number, slice(0, len(values))), values)
    assert list(tmp_path.iterdir()) == []
