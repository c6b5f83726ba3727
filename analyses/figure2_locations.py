"""Figure 2: where probes read, in a drawing of one Transformer block; the CSV is the table of locations.

    python analyses/figure2_locations.py
    python analyses/figure2_locations.py --parallel   # attention and MLP side by side, as in GPT-NeoX

After Figure 2 of arXiv 2410.12492. Blocks are drawn with their norms first, and
conditioned at `attn.hook_z`, the default of the adapter.
"""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from shared.drawing import SUM, Box, Drawing, Spot, Wire, draw, empty_figure, frame
from shared.script import run_script, save_figure, script_parser

from probekit.models.locations import BEFORE, label, per_layer

STREAM, BRANCH, MLP_BESIDE, ADAPTER = 0.0, 2.4, -2.9, 6.35
"""Columns of the drawing: x of the residual stream, of the two branches, of the adapter."""
JOINED = 10.6
"""Height at which attention joins the stream again."""

_DOT = "#1f4e79"


class Location(NamedTuple):
    """A marked location: its hook, what it holds, its spot, and whether parallel blocks have it."""

    name: str
    text: str
    point: str
    parallel: bool = True


LOCATIONS = (
    Location(
        "hook_embed",
        "The embedding of the token alone, before position embeddings where the model has them.",
        "embedding",
    ),
    Location("hook_resid_pre", "The residual stream that enters the block.", "block input"),
    Location(
        f"attn.hook_z{BEFORE}",
        "What the attention heads read, side by side, before a conditioned layer adds the action.",
        "heads",
    ),
    Location(
        "attn.hook_z",
        "What the attention heads read, side by side, with the action that a conditioned layer adds.",
        "heads conditioned",
    ),
    Location("hook_attn_out", "What attention adds to the residual stream.", "attention output"),
    Location(
        "hook_resid_mid",
        "The residual stream between attention and MLP; parallel blocks, as GPT-NeoX's, do not have it.",
        "between",
        parallel=False,
    ),
    Location("hook_mlp_out", "What the MLP adds to the residual stream.", "mlp output"),
    Location("hook_resid_post", "The residual stream that leaves the block.", "block output"),
    Location(
        "ln_final.hook_out",
        "What leaves the last layer, normalised, with the norm's gain and bias; the unembedding reads it.",
        "final norm",
    ),
)
"""The standard locations, in the order in which a token passes them."""


def block_figure(*, parallel: bool = False) -> Figure:
    """Draws the block; its text can be read at half the size, the width of a column.

    Args:
        parallel: Draw attention and MLP side by side on the same input, as in GPT-NeoX.
    """
    end = JOINED + (1.15 if parallel else 5.35)
    drawing = _below() + _attention() + (_mlp_beside() if parallel else _mlp_above()) + _above(end)
    left, right, bottom, top = (-5.6 if parallel else -3.3), ADAPTER + 1.8, -0.8, end + 4.0
    figure, axes = empty_figure(left, right, bottom, top)
    frame(axes, (left + 0.15, 2.75), right - left - 0.3, end - 2.75)
    axes.text(right - 0.4, end - 0.45, "every layer", ha="right", va="center", fontsize=13, style="italic")
    axes.text(
        -0.3, 7.3, "residual stream", ha="center", va="center", fontsize=12.5, style="italic", rotation=90
    )
    draw(axes, drawing)
    for number, location in enumerate(LOCATIONS, start=1):
        if location.parallel or not parallel:
            _mark(axes, number, location, drawing.spots[location.point])
    return figure


def _below() -> Drawing:
    """From the tokens to the block's input."""
    return Drawing(
        boxes=(Box((STREAM, 0.6), "token embedding", 3.1), Box((-2.2, 2.1), "positions", 1.9, "optional")),
        wires=(
            Wire(((STREAM, -0.25), (STREAM, 0.24))),
            Wire(((-1.25, 2.1), (-SUM, 2.1)), "optional"),
        ),
        sums=((STREAM, 2.1),),
        spots={
            "embedding": Spot((STREAM, 1.45), "right"),
            "block input": Spot((STREAM, 3.25), "left"),
        },
    )


def _attention() -> Drawing:
    """The attention branch with the adapter."""
    added = 7.3
    return Drawing(
        boxes=(
            Box((BRANCH, 4.35), "norm", 1.5),
            Box((BRANCH, 5.45), "attention heads", 3.1),
            Box((BRANCH, 9.15), "output projection", 3.3),
            Box((ADAPTER, added), "projection", 2.2, "adapter"),
            Box((ADAPTER, 1.6), "action embedding", 3.3, "adapter"),
        ),
        wires=(
            Wire(((STREAM, 3.75), (BRANCH, 3.75), (BRANCH, 3.99))),
            Wire(((BRANCH, 4.71), (BRANCH, 5.09))),
            Wire(((BRANCH, 5.81), (BRANCH, 8.79))),
            Wire(((BRANCH, 9.51), (BRANCH, JOINED), (STREAM + SUM, JOINED))),
            Wire(((ADAPTER - 1.1, added), (BRANCH + SUM, added)), "adapter"),
            Wire(((ADAPTER, 1.96), (ADAPTER, added - 0.36)), "adapter"),
        ),
        sums=((STREAM, JOINED), (BRANCH, added)),
        notes=(
            ((ADAPTER, added + 0.82), "conditioned\nlayers only"),
            ((ADAPTER, 0.7), "of the next token's\nsentence"),
        ),
        spots={
            "heads": Spot((BRANCH, added - 0.95), "right"),
            "heads conditioned": Spot((BRANCH, added + 0.95), "right"),
            "attention output": Spot((BRANCH, 10.03), "right"),
        },
    )


