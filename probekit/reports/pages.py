"""What HTML pages share: where they are written, their templates, and text that hides nothing."""

from __future__ import annotations

from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from probekit.reports.display import visible

FOLDER = Path(__file__).parent

SYMBOLS = str.maketrans({"\t": "⇥", "\n": "↵", "\r": "↩", "\u2028": "↵", "\u2029": "↵"})
"""What stands for white space that would not be seen."""

TEMPLATES = Environment(
    loader=FileSystemLoader(FOLDER),
    autoescape=True,
    undefined=StrictUndefined,
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
"""The templates of this folder; whatever they are given is escaped."""


def symbols(text: str) -> str:
    """Text with a symbol for every invisible character, white space of its own included."""
    return visible(text.translate(SYMBOLS))


def inline(html: str, title: str, height: str, sandbox: str = "") -> str:
    """A page as a notebook shows it: in a frame of its own, which may do only what `sandbox` allows."""
    return (
        f'<iframe srcdoc="{escape(html)}" title="{title}" sandbox="{sandbox}" '
        f'style="width: 100%; height: {height}; border: 1px solid"></iframe>'
    )
