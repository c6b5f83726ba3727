"""What HTML pages share: where they are written, their templates, and text that hides nothing."""

from __future__ import annotations

from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from probekit.config import user_path
from probekit.errors import ProbekitError
from probekit.io import write_text
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


def page_path(out: str | Path) -> Path:
    """The path of a page that can be written.

    Raises:
        ProbekitError: It does not end in .html, or its folder does not exist.
    """
    path = user_path(out)
    if path.suffix != ".html" or path.is_dir():
        raise ProbekitError(f"--out {path}: must be a file that ends in .html")
    if not path.parent.is_dir():
        raise ProbekitError(f"--out {path}: there is no folder {path.parent}")
    return path


def write_page(path: Path, html: str) -> Path:
    """Writes a page, and returns its path.

    Raises:
        ProbekitError: It cannot be written.
    """
    try:
        write_text(path, html)
    except OSError as error:  # which names a temporary file
        raise ProbekitError(f"--out {path}: cannot be written ({error.strerror})") from None
    return path
