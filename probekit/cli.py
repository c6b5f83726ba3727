"""The commands: what is typed, parsed and passed on. All else is elsewhere, and callable from Python."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from probekit import processes
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
    swept,
)
from probekit.settings_file import check_settings
from probekit.stopping import Stopped, terminable
from probekit.sweeps.members import STUDIES

Command = Callable[[list[str]], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0; 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM, 141 where nobody reads the output.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    # What these libraries say on standard error is for their developers; ours is for the user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with terminable():
            _command(words)
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has read enough, as `head` does
        if debug:
            raise
        # The flush at exit is not to fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ProbekitError, OSError) as error:  # a full disk or a forbidden folder is the user's to put right
        if debug:
            raise
        who = f"process {processes.rank()}: " if processes.count() > 1 else ""
        # What was typed may hold line breaks and what moves the cursor.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{who}{error}")
        sys.stderr.write(f"probekit: error: {line}\n")
        return 2
    except KeyboardInterrupt as stop:
        if debug:
            raise
        number = stop.signal if isinstance(stop, Stopped) else signal.SIGINT
        said = "terminated" if number == signal.SIGTERM else "interrupted"
        again = GO_ON.get(words[0], "it leaves nothing behind, and begins anew next time")
        sys.stderr.write(f"probekit: {said}; {again}\n")
        return 128 + number
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
    command = parser.parse_args(words[:1]).command
    if command not in SHARED:
        if not processes.is_first():
            return
        processes.alone()
    COMMANDS[command](words[1:])


def _train(words: list[str]) -> None:
    """Train corpus, LM (if new), planner and an adapter for each variant, or depth ensembles (--method)."""
    parser = _run_parser("train", words)
    parsed = parse(parser, words)
    from probekit.reports.tables import print_training
    from probekit.stage_settings import why_idle
    from probekit.training.train import train

    config = _config(parsed)
    for name in given_settings(parsed):
        if config and name.split(".")[0] in TRAINED_WITH and (reason := why_idle(config, name)):
            sys.stderr.write(f"probekit: note: {name} changes nothing here: {reason}\n")
    run = train(config, parsed.out, existing=_existing(parsed), quiet=parsed.quiet)
    if processes.is_first():
        print_training(run)


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
    """Perplexity of every model, planners' metrics or multiple choice; generated text if asked for."""
    parser = _results_parser("evaluate", words, ["method", "device", "evaluation", "generation"])
    parser.add_argument(
        "--generation", action="store_true", help="generate text with every variant and measure that too"
    )
    parsed = parse(parser, words)
    settings = given_settings(parsed)
    if not parsed.generation and (stray := [name for name in settings if name.startswith("generation.")]):
        parser.error(f"argument --{stray[0]}: goes with --generation")
    from probekit.evaluation.evaluate import evaluate
    from probekit.reports.tables import print_evaluation, print_generation

    if parsed.generation:
        from probekit.evaluation.generation_metrics import check_generation, evaluate_generation

        check_generation(parsed.run, settings)
    print_evaluation(evaluate(parsed.run, settings, quiet=parsed.quiet))
    if parsed.generation:
        print_generation(evaluate_generation(parsed.run, settings, quiet=parsed.quiet))


def _probe(words: list[str]) -> None:
    """Fit probes of a run, or of any causal LM on any corpus; replaces what an earlier probe left there."""
    parser = _probe_parser(words)
    parsed = parse(parser, words)
    if (parsed.run is None) == (parsed.model is None):
        parser.error("give a run's folder, or --model with --corpus")
    if parsed.run is not None and (stray := [name for name in BESIDE_MODEL if getattr(parsed, name)]):
        parser.error(f"argument --{stray[0]}: goes with --model; {parsed.run} has its own")
    if parsed.checkpoints or parsed.stage:
        _probe_checkpoints(parser, parsed)
        return
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
    if not processes.is_first():
        return
    save_probe_figures(results.table, results.folder)
    print_probes(results)


def _probe_checkpoints(parser: Parser, parsed: argparse.Namespace) -> None:
    for name, asked in (("model", parsed.model), ("store", parsed.store)):
        if asked:
            parser.error(f"argument --{name}: does not go with --checkpoints")
    if not parsed.checkpoints:
        parser.error("argument --stage: goes with --checkpoints")
    from probekit.probing.over_training import probe_checkpoints
    from probekit.reports.over_training import save_over_training
    from probekit.reports.tables import print_over_training

    results = probe_checkpoints(parsed.run, given_settings(parsed), parsed.stage, quiet=parsed.quiet)
    if processes.is_first():
        print_over_training(results, save_over_training(results))


