"""Conditioning: the adapter that adds projected action embeddings inside the LM, as TransformerLens hooks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probekit.config import ConditioningSettings
from probekit.errors import ProbekitError
from probekit.models.language_model import OUTSIDE_BLOCKS, Hook, check_location, hook_name, locations

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Adapter(nn.Module):
    """A linear projection of the action embedding for every conditioned layer (arXiv 2410.12492, section 3).

    Args:
        settings: Location, and how many layers at the bottom to skip.
        codebook: Action embeddings `[actions, dimensions]`, copied: every adapter trains its own.
        layers: Layers of the LM.
        width: Features at the location, all its dimensions after batch and position together.
        seed: Seed of the projections, which all start different and small.
    """

    def __init__(
        self, settings: ConditioningSettings, codebook: Tensor, *, layers: int, width: int, seed: int
    ) -> None:
        super().__init__()
        self.location = settings.location
        self.layers = range(settings.skip_layers, layers)
        self.codebook = nn.Parameter(codebook.clone())
        generator = torch.Generator().manual_seed(seed)
        dimensions = codebook.shape[1]
        scale = 0.1 / math.sqrt(dimensions)
        self.projections = nn.Parameter(
            scale * torch.randn(len(self.layers), dimensions, width, generator=generator)
        )

    def hooks(self, embeddings: Tensor, sentence: Tensor) -> list[Hook]:
        """The hooks of one forward pass.

        A sentence is projected once, however many tokens carry it.

        Args:
            embeddings: Mixed action embeddings `[sentences, dimensions]`.
            sentence: For every position, which row of `embeddings` it carries `[batch, position]`.
        """
        projected = torch.einsum("sd,ldw->lsw", embeddings, self.projections)
        return [
            (hook_name(self.location, layer), _add(projected[i], sentence))
            for i, layer in enumerate(self.layers)
        ]


def new_adapter(
    settings: ConditioningSettings, codebook: Tensor, bridged: TransformerBridge, seed: int
) -> Adapter:
    """An untrained adapter that fits the LM; the same seed gives every variant the same beginning."""
    width = location_width(bridged, settings)
    return Adapter(settings, codebook, layers=bridged.cfg.n_layers, width=width, seed=seed)


def _add(projected: Tensor, sentence: Tensor) -> Callable[..., Tensor]:
    def add(activation: Tensor, hook: Any = None) -> Tensor:
        # Not `projected[sentence]`: threads would sum its gradient in no fixed order, and bits would differ.
        carried = nn.functional.embedding(sentence, projected)
        return activation + carried.reshape(activation.shape).to(activation.dtype)

    return add


def location_width(bridged: TransformerBridge, settings: ConditioningSettings) -> int:
    """Features per position at the conditioned location.

    Raises:
        ProbekitError: No layer is left to condition, or the location holds no vector for each position.
    """
    layers = bridged.cfg.n_layers
    if settings.skip_layers >= layers:
        raise ProbekitError(
            f"conditioning.skip_layers is {settings.skip_layers}, but the LM has {layers} layers; "
            f"it must be at most {layers - 1}"
        )
    widths = locations(bridged)
    check_location(widths, settings.location, "conditioning.location")
    if settings.location in OUTSIDE_BLOCKS:
        raise ProbekitError(
            f"conditioning.location is {settings.location!r}, which is in no layer; give a hook of the "
            "blocks, such as attn.hook_z"
        )
    return widths[settings.location]
