"""The commands: each parses what was typed, calls a function of the same name, prints and draws its result.

Modules that load PyTorch are imported inside of the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit import distributed
from probekit.cli.compare_options import compared_configs, parse_compare
from probekit.cli.options import (
    ALL,
    OF_LABELS,
    READING,
    Parser,
    chosen_config,
    command_parser,
    dotted,
    new_run_parser,
    parse,
    run_parser,
    shorthands,
)
from probekit.cli.probe_options import parse_probe, probed_config
from probekit.cli.sweep_options import parse_sweep, swept
from probekit.config import Config, preset_names, user_path
from probekit.distributed import Stopped, terminable
from probekit.errors import ProbekitError

if TYPE_CHECKING:
    from probekit.run.folder import Existing
    from probekit.run.run import Run


SHARED = ("train", "probe")
"""Commands that several processes run together; the first process runs the others alone."""


def train(words: list[str]) -> None:
    """Train corpus, LM (if new), planner and an adapter for each variant, or depth ensembles (--method)."""
    parsed, given = parse(new_run_parser(train), words, ALL)
    config = _new_config(parsed, given)
    from probekit.reports.terminal import print_training
    from probekit.run.stages import idle_in_training
    from probekit.training.train import train as train_run

    if config and distributed.is_first():
        for line in idle_in_training(config, dotted(given)):
            sys.stderr.write(f"probekit: note: {line}\n")
    run = train_run(config, parsed.out, existing=parsed.existing, quiet=parsed.quiet)
    if distributed.is_first():
        print_training(run)


def evaluate(words: list[str]) -> None:
    """Perplexity of every model, planners' metrics or multiple choice; generated text if asked for."""
    parser = run_parser(evaluate)
    parser.add_argument(
        "--generation", action="store_true", help="generate text with every variant and measure it, too"
    )
    parsed, given = parse(parser, words, ("method", "device", "evaluation", "generation"))
    if "generation" in given and not parsed.generation:
        name = next(iter(dotted({"generation": given["generation"]})))
        parser.error(f"argument --{name}: goes with --generation")
    from probekit.evaluation.evaluate import evaluate as evaluate_run
    from probekit.generation.evaluate import check_generation, evaluate_generation
    from probekit.reports.terminal import print_evaluation, print_generation

    settings = dotted(given)
    if parsed.generation:
        check_generation(parsed.run, settings)
    print_evaluation(evaluate_run(parsed.run, settings, quiet=parsed.quiet))
    if parsed.generation:
        print_generation(evaluate_generation(parsed.run, settings, quiet=parsed.quiet))


def generate(words: list[str]) -> None:
    """Write text with a run: continue prompts or test documents, or begin from nothing."""
    parser = run_parser(generate)
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to continue")
    text.add_argument("--prompts", metavar="FILE", help="prompts, one a line, or .jsonl with a field text")
    text.add_argument(
        "--documents", type=int, metavar="INT", help="continue the beginnings of so many test documents (4)"
    )
    text.add_argument("--samples", type=int, metavar="INT", help="write so many texts from nothing")
    parser.add_argument(
        "--variant", metavar="NAME", help="variant or member that writes (soft, if it is trained)"
    )
    parser.add_argument("--tokens", type=int, default=128, metavar="INT", help="tokens of each text (128)")
    parser.add_argument(
        "--plan",
        metavar="PLAN",
        help="the action of each coming sentence, such as 12,7,7,40; oracle: the document's true actions",
    )
    parser.add_argument("--out", metavar="FILE", help="also write the texts as JSON lines")
    drawing = ("context", "temperature", "top_k", "top_p")
    sections = ("seed", "device", "evaluation.batch_size", *(f"generation.{name}" for name in drawing))
    parsed, given = parse(parser, words, sections)
    from probekit.generation.generate import write_texts
    from probekit.generation.prompts import read_prompts
    from probekit.io import out_path
    from probekit.progress import Progress
    from probekit.reports.terminal import print_texts
    from probekit.run.run import Run

    if parsed.out:
        out_path(user_path(parsed.out))
    written = write_texts(
        Run.at(parsed.run, dotted(given)),
        read_prompts(parsed.prompts) if parsed.prompts else parsed.prompt,
        documents=parsed.documents,
        samples=parsed.samples,
        variant=parsed.variant,
        tokens=parsed.tokens,
        plan=parsed.plan,
        progress=Progress(quiet=parsed.quiet),
    )
    print_texts(written)
    if parsed.out:
        written.save(parsed.out)
        sys.stdout.write(f"All texts: {parsed.out}\n")


