"""The store gives back what the model gave, bit for bit, or says in one line why it cannot."""

import itertools
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.io import read_json, write_json
from probekit.probing import activations, store
from probekit.probing.activations import HookPoint, Reader, Stack
from probekit.probing.grid import Grid, make_grid
from probekit.probing.store import Store, examples_digest, identity, stored_bytes, write_store
from probekit.probing.targets import Examples, find_target
from probekit.progress import Progress
from probekit.run.run import Run

PLACES: list[HookPoint] = [
    ("hook_resid_post", 0),
    ("mlp.hook_post", 1),
    ("attn.hook_z:before", 2),
    ("attn.hook_z", 2),
    ("mlp.hook_post", 2),
]
QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "CHUNK_EXAMPLES", 30)


def grid_of(run: Run, distances: tuple[int, ...] = (1, 3)) -> Grid:
    settings = run.with_settings({"probe.distances": distances, "probe.max_examples": 70}).config.probe
    return make_grid(run.corpus, settings, find_target(run.corpus, "action"), seed=0)


def reader_of(run: Run, grid: Grid, variant: str = "soft", places: list[HookPoint] = PLACES) -> Reader:
    return Reader(run, variant, places, grid.distances)


def write(run: Run, folder: Path, grid: Grid | None = None, **replaced: Any) -> Reader:
    """Writes the store of a run's soft variant; its identity may be replaced in part."""
    grid = grid or grid_of(run)
    reader = reader_of(run, grid)
    write_store(reader, grid.examples, folder, identity(run, "soft", 0, grid) | replaced, QUIET)
    return reader


def counted(reader: Reader, fail_at: int | None = None) -> list[int]:
    """Counts the examples that a reader is made to read, and may stop it at one of its readings."""
    calls: list[int] = []
    read = reader.read

    def counting(examples: Examples) -> list[Tensor]:
        calls.append(len(examples))
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        return read(examples)

    reader.read = counting
    return calls


def contents(folder: Path) -> dict[str, Any]:
    """What is in a folder; the manifest as what it says, whatever the order of its shards."""
    if not folder.exists():
        return {}
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with suppress(ProbekitError):
        files["manifest.json"] = read_json(folder / "manifest.json")
    return files


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def refusal(folder: Path, act: Callable[[], Any]) -> str:
    """The line in which something is refused; the folder stays as it was."""
    before = contents(folder)
    with pytest.raises(ProbekitError) as caught:
        act()
    assert contents(folder) == before
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def by_place(blocks: list[Stack], chunks: Iterator[tuple[slice, list[Tensor]]]) -> dict[Any, Tensor]:
    """The values of each chunk and place."""
    return {
        (part.start, part.stop, place): value
        for part, values in chunks
        for block, tensor in zip(blocks, values, strict=True)
        for place, value in zip(block.points, tensor, strict=True)
    }


@pytest.fixture
def stored(tiny_run: Run, tmp_path: Path) -> Path:
    """A complete store that a test may change."""
    write(tiny_run, tmp_path / "store")
    return tmp_path / "store"


CPU = torch.device("cpu")


@pytest.mark.parametrize("places", [PLACES, PLACES[3:], PLACES[:1], PLACES[1:3]])
def test_what_is_stored_is_what_was_read_bit_for_bit(stored: Path, tiny_run: Run, places: list[HookPoint]):
    grid = grid_of(tiny_run)
    reader, opened = reader_of(tiny_run, grid), Store(stored, CPU, places)
    assert {place for block in opened.stacks for place in block.points} == {*places}
    for block in opened.stacks:
        assert {block.width} == {128 if location == "mlp.hook_post" else 32 for location, _ in block.points}
    for split, examples in grid.examples.items():
        expected = by_place(reader.stacks, reader.chunks(examples))
        found = by_place(opened.stacks, opened.chunks(examples))
        assert found.keys() == {key for key in expected if key[2] in places}, split
        assert len({key[:2] for key in found}) > 1, "one chunk alone would prove less"
        for key, value in found.items():
            assert torch.equal(value, expected[key]), key


def test_a_complete_store_costs_nothing(stored: Path, tiny_run: Run, monkeypatch: pytest.MonkeyPatch):
    before = {path: path.stat().st_mtime_ns for path in stored.iterdir()}
    monkeypatch.delattr(Reader, "read")
    monkeypatch.setattr(store, "_check_room", lambda folder, size: size and pytest.fail("room for nothing"))
    write(tiny_run, stored)
    assert {path: path.stat().st_mtime_ns for path in stored.iterdir()} == before


@pytest.mark.parametrize("fail_at", [1, 2, 4])
def test_an_interrupted_store_goes_on_where_it_stopped(
    stored: Path, tiny_run: Run, tmp_path: Path, fail_at: int
):
    grid, folder = grid_of(tiny_run), tmp_path / "other"
    facts = identity(tiny_run, "soft", 0, grid)
    first, second = reader_of(tiny_run, grid), reader_of(tiny_run, grid)
    read = counted(first, fail_at)
    with pytest.raises(KeyboardInterrupt):
        write_store(first, grid.examples, folder, facts, QUIET)
    assert len(shards_of(folder)) == fail_at - 1
    read_later = counted(second)
    write_store(second, grid.examples, folder, facts, QUIET)
    assert sum(read[:-1]) + sum(read_later) == sum(map(len, grid.examples.values()))
    assert contents(folder) == contents(stored)


