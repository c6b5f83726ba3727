"""Sentence boundaries of test documents, and the LM on them with and without edits of activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.causal.variant_lm import FinalProbe, VariantLM
from probekit.config import VariantName
from probekit.data.corpus import Corpus
from probekit.data.windows import Batch, Windows
from probekit.errors import ProbekitError
from probekit.models.backends import Hook
from probekit.models.conditioning import Conditioned
from probekit.models.locations import hook_name
from probekit.models.mixing import Fixed, Mixing, Uniform
from probekit.models.planned_lm import token_losses
from probekit.probing.activations import HookPoint
from probekit.probing.targets import NO_LABEL
from probekit.run.run import Run


@dataclass(frozen=True)
class Boundaries:
    """One sentence boundary of each group of documents; the sentence that begins there is the *next* one.

    Attributes:
        windows: The window around each boundary, all of it scored `[boundaries]`.
        column: In the window, the position that predicts the next sentence's first token `[boundaries]`.
        last: The position that predicts its last token, or the window's last position `[boundaries]`.
        sentence: The next sentence's number in the corpus `[boundaries]`.
        label: Its label `[boundaries]`.
    """

    windows: Windows
    column: np.ndarray
    last: np.ndarray
    sentence: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.column)


def draw_boundaries(
    corpus: Corpus,
    labels: np.ndarray,
    documents: np.ndarray,
    count: int,
    window: int,
    reach: int,
    seed: int,
    *,
    setting: str = "intervene.distances",
) -> Boundaries:
    """Draws documents, at most one of each group, and a sentence boundary of each.

    About half of a window lies before the boundary. Boundaries with fewer than `reach` tokens before them,
    or before a sentence without a label, are left out, and so are documents that have no other.

    Args:
        corpus: The corpus.
        labels: Labels of all its sentences, `NO_LABEL` where there is none `[sentences]`.
        documents: Numbers of the documents to draw from.
        count: How many to draw at most.
        window: Tokens that the LM reads at once.
        reach: Tokens that are needed before the boundary.
        seed: Of both draws.
        setting: What to lower where the window is too short or no document has such a boundary.

    Raises:
        ProbekitError: `reach` exceeds the window, or no document has such a boundary.
    """
    # The first token of a window gives way to the separator.
    room = reach + (corpus.bos_rule == "every-window")
    if room > window:
        raise ProbekitError(
            f"{setting}: a boundary needs {reach} tokens before it, but the LM reads at most "
            f"{window - (room - reach)} of a document at once (evaluation.window)"
        )
    generator = np.random.default_rng(seed)
    rows: list[tuple[int, ...]] = []
    drawn: set[int] = set()
    for document in generator.permutation(documents):
        if len(rows) == count:
            break
        if corpus.group[document] in drawn:
            continue
        begin, end = corpus.document_tokens[document : document + 2]
        first, last = corpus.document_sentences[document : document + 2]
        anchors = corpus.first_token[first + 1 : last]
        labelled = labels[first + 1 : last] != NO_LABEL
        usable = np.arange(first + 1, last)[labelled & (anchors - reach > begin)]
        if not len(usable):
            continue
        sentence = int(generator.choice(usable))
        drawn.add(int(corpus.group[document]))
        anchor = int(corpus.first_token[sentence])
        following = int(corpus.first_token[sentence + 1]) if sentence + 1 < last else int(end)
        start = max(int(begin) + (corpus.bos_rule == "none"), anchor - max(window // 2, room))
        length = min(window, int(end) - 1 - start)
        last_column = min(following - 2 - start, length - 1)
        rows.append((document, start, length, anchor - 1 - start, last_column, sentence))
    if not rows:
        raise ProbekitError(
            f"no test document has a sentence with a label that begins after its first {reach} tokens; lower "
            f"{setting}"
        )
    document, start, length, column, last_column, sentence = np.array(rows, dtype=np.int64).T
    windows = Windows(document, start, length, length)
    return Boundaries(windows, column, last_column, sentence, labels[sentence].astype(np.int64))


Change = Callable[[Tensor, np.ndarray, int], Tensor]
"""Maps activations of some boundaries `[boundaries, width]`, their numbers and the distance to what replaces
these activations."""


@dataclass(frozen=True)
class Edit:
    """A change of activations at one hook point, at some distances before every boundary.

    Attributes:
        point: The location and layer; None for the action embedding that conditions the next sentence, before
            the adapter projects it.
        distances: Tokens before the next sentence's first one.
        change: Computes the new activations.
    """

    point: HookPoint | None
    distances: tuple[int, ...]
    change: Change


@dataclass(frozen=True)
class Outcomes:
    """What the LM makes of every boundary.

    Attributes:
        next_loss: Loss of the next sentence, summed, in nats `[boundaries]`.
        next_tokens: Its number of tokens `[boundaries]`.
        first_loss: Loss of its first token `[boundaries]`.
        other_loss: Summed loss of the tokens after it `[boundaries]`.
        other_tokens: Their number, zero where the window ends with the sentence `[boundaries]`.
        first: Log-probabilities of the next sentence's first token `[boundaries, vocabulary]`.
        label: The final-layer probe's log-probabilities of its label `[boundaries, classes]`.
        moved: Norm of the edit, summed over distances `[boundaries]`.
        norm: Norm of the activations before the edit, summed likewise `[boundaries]`.
    """

    next_loss: np.ndarray
    next_tokens: np.ndarray
    first_loss: np.ndarray
    other_loss: np.ndarray
    other_tokens: np.ndarray
    first: np.ndarray
    label: np.ndarray
    moved: np.ndarray
    norm: np.ndarray


class AppliedEdit:
    """An edit of one batch of boundaries.

    Args:
        edit: The edit, if any.
        rows: The boundaries' numbers.
        column: Their positions in the windows `[boundaries]`.

    Attributes:
        moved: Norm of the edit so far, summed over distances `[boundaries]`.
        norm: Norm of the activations before the edit, summed likewise `[boundaries]`.
    """

    def __init__(self, edit: Edit | None, rows: np.ndarray, column: Tensor) -> None:
        self._edit, self._rows, self._column = edit, rows, column
        self.moved, self.norm = torch.zeros(2, len(rows), dtype=torch.double)

    def mixing(self, mixing: Mixing, batch: Batch) -> Mixing:
        """The mixing that gives the boundaries' next sentences another plan, if that is edited."""
        if self._edit is None or self._edit.point is not None:
            return mixing
        # The boundaries are of different documents: no two of them share their next sentence.
        (distance,) = self._edit.distances
        at = batch.sentence[torch.arange(len(self._rows), device=self._column.device), self._column]
        return _ReplannedMixing(mixing, at, lambda embeddings: self._changed(embeddings, distance))

    def hooks(self, read: Conditioned) -> list[Hook]:
        """The hook that changes activations of windows that are about to be read, if there is one."""
        if self._edit is None or self._edit.point is None:
            return []
        distances = self._edit.distances

        def change(activation: Tensor, hook: object = None) -> Tensor:
            flat = activation.clone().flatten(2)
            for distance in distances:
                at = _before(self._column, distance, read)
                flat[at] = self._changed(flat[at], distance)
            return flat.view_as(activation)

        return [(hook_name(*self._edit.point), change)]

    def _changed(self, before: Tensor, distance: int) -> Tensor:
        assert self._edit is not None  # noqa: S101 - called where there is one
        exact = before.to(torch.promote_types(before.dtype, torch.float32))
        with torch.autocast(before.device.type, enabled=False):  # that is for the LM
            after = self._edit.change(exact, self._rows, distance).to(before.dtype)
        # Squares that overflow in float32 do so in the LM too, whose norm layers would hide it.
        self.moved += (after.float() - before.float()).square().sum(-1).sqrt().cpu()
        self.norm += before.float().square().sum(-1).sqrt().cpu()
        return after