def ask(words: list[str]) -> None:
    """Ask any causal LM, without a run, which of several texts it finds more probable."""
    parser = command_parser(ask, "probekit ask MODEL --items FILE [--out FOLDER] [--OPTION VALUE ...]")
    parser.add_argument("model", metavar="MODEL", help="hub name or local folder of a causal LM")
    parser.add_argument(
        "--items", required=True, metavar="FILE", help="rows of context, choices, answer, kind, group, score"
    )
    parser.add_argument("--out", default="runs/ask", metavar="FOLDER", help="where results go (runs/ask)")
    parser.add_argument(
        "--revisions",
        nargs="+",
        default=(),
        metavar="NAME",
        help="ask these instead: branches, tags or commits on the hub, or folders",
    )
    parser.add_argument(
        "--scoring",
        choices=("total", "mean"),
        default="total",
        help="compare choices by their total log-probability, or by its mean over tokens (total)",
    )
    parser.add_argument(
        "--random", type=int, default=0, metavar="INT", help="ask so many draws of random weights, too (0)"
    )
    sections = (*READING, "seed", "lm.bos", "lm.trust_remote_code", "lm.compress")
    parsed, given = parse(parser, words, (*sections, "evaluation.batch_size", "evaluation.resamples"))
    from probekit.evaluation.ask import ask as ask_model
    from probekit.reports.terminal import print_asked

    asked = ask_model(
        parsed.model,
        parsed.items,
        parsed.out,
        revisions=parsed.revisions,
        scoring=parsed.scoring,
        random=parsed.random,
        settings=dotted(given),
        quiet=parsed.quiet,
    )
    print_asked(asked, parsed.out)


def probe(words: list[str]) -> None:
    """Fit probes of a run, or of any LM on any corpus; replaces the results of an earlier probe."""
    parsed, given = parse_probe(probe, words)
    from probekit.run.run import Run
    from probekit.training.train import prepare

    settings = shorthands(parsed, given, OF_LABELS) | dotted(given)
    if parsed.model is None:
        run = Run.open(parsed.run)
        if run.config.lm.name is not None and not run.finished("lm"):  # `probekit corpus` began it
            run = prepare(run.config, run.folder, existing="resume", quiet=parsed.quiet)
    else:
        existing: Existing = "overwrite" if parsed.overwrite else "resume"
        config, revisions = probed_config(parsed, given), parsed.revisions or ()
        run = prepare(config, parsed.out, revisions=revisions, existing=existing, quiet=parsed.quiet)
        # The run has them now; but of checkpoints only variants that were asked for are probed.
        settings = {name: value for name, value in settings.items() if name == "probe.variants"}
    if parsed.checkpoints or parsed.revisions:
        from probekit.probing.over_training import probe_checkpoints
        from probekit.reports.drawing import save_png
        from probekit.reports.plot_over_training import draw_over_training, over_training_numbers
        from probekit.reports.terminal import print_over_training

        over_training = probe_checkpoints(run, settings, parsed.stage, quiet=parsed.quiet)
        if distributed.is_first():
            numbers = over_training_numbers(over_training.table)
            figure = draw_over_training(numbers, over_training.losses)
            picture = save_png(figure, over_training.path.with_suffix(".png"))
            print_over_training(over_training, picture)
        return
    from probekit.probing.probe import probe as probe_run

    results = probe_run(run, settings, store=parsed.store, quiet=parsed.quiet)
    if distributed.is_first():
        from probekit.reports.drawing import save_png
        from probekit.reports.plot_geometry import plot_geometry
        from probekit.reports.plot_probes import save_probe_figures
        from probekit.reports.plot_transfer import save_transfer_figures
        from probekit.reports.terminal import print_probes

        save_probe_figures(results.table, results.folder)
        if results.transfer is not None:
            save_transfer_figures(results.transfer, results.best_cells(), results.folder)
        if results.geometry is not None:
            save_png(plot_geometry(results.geometry), results.folder / "geometry.png")
        print_probes(results)


