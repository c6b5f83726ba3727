"""The hook points of an architecture, found and checked once on a shallow LM with random weights.

A location is TransformerLens's name of a hook without its layer. Where the plain Hugging Face module holds
the same at the input or output of a submodule, the plain module is run: it is faster than the bridge.
Whether it does is measured, not taken from names. On an LM of the same architecture with one layer of every
kind, in float32, both are compared in what they read and in what a change does to the logits. There it is
also checked that what attention and MLP are said to add to the residual stream adds up to it.
"""

from __future__ import annotations

import copy
import gc
import inspect
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.models.backends import TOLERANCE, Backend, BridgeBackend, HFBackend, ModuleHook, apart
from probekit.models.bidirectional import is_bidirectional
from probekit.models.language_model import bridge, layers_like, shallow, shown_error
from probekit.models.locations import NORM_IN, OUTSIDE_BLOCKS, hook_name, layer_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


LAYER = "{layer}"
"""Stands for the number of a layer in the path of a module."""

SAME_PLACE = 0.25
"""Takes the place of `TOLERANCE` where TransformerLens computes other numbers than the LM: two activations
that differ by less of the largest number are of one place; those of two places differ by about all of it."""


NORMALISED = {
    location: f"every sum is normalised, and no residual stream runs on beside it; give {instead}"
    for location, instead in {
        "hook_attn_out": "attn.o.hook_out",
        "hook_resid_mid": "ln1.hook_out",
        "hook_mlp_out": "mlp.out.hook_out",
    }.items()
}
"""What bidirectional LMs do not have, and what to read in its place."""


@dataclass(frozen=True)
class Architecture:
    """The hook points of an architecture.

    Attributes:
        name: The class of the Hugging Face module.
        takes_positions: Whether the positions of tokens can be given.
        locations: Locations that hold a vector for each position in every layer, and its features.
        refused: Other locations that hold vectors, and why they cannot be read.
        modules: Where the plain module has a hook, by full names of hooks of the shallow LM.
        like: For every layer of the LM the layer of the shallow one that is of its kind.
        note: What the user should know: that TransformerLens computes other numbers than the LM.
    """

    name: str
    takes_positions: bool
    locations: dict[str, int]
    refused: dict[str, str]
    modules: dict[str, ModuleHook]
    like: tuple[int, ...]
    note: str | None = None

    def check(self, location: str, setting: str) -> None:
        """Refuses a location that does not hold a vector for each position, or not what it is called.

        Raises:
            ProbekitError: Names the setting, and says why or lists the locations that there are.
        """
        if location in self.refused:
            raise ProbekitError(f"{setting} is {location!r}: in {self.name}, {self.refused[location]}")
        if location not in self.locations:
            raise ProbekitError(
                f"{setting} is {location!r}, where {self.name} holds no vector for each position; it does at "
                f"{', '.join(self.locations)}"
            )

    def points(self, names: Sequence[str]) -> dict[str, ModuleHook] | None:
        """Where the plain module has hooks, by their full names; None where only TransformerLens has all."""
        found: dict[str, ModuleHook] = {}
        for name in names:
            layer = layer_of(name) if name.startswith("blocks.") else None
            known = name if layer is None else name.replace(f".{layer}.", f".{self.like[layer]}.", 1)
            if known not in self.modules:
                return None
            module = self.modules[known]
            found[name] = ModuleHook(module.module.replace(LAYER, str(layer)), module.is_input)
        return found


OF_FILES = {"_name_or_path", "dtype", "transformers_version"}
"""Of a configuration, what says where and how weights are kept, not what the LM computes."""

_EXAMINED: dict[tuple[type, str], Architecture] = {}
"""What was found, by the class and the values of a configuration."""


def architecture_of(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str | Path
) -> Architecture:
    """`examine`, once for each architecture that a process reads; arguments and errors are those of it."""
    if not type(config).__module__.startswith("transformers."):  # code that may change beside its settings
        return examine(config, tokenizer, name)
    described = {key: value for key, value in config.to_dict().items() if key not in OF_FILES}
    key = type(config), json.dumps(described, sort_keys=True, default=str)
    if key not in _EXAMINED:
        _EXAMINED[key] = examine(config, tokenizer, name)
    return _EXAMINED[key]


