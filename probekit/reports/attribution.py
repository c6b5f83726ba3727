"""`probekit.attribute`: how much each token up to one contributes to what a run's probe reads there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from markupsafe import Markup
from torch import Tensor

from probekit.config import Position, user_path
from probekit.data.tokenizer import decoded
from probekit.errors import ProbekitError
from probekit.io import out_path, write_out
from probekit.models.conditioning import EMBEDDING
from probekit.models.locations import BEFORE, hook_name, label
from probekit.probing.activations import probing_windows
from probekit.probing.attribution import (
    EmbeddingScore,
    integrated_gradients,
    neutral_token,
    occlusion,
    token_embeddings,
)
from probekit.probing.results import Cell, LinearProbe, validation_loss
from probekit.progress import Progress
from probekit.reports.display import described, number, with_interval
from probekit.reports.lens_probes import KeptProbes, kept_probes
from probekit.reports.lens_reading import reading_facts
from probekit.reports.lens_text import LIMIT, Text, cut_text, given_text
from probekit.reports.pages import FOLDER, TEMPLATES, inline, symbols
from probekit.run.run import Run

STEPS = 512
"""Most points of the path at which gradients are taken; a probe of speech in SmolLM2 needed at most 128."""

UNCONDITIONED = ("none", "random")
"""Variants whose activations depend on the text alone."""

METHODS = ("integrated_gradient", "occlusion")

LARGEST = 8
"""Tokens whose contributions are listed below the text."""

INLINE_HEIGHT = "32rem"
"""Height of the page in a notebook."""


@dataclass(frozen=True, repr=False)
class Attribution:
    """What the tokens of a text contribute to what a probe reads; a notebook shows it inline.

    Attributes:
        table: A row for each variant and token up to the one that is read: `variant`, `token` (its number
            from 0), `piece`, `distance` (tokens up to the one read), `integrated_gradient` and `occlusion`,
            in units of the score.
        readings: A row for each variant: the probe's `location`, `layer` and `position`, `score_of` (what
            the score is), `read` (what the variant's own probe reads), `neutral` (the token that replaces
            others), `score` and `baseline`, its values for the text and where all tokens are the neutral
            one, and `gap`, by how much the integrated gradients miss the difference of the two; then the
            probe's own metric on test documents with its interval (`metric`, `value`, `low`, `high`) and
            `documents`.
        facts: What was read with what, in words.
    """

    table: pd.DataFrame
    readings: pd.DataFrame
    facts: dict[str, str]

    @property
    def panel(self) -> Markup:
        """The part of a page that shows it."""
        largest = float(self.table[[*METHODS]].abs().to_numpy().max()) or 1.0
        last = int(self.table.token.max())
        parts = [
            {
                "reading": {
                    name: symbols(value) if isinstance(value, str) else value
                    for name, value in reading.items()
                },
                "quality": f"{described(reading['metric']).label} "
                + with_interval(reading["value"], reading["low"], reading["high"]),
                "methods": [
                    {"name": name.replace("_", " "), "tokens": [*_shown(rows, name, largest, last)]}
                    for name in METHODS
                ],
                "largest": _largest(rows),
            }
            for reading in self.readings.to_dict("records")
            for rows in [self.table[self.table.variant == reading["variant"]]]
        ]
        template = TEMPLATES.get_template("attribution_panel.html")
        piece = symbols(self.table.piece[self.table.token == last].iloc[0])
        return Markup(template.render(parts=parts, last=last, piece=piece, number=number))  # noqa: S704 - escaped

    @property
    def html(self) -> str:
        """The page, which needs no network."""
        styles = [(FOLDER / name).read_text("utf-8") for name in ("lens_page.css", "attribution_panel.css")]
        return TEMPLATES.get_template("attribution_page.html").render(
            title=symbols(f"{self.facts['Run']}: probekit attribution"),
            facts={name: symbols(value) for name, value in self.facts.items()},
            panel=self.panel,
            style=Markup("".join(styles)),  # noqa: S704 - our own files
        )

    def save(self, path: str | Path) -> Path:
        """Writes the page to a file that ends in .html, and returns its path.

        Raises:
            ProbekitError: It cannot be written.
        """
        return write_out(out_path(user_path(path), ".html"), self.html)

    def __repr__(self) -> str:
        return f"Attribution(token {self.table.token.max()}, {', '.join(self.readings.variant)})"

    def _repr_html_(self) -> str:
        return inline(self.html, "probekit attribution", INLINE_HEIGHT)


def _shown(rows: pd.DataFrame, method: str, largest: float, last: int) -> Any:
    """What a page shows of tokens: text, sign, share of the largest contribution in %, and words."""
    for token, piece, value in zip(rows.token, rows.piece, rows[method], strict=True):
        yield {
            "piece": symbols(piece) or "·",
            "sign": "plus" if value >= 0 else "minus",
            "share": round(100 * abs(value) / largest),
            "words": f"token {token}: {number(value, signed=True)}",
            "read": token == last,
        }


def _largest(rows: pd.DataFrame) -> list[dict[str, Any]]:
    order = rows[[*METHODS]].abs().max(axis=1).sort_values(ascending=False, kind="stable").index
    shown = rows.loc[order[:LARGEST]]
    shown = shown.assign(piece=[symbols(piece) or "·" for piece in shown.piece])
    return shown[["token", "piece", *METHODS]].to_dict("records")  # type: ignore[return-value]


def attribute(
    run: Run | str | Path,
    text: str | Path,
    token: int | str = -1,
    *,
    variant: str | Sequence[str] | None = None,
    location: str | None = None,
    layer: int | None = None,
    position: Position | None = None,
    steps: int = STEPS,
    quiet: bool = False,
) -> Attribution:
    """Finds how much each token up to one contributes to what a run's linear probe reads there.

    The score is, of two classes, the log-odds of the second; of more, the log-probability of the class that
    the first variant reads; or the number. A token is replaced by a neutral one, the most frequent of the
    corpus: the LM knows its embedding, whereas zeros or the mean of all embeddings, which no token has,
    disturb it wherever they stand. A neutral token in the text itself, and the separator before it, thus
    contribute nothing. All is computed in float32.

    Args:
        run: The run or its folder, with linear probes of classes or numbers.
        text: The text, or the name of its file (see `lens_text.given_text`).
        token: The number of the token that is read, from 0 or from the end as in Python; or a word that the
            text holds once, whose last token is read.
        variant: Whose activations, `none` or `random`, or both; None: `none`, and beside it random weights,
            if they were probed.
        location: Of the probe. This, the layer and the position leave probes to choose from: the best one of
            the first variant on validation documents reads in all variants.
        layer: Of the probe.
        position: Of the probe.
        steps: Most points of the path at which gradients are taken; few are, where contributions add up.
        quiet: Show no progress.

    Raises:
        ProbekitError: There is no such probe or token, or the token is beyond the first window.
    """
    run = Run.at(run)
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ProbekitError(f"steps is {steps!r}; give how often the gradient is taken, 1 or more")
    locations, layers = None if location is None else [location], None if layer is None else [layer]
    every = [kept_probes(run, name, locations, layers) for name in _variants(run, variant)]
    probes = every[0]
    if probes.of_embeddings:
        raise ProbekitError(
            f"the probes of {run.folder} predict embeddings, which are no single score; "
            "probe classes or numbers"
        )
    best = _cell(probes, position)
    run.require_causal()
    settings: dict[str, Any] = {"probe.window": probes.record.config.probe.window}
    if run.dtype != torch.float32:  # in which gradients lose too many digits to add up
        settings["lm.dtype"] = "float32"
    run = run.with_settings(settings)
    cut = cut_text(run, given_text(text), "none", LIMIT)
    at = _token_number(cut, token)
    first = int(cut.corpus.bos_rule != "none")  # behind the separator, if the LM reads it
    ids = cut.corpus.tokens[1 - first : at + 2]
    if len(ids) > (window := probing_windows(run)[0]):
        raise ProbekitError(
            f"token {at:,} is beyond the first window of {window:,} tokens, where contributions end; "
            "shorten the text before it"
        )
    tables, readings = [], []
    known: int | None = None
    for own in every:
        with Progress(quiet=quiet).task(f"attribute what is read in {own.variant}"):
            known, found, reading = _attributed(run, own, *best, known, ids, first, steps)
        found = found[first:]
        facts = {
            "token": np.arange(at + 1),
            "piece": cut.pieces[: at + 1],
            "distance": at - np.arange(at + 1),
        }
        tables.append(
            pd.DataFrame({"variant": own.variant, **facts, **dict(zip(METHODS, found.T, strict=True))})
        )
        readings.append(reading)
    return Attribution(
        pd.concat(tables, ignore_index=True), pd.DataFrame(readings), reading_facts(run, every)
    )


def _variants(run: Run, asked: str | Sequence[str] | None) -> list[str]:
    names = [asked] if isinstance(asked, str) else asked
    if names is None:
        names = [name for name in UNCONDITIONED if [*run.folder.glob(f"probes/{name}-seed*.safetensors")]]
        names = names or ["none"]  # of which there are none, as the message says
    if (
        not isinstance(names, Sequence)
        or not names
        or not {*names} <= {*UNCONDITIONED}
        or len({*names}) < len(names)
    ):
        raise ProbekitError(
            f"variant is {asked!r}; contributions are of the text alone: give "
            f"{' or '.join(UNCONDITIONED)}, or both"
        )
    return [*names]


def _cell(probes: KeptProbes, position: Position | None) -> tuple[int, Cell]:
    """The probe that is best on validation documents, of a position if one is given, and its number."""
    rows = probes.quality.reset_index()
    asked = np.full(len(rows), True) if position is None else (rows.position == str(position)).to_numpy()
    if not asked.any():
        there = ", ".join(map(str, probes.positions))
        raise ProbekitError(f"position is {position!r}, where no probe reads; there are {there}")
    loss = validation_loss(rows).fillna(np.inf).to_numpy()
    best = int(np.flatnonzero(asked)[loss[asked].argmin()])
    point, read_at = divmod(best, len(probes.positions))
    return best, Cell(*probes.points[point], probes.positions[read_at], probes.horizon, probes.solver)


def _token_number(cut: Text, token: int | str) -> int:
    """The number of the token that is meant."""
    count = len(cut.pieces)
    if isinstance(token, str):
        text = "".join(cut.pieces)
        if not token.strip() or text.count(token) != 1:
            raise ProbekitError(
                f"token is {token!r}, which is not once in the text; give a word that is, or a number from "
                f"0 to {count - 1}"
            )
        end = text.index(token) + len(token.rstrip())
        return int(np.searchsorted(np.cumsum([len(piece) for piece in cut.pieces]), end))
    whole = isinstance(token, int | np.integer) and not isinstance(token, bool)
    if not whole or not -count <= token < count:
        raise ProbekitError(
            f"token is {token!r}, but the text has {count:,} tokens; give a number from 0 to {count - 1}, or "
            f"{-count} to -1 to count from the end"
        )
    return int(token) % count


def _attributed(
    run: Run,
    probes: KeptProbes,
    best: int,
    cell: Cell,
    known: int | None,
    ids: np.ndarray,
    first: int,
    steps: int,
) -> tuple[int | None, np.ndarray, dict[str, Any]]:
    """The class that is explained, contributions, and the row of the reading.

    Args:
        run: The run.
        probes: Those of the variant.
        best: The number of the one that reads.
        cell: The same one.
        known: The class that is explained; None: the one that is read.
        ids: The tokens that the LM reads, the last of which is read by the probe `[positions]`.
        first: The first of them that belongs to the text.
        steps: Most points of the path.
    """
    name = hook_name(cell.location.removesuffix(BEFORE), cell.layer)
    backend = run.backend_for([EMBEDDING, name], probes.variant, probes.seed)
    tokens = torch.from_numpy(ids.astype(np.int64)).to(run.device)
    embeddings = token_embeddings(backend, tokens)
    neutral = neutral_token(run.corpus)
    baseline = token_embeddings(backend, tokens.new_tensor([neutral])).repeat(len(tokens), 1)
    baseline[:first] = embeddings[:first]
    saved = probes.saved[cell]
    probe = saved.to(run.device)
    both = torch.stack([embeddings, baseline])
    with torch.no_grad():
        said = EmbeddingScore(backend, tokens, name, len(tokens) - 1, probe.scores)(both)[0]
    own, read = _read(said, probes.classes)
    known = own if known is None else known
    score, score_of = _score(probe, probes.classes, known)
    scored = EmbeddingScore(backend, tokens, name, len(tokens) - 1, score)
    with torch.no_grad():
        ends = scored(both).tolist()
    found = torch.stack(
        [integrated_gradients(scored, embeddings, baseline, steps), occlusion(scored, embeddings, baseline)],
        1,
    )
    quality = probes.quality.iloc[best]
    reading = {
        "variant": probes.variant,
        "location": label(cell.location),
        "layer": cell.layer,
        "position": str(cell.position),
        "score_of": score_of,
        "read": read,
        "neutral": decoded(run.corpus.tokenizer, [neutral]),
        "score": ends[0],
        "baseline": ends[1],
        "gap": abs(float(found[:, 0].double().sum()) - (ends[0] - ends[1])),
        "metric": probes.metric,
        "value": quality[probes.metric],
        "low": quality[f"{probes.metric}_low"],
        "high": quality[f"{probes.metric}_high"],
        "documents": int(quality.documents),
    }
    return known, found.cpu().numpy(), reading


def _read(scores: Tensor, classes: Sequence[str]) -> tuple[int | None, str]:
    """The class that is read and its name with its probability, or the number."""
    if not classes:
        return None, number(float(scores[0]))
    chances = scores.softmax(-1)
    best = int(chances.argmax())
    return best, f"{classes[best]}, {float(chances[best]):.1%}"


def _score(
    probe: LinearProbe, classes: Sequence[str], known: int | None
) -> tuple[Callable[[Tensor], Tensor], str]:
    """The score that tokens contribute to, and its name."""
    if known is None:
        return lambda activations: probe.scores(activations)[:, 0], "the number"
    if len(classes) == 2:
        return lambda activations: probe.scores(activations).diff(dim=1)[:, 0], f"log-odds of {classes[1]}"
    return lambda activations: probe.log_probabilities(activations)[
        :, known
    ], f"log-probability of {classes[known]}"
