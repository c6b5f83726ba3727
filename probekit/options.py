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
    setting_names,
    setting_value,
    settings_of,
    unknown_setting,
    yaml_values,
)
from probekit.errors import ProbekitError
from probekit.settings_file import check_settings
from probekit.sweeps.members import STUDIES, grid

ANY_MODEL = "any-model"
"""The preset on which `probekit probe --model` builds where no other is given."""

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
                nargs="+" if _takes_several(field) else None,
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
        name: None
        if value in (*UNSET, *([word] for word in UNSET)) and _can_be_unset(fields[name])
        else value
        for name, value in vars(parsed).items()
        if name in fields
    }


def swept(parsed: argparse.Namespace) -> tuple[Config, dict[str, dict[str, Any]], list[int]]:
    """The settings, members and seeds of the sweep that was asked for.

    Raises:
        ProbekitError: Nothing to sweep over is given, or what is given is wrong.
    """
    config = chosen_config(parsed)
    if config is None:
        raise ProbekitError("the sweep has no settings to change; give --preset or --config")
    over = [list(words) for words in parsed.over]
    study = STUDIES.get(parsed.what)
    if study:
        beside = [name for name in given_settings(parsed).get("mixing.variants", ()) if name != study.variant]
        config = config.override({"mixing.variants": [*beside, study.variant]})
        over.insert(0, [study.setting, *(study.values if parsed.values is None else parsed.values)])
    elif parsed.what:
        if parsed.what not in setting_names():
            raise unknown_setting(parsed.what, [*STUDIES, *setting_names()])
        over.insert(0, [parsed.what, *(parsed.values or ())])
    elif parsed.values is not None:
        raise ProbekitError("--values has no setting; give it first: probekit sweep SETTING --values ...")
    if not over:
        raise ProbekitError(f"nothing to sweep over; give a setting with --values, or {', '.join(STUDIES)}")
    values: dict[str, list[Any]] = {}
    for name, *words in over:
        if name in values:
            raise ProbekitError(f"{name} is swept over twice; give all its values at once")
        values[name] = [_swept_value(name, word) for word in words]
    return config, grid(config, values), seed_list(parsed.seeds, config.seed)


def seed_list(given: Sequence[int], first: int) -> list[int]:
    """One number says how many, from the settings' seed on; several are the seeds."""
    return list(range(first, first + given[0])) if len(given) == 1 else list(given)


def _swept_value(name: str, word: Any) -> Any:
    """One value of a setting; those of a setting that takes several are joined by commas."""
    field = settings_of(Config).get(name)
    if field is None or not isinstance(word, str):
        return word
    if word in UNSET and _can_be_unset(field):
        return None
    return word.split(",") if _takes_several(field) else word


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


def probed_config(parsed: argparse.Namespace) -> Config:
    """The config of `--model` and `--corpus` on the run that is in `--out`, or on the preset `any-model`.

    `--preset` and `--config` win over both.
    """
    there = Path(parsed.out) / "config.yaml"
    begun = there if there.is_file() and not parsed.overwrite else None
    if begun:
        check_settings(begun.parent)
    else:
        parsed.preset = parsed.preset or (None if parsed.config else ANY_MODEL)
    config = chosen_config(parsed, begun) or (Config.from_yaml(begun) if begun else Config())
    paths = {"lm.name": parsed.model, "corpus.path": parsed.corpus}
    return config.override({name: value for name, value in paths.items() if value is not None})


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


def _can_be_unset(field: FieldInfo) -> bool:
    return type(None) in typing.get_args(field.annotation)


def _takes_several(field: FieldInfo) -> bool:
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
