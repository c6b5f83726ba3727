"""Locations: TransformerLens's names of hooks without the layer, and what figures and tables call them.

Any hook that holds a vector for each position can be probed; some standard ones have a short name.
"""

from __future__ import annotations

from collections.abc import Iterable

from probekit.errors import ProbekitError

OUTSIDE_BLOCKS = ("hook_embed", "ln_final.hook_out")
"""Locations that a model has once: before its first block, and after its last."""

RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
"""Locations of the residual stream, which the final norm and the head can read (the logit lens)."""

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


LABELS = {
    "hook_embed": "token embedding",
    "hook_resid_pre": "resid pre",
    f"attn.hook_z{BEFORE}": "heads, before",
    "attn.hook_z": "heads",
    "hook_attn_out": "attn out",
    "hook_resid_mid": "resid mid",
    "hook_mlp_out": "mlp out",
    "hook_resid_post": "resid post",
    "ln_final.hook_out": "final norm",
}
"""Short names of the standard locations, in the order in which a token passes them."""


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
    if location in LABELS:
        return LABELS[location]
    if location.endswith(BEFORE):
        return f"{label(location.removesuffix(BEFORE))}, before"
    return location
