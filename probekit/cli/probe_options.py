"""The command line of `probekit probe`: a run, or any LM on a corpus or a table of labels."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from probekit.cli.options import (
    ALL,
    READING,
    SHORTHANDS,
    Parser,
    add_labels,
    add_sources,
    chosen_config,
    command_parser,
    parse,
    shorthands,
)
from probekit.config import Config, user_path

ANY_MODEL = "any-model"
"""The preset of `probekit probe --model`."""


def parse_probe(
    command: Callable[[list[str]], None], words: list[str]
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parses what was typed after `probekit probe`: the command's own options, and settings, nested."""
    usage = (
        "probekit probe RUN [--labels FILE --target COLUMN] [--checkpoints] [--SETTING VALUE ...]\n"
        "       probekit probe --model NAME_OR_FOLDER --corpus FILE_OR_FOLDER [--out FOLDER] [...]\n"
        "       probekit probe --model NAME_OR_FOLDER --labels FILE --text COLUMN --target COLUMN [...]"
    )
    parser = command_parser(command, usage)
    parser.add_argument("run", nargs="?", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "--store", action="store_true", help="keep activations in RUN/activations, and reuse them"
    )
    parser.add_argument(
        "--checkpoints", action="store_true", help="probe every checkpoint kept (training.lm.checkpoints)"
    )
    parser.add_argument(
        "--stage", metavar="STAGE", help="whose checkpoints: lm or adapter/VARIANT (the first that has any)"
    )
    group = parser.add_argument_group(
        "labels", "what is read: a built-in target, or a column of a table of yours"
    )
    add_labels(group)
    group.add_argument(
        "--positions",
        nargs="+",
        metavar="POSITION",
        help="where it is read: last, mean, first, or tokens before",
    )
    group = parser.add_argument_group(
        "any model", f"a causal LM, or a BERT, on a corpus, by the preset {ANY_MODEL}"
    )
    group.add_argument("--model", metavar="NAME", help="hub name or local folder of an LM (lm.name)")
    group.add_argument("--corpus", metavar="FILE", help="file, folder or dataset to read (corpus.path)")
    group.add_argument(
        "--revisions",
        nargs="+",
        metavar="NAME",
        help="probe these checkpoints of it: branches, tags or commits on the hub, or folders",
    )
    group.add_argument("--out", metavar="FOLDER", help="the run's folder, reused if it exists (runs/probed)")
    group.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
    add_sources(parser)
    any_model = any(word.split("=")[0] == "--model" for word in words)
    sections = ALL if any_model else (*READING, "evaluation", "probe")
    parsed, given = parse(parser, words, sections, ANY_MODEL if any_model else None)
    _check_together(parser, parsed, given)
    if parsed.model is not None:
        # No default of the parser: beside RUN it would count as given.
        parsed.out = parsed.out or "runs/probed"
    return parsed, given


def _check_together(parser: Parser, parsed: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Refuses options that say nothing, or contradict one another, together."""
    if (parsed.run is None) == (parsed.model is None):
        parser.error("give a run's folder, or --model with --corpus or --labels")
    if parsed.labels and not (parsed.target or "target" in given.get("probe", {})):
        parser.error("argument --labels: goes with --target, the column of labels")
    for name in ("corpus", "group", "revisions", "out", "overwrite", "preset", "config"):
        if parsed.run is not None and getattr(parsed, name):
            parser.error(f"argument --{name}: goes with --model; {parsed.run} has its own")
    for name, other in (("model", "checkpoints"), ("store", "checkpoints"), ("store", "revisions")):
        if getattr(parsed, name) and getattr(parsed, other):
            parser.error(f"argument --{name}: does not go with --{other}")
    if parsed.stage and not parsed.checkpoints:
        parser.error("argument --stage: goes with --checkpoints")


def probed_config(parsed: argparse.Namespace, given: dict[str, Any]) -> Config:
    """The config of `--model`, `--corpus` and `--labels`, on the run in `--out` or the preset `any-model`.

    `--preset` and `--config` win over both. Where no corpus is given, it is made of the texts of the labels.
    """
    from probekit.data.huggingface import is_dataset
    from probekit.run.folder import RunFolder

    there = user_path(parsed.out)
    # A run without a corpus failed on its input, which the command may correct: it is begun anew.
    made_before = (there / "run.json").is_file() and RunFolder.open(there).finished("corpus")
    continued = there / "config.yaml" if made_before and not parsed.overwrite else None
    if continued is None:
        parsed.preset = parsed.preset or (None if parsed.config else ANY_MODEL)
    config = chosen_config(parsed, given, continued) or (
        Config.from_yaml(continued) if continued else Config()
    )
    config = config.override(shorthands(parsed, given, SHORTHANDS))
    if continued is not None:
        return config
    made: dict[str, Any] = {}
    if config.corpus.path is None and config.corpus.reader == "auto" and config.probe.labels is not None:
        reader = "huggingface" if is_dataset(config.probe.labels) else "auto"
        made = {"corpus.path": config.probe.labels, "corpus.reader": reader, "corpus.distinct": True}
        texts = config.probe.text_column
        made |= {"corpus.text_column": texts} if texts else {}
    needed = config.probe.target in ("action", "embedding") or "labels" in given.get("actions", {})
    if not needed and not parsed.config:
        made["actions.labels"] = "none"  # nothing is built that the target does not need
    return config.override(made)
