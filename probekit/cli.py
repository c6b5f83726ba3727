"""The commands: what is typed, parsed and passed on. All else is elsewhere, and callable from Python."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from probekit.config import Config, preset_names
from probekit.errors import ProbekitError
from probekit.options import (
    ANY_MODEL,
    Parser,
    add_setting_options,
    add_source_options,
    chosen_config,
    given_settings,
    parse,
    probed_config,
    source_config,
)

Command = Callable[[list[str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0, or 2 for bad input, 130 for an interruption.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    # What these libraries say on standard error is for their developers; ours is for the user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        _command(words)
    except (ProbekitError, OSError) as error:  # a full disk or a forbidden folder is the user's to put right
        if debug:
            raise
        sys.stderr.write(f"probekit: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        sys.stderr.write("probekit: interrupted; --resume goes on after the last finished stage\n")
        return 130
    return 0


def _command(words: list[str]) -> None:
    names = "\n".join(f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="probekit",
        description="Train planner-conditioned language models; probe what they know of the next sentence.",
        epilog=f"commands:\n{names}\n\npresets: {', '.join(preset_names())}",
    )
    parser.add_argument("--version", action="version", version=f"probekit {version('probekit')}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="see below; COMMAND --help explains it"
    )
    COMMANDS[parser.parse_args(words[:1]).command](words[1:])


def _train(words: list[str]) -> None:
    """Train corpus, LM (if new), planner and an adapter for each variant into a run's folder."""
    parser = _run_parser("train", words)
    parsed = parse(parser, words)
    from probekit.reports.tables import print_training
    from probekit.training.train import train

    print_training(train(_config(parsed), parsed.out, existing=_existing(parsed), quiet=parsed.quiet))


def _corpus(words: list[str]) -> None:
    """Build a corpus, or inspect a run's: sizes, sentence lengths, actions, the sentences nearest to each."""
    parser = _run_parser("corpus", words)
    parser.usage = f"{parser.usage}\n       probekit corpus RUN [--nearest INT] [--export FILE]"
    parser.add_argument("run", nargs="?", metavar="RUN", help="inspect this run's corpus and build nothing")
    parser.add_argument(
        "--nearest", type=int, default=2, metavar="INT", help="sentences shown for an action (2)"
    )
    parser.add_argument(
        "--export",
        metavar="FILE",
        help="write the run's sentences as a table (.csv, .jsonl, .parquet), to which columns of labels for "
        "probe.labels can be added",
    )
    parsed = parse(parser, words)
    if parsed.nearest < 0:
        parser.error(f"argument --nearest: {parsed.nearest} is below 0")
    from probekit.corpus.inspect import export_sentences
    from probekit.reports.tables import print_corpus
    from probekit.run import Run
    from probekit.training.train import build_corpus

    if parsed.run:
        run = Run.open(parsed.run)
    else:
        run = build_corpus(_config(parsed), parsed.out, existing=_existing(parsed), quiet=parsed.quiet)
    print_corpus(run.corpus, parsed.nearest)
    if parsed.export:
        sys.stdout.write(f"All sentences: {export_sentences(run.corpus, parsed.export)}\n")


def _evaluate(words: list[str]) -> None:
    """Perplexity of every variant and the planner's metrics, with intervals and paired differences."""
    parser = _results_parser("evaluate", words, ["device", "evaluation"])
    parsed = parse(parser, words)
    from probekit.evaluation.evaluate import evaluate
    from probekit.reports.tables import print_evaluation

    print_evaluation(evaluate(parsed.run, given_settings(parsed), quiet=parsed.quiet))


def _probe(words: list[str]) -> None:
    """Fit probes of a run, or of any causal LM on any corpus; replaces what an earlier probe left there."""
    parser = _probe_parser(words)
    parsed = parse(parser, words)
    if (parsed.run is None) == (parsed.model is None):
        parser.error("give a run's folder, or --model with --corpus")
    if parsed.run is not None and (stray := [name for name in BESIDE_MODEL if getattr(parsed, name)]):
        parser.error(f"argument --{stray[0]}: goes with --model; {parsed.run} has its own")
    from probekit.probing.probe import probe
    from probekit.reports.figures import save_probe_figures
    from probekit.reports.tables import print_probes

    run, settings = parsed.run, given_settings(parsed)
    if parsed.model is not None:
        from probekit.training.train import prepare

        run = prepare(
            probed_config(parsed),
            parsed.out or "runs/probed",
            existing="overwrite" if parsed.overwrite else "resume",
            quiet=parsed.quiet,
        )
        settings = {}
    results = probe(run, settings, store=parsed.store, quiet=parsed.quiet)
    save_probe_figures(results.table, results.folder)
    print_probes(results)


def _demo(words: list[str]) -> None:
    """Train, evaluate and probe on the planted corpus: the whole way in a few minutes on a CPU."""
    parser = Parser(prog="probekit demo", description=_demo.__doc__)
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="the run's folder (runs/demo)")
    parser.add_argument("--overwrite", action="store_true", help="do it again from the beginning")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parsed = parse(parser, words)
    from probekit.walkthrough import demo

    demo(parsed.out, overwrite=parsed.overwrite, quiet=parsed.quiet)


BESIDE_MODEL = ("corpus", "out", "overwrite", "preset", "config")
"""Options that `probekit probe` takes beside `--model` alone."""

COMMANDS: dict[str, Command] = {
    "train": _train,
    "evaluate": _evaluate,
    "probe": _probe,
    "corpus": _corpus,
    "demo": _demo,
}


def _run_parser(name: str, words: list[str]) -> Parser:
    usage = f"probekit {name} [--out FOLDER] [--preset NAME] [--config FILE] [--SETTING VALUE ...]"
    parser = Parser(prog=f"probekit {name}", usage=usage, description=COMMANDS[name].__doc__)
    parser.add_argument("--out", default="runs/run", metavar="FOLDER", help="the run's folder (runs/run)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in that folder")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_source_options(parser)
    # Only the help tells defaults; a file that single settings put right is not to be refused for them.
    add_setting_options(
        parser, source_config(parser.prog, words) if {"-h", "--help"} & {*words} else Config()
    )
    return parser


def _results_parser(name: str, words: list[str], sections: list[str]) -> Parser:
    usage = f"probekit {name} RUN [--SETTING VALUE ...]"
    parser = Parser(prog=f"probekit {name}", usage=usage, description=COMMANDS[name].__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_setting_options(parser, Config(), sections)
    return parser


def _probe_parser(words: list[str]) -> Parser:
    usage = (
        "probekit probe RUN [--SETTING VALUE ...]\n"
        "       probekit probe --model NAME_OR_FOLDER --corpus FILE_OR_FOLDER [--out FOLDER] [--SETTING ...]"
    )
    parser = Parser(prog="probekit probe", usage=usage, description=_probe.__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "--store", action="store_true", help="keep activations in RUN/activations; reuse them"
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
    add_source_options(parser)
    if not any(word.split("=")[0] == "--model" for word in words):
        add_setting_options(parser, Config(), ["device", "evaluation", "probe"])
    else:
        asked = {"-h", "--help"} & {*words}
        add_setting_options(parser, source_config(parser.prog, words, ANY_MODEL) if asked else Config())
    return parser


def _config(parsed: argparse.Namespace) -> Config | None:
    begun = Path(parsed.out) / "config.yaml"
    return chosen_config(parsed, begun if parsed.resume and begun.is_file() else None)


def _existing(parsed: argparse.Namespace) -> Any:
    return "resume" if parsed.resume else "overwrite" if parsed.overwrite else "refuse"


if __name__ == "__main__":
    sys.exit(main())
