"""The words that name an action."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import CountVectorizer

from probekit.data.encoders import WORD


def telling_words(sentences: Sequence[str], labels: np.ndarray, k: int, words: int = 3) -> list[list[str]]:
    """The words that set the sentences of each action apart from those of all others, the strongest first.

    Class-based TF-IDF (Grootendorst 2022, arXiv 2203.05794): the root of a word's share of the action's
    words, times log(1 + words in an action on average / occurrences of the word). The root keeps words that
    occur in every action from the top.

    Args:
        sentences: Texts.
        labels: Integers [sentences], each sentence's action.
        k: Number of actions.
        words: Words wanted for each action; one whose sentences have fewer gets fewer.
    """
    vectorizer = CountVectorizer(tokenizer=WORD.findall, token_pattern=None, lowercase=True)
    try:
        counts = vectorizer.fit_transform(sentences)
    except ValueError:  # no sentence has a word
        return [[] for _ in range(k)]
    one_hot = csr_array((np.ones(len(labels)), (labels, np.arange(len(labels)))), (k, len(labels)))
    by_action = csr_array(one_hot @ counts)
    rarity = np.log1p(by_action.sum() / k / by_action.sum(axis=0))
    vocabulary = vectorizer.get_feature_names_out()
    found = []
    for start, stop in pairwise(by_action.indptr):
        occurrences, word = by_action.data[start:stop], by_action.indices[start:stop]
        weights = np.sqrt(occurrences / max(1, occurrences.sum())) * rarity[word]
        order = np.lexsort((word, -weights))[:words]
        found.append(vocabulary[word[order]].tolist())
    return found
