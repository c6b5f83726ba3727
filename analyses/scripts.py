"""What scripts that draw figures share: options, and one line for bad input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from manifest import PICTURES

from probekit.config import Config
from probekit.config.options import seed_list
from probekit.errors import ProbekitError


def script_parser(description: str | None, picture: str) -> argparse.ArgumentParser:
    """A parser with `--out`, which is refused before any work if it is no picture's path."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=_picture, default=Path(picture), help=f"the picture ({picture})")
    return parser


def add_training_options(
    parser: argparse.ArgumentParser, runs: str, *, preset: str | None, seeds: int
) -> None:
    """Adds what a script needs that trains what is missing: preset, settings over it, seeds, folder."""
    told = f" ({preset})" if preset else "; without it, what is there is drawn"
    parser.add_argument("--runs", type=Path, default=Path(runs), help=f"the runs' folder ({runs})")
    parser.add_argument("--preset", default=preset, help=f"train what is missing, with these settings{told}")
    parser.add_argument(
        "--set", nargs="+", action="append", default=[], metavar=("SETTING", "VALUE"), help="over the preset"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[seeds],
        help=f"one number: how many seeds, from the preset's on ({seeds}); several: the seeds",
    )


def training_config(given: argparse.Namespace) -> tuple[Config, list[int]]:
    """The settings and seeds that the options of `add_training_options` ask for.

    Raises:
        ProbekitError: A setting or its value is wrong.
    """
    over = {name: words[0] if len(words) == 1 else words for name, *words in given.set}
    config = Config.from_preset(given.preset).override(over)
    return config, seed_list(given.seeds, config.seed)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script; bad input ends it with one line and exit code 2, as it does the commands."""
    try:
        main()
    except ProbekitError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {error}\n")
        sys.exit(2)


def _picture(word: str) -> Path:
    if Path(word).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{word!r} must end in {', '.join(PICTURES)}")
    return Path(word)
