"""Settings as command-line options: every setting by its dotted name, with its documentation as help."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from probekit.config import (
    Config,
    merge,
    nest,
    preset_values,
    setting_value,
    settings_of,
    unknown_setting,
    yaml_values,
)
from probekit.errors import ProbekitError

UNSET = ("none", "null")
"""Words that unset a setting that can be unset."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours, so that all bad input is told in one way."""

    def __init__(self, **arguments: Any) -> None:
        arguments.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        """Raises the error instead of printing the whole usage."""
        raise ProbekitError(f"{message}; see `{self.prog} --help`")


def add_source_options(parser: Parser) -> None:
    """Adds `--preset` and `--config`, on top of which single settings are given."""
    group = parser.add_argument_group(
        "settings from", "single settings, below, win over the file, it over the preset"
    )
    group.add_argument("--preset", metavar="NAME", help="a shipped set of settings")
    group.add_argument(
        "--config", metavar="FILE", help="a YAML file of settings, such as a run's config.yaml"
    )


def add_setting_options(parser: Parser, defaults: Config, sections: Iterable[str] | None = None) -> None:
    """Adds an option for every setting, or for those of some sections.

    Args:
        parser: Where to add them.
        defaults: Told in the help; what is not given stays away from the parsed arguments.
        sections: Names of sections, or of settings.
    """
    for section, fields in _by_section(sections).items():
        group = parser.add_argument_group(section or "general", _doc(section))
        for name, field in fields.items():
            group.add_argument(
                f"--{name}",
                dest=name,
                default=argparse.SUPPRESS,
                metavar=_metavar(field.annotation),
                nargs="+" if takes_several(field) else None,
                help=f"{field.description} (default: {_shown(setting_value(defaults, name))})".replace(
                    "%", "%%"
                ),
            )


def parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """Parses, and names the nearest setting where one does not exist.

    Raises:
        ProbekitError: Something on the command line is not understood.
    """
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        wrong = next((word for word in unknown if word.startswith("--")), unknown[0])
        if wrong.startswith("--"):
            known = [option[2:] for action in parser._actions for option in action.option_strings]
            raise unknown_setting(wrong[2:].split("=")[0], known)
        raise ProbekitError(f"unexpected {wrong!r}; see `{parser.prog} --help`")
    return parsed


def given_settings(parsed: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given one by one, by dotted name; `none` unsets one that can be unset."""
    fields = settings_of(Config)
    return {
        name: None if unsets(value, fields[name]) else value
        for name, value in vars(parsed).items()
        if name in fields
    }


def unsets(value: Any, field: FieldInfo) -> bool:
    """Whether a value, as it was typed, unsets a setting that can be unset."""
    words = (*UNSET, *([word] for word in UNSET))
    return value in words and type(None) in typing.get_args(field.annotation)


def seed_list(given: Sequence[int], first: int) -> list[int]:
    """One number says how many, from the settings' seed on; several are the seeds."""
    return list(range(first, first + given[0])) if len(given) == 1 else list(given)


def chosen_config(parsed: argparse.Namespace, begun: Path | None = None) -> Config | None:
    """The config that preset, file and single settings make; None where none of them is given.

    Args:
        parsed: What `parse` found.
        begun: Settings of a run to go on with: single settings change those where no other source is given.
    """
    given = given_settings(parsed)
    if not (given or parsed.preset or parsed.config):
        return None
    values = preset_values(parsed.preset) if parsed.preset else {}
    file = parsed.config or (None if parsed.preset else begun)
    if file:
        values = merge(values, yaml_values(file))
    return Config.from_dict(merge(values, nest(given)))


def source_config(command: str, arguments: list[str], preset: str | None = None) -> Config:
    """The config of `--preset` and `--config` alone, for the defaults that a command's help tells.

    Args:
        command: What the command is called.
        arguments: What was typed behind it.
        preset: The preset where neither is given.
    """
    parser = Parser(prog=command, add_help=False)
    add_source_options(parser)
    parsed, _ = parser.parse_known_args(arguments)
    if not (parsed.preset or parsed.config):
        parsed.preset = preset
    return chosen_config(parsed) or Config()


def _by_section(sections: Iterable[str] | None) -> dict[str, dict[str, FieldInfo]]:
    found: dict[str, dict[str, FieldInfo]] = {}
    wanted = None if sections is None else set(sections)
    for name, field in settings_of(Config).items():
        section = name.rpartition(".")[0]
        if wanted is None or {name, name.split(".")[0]} & wanted:
            found.setdefault(section, {})[name] = field
    return found


def _doc(section: str) -> str | None:
    if not section:
        return None
    model: type[BaseModel] = Config
    for part in section.split("."):
        model = typing.cast(type[BaseModel], model.model_fields[part].annotation)
    return model.__doc__


def takes_several(field: FieldInfo) -> bool:
    """Whether a setting has several values."""
    return typing.get_origin(_without_none(field.annotation)) is tuple


def _without_none(annotation: Any) -> Any:
    if type(None) in typing.get_args(annotation):
        annotation = next(choice for choice in typing.get_args(annotation) if choice is not type(None))
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _metavar(annotation: Any) -> str:
    kind = _without_none(annotation)
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return _metavar(choices[0])
    if origin is typing.Literal:
        return "{" + ",".join(choices) + "}"
    return {int: "INT", float: "NUMBER", bool: "{true,false}"}.get(kind, "TEXT")


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    if isinstance(value, bool | None):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
