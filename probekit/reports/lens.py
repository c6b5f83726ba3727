"""`probekit lens`: a page that shows, token by token, what probes read of the next sentence in any text."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from probekit.errors import ProbekitError
from probekit.io import write_text
from probekit.progress import Progress
from probekit.reports.lens_reading import LensData, Quality, read_text
from probekit.reports.lens_text import LIMIT, given_text, visible
from probekit.run.run import Run

NOTHING = 65535
"""What stands for a probability that there is none; the others are steps of 1 / 65,534."""

SHOWN = 160
"""Characters of a sentence that shows what an action is."""

SCALES = (0.1, 0.2, 0.5, 1.0)
"""Probabilities at which the scale of colours may end."""

COVERED = 0.99
"""The scale ends where at least this share of what is read lies below it."""


def page(data: LensData) -> str:
    """The page that shows a text as it was read."""
    return _template("lens_page.html").substitute(
        title=escape(visible(f"{data.facts['Run']}, {data.probes.variant}: probekit lens")),
        style=_template("lens_page.css").template,
        script=_template("lens_page.js").template,
        facts="".join(
            f"<div><dt>{escape(k)}</dt><dd>{escape(visible(v))}</dd></div>" for k, v in data.facts.items()
        ),
        notes="".join(f'<p class="warning">{escape(note)}</p>' for note in data.notes),
        truth=escape(data.truth),
        language=escape(data.language),
        text="\n".join(_sentences(data)),
        data=_json(_numbers(data)),
    )


def _template(name: str) -> Template:
    return Template(files("probekit.reports").joinpath(name).read_text("utf-8"))


def _sentences(data: LensData) -> Iterable[str]:
    ends = [*data.first_token[1:], len(data.pieces)]
    for number, (start, end, action) in enumerate(zip(data.first_token, ends, data.actions, strict=True), 1):
        texts = data.examples.get(int(action), [])
        likes = " ".join(["like", *(f"“{_clipped(text)}”" for text in texts)]) if texts else ""
        named = "no known action" if action < 0 else f"action {action}"
        yield (
            f'<div class="s" role="group" aria-label="Sentence {number}, {named}">'
            f'<div class="n" aria-hidden="true"><b>{number}</b> {named}</div>'
            f'<div class="x" dir="auto">{"".join(map(_token, data.pieces[start:end]))}</div>'
            f'<div class="e" dir="auto" aria-hidden="true">{escape(likes)}</div></div>'
        )


def _token(piece: str) -> str:
    """A token; one that adds no visible character, as a part of one may not, has a name nonetheless."""
    name = "" if piece.strip() else f' aria-label="{"white space" if piece else "part of a character"}"'
    shown = escape(visible(piece)) or "·"
    return f'<span class="t" role="option" aria-selected="false" tabindex="-1"{name}>{shown}</span>'


def _numbers(data: LensData) -> dict[str, Any]:
    """What the script reads; where there are many numbers, they are packed."""
    probes = data.probes
    return {
        "first": data.first_token.tolist(),
        "actions": data.actions.tolist(),
        "over": data.over,
        "places": [
            {"location": location, "label": f"{label} ({location})", "layer": layer}
            for (location, layer), label in zip(probes.places, data.labels, strict=True)
        ],
        "distances": probes.distances,
        "best": probes.best,
        "quality": [[_interval(q), q.documents, q.examples, q.injected] for q in probes.quality],
        "baselines": {
            name: [_interval(quality) for quality in by_distance]
            for name, by_distance in probes.baselines.items()
        },
        "top": _packed(data.top),
        "read": _packed(_steps(data.probability)),
        "right": _packed(_steps(data.true_probability)),
        "scale": _scale(data.probability),
        "planner": data.planner and vars(data.planner),
        "told": data.told and vars(data.told),
        "examples": {action: list(map(_clipped, texts)) for action, texts in data.examples.items()},
    }


def _clipped(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= SHOWN else shown[:SHOWN].rstrip() + "…"


def _interval(quality: Quality) -> list[float | None]:
    """Accuracy and its interval; one document alone has none."""
    return [None if math.isnan(value) else round(value, 5) for value in quality.accuracy]


def _steps(probabilities: np.ndarray) -> np.ndarray:
    steps = np.rint(np.nan_to_num(probabilities) * (NOTHING - 1))
    return np.where(np.isnan(probabilities), NOTHING, steps)


def _packed(values: np.ndarray) -> str:
    """Base64 of 16-bit unsigned integers, the low byte first."""
    return base64.b64encode(values.astype("<u2").tobytes()).decode("ascii")


def _scale(probabilities: np.ndarray) -> float:
    most = np.quantile(probabilities, COVERED)
    return next((end for end in SCALES if most <= end), 1.0)


def _listed(values: np.ndarray) -> list[Any]:
    return values.tolist() if values.dtype.kind in "iub" else np.round(values.astype(np.float64), 5).tolist()


def _json(value: Any) -> str:
    """JSON that no HTML parser and no old script parser takes for anything else."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_listed)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


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
