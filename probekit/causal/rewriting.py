"""Writes the next sentence of sentence boundaries anew, under an edit: does its action follow the plan?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from probekit.causal.boundaries import Edit, EditedLM
from probekit.config import GenerationSettings
from probekit.data.windows import IGNORE, Batch, Windows
from probekit.evaluation.action_metrics import NO_ACTION
from probekit.generation.generate import draw
from probekit.generation.labelling import Labeller
from probekit.models.replanning import GenerationState

MAX_TOKENS = 24
"""A sentence that is not finished after so many tokens is cut."""

SAMPLING = GenerationSettings(temperature=1.0, top_k=None, top_p=None)
"""Tokens are drawn from the LM's own distribution."""


class SentenceWriter:
    """Writes the next sentence of some boundaries.

    The edit keeps its positions while the text grows, and every token reads the whole window again. The draws
    of a boundary depend on the seed and its number alone, so that edits are compared on equal draws.

    Args:
        lm: The LM and its boundaries.
        count: How many of the boundaries to use, from the first.
        window: Tokens that the LM reads at once.
    """

    def __init__(self, lm: EditedLM, count: int, window: int) -> None:
        self._lm, self._run, self._labeller = lm, lm.run, Labeller(lm.run)
        self._rows = np.arange(min(count, len(lm.boundaries)))
        self.max_tokens = min(MAX_TOKENS, window - int(lm.boundaries.column[self._rows].max()))
        tokenizer = lm.run.corpus.tokenizer
        special = {*tokenizer.all_special_ids}
        self._drawable = torch.tensor([n not in special for n in range(len(tokenizer))])

    def actions(self, edit: Edit | None = None) -> np.ndarray:
        """The action of the sentence written at each boundary `[boundaries]`; `NO_ACTION` if it is blank."""
        written = [text for rows in self._lm.batches(self._rows) for text in self.write(rows, edit)]
        contexts = [self.context(row) for row in self._rows.tolist()]
        cut = self._labeller.cut(written, [self.max_tokens], contexts)[self.max_tokens]
        return np.array([own[0] if len(own) else NO_ACTION for own in cut.actions], np.int64)

    def context(self, row: int) -> np.ndarray:
        """The tokens of a boundary's window before it, without the separator."""
        corpus, boundaries = self._run.corpus, self._lm.boundaries
        start = boundaries.windows.start[row]
        end = start + boundaries.column[row] + 1
        first = start + (start == corpus.document_tokens[boundaries.windows.document[row]])
        return np.asarray(corpus.tokens[first:end], dtype=np.int64)

    def write(self, rows: np.ndarray, edit: Edit | None) -> list[np.ndarray]:
        """The tokens of the next sentence of some boundaries."""
        corpus, column = self._run.corpus, torch.from_numpy(self._lm.boundaries.column[rows])
        states = [
            GenerationState(
                [corpus.separator, *self.context(row)], corpus.tokenizer, self._run.config.corpus.language
            )
            for row in rows.tolist()
        ]
        seed, unfinished = self._run.config.seed, list(range(len(rows)))
        uniforms = np.stack([np.random.default_rng([seed, row]).random(self.max_tokens) for row in rows])
        batch = self.growing_batch(rows)
        for step in range(self.max_tokens):
            # A view: tokens that are written into the batch are read in the next step.
            length = int(column.max()) + step + 1
            parts = {name: getattr(batch, name)[:, :length] for name in ("tokens", "sentence", "targets")}
            logits, *_ = self._lm.predict(replace(batch, **parts), rows, edit)
            last = logits[torch.arange(len(rows)), column + step].float()
            tokens = self._draw(last, torch.from_numpy(uniforms[:, step]))
            for number in unfinished:
                states[number].text.tokens.append(int(tokens[number]))
                states[number].read()
            unfinished = [n for n in unfinished if len(states[n].sentences) <= states[n].first]
            if not unfinished or step + 1 == self.max_tokens:
                break
            batch.tokens[torch.arange(len(rows)), column + step + 1] = tokens
        return [np.array(state.written, dtype=np.int64) for state in states]

    def growing_batch(self, rows: np.ndarray) -> Batch:
        """The windows up to the boundary, padded for the tokens to be written, all of the next sentence."""
        boundaries, device = self._lm.boundaries, self._lm.device
        column, windows = boundaries.column[rows], boundaries.windows[rows]
        batch = self._lm.read(Windows(windows.document, windows.start, column + 1, column + 1))
        padding = (0, int(column.max()) + self.max_tokens - batch.tokens.shape[1])
        tokens, sentence = (torch.nn.functional.pad(t, padding) for t in (batch.tokens, batch.sentence))
        at = torch.from_numpy(column).to(device)[:, None]
        behind = torch.arange(tokens.shape[1], device=device) > at
        sentence = torch.where(behind, batch.sentence.gather(1, at), sentence)
        return replace(batch, tokens=tokens, sentence=sentence, targets=torch.full_like(tokens, IGNORE))

    def _draw(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """One token each; special tokens and unused rows of the embedding are never drawn."""
        drawable = self._drawable[: logits.shape[1]].to(logits.device)
        allowed = logits[:, : len(drawable)].masked_fill(~drawable, -torch.inf)
        return draw(allowed, uniforms.to(logits.device), SAMPLING)
