import os
from pathlib import Path

import pytest

from probekit import io as checksums
from probekit.io import file_checksum, first_damaged, record_of


def test_what_is_recorded_is_found_again_and_every_change_is_told(tmp_path: Path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for name in ("a.npy", "folder/b", "folder/deep/c"):
        (tmp_path / name).write_bytes(name.encode() * 9)
    record = record_of([tmp_path / "a.npy", tmp_path / "folder"], tmp_path)
    assert [*record] == ["a.npy", "folder/b", "folder/deep/c"]
    assert record["a.npy"][0] == 45
    assert first_damaged(record, tmp_path) is None
    path = tmp_path / "folder" / "b"
    whole = path.read_bytes()
    for damaged, why in (
        (whole[:-1], "it has 71 bytes, not 72"),
        (whole[:5] + b"x" + whole[6:], checksums.CHANGED),
    ):
        path.write_bytes(damaged)
        assert first_damaged(record, tmp_path) == (path, why)
    path.unlink()
    assert first_damaged(record, tmp_path) == (path, "No such file or directory")


def test_a_file_is_read_once_in_a_process_unless_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, opened, opens = tmp_path / "file", [], Path.open

    def counted(self: Path, *arguments: object, **named: object) -> object:
        opened.append(self)
        return opens(self, *arguments, **named)

    path.write_bytes(b"one")
    monkeypatch.setattr(Path, "open", counted)
    first = file_checksum(path)
    os.link(path, tmp_path / "another")
    assert file_checksum(path) == first
    assert opened == [path]
    monkeypatch.undo()
    path.unlink()
    path.write_bytes(b"two")
    assert file_checksum(path) != first


def test_of_large_files_blocks_from_beginning_to_end_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checksums, "READ_WHOLE", 1000)
    monkeypatch.setattr(checksums, "_BLOCK", 10)
    monkeypatch.setattr(checksums, "_BLOCKS", 5)
    whole = bytes(i % 251 for i in range(2050))

    def checksum(contents: bytes, name: str) -> str:
        (tmp_path / name).write_bytes(contents)
        return file_checksum(tmp_path / name)

    found = checksum(whole, "whole")
    noticed = [
        at
        for at in range(0, 2050, 5)
        if checksum(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :], f"at{at}") != found
    ]
    assert noticed == [0, 5, 510, 515, 1020, 1025, 1530, 1535, 2040, 2045]
    assert checksum(whole[:-1], "short") != found
    assert checksum(whole[:999], "small") != checksum(whole[:500] + b"\xff" + whole[501:999], "other")
