"""What several commands take alike."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from probekit.config import Config
from probekit.options import Parser, add_setting_options, add_source_options, chosen_config, source_config
from probekit.run.folder import check_settings


def building_parser(name: str, explained: str | None, words: list[str]) -> Parser:
    """The parser of a command that makes a run, or goes on with one."""
    usage = f"probekit {name} [--out FOLDER] [--preset NAME] [--config FILE] [--SETTING VALUE ...]"
    parser = Parser(prog=f"probekit {name}", usage=usage, description=explained)
    parser.add_argument("--out", default="runs/run", metavar="FOLDER", help="the run's folder (runs/run)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_all_settings(parser, words)
    return parser


def building_config(parsed: argparse.Namespace) -> Config | None:
    """The settings of the run that is to be made; None: those of the run that is there."""
    begun = Path(parsed.out) / "config.yaml"
    if not (parsed.resume and begun.is_file()):
        return chosen_config(parsed)
    check_settings(Path(parsed.out))
    return chosen_config(parsed, begun)


def existing(parsed: argparse.Namespace) -> Literal["resume", "overwrite", "refuse"]:
    """What becomes of the run that is there."""
    return "resume" if parsed.resume else "overwrite" if parsed.overwrite else "refuse"


def results_parser(name: str, explained: str | None, sections: list[str]) -> Parser:
    """The parser of a command that takes a run, and some sections of settings, and writes results."""
    usage = f"probekit {name} RUN [--SETTING VALUE ...]"
    parser = Parser(prog=f"probekit {name}", usage=usage, description=explained)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_setting_options(parser, Config(), sections)
    return parser


def add_all_settings(parser: Parser, words: list[str], preset: str | None = None) -> None:
    """Adds `--preset`, `--config` and every setting; without these two, the help tells those of `preset`."""
    add_source_options(parser)
    # Only the help tells defaults; a file that single settings put right is not to be refused for them.
    asked = {"-h", "--help"} & {*words}
    add_setting_options(parser, source_config(parser.prog, words, preset) if asked else Config())
