"""`probekit lens`: a page that shows, token by token, what probes read of the next sentence in any text."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from probekit.config import user_path
from probekit.errors import ProbekitError
from probekit.io import write_text
from probekit.progress import Progress
from probekit.reports.display import shortened, visible
from probekit.reports.lens_reading import LIMIT, LensData, given_text, read_text
from probekit.reports.tables import better_than_baselines
from probekit.run.run import Run

MISSING = 65535
"""Stands for a missing probability; the others are steps of 1 / 65,534."""

SHOWN_CHARACTERS = 160
"""Characters shown of a sentence that illustrates an action."""

SCALES = (0.1, 0.2, 0.5, 1.0)
"""Probabilities at which the colour scale may end: the first with 99 % of all probabilities below it."""

SYMBOLS = str.maketrans({"\t": "⇥", "\n": "↵", "\r": "↩", "\u2028": "↵", "\u2029": "↵"})
"""What stands for white space that would not be seen."""

FOLDER = Path(__file__).parent


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
    """Reads a text with a run's probes and writes a page that shows what they read.

    Args:
        run: The run or its folder, with linear probes for the next sentence's action.
        text: The text, or the name of its file (see `lens_reading.given_text`).
        out: The page, ending in .html; None: `lens.html` in the run's folder.
        variant: Whose activations; None: those of the first variant that was probed.
        locations: Read only these.
        layers: Read only these.
        limit: The largest number of tokens.
        quiet: Show no progress.

    Returns:
        The page's path.

    Raises:
        ProbekitError: There are no such probes; the text is blank, too long or cannot be read; or the page
            cannot be written.
    """
    run = Run.at(run)
    path = run.folder / "lens.html" if out is None else user_path(out)
    if path.suffix != ".html" or path.is_dir():
        raise ProbekitError(f"--out {path}: must be a file that ends in .html")
    if not path.parent.is_dir():
        raise ProbekitError(f"--out {path}: there is no folder {path.parent}")
    if not isinstance(limit, int | np.integer) or limit < 1:
        raise ProbekitError(f"--limit is {limit!r}; give the largest number of tokens of a text, 1 or more")
    for option, asked in (("--locations", locations), ("--layers", layers)):
        if (
            isinstance(asked, str | bytes)
            or not isinstance(asked, Iterable | None)
            or getattr(asked, "ndim", 1) != 1
        ):
            raise ProbekitError(f"{option} is {asked!r}; give a list")
    progress = Progress(quiet=quiet)
    chosen: dict[str, Any] = {"locations": locations, "layers": layers, "limit": limit}
    data = read_text(run, given_text(text), variant, **chosen, progress=progress)
    for note in data.notes:
        progress.say(note)
    try:
        write_text(path, page(data))
    except OSError as error:  # which names a temporary file
        raise ProbekitError(f"--out {path}: cannot be written ({error.strerror})") from None
    return path


def page(data: LensData) -> str:
    """Renders the page."""
    ends = [*data.first_token[1:], len(data.pieces)]
    sentences = [
        {
            "name": "no known action" if action < 0 else f"action {data.names[int(action)]}",
            "tokens": [(piece, _symbols(piece) or "·") for piece in data.pieces[start:end]],
            "examples": map(_example, data.examples.get(int(action), [])),
        }
        for start, end, action in zip(data.first_token, ends, data.actions, strict=True)
    ]
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script, style = ((FOLDER / name).read_text("utf-8") for name in ("lens_page.js", "lens_page.css"))
    return environment.get_template("lens_page.html").render(
        title=_symbols(f"{data.facts['Run']}, {data.probes.variant}: probekit lens"),
        facts={name: _symbols(value) for name, value in data.facts.items()},
        notes=data.notes,
        truth=data.truth,
        language=data.language,
        sentences=sentences,
        data=Markup(_json(_numbers(data))),  # noqa: S704 - escaped by _json
        script=Markup(script),  # noqa: S704 - our own file
        style=Markup(style),  # noqa: S704 - our own file
    )


def _symbols(text: str) -> str:
    """Text with a symbol for every invisible character, white space of its own included."""
    return visible(text.translate(SYMBOLS))


def _example(sentence: str) -> str:
    return shortened(_symbols(sentence), SHOWN_CHARACTERS)


def _numbers(data: LensData) -> dict[str, Any]:
    """What the script reads; large arrays are packed."""
    probes = data.probes
    quality = zip(
        _with_bounds(probes.quality, "accuracy"),
        probes.quality.documents.tolist(),
        probes.quality.examples.tolist(),
        probes.quality.injected.tolist(),
        _with_bounds(probes.quality, "gain"),
        probes.quality.gain_over.fillna("").tolist(),
        better_than_baselines(probes.quality).tolist(),
        strict=True,
    )
    largest = np.quantile(data.probability, 0.99)
    return {
        "first": data.first_token,
        "actions": data.actions,
        "complete": data.complete,
        "points": [
            {"location": location, "label": f"{label} ({location})", "layer": layer}
            for (location, layer), label in zip(probes.points, data.labels, strict=True)
        ],
        "distances": probes.distances,
        "best": probes.best,
        "quality": [*quality],
        "baselines": {name: _with_bounds(rows, "accuracy") for name, rows in probes.baselines.items()},
        "top": _packed(data.top),
        "read": _packed(_steps(data.probability)),
        "right": _packed(_steps(data.true_probability)),
        "scale": next((end for end in SCALES if largest <= end), 1.0),
        "planner": data.planner,
        "conditioning": data.conditioning,
        "names": {action: _symbols(name) for action, name in data.names.items()},
        "examples": {action: [*map(_example, texts)] for action, texts in data.examples.items()},
    }


def _with_bounds(rows: pd.DataFrame, metric: str) -> list[list[float | None]]:
    """A metric with the ends of its interval, which a single document does not have."""
    values = rows[[metric, f"{metric}_low", f"{metric}_high"]].to_numpy(float).tolist()
    return [[None if math.isnan(value) else round(value, 5) for value in row] for row in values]


def _steps(probabilities: np.ndarray) -> np.ndarray:
    steps = np.rint(np.nan_to_num(probabilities) * (MISSING - 1))
    return np.where(np.isnan(probabilities), MISSING, steps)


def _packed(values: np.ndarray) -> str:
    """Base64 of 16-bit unsigned integers, low byte first."""
    return base64.b64encode(values.astype("<u2").tobytes()).decode("ascii")


def _json(value: Any) -> str:
    """JSON that contains nothing an HTML or script parser could mistake for its own syntax."""

    def listed(values: np.ndarray) -> list[Any]:
        return values.tolist() if values.dtype.kind in "iub" else np.round(values.astype(float), 5).tolist()

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=listed)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
