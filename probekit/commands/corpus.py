"""`probekit corpus`."""

from __future__ import annotations

import sys

from probekit.commands.parsers import building_config, building_parser, existing
from probekit.options import parse


def command(words: list[str]) -> None:
    """Build a corpus, or inspect a run's: sizes, sentence lengths, actions, the sentences nearest to each."""
    parser = building_parser("corpus", command.__doc__, words)
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
    from probekit.data.corpus import export_sentences
    from probekit.reports.terminal import print_corpus
    from probekit.run.run import Run
    from probekit.training.train import build_corpus

    if parsed.run:
        run = Run.open(parsed.run)
    else:
        config = building_config(parsed)
        run = build_corpus(config, parsed.out, existing=existing(parsed), quiet=parsed.quiet)
    print_corpus(run.corpus, parsed.nearest)
    if parsed.export:
        sys.stdout.write(f"All sentences: {export_sentences(run.corpus, parsed.export)}\n")
