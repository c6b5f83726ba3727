"""What a sweep is made of: members, which are named sets of settings, and seeds. Loads nothing heavy."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from probekit.config import Config, setting_names, setting_value, unknown_setting
from probekit.errors import ProbekitError

Members = Mapping[str, Mapping[str, Any]]
"""Settings by dotted name, for every member by its name."""


@dataclass(frozen=True)
class Study:
    """A sweep with a name.

    Attributes:
        setting: What it sweeps over.
        values: Its values where none are given.
        variant: The variant that it is about; others are trained beside it only where they are asked for.
    """

    setting: str
    values: tuple[Any, ...]
    variant: str


STUDIES = {"mixing-fraction": Study("mixing.fraction", (0, 0.25, 0.5, 0.75, 1), "mixed")}
"""Sweeps that the papers make (arXiv 2410.12492, Figure 4)."""


def grid(config: Config, over: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Members for all combinations of the values of some settings, such as `mixing.fraction=0.5`.

    Args:
        config: The settings that they change.
        over: Values by dotted name.

    Raises:
        ProbekitError: A setting does not exist or has no values; a value does not fit it or is given twice.
    """
    for name, values in over.items():
        if name not in setting_names():
            raise unknown_setting(name, setting_names())
        if not values:
            raise ProbekitError(f"{name} has no values to sweep over; give one or more")
    members: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*over.values()):
        config = config.override(dict(zip(over, values, strict=True)))
        settings = {name: setting_value(config, name) for name in over}
        member = ",".join(f"{name}={_text(value)}" for name, value in settings.items())
        if member in members:
            raise ProbekitError(f"{member} is given twice; leave one out")
        members[member] = settings
    return members


def _text(value: Any) -> str:
    """A setting's value in the name of a folder."""
    if isinstance(value, tuple):
        return "+".join(map(_text, value))
    if isinstance(value, bool | None):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else re.sub(r"[^\w.-]", "_", str(value))
