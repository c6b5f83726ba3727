"""The commands, and in files of their own the options of those that have many."""

from probekit.cli.commands import COMMANDS, main

__all__ = ["COMMANDS", "main"]
