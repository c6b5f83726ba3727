"""The unembedding: final norm and head, which give next-token logits of any layer's residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from probekit.errors import ProbekitError
from probekit.models.backends import in_float32, tolerance
from probekit.models.locations import NORM_OUT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from probekit.models.frozen_lm import FrozenLM


LOGITS_AT_ONCE = 1 << 23
"""Logits in memory at once, of all layers together: 32 MiB in float32."""


def rows_at_once(head: nn.Module, layers: int = 1) -> int:
    """How many tokens have their logits of some layers in memory at once."""
    return max(1, LOGITS_AT_ONCE // (int(next(head.parameters()).shape[0]) * layers))


@dataclass(frozen=True)
class Unembedding:
    """Turns the residual stream of a layer into next-token logits; of the last layer, the LM's own.

    Of an earlier one they are the logit lens (nostalgebraist 2020): what the LM would predict if the layers
    after it added nothing.

    Attributes:
        norm: The LM's final norm.
        head: Its unembedding.
        scale: Factor of the logits after the head, as in Cohere's and Granite's LMs.
        cap: Bound of the logits by a hyperbolic tangent, as in Gemma 2; None: none.
    """

    norm: nn.Module
    head: nn.Module
    scale: float
    cap: float | None

    def __call__(self, residual: Tensor) -> Tensor:
        """Logits in float32 `[..., vocabulary]` of the residual stream `[..., width]`, on its device."""
        weight = next(self.head.parameters())
        logits = self.scale * in_float32(self.head(self.norm(residual.to(weight))))
        logits = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        return logits.to(residual.device)


def find_unembedding(lm: FrozenLM, model: PreTrainedModel) -> Unembedding:
    """The unembedding of an LM, which is checked against its logits.

    Args:
        lm: The LM.
        model: Its module, not bridged: the LM itself, tuned, or with random weights.

    Raises:
        ProbekitError: It has no final norm before its head, or computes its logits in another way.
    """
    points = lm.architecture.points([NORM_OUT])
    if points is None:
        raise ProbekitError(
            f"{type(model).__name__} has no final norm (no {NORM_OUT}), by which its head could read other "
            "layers; choose an LM that has one before its head, as GPT-2, Llama, OLMo and Qwen have"
        )
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    cap = getattr(config, "final_logit_softcapping", None)
    norm = model.get_submodule(points[NORM_OUT].module)
    unembed, seen = Unembedding(norm, model.get_output_embeddings(), scale, cap), list[Tensor]()
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        tokens = torch.arange(4, device=model.device)[None] % config.vocab_size
        logits = in_float32(model(tokens, use_cache=False).logits)
        handle.remove()
        own = unembed(seen[-1])
    if own.shape != logits.shape or (own - logits).abs().max() > tolerance(model.dtype) * logits.abs().max():
        raise ProbekitError(
            f"{type(model).__name__} computes its logits in another way than by its final norm and its head, "
            "so other layers have no logits of their own; choose an LM whose head comes last"
        )
    return unembed
