"""The standard places of a Transformer that probes read: one table for settings, figures and the README.

A location is a TransformerLens hook name without `blocks.L.`. Any hook that holds a vector for each position
can be probed; those of the table have a short name, and a place in the drawing (`reports/block_diagram.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from probekit.models.language_model import OUTSIDE_BLOCKS

BEFORE = ":before"
"""Put behind the conditioned location: the activation as it was before the adapter added the action."""

Point = Literal[
    "embedding",
    "block input",
    "heads",
    "heads conditioned",
    "attention output",
    "between",
    "mlp output",
    "block output",
    "final norm",
]
"""Where a location is in the drawing; the drawings say where on the paper that is."""


@dataclass(frozen=True)
class Location:
    """A standard place.

    Attributes:
        name: TransformerLens hook without the block, or with `BEFORE`.
        label: Short name for figures.
        text: What is there, in one sentence.
        point: Where it is in the drawing.
        parallel: Whether blocks have it whose attention and MLP read the same input, as GPT-NeoX's do.
    """

    name: str
    label: str
    text: str
    point: Point
    parallel: bool = True

    @property
    def per_layer(self) -> bool:
        """Whether every layer has it, or the model has it once."""
        return per_layer(self.name)


_TABLE = (
    Location(
        "hook_embed",
        "token embedding",
        "The embedding of the token alone, before position embeddings where the model has them.",
        "embedding",
    ),
    Location("hook_resid_pre", "resid pre", "The residual stream that enters the block.", "block input"),
    Location(
        "attn.hook_z" + BEFORE,
        "heads, before",
        "What the attention heads read, side by side, before a conditioned layer adds the action.",
        "heads",
    ),
    Location(
        "attn.hook_z",
        "heads",
        "What the attention heads read, side by side, with the action that a conditioned layer adds.",
        "heads conditioned",
    ),
    Location("hook_attn_out", "attn out", "What attention adds to the residual stream.", "attention output"),
    Location(
        "hook_resid_mid",
        "resid mid",
        "The residual stream between attention and MLP; parallel blocks, as GPT-NeoX's, do not have it.",
        "between",
        parallel=False,
    ),
    Location("hook_mlp_out", "mlp out", "What the MLP adds to the residual stream.", "mlp output"),
    Location("hook_resid_post", "resid post", "The residual stream that leaves the block.", "block output"),
    Location(
        "ln_final.hook_out",
        "final norm",
        "What leaves the last layer, normalised, with the norm's gain and bias; the unembedding reads it.",
        "final norm",
    ),
)

LOCATIONS: dict[str, Location] = {location.name: location for location in _TABLE}
"""The standard places by name, in the order in which a token passes them."""


def per_layer(location: str) -> bool:
    """Whether a location, standard or not, is in every layer, or once in the model."""
    return location.removesuffix(BEFORE) not in OUTSIDE_BLOCKS


def label(location: str) -> str:
    """The short name of a location for figures; a hook that is not in the table goes by its own name."""
    if location in LOCATIONS:
        return LOCATIONS[location].label
    if location.endswith(BEFORE):
        return f"{label(location.removesuffix(BEFORE))}, before"
    return location


def table_rows() -> list[dict[str, str]]:
    """The table in words: number, location, label, how often the model has it, and what is there."""
    return [
        {
            "number": str(number),
            "location": location.name,
            "label": location.label,
            "where": "every layer" if location.per_layer else "once in the model",
            "what": location.text,
        }
        for number, location in enumerate(LOCATIONS.values(), start=1)
    ]
