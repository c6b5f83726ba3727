"""The store of activations gives back what the model gave, bit for bit, or says in one line why it cannot."""

import itertools
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.io import read_json, write_json
from probekit.probing import activations
from probekit.probing.activations import ActivationReader, HookPoint, Stack, stacks_of
from probekit.probing.grid import Grid, make_grid
from probekit.probing.memory import HEADROOM
from probekit.probing.store import Store, store_contents, write_store
from probekit.probing.targets import Examples, find_target
from probekit.progress import Meter, Progress
from probekit.run.run import Run

POINTS: list[HookPoint] = [
    ("hook_resid_post", 0),
    ("mlp.hook_post", 1),
    ("attn.hook_z:before", 2),
    ("attn.hook_z", 2),
    ("mlp.hook_post", 2),
]
QUIET, CPU = Progress(quiet=True), torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "CHUNK_EXAMPLES", 30)


def grid_of(run: Run, distances: tuple[int, ...] = (1, 3)) -> Grid:
    settings = run.with_settings({"probe.positions": distances, "probe.max_examples": 70}).config.probe
    return make_grid(run.corpus, settings, find_target(run.corpus, "action"), seed=0)


def write(
    run: Run, folder: Path, *, points: list[HookPoint] = POINTS, fail_at: int = 0, progress: Progress = QUIET
) -> list[int]:
    """Writes the store of the soft variant, perhaps interrupted; the sizes of the chunks that were read."""
    grid = grid_of(run)
    reader = ActivationReader(run, "soft", points, grid.positions)
    calls: list[int] = []
    read = reader.read

    def counting(examples: Examples, done: Callable[[int], None]) -> list[Tensor]:
        calls.append(len(examples))
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return read(examples, done)

    reader.read = counting
    write_store(reader, grid.examples, folder, progress, Meter(progress))
    return calls


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def refusal(folder: Path, act: Callable[[], Any]) -> str:
    """The line in which something is refused; the folder stays as it was."""
    before = contents(folder)
    with pytest.raises(ProbekitError) as caught:
        act()
    assert contents(folder) == before
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert str(folder) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def stored(tiny_run: Run, tmp_path: Path) -> Path:
    """A complete store that a test may change."""
    write(tiny_run, tmp_path / "store")
    return tmp_path / "store"


def opened(folder: Path, run: Run, points: list[HookPoint] = POINTS) -> Store:
    return Store(folder, stacks_of(points, run.locations), CPU)


def by_point(stacks: list[Stack], chunks: Iterator[tuple[slice, list[Tensor]]]) -> dict[Any, Tensor]:
    return {
        (rows.start, rows.stop, point): value
        for rows, values in chunks
        for stack, tensor in zip(stacks, values, strict=True)
        for point, value in zip(stack.points, tensor, strict=True)
    }


@pytest.mark.parametrize("points", [POINTS, POINTS[3:], POINTS[:1], POINTS[1:3]])
def test_what_is_stored_is_what_was_read_bit_for_bit(stored: Path, tiny_run: Run, points: list[HookPoint]):
    grid, kept = grid_of(tiny_run), opened(stored, tiny_run, points)
    reader = ActivationReader(tiny_run, "soft", POINTS, grid.positions)
    for split, examples in grid.examples.items():
        expected = by_point(reader.stacks, reader.chunks(examples))
        found = by_point(kept.stacks, kept.chunks(examples))
        assert found.keys() == {key for key in expected if key[2] in points}, split
        assert len({key[:2] for key in found}) > 1, "one chunk alone would prove less"
        for key, value in found.items():
            assert torch.equal(value, expected[key]), key


def test_a_complete_store_costs_nothing(stored: Path, tiny_run: Run):
    before = {path: path.stat().st_mtime_ns for path in stored.iterdir()}
    assert write(tiny_run, stored) == []
    assert {path: path.stat().st_mtime_ns for path in stored.iterdir()} == before