def compare(words: list[str]) -> None:
    """Compare layers of two LMs, or of one and its compressed self; read one by probes of the other."""
    parsed, given = parse_compare(compare, words)
    config, second = compared_configs(parsed, given)
    from probekit.probing.compare import compare as compare_lms
    from probekit.reports.drawing import save_png
    from probekit.reports.plot_compare import plot_comparison
    from probekit.reports.terminal import print_comparison

    existing: Existing = "overwrite" if parsed.overwrite else "resume"
    found = compare_lms(
        config, second, parsed.out, existing=existing, permutations=parsed.permutations, quiet=parsed.quiet
    )
    print_comparison(found, save_png(plot_comparison(found), found.folder / "similarity.png"))


def intervene(words: list[str]) -> None:
    """Change activations and see what the LM does: is what probes read used?"""
    parsed, given = parse(run_parser(intervene), words, ("device", "evaluation", "intervene"))
    from probekit.causal.intervene import intervene as intervene_on
    from probekit.reports.terminal import print_interventions

    found = intervene_on(parsed.run, dotted(given), quiet=parsed.quiet)
    print_interventions(found.table, found.notes, found.folder)


def subnetwork(words: list[str]) -> None:
    """Find the heads and parts of the adapter without which nothing is read of the next sentence's action."""
    sections = ("device", "evaluation", "subnetwork")
    parsed, given = parse(run_parser(subnetwork), words, sections)
    from probekit.causal.subnetwork import subnetwork as find_subnetwork
    from probekit.reports.terminal import print_subnetwork

    found = find_subnetwork(parsed.run, dotted(given), quiet=parsed.quiet)
    print_subnetwork(found.table, found.mask, found.notes, found.folder)


def continuation(words: list[str]) -> None:
    """Have the LM write on after one activation alone: does it hold the next sentences?"""
    drawing = ("generation.temperature", "generation.top_k", "generation.top_p")
    sections = ("device", "seed", "evaluation", "continuation", *drawing)
    parsed, given = parse(run_parser(continuation), words, sections)
    from probekit.causal.continuation import continuation as continue_after
    from probekit.reports.terminal import print_continuation

    found = continue_after(parsed.run, dotted(given), quiet=parsed.quiet)
    print_continuation(found.table, found.notes, found.folder)


def lens(words: list[str]) -> None:
    """Show what probes read at every token of a text: one HTML page."""
    parser = run_parser(lens)
    parser.add_argument(
        "--text",
        required=True,
        metavar="FILE_OR_STRING",
        help="a file, or the text itself; one word that has a slash, or ends in .txt or .md, is a file",
    )
    parser.add_argument("-o", "--out", metavar="FILE", help="the page, ending in .html (RUN/lens.html)")
    whose = "whose activations, or two side by side (the first variant probed)"
    parser.add_argument("--variant", nargs="+", metavar="NAME", help=whose)
    parser.add_argument("--locations", nargs="+", metavar="NAME", help="show only these (all probed)")
    parser.add_argument("--layers", nargs="+", type=int, metavar="INT", help="show only these (all probed)")
    parser.add_argument("--limit", type=int, default=2000, metavar="INT", help="most tokens of a text (2000)")
    one = "also show what contributes to the reading of this token: its number, or a word"
    parser.add_argument("--attribute", metavar="TOKEN", help=one)
    parsed, given = parse(parser, words, ("device",))
    from probekit.reports.lens import lens as write_lens
    from probekit.run.run import Run

    shown = write_lens(
        Run.at(parsed.run, dotted(given)),
        parsed.text,
        parsed.out,
        variant=parsed.variant,
        locations=parsed.locations,
        layers=parsed.layers,
        limit=parsed.limit,
        attribute=_token(parsed.attribute),
        quiet=parsed.quiet,
    )
    sys.stdout.write(f"The lens: {shown.path}\n")


