"""`probekit sweep`."""

from __future__ import annotations

import argparse
from typing import Any

from probekit.commands.parsers import add_all_settings
from probekit.config import Config, setting_names, settings_of, unknown_setting
from probekit.errors import ProbekitError
from probekit.options import Parser, chosen_config, given_settings, parse, seed_list, takes_several, unsets
from probekit.sweep import STUDIES, grid


def command(words: list[str]) -> None:
    """Train and evaluate with several values of some settings and several seeds; one table of all."""
    parsed = parse(_parser(words), words)
    config, members, seeds = swept(parsed)
    from probekit.reports.terminal import print_sweep
    from probekit.sweep import sweep

    out, quiet = parsed.out, parsed.quiet
    print_sweep(sweep(config, members, seeds, out, generation=parsed.generation, quiet=quiet))


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


def _swept_value(name: str, word: Any) -> Any:
    """One value of a setting; those of a setting that takes several are joined by commas."""
    field = settings_of(Config).get(name)
    if field is None or not isinstance(word, str):
        return word
    if unsets(word, field):
        return None
    return word.split(",") if takes_several(field) else word


def _parser(words: list[str]) -> Parser:
    usage = (
        "probekit sweep SETTING --values VALUE ... [--over SETTING VALUE ...] [--seeds N]\n"
        "                      [--preset NAME] [--config FILE] [--SETTING VALUE ...] [--out FOLDER]\n"
        f"       probekit sweep {{{','.join(STUDIES)}}} ..."
    )
    parser = Parser(prog="probekit sweep", usage=usage, description=command.__doc__)
    studies = (
        f"{name}: {study.setting} with the variant {study.variant} and those in --mixing.variants"
        for name, study in STUDIES.items()
    )
    parser.add_argument(
        "what", nargs="?", metavar="SETTING", help=f"a setting, or a study ({'; '.join(studies)})"
    )
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
    parser.add_argument(
        "--out", default="runs/sweep", metavar="FOLDER", help="the sweep's folder (runs/sweep)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_all_settings(parser, words)
    return parser