def examine(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str | Path) -> Architecture:
    """Finds and checks the hook points of an architecture.

    Args:
        config: The LM's.
        tokenizer: The LM's; nothing is read with it.
        name: What the LM is called in messages.

    Raises:
        ProbekitError: It is neither causal nor a bidirectional LM that is known, or TransformerLens has no
            bridge for it.
    """
    try:
        return _examine_small(config, tokenizer, name)
    finally:
        gc.collect()  # a bridge refers to itself, and would keep its weights beside those of the LM


def _examine_small(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str | Path
) -> Architecture:
    plain = small_lm(config, name)
    with _refusing(name, f"TransformerLens bridges {_architecture(config)}, but cannot run it"):
        slow = BridgeBackend(bridge(copy.deepcopy(plain), tokenizer, name))
        return _examined(plain, slow, layers_like(config))


def small_lm(config: PreTrainedConfig, name: str | Path) -> PreTrainedModel:
    """A small LM of an architecture, with random weights (`shallow`), which is causal or known not to be.

    Args:
        config: The LM's.
        name: What the LM is called in messages.

    Raises:
        ProbekitError: It cannot be run, or is neither.
    """
    with _refusing(name, f"a small {_architecture(config)} cannot be run"):
        plain = shallow(config)
        if is_bidirectional(config):
            return plain
        # ELECTRA, for one, loads as a causal LM and reads the tokens that it should predict.
        with torch.no_grad():
            one, other = plain(torch.tensor([[1, 1], [1, 2]])).logits[:, 0]
        if (one - other).abs().max() > 1e-4 * one.abs().max():
            raise ProbekitError(
                f"lm.name {str(name)!r}: {type(plain).__name__} reads the tokens that it should predict; "
                "give a causal LM"
            )
    return plain


def _architecture(config: PreTrainedConfig) -> str:
    return (config.architectures or [type(config).__name__])[0]


@contextmanager
def _refusing(name: str | Path, why: str) -> Iterator[None]:
    """An architecture's own code, or TransformerLens's for it, may raise anything."""
    try:
        yield
    except ProbekitError:
        raise
    except Exception as error:
        raise ProbekitError(f"lm.name {str(name)!r}: {why} ({shown_error(error)})") from error


def _examined(plain: PreTrainedModel, slow: BridgeBackend, like: tuple[int, ...]) -> Architecture:
    depth = plain.config.get_text_config().num_hidden_layers
    widths = _vectors(slow.bridged)
    locations, refused = _in_every_layer(widths, depth)
    candidates = {
        hook: found for hook in [*widths, NORM_IN] if (found := find_module(slow.bridged, plain, hook))
    }
    seen = _read(slow, [*candidates, *(hook for hook in widths if hook not in candidates)])
    own, other = _logits(HFBackend(plain, {}), []), _logits(slow, [])
    faithful, note, allowed = _close(other, own), None, TOLERANCE
    if not faithful:
        allowed = SAME_PLACE
        note = (
            f"TransformerLens computes other logits than {type(plain).__name__} itself (they differ by "
            f"{apart(other, own):.1%} of the largest): only what the LM's own modules hold is read"
        )
    agreeing = _agreeing(plain, candidates, seen, allowed)
    groups = [[NORM_IN], *(_hooks_at(location, depth) for location in locations)]
    groups = [hooks for hooks in groups if agreeing.issuperset(hooks)]
    modules = {hook: candidates[hook] for group in groups for hook in group}
    for hook in _other_effects(slow, HFBackend(plain, modules), groups, allowed):
        del modules[hook]
    missing = [location for location in locations if not modules.keys() >= {*_hooks_at(location, depth)}]
    if not faithful:
        seen = _read(HFBackend(plain, modules), [*modules])
        refused |= dict.fromkeys(
            missing, "TransformerLens computes other logits, and the plain module has no such place"
        )
    if is_bidirectional(plain.config):
        refused |= dict.fromkeys(missing, "no module of the LM holds it") | NORMALISED
    else:
        for layer in range(depth):
            refused |= broken_sums({location: seen.get(hook_name(location, layer)) for location in locations})
    return Architecture(
        type(plain).__name__,
        "position_ids" in inspect.signature(plain.forward).parameters,
        {location: width for location, width in locations.items() if location not in refused},
        refused,
        {
            hook: ModuleHook(_without_layer(module.module, hook), module.is_input)
            for hook, module in modules.items()
        },
        tuple(min(layer, depth - 1) for layer in like),
        note,
    )


