"""The command line of `probekit sweep`: settings, their values and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from probekit.cli.options import (
    ALL,
    add_sources,
    chosen_config,
    command_parser,
    parse,
    seed_list,
    typed_value,
)
from probekit.config import Config, setting_names, unknown_setting
from probekit.errors import ProbekitError

STUDIES = {"mixing-fraction": ("mixing.fraction", (0, 0.25, 0.5, 0.75, 1), "mixed")}
"""Sweeps with a name: the setting, its values, the variant they are about (arXiv 2410.12492, Figure 4)."""


def parse_sweep(
    command: Callable[[list[str]], None], words: list[str]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parses what was typed after `probekit sweep`: the command's own options, and settings, nested."""
    usage = (
        "probekit sweep SETTING --values VALUE ... [--over SETTING VALUE ...] [--seeds N]\n"
        "                      [--preset NAME] [--config FILE] [--SETTING VALUE ...] [--out FOLDER]\n"
        f"       probekit sweep {{{','.join(STUDIES)}}} ..."
    )
    parser = command_parser(command, usage)
    parser.add_argument("what", nargs="?", metavar="SETTING", help=f"a setting, or {', '.join(STUDIES)}")
    parser.add_argument(
        "--values", nargs="+", metavar="VALUE", help="its values; those of one that takes several: a,b"
    )
    parser.add_argument(
        "--over",
        nargs="+",
        action="append",
        default=[],
        metavar=("SETTING", "VALUE"),
        help="another setting and its values; a run for every combination",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[1],
        metavar="INT",
        help="one number: how many seeds, from --seed on (1); several: the seeds",
    )
    parser.add_argument("--generation", action="store_true", help="measure generated text, too")
    parser.add_argument("--out", default="runs/sweep", metavar="FOLDER", help="the folder (runs/sweep)")
    add_sources(parser)
    return parse(parser, words, ALL)


def swept(
    parsed: argparse.Namespace, given: dict[str, Any]
) -> tuple[Config, dict[str, dict[str, Any]], list[int]]:
    """The settings, members and seeds of the sweep that was asked for."""
    from probekit.sweeps import grid

    config = chosen_config(parsed, given)
    if config is None:
        raise ProbekitError("the sweep has no settings to change; give --preset or --config")
    over = [list(words) for words in parsed.over]
    if parsed.what in STUDIES:
        setting, usual, variant = STUDIES[parsed.what]
        beside = [name for name in given.get("mixing", {}).get("variants", ()) if name != variant]
        config = config.override({"mixing.variants": [*beside, variant]})
        over.insert(0, [setting, *(usual if parsed.values is None else parsed.values)])
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
        values[name] = [typed_value(name, word) if isinstance(word, str) else word for word in words]
    return config, grid(config, values), seed_list(parsed.seeds, config.seed)
