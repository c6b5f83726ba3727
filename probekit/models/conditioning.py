"""Conditioning: how mixed action embeddings enter the LM, as TransformerLens hooks; a small class a kind."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from probekit.config import ConditioningSettings
from probekit.errors import ProbekitError
from probekit.models.language_model import OUTSIDE_BLOCKS, Hook, check_location, hook_name

if TYPE_CHECKING:
    from probekit.models.base_lm import BaseLM


EMBEDDING = OUTSIDE_BLOCKS[0]
"""The hook of the tokens' embeddings."""


@dataclass(frozen=True)
class Slots:
    """Windows with planning tokens between their own.

    Attributes:
        own: The slot of every token `[windows, positions]`.
        predicting: The slot at which the token after it is predicted `[windows, positions]`.
        position: The position whose token a slot holds, or right behind which it plans `[windows, slots]`.
        planning: Whether a slot plans `[windows, slots]`.
    """

    own: Tensor
    predicting: Tensor
    position: Tensor
    planning: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """What positions have, for every slot: `[windows, positions]` to `[windows, slots]`."""
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
    """

    tokens: Tensor
    hooks: list[Hook] = field(default_factory=list)
    slots: Slots | None = None

    @property
    def positions(self) -> Tensor | None:
        """Where the tokens are for the LM, if not one behind the other `[windows, slots]`."""
        return None if self.slots is None else self.slots.position


class Adapter(nn.Module, ABC):
    """The trained part between an action's embedding and the LM.

    Attributes:
        codebook: Action embeddings `[actions, dimensions]`; every adapter trains its own.
        names: The full TransformerLens names of the hooks it changes.
        inserts: Whether the LM reads tokens that are not the text's.
        lag: From how many positions behind the one that predicts a sentence's first token its action is seen.
    """

    names: tuple[str, ...]
    inserts = False
    lag = 0

    def __init__(self, codebook: Tensor) -> None:
        super().__init__()
        self.codebook = nn.Parameter(codebook.clone())

    @staticmethod
    @abstractmethod
    def width(lm: BaseLM, settings: ConditioningSettings) -> int:
        """Features that an action's embedding is projected to.

        Raises:
            ProbekitError: The LM cannot be conditioned in this way.
        """

    @classmethod
    @abstractmethod
    def fitting(cls, settings: ConditioningSettings, codebook: Tensor, lm: BaseLM, seed: int) -> Self:
        """An untrained one that fits the LM."""

    @staticmethod
    @abstractmethod
    def location(settings: ConditioningSettings) -> str | None:
        """Where an activation is one before the action is added and another behind; None if nowhere."""

    @abstractmethod
    def hooks(self, embeddings: Tensor, sentence: Tensor) -> list[Hook]:
        """The hooks of one forward pass.

        A sentence is projected once, however many tokens carry it.

        Args:
            embeddings: Mixed action embeddings `[sentences, dimensions]`.
            sentence: For every position, which row of `embeddings` it carries `[windows, positions]`.
        """

    def conditioned(self, tokens: Tensor, embeddings: Tensor, sentence: Tensor) -> Conditioned:
        """Windows as the LM reads them, given their tokens `[windows, positions]` and the same as `hooks`."""
        return Conditioned(tokens, self.hooks(embeddings, sentence))


class LayerAdapter(Adapter):
    """A linear projection of the action embedding for every conditioned layer (arXiv 2410.12492, section 3).

    Args:
        settings: Location, and how many layers at the bottom to skip.
        codebook: Action embeddings `[actions, dimensions]`, copied.
        layers: Layers of the LM.
        width: Features at the location, all its dimensions after batch and position together.
        seed: Seed of the projections, which all start different and small.
    """

    def __init__(
        self, settings: ConditioningSettings, codebook: Tensor, *, layers: int, width: int, seed: int
    ) -> None:
        super().__init__(codebook)
        self.layers = range(settings.skip_layers, layers)
        self.names = tuple(hook_name(settings.location, layer) for layer in self.layers)
        self.projections = nn.Parameter(_small(len(self.names), codebook.shape[1], width, seed=seed))

    @staticmethod
    def width(lm: BaseLM, settings: ConditioningSettings) -> int:
        """As `Adapter` has it: no layer may be left over, or the location hold no vector a position."""
        layers = lm.layers
        if settings.skip_layers >= layers:
            raise ProbekitError(
                f"conditioning.skip_layers is {settings.skip_layers}, but the LM has {layers} layers; "
                f"it must be at most {layers - 1}"
            )
        widths = lm.locations
        check_location(widths, settings.location, "conditioning.location")
        if settings.location in OUTSIDE_BLOCKS:
            raise ProbekitError(
                f"conditioning.location is {settings.location!r}, which is in no layer; give a hook of the "
                "blocks, such as attn.hook_z"
            )
        return widths[settings.location]

    @classmethod
    def fitting(cls, settings: ConditioningSettings, codebook: Tensor, lm: BaseLM, seed: int) -> Self:
        """As `Adapter` has it."""
        width = cls.width(lm, settings)
        return cls(settings, codebook, layers=lm.layers, width=width, seed=seed)

    @staticmethod
    def location(settings: ConditioningSettings) -> str | None:
        """As `Adapter` has it."""
        return settings.location

    def hooks(self, embeddings: Tensor, sentence: Tensor) -> list[Hook]:
        """As `Adapter` has it."""
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

    @staticmethod
    def width(lm: BaseLM, settings: ConditioningSettings) -> int:
        """As `Adapter` has it."""
        widths = lm.locations
        check_location(widths, EMBEDDING, f"conditioning.kind is {settings.kind!r}: its location")
        return widths[EMBEDDING]

    @classmethod
    def fitting(cls, settings: ConditioningSettings, codebook: Tensor, lm: BaseLM, seed: int) -> Self:
        """As `Adapter` has it."""
        return cls(codebook, width=cls.width(lm, settings), seed=seed)

    @staticmethod
    def location(settings: ConditioningSettings) -> str | None:
        """As `Adapter` has it."""
        return EMBEDDING

    def hooks(self, embeddings: Tensor, sentence: Tensor) -> list[Hook]:
        """As `Adapter` has it."""
        return [(EMBEDDING, _add(embeddings @ self.projection, sentence))]


class PlanningToken(EmbeddingAdapter):
    """A planning token before every sentence, and at the beginning of a window behind its first token.

    Its embedding is the projected action embedding, its position that of the token before it, so that windows
    may be as long as without. The token behind it is predicted where it stands.
    """

    inserts = True
    lag = 1  # a token that predicts has its own slot before the planning one

    @staticmethod
    def width(lm: BaseLM, settings: ConditioningSettings) -> int:
        """As `Adapter` has it: the LM has to take positions."""
        if not lm.takes_positions:
            raise ProbekitError(
                f"conditioning.kind is {settings.kind!r}, but {lm.architecture} takes no positions of tokens "
                "(position_ids), which planning tokens need; give adapter or embedding"
            )
        return EmbeddingAdapter.width(lm, settings)

    @staticmethod
    def location(settings: ConditioningSettings) -> str | None:
        """As `Adapter` has it: tokens keep their own embeddings."""
        return None

    def conditioned(self, tokens: Tensor, embeddings: Tensor, sentence: Tensor) -> Conditioned:
        """As `Adapter` has it."""
        slots = self._slots(sentence)
        return Conditioned(slots.spread(tokens), [self._planned(slots, embeddings, sentence)], slots)

    def hooks(self, embeddings: Tensor, sentence: Tensor) -> list[Hook]:
        """As `Adapter` has it; they fit the tokens of `conditioned`."""
        return [self._planned(self._slots(sentence), embeddings, sentence)]

    @staticmethod
    def _slots(sentence: Tensor) -> Slots:
        begins = torch.ones_like(sentence)
        begins[:, 1:] = sentence[:, 1:] != sentence[:, :-1]
        windows, length = sentence.shape
        place = torch.arange(length, device=sentence.device).expand(windows, -1)
        own = place + begins.cumsum(dim=1) - begins
        predicting = own + begins
        # Slots behind a window's last are padding, which repeats its last token.
        slots = int(predicting.max()) + 1
        position = sentence.new_full((windows, slots), length - 1)
        position = position.scatter(1, own, place).scatter(1, predicting, place)
        planning = torch.zeros_like(position).scatter(1, predicting, begins)
        return Slots(own, predicting, position, planning.bool())

    def _planned(self, slots: Slots, embeddings: Tensor, sentence: Tensor) -> Hook:
        carried = nn.functional.embedding(slots.spread(sentence), embeddings @ self.projection)

        def replace(activation: Tensor, hook: Any = None) -> Tensor:
            return torch.where(slots.planning[..., None], carried.to(activation.dtype), activation)

        return EMBEDDING, replace


CONDITIONINGS: dict[str, type[Adapter]] = {
    "adapter": LayerAdapter,
    "embedding": EmbeddingAdapter,
    "token": PlanningToken,
}
"""The kinds of `conditioning.kind`."""


def new_adapter(settings: ConditioningSettings, codebook: Tensor, lm: BaseLM, seed: int) -> Adapter:
    """An untrained adapter that fits the LM; the same seed gives every variant the same beginning."""
    return CONDITIONINGS[settings.kind].fitting(settings, codebook, lm, seed)


def location_width(lm: BaseLM, settings: ConditioningSettings) -> int:
    """Features per position where the action enters.

    Raises:
        ProbekitError: The LM cannot be conditioned in this way.
    """
    return CONDITIONINGS[settings.kind].width(lm, settings)


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
