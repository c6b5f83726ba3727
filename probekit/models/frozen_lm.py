"""A frozen LM that is run with hooks, with one copy of its weights: a plain module, or bridged."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from probekit.errors import ProbekitError
from probekit.models.backends import Backend, BridgeBackend, HFBackend, apart, tolerance
from probekit.models.hook_points import Architecture, architecture_of
from probekit.models.language_model import bridge

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class FrozenLM:
    """A frozen LM, whose weights are loaded when they are first needed.

    Args:
        load: Makes a fresh plain one, on its device or placed by accelerate.
        config: The LM's.
        tokenizer: The LM's.
        name: What it is called in messages.
        like: An LM of the same architecture, whose hook points are known already.
        device: Where tokens come from and hooks compute, if accelerate places the LM; unset: it does not.
        sample: Some text `[1, positions]`, on which a bridge is compared with the LM; unset: it is not.
    """

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        config: PreTrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        name: str | Path,
        like: FrozenLM | None = None,
        device: torch.device | None = None,
        sample: torch.Tensor | None = None,
    ) -> None:
        self._load, self._config, self._tokenizer, self._name = load, config, tokenizer, name
        self._like, self._device, self._sample = like, device, sample

    @cached_property
    def plain(self) -> PreTrainedModel:
        """The plain Hugging Face module."""
        return self._load().eval().requires_grad_(False)

    @cached_property
    def bridged(self) -> TransformerBridge:
        """The LM bridged to TransformerLens, which rewires a module in place: with weights of its own.

        Raises:
            ProbekitError: TransformerLens has no bridge for this architecture, or computes other logits there
                than the LM itself, or accelerate placed the LM.
        """
        if self._device is not None:
            raise ProbekitError(
                "lm.device_map is set, but TransformerLens takes no LM that accelerate placed; leave it unset"
            )
        model = self._load().eval().requires_grad_(False)
        if self._sample is None:
            return bridge(model, self._tokenizer, self._name)
        tokens = self._sample.to(model.device)
        with torch.no_grad():
            own = HFBackend(model, {}).logits(tokens, [])
            bridged = bridge(model, self._tokenizer, self._name)
            difference = apart(BridgeBackend(bridged).logits(tokens, []), own)
        if not difference <= tolerance(model.dtype):
            raise ProbekitError(
                f"lm.name {str(self._name)!r}: on {tokens.numel()} tokens of the corpus TransformerLens "
                f"computes other logits than the LM itself (they differ by {difference:.1%} of the largest); "
                "choose locations that the LM's own modules hold, such as hook_resid_post"
            )
        return bridged

    def let_go(self) -> None:
        """Lets the weights go, which are loaded again when they are needed again."""
        bridged = "bridged" in vars(self)
        for name in ("plain", "bridged"):
            vars(self).pop(name, None)
        if bridged:
            gc.collect()  # a bridge refers to itself, and would keep its weights beside the next LM's

    @cached_property
    def architecture(self) -> Architecture:
        """Its hook points.

        Raises:
            ProbekitError: It cannot be read, or TransformerLens has no bridge for it.
        """
        if self._like is not None:
            return self._like.architecture
        return architecture_of(self._config, self._tokenizer, self._name)

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the LM, or of its part that reads text."""
        return self._config.get_text_config()

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.config.num_hidden_layers)

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return int(self.config.num_attention_heads)

    def check_tunable(self, names: Sequence[str]) -> None:
        """Refuses to tune an LM with hooks that only TransformerLens has.

        Raises:
            ProbekitError: It names one of them.
        """
        if missing := self._without_module(names):
            raise ProbekitError(
                f"only TransformerLens has {missing[0]}, and no base LM can be tuned there; choose another "
                "conditioning.location, such as attn.hook_z, or give training.base.tuning frozen"
            )

    def backend_for(self, names: Sequence[str], model: PreTrainedModel | None = None) -> Backend:
        """The fastest backend that runs the LM with some hooks; without a model, the LM's one copy is run.

        Args:
            names: The hooks' full TransformerLens names.
            model: Run this one: the same LM, not bridged, that is to be trained.

        Raises:
            ProbekitError: Only TransformerLens has one of the hooks, and the LM was placed by accelerate, or
                is to be trained.
        """
        points = self.architecture.points(names)
        if points is not None:
            return HFBackend(self.plain if model is None else model, points, self._device)
        if self._device is not None:
            raise ProbekitError(
                f"lm.device_map is set, but only TransformerLens has {self._without_module(names)[0]}, and "
                "it takes no LM that accelerate placed; choose other locations (conditioning.location, "
                "probe.locations), or leave lm.device_map unset"
            )
        if model is not None:
            self.check_tunable(names)
        vars(self).pop("plain", None)
        return BridgeBackend(self.bridged)

    def _without_module(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if self.architecture.points([name]) is None]
