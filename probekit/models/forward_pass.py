"""The fastest way to run an LM with some hooks.

The bridge computes attention maps in every layer so that hooks can see them. Where nobody looks at them, the
plain Hugging Face module with its fused attention kernel computes the same in less time. `forward_pass`
compares the two roads on a few tokens and keeps to the bridge wherever they differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probekit import processes
from probekit.errors import ProbekitError
from probekit.models.language_model import Hook, layer_of, shallow, shallow_bridge
from probekit.models.plain import PlainPass, Tap, find_tap, placed
from probekit.models.sharded import ShardedPass, is_sharded

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

TOLERANCE = 1e-3
"""Largest difference between the two roads, as a share of the largest activation."""


class BridgedPass:
    """Runs the bridge, which has every hook there is."""

    def __init__(self, bridged: TransformerBridge) -> None:
        self._bridged = bridged

    def __call__(
        self, tokens: Tensor, hooks: Sequence[Hook], reads: int, positions: Tensor | None = None
    ) -> None:
        """Runs hooks as `PlainPass` does; stops behind the last layer that a hook is in."""
        layers = [layer_of(name) for name, _ in hooks]
        stop = None if None in layers else max(layer for layer in layers if layer is not None) + 1
        if stop == self._bridged.cfg.n_layers:
            stop = None
        self._bridged.run_with_hooks(
            tokens,
            fwd_hooks=[(name, lambda x, hook, function=function: function(x)) for name, function in hooks],
            stop_at_layer=stop,
            return_type=None,
            **placed(positions),
        )

    def logits(self, tokens: Tensor, hooks: Sequence[Hook], positions: Tensor | None = None) -> Tensor:
        """Next-token logits, as `PlainPass` has them."""
        with self._bridged.hooks(fwd_hooks=list(hooks)):
            return self._bridged(tokens, return_type="logits", **placed(positions))


ForwardPass = PlainPass | BridgedPass


def forward_pass(bridged: TransformerBridge, model: PreTrainedModel, names: Sequence[str]) -> ForwardPass:
    """The fastest way to run some hooks.

    Args:
        bridged: The bridged LM.
        model: The same LM, not bridged.
        names: The hooks' full TransformerLens names.

    Raises:
        ProbekitError: The LM is sharded, and only the bridge has one of the hooks.
    """
    found = {name: find_tap(bridged, model, name) for name in names}
    taps = {name: tap for name, tap in found.items() if tap is not None}
    if is_sharded(model):
        return _sharded_pass(bridged, model, taps, names)
    slow = BridgedPass(bridged)
    if len(taps) < len(found):
        return slow
    fast = PlainPass(model, taps)
    device = next(model.parameters()).device
    tokens = torch.arange(6, device=device).view(3, 2) % model.config.get_text_config().vocab_size
    with torch.no_grad():
        (plain, changed), (true, truly_changed) = (_probed(road, tokens, names) for road in (fast, slow))
    same = all(
        _close(plain[name], true[name]) and _close(changed[name], truly_changed[name]) for name in names
    )
    return fast if same else slow


def _sharded_pass(
    bridged: TransformerBridge, model: PreTrainedModel, taps: dict[str, Tap], names: Sequence[str]
) -> ShardedPass:
    """The only way to run a sharded LM; its hooks are compared on a shallow LM of the architecture."""
    missing = [name for name in names if name not in taps]
    if not missing and processes.is_first():
        like = shallow(model.config)
        layers = like.config.get_text_config().num_hidden_layers
        like_names = list(dict.fromkeys(_in_layers(name, layers) for name in names))
        if not isinstance(forward_pass(shallow_bridge(bridged), like, like_names), PlainPass):
            missing = like_names
    if processes.total(len(missing), model.device):
        raise ProbekitError(
            f"lm.sharded is true, but only TransformerLens has all of {', '.join(missing or names)}, and it "
            "takes an LM that is not sharded; choose other locations (conditioning.location, "
            "probe.locations), or give lm.sharded false"
        )
    return ShardedPass(model, taps)


def _in_layers(name: str, layers: int) -> str:
    """The hook in the layer of a shallow LM that stands for its own."""
    layer = layer_of(name) if name.startswith("blocks.") else None
    return name if layer is None else name.replace(f".{layer}.", f".{layer % layers}.", 1)


def _probed(
    road: ForwardPass, tokens: Tensor, names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What hooks see, and what they see when every one of them changes what it saw."""
    seen: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def look(name: str, activation: Tensor) -> None:
        seen[0][name] = activation.clone()

    def bend(name: str, activation: Tensor) -> Tensor:
        seen[1][name] = activation.clone()
        return 1.1 * activation

    for see in (look, bend):
        hooks = [(name, lambda x, see=see, name=name: see(name, x)) for name in names]
        road(tokens, hooks, len(names) + 1)
    return seen


def _close(first: Tensor, second: Tensor) -> bool:
    """Whether two activations are alike, position by position; heads may be an axis of their own or not."""
    if first.shape[:2] != second.shape[:2]:
        return False
    first, second = (x.reshape(*x.shape[:2], -1) for x in (first, second))
    return first.shape == second.shape and bool(
        (first - second).abs().max() <= TOLERANCE * second.abs().max().clamp(min=1e-6)
    )
