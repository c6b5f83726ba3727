"""`probekit report`."""

from __future__ import annotations

import sys
from pathlib import Path

from probekit.options import Parser, parse


def command(words: list[str]) -> None:
    """Write all of a run on one page, what to mind at the top: report.html, and the same as report.md."""
    usage = "probekit report RUN [-o FILE]"
    parser = Parser(prog="probekit report", usage=usage, description=command.__doc__)
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