def find_module(bridged: TransformerBridge, model: PreTrainedModel, name: str) -> ModuleHook | None:
    """Where a hook of the bridge may be in the plain module; None where the plain module has no such place.

    Args:
        bridged: The bridge of the LM.
        model: The LM, not bridged.
        name: The hook's full TransformerLens name.
    """
    *path, hook = name.split(".")
    component: Any = bridged
    modules: list[str] = []
    for part in path:
        if part.isdigit():
            component = component[int(part)]
            modules.append(part)
            continue
        wrapped = bridged.adapter.component_mapping.get(part) if component is bridged else None
        component = getattr(component, part, None)
        wrapped = wrapped if wrapped is not None else component
        if component is None:
            return None
        if own := getattr(wrapped, "name", None):  # without one, its modules are those of the layer itself
            modules += own.split(".")
    aliases = (getattr(component, "hook_aliases", None) or {}).get(hook, ())
    for alias in [aliases] if isinstance(aliases, str) else aliases:
        if point := find_module(bridged, model, ".".join([*path, alias])):
            return point
    sides = {"hook_in": True, "hook_out": False}
    known = ".".join(modules) in dict(model.named_modules())
    return ModuleHook(".".join(modules), sides[hook]) if modules and known and hook in sides else None


def broken_sums(seen: Mapping[str, Tensor | None]) -> dict[str, str]:
    """Locations of one layer that do not hold what is added to the residual stream, and why.

    Args:
        seen: Activations by location; those that the architecture lacks are missing or None. Blocks whose
            attention and MLP read the same have no `hook_resid_mid`.
    """
    pre, attention, middle, mlp, post = (
        seen.get(f"hook_{name}") for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    )
    parts: list[tuple[Tensor | None, dict[str, Tensor | None], Tensor | None]]
    if middle is not None:
        parts = [(pre, {"hook_attn_out": attention}, middle), (middle, {"hook_mlp_out": mlp}, post)]
        totals = [("hook_resid_pre", "hook_resid_mid"), ("hook_resid_mid", "hook_resid_post")]
    else:
        parts = [(pre, {"hook_attn_out": attention, "hook_mlp_out": mlp}, post)]
        totals = [("hook_resid_pre", "hook_resid_post")]
    broken: dict[str, str] = {}
    for (before, added, after), (first, last) in zip(parts, totals, strict=True):
        there = {name: value for name, value in added.items() if value is not None}
        if not there:
            continue
        reason = f"there is no {first if before is None else last}"
        if before is not None and after is not None:
            if _close(torch.stack([*there.values()]).sum(dim=0), after - before):
                continue
            reason = f"{' + '.join([first, *there])} is not {last}"
        broken |= dict.fromkeys(there, f"it is not what is added to the residual stream: {reason}")
    return broken


def _hooks_at(location: str, depth: int) -> list[str]:
    """Full names of the hooks at a location, in all layers or once."""
    return [*dict.fromkeys(hook_name(location, layer) for layer in range(depth))]


def _without_layer(path: str, hook: str) -> str:
    """The path of a module with `LAYER` in place of its layer's number."""
    if not hook.startswith("blocks."):
        return path
    return ".".join(LAYER if part.isdigit() else part for part in path.split("."))


