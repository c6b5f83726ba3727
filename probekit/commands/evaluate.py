"""`probekit evaluate`."""

from __future__ import annotations

from probekit.commands.parsers import results_parser
from probekit.options import given_settings, parse


def command(words: list[str]) -> None:
    """Perplexity of every model, planners' metrics or multiple choice; generated text if asked for."""
    sections = ["method", "device", "evaluation", "generation"]
    parser = results_parser("evaluate", command.__doc__, sections)
    parser.add_argument(
        "--generation", action="store_true", help="generate text with every variant and measure that too"
    )
    parsed = parse(parser, words)
    settings = given_settings(parsed)
    if not parsed.generation and (stray := [name for name in settings if name.startswith("generation.")]):
        parser.error(f"argument --{stray[0]}: goes with --generation")
    from probekit.evaluation.evaluate import evaluate
    from probekit.reports.terminal import print_evaluation

    if parsed.generation:
        from probekit.generation.evaluate import check_generation, evaluate_generation
        from probekit.reports.terminal import print_generation

        check_generation(parsed.run, settings)
    print_evaluation(evaluate(parsed.run, settings, quiet=parsed.quiet))
    if parsed.generation:
        print_generation(evaluate_generation(parsed.run, settings, quiet=parsed.quiet))