def _mlp_above() -> Drawing:
    """The MLP branch, on what attention left in the stream."""
    low, high = JOINED + 1.1, JOINED + 4.2
    return Drawing(
        boxes=(Box((BRANCH, low + 0.6), "norm", 1.5), Box((BRANCH, low + 1.7), "MLP", 1.9)),
        wires=(
            Wire(((STREAM, low), (BRANCH, low), (BRANCH, low + 0.24))),
            Wire(((BRANCH, low + 0.96), (BRANCH, low + 1.34))),
            Wire(((BRANCH, low + 2.06), (BRANCH, high), (STREAM + SUM, high))),
        ),
        sums=((STREAM, high),),
        spots={
            "between": Spot((STREAM, JOINED + 0.65), "left"),
            "mlp output": Spot((BRANCH, low + 2.56), "right"),
        },
    )


def _mlp_beside() -> Drawing:
    """The MLP branch on the same input as attention, on the other side of the stream."""
    return Drawing(
        boxes=(Box((MLP_BESIDE, 4.35), "norm", 1.5), Box((MLP_BESIDE, 7.3), "MLP", 1.9)),
        wires=(
            Wire(((STREAM, 3.75), (MLP_BESIDE, 3.75), (MLP_BESIDE, 3.99))),
            Wire(((MLP_BESIDE, 4.71), (MLP_BESIDE, 6.94))),
            Wire(((MLP_BESIDE, 7.66), (MLP_BESIDE, JOINED), (STREAM - SUM, JOINED))),
        ),
        spots={"mlp output": Spot((MLP_BESIDE, 10.03), "left")},
    )


def _above(end: float) -> Drawing:
    """From the last sum of the block to the logits; the block ends at a height."""
    return Drawing(
        boxes=(Box((STREAM, end + 0.8), "final norm", 3.1), Box((STREAM, end + 2.5), "unembedding", 3.1)),
        wires=(
            Wire(((STREAM, 0.96), (STREAM, end + 0.44))),
            Wire(((STREAM, end + 1.16), (STREAM, end + 2.14))),
            Wire(((STREAM, end + 2.86), (STREAM, end + 3.4))),
        ),
        notes=(((STREAM, end + 3.65), "next-token logits"), ((STREAM, -0.5), "tokens")),
        spots={
            "block output": Spot((STREAM, end - 0.55), "left"),
            "final norm": Spot((STREAM, end + 1.62), "right"),
        },
    )


def _mark(axes: Axes, number: int, location: Location, spot: Spot) -> None:
    """A numbered dot, and beside it the location's short name over its own."""
    x, y = spot.point
    axes.add_patch(Circle((x, y), 0.25, facecolor=_DOT, edgecolor="white", linewidth=1.0, zorder=5))
    dot = axes.text(x, y - 0.015, str(number), ha="center", va="center", fontsize=11.5, zorder=6)
    dot.set(color="white", weight="bold")
    side, offset = ("left", 0.42) if spot.side == "right" else ("right", -0.42)
    name = axes.text(x + offset, y + 0.02, label(location.name), ha=side, va="bottom", fontsize=13)
    name.set(color=_DOT, weight="bold")
    axes.text(x + offset, y - 0.02, location.name, ha=side, va="top", fontsize=11.5, family="monospace")


def main() -> None:
    """Draws, saves."""
    parser = script_parser(__doc__, "figures/figure2_locations.png")
    parser.add_argument("--parallel", action="store_true", help="draw a block of GPT-NeoX's kind")
    given = parser.parse_args()
    out = given.out
    if given.parallel and out == parser.get_default("out"):
        out = out.with_stem(f"{out.stem}_parallel")
    rows = [
        {
            "number": str(number),
            "location": location.name,
            "label": label(location.name),
            "where": "every layer" if per_layer(location.name) else "once in the model",
            "what": location.text,
        }
        for number, location in enumerate(LOCATIONS, start=1)
        if location.parallel or not given.parallel
    ]
    figure = block_figure(parallel=given.parallel)
    save_figure(figure, pd.DataFrame(rows), out, {"parallel": given.parallel}, [])


if __name__ == "__main__":
    run_script(main)
