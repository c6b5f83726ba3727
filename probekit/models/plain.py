"""Forward passes of the plain Hugging Face module, with its fast attention, that hooks read and change.

A TransformerLens hook name is looked up as a module's input or output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from probekit.models.language_model import Hook

if TYPE_CHECKING:
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
