"""The fastest way to run an LM with some hooks.

The bridge computes attention maps in every layer so that hooks can see them. Where nobody looks at them, the
plain Hugging Face module with its fused attention kernel computes the same in less time. `forward_pass`
compares the two roads on a few tokens and keeps to the bridge wherever they differ.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeGuard

import torch
from torch import Tensor, nn

from probekit import distributed
from probekit.errors import ProbekitError
from probekit.models.language_model import Hook, allocated, layer_of, shallow, shallow_bridge

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Tap:
    """Where a hook is in the plain module.

    Attributes:
        module: Path of a submodule.
        enters: Whether the hook sees its input, or else its output.
    """

    module: str
    enters: bool


class PlainPass:
    """Runs the plain module; the taps tell where its hooks are."""

    def __init__(self, model: PreTrainedModel, taps: dict[str, Tap]) -> None:
        self._model = model.eval().requires_grad_(False)
        self._taps = taps

    def __call__(
        self, tokens: Tensor, hooks: Sequence[Hook], reads: int, positions: Tensor | None = None
    ) -> None:
        """Runs hooks in their order, and stops once the given number of them has returned nothing.

        Args:
            tokens: `[windows, positions]`.
            hooks: Those that read return nothing, those that change an activation return it.
            reads: How many hooks read; nothing behind the last of them is computed.
            positions: Where the tokens are for the LM, if not one behind the other `[windows, positions]`.
        """
        count = _Countdown(reads)
        counted = [(name, count.counted(function)) for name, function in hooks]
        with self.hooked(counted) as model, suppress(_EnoughError):
            model.base_model(input_ids=tokens, use_cache=False, **placed(positions))

    def logits(self, tokens: Tensor, hooks: Sequence[Hook], positions: Tensor | None = None) -> Tensor:
        """Next-token logits `[windows, positions, vocabulary]`, with hooks that change activations."""
        with self.hooked(hooks) as model:
            return model(input_ids=tokens, use_cache=False, **placed(positions)).logits

    @contextmanager
    def hooked(self, hooks: Sequence[Hook]) -> Iterator[PreTrainedModel]:
        """The plain module, with hooks on it until the block is left; those that read return nothing."""
        with ExitStack() as stack:
            for name, function in hooks:
                stack.callback(self._attach(self._taps[name], function).remove)
            yield self._model

    @property
    def device(self) -> torch.device:
        """Where the plain module is."""
        return self._model.device

    def with_weights(self, model: PreTrainedModel) -> Self:
        """The same for another model of the architecture."""
        return type(self)(model, self._taps)

    def _attach(self, tap: Tap, function: Callable[[Tensor], Tensor | None]) -> Any:
        module = self._model.get_submodule(tap.module)

        def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if inputs:
                changed = function(inputs[0])
                return None if changed is None else ((changed, *inputs[1:]), named)
            changed = function(named["hidden_states"])
            return None if changed is None else (inputs, named | {"hidden_states": changed})

        def after(_: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                return function(output)
            changed = function(output[0])
            return None if changed is None else (changed, *output[1:])

        if tap.enters:
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)


def find_tap(bridged: TransformerBridge, model: PreTrainedModel, name: str) -> Tap | None:
    """Where a hook of the bridge is in the plain module; None where the plain module has no such place."""
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
        if component is None or not getattr(wrapped, "name", None):
            return None
        modules += wrapped.name.split(".")
    aliases = (getattr(component, "hook_aliases", None) or {}).get(hook, ())
    for alias in [aliases] if isinstance(aliases, str) else aliases:
        if tap := find_tap(bridged, model, ".".join([*path, alias])):
            return tap
    sides = {"hook_in": True, "hook_out": False}
    known = ".".join(modules) in dict(model.named_modules())
    return Tap(".".join(modules), sides[hook]) if modules and known and hook in sides else None


def placed(positions: Tensor | None) -> dict[str, Tensor]:
    """What tells the LM where tokens are, for a call of its module."""
    if positions is None:
        return {}
    # Without a mask, Transformers takes two tokens of one position for the end of a text and the next one's
    # beginning, and lets none see across.
    return {"position_ids": positions, "attention_mask": torch.ones_like(positions)}


class _EnoughError(Exception):
    """All that is read has been read."""


class _Countdown:
    def __init__(self, reads: int) -> None:
        self._left = reads

    def counted(self, function: Callable[..., Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        def call(activation: Tensor) -> Tensor | None:
            changed = function(activation)
            if changed is None:
                self._left -= 1
                if not self._left:
                    raise _EnoughError
            return changed

        return call


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Shards an LM in place, block by block; all processes call this together.

    Gradients are summed over processes, as those of weights that are not sharded are.

    Args:
        model: On the CPU in the first process, whose weights are taken; without weights in the others.
        device: Where this process computes.

    Raises:
        ProbekitError: The weights are not those that the others expect by the LM's configuration.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import distribute_tensor

    if not distributed.is_first():
        model = allocated(model)
    _check_alike(model, device)
    # Detached, they stay on the CPU when the model is moved.
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
    mesh = distributed.mesh()
    for module in [*(blocks_of(model) or {}).values(), model]:
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The first process scatters what it has.
            parameter.copy_(distribute_tensor(whole.pop(name).to(device), mesh, parameter.placements))
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, 0)
    return model


def _check_alike(model: PreTrainedModel, device: torch.device) -> None:
    """Refuses to scatter weights to processes that expect others, such as a head of its own or none."""
    shapes = [(name, *parameter.shape) for name, parameter in model.named_parameters()]
    digest = zlib.crc32(repr(shapes).encode())
    if distributed.total(digest, device) != distributed.count() * digest:
        raise ProbekitError(
            f"lm.sharded is true, but the weights of {type(model).__name__} are not those that its "
            "config.json tells of; load it and save it again (save_pretrained), or give lm.sharded false"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are sharded."""
    return any(is_shard(parameter) for parameter in model.parameters())


