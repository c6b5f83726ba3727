"""ROUGE-2 and MAUVE against cases worked by hand, closed forms and the libraries of their authors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy.integrate import quad

from probekit.errors import ProbekitError
from probekit.generation.metrics import (
    CLUSTERINGS,
    LEAST_TEXTS,
    Clustered,
    cluster_texts,
    mauve_interval,
    mauve_of_histograms,
    principal_components,
    rouge2,
)

HISTOGRAMS = st.lists(st.integers(0, 30), min_size=4, max_size=4).filter(any)


def features(seed: int, texts: int = 120, shift: float = 0.0, width: int = 12) -> np.ndarray:
    """Features whose directions differ in scale, as those of an LM do."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(texts, width)) * np.linspace(2.0, 0.1, width) + shift


# ROUGE-2


def test_rouge2_by_hand():
    # Of five pairs and six, both have the-cat, on-the and the-mat.
    value = rouge2("The cat sat on the mat.", "The cat lay on the mat now.")
    assert value == pytest.approx(2 * (3 / 5) * (3 / 6) / (3 / 5 + 3 / 6))


def test_a_pair_counts_as_often_as_both_have_it():
    assert rouge2("a b a b", "a b x a b x a b") == pytest.approx(2 * (2 / 3) * (2 / 7) / (2 / 3 + 2 / 7))


@pytest.mark.parametrize("text", ["", " \n", "word", "?!"])
def test_a_text_without_pairs_has_none(text: str):
    assert rouge2("Two words here", text) == rouge2(text, "Two words here") == 0.0


def test_words_are_not_stemmed():
    assert rouge2("running dogs", "run dog") == 0.0


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_rouge2_of_english_text_is_the_librarys(true: str, generated: str):
    expected = RougeScorer(["rouge2"]).score(true, generated)["rouge2"].fmeasure
    assert rouge2(true, generated) == expected


@pytest.mark.parametrize("text", ["Кошка сидела на коврике.", "猫坐在垫子上。", "बिल्ली चटाई पर बैठी थी।"])
def test_rouge2_reads_every_script(text: str):
    assert rouge2(text, text) == 1.0


# MAUVE of histograms


def test_equal_histograms():
    assert mauve_of_histograms([3, 0, 5, 2], [6, 0, 10, 4]) == pytest.approx(1.0)


def test_disjoint_histograms_have_a_closed_form():
    # KL(p | r) = -log w and KL(q | r) = -log(1 - w): the curve is x = (1 - w)^5, y = w^5.
    area, _ = quad(lambda w: w**5 * 5 * (1 - w) ** 4, 0, 1)
    assert area == pytest.approx(5 * math.factorial(5) * math.factorial(4) / math.factorial(10))
    assert mauve_of_histograms([4, 1, 0, 0], [0, 0, 2, 2]) == pytest.approx(area, rel=0.05)
    assert area < 0.005


@given(HISTOGRAMS, HISTOGRAMS)
def test_mauve_is_symmetric_and_a_share(first: list[int], second: list[int]):
    value = mauve_of_histograms(first, second)
    assert value == pytest.approx(mauve_of_histograms(second, first))
    assert 0.003 < value < 1 + 1e-9


def test_many_histograms_at_once():
    generator = np.random.default_rng(0)
    first, second = generator.integers(1, 9, size=(2, 3, 5, 7))
    together = mauve_of_histograms(first, second)
    assert together.shape == (3, 5)
    assert together[1, 2] == pytest.approx(float(mauve_of_histograms(first[1, 2], second[1, 2])))


def test_the_nearer_the_higher():
    values = [mauve_of_histograms([10, 10], [10 + d, 10 - d]) for d in range(11)]
    assert (np.diff(values) < 0).all()


# MAUVE of texts, beside the authors' own code


def test_equals_the_authors_code_on_its_own_clusters():
    authors = pytest.importorskip("mauve.compute_mauve")
    found = authors.compute_mauve(features(0), features(1, shift=0.3), verbose=False)
    own = mauve_of_histograms(found.p_hist, found.q_hist)
    assert own == pytest.approx(found.mauve, abs=1e-9)
    assert 0.1 < own < 0.99


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.3, 1.0])
def test_is_close_to_the_authors_code_on_the_same_features(shift: float):
    """K-means finds other clusters with every seed: ours lies within what its seeds give, and a bit."""
    authors = pytest.importorskip("mauve.compute_mauve")
    first, second = features(0, 400), features(1, 400, shift=shift)
    theirs = [authors.compute_mauve(first, second, verbose=False, seed=s).mauve for s in range(5)]
    ours = cluster_texts(first, second, 0).mauve
    assert ours == pytest.approx(np.mean(theirs), abs=0.01 + 2 * np.std(theirs))


