"""`probekit lens`: a page that shows, token by token, what probes read in a text; also inline."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from probekit import distributed
from probekit.config import Position, user_path
from probekit.errors import ProbekitError
from probekit.io import out_path, write_out
from probekit.models.mixing import VARIANTS
from probekit.progress import Progress
from probekit.reports import attribution
from probekit.reports.display import described, shortened
from probekit.reports.lens_reading import LensData, Reading, read_text
from probekit.reports.lens_text import LIMIT, given_text
from probekit.reports.pages import FOLDER, TEMPLATES, inline, symbols
from probekit.reports.tables import better_than_baselines
from probekit.run.run import Run

SHOWN_CHARACTERS = 160
"""Characters shown of a sentence that illustrates an action."""

SCALES = (0.1, 0.2, 0.5, 1.0)
"""Probabilities at which the colour scale may end: the first with 99 % of all probabilities below it."""

HEADINGS = {
    "action": "The action of a sentence",
    "token": "Tokens",
    "sentence-position": "The number of a sentence",
    "document-type": "The type of the document",
    "embedding": "The embedding of a sentence",
}
"""What is read, as the page calls it; a column of labels is called by its name."""

READS = {"two": "from one class to the other", "vectors": "cosine to the nearest sentence"}
"""What the colour of a token is, by the kind of what is read."""

INLINE_HEIGHT = "48rem"
"""Height of the page in a notebook."""


@dataclass(frozen=True, repr=False)
class Lens:
    """A page that shows what probes read in a text; a notebook shows it inline.

    Attributes:
        data: What is shown, as numbers.
        html: The page, which needs no network.
        path: Where it was written.
    """

    data: LensData
    html: str
    path: Path

    def save(self, path: str | Path) -> Path:
        """Writes the page to a file that ends in .html, and returns its path.

        Raises:
            ProbekitError: It cannot be written.
        """
        return write_out(out_path(user_path(path), ".html"), self.html)

    def __repr__(self) -> str:
        return f"Lens({len(self.data.pieces)} tokens, {self.path.name})"

    def _repr_html_(self) -> str:
        return inline(self.html, "probekit lens", INLINE_HEIGHT, "allow-scripts")


def lens(
    run: Run | str | Path,
    text: str | Path,
    out: str | Path | None = None,
    *,
    variant: str | Sequence[str] | None = None,
    locations: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    limit: int = LIMIT,
    attribute: int | str | None = None,
    quiet: bool = False,
) -> Lens:
    """Reads a text with a run's probes and writes a page that shows what they read.

    Args:
        run: The run or its folder, with linear probes for any target.
        text: The text, or the name of its file (see `lens_text.given_text`).
        out: The page, ending in .html; None: `lens.html` in the run's folder.
        variant: Whose activations, or two variants to show side by side; None: those of the first variant
            that was probed.
        locations: Read only these.
        layers: Read only these.
        limit: The largest number of tokens.
        attribute: Also show what contributes to the reading of this token by the probe that the page begins
            with: its number or a word, as in `attribution.attribute`.
        quiet: Show no progress.

    Returns:
        The page, which a notebook shows inline.

    Raises:
        ProbekitError: There are no such probes; the text is blank, too long or cannot be read; or the page
            cannot be written.
    """
    distributed.check_alone("lens")
    run = Run.at(run)
    path = out_path(run.folder / "lens.html" if out is None else user_path(out), ".html")
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
    variants = variant if isinstance(variant, Sequence) and not isinstance(variant, str) else [variant]
    data = read_text(run, given_text(text), variants, **chosen, progress=progress)
    for note in data.notes:
        progress.say(note)
    panel = None
    if attribute is not None:
        point, read_at = divmod(data.probes.best, len(data.probes.positions))
        where, at = data.probes.points[point]
        position = data.probes.positions[read_at]
        names = None if variant is None else [*map(str, variants)]
        found = attribution.attribute(
            run, text, attribute, variant=names, location=where, layer=at, position=position, quiet=quiet
        )
        panel = found.panel
    html = page(data, panel)
    return Lens(data, html, write_out(path, html))


def page(data: LensData, panel: Markup | None = None) -> str:
    """Renders the page, with a panel of contributions if there is one."""
    probes, target = data.probes, data.probes.record.config.probe.target
    ends = [*data.first_token[1:], len(data.pieces)]
    numbers = _numbers(data)
    sentences = [
        {
            "name": _sentence_name(data, label),
            "tokens": [(piece, symbols(piece) or "·") for piece in data.pieces[start:end]],
            "examples": map(_example, data.examples.get(label, []) if probes.of_actions else []),
        }
        for start, end, label in zip(data.first_token, ends, numbers["sentences"], strict=True)
    ]
    script, style = ((FOLDER / name).read_text("utf-8") for name in ("lens_page.js", "lens_page.css"))
    style += "" if panel is None else (FOLDER / "attribution_panel.css").read_text("utf-8")
    built_in = probes.record.config.probe.labels is None
    return TEMPLATES.get_template("lens_page.html").render(
        title=symbols(f"{data.facts['Run']}, {data.facts['Variant']}: probekit lens"),
        heading=HEADINGS[target] if built_in else symbols(target),
        facts={name: symbols(value) for name, value in data.facts.items()},
        notes=map(symbols, data.notes),
        kind=numbers["kind"],
        reads=READS.get(numbers["kind"], "probability of the class that is read"),
        reads_true="cosine to the true one" if probes.of_embeddings else "probability of the true class",
        variants=[reading.probes.variant for reading in data.readings],
        of_actions=probes.of_actions,
        ahead=numbers["ahead"],
        mean="mean" in probes.positions,
        truth=symbols(data.truth.words),
        truth_known=numbers["kind"] != "numbers" and not np.isnan(data.truth.labels).all(),
        language=data.language,
        sentences=sentences,
        panel=panel,
        data=Markup(_json(numbers)),  # noqa: S704 - escaped by _json
        script=Markup(script),  # noqa: S704 - our own file
        style=Markup(style),  # noqa: S704 - our own file
    )


def _example(sentence: str) -> str:
    return shortened(symbols(sentence), SHOWN_CHARACTERS)


def _sentence_name(data: LensData, label: float | None) -> str:
    if label is None:
        return "no known action" if data.probes.of_actions else ""
    if data.probes.of_embeddings:
        return ""
    return symbols(data.names[int(label)][1]) if data.probes.classes else f"{label:,.4g}"


def _position(position: Position) -> str:
    """A position in words."""
    if isinstance(position, str):
        return {"first": "first token", "last": "last token", "mean": "mean of all"}.get(position, position)
    if position > 0:
        return f"{position} before"
    return f"{-position} after the first token" if position else "0 (the first token)"


def _numbers(data: LensData) -> dict[str, Any]:
    """What the script reads; large arrays are packed."""
    probes, config = data.probes, data.probes.record.config.probe
    kind = {0: "numbers", 2: "two"}.get(len(probes.classes), "classes")
    kind = "vectors" if probes.of_embeddings else kind
    scale = data.scale
    if kind != "numbers":
        largest = max(np.quantile(reading.read[0], 0.99) for reading in data.readings)
        scale = (0.0, 1.0 if kind == "two" else next((end for end in SCALES if largest <= end), 1.0))
    before = any(isinstance(position, int) and position > 0 for position in probes.positions)
    planners = {
        "The planner's own forecast of the next sentence"
        + (f" ({variant})" if variant in VARIANTS and VARIANTS[variant].joint else ""): reading.planner
        for reading in reversed(data.readings)
        if reading.planner and (variant := reading.probes.variant)
    }
    return {
        "kind": kind,
        "ofActions": probes.of_actions,
        "extent": probes.record.extent,
        "ahead": before and config.anchors == "start" and probes.labels_sentences,
        "first": data.first_token,
        "sentences": [None if np.isnan(label) else label for label in data.truth.of_sentences.tolist()],
        "points": [
            {"location": location, "label": f"{label} ({location})", "layer": layer}
            for (location, layer), label in zip(probes.points, data.labels, strict=True)
        ],
        "positions": [{"key": str(position), "label": _position(position)} for position in probes.positions],
        "truth": _packed(data.truth.labels),
        "fitted": _packed(data.truth.fitted),
        "metric": described(probes.metric).label,
        "gain": "bits" if probes.classes else "R²",
        "baselines": {name: _with_bounds(rows, probes.metric) for name, rows in probes.baselines.items()},
        "variants": [_variant(reading) for reading in data.readings],
        "planners": [*planners.items()],
        "scale": scale,
        "names": {label: [*map(_example, names)] for label, names in data.names.items()},
        "actions": {action: symbols(name) for action, name in data.actions.items()},
        "examples": {action: [*map(_example, texts)] for action, texts in data.examples.items()},
        "ids": data.ids,
        "words": {token: symbols(word) for token, word in data.words.items()},
    }


def _variant(reading: Reading) -> dict[str, Any]:
    """What the script reads of one variant."""
    probes, following = reading.probes, reading.next
    own = probes.quality
    quality = {
        "value": _with_bounds(own, probes.metric),
        "gain": _with_bounds(own, "gain"),
        "over": own.gain_over.fillna("").tolist(),
        "better": better_than_baselines(own).tolist(),
        "injected": own.injected.tolist(),
        "examples": own.examples.tolist(),
        "documents": own.documents.tolist(),
    }
    packed = {name: _packed(following[name]) for name in ("tokens", "probability")} if following else {}
    return {
        "name": probes.variant,
        "best": probes.best,
        "quality": pd.DataFrame(quality).to_dict("records"),
        "read": _packed(reading.read),
        "top": _packed(reading.top),
        "right": _packed(reading.of_true),
        "next": {**packed, "points": following["points"]} if following else None,
        "conditioning": reading.conditioning,
    }


def _with_bounds(rows: pd.DataFrame, metric: str) -> list[list[float | None]]:
    """A metric with the ends of its interval, which a single document does not have."""
    values = rows[[metric, f"{metric}_low", f"{metric}_high"]].to_numpy(float).tolist()
    return [[None if np.isnan(value) else round(value, 5) for value in row] for row in values]


def _packed(values: np.ndarray) -> str:
    """Base64 of 32-bit floating-point numbers, low byte first."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")


def _json(value: Any) -> str:
    """JSON that contains nothing an HTML or script parser could mistake for its own syntax."""

    def listed(values: np.ndarray) -> list[Any]:
        return values.tolist() if values.dtype.kind in "iub" else np.round(values.astype(float), 5).tolist()

    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=listed)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
