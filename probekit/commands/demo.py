"""`probekit demo`."""

from __future__ import annotations

from probekit.options import Parser, parse


def command(words: list[str]) -> None:
    """Train, evaluate and probe on the planted corpus: the whole way in a few minutes on a CPU."""
    parser = Parser(prog="probekit demo", description=command.__doc__)
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="the run's folder (runs/demo)")
    parser.add_argument("--overwrite", action="store_true", help="do it again from the beginning")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parsed = parse(parser, words)
    from probekit.walkthrough import demo

    demo(parsed.out, overwrite=parsed.overwrite, quiet=parsed.quiet)
