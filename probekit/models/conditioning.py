"""Conditioning: how mixed action embeddings enter the LM, as TransformerLens hooks; a class for each kind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from probekit.config import ConditioningSettings
from probekit.errors import ProbekitError
from probekit.models.backends import Hook
from probekit.models.locations import OUTSIDE_BLOCKS, hook_name

if TYPE_CHECKING:
    from probekit.models.frozen_lm import FrozenLM


EMBEDDING = OUTSIDE_BLOCKS[0]
"""The hook of the tokens' embeddings."""


@dataclass(frozen=True)
class Slots:
    """Windows with planning tokens between their own.

    Attributes:
        own: The slot of every token `[windows, positions]`.
        predicting: The slot at which the token after it is predicted `[windows, positions]`.
        position: The position whose token a slot holds, or right after which it plans `[windows, slots]`.
        planning: Whether a slot plans `[windows, slots]`.
    """

    own: Tensor
    predicting: Tensor
    position: Tensor
    planning: Tensor

    @classmethod
    def of(cls, sentence: Tensor) -> Slots:
        """Slots of windows, given the sentence of every position `[windows, positions]`."""
        begins = torch.ones_like(sentence)
        begins[:, 1:] = sentence[:, 1:] != sentence[:, :-1]
        windows, length = sentence.shape
        place = torch.arange(length, device=sentence.device).expand(windows, -1)
        own = place + begins.cumsum(dim=1) - begins
        predicting = own + begins

        # Slots after a window's last are padding, which repeats its last token.
        slots = int(predicting.max()) + 1
        position = sentence.new_full((windows, slots), length - 1)
        position = position.scatter(1, own, place).scatter(1, predicting, place)
        planning = torch.zeros_like(position).scatter(1, predicting, begins)
        return cls(own, predicting, position, planning.bool())

    def spread(self, values: Tensor) -> Tensor:
        """Values of positions for every slot: `[windows, positions]` to `[windows, slots]`."""
        return values.gather(1, self.position)

    def predictions(self, logits: Tensor) -> Tensor:
        """Logits of the next tokens: `[windows, slots, vocabulary]` to `[windows, positions, vocabulary]`."""
        windows, slots = logits.shape[:2]
        first = slots * torch.arange(windows, device=logits.device)[:, None]
        rows = logits.flatten(0, 1).index_select(0, (first + self.predicting).flatten())
        return rows.view(*self.predicting.shape, -1)


@dataclass(frozen=True)
class Conditioned:
    """Windows of tokens as the LM reads them.

    Attributes:
        tokens: `[windows, positions]`, or `[windows, slots]` where there are planning tokens.
        hooks: The hooks that condition a forward pass over them.
        slots: Where the windows' own tokens are; None where there are no others.
        mask: Which tokens are no padding `[windows, positions]`; None for a causal LM, which reads none.
    """

    tokens: Tensor
    hooks: list[Hook] = field(default_factory=list)
    slots: Slots | None = None
    mask: Tensor | None = None

    @property
    def positions(self) -> Tensor | None:
        """Position ids of the tokens `[windows, slots]`; None where they are 0, 1, 2 and so on."""
        return None if self.slots is None else self.slots.position


class Adapter(nn.Module, ABC):
    """The trained part between an action's embedding and the LM.

    Attributes:
        codebook: Action embeddings `[actions, dimensions]`; every adapter trains its own.
        names: The full TransformerLens names of the hooks it changes.
        inserts: Whether the LM reads tokens that are not the text's.
        lag: How many positions after the one that predicts a sentence's first token its action is first seen.
    """

    names: Sequence[str]
    inserts = False
    lag = 0

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        self.codebook = nn.Parameter(codebook.clone())

    @abstractmethod
    def hooks(self, embeddings: Tensor, sentence: Tensor) -> list[Hook]:
        """The hooks of one forward pass over the tokens of `conditioned`.

        A sentence is projected once, however many tokens carry it.

        Args:
            embeddings: Mixed action embeddings `[sentences, dimensions]`.
            sentence: For every position, the row of `embeddings` that it carries `[windows, positions]`.
        """

    def conditioned(self, tokens: Tensor, embeddings: Tensor, sentence: Tensor) -> Conditioned:
        """What the LM reads for tokens `[windows, positions]`; the other arguments are those of `hooks`."""
        return Conditioned(tokens, self.hooks(embeddings, sentence))


class LayerAdapter(Adapter):
    """A linear projection of the action embedding for every conditioned layer (arXiv 2410.12492, section 3).

    Args:
        codebook: Action embeddings `[actions, dimensions]`, copied.
        names: The hooks at which the projections are added, one for each layer.
        width: Features at the location, all its dimensions after batch and position together.
        seed: Seed of the projections, which all start different and small.
    """

    def __init__(self, codebook: Tensor, names: Sequence[str], *, width: int, seed: int) -> None:
        super().__init__(codebook)
        self.names = names
        self.projections = nn.Parameter(_small(len(names), codebook.shape[1], width, seed=seed))

    def hooks(self, embeddings: Tensor, sentence: Tensor) -> list[Hook]:
        """One hook for every conditioned layer."""
        projected = torch.einsum("sd,ldw->lsw", embeddings, self.projections)
        return [(name, _add(part, sentence)) for name, part in zip(self.names, projected, strict=True)]