@pytest.mark.parametrize("written", [False, True])
def test_a_store_that_was_killed_in_its_first_shard_goes_on(
    stored: Path, tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool
):
    """Before the shard has its name, as a kill leaves it, or right after."""
    whole, folder = store.write_tensors, tmp_path / "other"

    def killed(path: Path, tensors: Mapping[str, Tensor]) -> None:
        if written:
            whole(path, tensors)
        else:
            path.with_name(f".tmp-0123-{path.name}").write_bytes(b"half a shard")
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "write_tensors", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tiny_run, folder)
    monkeypatch.undo()
    monkeypatch.setattr(activations, "CHUNK_EXAMPLES", 30)
    write(tiny_run, folder)
    left = contents(folder)
    assert {name: left[name] for name in contents(stored)} == contents(stored)


def test_the_size_told_is_the_size_written(tiny_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    grid, folder = grid_of(tiny_run, distances=(1, 2, 3, 4, 5, 6, 8)), tmp_path / "store"
    reader = reader_of(tiny_run, grid, places=[*PLACES, *(("hook_mlp_out", layer) for layer in range(3))])
    write_store(reader, grid.examples, folder, identity(tiny_run, "soft", 0, grid), Progress())
    told = float(capsys.readouterr().err.split("store ")[1].split(" GB")[0])
    written = sum(path.stat().st_size for path in folder.iterdir())
    examples = sum(map(len, grid.examples.values()))
    expected = stored_bytes(reader.stacks, 7, examples)
    assert expected == 4 * 7 * examples * (6 * 32 + 2 * 128)
    assert expected < written < 1.02 * expected
    assert told == pytest.approx(expected / 1e9, abs=0.005)


# Damage


@pytest.mark.parametrize("byte", [3, 200, -1])
def test_a_flipped_byte_is_found_when_it_is_read(stored: Path, tiny_run: Run, byte: int):
    grid = grid_of(tiny_run)
    digest = examples_digest(grid.examples["test"])
    shard = next(path for path in shards_of(stored) if path.name.startswith(digest[:12]))
    data = bytearray(shard.read_bytes())
    data[byte] ^= 1
    shard.write_bytes(data)
    opened = Store(stored, CPU, PLACES)
    list(opened.chunks(grid.examples["probe"]))
    line = refusal(stored, lambda: list(opened.chunks(grid.examples["test"])))
    assert f"{shard} is not what its manifest records; delete it and run with --store again" in line
    shard.unlink()  # what the line asks for
    reader = reader_of(tiny_run, grid)
    read = counted(reader)
    write_store(reader, grid.examples, stored, identity(tiny_run, "soft", 0, grid), QUIET)
    assert len(read) == 1
    list(Store(stored, CPU, PLACES).chunks(grid.examples["test"]))


def test_a_deleted_shard_is_named_and_read_again(stored: Path, tiny_run: Run):
    grid, before = grid_of(tiny_run), contents(stored)
    shards_of(stored)[0].unlink()
    opened = Store(stored, CPU, PLACES)
    line = refusal(stored, lambda: [list(opened.chunks(part)) for part in grid.examples.values()])
    assert "cannot be read" in line
    assert "run with --store again" in line
    write(tiny_run, stored)
    assert contents(stored) == before


def test_a_shard_that_is_cut_short_is_named(stored: Path, tiny_run: Run):
    shard = shards_of(stored)[0]
    shard.write_bytes(shard.read_bytes()[:-8])
    opened = Store(stored, CPU, PLACES)
    line = refusal(
        stored, lambda: [list(opened.chunks(part)) for part in grid_of(tiny_run).examples.values()]
    )
    assert str(shard) in line


def test_examples_that_were_not_stored_are_refused(stored: Path, tiny_run: Run):
    other = grid_of(tiny_run).examples["test"][5:]
    assert "cannot be read" in refusal(stored, lambda: list(Store(stored, CPU, PLACES).chunks(other)))


# Stores of something else


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "0123"), ("corpus", "0123, 9 tokens"), ("variant", "joint"), ("version", "0.0.1")],
)
def test_a_store_of_something_else_is_refused(stored: Path, tiny_run: Run, name: str, value: str):
    line = refusal(stored, lambda: write(tiny_run, stored, **{name: value}))
    assert f"{stored} stores activations of another {name}: " in line
    assert f"{value} is asked for" in line


def test_other_places_distances_and_examples_are_refused(stored: Path, tiny_run: Run):
    facts = identity(tiny_run, "soft", 0, grid_of(tiny_run))
    for named, grid, places in [
        ("distances", grid_of(tiny_run, distances=(1, 4)), PLACES),
        ("places", grid_of(tiny_run), PLACES[:-1]),
        ("examples", Grid(**vars(grid_of(tiny_run)) | {"examples": fewer(grid_of(tiny_run))}), PLACES),
    ]:
        reader = reader_of(tiny_run, grid, places=places)
        wanted = facts | {"distances": list(grid.distances)}
        line = refusal(
            stored,
            lambda reader=reader, grid=grid, wanted=wanted: write_store(
                reader, grid.examples, stored, wanted, QUIET
            ),
        )
        assert f"of another {named}: " in line
        assert len(line) < 500


