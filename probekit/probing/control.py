"""Control task: labels that tell nothing of what is to come, only of which token was read.

A probe that scores well on random labels tied to tokens has the capacity to memorise; what it scores on the
target beyond that is its selectivity (Hewitt and Liang 2019, "Designing and Interpreting Probes with Control
Tasks", arXiv 1909.03368).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probekit.corpus.store import Corpus
from probekit.errors import ProbekitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def control_labels(corpus: Corpus, positions: np.ndarray, prior: ArrayLike, seed: int) -> NDArray[np.int64]:
    """A random label for each position, tied to the last token that holds a letter or a digit.

    The token at the position itself would not do: right before a sentence it is nearly always a full stop.
    A token's label depends on the token, the prior and the seed, not on which positions are asked for.

    Args:
        corpus: The corpus, whose tokens may be memory-mapped.
        positions: Where activations are read, in `corpus.tokens` `[rows]`.
        prior: Probability of each class, as the target has them `[classes]`.
        seed: Seed of the draws.

    Returns:
        Labels `[rows]`. Where the document holds no letter or digit up to the position, the label is that of
        the position's own token.

    Raises:
        ProbekitError: The prior is no distribution.
    """
    p = np.asarray(prior, np.float64)
    if not (p.ndim == 1 and (p >= 0).all() and np.isclose(p.sum(), 1.0)):
        raise ProbekitError(
            f"the control task's prior sums to {p.sum():g}: it must hold the probability of each class"
        )
    word_like = word_like_tokens(corpus.tokenizer)
    points = np.random.default_rng(seed).random(len(word_like))
    label = np.searchsorted(np.cumsum(p)[:-1], points, side="right")
    return label[corpus.tokens[_last_word_like(corpus, np.asarray(positions, np.int64), word_like)]]


def _last_word_like(
    corpus: Corpus, positions: NDArray[np.int64], word_like: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """The last position with a word-like token at or before each, or the position itself `[rows]`."""
    first = corpus.document_tokens[np.searchsorted(corpus.document_tokens, positions, side="right") - 1]
    found, place = positions.copy(), positions.copy()
    searching = np.arange(len(positions))
    while len(searching):
        hit = word_like[corpus.tokens[place[searching]]]
        found[searching[hit]] = place[searching[hit]]
        place[searching] -= 1
        searching = searching[~hit & (place[searching] >= first[searching])]
    return found


@lru_cache(maxsize=4)
def word_like_tokens(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Whether each token holds a letter or a digit; special tokens do not `[vocabulary]`."""
    tokens = range(max(tokenizer.get_vocab().values()) + 1)
    texts = tokenizer.batch_decode([[token] for token in tokens])
    word_like = np.array([any(map(str.isalnum, text)) for text in texts])
    word_like[tokenizer.all_special_ids] = False
    return word_like
