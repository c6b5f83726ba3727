"""Metrics of written text against cases by hand, closed forms, plain passes and the authors' libraries."""

import math
from functools import cache
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy.integrate import quad

from probekit.config import BosRule
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import Bigram, bigram_of_counts, pair_counts
from probekit.generation.metrics import (
    CLUSTERINGS,
    LEAST_TEXTS,
    Clustered,
    cluster_texts,
    edit_distances,
    latent_losses,
    mauve_interval,
    mauve_of_histograms,
    normalised_edit_distances,
    plans_followed,
    plans_followed_by_chance,
    principal_components,
    rouge2,
    text_features,
)
from probekit.progress import Progress
from probekit.run.run import Run

SEQUENCES = st.lists(st.integers(0, 3), max_size=7)


def arrays(*sequences: list[int]) -> list[np.ndarray]:
    return [np.array(sequence, dtype=np.int64) for sequence in sequences]


def by_recursion(first: list[int], second: list[int]) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = first[i - 1] == second[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (not same))

    return distance(len(first), len(second))


@given(SEQUENCES, SEQUENCES)
def test_edit_distance_by_recursion(first: list[int], second: list[int]):
    expected = by_recursion(first, second)
    found, normalised = (
        f(arrays(first), arrays(second)) for f in (edit_distances, normalised_edit_distances)
    )
    assert found.sums.tolist() == [expected]
    assert normalised.sums.tolist() == [expected / max(len(first), len(second), 1)]
    assert found.counts.tolist() == normalised.counts.tolist() == [1.0]


# A chain of two actions, each followed by the other with probability 0.8.


STAY = 0.2


TABLE = np.log([[STAY, 1 - STAY], [1 - STAY, STAY], [0.5, 0.5]])


def chain(length: int, seed: int) -> np.ndarray:
    moves = np.random.default_rng(seed).random(length) > STAY
    return np.cumsum(moves).astype(np.int64) % 2


def test_latent_losses_by_hand():
    found = latent_losses(Bigram(TABLE, 1.0), arrays([0, 1, 1], [], [1]), np.array([-1, 0, 1]))
    assert found.sums == pytest.approx([-np.log(0.5) - np.log(0.8) - np.log(0.2), 0.0, -np.log(0.2)])
    assert found.counts.tolist() == [3.0, 0.0, 1.0]


def test_latent_perplexity_of_a_chain_is_exp_of_its_entropy_rate():
    train, validation, fresh = chain(20_000, 0), chain(2_000, 1), chain(20_000, 2)
    counts, chosen = (pair_counts(c[:-1], c[1:], 2) for c in (train, validation))
    found = latent_losses(bigram_of_counts(counts, chosen), [fresh[1:]], fresh[:1])
    entropy = -(STAY * np.log(STAY) + (1 - STAY) * np.log(1 - STAY))
    assert np.exp(found.sums / found.counts) == pytest.approx(np.exp(entropy), rel=0.02)
    # Shuffled, every pair is as frequent: the cross-entropy of a half and a half.
    shuffled = np.random.default_rng(0).permutation(fresh)
    worse = latent_losses(bigram_of_counts(counts, chosen), [shuffled[1:]], shuffled[:1])
    expected = -(np.log(STAY) + np.log(1 - STAY)) / 2
    assert worse.sums / worse.counts == pytest.approx(expected, rel=0.02)


def test_plans_by_hand():
    plans, actions = arrays([1, 2, 3], [0, 0], [], [2, 2]), arrays([1, 0, 3, 3], [0], [1, 1], [])
    found = plans_followed(plans, actions)
    assert found.sums.tolist() == [2.0, 1.0, 0.0, 0.0]
    assert found.counts.tolist() == [3.0, 1.0, 0.0, 0.0]
    prior = np.array([0.1, 0.2, 0.3, 0.4])
    chance = plans_followed_by_chance(plans, actions, prior)
    assert chance.sums == pytest.approx([0.9, 0.1, 0.0, 0.0])
    assert chance.counts.tolist() == found.counts.tolist()


