"""The record of a probing: the settings and notes that its tables come with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.io import read_json

SETTINGS = "settings.json"
"""The file in the folder of probes that says how they were made."""


@dataclass(frozen=True)
class ProbeRecord:
    """How a run's probes were made, as `probes/settings.json` records it.

    Attributes:
        config: All settings.
        notes: What to know of all rows together.
        documents: By seed and split the documents that examples were drawn from.
        origin: What the results depend on beside settings and weights; see `resume.origin`.
        classes: Names of the classes, none of numbers.
        extent: What a label is of: sentences (or the tokens in them), texts, spans or pairs.
        range: The least and the largest number that probes were fitted on; None for classes.
    """

    config: Config
    notes: list[str]
    documents: Mapping[str, Mapping[str, int]]
    origin: Mapping[str, Any]
    classes: tuple[str, ...]
    extent: str
    range: tuple[float, float] | None

    @property
    def kind(self) -> str:
        """The kind of the target: classes, numbers or vectors."""
        if self.classes:
            return "classes"
        return "vectors" if self.range is None else "numbers"

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> Self:
        """The record that a file holds."""
        settings = {name: value for name, value in written.items() if name in Config.model_fields}
        ends = written["range"]
        return cls(
            Config.from_dict(settings),
            written["notes"],
            written["documents"],
            written["of"],
            tuple(written["classes"]),
            written["extent"],
            None if ends is None else (float(ends[0]), float(ends[1])),
        )


def read_probe_record(run: Path) -> ProbeRecord:
    """Reads the record of the probes in a run's folder.

    Raises:
        ProbekitError: There is none.
    """
    path = run / "probes" / SETTINGS
    if not path.exists():
        raise ProbekitError(f"{path} does not exist; run `probekit probe {run}`")
    return ProbeRecord.of(read_json(path))
