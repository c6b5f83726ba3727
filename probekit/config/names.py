"""Settings by their dotted names, such as `lm.layers`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from probekit.errors import ProbekitError


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turns dotted names into nested mappings: `{"a.b": 1}` to `{"a": {"b": 1}}`."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section = nested
        *sections, last = name.split(".")
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ProbekitError(f"{name} is given, and {part} as a whole too; give one of them")
        section[last] = value
    return nested


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested merge in which `over` wins; neither argument is changed."""
    merged = dict(base)
    for key, value in over.items():
        both_nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both_nested else value
    return merged


def settings_of(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """All settings below a section by dotted name, each with its pydantic `FieldInfo`."""
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields |= settings_of(kind, f"{prefix}{name}.")
        else:
            fields[prefix + name] = field
    return fields


def setting_value(config: BaseModel, name: str) -> Any:
    """The value of a setting, given by its dotted name."""
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def unknown_setting(name: str, known: list[str]) -> ProbekitError:
    """The error for a setting that does not exist, with the nearest that does."""
    return ProbekitError(f"unknown setting {name!r}{suggestion(name, known)}")


def suggestion(name: str, known: list[str]) -> str:
    """What ends an error about a wrong name: the nearest whose last part is much like its own, if any.

    Equal sections tell little.
    """
    alike = [other for other in known if _likeness(_last_part(name), _last_part(other)) >= 0.6]
    close = max(alike, key=lambda other: _likeness(name, other), default="")
    return f"; did you mean {close!r}?" if _likeness(name, close) >= 0.5 else ""


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name, other).ratio()


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]