def _generate(words: list[str]) -> None:
    """Write text with a run: go on with prompts or with test documents, or begin from nothing."""
    parsed = parse(_generate_parser(words), words)
    from probekit.evaluation.generation import TOKENS
    from probekit.evaluation.texts import check_out, read_prompts, write_texts
    from probekit.progress import Progress
    from probekit.reports.tables import print_texts
    from probekit.run import Run

    if parsed.out:
        check_out(parsed.out)
    written = write_texts(
        Run.open(parsed.run).with_settings(given_settings(parsed)),
        read_prompts(parsed.prompts) if parsed.prompts else parsed.prompt,
        documents=parsed.documents,
        samples=parsed.samples,
        variant=parsed.variant,
        tokens=TOKENS if parsed.tokens is None else parsed.tokens,
        plan=parsed.plan,
        progress=Progress(quiet=parsed.quiet),
    )
    print_texts(written)
    if parsed.out:
        written.save(parsed.out)
        sys.stdout.write(f"All texts: {parsed.out}\n")


def _intervene(words: list[str]) -> None:
    """Change what probes read, erase it, steer along it or patch it, and see what the LM makes of that."""
    sections = ["device", "evaluation", "intervene"]
    parsed = parse(_results_parser("intervene", words, sections), words)
    from probekit.interventions.intervene import intervene
    from probekit.reports.intervention_tables import print_interventions

    print_interventions(intervene(parsed.run, given_settings(parsed), quiet=parsed.quiet))


def _subnetwork(words: list[str]) -> None:
    """Find the heads and parts of the adapter without which nothing is read of the next sentence's action."""
    sections = ["device", "evaluation", "subnetwork"]
    parsed = parse(_results_parser("subnetwork", words, sections), words)
    from probekit.reports.subnetwork_tables import print_subnetwork
    from probekit.subnetworks.subnetwork import subnetwork

    print_subnetwork(subnetwork(parsed.run, given_settings(parsed), quiet=parsed.quiet))


def _lens(words: list[str]) -> None:
    """Show what probes read of the next sentence at every token of a text: one HTML page."""
    parsed = parse(_lens_parser(), words)
    from probekit.reports.lens import lens
    from probekit.reports.lens_text import LIMIT
    from probekit.run import Run

    page = lens(
        Run.open(parsed.run).with_settings(given_settings(parsed)),
        parsed.text,
        parsed.out,
        variant=parsed.variant,
        locations=parsed.locations,
        layers=parsed.layers,
        limit=LIMIT if parsed.limit is None else parsed.limit,
        quiet=parsed.quiet,
    )
    sys.stdout.write(f"The lens: {page}\n")


def _report(words: list[str]) -> None:
    """Write all of a run on one page, what to mind at the top: report.html, and the same as report.md."""
    usage = "probekit report RUN [-o FILE]"
    parser = Parser(prog="probekit report", usage=usage, description=_report.__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="write this one alone, .html or .md (RUN/report.html and RUN/report.md)",
    )
    parsed = parse(parser, words)
    from probekit.reports.report import report

    for file in report(parsed.run, parsed.out):
        sys.stdout.write(f"The report: {file}\n")


def _sweep(words: list[str]) -> None:
    """Train and evaluate with several values of some settings and several seeds; one table of all."""
    parsed = parse(_sweep_parser(words), words)
    config, members, seeds = swept(parsed)
    from probekit.reports.tables import print_sweep
    from probekit.sweeps.sweep import sweep

    out, quiet = parsed.out, parsed.quiet
    print_sweep(sweep(config, members, seeds, out, generation=parsed.generation, quiet=quiet))


def _demo(words: list[str]) -> None:
    """Train, evaluate and probe on the planted corpus: the whole way in a few minutes on a CPU."""
    parser = Parser(prog="probekit demo", description=_demo.__doc__)
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="the run's folder (runs/demo)")
    parser.add_argument("--overwrite", action="store_true", help="do it again from the beginning")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parsed = parse(parser, words)
    from probekit.walkthrough import demo

    demo(parsed.out, overwrite=parsed.overwrite, quiet=parsed.quiet)


TRAINED_WITH = ("lm", "planner", "conditioning", "depth", "training")
"""Sections whose settings are for training alone."""

SHARED = ("train", "probe")
"""Commands that several processes do together; others are done by the first one alone."""

GO_ON = dict.fromkeys(("train", "corpus"), "--resume goes on from there")
GO_ON |= dict.fromkeys(("probe", "sweep", "demo"), "the same command goes on from there")
"""What an interruption leaves, by command."""

BESIDE_MODEL = ("corpus", "out", "overwrite", "preset", "config")
"""Options that `probekit probe` takes beside `--model` alone."""

