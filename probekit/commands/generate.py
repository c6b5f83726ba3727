"""`probekit generate`."""

from __future__ import annotations

import sys
from pathlib import Path

from probekit.config import Config
from probekit.options import Parser, add_setting_options, given_settings, parse


def command(words: list[str]) -> None:
    """Write text with a run: go on with prompts or with test documents, or begin from nothing."""
    parsed = parse(_parser(), words)
    from probekit.generation.generate import TOKENS
    from probekit.generation.texts import check_out, read_prompts, write_texts
    from probekit.progress import Progress
    from probekit.reports.terminal import print_texts
    from probekit.run.run import Run

    if parsed.out:
        check_out(parsed.out)
    written = write_texts(
        Run.at(parsed.run, given_settings(parsed)),
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


def _parser() -> Parser:
    usage = (
        "probekit generate RUN [--prompt TEXT ... | --prompts FILE | --documents INT | --samples INT]\n"
        "                         [--variant NAME] [--tokens INT] [--plan PLAN] [--SETTING VALUE ...]"
    )
    parser = Parser(prog="probekit generate", usage=usage, description=command.__doc__)
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
