"""Settings as command-line options: every setting by its dotted name, with its documentation as help."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from pydantic import Field, create_model
from pydantic_settings import BaseSettings, CliSettingsSource

from probekit.config.config import (
    Config,
    merge,
    preset_values,
    setting_names,
    settings_of,
    unknown_setting,
    yaml_values,
)
from probekit.errors import ProbekitError

ALL = tuple(Config.model_fields)
"""All sections of the settings."""

SHORTHANDS = {
    "model": "lm.name",
    "corpus": "corpus.path",
    "group": "corpus.group_column",
    "labels": "probe.labels",
    "text": "probe.text_column",
    "roles": "probe.roles",
    "target": "probe.target",
    "positions": "probe.positions",
}
"""Options of `probekit probe`, and the settings that they stand for."""

OF_LABELS = ("labels", "text", "roles", "target", "positions")
"""Those of them that a run takes, too."""

READING = ("device", "lm.device_map", "lm.dtype", "corpus.encoding")
"""Settings of how an LM is held and a file is read, for what is done with a run."""

SINGLE = tuple(name for name in ALL if name in setting_names())
"""Settings that are in no section."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all errors of the commands."""

    def __init__(self, prog: str, **arguments: Any) -> None:
        arguments.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        """Raises the error instead of printing the whole usage."""
        raise ProbekitError(f"{message}; see `{self.prog} --help`")


def add_sources(parser: Parser) -> None:
    """Adds `--preset` and `--config`, on top of which single settings are given."""
    group = parser.add_argument_group("settings", "the preset, then the file, then single settings")
    group.add_argument("--preset", metavar="NAME", help="a shipped set of settings")
    group.add_argument("--config", metavar="FILE", help="a YAML file, such as a run's config.yaml")


def add_labels(group: argparse._ArgumentGroup) -> None:
    """Adds the options that say what is read: a column of a table, or a built-in target."""
    for name, metavar, text in (
        ("labels", "FILE", "table of labels: a file, or a Hugging Face dataset"),
        ("text", "COLUMN", "its column of texts or chats; without --corpus, the corpus"),
        ("target", "NAME", "its column of labels, or a built-in target such as action"),
        ("group", "COLUMN", "the corpus's column of groups, such as topics, which no two splits share"),
    ):
        group.add_argument(f"--{name}", metavar=metavar, help=text)
    group.add_argument(
        "--roles", nargs="+", metavar="ROLE", help="of chats, read these roles' messages alone"
    )


def command_parser(command: Callable[[list[str]], None], usage: str | None = None) -> Parser:
    """The parser of a command, with what all have."""
    parser = Parser(f"probekit {command.__name__}", usage=usage, description=command.__doc__)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def run_parser(command: Callable[[list[str]], None]) -> Parser:
    """The parser of a command that takes a run."""
    parser = command_parser(command, f"probekit {command.__name__} RUN [--OPTION VALUE ...]")
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    return parser


def new_run_parser(command: Callable[[list[str]], None]) -> Parser:
    """The parser of a command that makes a run or continues one."""
    sources = "[--preset NAME] [--config FILE] [--SETTING VALUE ...]"
    parser = command_parser(command, f"probekit {command.__name__} [--out FOLDER] {sources}")
    parser.add_argument("--out", default="runs/run", metavar="FOLDER", help="the run's folder (runs/run)")
    existing = parser.add_mutually_exclusive_group()
    for what, text in (("resume", "continue the run in that folder"), ("overwrite", "replace that run")):
        existing.add_argument(
            f"--{what}", dest="existing", action="store_const", const=what, default="refuse", help=text
        )
    add_sources(parser)
    return parser