def _token(given: str | None) -> int | str | None:
    """The token that is meant: a number, or a word."""
    return int(given) if given is not None and given.removeprefix("-").isdecimal() else given


def score(words: list[str]) -> None:
    """Apply a probe of a run to new texts: what it predicts at their ends, or at every token."""
    parser = run_parser(score)
    parser.usage = "probekit score RUN TEXTS [--OPTION VALUE ...]"
    parser.add_argument("texts", metavar="TEXTS", type=Path, help="texts, in any format of a corpus")
    parser.add_argument(
        "--cell", metavar="NAME", help="solver|location|layer|position|horizon (the best on validation)"
    )
    parser.add_argument("--layer", type=int, metavar="INT", help="the best probe of this layer")
    parser.add_argument("--text", metavar="COLUMN", help="column that holds the texts (as when probed)")
    parser.add_argument("--tokens", action="store_true", help="a row for every token, not only for each text")
    parser.add_argument("--out", metavar="FILE", help="write the table: .csv, .jsonl or .parquet")
    parsed, given = parse(parser, words, READING)
    from probekit.probing.score import score as score_texts
    from probekit.run.run import Run

    table = score_texts(
        Run.at(parsed.run, dotted(given)),
        parsed.texts,
        parsed.cell,
        layer=parsed.layer,
        text=parsed.text,
        encoding=given.get("corpus", {}).get("encoding"),
        tokens=parsed.tokens,
        out=parsed.out,
        quiet=parsed.quiet,
    )
    shown = table if parsed.out is None else table.head(10)
    sys.stdout.write(f"{shown.to_string(index=False, max_colwidth=40)}\n")
    if parsed.out:
        sys.stdout.write(f"All {len(table):,} rows: {parsed.out}\n")


def report(words: list[str]) -> None:
    """Write all of a run on one page, what to mind at the top: report.html, and the same as report.md."""
    parser = run_parser(report)
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="write only this file, .html or .md (RUN/report.html and .md)"
    )
    parsed, _ = parse(parser, words)
    from probekit.reports.report import report as write_report

    for file in write_report(parsed.run, parsed.out):
        sys.stdout.write(f"The report: {file}\n")


def corpus(words: list[str]) -> None:
    """Build a corpus, or inspect a run's: sizes, sentence lengths, actions, the sentences nearest to each."""
    parser = new_run_parser(corpus)
    parser.usage = f"{parser.usage}\n       probekit corpus RUN [--nearest INT] [--export FILE]"
    parser.add_argument("run", nargs="?", metavar="RUN", help="inspect this run's corpus; build nothing")
    parser.add_argument(
        "--nearest", type=int, default=2, metavar="INT", help="sentences shown for an action (2)"
    )
    parser.add_argument(
        "--export", metavar="FILE", help="write the sentences as a table to label: .csv, .jsonl, .parquet"
    )
    parsed, given = parse(parser, words, ALL)
    if parsed.nearest < 0:
        parser.error(f"argument --nearest: {parsed.nearest} is below 0")
    from probekit.data.corpus import export_sentences
    from probekit.reports.terminal import print_corpus
    from probekit.run.run import Run
    from probekit.training.train import build_corpus

    if parsed.run:
        run: Run = Run.open(parsed.run)
    else:
        config = _new_config(parsed, given)
        run = build_corpus(config, parsed.out, existing=parsed.existing, quiet=parsed.quiet)
    print_corpus(run.corpus, parsed.nearest)
    if parsed.export:
        sys.stdout.write(f"All sentences: {export_sentences(run.corpus, parsed.export)}\n")


def sweep(words: list[str]) -> None:
    """Train and evaluate with several values of some settings and several seeds; one table of all."""
    parsed, given = parse_sweep(sweep, words)
    config, members, seeds = swept(parsed, given)
    from probekit.reports.terminal import print_sweep
    from probekit.sweeps import sweep as run_sweep

    generation, quiet = parsed.generation, parsed.quiet
    made = run_sweep(config, members, seeds, parsed.out, generation=generation, quiet=quiet)
    print_sweep(made.table(), made.missing, made.folder)