def fewer(grid: Grid) -> dict[str, Examples]:
    return dict(grid.examples) | {"probe": grid.examples["probe"][3:]}


def test_another_layout_is_refused(stored: Path, tiny_run: Run):
    manifest = read_json(stored / "manifest.json")
    write_json(stored / "manifest.json", manifest | {"format": store.FORMAT + 1})
    line = refusal(stored, lambda: write(tiny_run, stored))
    assert f"has store format {store.FORMAT + 1}, not {store.FORMAT}" in line


@pytest.mark.parametrize("text", ["{", "", "[]", '{"shards": {}}', '{"format": 1}', '"manifest"'])
def test_a_damaged_manifest_is_named(stored: Path, tiny_run: Run, text: str):
    (stored / "manifest.json").write_text(text)
    line = refusal(stored, lambda: write(tiny_run, stored))
    assert "delete it" in line


def test_a_foreign_folder_is_left_alone(tiny_run: Run, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "exists and holds no store" in refusal(tmp_path, lambda: write(tiny_run, tmp_path))
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ProbekitError, match=r"file exists and holds no store"):
        write(tiny_run, file)
    assert file.read_text() == "mine"


def test_an_empty_folder_may_be_stored_in(stored: Path, tiny_run: Run, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    write(tiny_run, tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(stored)


# The disk


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    grid, folder = grid_of(tiny_run), tmp_path / "deep" / "er"
    reader = reader_of(tiny_run, grid)
    needed = stored_bytes(reader.stacks, 2, sum(map(len, grid.examples.values())))
    asked: list[Path] = []
    usage = namedtuple("usage", "total used free")

    def disk(free: float) -> Callable[[Path], Any]:
        return lambda path: (asked.append(Path(path)), usage(0, 0, int(free)))[1]

    monkeypatch.setattr(shutil, "disk_usage", disk(needed))
    line = refusal(folder, lambda: write(tiny_run, folder))
    assert "the activations take" in line
    assert "run without --store" in line
    assert asked == [tmp_path]
    assert not folder.parent.exists()
    monkeypatch.setattr(shutil, "disk_usage", disk(store.HEADROOM * needed + 1))
    write(tiny_run, folder)
    shards_of(folder)[0].unlink()
    monkeypatch.setattr(shutil, "disk_usage", disk(needed / 2))  # what is there already needs no room
    write(tiny_run, folder)


# Identity


def test_everything_that_changes_activations_changes_the_identity(tiny_run: Run, tmp_path: Path):
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path / "copy"))
    grid = grid_of(run)

    def of(variant: str, seed: int = 0, grid: Grid = grid, **settings: Any) -> dict[str, Any]:
        dotted = {name.replace("_", ".", 1): value for name, value in settings.items()}
        return identity(Run.open(run.folder).with_settings(dotted), variant, seed, grid)

    facts = [
        of("soft"),
        of("joint"),
        of("none"),
        of("random"),
        of("random", seed=1),
        of("soft", evaluation_window=20),
        of("soft", evaluation_stride=3),
        of("soft", training_precision="bfloat16"),
        of("soft", grid=grid_of(run, distances=(1, 2, 3))),
        of("soft", mixing_temperature=8.0),
        of("soft", planner_pooling="mean"),
        of("soft", conditioning_location="hook_mlp_out"),
    ]
    for one, other in itertools.combinations(facts, 2):
        assert one != other
    same = [of("soft", seed=1), of("soft", evaluation_batch_size=3), of("soft", probe_l2=[3.0])]
    assert all(one == facts[0] for one in same)
    assert of("none", mixing_temperature=8.0) == of("none")
    assert of("soft", training_precision="float32") == facts[0]  # what auto comes to on a CPU
    for file in ("lm/model.safetensors", "adapters/soft.safetensors", "planner/model.safetensors"):
        path = run.folder / file
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert of("soft")["model"] != facts[0]["model"], file
        path.write_bytes(data)
    assert of("soft") == facts[0]
    other = read_json(run.folder / "corpus" / "facts.json") | {"fingerprint": "0123456789abcdef"}
    write_json(run.folder / "corpus" / "facts.json", other)
    assert of("soft")["corpus"] != facts[0]["corpus"]


def test_digests_tell_examples_and_their_order_apart():
    anchor = np.array([4, 9, 2])
    empty = np.zeros(3, np.int64)
    examples = Examples(empty, anchor, empty, empty[:, None])
    assert examples_digest(examples) == examples_digest(
        Examples(empty, anchor.astype(np.int32), empty, empty[:, None])
    )
    assert (
        len({examples_digest(examples), examples_digest(examples[[1, 0, 2]]), examples_digest(examples[:2])})
        == 3
    )