def parse(
    parser: Parser, words: Sequence[str], sections: Iterable[str] = (), preset: str | None = None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parses a command line whose options are the parser's own and settings.

    Several values of a setting are separated by blanks or commas; `null` unsets a setting that can be unset.

    Args:
        parser: The command's parser; the settings are added to it, after its own options.
        words: What was typed after the command.
        sections: Fields of `Config`, or single settings such as `lm.device_map`, that are options.
        preset: Whose values the help shows as defaults, where neither `--preset` nor `--config` is given.

    Returns:
        The values of the command's own options, and the settings that were given, nested by section.

    Raises:
        ProbekitError: An option does not exist (the nearest one is named) or lacks its value.
    """
    asks_help = bool({"-h", "--help"} & {*words})
    defaults = _shown_defaults(parser.prog, words, preset) if asks_help else Config()
    settings: CliSettingsSource[Any] = CliSettingsSource(
        _model_of(sections, defaults),
        root_parser=parser,
        add_argument_method=_add_argument,
        cli_avoid_json=True,
        cli_enforce_required=False,
        cli_hide_none_type=True,
        cli_parse_none_str="null",
    )
    parsed, unknown = parser.parse_known_args(words)
    if unknown:
        wrong = next((word for word in unknown if word.startswith("--")), unknown[0])
        if not wrong.startswith("--"):
            parser.error(f"unexpected {wrong!r}")
        known = [option[2:] for action in parser._actions for option in action.option_strings]
        raise unknown_setting(wrong[2:].split("=")[0], known)
    # A section and an option of the command may have one name, such as `corpus`.
    typed = {name: value for name, value in vars(parsed).items() if "." in name or name in SINGLE}
    for name, words_of in typed.items():
        if isinstance(words_of, list):  # as JSON, so that whatever was typed is for `Config` to refuse
            typed[name] = json.dumps([value for word in words_of for value in word.split(",")])
    return parsed, _unset(settings(parsed_args=argparse.Namespace(**typed))())


def _shown_defaults(prog: str, words: Sequence[str], preset: str | None) -> Config:
    """The settings of `--preset` and `--config` alone."""
    parser = Parser(prog, add_help=False)
    add_sources(parser)
    sources, _ = parser.parse_known_args(words)
    if not (sources.preset or sources.config):
        sources.preset = preset
    return chosen_config(sources, {}) or Config()


def _model_of(sections: Iterable[str], defaults: Config) -> type[BaseSettings]:
    """A model of some sections of `Config`, without its validators: `Config` itself validates."""
    wanted: dict[str, list[str]] = {}
    for name in sections:
        section, _, setting = name.partition(".")
        wanted.setdefault(section, []).extend([setting] if setting else [])
    fields: dict[str, Any] = {}
    for section, settings in wanted.items():
        field, default = Config.model_fields[section], getattr(defaults, section)
        kind: Any = field.annotation
        if settings:
            only = {name: (kind.model_fields[name].annotation, kind.model_fields[name]) for name in settings}
            kind = create_model(kind.__name__, __doc__=kind.__doc__, **cast(Any, only))
            default = kind(**{name: getattr(default, name) for name in settings})
        fields[section] = (kind, Field(default, description=field.description))
    return create_model("Settings", __base__=BaseSettings, **fields)


def _unset(given: dict[str, Any]) -> dict[str, Any]:
    """Reads `null` given to a setting that takes several values as no value."""
    return {
        name: _unset(value) if isinstance(value, dict) else None if value == ["null"] else value
        for name, value in given.items()
    }


def _add_argument(parser: argparse.ArgumentParser, *names: str, **arguments: Any) -> argparse.Action | None:
    """Adds the option of a setting; one that takes several values takes them as several words, too."""
    if arguments.get("const") == "{}":  # a whole section as JSON, whose name may be an option of the command
        return None
    if arguments.get("action") == "append":
        arguments |= {"action": "store", "nargs": "+"}
    return argparse.ArgumentParser.add_argument(parser, *names, **arguments)


def dotted(given: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        nested = isinstance(value, dict)
        found |= dotted(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def chosen_config(
    parsed: argparse.Namespace, given: dict[str, Any], continued: Path | None = None
) -> Config | None:
    """The config that preset, file and single settings make; None if none of them is given.

    Args:
        parsed: The command's own options, with those of `add_sources`.
        given: Single settings, nested.
        continued: The settings file of a run to continue, used where neither preset nor file is given.
    """
    if not (given or parsed.preset or parsed.config):
        return None
    values = preset_values(parsed.preset) if parsed.preset else {}
    file = parsed.config or (None if parsed.preset else continued)
    if file:
        values = merge(values, yaml_values(file))
    return Config.from_dict(merge(values, given))


def shorthands(parsed: argparse.Namespace, given: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The settings that were given by short options, of these names."""
    values = {SHORTHANDS[name]: getattr(parsed, name) for name in names}
    found = {name: value for name, value in values.items() if value is not None}
    # Another table need not have the column of texts that an earlier one had, nor its roles.
    anew = ("text_column", "roles") if parsed.labels and not parsed.config else ()
    return {f"probe.{name}": None for name in anew if name not in given.get("probe", {})} | found


def typed_value(name: str, word: str) -> Any:
    """One value of a setting as it was typed; those of a setting that takes several are joined by commas."""
    field = settings_of(Config).get(name)
    if word == "null":
        return None
    return word.split(",") if "tuple[" in str(field and field.annotation) else word


def seed_list(given: Sequence[int], first: int) -> list[int]:
    """The seeds that `--seeds` names: one number is how many, from `first` on; several are the seeds."""
    return list(range(first, first + given[0])) if len(given) == 1 else list(given)
