"""Out-of-fold scores: training documents scored by planners that have not seen them.

A planner knows its training documents better than new ones. On a small corpus an LM that is trained on such
scores learns to trust the planner too much.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from probekit.corpus.examples import Batch
from probekit.corpus.store import Corpus
from probekit.errors import ProbekitError
from probekit.models.planner import Planner


def fold_of_documents(corpus: Corpus, folds: int, seed: int) -> np.ndarray:
    """The fold of every document, -1 for those that are not for training `[documents]`.

    Documents with the same tokens are in the same fold.

    Raises:
        ProbekitError: There are fewer distinct training documents than folds.
    """
    train = corpus.documents("train")
    bounds = zip(corpus.document_tokens[train], corpus.document_tokens[train + 1], strict=True)
    digests = [_digest(corpus.tokens[start:stop]) for start, stop in bounds]
    distinct, number = np.unique(np.array(digests, dtype="S16"), return_inverse=True)
    if folds > len(distinct):
        raise ProbekitError(
            f"training.planner.folds is {folds}, but there are {len(distinct)} distinct training documents; "
            f"set it to {len(distinct)} or less"
        )
    found = np.full(len(corpus.split), -1)
    found[train] = (np.random.default_rng(seed).permutation(len(distinct)) % folds)[number]
    return found


class OutOfFold:
    """Scores every training document by the planner of its fold.

    Args:
        planners: For every fold, a planner trained on the documents outside it.
        fold: The fold of every document `[documents]`.
    """

    def __init__(self, planners: Sequence[Planner], fold: np.ndarray) -> None:
        self._planners, self._fold = planners, fold

    def scores(self, batch: Batch) -> Tensor:
        """Scores of the touched sentences `[touched, actions]`, each document's from one planner alone."""
        fold = self._fold[batch.documents]
        parts, order = [], []
        with torch.no_grad():
            for number in np.unique(fold):
                rows = np.flatnonzero(fold == number)
                parts.append(self._planners[number](batch.context[torch.from_numpy(rows)]))
                order.append(rows)
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return torch.cat(parts)[back].flatten(0, 1)[batch.touched]


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