class EmbeddingAdapter(Adapter):
    """One linear projection of the action embedding, added to the embedding of every token.

    Args:
        codebook: Action embeddings `[actions, dimensions]`, copied.
        width: Features of a token's embedding.
        seed: Seed of the projection, which starts small.
    """

    names = (EMBEDDING,)

    def __init__(self, codebook: Tensor, *, width: int, seed: int) -> None:
        super().__init__(codebook)
        self.projection = nn.Parameter(_small(codebook.shape[1], width, seed=seed))

    def hooks(self, embeddings: Tensor, sentence: Tensor) -> list[Hook]:
        """One hook at the tokens' embeddings."""
        return [(EMBEDDING, _add(embeddings @ self.projection, sentence))]


class PlanningToken(EmbeddingAdapter):
    """A planning token before every sentence, and at the beginning of a window after its first token.

    Its embedding is the projected action embedding, its position that of the token before it, so that windows
    may be as long as without. The token after it is predicted where it stands.
    """

    inserts = True
    lag = 1  # a token that predicts has its own slot before the planning one

    def conditioned(self, tokens: Tensor, embeddings: Tensor, sentence: Tensor) -> Conditioned:
        """The windows with planning tokens."""
        slots = Slots.of(sentence)
        return Conditioned(slots.spread(tokens), self._hooks(slots, embeddings, sentence), slots)

    def hooks(self, embeddings: Tensor, sentence: Tensor) -> list[Hook]:
        """One hook that replaces the embeddings of the planning tokens."""
        return self._hooks(Slots.of(sentence), embeddings, sentence)

    def _hooks(self, slots: Slots, embeddings: Tensor, sentence: Tensor) -> list[Hook]:
        carried = nn.functional.embedding(slots.spread(sentence), embeddings @ self.projection)

        def replace(activation: Tensor, hook: Any = None) -> Tensor:
            return torch.where(slots.planning[..., None], carried.to(activation.dtype), activation)

        return [(EMBEDDING, replace)]


CONDITIONINGS: dict[str, type[Adapter]] = {
    "adapter": LayerAdapter,
    "embedding": EmbeddingAdapter,
    "token": PlanningToken,
}
"""The kinds of `conditioning.kind`."""


def conditioned_location(settings: ConditioningSettings) -> str | None:
    """Where the action is added to an activation, which there is before and after it; None if nowhere."""
    return {"adapter": settings.location, "embedding": EMBEDDING, "token": None}[settings.kind]


def location_width(lm: FrozenLM, settings: ConditioningSettings) -> int:
    """Features per position where the action enters.

    Raises:
        ProbekitError: The LM cannot be conditioned as the settings ask.
    """
    if settings.kind != "adapter":
        if settings.kind == "token" and not lm.architecture.takes_positions:
            raise ProbekitError(
                f"conditioning.kind is {settings.kind!r}, but {lm.architecture.name} takes no positions of "
                "tokens (position_ids), which planning tokens need; give adapter or embedding"
            )
        lm.architecture.check(EMBEDDING, f"conditioning.kind is {settings.kind!r}: its location")
        return lm.architecture.locations[EMBEDDING]
    if settings.skip_layers >= lm.layers:
        raise ProbekitError(
            f"conditioning.skip_layers is {settings.skip_layers}, but the LM has {lm.layers} layers; "
            f"it must be at most {lm.layers - 1}"
        )
    lm.architecture.check(settings.location, "conditioning.location")
    if settings.location in OUTSIDE_BLOCKS:
        raise ProbekitError(
            f"conditioning.location is {settings.location!r}, which is in no layer; give a hook of the "
            "blocks, such as attn.hook_z"
        )
    return lm.architecture.locations[settings.location]


def new_adapter(settings: ConditioningSettings, codebook: Tensor, lm: FrozenLM, seed: int) -> Adapter:
    """An untrained adapter that fits the LM; the same seed gives every variant the same beginning."""
    width = location_width(lm, settings)
    if settings.kind == "adapter":
        names = [hook_name(settings.location, layer) for layer in range(settings.skip_layers, lm.layers)]
        return LayerAdapter(codebook, names, width=width, seed=seed)
    kind = PlanningToken if settings.kind == "token" else EmbeddingAdapter
    return kind(codebook, width=width, seed=seed)


def _small(*shape: int, seed: int) -> Tensor:
    """Random projections `[..., dimensions, width]`: an action adds little before it is trained."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 / math.sqrt(shape[-2]) * torch.randn(*shape, generator=generator)


def _add(projected: Tensor, sentence: Tensor) -> Callable[..., Tensor]:
    def add(activation: Tensor, hook: Any = None) -> Tensor:
        # Not `projected[sentence]`: threads would sum its gradient in no fixed order, and bits would differ.
        carried = nn.functional.embedding(sentence, projected)
        return activation + carried.reshape(activation.shape).to(activation.dtype)

    return add