def test_reduces_as_the_authors_code_does():
    from sklearn.decomposition import PCA

    data = features(2)
    expected = PCA(n_components=0.9, svd_solver="full").fit_transform(data)
    found = principal_components(data)
    assert found.shape == expected.shape
    assert np.abs(found) == pytest.approx(np.abs(expected))


def test_texts_that_are_the_same_and_texts_that_are_not():
    assert cluster_texts(features(0), features(0), 0).mauve == pytest.approx(1.0)
    assert cluster_texts(features(0), features(0, shift=50.0), 0).mauve < 0.01
    alike = [cluster_texts(features(s, 500), features(100 + s, 500), s).mauve for s in range(3)]
    assert min(alike) > 0.9


def test_texts_without_any_feature_are_all_alike():
    assert cluster_texts(np.zeros((60, 4)), np.zeros((60, 4)), 0).mauve == pytest.approx(1.0)


def test_a_cluster_for_every_ten_texts_of_the_smaller_sample():
    clustered = cluster_texts(features(0, 74), features(1, 200), 0)
    assert clustered.clusters == 7
    assert (clustered.first.shape, clustered.second.shape) == ((CLUSTERINGS, 74), (CLUSTERINGS, 200))
    for first, second in zip(clustered.first, clustered.second, strict=True):
        assert {*first, *second} == set(range(7))


def test_mauve_is_the_mean_over_clusterings():
    clustered = cluster_texts(features(0), features(1, shift=0.3), 0)
    each = [
        mauve_of_histograms(np.bincount(a, minlength=12), np.bincount(b, minlength=12))
        for a, b in zip(clustered.first, clustered.second, strict=True)
    ]
    assert clustered.mauve == pytest.approx(np.mean(each))
    assert np.std(each) > 0.01


def test_the_same_seed_gives_the_same_clusters():
    first, again = (cluster_texts(features(0), features(1), 3) for _ in range(2))
    assert (first.first == again.first).all()
    assert (first.second == again.second).all()


def test_too_few_texts_are_refused():
    with pytest.raises(ProbekitError, match=r"MAUVE needs 50 texts on either side, and there are 49"):
        cluster_texts(features(0, 200), features(1, LEAST_TEXTS - 1), 0)


# Its interval


def drawn(generator: np.random.Generator, shares: np.ndarray, texts: int) -> np.ndarray:
    return generator.choice(len(shares), size=texts, p=shares)


def test_the_interval_covers_what_samples_of_that_size_give_on_average():
    p, q = np.full(6, 1 / 6), np.array([0.3, 0.25, 0.2, 0.15, 0.06, 0.04])
    generator = np.random.default_rng(0)
    samples = [Clustered(drawn(generator, p, 80)[None], drawn(generator, q, 80)[None], 6) for _ in range(300)]
    expected = np.mean([sample.mauve for sample in samples])
    intervals = [mauve_interval([sample], resamples=200, seed=1) for sample in samples]
    assert 0.9 < np.mean([i.low <= expected <= i.high for i in intervals]) <= 0.99
    assert all(0 <= i.low <= i.value <= i.high <= 1 for i in intervals)
    assert {i.documents for i in intervals} == {80}


def test_seeds_share_their_true_texts():
    """More seeds narrow the interval only by what the generated side adds to it."""
    generator = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.1, 0.1]), np.full(4, 0.25)
    true = drawn(generator, q, 100)
    many = [Clustered(drawn(generator, p, 100)[None], true[None], 4) for _ in range(20)]
    single = [mauve_interval([m], resamples=500, seed=0) for m in many]
    together = mauve_interval(many, resamples=500, seed=0)
    width = np.mean([i.high - i.low for i in single])
    # The true side's share of the variance stays; draws of its own would leave 1 / sqrt(20) = 0.22.
    assert 0.5 < (together.high - together.low) / width < 0.95
    assert together.value == pytest.approx(np.mean([m.mauve for m in many]))
