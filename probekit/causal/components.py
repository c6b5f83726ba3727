"""An LM whose components can be removed, and what a probe reads in its last layer right before sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from probekit.config import VariantName
from probekit.data.corpus import Corpus
from probekit.data.windows import IGNORE, Batch, Windows, chunks, collate
from probekit.distributed import autocast
from probekit.errors import ProbekitError
from probekit.models.conditioning import Adapter, Conditioned
from probekit.models.language_model import OUTSIDE_BLOCKS, Hook, check_location, hook_name, layer_of
from probekit.models.mixing import evaluation_mixing
from probekit.probing.activations import HookPoint
from probekit.progress import Progress
from probekit.run.run import Run

LOW, HIGH = -0.1, 1.1
"""What the sigmoid is stretched to."""

TEMPERATURE = 2 / 3
"""Of the sigmoid: low enough for most draws to be near 0 or 1, high enough for a gradient."""

START = -2.0
"""Locations before training: little is removed, and every component has a draw of its own now and then."""


def begun(components: int) -> Tensor:
    """Locations before training `[components]`."""
    return torch.full((components,), START)


def drawn(locations: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random amounts removed `[count, components]`, differentiable by locations `[components]`.

    Args:
        locations: On any device.
        count: How many draws.
        generator: On the CPU, so that every device has the same draws.
    """
    uniform = torch.rand(count, len(locations), generator=generator).clamp(1e-6, 1 - 1e-6)
    return _hard((uniform.logit().to(locations) + locations) / TEMPERATURE)


def settled(locations: Tensor) -> Tensor:
    """The amounts removed without noise `[components]`."""
    return _hard(locations)


