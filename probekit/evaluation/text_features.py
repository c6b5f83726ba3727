"""What MAUVE compares texts by: the mean of the base LM's last hidden states over a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from probekit.devices import autocast
from probekit.progress import Task
from probekit.run import Run

LOCATION = "ln_final.hook_out"
"""Behind the last block and the last normalisation."""

FEATURES = "last hidden state of the run's base LM (behind the last normalisation), mean over tokens"


def text_features(run: Run, texts: Sequence[np.ndarray], window: int, task: Task) -> np.ndarray:
    """Features of texts `[texts, width]`.

    A text is read in windows that do not overlap, the separator before its first token, so that a text
    without tokens has features too.

    Args:
        run: Its base LM reads.
        texts: Tokens of each text, without the separator.
        window: Tokens that the LM reads at once.
        task: Advanced by each text.
    """
    road, size = run.forward_pass((LOCATION,)), run.config.evaluation.batch_size
    sums = np.zeros((len(texts), run.locations[LOCATION]))
    for start in range(0, len(texts), size):
        rows: list[int] = []
        windows: list[list[int]] = []
        for row, ids in enumerate(texts[start : start + size], start):
            read = [run.corpus.separator, *ids.tolist()]
            windows += [read[at : at + window] for at in range(0, len(read), window)]
            rows += [row] * (len(windows) - len(rows))
        seen: list[Tensor] = []
        tokens, there = _padded(windows, run.corpus.separator)
        with torch.no_grad(), autocast(run.device, run.config.training.precision):
            road(tokens.to(run.device), [(LOCATION, seen.append)], 1)
        np.add.at(sums, rows, (seen[0].float().cpu() * there[..., None]).sum(dim=1).double().numpy())
        task.advance(len(texts[start : start + size]))
    return sums / np.array([[1 + len(ids)] for ids in texts])


def _padded(windows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Windows padded at the end, which a causal LM's earlier states do not see, and what is no padding."""
    longest = max(map(len, windows))
    tokens = torch.tensor([[*ids, *[padding] * (longest - len(ids))] for ids in windows])
    lengths = torch.tensor([[len(ids)] for ids in windows])
    return tokens, torch.arange(longest) < lengths
