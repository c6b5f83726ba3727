"""Class-based TF-IDF against brute force."""

from collections import Counter

import numpy as np

from probekit.data.action_words import telling_words
from probekit.data.encoders import WORD


def test_telling_words_are_brute_force_class_based_tfidf():
    sentences = [
        "The cat sat, the cat ran.",
        "The dog ran.",
        "A cat!",
        "The rain; the RAIN fell",
        "...",
        "Rain",
    ]
    labels, k = np.array([0, 0, 0, 2, 2, 2]), 4
    words = [WORD.findall(text.lower()) for text in sentences]
    total = Counter(word for own in words for word in own)
    expected = []
    for action in range(k):
        own = Counter(
            word for label, each in zip(labels, words, strict=True) if label == action for word in each
        )
        weight = {
            word: np.sqrt(count / own.total()) * np.log(1 + total.total() / k / total[word])
            for word, count in own.items()
        }
        expected.append(sorted(weight, key=lambda word, weight=weight: (-weight[word], word))[:2])
    assert telling_words(sentences, labels, k, words=2) == expected
    assert not expected[1]


def test_sentences_without_words_have_no_telling_words():
    assert telling_words(["...", "!"], np.array([0, 1]), 2) == [[], []]
