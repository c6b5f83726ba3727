"""The next sentence written anew under an edit, and the action that it then has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from probekit.config import GenerationSettings
from probekit.corpus.examples import IGNORE, Batch, Windows
from probekit.evaluation.action_metrics import NO_ACTION
from probekit.evaluation.drafts import Draft
from probekit.evaluation.sampling import draw
from probekit.evaluation.text_actions import Labeller
from probekit.interventions.effects import Edit, Stage
from probekit.run import Run

MOST_TOKENS = 24
"""A sentence that is not over after so many tokens is cut."""

DRAWN = GenerationSettings(temperature=1.0, top_k=None, top_p=None)
"""Tokens are drawn as the LM has them."""


class Writer:
    """Writes the next sentence of some scenes anew.

    The edit holds its positions while the text grows, and every token reads the whole window again. What is
    drawn for a scene depends on the seed and its number alone, so that edits are compared on equal draws.

    Args:
        run: The run.
        stage: What runs its LM on the scenes.
        count: Of how many scenes, the first ones.
        window: Tokens that are read at once.
    """

    def __init__(self, run: Run, stage: Stage, count: int, window: int) -> None:
        self._run, self._stage = run, stage
        self._rows = np.arange(min(count, len(stage.scenes)))
        self._labeller = Labeller(run)
        self._most = min(MOST_TOKENS, window - int(stage.scenes.column[self._rows].max()))
        special = {*run.corpus.tokenizer.all_special_ids}
        self._drawable = torch.tensor([n not in special for n in range(len(run.corpus.tokenizer))])

    def actions(self, edit: Edit | None = None) -> np.ndarray:
        """The action of the sentence that is written in each scene `[scenes]`; none for a blank one."""
        written = [text for rows in self._stage.batches(self._rows) for text in self._write(rows, edit)]
        contexts = [self._context(row) for row in self._rows.tolist()]
        cut = self._labeller.cut(written, [self._most], contexts)[self._most]
        return np.array([own[0] if len(own) else NO_ACTION for own in cut.actions], np.int64)

    def _context(self, row: int) -> np.ndarray:
        """The tokens of a scene's window before the boundary, without the separator."""
        corpus, scenes = self._run.corpus, self._stage.scenes
        start = scenes.windows.start[row]
        end = start + scenes.column[row] + 1
        first = start + (start == corpus.document_tokens[scenes.windows.document[row]])
        return np.asarray(corpus.tokens[first:end], dtype=np.int64)

    def _write(self, rows: np.ndarray, edit: Edit | None) -> list[np.ndarray]:
        """The tokens of the next sentence of some scenes."""
        corpus, column = self._run.corpus, torch.from_numpy(self._stage.scenes.column[rows])
        drafts = [
            Draft([corpus.separator, *self._context(row)], corpus.tokenizer, self._run.config.corpus.language)
            for row in rows.tolist()
        ]
        going = list(range(len(rows)))
        uniforms = np.stack(
            [np.random.default_rng([self._run.config.seed, row]).random(self._most) for row in rows]
        )
        batch = self._begun(rows)
        for step in range(self._most):
            part = _first(batch, int(column.max()) + step + 1)
            seen = self._stage.predict(part, rows, edit)
            logits = seen.logits[torch.arange(len(rows)), column + step]
            tokens = self._drawn(logits.float(), torch.from_numpy(uniforms[:, step]))
            for number in going:
                drafts[number].text.tokens.append(int(tokens[number]))
                drafts[number].read()
            going = [n for n in going if len(drafts[n].sentences) <= drafts[n].first]
            if not going or step + 1 == self._most:
                break
            batch.tokens[torch.arange(len(rows)), column + step + 1] = tokens
        return [np.array(draft.written, dtype=np.int64) for draft in drafts]

    def _begun(self, rows: np.ndarray) -> Batch:
        """The windows up to the boundary, with room for the sentence, which every new token belongs to."""
        scenes = self._stage.scenes
        column = scenes.column[rows]
        windows = scenes.windows[rows]
        batch = self._stage.read(Windows(windows.document, windows.start, column + 1, column + 1))
        device = batch.tokens.device
        more = (0, int(column.max()) + self._most - batch.tokens.shape[1])
        at = torch.from_numpy(column).to(device)[:, None]
        tokens, sentence = (torch.nn.functional.pad(part, more) for part in (batch.tokens, batch.sentence))
        behind = torch.arange(tokens.shape[1], device=device) > at
        sentence = torch.where(behind, batch.sentence.gather(1, at), sentence)
        return replace(batch, tokens=tokens, sentence=sentence, targets=torch.full_like(tokens, IGNORE))

    def _drawn(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """A token of each scene; special ones and rows of the embedding that no token has are never drawn."""
        drawable = self._drawable[: logits.shape[1]].to(logits.device)
        known = logits[:, : len(drawable)].masked_fill(~drawable, -torch.inf)
        return draw(known, uniforms.to(logits.device), DRAWN)


def _first(batch: Batch, length: int) -> Batch:
    """A batch's first positions; what is written into its tokens is seen."""
    parts = {name: getattr(batch, name)[:, :length] for name in ("tokens", "sentence", "targets")}
    return replace(batch, **parts)
