"""Backends: an LM that runs with hooks, as the plain Hugging Face module or bridged to TransformerLens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probekit.models.language_model import main_device
from probekit.models.locations import layer_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

Hook = tuple[str, Callable[..., Tensor | None]]
"""A full TransformerLens hook name, and a function of the activation there; it may return another."""

TOLERANCE = 1e-3
"""Largest difference of what is computed in float32 in two ways, as a share of the largest number."""


def tolerance(dtype: torch.dtype) -> float:
    """`TOLERANCE`, or more for weights of half precision, which keep two or three digits."""
    return max(TOLERANCE, 8 * torch.finfo(dtype).eps)


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest number of the second."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


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
        self,
        tokens: Tensor,
        hooks: Sequence[Hook],
        reads: int,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Runs hooks in their order, and stops once the given number of them has returned nothing.

        Args:
            tokens: `[windows, positions]`.
            hooks: Those that read return nothing, those that change an activation return it.
            reads: How many hooks read; nothing after the last of them is computed.
            positions: The tokens' position ids `[windows, positions]`; unset: 0, 1, 2 and so on.
            mask: Which tokens a bidirectional LM reads `[windows, positions]`: all but the padding.
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
            self.model.base_model(use_cache=False, **self._inputs(tokens, positions, mask))

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

    def _inputs(
        self, tokens: Tensor, positions: Tensor | None, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        device = main_device(self.model)
        inputs = {"input_ids": tokens} | position_arguments(positions, mask)
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
        self,
        tokens: Tensor,
        hooks: Sequence[Hook],
        reads: int,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
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
            **position_arguments(positions, mask),
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


def position_arguments(positions: Tensor | None, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Keyword arguments that give an LM the positions of its tokens, or the mask of a bidirectional one."""
    if mask is not None:
        return {"attention_mask": mask.long()}
    if positions is None:
        return {}
    # Without a mask, Transformers takes two tokens of one position for the end of a text and the next one's
    # beginning, and lets none see across.
    return {"position_ids": positions, "attention_mask": torch.ones_like(positions)}