COMMANDS: dict[str, Command] = {
    "train": _train,
    "evaluate": _evaluate,
    "generate": _generate,
    "probe": _probe,
    "intervene": _intervene,
    "subnetwork": _subnetwork,
    "lens": _lens,
    "report": _report,
    "corpus": _corpus,
    "sweep": _sweep,
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
        "probekit probe RUN [--checkpoints] [--SETTING VALUE ...]\n"
        "       probekit probe --model NAME_OR_FOLDER --corpus FILE_OR_FOLDER [--out FOLDER] [--SETTING ...]"
    )
    parser = Parser(prog="probekit probe", usage=usage, description=_probe.__doc__)
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
    add_source_options(parser)
    if not any(word.split("=")[0] == "--model" for word in words):
        add_setting_options(parser, Config(), ["device", "evaluation", "probe"])
    else:
        asked = {"-h", "--help"} & {*words}
        add_setting_options(parser, source_config(parser.prog, words, ANY_MODEL) if asked else Config())
    return parser


def _generate_parser(words: list[str]) -> Parser:
    usage = (
        "probekit generate RUN [--prompt TEXT ... | --prompts FILE | --documents INT | --samples INT]\n"
        "                         [--variant NAME] [--tokens INT] [--plan PLAN] [--SETTING VALUE ...]"
    )
    parser = Parser(prog="probekit generate", usage=usage, description=COMMANDS["generate"].__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    begun = parser.add_mutually_exclusive_group()
    begun.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to go on with")
    begun.add_argument(
        "--prompts", metavar="FILE", help="a file of them: one a line, or .jsonl with a text in each line"
    )
    begun.add_argument(
        "--documents", type=int, metavar="INT", help="go on with the beginnings of so many test documents (4)"
    )
    begun.add_argument("--samples", type=int, metavar="INT", help="write so many texts from nothing")
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="which variant, or member of a depth ensemble, writes (soft, if it is trained)",
    )
    parser.add_argument("--tokens", type=int, metavar="INT", help="tokens of each text (128)")
    parser.add_argument(
        "--plan",
        metavar="PLAN",
        help="the action of each sentence to come, such as 12,7,7,40; oracle: the document's true ones",
    )
    parser.add_argument("--out", metavar="FILE", help="write the texts as JSON lines, too")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    drawing = ("context", "temperature", "top_k", "top_p", "batch_size")
    add_setting_options(parser, Config(), ["seed", "device", *(f"generation.{name}" for name in drawing)])
    return parser


def _lens_parser() -> Parser:
    usage = (
        "probekit lens RUN --text FILE_OR_STRING [-o FILE.html] [--variant NAME] [--locations NAME ...]\n"
        "                     [--layers INT ...]"
    )
    parser = Parser(prog="probekit lens", usage=usage, description=COMMANDS["lens"].__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run that was probed")
    parser.add_argument(
        "--text",
        required=True,
        metavar="FILE_OR_STRING",
        help="a file, or the text itself; one word that has a slash, or ends in .txt or .md, is a file",
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="the page, ending in .html (RUN/lens.html)")
    parser.add_argument("--variant", metavar="NAME", help="whose activations (the first variant probed)")
    parser.add_argument("--locations", nargs="+", metavar="NAME", help="show only these (all probed)")
    parser.add_argument("--layers", nargs="+", type=int, metavar="INT", help="show only these (all probed)")
    parser.add_argument("--limit", type=int, metavar="INT", help="the most tokens of a text (2,000)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_setting_options(parser, Config(), ["device"])
    return parser


def _sweep_parser(words: list[str]) -> Parser:
    usage = (
        "probekit sweep SETTING --values VALUE ... [--over SETTING VALUE ...] [--seeds N]\n"
        "                      [--preset NAME] [--config FILE] [--SETTING VALUE ...] [--out FOLDER]\n"
        f"       probekit sweep {{{','.join(STUDIES)}}} ..."
    )
    parser = Parser(prog="probekit sweep", usage=usage, description=COMMANDS["sweep"].__doc__)
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
    add_source_options(parser)
    asked = {"-h", "--help"} & {*words}
    add_setting_options(parser, source_config(parser.prog, words) if asked else Config())
    return parser


def _config(parsed: argparse.Namespace) -> Config | None:
    begun = Path(parsed.out) / "config.yaml"
    if not (parsed.resume and begun.is_file()):
        return chosen_config(parsed)
    check_settings(Path(parsed.out))
    return chosen_config(parsed, begun)


def _existing(parsed: argparse.Namespace) -> Any:
    return "resume" if parsed.resume else "overwrite" if parsed.overwrite else "refuse"


if __name__ == "__main__":
    sys.exit(main())