def _before(column: Tensor, distance: int, read: Conditioned) -> tuple[Tensor, Tensor]:
    """Where the LM reads the tokens at a distance before the boundaries."""
    row, at = torch.arange(len(column), device=column.device), column - (distance - 1)
    return row, at if read.slots is None else read.slots.own[row, at]


class EditedLM(VariantLM):
    """A variant of a run's LM that runs on sentence boundaries, with edits.

    Args:
        run: The run; it needs probes of the variant.
        variant: `none`, or a trained variant, conditioned as in evaluation.
        boundaries: Where it runs.
        points: All hook points that will be edited or read.
        final: The variant's final-layer probe, if that has been read.
    """

    def __init__(
        self,
        run: Run,
        variant: VariantName,
        boundaries: Boundaries,
        points: Sequence[HookPoint],
        final: FinalProbe | None = None,
    ) -> None:
        super().__init__(run, variant, final)
        self.boundaries = boundaries
        self.use_hooks([hook_name(*point) for point in points])

    @property
    def codebook(self) -> Tensor | None:
        """The action embeddings that condition the LM `[actions, dimensions]`; None without such."""
        adapter = self.model.adapter
        return None if adapter is None or isinstance(self.mixing, Fixed | Uniform) else adapter.codebook

    def batches(self, rows: np.ndarray) -> list[np.ndarray]:
        """Numbers of boundaries, cut into batches."""
        size = self.run.config.evaluation.batch_size
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def outcomes(self, edit: Edit | None = None) -> Outcomes:
        """Runs all boundaries, with an edit or without."""
        parts = [self._outcomes(rows, edit) for rows in self.batches(np.arange(len(self.boundaries)))]
        return Outcomes(
            *(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Outcomes))
        )

    def activations(self, point: HookPoint, distances: Sequence[int]) -> Tensor:
        """The activations at a hook point before every boundary `[distances, boundaries, width]`."""
        found: list[Tensor] = []

        def keep(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
            found.append(activations.clone())
            return activations

        parts = []
        for rows in self.batches(np.arange(len(self.boundaries))):
            found.clear()
            self.predict(self.read(self.boundaries.windows[rows]), rows, Edit(point, tuple(distances), keep))
            parts.append(torch.stack(found))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def predict(
        self, batch: Batch, rows: np.ndarray, edit: Edit | None
    ) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray]:
        """One forward pass.

        Args:
            batch: Windows that begin as those of the boundaries do and reach them at least.
            rows: The boundaries' numbers.
            edit: The edit, if any.

        Returns:
            Next-token logits `[boundaries, positions, vocabulary]`, the activation that the final-layer probe
            reads `[boundaries, width]`, and `moved` and `norm` of `Outcomes` `[boundaries]`.
        """
        column = torch.from_numpy(self.boundaries.column[rows]).to(self.device)
        applied = AppliedEdit(edit, rows, column)
        states: list[Tensor] = []
        read = self.model.conditioned(batch, applied.mixing(self.mixing, batch))

        def keep_state(activation: Tensor, hook: object = None) -> None:
            states.append(activation.flatten(2)[_before(column, 1, read)].float())

        logits = self.logits(read, [*read.hooks, *applied.hooks(read), (self.probe_hook, keep_state)])
        return logits, states[0], applied.moved.numpy(), applied.norm.numpy()

    def _outcomes(self, rows: np.ndarray, edit: Edit | None) -> Outcomes:
        boundaries, batch = self.boundaries, self.read(self.boundaries.windows[rows])
        logits, state, moved, norm = self.predict(batch, rows, edit)
        losses = token_losses(logits, batch.targets).double().cpu().numpy()
        positions, numbers = np.arange(losses.shape[1]), np.arange(len(rows))
        column, last = boundaries.column[rows], boundaries.last[rows]
        inside = positions < boundaries.windows.length[rows][:, None]
        in_next = (positions >= column[:, None]) & (positions <= last[:, None])
        behind = (positions > last[:, None]) & inside
        return Outcomes(
            next_loss=np.where(in_next, losses, 0.0).sum(1),
            next_tokens=in_next.sum(1),
            first_loss=losses[numbers, column],
            other_loss=np.where(behind, losses, 0.0).sum(1),
            other_tokens=behind.sum(1),
            first=logits[numbers, column].float().log_softmax(dim=-1).cpu().numpy(),
            label=self.probe.log_probabilities(state).cpu().numpy(),
            moved=moved,
            norm=norm,
        )


class _ReplannedMixing(Mixing):
    """A mixing that changes the embeddings of some sentences."""

    def __init__(self, mixing: Mixing, at: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        self.needs_scores = mixing.needs_scores
        self._mixing, self._at, self._change = mixing, at, change

    def _mix(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Any) -> Tensor:
        embeddings = self._mixing(scores, actions, codebook, temperature).clone()
        embeddings[self._at] = self._change(embeddings[self._at])
        return embeddings
