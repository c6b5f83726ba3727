import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probekit import io as storage
from probekit.errors import ProbekitError

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=10,
)


TABLE = pd.DataFrame(
    {
        "document": np.arange(40),
        "variant": ["soft", None] * 20,
        "loss": np.where(np.arange(40) % 7, np.linspace(-1, 1, 40), np.nan),
        "injected": np.arange(40) % 2 == 0,
        "nothing": None,
        "lists": [[1, 2]] * 40,
    }
)


class BrokenOffError(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@given(value=JSON_VALUES)
def test_json_comes_back_equal(tmp_path_factory: pytest.TempPathFactory, value: object):
    path = tmp_path_factory.getbasetemp() / "value.json"
    storage.write_json(path, value)
    assert storage.read_json(path) == value
    assert path.read_bytes().endswith(b"\n")


def test_text_keeps_its_line_ends_and_parents_are_made(tmp_path: Path):
    path = tmp_path / "deep" / "er" / "a.txt"
    storage.write_text(path, "a\r\nb\n\u2028")
    assert path.read_bytes() == "a\r\nb\n\u2028".encode()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_come_back_exactly(tmp_path: Path, dtype: torch.dtype):
    tensors = {
        "a": torch.randn(4, 6).to(dtype).T,
        "empty": torch.zeros(0, 3, dtype=dtype),
        "one": torch.ones((), dtype=dtype),
    }
    storage.write_tensors(tmp_path / "t.safetensors", tensors, {"kind": "test"})
    back = storage.read_tensors(tmp_path / "t.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == dtype for name in tensors)
    assert storage.read_metadata(tmp_path / "t.safetensors") == {"kind": "test"}


def test_files_get_the_permissions_that_the_umask_leaves(tmp_path: Path):
    (tmp_path / "plain").touch()
    storage.write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)})
    storage.write_text(tmp_path / "t.txt", "a")
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "t.safetensors", "t.txt")}
    assert len(modes) == 1


@pytest.mark.parametrize("array", [np.arange(12, dtype=np.int32).reshape(3, 4), np.zeros((0, 5), np.float32)])
def test_arrays_come_back_and_stay_on_disk(tmp_path: Path, array: np.ndarray):
    storage.write_array(tmp_path / "a.npy", array)
    found = storage.read_array(tmp_path / "a.npy")
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    np.testing.assert_array_equal(found, array)
    assert found.dtype == array.dtype


def test_an_array_of_objects_is_neither_written_nor_read(tmp_path: Path):
    objects = np.array([{}], dtype=object)
    with pytest.raises(ValueError, match="allow_pickle"):
        storage.write_array(tmp_path / "a.npy", objects)
    assert names(tmp_path) == []
    np.save(tmp_path / "b.npy", objects)
    with pytest.raises(ProbekitError, match=r"b\.npy"):
        storage.read_array(tmp_path / "b.npy")


@pytest.mark.parametrize("table", [TABLE, TABLE.iloc[:0], TABLE[[]]])
def test_tables_come_back_equal_without_their_index(tmp_path: Path, table: pd.DataFrame):
    storage.write_table(tmp_path / "t.parquet", table.set_axis(range(7, 7 + len(table))))
    table.to_parquet(tmp_path / "plain.parquet", index=False)
    plain = pd.read_parquet(tmp_path / "plain.parquet")
    pd.testing.assert_frame_equal(storage.read_table(tmp_path / "t.parquet"), plain)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def broken_off() -> None:
        with storage.atomic_path(path) as temporary:
            assert temporary.suffix == ".txt"
            temporary.write_text("half")
            raise BrokenOffError

    with pytest.raises(BrokenOffError):
        broken_off()
    with pytest.raises(TypeError):
        storage.write_json(path, {"not": object()})
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_symbolic_link_stays_one_and_its_target_is_replaced(tmp_path: Path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    storage.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path):
    for text in ("first", "second"):
        with storage.atomic_folder(tmp_path / "run") as temporary:
            (temporary / "inner").mkdir()
            storage.write_text(temporary / "inner" / f"{text}.txt", text)
    assert names(tmp_path) == ["run"]
    assert names(tmp_path / "run" / "inner") == ["second.txt"]


@pytest.mark.parametrize("error", [BrokenOffError, KeyboardInterrupt])
def test_a_failed_folder_leaves_the_old_one_and_nothing_else(tmp_path: Path, error: type[BaseException]):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_text("old")

    def broken_off() -> None:
        with storage.atomic_folder(tmp_path / "run") as temporary:
            (temporary / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        broken_off()
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "a.txt").read_text() == "old"


def test_a_folder_whose_last_rename_fails_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a.txt").write_text("old")
    rename, renames = Path.rename, []

    def second_rename_fails(source: Path, target: Path) -> Path:
        renames.append(source)
        if len(renames) == 2:
            raise OSError("disk full")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", second_rename_fails)
    with pytest.raises(OSError, match="disk full"), storage.atomic_folder(tmp_path / "run"):
        pass
    assert names(tmp_path) == ["run"]
    assert (tmp_path / "run" / "a.txt").read_text() == "old"


def test_bytes_are_synced_before_they_get_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced_while_hidden = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced_while_hidden.append(not (tmp_path / "a.txt").exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    storage.write_text(tmp_path / "a.txt", "a")
    assert synced_while_hidden == [True, False]  # the file before the rename, its folder after it


WHOLE = {
    storage.read_json: lambda path: storage.write_json(path, list(range(50))),
    storage.read_tensors: lambda path: storage.write_tensors(path, {"a": torch.ones(50)}),
    storage.read_array: lambda path: storage.write_array(path, np.ones(50)),
    storage.read_table: lambda path: storage.write_table(path, TABLE),
}


@pytest.mark.parametrize("read", WHOLE)
@pytest.mark.parametrize(
    "damage",
    [lambda whole: b"", lambda whole: b"\xff" * 300, lambda whole: whole[:40], lambda whole: whole[:-5]],
)
def test_a_damaged_file_is_reported_in_one_line(tmp_path: Path, read, damage):
    path = tmp_path / "file"
    WHOLE[read](path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ProbekitError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "run the step" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", WHOLE)
def test_a_missing_file_and_a_folder_are_reported(tmp_path: Path, read):
    with pytest.raises(ProbekitError, match="does not exist"):
        read(tmp_path / "none")
    with pytest.raises(ProbekitError, match="cannot be opened"):
        read(tmp_path)


@given(cuts=st.lists(st.integers(0, 12), max_size=5))
def test_rows_appended_in_any_pieces_equal_one_write(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
):
    rows = np.arange(36, dtype=np.float32).reshape(12, 3)
    folder = tmp_path_factory.getbasetemp()
    with storage.ArrayAppender(folder / "grown.npy", np.float32, (3,)) as appender:
        for piece in np.split(rows, sorted(cuts)):
            appender.append(piece)
    storage.write_array(folder / "whole.npy", rows)
    assert (folder / "grown.npy").read_bytes() == (folder / "whole.npy").read_bytes()
