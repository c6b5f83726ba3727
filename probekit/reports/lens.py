"""`probekit lens`: a page that shows, token by token, what probes read of the next sentence in any text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from probekit.errors import ProbekitError
from probekit.progress import Progress
from probekit.reports.lens_page import page
from probekit.reports.lens_reading import read_text
from probekit.reports.lens_text import LIMIT, given_text
from probekit.run import Run
from probekit.storage import write_text


def lens(
    run: Run | str | Path,
    text: str | Path,
    out: str | Path | None = None,
    *,
    variant: str | None = None,
    locations: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    limit: int = LIMIT,
    quiet: bool = False,
) -> Path:
    """Reads a text with a run's probes and writes the page that shows what they read.

    Args:
        run: The run or its folder, with linear probes for the next sentence's action in it.
        text: The text, or the name of a file of it (see `lens_text.given_text`).
        out: The page, ending in .html; None: `lens.html` in the run's folder.
        variant: Whose activations; None: those of the first variant that was probed.
        locations: Read only these.
        layers: Read only these.
        limit: The most tokens.
        quiet: Show no progress.

    Returns:
        Where the page is.

    Raises:
        ProbekitError: There are no such probes, the text is blank, too long or cannot be read, or the page
            cannot be written there.
    """
    run = Run.at(run)
    path = run.folder / "lens.html" if out is None else _checked(Path(out))
    if limit < 1:
        raise ProbekitError(f"--limit is {limit}; give the most tokens that a text may have, 1 or more")
    progress = Progress(quiet=quiet)
    data = read_text(
        run,
        given_text(text),
        variant,
        locations=locations,
        layers=layers,
        limit=limit,
        progress=progress,
    )
    for note in data.notes:
        progress.say(note)
    try:
        write_text(path, page(data))
    except OSError as error:  # which names a temporary file
        raise ProbekitError(f"--out {path}: cannot be written ({error.strerror})") from None
    return path


def _checked(path: Path) -> Path:
    if path.suffix != ".html" or path.is_dir():
        raise ProbekitError(f"--out {path}: must be a file that ends in .html")
    if not path.parent.is_dir():
        raise ProbekitError(f"--out {path}: there is no folder {path.parent}")
    return path