def expected_count(locations: Tensor) -> Tensor:
    """How many components are removed at least in part, in the mean over draws."""
    return (locations - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid().sum()


def _hard(scores: Tensor) -> Tensor:
    return (LOW + (HIGH - LOW) * scores.sigmoid()).clamp(0.0, 1.0)


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


@dataclass(frozen=True)
class Scored:
    """Windows, and which of their positions count for what; a token is scored in just one window.

    Attributes:
        batch: The windows.
        read: What the LM reads.
        first: Positions that predict the first token of a sentence that has one before it
            `[windows, positions]`, bool. The probe reads there.
        rest: Those that predict another token of such a sentence.
        other: Those that predict a token of a document's first sentence.
        row: The window of every position that `first` marks `[sentences]`, on the CPU.
        actions: The action of the sentence that begins there `[sentences]`, on the CPU.
    """

    batch: Batch
    read: Conditioned
    first: Tensor
    rest: Tensor
    other: Tensor
    row: np.ndarray
    actions: np.ndarray


class MaskedLM:
    """A variant of a run's LM without some of its components.

    Args:
        run: The run.
        variant: `none`, or a variant, conditioned as in evaluation.
        place: Where the probe reads.

    Raises:
        ProbekitError: The LM's heads do not stand alone anywhere, or planning tokens condition it.
    """

    def __init__(self, run: Run, variant: VariantName, place: HookPoint) -> None:
        self._run, self._model = run, run.model(variant)
        self._mixing, self.corpus = evaluation_mixing(variant), run.corpus_of(variant)
        adapter = self._model.adapter
        if adapter is not None and adapter.inserts:
            raise ProbekitError(
                f"conditioning.kind is {run.config.conditioning.kind!r}: planning tokens are no component "
                "that a mean could stand for; give a run that is conditioned by adapter or embedding, or "
                "subnetwork.variant none"
            )
        check_location(run.locations, HEADS, "the attention heads' location")
        lm = run.base_lm()
        self.components = Components(lm.layers, lm.heads, adapter)
        self._readout = hook_name(*place)
        self._backend = run.forward_pass(
            list(dict.fromkeys([*self.components.names, self._readout])), variant
        )
        self._means: Means | None = None

    @property
    def means(self) -> Means:
        """What stands in a removed component's place."""
        assert self._means is not None  # noqa: S101 - measured before anything is removed
        return self._means

    @property
    def nothing(self) -> Tensor:
        """No component removed `[1, components]`."""
        return torch.zeros(1, len(self.components), device=self._run.device)

    @torch.no_grad()
    def scored(self, windows: Windows) -> Scored:
        """Windows of the corpus as the variant reads them."""
        batch = collate(self.corpus, windows).to(self._run.device)
        place = windows.start[:, None] + np.arange(batch.tokens.shape[1])
        sentence = np.searchsorted(self.corpus.first_token, place + 1, side="right") - 1
        begins = self.corpus.first_token[sentence] == place + 1
        alone = sentence == self.corpus.document_sentences[windows.document][:, None]
        counted = (batch.targets != IGNORE).cpu().numpy()
        first = begins & counted & ~alone
        parts = [
            torch.from_numpy(part).to(self._run.device)
            for part in (first, counted & ~alone & ~first, counted & alone)
        ]
        return Scored(
            batch,
            self._model.conditioned(batch, self._mixing),
            parts[0],
            parts[1],
            parts[2],
            first.nonzero()[0],
            self.corpus.actions[sentence[first]].astype(np.int64),
        )

    def __call__(self, scored: Scored, removed: Tensor) -> tuple[Tensor, Tensor]:
        """One forward pass without some components.

        Args:
            scored: The windows.
            removed: How much of each is removed `[windows, components]` or `[1, components]`.

        Returns:
            Logits of the next token `[windows, positions, vocabulary]`, and what stands where the probe reads
            `[sentences, width]`.
        """
        hooks, _, states = self._hooks(scored, removed)
        with self._autocast():
            logits = self._backend.logits(scored.read.tokens, hooks, scored.read.positions)
        return logits.float(), states[0]

    @torch.no_grad()
    def states(self, scored: Scored, removed: Tensor) -> Tensor:
        """What stands where the probe reads alone `[sentences, width]`; no logits are made."""
        hooks, reads, states = self._hooks(scored, removed)
        with self._autocast():
            self._backend(scored.read.tokens, hooks, reads, scored.read.positions)
        return states[0]

    @torch.no_grad()
    def measure_means(self, windows: Windows, batch_size: int, progress: Progress) -> None:
        """Takes the means of all components over the tokens of windows."""
        sums: dict[str, list[Tensor]] = {}
        tokens = 0
        with progress.task("means of components", total=len(windows)) as task:
            for rows in chunks(len(windows), batch_size):
                part = windows[rows]
                scored = self.scored(part)
                counted = scored.batch.targets != IGNORE

                def add(spot: Spot, own: Tensor, added: Tensor, counted: Tensor = counted) -> None:
                    parts = [values[counted].double().sum(0) for values in (own, added)]
                    old = sums.get(spot.name)
                    sums[spot.name] = parts if old is None else [old[0] + parts[0], old[1] + parts[1]]

                hooks, reads = self.components.around(scored.read.hooks, add)
                with self._autocast():
                    # Every spot's hook reads, and none changes anything.
                    reads += len(self.components.spots)
                    self._backend(scored.read.tokens, hooks, reads, scored.read.positions)
                tokens += int(counted.sum())
                task.advance(len(part))
        own, added = ({name: (both[n] / tokens).float() for name, both in sums.items()} for n in (0, 1))
        self._means = Means(own, added)

    def _hooks(self, scored: Scored, removed: Tensor) -> tuple[list[Hook], int, list[Tensor]]:
        """Hooks of a pass, how many of them change nothing, and a list that the last one fills."""
        states: list[Tensor] = []

        def look(activation: Tensor, hook: object = None) -> None:
            states.append(activation.flatten(2)[scored.first].float())

        hooks, reads = self.components.removing(scored.read.hooks, removed, self.means)
        return [*hooks, (self._readout, look)], reads + 1, states

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self._run.device, self._run.config.training.precision)


def documents_of(corpus: Corpus, split: str, most: int, seed: int) -> np.ndarray:
    """At most so many documents of a split, drawn, in order.

    Raises:
        ProbekitError: The split has none.
    """
    documents = corpus.documents(split)
    if not len(documents):
        raise ProbekitError(
            f"the corpus keeps no documents in the split {split!r}; build it with a corpus.{split}_fraction "
            "above 0"
        )
    drawn = np.random.default_rng(seed).permutation(documents)[:most]
    return np.sort(drawn)
