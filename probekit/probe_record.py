"""How a run's probes were made, as `probes/settings.json` tells it, checked before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.storage import one_line, read_json

SETTINGS = "settings.json"
"""The file in the folder of probes."""

Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class SplitDocuments(_Record):
    """How many documents probes were fitted on, chosen on and tested on."""

    probe: Count
    validation: Count
    test: Count


class ProbeRecord(_Record):
    """How probes were made.

    Attributes:
        config: All settings.
        notes: What to know of all rows together.
        documents: By seed of the documents drawn to fit on.
    """

    config: Config
    notes: list[str] = []
    documents: dict[str, SplitDocuments] = {}


def read_probe_record(run: Path) -> ProbeRecord:
    """The record of the probes in a run's folder.

    Raises:
        ProbekitError: There is none, or it is not what `probekit probe` writes.
    """
    path = run / "probes" / SETTINGS
    recorded = read_json(path)
    try:
        if not isinstance(recorded, dict) or not recorded.keys() & Config.model_fields.keys():
            raise ValueError("it holds no settings")
        settings = {name: value for name, value in recorded.items() if name in Config.model_fields}
        rest = {name: recorded[name] for name in ("notes", "documents") if name in recorded}
        return ProbeRecord.model_validate({"config": Config.from_dict(settings), **rest})
    except (ProbekitError, ValueError) as error:
        raise ProbekitError(
            f"{path} is no record of a probing ({_first(error)}); run `probekit probe {run}`"
        ) from None


def _first(error: Exception) -> str:
    """What is wrong, on one line; of several things the first."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    found: dict[str, Any] = dict(error.errors(include_url=False)[0])
    return f"{'.'.join(map(str, found['loc']))} is {found['input']!r}: {found['msg']}"