@pytest.mark.parametrize("fail_at", [1, 2, 4])
def test_an_interrupted_store_continues(stored: Path, tiny_run: Run, tmp_path: Path, fail_at: int):
    folder = tmp_path / "other"
    with pytest.raises(KeyboardInterrupt):
        write(tiny_run, folder, fail_at=fail_at)
    assert len([*folder.glob("*.safetensors")]) == fail_at - 1
    write(tiny_run, folder)
    assert contents(folder) == contents(stored)


def test_a_shard_that_is_missing_or_cut_short_is_named_and_read_again(stored: Path, tiny_run: Run):
    def read() -> None:
        for part in grid_of(tiny_run).examples.values():
            list(opened(stored, tiny_run).chunks(part))

    before = contents(stored)
    first, *_ = sorted(stored.glob("*.safetensors"))
    first.write_bytes(before[first.name][:-8])
    assert f"{first} cannot be read" in refusal(stored, read)
    first.unlink()
    assert "delete it and run with --store again" in refusal(stored, read)
    write(tiny_run, stored)
    assert contents(stored) == before


@pytest.mark.parametrize("name", ["model", "corpus", "variant", "version", "positions", "points", "examples"])
def test_a_store_of_something_else_is_refused(stored: Path, tiny_run: Run, name: str):
    manifest = stored / "manifest.json"
    write_json(manifest, read_json(manifest) | {name: "other"})
    line = refusal(stored, lambda: write(tiny_run, stored))
    assert f"{stored} stores activations of another {name}: other, but " in line


def test_a_disk_that_is_too_small_is_reported_before_anything_is_written(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "deep" / "er"
    needed = 4 * 2 * sum(map(len, grid_of(tiny_run).examples.values())) * (3 * 32 + 2 * 128)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, needed))
    line = refusal(folder, lambda: write(tiny_run, folder))
    assert "the activations take" in line
    assert "run without --store" in line
    assert not folder.parent.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, HEADROOM * needed + 1))
    write(tiny_run, folder)


def test_everything_that_changes_activations_is_in_the_manifest(tiny_run: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path / "copy"))

    def of(
        variant: str, seed: int = 0, distances: tuple[int, ...] = (1, 3), **settings: Any
    ) -> dict[str, Any]:
        dotted = {name.replace("_", ".", 1): value for name, value in settings.items()}
        changed = Run.open(run.folder).with_settings(dotted)
        points = POINTS if variant == "soft" else POINTS[:2]
        return store_contents(
            ActivationReader(changed, variant, points, distances, seed), grid_of(run).examples
        )

    different = [
        of("soft"),
        of("joint"),
        of("none"),
        of("random"),
        of("random", seed=1),
        of("soft", probe_window=20),
        of("soft", training_precision="bfloat16"),
        of("soft", distances=(1, 2, 3)),
        of("soft", mixing_temperature=8.0),
    ]
    for one, other in itertools.combinations(different, 2):
        assert one != other
    same = [of("soft", seed=1), of("soft", evaluation_batch_size=3), of("soft", probe_l2=[3.0])]
    assert all(one == different[0] for one in same)
    assert of("none", mixing_temperature=8.0) == of("none")
    assert of("soft", training_precision="float32") == different[0]  # what auto means on a CPU
    for file in ("lm/model.safetensors", "adapters/soft.safetensors", "planner/model.safetensors"):
        path = run.folder / file
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert of("soft")["model"] != different[0]["model"], file
        path.write_bytes(data)


def test_the_manifest_identifies_examples_and_their_order(tiny_run: Run):
    reader, empty = ActivationReader(tiny_run, "none", POINTS[:1], (1,)), np.zeros(3, np.int64)
    examples = Examples.of_tokens(empty, np.array([4, 9, 2]), empty, empty[:, None])
    digests = {
        store_contents(reader, {"test": part})["examples"]["test"]
        for part in (examples, examples[[1, 0, 2]], examples[:2])
    }
    assert len(digests) == 3
