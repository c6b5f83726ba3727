"""`probekit lens`."""

from __future__ import annotations

import sys
from pathlib import Path

from probekit.config import Config
from probekit.options import Parser, add_setting_options, given_settings, parse


def command(words: list[str]) -> None:
    """Show what probes read of the next sentence at every token of a text: one HTML page."""
    parsed = parse(_parser(), words)
    from probekit.reports.lens import lens
    from probekit.reports.lens_text import LIMIT
    from probekit.run.run import Run

    page = lens(
        Run.at(parsed.run, given_settings(parsed)),
        parsed.text,
        parsed.out,
        variant=parsed.variant,
        locations=parsed.locations,
        layers=parsed.layers,
        limit=LIMIT if parsed.limit is None else parsed.limit,
        quiet=parsed.quiet,
    )
    sys.stdout.write(f"The lens: {page}\n")


def _parser() -> Parser:
    usage = (
        "probekit lens RUN --text FILE_OR_STRING [-o FILE.html] [--variant NAME] [--locations NAME ...]\n"
        "                     [--layers INT ...]"
    )
    parser = Parser(prog="probekit lens", usage=usage, description=command.__doc__)
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