def demo(words: list[str]) -> None:
    """Train, evaluate and probe on the planted corpus: the main job in a few minutes on a CPU."""
    parser = command_parser(demo)
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="the run's folder (runs/demo)")
    parser.add_argument("--overwrite", action="store_true", help="begin again")
    parsed, _ = parse(parser, words)
    run_demo(parsed.out, overwrite=parsed.overwrite, quiet=parsed.quiet)


def run_demo(out: str | Path = "runs/demo", *, overwrite: bool = False, quiet: bool = False) -> Run:
    """Trains, evaluates and probes the embedded default; what an earlier demo finished is not repeated.

    Args:
        out: The run's folder.
        overwrite: Begin again.
        quiet: Show no progress.
    """
    from probekit.evaluation.evaluate import evaluate as evaluate_run
    from probekit.probing.probe import probe as probe_run
    from probekit.reports.plot_probes import save_probe_figures
    from probekit.reports.terminal import print_corpus, print_evaluation, print_probes, print_training
    from probekit.training.train import train as train_run

    existing: Existing = "overwrite" if overwrite else "resume"
    run = train_run(Config.from_preset("demo"), out, existing=existing, quiet=quiet)
    print_corpus(run.corpus, nearest=1)
    print_training(run)
    print_evaluation(evaluate_run(run, quiet=quiet))
    probes = probe_run(run, quiet=quiet)
    save_probe_figures(probes.table, probes.folder)
    print_probes(probes)
    return run


# What several commands share


def _new_config(parsed: argparse.Namespace, given: dict[str, Any]) -> Config | None:
    """The settings of the run to make; None for those of the run to continue."""
    there = user_path(parsed.out) / "config.yaml"
    return chosen_config(parsed, given, there if parsed.existing == "resume" and there.is_file() else None)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    command.__name__: command
    for command in (
        train, evaluate, generate, ask, probe, score, compare, continuation, intervene, subnetwork, lens,
        report, corpus, sweep, demo,
    )
}  # fmt: skip

CONTINUED = dict.fromkeys(("train", "corpus"), "continue with --resume")
CONTINUED |= dict.fromkeys(("probe", "compare", "sweep", "demo"), "the same command continues")
"""How an interrupted command is continued; others start again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit code: 0; 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM, 141 if nobody reads the output.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    # Notes of these libraries are for their developers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with terminable():
            _run_command(words)
            sys.stdout.flush()
        distributed.leave()
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        if debug:
            raise
        # The flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ProbekitError, OSError) as error:  # a full disk or a forbidden folder is the user's to put right
        if debug:
            raise
        process = f"process {distributed.rank()}: " if distributed.count() > 1 else ""
        # What was typed may hold line breaks and control characters.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in f"{process}{error}")
        sys.stderr.write(f"probekit: error: {line}\n")
        return 2
    except KeyboardInterrupt as stop:
        if debug:
            raise
        number = stop.signal if isinstance(stop, Stopped) else signal.SIGINT
        stopped = "terminated" if number == signal.SIGTERM else "interrupted"
        again = CONTINUED.get(words[0], "start it again")
        sys.stderr.write(f"probekit: {stopped}; {again}\n")
        return 128 + number
    return 0


def _run_command(words: list[str]) -> None:
    names = "\n".join(f"  {name:10} {command.__doc__}" for name, command in COMMANDS.items())
    parser = Parser(
        "probekit",
        description="Train planner-conditioned language models; probe what they know of the next sentence.",
        epilog=f"commands:\n{names}\n\npresets: {', '.join(preset_names())}",
    )
    parser.add_argument("--version", action="version", version=f"probekit {version('probekit-lm')}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="COMMAND --help explains it")
    command = parser.parse_args(words[:1]).command
    if command not in SHARED:
        if not distributed.is_first():
            return
        distributed.alone()
    COMMANDS[command](words[1:])
