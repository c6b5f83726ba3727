"""What an intervention does: the LM is run on the same scenes with and without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.config import VariantName
from probekit.data.corpus import Corpus
from probekit.data.windows import Batch, Windows, collate
from probekit.distributed import autocast
from probekit.errors import ProbekitError
from probekit.models.conditioning import Conditioned
from probekit.models.language_model import Hook, hook_name
from probekit.models.mixing import Fixed, Mixing, Uniform, evaluation_mixing
from probekit.models.planner_lm import token_losses
from probekit.probing.activations import HookPoint
from probekit.probing.results import LinearProbe
from probekit.run.run import Run


@dataclass(frozen=True)
class Scenes:
    """One boundary of each document; the sentence that begins there is the *next* one.

    Attributes:
        windows: What is read around each boundary, all of it scored `[scenes]`.
        column: In the window, the position that predicts the next sentence's first token `[scenes]`.
        last: The position that predicts the next sentence's last token, or the window's last one `[scenes]`.
        sentence: The next sentence, in the corpus `[scenes]`.
        action: Its action `[scenes]`.
    """

    windows: Windows
    column: np.ndarray
    last: np.ndarray
    sentence: np.ndarray
    action: np.ndarray

    def __len__(self) -> int:
        return len(self.column)


def draw_scenes(
    corpus: Corpus, documents: np.ndarray, count: int, window: int, reach: int, seed: int
) -> Scenes:
    """Draws documents, and a boundary of each.

    The window begins so that about half of it lies before the boundary. Boundaries that fewer than `reach`
    tokens stand before take no part, nor do documents without another.

    Args:
        corpus: The corpus.
        documents: Numbers of documents.
        count: At most how many.
        window: Tokens that are read at once.
        reach: Tokens before the boundary that are needed.
        seed: Of both draws.

    Raises:
        ProbekitError: A window does not reach so far, or no document has such a boundary.
    """
    if reach > window:
        raise ProbekitError(
            f"intervene.distances has {reach}, but the LM reads {window} tokens at once (evaluation.window); "
            f"give at most {window}"
        )
    generator = np.random.default_rng(seed)
    rows: list[tuple[int, ...]] = []
    for document in generator.permutation(documents):
        if len(rows) == count:
            break
        begin, end = corpus.document_tokens[document : document + 2]
        first, last = corpus.document_sentences[document : document + 2]
        sentences = np.arange(first + 1, last)
        anchors = corpus.first_token[first + 1 : last]
        usable = sentences[anchors - reach > begin]
        if not len(usable):
            continue
        sentence = int(generator.choice(usable))
        anchor = int(corpus.first_token[sentence])
        behind = int(corpus.first_token[sentence + 1]) if sentence + 1 < last else int(end)
        start = max(int(begin), anchor - max(window // 2, reach))
        length = min(window, int(end) - 1 - start)
        column = anchor - 1 - start
        rows.append((document, start, length, column, min(behind - 2 - start, length - 1), sentence))
    if not rows:
        raise ProbekitError(
            f"no test document has a sentence that begins behind its first {reach} tokens; lower "
            "intervene.distances"
        )
    document, start, length, column, stop, sentence = np.array(sorted(rows), dtype=np.int64).T
    windows = Windows(document, start, length, length)
    return Scenes(windows, column, stop, sentence, corpus.actions[sentence].astype(np.int64))


Change = Callable[[Tensor, np.ndarray, int], Tensor]
"""Activations of some scenes `[scenes, width]`, their numbers, and the distance; gives what stands there
instead."""


@dataclass(frozen=True)
class Edit:
    """An intervention: at one place, at some distances before every boundary.

    Attributes:
        place: The location and layer; None: the embedding that is mixed for the next sentence, before the
            adapter projects it.
        distances: At which positions, in tokens before the next sentence's first one.
        change: What is made of the activations there.
    """

    place: HookPoint | None
    distances: tuple[int, ...]
    change: Change


@dataclass(frozen=True)
class Outcomes:
    """What was seen of each scene.

    Attributes:
        next_loss: Loss of the next sentence, summed, in nats `[scenes]`.
        next_tokens: Its tokens `[scenes]`.
        first_loss: Loss of the first of them `[scenes]`.
        other_loss: The same of the tokens behind it `[scenes]`.
        other_tokens: How many these are, none where the sentence is the last `[scenes]`.
        first: Log-probabilities of the next sentence's first token `[scenes, vocabulary]`.
        readout: Log-probabilities of its action, as a probe reads them in the last layer `[scenes, actions]`.
        moved: By how much activations were changed, the norm summed over distances `[scenes]`.
        norm: The norm that they had, summed in the same way `[scenes]`.
    """

    next_loss: np.ndarray
    next_tokens: np.ndarray
    first_loss: np.ndarray
    other_loss: np.ndarray
    other_tokens: np.ndarray
    first: np.ndarray
    readout: np.ndarray
    moved: np.ndarray
    norm: np.ndarray


class Seen:
    """What is seen of one forward pass over some scenes.

    Attributes:
        logits: Of the token behind every position `[scenes, positions, vocabulary]`.
        readout: The activation that the readout's probe reads `[scenes, width]`.
        moved: As `Outcomes` has it `[scenes]`.
        norm: The same.
    """

    def __init__(self, scenes: int) -> None:
        self.logits = self.readout = torch.zeros(0)
        self.moved, self.norm = torch.zeros(2, scenes, dtype=torch.double)

    def edited(self, before: Tensor, after: Tensor) -> None:
        """Takes note of activations `[scenes, width]` before and after they are changed at a distance."""
        # Squares that overflow in float32 do so in the LM, whose norm layers would hide it.
        self.moved += (after.float() - before.float()).square().sum(-1).sqrt().cpu()
        self.norm += before.float().square().sum(-1).sqrt().cpu()


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
        places: Sequence[HookPoint],
        readout: tuple[HookPoint, LinearProbe],
    ) -> None:
        self._run, self.scenes = run, scenes
        self._model = run.model(variant)
        self._mixing = evaluation_mixing(variant)
        self._corpus = run.corpus_of(variant)
        self._readout = readout
        names = [hook_name(*place) for place in (*places, readout[0])]
        self._backend = run.forward_pass(list(dict.fromkeys([*names, *self._model.names])), variant)
        self._probe = LinearProbe(*(part.to(run.device) for part in (readout[1].coef, readout[1].intercept)))

    @property
    def codebook(self) -> Tensor | None:
        """The embeddings of actions that the LM was told in training `[actions, dimensions]`, if any."""
        adapter = self._model.adapter
        return None if adapter is None or isinstance(self._mixing, Fixed | Uniform) else adapter.codebook

    def play(self, edit: Edit | None = None) -> Outcomes:
        """Runs all scenes, with an edit or without."""
        parts = [self._outcomes(rows, edit) for rows in self.batches(np.arange(len(self.scenes)))]
        return Outcomes(
            *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Outcomes))
        )

    def activations(self, place: HookPoint, distances: Sequence[int]) -> Tensor:
        """What stands at a place before every boundary `[distances, scenes, width]`."""
        seen: list[Tensor] = []

        def keep(activations: Tensor, scenes: np.ndarray, distance: int) -> Tensor:
            seen.append(activations.clone())
            return activations

        parts = []
        for rows in self.batches(np.arange(len(self.scenes))):
            seen.clear()
            self.predict(self.read(self.scenes.windows[rows]), rows, Edit(place, tuple(distances), keep))
            parts.append(torch.stack(seen))
        return torch.cat(parts, dim=1)

    def batches(self, rows: np.ndarray) -> list[np.ndarray]:
        """Scenes that are run together."""
        size = self._run.config.evaluation.batch_size
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def read(self, windows: Windows) -> Batch:
        """Windows of the corpus as the variant reads them."""
        return collate(self._corpus, windows).to(self._run.device)

    @torch.no_grad()
    def predict(self, batch: Batch, rows: np.ndarray, edit: Edit | None) -> Seen:
        """One forward pass.

        Args:
            batch: Windows that begin as those of the scenes do, and go on at least to the boundary.
            rows: Which scenes they are.
            edit: What is changed.
        """
        device, seen = self._run.device, Seen(len(rows))
        column = torch.from_numpy(self.scenes.column[rows]).to(device)
        row = torch.arange(len(rows), device=device)
        mixing: Mixing = self._mixing
        if edit is not None and edit.place is None:
            # The scenes are of different documents: no two have this sentence.
            mixing = _Replanned(mixing, edit, batch.sentence[row, column], rows, seen)
        read = self._model.conditioned(batch, mixing)

        def look(activation: Tensor, hook: object = None) -> None:
            seen.readout = activation.flatten(2)[row, _slot(read, row, column)].float()

        hooks: list[Hook] = [*read.hooks]
        if edit is not None and edit.place is not None:
            hooks.append((hook_name(*edit.place), _editing(edit, read, (row, column), rows, seen)))
        hooks.append((hook_name(*self._readout[0]), look))
        with autocast(device, self._run.config.training.precision):
            logits = self._backend.logits(read.tokens, hooks, read.positions)
        seen.logits = logits if read.slots is None else read.slots.predictions(logits)
        return seen

    def _outcomes(self, rows: np.ndarray, edit: Edit | None) -> Outcomes:
        batch = self.read(self.scenes.windows[rows])
        seen = self.predict(batch, rows, edit)
        losses = token_losses(seen.logits, batch.targets).double().cpu().numpy()
        positions = np.arange(losses.shape[1])
        column, last = (part[rows][:, None] for part in (self.scenes.column, self.scenes.last))
        inside = positions < self.scenes.windows.length[rows][:, None]
        of_next = (positions >= column) & (positions <= last)
        others = (positions > last) & inside
        first = seen.logits[np.arange(len(rows)), self.scenes.column[rows]].float()
        return Outcomes(
            np.where(of_next, losses, 0.0).sum(1),
            of_next.sum(1),
            losses[np.arange(len(rows)), self.scenes.column[rows]],
            np.where(others, losses, 0.0).sum(1),
            others.sum(1),
            first.log_softmax(dim=-1).cpu().numpy(),
            self._probe.log_probabilities(seen.readout).cpu().numpy(),
            seen.moved.numpy(),
            seen.norm.numpy(),
        )


class _Replanned:
    """A mixing, but with an edit of the next sentences' embeddings."""

    def __init__(self, mixing: Mixing, edit: Edit, at: Tensor, scenes: np.ndarray, seen: Seen) -> None:
        self.needs_scores = mixing.needs_scores
        self._mixing, self._edit, self._at = mixing, edit, at
        self._scenes, self._seen = scenes, seen

    def __call__(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Any) -> Tensor:
        """Mixes as `Mixing` has it."""
        embeddings = self._mixing(scores, actions, codebook, temperature).clone()
        before = embeddings[self._at]
        (distance,) = self._edit.distances
        embeddings[self._at] = self._edit.change(before, self._scenes, distance)
        self._seen.edited(before, embeddings[self._at])
        return embeddings


def _slot(read: Conditioned, row: Tensor, column: Tensor) -> Tensor:
    """Where tokens stand in what the LM reads."""
    return column if read.slots is None else read.slots.own[row, column]


def _editing(
    edit: Edit, read: Conditioned, at: tuple[Tensor, Tensor], scenes: np.ndarray, seen: Seen
) -> Callable[..., Tensor]:
    row, column = at

    def change(activation: Tensor, hook: object = None) -> Tensor:
        flat = activation.clone().flatten(2)
        for distance in edit.distances:
            place = row, _slot(read, row, column - (distance - 1))
            before = flat[place]
            flat[place] = edit.change(before, scenes, distance).to(flat.dtype)
            seen.edited(before, flat[place])
        return flat.view_as(activation)

    return change
