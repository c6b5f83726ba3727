"""Hook points: TransformerLens names as inputs or outputs of a plain module, or through the bridge.

A location is a hook name without `blocks.L.`. Any hook that holds a vector for each position can be probed;
the table of standard locations gives some of them a short name and a point in the drawing of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probekit.models.language_model import main_device

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel


Hook = tuple[str, Callable[..., Tensor | None]]
"""A full TransformerLens hook name, and a function of the activation there; it may return another."""

OUTSIDE_BLOCKS = ("hook_embed", "ln_final.hook_out")
"""Locations that a model has once: before its first block, and after its last."""

NORM_IN = "ln_final.hook_in"
"""The output of the last layer, which the final norm reads."""

NORM_OUT = OUTSIDE_BLOCKS[1]
"""The output of the final norm, which the head reads."""

TOLERANCE = 1e-3
"""Largest difference of what is computed in float32 in two ways, as a share of the largest number."""


def tolerance(dtype: torch.dtype) -> float:
    """`TOLERANCE`, or more for weights of half precision, which keep two or three digits."""
    return max(TOLERANCE, 8 * torch.finfo(dtype).eps)


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest number of the second."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def hook_name(location: str, layer: int) -> str:
    """The full TransformerLens hook name of a location at a layer."""
    return location if location in OUTSIDE_BLOCKS else f"blocks.{layer}.{location}"


def layer_of(name: str) -> int | None:
    """The last layer that has to be run for a hook to fire; None where all of the model has to."""
    if name == OUTSIDE_BLOCKS[0]:
        return 0
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else None


@dataclass(frozen=True)
class ModuleHook:
    """A hook point of the plain module.

    Attributes:
        module: Path of a submodule.
        is_input: Whether the hook sees its input, or else its output.
    """

    module: str
    is_input: bool


class HFBackend:
    """Runs the plain Hugging Face module; hooks see float32, whatever the weights are.

    Args:
        model: Frozen and put into evaluation mode.
        points: Where hooks are, by their full TransformerLens names.
        device: Where tokens come from, hooks compute and logits are wanted; unset: where the model is.
    """

    def __init__(
        self, model: PreTrainedModel, points: dict[str, ModuleHook], device: torch.device | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.points = points
        self.device = main_device(model) if device is None else device

    def __call__(
        self, tokens: Tensor, hooks: Sequence[Hook], reads: int, positions: Tensor | None = None
    ) -> None:
        """Runs hooks in their order, and stops once the given number of them has returned nothing.

        Args:
            tokens: `[windows, positions]`.
            hooks: Those that read return nothing, those that change an activation return it.
            reads: How many hooks read; nothing after the last of them is computed.
            positions: The tokens' position ids `[windows, positions]`; unset: 0, 1, 2 and so on.
        """
        left = reads

        def counted(function: Callable[..., Tensor | None]) -> Callable[[Tensor], Tensor | None]:
            def call(activation: Tensor) -> Tensor | None:
                nonlocal left
                changed = function(activation)
                if changed is None:
                    left -= 1
                    if not left:
                        raise _AllReadError
                return changed

            return call

        with self.hooked([(name, counted(function)) for name, function in hooks]), suppress(_AllReadError):
            self.model.base_model(use_cache=False, **self._inputs(tokens, positions))

    def logits(self, tokens: Tensor, hooks: Sequence[Hook], positions: Tensor | None = None) -> Tensor:
        """Next-token logits `[windows, positions, vocabulary]`, with hooks that change activations."""
        with self.hooked(hooks) as model:
            logits = model(use_cache=False, **self._inputs(tokens, positions)).logits
        return in_float32(logits).to(self.device)

    @contextmanager
    def hooked(self, hooks: Sequence[Hook]) -> Iterator[PreTrainedModel]:
        """The plain module, with hooks on it until the block is left; those that read return nothing."""
        with ExitStack() as stack:
            for name, function in hooks:
                stack.callback(self._attach(self.points[name], function).remove)
            yield self.model

    def _inputs(self, tokens: Tensor, positions: Tensor | None) -> dict[str, Tensor]:
        device = main_device(self.model)
        inputs = {"input_ids": tokens} | position_arguments(positions)
        return {name: value.to(device) for name, value in inputs.items()}

    def _attach(self, point: ModuleHook, function: Callable[[Tensor], Tensor | None]) -> Any:
        module = self.model.get_submodule(point.module)

        def called(activation: Tensor) -> Tensor | None:
            changed = function(in_float32(activation).to(self.device))  # layers may be on several devices
            return None if changed is None else changed.to(activation)

        def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            changed = called(inputs[0] if inputs else named["hidden_states"])
            if changed is None:
                return None
            return ((changed, *inputs[1:]), named) if inputs else (inputs, named | {"hidden_states": changed})

        def after(_: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                return called(output)
            changed = called(output[0])
            return None if changed is None else (changed, *output[1:])

        if point.is_input:
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)


class BridgeBackend:
    """Runs the bridge, with the interface of `HFBackend`."""

    def __init__(self, bridged: TransformerBridge) -> None:
        self.bridged = bridged
        self.model: PreTrainedModel = bridged.original_model
        self.device: torch.device = self.model.device

    def __call__(
        self, tokens: Tensor, hooks: Sequence[Hook], reads: int, positions: Tensor | None = None
    ) -> None:
        """Runs hooks as `HFBackend` does; stops after the last layer that a hook is in."""
        layers = [layer_of(name) for name, _ in hooks]
        stop = None if None in layers else max(layer for layer in layers if layer is not None) + 1
        if stop == self.bridged.cfg.n_layers:
            stop = None
        self.bridged.run_with_hooks(
            tokens,
            fwd_hooks=[(name, _called(function)) for name, function in hooks],
            stop_at_layer=stop,
            return_type=None,
            **position_arguments(positions),
        )

    def logits(self, tokens: Tensor, hooks: Sequence[Hook], positions: Tensor | None = None) -> Tensor:
        """Next-token logits `[windows, positions, vocabulary]`, with hooks that change activations."""
        with self.bridged.hooks(fwd_hooks=[(name, _called(function)) for name, function in hooks]):
            return in_float32(self.bridged(tokens, return_type="logits", **position_arguments(positions)))


def _called(function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """A hook of the bridge that calls a function with float32."""

    def call(activation: Tensor, hook: Any) -> Tensor | None:
        changed = function(in_float32(activation))
        return None if changed is None else changed.to(activation)

    return call


def in_float32(values: Tensor) -> Tensor:
    """Activations or logits in float32 where they are of half precision, in which sums lose digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


Backend = HFBackend | BridgeBackend


class _AllReadError(Exception):
    """All that is read has been read."""


def position_arguments(positions: Tensor | None) -> dict[str, Tensor]:
    """Keyword arguments that give an LM the positions of its tokens, if there are any to give."""
    if positions is None:
        return {}
    # Without a mask, Transformers takes two tokens of one position for the end of a text and the next one's
    # beginning, and lets none see across.
    return {"position_ids": positions, "attention_mask": torch.ones_like(positions)}


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