def _in_every_layer(widths: Mapping[str, int], depth: int) -> tuple[dict[str, int], dict[str, str]]:
    """Locations that all layers have with the same number of features, and those that only some have."""
    locations: dict[str, int] = {}
    refused: dict[str, str] = {}
    for hook, width in sorted(widths.items()):
        layer = layer_of(hook) if hook.startswith("blocks.") else None
        location = hook if layer is None else hook.removeprefix(hook_name("", layer))
        if {widths.get(each) for each in _hooks_at(location, depth)} == {width}:
            locations[location] = width
        else:
            refused[location] = "only some layers hold it, or not all the same number of features"
    return locations, refused


def _vectors(bridged: TransformerBridge) -> dict[str, int]:
    """Features of every hook, by its full name, that holds a vector for each position.

    Some hooks never fire, some hold attention patterns, some have the heads before the positions. Where there
    is a vector for each position, one more token makes the second axis longer and changes no other.
    """
    short, long = (_shapes(bridged, length) for length in (1, 2))
    return {
        hook: math.prod(shape[2:])
        for hook, shape in short.items()
        if (*shape[:2], *long.get(hook, ())) == (2, 1, 2, 2, *shape[2:])
    }


def _shapes(bridged: TransformerBridge, length: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all that fires in and around the blocks, over two texts of some tokens."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gated-off hook")
        _, cache = bridged.run_with_cache(
            torch.ones(2, length, dtype=torch.long),
            names_filter=lambda name: name.startswith("blocks.") or name in OUTSIDE_BLOCKS,
            output_attentions=False,
        )
    return {name: tuple(value.shape) for name, value in cache.items() if isinstance(value, Tensor)}


def _agreeing(
    plain: PreTrainedModel, modules: Mapping[str, ModuleHook], seen: Mapping[str, Tensor], allowed: float
) -> set[str]:
    """Those of some hooks at which the plain module sees what the bridge has seen."""
    found = _read(HFBackend(plain, dict(modules)), [*modules])
    return {hook for hook, value in found.items() if hook in seen and _close(value, seen[hook], allowed)}


def _other_effects(slow: Backend, fast: Backend, groups: Sequence[Sequence[str]], allowed: float) -> set[str]:
    """The hooks of all groups in which a change of all activations has other logits in one backend.

    One text is read as often as there are groups, and a group's hooks change those of one row alone.
    """
    tokens = _tokens(slow)[:1].expand(len(groups), -1)

    def scaling(row: int) -> Callable[[Tensor], Tensor]:
        def scale(activation: Tensor) -> Tensor:
            factors = torch.ones(len(activation)).index_fill(0, torch.tensor(row), 1.1)
            return activation * factors.view(-1, *[1] * (activation.dim() - 1))

        return scale

    hooks = [(hook, scaling(row)) for row, group in enumerate(groups) for hook in group]
    with torch.no_grad():
        found, expected = (backend.logits(tokens, hooks) for backend in (fast, slow))
        if allowed > TOLERANCE:  # of backends that differ anyway, what the change adds is compared
            found -= fast.logits(tokens, [])
            expected -= slow.logits(tokens, [])
    rows = zip(groups, found, expected, strict=True)
    return {hook for group, one, other in rows if not _close(one, other, allowed) for hook in group}


def _tokens(backend: Backend) -> Tensor:
    rows = backend.model.config.get_text_config().vocab_size
    return 1 + torch.arange(15).view(3, 5) % (rows - 1)


@torch.no_grad()
def _logits(backend: Backend, hooks: Sequence[tuple[str, Callable[..., Tensor | None]]]) -> Tensor:
    return backend.logits(_tokens(backend), hooks)


@torch.no_grad()
def _read(backend: Backend, names: Sequence[str]) -> dict[str, Tensor]:
    """What hooks see `[windows, positions, features]`; those that never fire are missing."""
    if not names:
        return {}
    seen: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[..., None]:
        def read(activation: Tensor) -> None:
            if activation.dim() > 2:
                seen.setdefault(name, activation.flatten(2).clone())

        return read

    backend(_tokens(backend), [(name, reader(name)) for name in names], len(names) + 1)
    return seen


def _close(first: Tensor, second: Tensor, allowed: float = TOLERANCE) -> bool:
    """Whether two activations agree, position by position."""
    return first.shape == second.shape and apart(first, second) <= allowed
