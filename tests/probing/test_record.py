"""The record of a probing is read back as it was written."""

from pathlib import Path

from probekit.config import Config
from probekit.io import write_json
from probekit.probing.record import read_probe_record


def test_a_record_is_read_back(tmp_path: Path):
    config = Config().override({"probe.positions": [1, 5]})
    documents = {"3": {"probe": 4, "validation": 2, "test": 1}}
    record = {"notes": ["one"], "of": {"version": "0"}, "documents": documents}
    record |= {"classes": ["no", "yes"], "extent": "texts", "range": None}
    path = tmp_path / "probes" / "settings.json"
    write_json(path, config.model_dump(mode="json") | record)
    found = read_probe_record(tmp_path)
    assert (found.config, found.notes, found.documents) == (config, ["one"], documents)
    assert (found.origin, found.classes, found.extent) == ({"version": "0"}, ("no", "yes"), "texts")
    assert (found.range, found.kind) == (None, "classes")
    numbers = record | {"classes": [], "range": [0, 2]}
    write_json(path, config.model_dump(mode="json") | numbers)
    found = read_probe_record(tmp_path)
    assert (found.classes, found.range, found.kind) == ((), (0.0, 2.0), "numbers")