def test_chance_is_what_random_actions_follow():
    generator = np.random.default_rng(0)
    prior = np.array([0.6, 0.3, 0.1])
    plans, actions = ([generator.choice(3, 10, p=p) for _ in range(3000)] for p in ([0.2, 0.3, 0.5], prior))
    followed, chance = plans_followed(plans, actions), plans_followed_by_chance(plans, actions, prior)
    assert followed.sums.sum() / followed.counts.sum() == pytest.approx(0.26, abs=0.01)
    assert chance.sums.sum() / chance.counts.sum() == pytest.approx(0.26, abs=0.01)


# Words


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


@pytest.mark.parametrize("text", ["", " \n", "word", "?!"])
def test_a_text_without_pairs_has_none(text: str):
    assert rouge2("Two words here", text) == rouge2(text, "Two words here") == 0.0


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_rouge2_of_english_text_is_the_librarys(true: str, generated: str):
    expected = RougeScorer(["rouge2"]).score(true, generated)["rouge2"].fmeasure
    assert rouge2(true, generated) == expected


@pytest.mark.parametrize("text", ["Кошка сидела на коврике.", "猫坐在垫子上。", "बिल्ली चटाई पर बैठी थी।"])
def test_rouge2_reads_every_script(text: str):
    assert rouge2(text, text) == 1.0


# MAUVE of histograms


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


def test_texts_of_one_group_are_drawn_together():
    """True texts that are all there twice count once: the interval stays that of the texts once."""
    first, second = np.random.default_rng(0).integers(6, size=(2, 3, 60))
    options = {"resamples": 200, "seed": 0}
    once = mauve_interval([Clustered(first, second, 6)], **options)
    twice = [Clustered(first, np.repeat(second, 2, axis=1), 6)]
    number = np.arange(60)
    found = mauve_interval(twice, (number, np.repeat(number, 2)), **options)
    assert found == pytest.approx(once)
    alone = mauve_interval(twice, **options)
    assert alone.high - alone.low < 0.95 * (once.high - once.low)


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
    same = [cluster_texts(features(s, 500), features(100 + s, 500), s).mauve for s in range(3)]
    assert min(same) > 0.9


def test_a_cluster_for_every_ten_texts_of_the_smaller_sample():
    clustered = cluster_texts(features(0, 74), features(1, 200), 0)
    assert clustered.clusters == 7
    assert (clustered.first.shape, clustered.second.shape) == ((CLUSTERINGS, 74), (CLUSTERINGS, 200))
    for first, second in zip(clustered.first, clustered.second, strict=True):
        assert {*first, *second} == set(range(7))


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


# Features of texts


def features_of(run: Run, texts: list[np.ndarray], window: int = 48) -> np.ndarray:
    with Progress(quiet=True).task("read") as task:
        return text_features(run, texts, window, task)


def plain(run: Run, text: np.ndarray, window: int = 48) -> np.ndarray:
    """The mean of the last hidden states, one window at a time."""
    model = run.plain_model().eval()
    separator, own, bos = run.corpus.separator, text.tolist(), run.corpus.bos_rule
    tokens = own if bos != "document" and own else [separator, *own]
    step = window - (bos == "every-window")
    parts = [tokens[start : start + step] for start in range(0, len(tokens), step)]
    if bos == "every-window" and own:
        parts = [[separator, *part] for part in parts]
    with torch.no_grad():
        states = [model(torch.tensor([part]), output_hidden_states=True).hidden_states[-1] for part in parts]
    return torch.cat(states, dim=1)[0].mean(dim=0).numpy()


def random_texts(run: Run, *lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, run.corpus.facts["vocabulary"], size=length) for length in lengths]


@pytest.mark.parametrize("bos", get_args(BosRule))
@pytest.mark.parametrize("window", [48, 11])
def test_features_are_means_of_last_hidden_states(
    tiny_run: Run, window: int, bos: BosRule, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(tiny_run.corpus.facts, "bos", bos)
    texts = random_texts(tiny_run, 30, 1, 47, 48, 100, 0)
    found = features_of(tiny_run, texts, window)
    assert found.shape == (6, 32)
    expected = [plain(tiny_run, text, window) for text in texts]
    assert found == pytest.approx(np.stack(expected), abs=1e-5)


def test_texts_of_a_batch_do_not_mix(tiny_run: Run):
    texts = random_texts(tiny_run, 20, 60, 0, 33, 7)
    one_by_one = tiny_run.with_settings({"evaluation.batch_size": 1})
    assert features_of(tiny_run, texts) == pytest.approx(features_of(one_by_one, texts), abs=1e-5)
