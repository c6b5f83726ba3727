"""Components of an LM (attention heads, parts of the adapter), and the LM with some of them mean-ablated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from probekit.causal.variant_lm import VariantLM
from probekit.config import VariantName
from probekit.data.windows import IGNORE, Batch, Windows, chunks
from probekit.errors import ProbekitError
from probekit.models.backends import Hook
from probekit.models.conditioning import Adapter, Conditioned
from probekit.models.locations import OUTSIDE_BLOCKS, hook_name, layer_of
from probekit.probing.targets import NO_LABEL
from probekit.progress import Progress
from probekit.run.run import Run

HEADS = "attn.hook_z"
"""The location that holds the outputs of all heads of a layer, concatenated."""


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
class ComponentHook:
    """A hook, and the numbers of its components, which are equal parts of its width.

    Attributes:
        name: Full TransformerLens name.
        heads: The heads in the LM's own activation; none where it is not made of heads.
        parts: The parts of what an adapter adds.
    """

    name: str
    heads: range
    parts: range


ComponentFunction = Callable[[ComponentHook, Tensor, Tensor], Tensor | None]
"""Maps a hook, the LM's own activation and what the adapter adds to it, both `[windows, positions, width]`,
to what is to be added to their sum, if anything."""

Means = dict[str, tuple[Tensor, Tensor]]
"""By hook name, the means of the LM's own activation and of what the adapter adds, both `[width]`."""