def is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a process holds a part of a tensor alone."""
    return hasattr(tensor, "full_tensor")


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the first process, and none on the others; all call this together."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        whole = tensor.full_tensor().cpu() if is_shard(tensor) else tensor
        if distributed.is_first():
            found[name] = whole
    return found


def sharded_like(whole: Tensor, own: Tensor) -> Tensor:
    """This process's part of a tensor that every process has whole, where another one is sharded."""
    if not is_shard(own):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def blocks_of(model: PreTrainedModel) -> dict[str, nn.Module] | None:
    """An LM's blocks by path, in their order; None where it does not list them in one place."""
    depth = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return {f"{path}.{number}": block for number, block in enumerate(module)}
    return None


class ShardedPass(PlainPass):
    """Runs a sharded LM; a process that has nothing to run any more keeps up with those that have."""

    def __call__(
        self, tokens: Tensor, hooks: Sequence[Hook], reads: int, positions: Tensor | None = None
    ) -> None:
        """Runs hooks as `PlainPass` does, but always the whole LM: others wait for its last blocks."""
        distributed.total(1.0, self.device)
        self._run(tokens, hooks, positions)

    def keep_up(self) -> None:
        """Goes along with calls that other processes make; every process calls this behind its own last."""
        nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            while distributed.total(0.0, self.device):
                self._run(nothing, [])

    def _run(self, tokens: Tensor, hooks: Sequence[Hook], positions: Tensor | None = None) -> None:
        head = self._model.get_output_embeddings()
        # Nobody asked for logits, which can be larger than all activations.
        one = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :1],))
        try:
            self.logits(tokens, hooks, positions)
        finally:
            one.remove()


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
    if not missing and distributed.is_first():
        like = shallow(model.config)
        layers = like.config.get_text_config().num_hidden_layers
        like_names = list(dict.fromkeys(_in_layers(name, layers) for name in names))
        if not isinstance(forward_pass(shallow_bridge(bridged), like, like_names), PlainPass):
            missing = like_names
    if distributed.total(len(missing), model.device):
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
