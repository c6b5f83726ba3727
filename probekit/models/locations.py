"""Locations: TransformerLens's names of hooks without the layer, and how figures and tables call them.

Any hook that holds a vector for each position can be probed; the table of standard locations gives some of
them a short name and a point in the drawing of a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from probekit.errors import ProbekitError

OUTSIDE_BLOCKS = ("hook_embed", "ln_final.hook_out")
"""Locations that a model has once: before its first block, and after its last."""

NORM_IN = "ln_final.hook_in"
"""The output of the last layer, which the final norm reads."""

NORM_OUT = OUTSIDE_BLOCKS[1]
"""The output of the final norm, which the head reads."""


def hook_name(location: str, layer: int) -> str:
    """The full TransformerLens hook name of a location at a layer."""
    return location if location in OUTSIDE_BLOCKS else f"blocks.{layer}.{location}"


def layer_of(name: str) -> int | None:
    """The last layer that has to be run for a hook to fire; None where all of the model has to."""
    if name == OUTSIDE_BLOCKS[0]:
        return 0
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else None


BEFORE = ":before"
"""Suffix of the conditioned location: the activation as it was before the adapter added the action."""


@dataclass(frozen=True)
class Location:
    """A standard location.

    Attributes:
        name: TransformerLens hook without the block, perhaps with `BEFORE`.
        label: Short name for figures.
        text: What it holds, in one sentence.
        point: Where it is in the drawing of a block.
        parallel: Whether blocks whose attention and MLP read the same input, as GPT-NeoX's, have it.
    """

    name: str
    label: str
    text: str
    point: str
    parallel: bool = True

    @property
    def per_layer(self) -> bool:
        """Whether every layer has it, not the model once."""
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
"""The standard locations by name, in the order in which a token passes them."""


def per_layer(location: str) -> bool:
    """Whether every layer has a location, standard or not, or the model has it once."""
    return location.removesuffix(BEFORE) not in OUTSIDE_BLOCKS


def at_layers(
    locations: Iterable[str], layers: Iterable[int] | None, depth: int, setting: str
) -> list[tuple[str, int]]:
    """Every location at every layer, or at all of an LM's; one outside the blocks at the layer next to it.

    Raises:
        ProbekitError: The LM has no such layer; names the setting.
    """
    chosen = dict.fromkeys(range(depth) if layers is None else layers)
    if missing := [layer for layer in chosen if layer not in range(depth)]:
        raise ProbekitError(f"{setting} has {missing[0]}, but the LM's layers are 0 to {depth - 1}")
    nearest = dict(zip(OUTSIDE_BLOCKS, (0, depth - 1), strict=True))
    return [
        (location, layer)
        for location in dict.fromkeys(locations)
        for layer in (chosen if per_layer(location) else [nearest[location.removesuffix(BEFORE)]])
    ]


def label(location: str) -> str:
    """The short name of a location for figures; a hook that is not in the table keeps its own name."""
    if location in LOCATIONS:
        return LOCATIONS[location].label
    if location.endswith(BEFORE):
        return f"{label(location.removesuffix(BEFORE))}, before"
    return location


def table_rows() -> list[dict[str, str]]:
    """The table in words: number, location, label, how often the model has it, and what it holds."""
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
