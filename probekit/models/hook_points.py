"""Hook points: TransformerLens names as inputs or outputs of a plain module, or through the bridge.

A location is a hook name without `blocks.L.`. Any hook that holds a vector for each position can be probed;
the table of standard locations gives some of them a short name and a point in the drawing of a block.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from probekit.errors import ProbekitError
from probekit.models.language_model import main_device

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel


Hook = tuple[str, Callable[..., Tensor | None]]
"""A full TransformerLens hook name, and a function of the activation there; it may return another."""

OUTSIDE_BLOCKS = ("hook_embed", "ln_final.hook_out")
"""Locations that a model has once: before its first block, and after its last."""

TOLERANCE = 1e-3
"""Largest difference between the two backends, as a share of the largest activation."""


def hook_name(location: str, layer: int) -> str:
    """The full TransformerLens hook name of a location at a layer."""
    return location if location in OUTSIDE_BLOCKS else f"blocks.{layer}.{location}"


def layer_of(name: str) -> int | None:
    """The last layer that has to be run for a hook to fire; None where all of the model has to."""
    if name == OUTSIDE_BLOCKS[0]:
        return 0
    first, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else None


def locations(bridged: TransformerBridge) -> dict[str, int]:
    """Every location that holds a vector for each position, and the vector's features.

    Some hooks never fire, some hold attention patterns, some have the heads before the positions. Where there
    is a vector for each position, one more token makes the second axis longer and changes no other. Blocks
    are taken to be like the first.
    """
    short, long = (_shapes(bridged, length) for length in (1, 2))
    return {
        location: math.prod(shape[2:])
        for location, shape in sorted(short.items())
        if (*shape[:2], *long[location]) == (1, 1, 1, 2, *shape[2:])
    }


def _shapes(bridged: TransformerBridge, length: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all that fires in the first block, and around the blocks, over a text of some tokens."""
    prefix = hook_name("", 0)
    tokens = torch.zeros(1, length, dtype=torch.long, device=bridged.original_model.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gated-off hook")
        _, cache = bridged.run_with_cache(
            tokens,
            names_filter=lambda name: name.startswith(prefix) or name in OUTSIDE_BLOCKS,
            output_attentions=False,
        )
    return {
        name.removeprefix(prefix): tuple(value.shape) for name, value in cache.items() if value is not None
    }


def check_location(known: dict[str, int], location: str, setting: str) -> None:
    """Refuses a location that this architecture lacks, or that does not hold a vector for each position.

    Raises:
        ProbekitError: Names the setting, and lists the locations that there are.
    """
    if location not in known:
        raise ProbekitError(
            f"{setting} is {location!r}, where this architecture holds no vector for each position; it "
            f"does at {', '.join(known)}"
        )


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
    """Runs the plain Hugging Face module.

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
            return model(use_cache=False, **self._inputs(tokens, positions)).logits.to(self.device)

    @contextmanager
    def hooked(self, hooks: Sequence[Hook]) -> Iterator[PreTrainedModel]:
        """The plain module, with hooks on it until the block is left; those that read return nothing."""
        with ExitStack() as stack:
            for name, function in hooks:
                stack.callback(self._attach(self.points[name], function).remove)
            yield self.model

    def with_weights(self, model: PreTrainedModel) -> Self:
        """The same for another model of the architecture."""
        return type(self)(model, self.points, self.device)

    def _inputs(self, tokens: Tensor, positions: Tensor | None) -> dict[str, Tensor]:
        device = main_device(self.model)
        inputs = {"input_ids": tokens} | position_arguments(positions)
        return {name: value.to(device) for name, value in inputs.items()}

    def _attach(self, point: ModuleHook, function: Callable[[Tensor], Tensor | None]) -> Any:
        module = self.model.get_submodule(point.module)

        def called(activation: Tensor) -> Tensor | None:
            changed = function(activation.to(self.device))  # layers may be on several devices
            return None if changed is None else changed.to(activation.device)

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
            fwd_hooks=[(name, lambda x, hook, function=function: function(x)) for name, function in hooks],
            stop_at_layer=stop,
            return_type=None,
            **position_arguments(positions),
        )

    def logits(self, tokens: Tensor, hooks: Sequence[Hook], positions: Tensor | None = None) -> Tensor:
        """Next-token logits `[windows, positions, vocabulary]`, with hooks that change activations."""
        with self.bridged.hooks(fwd_hooks=list(hooks)):
            return self.bridged(tokens, return_type="logits", **position_arguments(positions))


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


def find_hook_point(bridged: TransformerBridge, model: PreTrainedModel, name: str) -> ModuleHook | None:
    """Where a hook of the bridge is in the plain module; None where the plain module has no such place.

    Args:
        bridged: The bridge of the LM, or of one with fewer layers: later layers are taken to be like its own.
        model: The LM, not bridged.
        name: The hook's full TransformerLens name.
    """
    *path, hook = name.split(".")
    component: Any = bridged
    modules: list[str] = []
    for part in path:
        if part.isdigit():
            component = component[int(part) % len(component)]
            modules.append(part)
            continue
        wrapped = bridged.adapter.component_mapping.get(part) if component is bridged else None
        component = getattr(component, part, None)
        wrapped = wrapped if wrapped is not None else component
        if component is None or not getattr(wrapped, "name", None):
            return None
        modules += wrapped.name.split(".")
    aliases = (getattr(component, "hook_aliases", None) or {}).get(hook, ())
    for alias in [aliases] if isinstance(aliases, str) else aliases:
        if point := find_hook_point(bridged, model, ".".join([*path, alias])):
            return point
    sides = {"hook_in": True, "hook_out": False}
    known = ".".join(modules) in dict(model.named_modules())
    return ModuleHook(".".join(modules), sides[hook]) if modules and known and hook in sides else None


def forward_pass(bridged: TransformerBridge, model: PreTrainedModel, names: Sequence[str]) -> Backend:
    """The fastest backend that runs some hooks as the bridge does.

    Args:
        bridged: The bridged LM.
        model: The same LM, not bridged.
        names: The hooks' full TransformerLens names.
    """
    found = {name: find_hook_point(bridged, model, name) for name in names}
    points = {name: point for name, point in found.items() if point is not None}
    slow = BridgeBackend(bridged)
    if len(points) < len(found):
        return slow
    fast = HFBackend(model, points)
    tokens = torch.arange(6, device=fast.device).view(3, 2) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        pairs = zip(_probed(fast, tokens, names), _probed(slow, tokens, names), strict=True)
    same = all(_close(seen[name], true[name]) for seen, true in pairs for name in names)
    return fast if same else slow


def _probed(backend: Backend, tokens: Tensor, names: Sequence[str]) -> tuple[dict[str, Tensor], ...]:
    """What hooks see, and what they see when every one of them changes what it saw."""
    seen: tuple[dict[str, Tensor], ...] = ({}, {})

    def look(name: str, activation: Tensor) -> None:
        seen[0][name] = activation.clone()

    def scale(name: str, activation: Tensor) -> Tensor:
        seen[1][name] = activation.clone()
        return 1.1 * activation

    for see in (look, scale):
        hooks = [(name, lambda x, see=see, name=name: see(name, x)) for name in names]
        backend(tokens, hooks, len(names) + 1)
    return seen


def _close(first: Tensor, second: Tensor) -> bool:
    """Whether two activations agree, position by position; heads may be an axis of their own or not."""
    if first.shape[:2] != second.shape[:2]:
        return False
    first, second = (x.reshape(*x.shape[:2], -1) for x in (first, second))
    return first.shape == second.shape and bool(
        (first - second).abs().max() <= TOLERANCE * second.abs().max().clamp(min=1e-6)
    )


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
