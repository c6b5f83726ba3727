"""The command line of `probekit compare`: two LMs, or one and its compressed self, on a corpus or labels."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from probekit.cli.options import ALL, add_labels, add_sources, command_parser, parse
from probekit.cli.probe_options import ANY_MODEL, probed_config
from probekit.config import Config


def parse_compare(
    command: Callable[[list[str]], None], words: list[str]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parses what was typed after `probekit compare`: the command's own options, and settings, nested."""
    usage = (
        "probekit compare LM [LM] [--compress HOW] --corpus FILE_OR_FOLDER [--out FOLDER] [...]\n"
        "       probekit compare LM [LM] [--compress HOW] --labels FILE --text COLUMN --target COLUMN [...]"
    )
    parser = command_parser(command, usage)
    parser.add_argument("model", metavar="LM", help="hub name or local folder of an LM (lm.name)")
    parser.add_argument("second", nargs="?", metavar="LM", help="what it is compared with")
    parser.add_argument(
        "--compress",
        metavar="HOW",
        help="compress the second LM, or the first's copy: int8, prune=0.5, rank=64 (lm.compress)",
    )
    parser.add_argument("--corpus", metavar="FILE", help="file, folder or dataset to read (corpus.path)")
    parser.add_argument("--out", default="runs/compared", metavar="FOLDER", help="the folder (runs/compared)")
    parser.add_argument("--overwrite", action="store_true", help="replace the runs in that folder")
    parser.add_argument(
        "--permutations", type=int, default=40, metavar="INT", help="of documents, for the null (40)"
    )
    group = parser.add_argument_group("labels", "what probes of the first LM read in the second, if given")
    add_labels(group)
    add_sources(parser)
    parsed, given = parse(parser, words, ALL, ANY_MODEL)
    if parsed.labels and not (parsed.target or "target" in given.get("probe", {})):
        parser.error("argument --labels: goes with --target, the column of labels")
    if parsed.second is None and parsed.compress is None:
        parser.error(f"give another LM beside {parsed.model}, or --compress int8, prune=0.5 or rank=64")
    if parsed.permutations < 1:
        parser.error(f"argument --permutations: {parsed.permutations} is below 1")
    return parsed, given


def compared_configs(parsed: argparse.Namespace, given: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The config of the first LM's run, and the settings that the second LM has instead."""
    of_first = argparse.Namespace(**vars(parsed) | {"out": Path(parsed.out) / "first", "positions": None})
    config = probed_config(of_first, given)
    asked = parsed.target or "target" in given.get("probe", {}) or "labels" in given.get("actions", {})
    if config.probe.target == "action" and not asked:
        config = config.override({"actions.labels": "none"})  # sentences are compared without probes
    second = {"lm.name": parsed.second} if parsed.second else {}
    return config, second | ({"lm.compress": parsed.compress} if parsed.compress else {})
