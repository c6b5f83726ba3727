"""`probekit train`."""

from __future__ import annotations

import sys

from probekit import distributed
from probekit.commands.parsers import building_config, building_parser, existing
from probekit.options import given_settings, parse

TRAINED_WITH = ("lm", "planner", "conditioning", "depth", "training")
"""Sections whose settings are for training alone."""


def command(words: list[str]) -> None:
    """Train corpus, LM (if new), planner and an adapter for each variant, or depth ensembles (--method)."""
    parsed = parse(building_parser("train", command.__doc__, words), words)
    from probekit.reports.terminal import print_training
    from probekit.run.stages import HOW_ALONE, why_idle
    from probekit.training.train import train

    config = building_config(parsed)
    for name in given_settings(parsed):
        told = name.split(".")[0] in TRAINED_WITH and name not in HOW_ALONE and distributed.is_first()
        if config and told and (reason := why_idle(config, name)):
            sys.stderr.write(f"probekit: note: {name} changes nothing here: {reason}\n")
    run = train(config, parsed.out, existing=existing(parsed), quiet=parsed.quiet)
    if distributed.is_first():
        print_training(run)