class Components:
    """All components of an LM, numbered by layer, heads first.

    An adapter that adds to the heads' outputs has a part for each head, any other one for each layer.

    Args:
        layers: Number of layers of the LM.
        heads: Number of heads in each.
        adapter: The adapter that conditions the LM, if any.
    """

    def __init__(self, layers: int, heads: int, adapter: Adapter | None) -> None:
        conditioned = () if adapter is None else adapter.names
        of_heads = [hook_name(HEADS, layer) for layer in range(layers)]
        names = [*(name for name in conditioned if name == OUTSIDE_BLOCKS[0]), *of_heads]
        names += [name for name in conditioned if name not in names]
        self.hooks: list[ComponentHook] = []
        self.all: list[Component] = []
        for name in names:
            own = range(heads) if name in of_heads else ()
            parts = (own or (None,)) if name in conditioned else ()
            of_lm, of_adapter = self._add("head", name, own), self._add("adapter", name, parts)
            self.hooks.append(ComponentHook(name, of_lm, of_adapter))

    def __len__(self) -> int:
        return len(self.all)

    def _add(self, kind: Literal["head", "adapter"], name: str, heads: Sequence[int | None] | range) -> range:
        first, layer = len(self.all), None if name in OUTSIDE_BLOCKS else layer_of(name)
        self.all += [Component(kind, layer, head) for head in heads]
        return range(first, len(self.all))

    def hooked(self, conditioning: Sequence[Hook], function: ComponentFunction) -> tuple[list[Hook], int]:
        """The hooks of one forward pass, in order: those that condition the LM between those of components.

        Returns:
            The hooks, and how many of those before `function` change nothing.
        """
        before: dict[str, Tensor] = {}

        def keep(name: str) -> Hook:
            def run(activation: Tensor, hook: object = None) -> None:
                before[name] = activation.flatten(2)

            return name, run

        def change(component: ComponentHook) -> Hook:
            def run(activation: Tensor, hook: object = None) -> Tensor | None:
                whole = activation.flatten(2)
                own = before.pop(component.name, whole)
                # A difference is added: where nothing is removed, the activation is the same to the bit.
                added = function(component, own, whole - own)
                return None if added is None else (whole + added).to(whole.dtype).view_as(activation)

            return component.name, run

        keeping = [keep(component.name) for component in self.hooks if component.parts]
        return [*keeping, *conditioning, *(change(component) for component in self.hooks)], len(keeping)

    def removing(self, conditioning: Sequence[Hook], removed: Tensor, means: Means) -> tuple[list[Hook], int]:
        """The hooks of a forward pass without some components; see `hooked`.

        Args:
            conditioning: The hooks that condition the LM.
            removed: How much of each component is removed, from 0 to 1: `[windows, components]`, or
                `[1, components]` for all windows.
            means: What replaces removed components.
        """

        def spread(part: range, values: Tensor) -> Tensor:
            """A number for every feature `[windows, 1, width]`."""
            share = removed[:, part.start : part.stop].to(values.dtype)
            return share.repeat_interleave(values.shape[2] // len(part), dim=1)[:, None]

        def ablate(hook: ComponentHook, own: Tensor, added: Tensor) -> Tensor | None:
            mean_own, mean_added = means[hook.name]
            parts = [(hook.heads, own, mean_own), (hook.parts, added, mean_added)]
            changes = [spread(part, values) * (mean - values) for part, values, mean in parts if part]
            return sum(changes[1:], changes[0]) if changes else None

        return self.hooked(conditioning, ablate)


@dataclass(frozen=True)
class ScoredWindows:
    """Windows, and what each of their positions predicts; every token is scored in just one window.

    A document's first sentence, or one without a label, has nothing to predict: its tokens count as `other`.

    Attributes:
        batch: The windows.
        read: What the LM reads.
        first: Positions that predict a sentence's first token; the probe reads there
            `[windows, positions]`, bool.
        rest: Positions that predict another token of such a sentence `[windows, positions]`, bool.
        other: Positions that predict a token of any other sentence `[windows, positions]`, bool.
        row: The window of every position in `first` `[sentences]`, on the CPU.
        labels: The label of the sentence that begins there `[sentences]`, on the CPU.
    """

    batch: Batch
    read: Conditioned
    first: Tensor
    rest: Tensor
    other: Tensor
    row: np.ndarray
    labels: np.ndarray

    @property
    def kept(self) -> Tensor:
        """Positions whose predictions are to stay as they are: all but those of sentences' first tokens."""
        return self.rest | self.other


class MaskedLM(VariantLM):
    """A variant of a run's LM without some of its components.

    We mean-ablate, over tokens of the windows given to `measure_means`: zero is off-distribution.

    Args:
        run: The run; it needs probes of the variant.
        variant: `none`, or a trained variant, conditioned as in evaluation.

    Raises:
        ProbekitError: No hook of the LM holds its heads apart, or planning tokens condition it.
    """

    def __init__(self, run: Run, variant: VariantName) -> None:
        super().__init__(run, variant)
        adapter = self.model.adapter
        if adapter is not None and adapter.inserts:
            raise ProbekitError(
                f"conditioning.kind is {run.config.conditioning.kind!r}: planning tokens are no component "
                "that a mean could replace; give a run that is conditioned by adapter or embedding, or "
                "subnetwork.variant none"
            )
        lm = run.frozen_lm()
        lm.architecture.check(HEADS, "the attention heads' location")
        self.components = Components(lm.layers, lm.heads, adapter)
        self.use_hooks([hook.name for hook in self.components.hooks])
        self.means: Means = {}
        self.nothing = torch.zeros(1, len(self.components), device=self.device)
        """Removes no component `[1, components]`."""

    @torch.no_grad()
    def scored(self, windows: Windows) -> ScoredWindows:
        """Windows of the corpus as the variant reads them."""
        batch, corpus = self.read(windows), self.corpus
        next_token = windows.start[:, None] + np.arange(batch.tokens.shape[1]) + 1
        sentence = np.searchsorted(corpus.first_token, next_token, side="right") - 1
        begins = corpus.first_token[sentence] == next_token
        unpredicted = sentence == corpus.document_sentences[windows.document][:, None]
        unpredicted |= self.labels[sentence] == NO_LABEL
        counted = (batch.targets != IGNORE).cpu().numpy()
        first = begins & counted & ~unpredicted

        def on_device(mask: np.ndarray) -> Tensor:
            return torch.from_numpy(mask).to(self.device)

        return ScoredWindows(
            batch=batch,
            read=self.model.conditioned(batch, self.mixing),
            first=on_device(first),
            rest=on_device(counted & ~unpredicted & ~first),
            other=on_device(counted & unpredicted),
            row=first.nonzero()[0],
            labels=self.labels[sentence[first]].astype(np.int64),
        )

    def __call__(self, scored: ScoredWindows, removed: Tensor) -> tuple[Tensor, Tensor]:
        """One forward pass without as much of each component as `removed`; see `Components.removing`.

        Returns:
            Logits of the next token `[windows, positions, vocabulary]`, and the activations that the
            final-layer probe reads `[sentences, width]`.
        """
        hooks, _, states = self._hooks(scored, removed)
        logits = self.logits(scored.read, hooks)
        return logits.float(), states[0]

    @torch.no_grad()
    def states(self, scored: ScoredWindows, removed: Tensor) -> Tensor:
        """The activations that the final-layer probe reads alone `[sentences, width]`, without logits."""
        hooks, reads, states = self._hooks(scored, removed)
        self.run_hooks(scored.read, hooks, reads)
        return states[0]

    def label_log_probabilities(self, states: Tensor) -> Tensor:
        """Log-probabilities `[sentences, classes]` by the final-layer probe of what it reads."""
        # Finite, so that a class without examples, times its probability of 0, is 0.
        return self.probe.log_probabilities(states).clamp(min=-1e4)

    def _hooks(self, scored: ScoredWindows, removed: Tensor) -> tuple[list[Hook], int, list[Tensor]]:
        """Hooks of a pass, how many of them change nothing, and a list that the last one fills."""
        states: list[Tensor] = []

        def keep_states(activation: Tensor, hook: object = None) -> None:
            states.append(activation.flatten(2)[scored.first].float())

        hooks, reads = self.components.removing(scored.read.hooks, removed, self.means)
        return [*hooks, (self.probe_hook, keep_states)], reads + 1, states

    @torch.no_grad()
    def measure_means(self, windows: Windows, batch_size: int, progress: Progress) -> None:
        """Measures the means of all components over the scored tokens of windows."""
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        tokens = 0
        with progress.task("means of components", total=len(windows)) as task:
            for rows in chunks(len(windows), batch_size):
                scored = self.scored(windows[rows])
                counted = scored.batch.targets != IGNORE

                def add(hook: ComponentHook, own: Tensor, added: Tensor, counted: Tensor = counted) -> None:
                    totals = [values[counted].double().sum(0) for values in (own, added)]
                    if hook.name in sums:
                        totals = [old + new for old, new in zip(sums[hook.name], totals, strict=True)]
                    sums[hook.name] = totals[0], totals[1]

                hooks, reads = self.components.hooked(scored.read.hooks, add)
                self.run_hooks(scored.read, hooks, reads + len(self.components.hooks))
                tokens += int(counted.sum())
                task.advance(len(counted))
        self.means = {
            name: ((own / tokens).float(), (added / tokens).float()) for name, (own, added) in sums.items()
        }
