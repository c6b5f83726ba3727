"""Controls for what accuracy alone does not show: a control task, and the code length of the labels.

Control task (Hewitt and Liang 2019, arXiv 1909.03368): random labels that are tied to tokens, so that a probe
can only predict them by memorising tokens. Selectivity is the accuracy less that on the control task.

Online code length (Voita and Titov 2020, arXiv 2003.12298, section 3.2.2): the bits per label that it takes
to transmit the labels to someone who has the activations. Labels are sent block by block, the first with the
uniform code, log2(classes) bits per label, each other one with a probe fitted on all blocks before it. A
probe that needs many examples to predict a label pays for them.

The penalty is a Gaussian prior of the weights. Its precision, l2 times the number of examples, is the same on
every prefix: with l2 itself the same, codes were 0.01 to 0.9 bits longer, some longer than the uniform one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from probekit.data.corpus import Corpus
from probekit.data.tokenizer import vocabulary_size
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import prior_log_probabilities
from probekit.probing.solvers.base import expand_labels, losses
from probekit.probing.solvers.softmax import SoftmaxProbes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Where blocks end, as shares of the examples: those of the paper."""


def control_labels(corpus: Corpus, positions: np.ndarray, prior: ArrayLike, seed: int) -> NDArray[np.int64]:
    """A random class for each position, see `control_draws`, of probabilities `[classes]`; `[rows]`."""
    draws = control_draws(corpus, positions, seed)
    return np.searchsorted(np.cumsum(np.asarray(prior, np.float64))[:-1], draws, side="right")


def control_numbers(corpus: Corpus, positions: np.ndarray, numbers: ArrayLike, seed: int) -> NDArray[Any]:
    """A random one of some numbers, or rows of vectors, for each position `[rows]`, see `control_draws`."""
    known = np.sort(np.asarray(numbers))
    return known[(control_draws(corpus, positions, seed) * len(known)).astype(np.int64)]


def control_draws(corpus: Corpus, positions: np.ndarray, seed: int) -> NDArray[np.float64]:
    """A random draw from 0 to 1 for each position, tied to the last token that holds a letter or a digit.

    The token at the position itself would not do: right before a sentence it is nearly always a full stop.
    A token's draw depends on the token and the seed, not on which positions are asked for.

    Args:
        corpus: The corpus.
        positions: Where activations are read, in `corpus.tokens` `[rows]`.
        seed: Seed of the draws.

    Returns:
        Draws `[rows]`. Where the document holds no letter or digit up to the position, the draw is that of
        the position's own token.
    """
    word_like = word_like_tokens(corpus.tokenizer)
    positions = np.asarray(positions, np.int64)
    first = corpus.document_tokens[np.searchsorted(corpus.document_tokens, positions, side="right") - 1]
    found, current = positions.copy(), positions.copy()
    searching = np.arange(len(positions))
    while len(searching):
        hit = word_like[corpus.tokens[current[searching]]]
        found[searching[hit]] = current[searching[hit]]
        current[searching] -= 1
        searching = searching[~hit & (current[searching] >= first[searching])]
    return np.random.default_rng(seed).random(len(word_like))[corpus.tokens[found]]


@lru_cache(maxsize=4)
def word_like_tokens(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Whether each token holds a letter or a digit; special tokens do not `[vocabulary]`."""
    tokens = range(vocabulary_size(tokenizer))
    texts = tokenizer.batch_decode([[token] for token in tokens])
    word_like = np.array([any(map(str.isalnum, text)) for text in texts])
    word_like[tokenizer.all_special_ids] = False
    return word_like


def block_ends(documents: np.ndarray, shares: Sequence[float] = SHARES) -> list[int]:
    """Numbers of examples after which a block ends: the first end of a document at or after each share.

    Args:
        documents: Document of each example, in the order in which labels are sent `[examples]`.
        shares: Shares of the examples, increasing to 1.

    Raises:
        ProbekitError: The examples of a document are not together.
    """
    ends = np.append(np.flatnonzero(np.diff(documents)) + 1, len(documents))
    if len(ends) != len(np.unique(documents)):
        raise ProbekitError(f"{len(np.unique(documents))} documents come in {len(ends)} pieces: sort them")
    wanted = np.ceil(np.round(np.asarray(shares) * len(documents), 6))
    return np.unique(ends[np.searchsorted(ends, wanted)]).tolist()


def prior_code(labels: np.ndarray, classes: int, ends: Sequence[int]) -> float:
    """The code length in bits per example without activations: each block is sent with the shares before it.

    Args:
        labels: Classes in the order in which they are sent `[examples]`.
        classes: Number of classes.
        ends: See `prequential_code`.
    """
    bits = ends[0] * math.log2(classes)
    for end, next_end in pairwise(ends):
        bits -= prior_log_probabilities(labels[:end], classes)[labels[end:next_end]].sum() / math.log(2)
    return float(bits / len(labels))


def prequential_code(
    X: Tensor,
    y: Tensor,
    classes: int,
    l2: Tensor,
    ends: Sequence[int],
    max_iterations: int = 200,
    tolerance: float = 1e-4,
) -> Tensor:
    """Code length of the labels with softmax probes, in bits per example `[probes]`.

    Args:
        X: Activations in the order in which labels are sent, [probes, examples, width].
        y: Classes, [probes, examples] or [examples]; int64.
        classes: Number of classes.
        l2: Penalty of each probe for a fit on all examples, [probes].
        ends: Numbers of examples after which a block ends, increasing to all of them; see `block_ends`.
        max_iterations: As in `SoftmaxProbes`.
        tolerance: As in `SoftmaxProbes`.

    Raises:
        ProbekitError: The ends do not increase to the number of examples.
    """
    y = expand_labels(X, y, classes)
    examples = X.shape[1]
    if not all(0 < a < b for a, b in pairwise(ends)) or list(ends)[-1:] != [examples]:
        raise ProbekitError(f"block ends are {list(ends)}; they must increase to the {examples} examples")
    bits = [torch.full((len(X),), ends[0] * math.log2(classes), dtype=torch.float64, device=X.device)]
    for end, next_end in pairwise(ends):
        before = X[:, :end], y[:, :end], classes, l2 * (examples / end)
        probes = SoftmaxProbes([1.0], max_iterations, tolerance).fit_at(*before)
        nats = losses(X[:, end:next_end], y[:, end:next_end], probes.coef_, probes.intercept_)
        bits.append(nats.double().sum(1) / math.log(2))
    return torch.stack(bits, 1).sum(1) / examples
