"""`probekit subnetwork`."""

from __future__ import annotations

from probekit.commands.parsers import results_parser
from probekit.options import given_settings, parse


def command(words: list[str]) -> None:
    """Find the heads and parts of the adapter without which nothing is read of the next sentence's action."""
    sections = ["device", "evaluation", "subnetwork"]
    parsed = parse(results_parser("subnetwork", command.__doc__, sections), words)
    from probekit.causal.subnetwork import subnetwork
    from probekit.reports.subnetwork_tables import print_subnetwork

    print_subnetwork(subnetwork(parsed.run, given_settings(parsed), quiet=parsed.quiet))
