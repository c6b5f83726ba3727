"""The commands, and in files of their own the options of those that have many."""

from probekit.cli.commands import COMMANDS, main, run_demo

__all__ = ["COMMANDS", "main", "run_demo"]
