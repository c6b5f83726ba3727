"""The one exception that every stage raises for bad input, and other errors on one line."""

from __future__ import annotations


class ProbekitError(Exception):
    """Bad input, in one line: the setting or file, its value, and what would be right.

    The command line prints the message and exits with code 2; from Python it is an ordinary exception.
    """


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split())
