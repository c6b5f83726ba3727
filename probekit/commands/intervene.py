"""`probekit intervene`."""

from __future__ import annotations

from probekit.commands.parsers import results_parser
from probekit.options import given_settings, parse


def command(words: list[str]) -> None:
    """Change what probes read, erase it, steer along it or patch it, and see what the LM makes of that."""
    sections = ["device", "evaluation", "intervene"]
    parsed = parse(results_parser("intervene", command.__doc__, sections), words)
    from probekit.causal.intervene import intervene
    from probekit.reports.intervention_tables import print_interventions

    print_interventions(intervene(parsed.run, given_settings(parsed), quiet=parsed.quiet))
