"""Settings in files: YAML, and the presets that are shipped."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from probekit.config.names import suggestion
from probekit.errors import ProbekitError


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    folder = resources.files("probekit") / "presets"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
    )


def preset_values(name: str) -> dict[str, Any]:
    """The nested values that a preset sets."""
    names = preset_names()
    if name not in names:
        raise ProbekitError(f"unknown preset {name!r}{suggestion(name, names)}; there are {', '.join(names)}")
    return yaml.safe_load((resources.files("probekit") / "presets" / f"{name}.yaml").read_text("utf-8"))


def yaml_values(path: str | Path) -> dict[str, Any]:
    """The nested values in a YAML file of settings."""
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ProbekitError(f"config file {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ProbekitError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise ProbekitError(
            f"config file {path} holds a {type(values).__name__}; it must hold named settings"
        )
    return values or {}
