"""The record of a probing: read back as it was written, refused in one line where it is something else."""

from pathlib import Path
from typing import Any

import pytest

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.io import write_json
from probekit.probing.results import read_probe_record

CONFIG = Config().override({"probe.distances": [1, 5]})
RECORD: dict[str, Any] = CONFIG.model_dump(mode="json") | {
    "notes": ["one"],
    "of": {"version": "0"},
    "documents": {"3": {"probe": 4, "validation": 2, "test": 1}},
}


def written(run: Path, record: object) -> Path:
    write_json(run / "probes" / "settings.json", record)
    return run


def test_a_record_is_read_back(tmp_path: Path):
    found = read_probe_record(written(tmp_path, RECORD))
    assert found.config == CONFIG
    assert found.notes == ["one"]
    assert found.documents["3"].model_dump() == RECORD["documents"]["3"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ([], "it holds no settings"),
        (None, "it holds no settings"),
        ({}, "it holds no settings"),
        ({"probe": {"distances": {"a": 1}}}, "probe.distances"),
        ({"probe": 3}, "probe is 3"),
        ({"probe": {"variants": [["none"]]}}, "probe.variants"),
        ({"evaluation": 0.5}, "evaluation is 0.5"),
        ({"evaluation": {"window": "x"}}, "evaluation.window"),
        ({"notes": "one"}, "notes is 'one'"),
        ({"notes": [["one"]]}, r"notes.0 is \['one'\]"),
        ({"documents": -1}, "documents is -1"),
        ({"documents": {"3": {"test": "x"}}}, "documents.3.probe"),
        ({"documents": {"3": {"probe": 1, "validation": 1, "test": [None]}}}, "documents.3.test"),
        ({"documents": {"3": {"probe": 1, "validation": 1, "test": True}}}, "documents.3.test is True"),
        ({"documents": {"3": {"probe": 1, "validation": -1, "test": 1}}}, "documents.3.validation is -1"),
    ],
)
def test_values_of_other_types_are_named(change: Any, said: str, tmp_path: Path):
    record = RECORD | change if change else change
    with pytest.raises(ProbekitError, match=said) as told:
        read_probe_record(written(tmp_path, record))
    line = str(told.value)
    assert line.startswith(f"{tmp_path / 'probes' / 'settings.json'} is no record of a probing (")
    assert line.endswith(f"run `probekit probe {tmp_path}`")
    assert "\n" not in line
