"""What an intervention does: the LM is run on the same scenes with and without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from probekit.config import VariantName
from probekit.corpus.examples import collate
from probekit.devices import autocast
from probekit.interventions.scenes import Scenes
from probekit.models.conditioning import Conditioned
from probekit.models.language_model import Hook, hook_name
from probekit.models.mixing import VARIANTS, Fixed
from probekit.models.planned_lm import token_losses
from probekit.probing.activations import Place
from probekit.probing.saved import LinearProbe
from probekit.run import Run

Change = Callable[[Tensor, np.ndarray, int], Tensor]
"""Activations of some scenes `[scenes, width]`, their numbers, and the distance; gives what stands there
instead."""


@dataclass(frozen=True)
class Edit:
    """An intervention: at one place, at some distances before every boundary.

    Attributes:
        place: The location and layer.
        distances: At which positions, in tokens before the next sentence's first one.
        change: What is made of the activations there.
    """

    place: Place
    distances: tuple[int, ...]
    change: Change


@dataclass(frozen=True)
class Outcomes:
    """What was seen of each scene.

    Attributes:
        next_loss: Loss of the next sentence, summed, in nats `[scenes]`.
        next_tokens: Its tokens `[scenes]`.
        other_loss: The same of the tokens behind it `[scenes]`.
        other_tokens: How many these are, none where the sentence is the last `[scenes]`.
        first: Log-probabilities of the next sentence's first token `[scenes, vocabulary]`.
        readout: Log-probabilities of its action, as a probe reads them in a later layer `[scenes, actions]`.
    """

    next_loss: np.ndarray
    next_tokens: np.ndarray
    other_loss: np.ndarray
    other_tokens: np.ndarray
    first: np.ndarray
    readout: np.ndarray


class Stage:
    """Runs a variant of a run's LM on scenes, with edits.

    Args:
        run: The run.
        variant: `none`, or a variant, conditioned as in evaluation.
        scenes: Where.
        places: All places that will be edited or read.
        readout: A probe and the place where it reads, right before the next sentence.
    """

    def __init__(
        self,
        run: Run,
        variant: VariantName,
        scenes: Scenes,
        places: Sequence[Place],
        readout: tuple[Place, LinearProbe],
    ) -> None:
        self._run, self.scenes = run, scenes
        self._model = run.model(variant)
        self._mixing = VARIANTS[variant].evaluation if variant in VARIANTS else Fixed()
        self._corpus = run.corpus_of(variant)
        self._readout = readout
        names = [hook_name(*place) for place in (*places, readout[0])]
        self._road = run.forward_pass(list(dict.fromkeys([*names, *self._model.names])), variant)
        self._probe = LinearProbe(*(part.to(run.device) for part in (readout[1].coef, readout[1].intercept)))

    def play(self, edit: Edit | None = None) -> Outcomes:
        """Runs all scenes, with an edit or without."""
        parts = [self._batch(rows, edit) for rows in self._batches()]
        return Outcomes(
            *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Outcomes))
        )

    def activations(self, place: Place, distances: Sequence[int]) -> Tensor:
        """What stands at a place before every boundary `[distances, scenes, width]`."""
        seen: list[Tensor] = []

        def keep(activations: Tensor, scenes: np.ndarray, distance: int) -> Tensor:
            seen.append(activations.clone())
            return activations

        parts = []
        for rows in self._batches():
            seen.clear()
            self._batch(rows, Edit(place, tuple(distances), keep))
            parts.append(torch.stack(seen))
        return torch.cat(parts, dim=1)

    def _batches(self) -> list[np.ndarray]:
        size = self._run.config.evaluation.batch_size
        return [np.arange(i, min(i + size, len(self.scenes))) for i in range(0, len(self.scenes), size)]

    @torch.no_grad()
    def _batch(self, rows: np.ndarray, edit: Edit | None) -> Outcomes:
        device = self._run.device
        batch = collate(self._corpus, self.scenes.windows[rows]).to(device)
        read = self._model.conditioned(batch, self._mixing)
        place, _ = self._readout
        seen: list[Tensor] = []
        column = torch.from_numpy(self.scenes.column[rows]).to(device)
        row = torch.arange(len(rows), device=device)

        def look(activation: Tensor, hook: object = None) -> None:
            seen.append(activation.flatten(2)[row, _slot(read, row, column)].float())

        hooks: list[Hook] = [*read.hooks]
        if edit is not None:
            hooks.append((hook_name(*edit.place), _editing(edit, read, row, column, rows)))
        hooks.append((hook_name(*place), look))
        with autocast(device, self._run.config.training.precision):
            logits = self._road.logits(read.tokens, hooks, read.positions)
        if read.slots is not None:
            logits = read.slots.predictions(logits)
        losses = token_losses(logits, batch.targets).double().cpu().numpy()
        return self._seen(rows, losses, logits[row, column].float(), seen[-1])

    def _seen(self, rows: np.ndarray, losses: np.ndarray, first: Tensor, read: Tensor) -> Outcomes:
        positions = np.arange(losses.shape[1])
        column, last = (part[rows][:, None] for part in (self.scenes.column, self.scenes.last))
        inside = positions < self.scenes.windows.length[rows][:, None]
        of_next = (positions >= column) & (positions <= last)
        others = (positions > last) & inside
        return Outcomes(
            (losses * of_next).sum(1),
            of_next.sum(1),
            (losses * others).sum(1),
            others.sum(1),
            first.log_softmax(dim=-1).cpu().numpy(),
            self._probe.log_probabilities(read).cpu().numpy(),
        )


def _slot(read: Conditioned, row: Tensor, column: Tensor) -> Tensor:
    """Where tokens stand in what the LM reads."""
    return column if read.slots is None else read.slots.own[row, column]


def _editing(
    edit: Edit, read: Conditioned, row: Tensor, column: Tensor, scenes: np.ndarray
) -> Callable[..., Tensor]:
    def change(activation: Tensor, hook: object = None) -> Tensor:
        changed = activation.clone()
        flat = changed.flatten(2)
        for distance in edit.distances:
            at = row, _slot(read, row, column - (distance - 1))
            flat[at] = edit.change(flat[at], scenes, distance).to(flat.dtype)
        return flat.view_as(activation)

    return change
