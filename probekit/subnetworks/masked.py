"""An LM whose components can be removed, and what a probe reads in its last layer right before sentences."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probekit.config import VariantName
from probekit.corpus.examples import IGNORE, Batch, Windows, chunks, collate
from probekit.corpus.store import Corpus
from probekit.devices import autocast
from probekit.errors import ProbekitError
from probekit.models.conditioning import Conditioned
from probekit.models.language_model import Hook, check_location, hook_name
from probekit.models.mixing import evaluation_mixing
from probekit.probing.activations import Place
from probekit.progress import Progress
from probekit.run import Run
from probekit.subnetworks.components import HEADS, Components, Means, Spot


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

    def __init__(self, run: Run, variant: VariantName, place: Place) -> None:
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
        bridged = run.bridged.cfg
        self.components = Components(bridged.n_layers, bridged.n_heads, adapter)
        self._readout = hook_name(*place)
        self._road = run.forward_pass(list(dict.fromkeys([*self.components.names, self._readout])), variant)
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
            logits = self._road.logits(scored.read.tokens, hooks, scored.read.positions)
        return logits.float(), states[0]

    @torch.no_grad()
    def states(self, scored: Scored, removed: Tensor) -> Tensor:
        """What stands where the probe reads alone `[sentences, width]`; no logits are made."""
        hooks, reads, states = self._hooks(scored, removed)
        with self._autocast():
            self._road(scored.read.tokens, hooks, reads, scored.read.positions)
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
                    self._road(scored.read.tokens, hooks, reads, scored.read.positions)
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
