"""`probekit probe`."""

from __future__ import annotations

import argparse
from pathlib import Path

from probekit import distributed
from probekit.commands.parsers import add_all_settings
from probekit.config import Config
from probekit.options import (
    Parser,
    add_setting_options,
    add_source_options,
    chosen_config,
    given_settings,
    parse,
)
from probekit.run.folder import check_settings

ANY_MODEL = "any-model"
"""The preset on which `probekit probe --model` builds where no other is given."""

BESIDE_MODEL = ("corpus", "out", "overwrite", "preset", "config")
"""Options that are taken beside `--model` alone."""


def command(words: list[str]) -> None:
    """Fit probes of a run, or of any causal LM on any corpus; replaces what an earlier probe left there."""
    parser = _parser(words)
    parsed = parse(parser, words)
    if (parsed.run is None) == (parsed.model is None):
        parser.error("give a run's folder, or --model with --corpus")
    if parsed.run is not None and (stray := [name for name in BESIDE_MODEL if getattr(parsed, name)]):
        parser.error(f"argument --{stray[0]}: goes with --model; {parsed.run} has its own")
    if parsed.checkpoints or parsed.stage:
        _checkpoints(parser, parsed)
        return
    from probekit.probing.probe import probe
    from probekit.reports.figures import save_probe_figures
    from probekit.reports.terminal import print_probes

    run, settings = parsed.run, given_settings(parsed)
    if parsed.model is not None:
        from probekit.training.train import prepare

        # Not a default of the parser: beside RUN it would count as given.
        parsed.out = parsed.out or "runs/probed"
        run = prepare(
            probed_config(parsed),
            parsed.out,
            existing="overwrite" if parsed.overwrite else "resume",
            quiet=parsed.quiet,
        )
        settings = {}
    results = probe(run, settings, store=parsed.store, quiet=parsed.quiet)
    if not distributed.is_first():
        return
    save_probe_figures(results.table, results.folder)
    print_probes(results)


def _checkpoints(parser: Parser, parsed: argparse.Namespace) -> None:
    for name, asked in (("model", parsed.model), ("store", parsed.store)):
        if asked:
            parser.error(f"argument --{name}: does not go with --checkpoints")
    if not parsed.checkpoints:
        parser.error("argument --stage: goes with --checkpoints")
    from probekit.probing.over_training import probe_checkpoints
    from probekit.reports.over_training import save_over_training
    from probekit.reports.terminal import print_over_training

    results = probe_checkpoints(parsed.run, given_settings(parsed), parsed.stage, quiet=parsed.quiet)
    if distributed.is_first():
        print_over_training(results, save_over_training(results))


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


def _parser(words: list[str]) -> Parser:
    usage = (
        "probekit probe RUN [--checkpoints] [--SETTING VALUE ...]\n"
        "       probekit probe --model NAME_OR_FOLDER --corpus FILE_OR_FOLDER [--out FOLDER] [--SETTING ...]"
    )
    parser = Parser(prog="probekit probe", usage=usage, description=command.__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "--store", action="store_true", help="keep activations in RUN/activations; reuse them"
    )
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="the same grid at every checkpoint that training kept (training.lm.checkpoints)",
    )
    parser.add_argument(
        "--stage", metavar="STAGE", help="whose checkpoints: lm, or adapter/VARIANT (the first that has any)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    group = parser.add_argument_group(
        "any model",
        f"probe a causal LM on a corpus, both kept in a run's folder; settings: preset {ANY_MODEL}, and\n"
        "whatever `probekit probe --model NAME --help` lists",
    )
    group.add_argument("--model", metavar="NAME", help="hub name or local folder of a causal LM (lm.name)")
    group.add_argument("--corpus", metavar="FILE", help="file, folder or dataset to read (corpus.path)")
    group.add_argument(
        "--out", metavar="FOLDER", help="the run's folder (runs/probed), reused if it is there"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
    if any(word.split("=")[0] == "--model" for word in words):
        add_all_settings(parser, words, ANY_MODEL)
    else:
        add_source_options(parser)
        add_setting_options(parser, Config(), ["device", "evaluation", "probe", "lm.sharded"])
    return parser
