"""What the scripts share: options, the runs of a folder, and figures saved with their numbers and origin."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from probekit.cli.options import seed_list
from probekit.config import Config, user_path
from probekit.errors import ProbekitError
from probekit.io import read_json, write_json, write_text
from probekit.reports.drawing import save_png
from probekit.run.folder import SWEEP
from probekit.run.run import Run
from probekit.sweeps import Sweep

PICTURES = (".png", ".pdf", ".svg")
"""Formats of pictures."""

Groups = dict[str, list[Run]]
"""Runs by name; those of one name differ in their seed alone."""


def script_parser(description: str | None, picture: str) -> argparse.ArgumentParser:
    """Makes a parser with the option `--out`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def path(word: str) -> Path:
        if Path(word).suffix not in PICTURES:
            raise argparse.ArgumentTypeError(f"{word!r} must end in {', '.join(PICTURES)}")
        return Path(word)

    parser.add_argument("--out", type=path, default=Path(picture), help=f"the picture ({picture})")
    return parser


def add_training_options(
    parser: argparse.ArgumentParser, runs: str, *, preset: str | None, seeds: int
) -> None:
    """Adds the options of a script that trains missing runs: preset, settings, seeds and folder."""
    default = f" ({preset})" if preset else "; without it, only existing runs are used"
    parser.add_argument("--runs", type=Path, default=Path(runs), help=f"the folder of the runs ({runs})")
    parser.add_argument("--preset", default=preset, help=f"train missing runs with these settings{default}")
    parser.add_argument(
        "--set",
        nargs="+",
        action="append",
        default=[],
        metavar=("SETTING", "VALUE"),
        help="change the preset; null unsets a setting",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[seeds],
        help=f"one number: how many seeds, from the preset's on ({seeds}); several: the seeds",
    )


def training_config(given: argparse.Namespace) -> tuple[Config, list[int]]:
    """Returns the settings and seeds that the options of `add_training_options` ask for.

    Raises:
        ProbekitError: A setting or its value is wrong.
    """
    settings = {
        name: None if words == ["null"] else words[0] if len(words) == 1 else words
        for name, *words in given.set
    }
    config = Config.from_preset(given.preset).override(settings)
    return config, seed_list(given.seeds, config.seed)


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds a sweep."""
    return (folder / SWEEP).is_file()


def runs_in(folder: Path, members: Iterable[str] | None = None) -> Groups:
    """Returns the runs of a folder: a single one, or those of each member of a sweep.

    Raises:
        ProbekitError: The folder is no run or sweep, or the sweep has no finished run.
    """
    name = folder.resolve().name
    if not is_sweep(folder):
        return {name: [Run.open(folder)]}
    sweep = Sweep.open(folder)
    if not sweep.runs:
        raise ProbekitError(f"{folder} has no finished run yet; go on with the command that began it")
    wanted = list(members or dict.fromkeys(place.member for place in sweep.runs))
    return {
        name if len(sweep.members) == 1 else f"{name}, {member}": [
            run for place, run in sweep.runs.items() if place.member == member
        ]
        for member in wanted
    }


def names_of(models: Sequence[str]) -> list[str]:
    """Short names of LMs, hub names or folders: the last part of each.

    Raises:
        ProbekitError: Two have the same.
    """
    names = [user_path(model).name for model in models]
    if len({*names}) < len(names):
        raise ProbekitError(f"--models has two LMs called {max(names, key=names.count)}; rename a folder")
    return names


def layers_over(depth: int, count: int) -> list[int]:
    """So many layers of an LM, or all that it has, evenly from the first to the last."""
    return [int(layer) for layer in np.unique(np.linspace(0, depth - 1, min(count, depth)).round())]


def made_of(folder: Path, origin: str) -> None:
    """Makes a folder for what is made of something, or makes sure that it was made of the same.

    Raises:
        ProbekitError: It holds what was made of something else.
    """
    of = folder / "of.txt"
    if of.exists() and of.read_text("utf-8") != origin:
        raise ProbekitError(f"{folder} holds results of other passages, settings or LMs; give another --runs")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(of, origin)


def save_figure(
    figure: Figure,
    numbers: pd.DataFrame,
    out: Path,
    settings: dict[str, Any],
    runs: Sequence[Run],
    printed: pd.DataFrame | None = None,
) -> None:
    """Saves a figure, the numbers that it shows (CSV) and how it was made (JSON), and prints the path.

    Args:
        figure: The figure.
        numbers: The numbers.
        out: The picture; the others have the same name with other suffixes.
        settings: The options of the script that matter for the numbers.
        runs: The runs that were read.
        printed: A table to print.
    """
    save_png(figure, out)
    table = numbers.to_csv(index=False)
    write_text(out.with_suffix(".csv"), table)
    write_json(
        out.with_suffix(".json"),
        {
            "script": f"analyses/{Path(sys.argv[0]).name}",
            "settings": settings,
            "numbers_sha256": hashlib.sha256(table.encode()).hexdigest(),
            "runs": [_origin(run) for run in runs],
        },
    )
    if printed is not None:
        print(printed.to_string(index=False))  # noqa: T201
    print(out)  # noqa: T201


def _origin(run: Run) -> dict[str, Any]:
    recorded = read_json(run.folder / "provenance.json")
    config = run.config.model_dump(mode="json")
    for section, name in (("corpus", "path"), ("actions", "encoder"), ("lm", "name"), ("probe", "labels")):
        path = config[section][name]
        if path and Path(path).is_absolute():  # means nothing on another machine
            config[section][name] = Path(path).name
    return {
        "run": run.folder.name,
        "corpus": run.corpus.facts["fingerprint"],
        "config": config,
        **{key: recorded[key] for key in ("versions", "git_commit", "device", "machine")},
    }


def run_script(main: Callable[[], None]) -> None:
    """Runs a script; bad input ends it with one line and exit code 2, as in the commands."""
    try:
        main()
    except ProbekitError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {error}\n")
        sys.exit(2)
