"""Components that can be removed: attention heads, and what an adapter adds, as TransformerLens hooks.

A removed component is replaced by its mean over tokens (mean ablation), and not by zero: the layers behind it
have never seen it at zero, so that would change what they read by a constant that tells nothing, and count
that as information. The mean takes away all that varies, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from probekit.models.conditioning import Adapter
from probekit.models.language_model import OUTSIDE_BLOCKS, Hook, hook_name, layer_of

HEADS = "attn.hook_z"
"""Where every head's output stands alone: all of them side by side."""

Seen = Callable[["Spot", Tensor, Tensor], Tensor | None]
"""Called at a spot with what the LM itself has there, and with what the adapter adds to it, both
`[windows, positions, width]`; gives what is to be added to their sum, or nothing."""


@dataclass(frozen=True)
class Component:
    """What is removed or kept as a whole.

    Attributes:
        kind: An attention head, or a part of what the adapter adds.
        layer: Its layer; None for an adapter outside the blocks.
        head: The head, or the one that the adapter's part is added to; None where an adapter adds to no head.
    """

    kind: Literal["head", "adapter"]
    layer: int | None
    head: int | None

    def __str__(self) -> str:
        place = ".".join(str(number) for number in (self.layer, self.head) if number is not None)
        return f"{self.kind} {place}".strip()


@dataclass(frozen=True)
class Spot:
    """A hook that components are at.

    Attributes:
        name: Its full TransformerLens name.
        own: The numbers of the heads there, side by side; none where heads are not apart.
        added: The numbers of the parts of what an adapter adds there, side by side.
    """

    name: str
    own: range
    added: range


@dataclass(frozen=True)
class Means:
    """What removed components are replaced by.

    Attributes:
        own: By hook, the mean of what the LM itself has there `[width]`.
        added: The same of what the adapter adds.
    """

    own: Mapping[str, Tensor]
    added: Mapping[str, Tensor]


class Components:
    """All components of an LM, numbered by layer, heads first.

    An adapter that adds to heads has a part for each head that it adds to, else one for each layer.

    Args:
        layers: Layers of the LM.
        heads: Heads in each.
        adapter: The adapter that conditions it, if any does.
    """

    def __init__(self, layers: int, heads: int, adapter: Adapter | None) -> None:
        conditioned = () if adapter is None else adapter.names
        of_heads = [hook_name(HEADS, layer) for layer in range(layers)]
        names = [*(name for name in conditioned if name == OUTSIDE_BLOCKS[0]), *of_heads]
        names += [name for name in conditioned if name not in names]
        self.spots: list[Spot] = []
        self.all: list[Component] = []
        for name in names:
            own = self._number("head", name, range(heads) if name in of_heads else ())
            parts = (range(heads) if name in of_heads else (None,)) if name in conditioned else ()
            self.spots.append(Spot(name, own, self._number("adapter", name, parts)))

    def __len__(self) -> int:
        return len(self.all)

    @property
    def names(self) -> list[str]:
        """The full TransformerLens names of the hooks that are used."""
        return [spot.name for spot in self.spots]

    def around(self, conditioning: Sequence[Hook], seen: Seen) -> tuple[list[Hook], int]:
        """The hooks of one forward pass, in their order: those that condition, in the midst of others.

        Returns:
            The hooks, and how many of them change nothing.
        """
        before: dict[str, Tensor] = {}
        keeping = [(spot.name, _keep(before, spot.name)) for spot in self.spots if spot.added]
        changing = [(spot.name, _change(before, spot, seen)) for spot in self.spots]
        return [*keeping, *conditioning, *changing], len(keeping)

    def removing(self, conditioning: Sequence[Hook], removed: Tensor, means: Means) -> tuple[list[Hook], int]:
        """The hooks of a forward pass without some components, as `around` has them.

        Args:
            conditioning: The hooks that condition it.
            removed: How much of each component is removed, from 0 to 1: `[windows, components]`, or
                `[1, components]` for all windows.
            means: What stands there instead.
        """

        def seen(spot: Spot, own: Tensor, added: Tensor) -> Tensor | None:
            parts = [(spot.own, own, means.own), (spot.added, added, means.added)]
            changes = [
                _spread(removed[:, part.start : part.stop], values) * (mean[spot.name] - values)
                for part, values, mean in parts
                if part
            ]
            return sum(changes[1:], changes[0]) if changes else None

        return self.around(conditioning, seen)

    def _number(
        self, kind: Literal["head", "adapter"], name: str, heads: Sequence[int | None] | range
    ) -> range:
        first = len(self.all)
        layer = None if name in OUTSIDE_BLOCKS else layer_of(name)
        self.all += [Component(kind, layer, head) for head in heads]
        return range(first, len(self.all))


def _spread(removed: Tensor, values: Tensor) -> Tensor:
    """A number for every feature: `[windows, parts]` to `[windows, 1, width]`."""
    return removed.to(values.dtype).repeat_interleave(values.shape[2] // removed.shape[1], dim=1)[:, None]


def _keep(before: dict[str, Tensor], name: str) -> Callable[..., None]:
    def keep(activation: Tensor, hook: object = None) -> None:
        before[name] = activation.flatten(2)

    return keep


def _change(before: dict[str, Tensor], spot: Spot, seen: Seen) -> Callable[..., Tensor | None]:
    def change(activation: Tensor, hook: object = None) -> Tensor | None:
        whole = activation.flatten(2)
        own = before.pop(spot.name, whole)
        # Added to what is there: where nothing is removed, not a bit of it changes.
        changed = seen(spot, own, whole - own)
        return None if changed is None else (whole + changed).to(whole.dtype).view_as(activation)

    return change
