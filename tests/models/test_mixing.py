"""Every way of choosing an action against its formula, its gradient and its distribution."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor
from torch.autograd import grad, gradcheck

from probekit.config import MixingSettings, VariantName
from probekit.models.mixing import (
    VARIANTS,
    Fixed,
    GumbelSoftmax,
    Mixed,
    Mixing,
    Oracle,
    Predicted,
    Soft,
    StraightThrough,
    Uniform,
    Variant,
    training_mixing,
)

ALL = [Fixed, Uniform, Oracle, Predicted, Soft, StraightThrough, GumbelSoftmax]

# As in arXiv 2410.12492 and reference.md, section 1: mixing in training, in evaluation, planner trained too.
TABLE = {
    "fixed": (Fixed, Fixed, False),
    "uniform": (Uniform, Uniform, False),
    "oracle": (Oracle, Predicted, False),
    "predicted": (Predicted, Predicted, False),
    "mixed": (Mixed, Predicted, False),
    "straight-through": (StraightThrough, Predicted, True),
    "gumbel": (GumbelSoftmax, Soft, True),
    "soft": (Soft, Soft, False),
    "joint": (Soft, Soft, True),
}


def inputs(
    sentences: int = 6, k: int = 5, dimensions: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 scores, actions and codebook, the first and the last ready for gradients."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(sentences, k, generator=generator, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(k, dimensions, generator=generator, dtype=torch.float64, requires_grad=True)
    return scores, torch.randint(k, (sentences,), generator=generator), codebook


def formula(
    kind: type, scores: np.ndarray, action: int, codebook: np.ndarray, temperature: float
) -> np.ndarray:
    """The embedding of one sentence, term by term."""
    if kind is Fixed:
        weights = [float(a == 0) for a in range(len(codebook))]
    elif kind is Uniform:
        weights = [1 / len(codebook)] * len(codebook)
    elif kind is Oracle:
        weights = [float(a == action) for a in range(len(codebook))]
    elif kind in (Predicted, StraightThrough):
        weights = [float(score == max(scores)) for score in scores]
    else:
        powers = [np.exp((score - max(scores)) / temperature) for score in scores]
        weights = [power / sum(powers) for power in powers]
    return sum(weight * row for weight, row in zip(weights, codebook, strict=True))


@pytest.mark.parametrize("kind", [Fixed, Uniform, Oracle, Predicted, Soft, StraightThrough])
@settings(max_examples=25)
@given(
    sentences=st.integers(1, 6),
    k=st.integers(2, 9),
    seed=st.integers(0, 2**32 - 1),
    temperature=st.floats(0.05, 20.0),
)
def test_embeddings_follow_the_formula(kind: type, sentences: int, k: int, seed: int, temperature: float):
    scores, actions, codebook = inputs(sentences, k, seed=seed)
    mixed = kind()(scores, actions, codebook, temperature).detach().numpy()
    rows = [
        formula(kind, row, int(action), codebook.detach().numpy(), temperature)
        for row, action in zip(scores.detach().numpy(), actions, strict=True)
    ]
    np.testing.assert_allclose(mixed, np.stack(rows), atol=1e-12)


@pytest.mark.parametrize("kind", ALL)
def test_scores_are_needed_exactly_where_they_count(kind: type):
    scores, actions, codebook = inputs()
    mixing: Mixing = kind()

    def mixed(scores: Tensor) -> Tensor:
        torch.manual_seed(0)
        return mixing(scores, actions, codebook, 1.0)

    if mixing.needs_scores:
        assert not torch.allclose(mixed(scores), mixed(-scores))
    else:
        assert torch.equal(mixed(scores), mixed(torch.empty(0)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", [Soft, GumbelSoftmax])
def test_gradients_of_soft_choices_are_finite_differences(kind: type, temperature: float):
    scores, actions, codebook = inputs()

    def mixed(scores: Tensor, codebook: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same noise every time
        return kind()(scores, actions, codebook, temperature)

    assert gradcheck(mixed, (scores, codebook))


@pytest.mark.parametrize("kind", [Fixed, Uniform, Oracle, Predicted])
def test_gradients_of_hard_choices_are_finite_differences_in_the_codebook(kind: type):
    scores, actions, codebook = inputs()
    assert gradcheck(lambda codebook: kind()(scores.detach(), actions, codebook, 1.0), (codebook,))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_straight_through_is_hard_forward_and_soft_backward(temperature: float):
    scores, actions, codebook = inputs()
    upstream = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    through, hard, soft = (
        kind()(scores, actions, codebook, temperature) for kind in (StraightThrough, Predicted, Soft)
    )
    assert torch.equal(through, hard)
    of_scores, of_codebook = grad(through, (scores, codebook), upstream)
    torch.testing.assert_close(of_scores, *grad(soft, scores, upstream))
    torch.testing.assert_close(of_codebook, *grad(hard, codebook, upstream))
    assert (of_scores != 0).all()


@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_gumbel_samples_follow_the_softmax_of_the_scores(temperature: float):
    """The Gumbel-max trick: whatever the temperature, the largest weight is a draw from softmax(scores)."""
    draws = 20_000
    torch.manual_seed(0)
    scores = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5])
    identity = torch.eye(5)
    weights = GumbelSoftmax()(scores.expand(draws, 5), torch.zeros(draws), identity, temperature)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(draws))
    counts = weights.argmax(dim=1).bincount(minlength=5)
    expected = draws * scores.softmax(0)
    assert ((counts - expected) ** 2 / expected).sum() < chi2.ppf(0.9999, df=4)
    if temperature < 1e-2:
        assert (weights.amax(dim=1) > 0.99).float().mean() > 0.95


def test_gumbel_noise_is_new_for_every_call_and_sentence_and_the_global_seed_decides_it():
    scores, actions, codebook = inputs()
    scores = scores[:1].expand(6, -1)

    def mixed() -> Tensor:
        return GumbelSoftmax()(scores, actions, codebook, 1.0)

    torch.manual_seed(5)
    one, two = mixed(), mixed()
    torch.manual_seed(5)
    assert torch.equal(mixed(), one)
    assert not torch.isclose(one, two).any()
    assert len(one.unique(dim=0)) == 6


def test_limits_of_the_temperature():
    scores, actions, codebook = inputs()
    at = {temperature: Soft()(scores, actions, codebook, temperature) for temperature in (1e-4, 1e8)}
    torch.testing.assert_close(at[1e-4], Predicted()(scores, actions, codebook, 1.0))
    torch.testing.assert_close(at[1e8], Uniform()(scores, actions, codebook, 1.0))


def test_the_table_of_variants():
    def kinds(variant: Variant) -> tuple[type, type, bool]:
        return type(variant.training), type(variant.evaluation), variant.joint

    assert {name: kinds(variant) for name, variant in VARIANTS.items()} == TABLE
    assert list(VARIANTS) == [name for name in get_args(VariantName) if name != "none"]
    assert {kind for row in TABLE.values() for kind in row[:2]} == {*ALL, Mixed}


def test_a_planner_is_trained_along_exactly_where_a_gradient_reaches_it_or_it_is_kept_frozen():
    scores, actions, codebook = inputs()
    kinds = {name: training_mixing(name, MixingSettings(), seed=0) for name in VARIANTS}
    reached = {
        name
        for name, mixing in kinds.items()
        if grad(mixing(scores, actions, codebook, 1.0).sum(), scores, allow_unused=True)[0] is not None
    }
    assert reached == {name for name, variant in VARIANTS.items() if variant.joint} | {"soft"}


# A share of the planner's actions


@pytest.mark.parametrize(("fraction", "kind"), [(0.0, Oracle), (1.0, Predicted)])
def test_all_or_none_of_the_planners_actions(fraction: float, kind: type):
    scores, actions, codebook = inputs(sentences=500)
    upstream = torch.randn(500, 3, dtype=torch.float64)
    mixed, same = (mixing(scores, actions, codebook, 1.0) for mixing in (Mixed(fraction, seed=3), kind()))
    assert torch.equal(mixed, same)
    assert torch.equal(*(grad(embeddings, codebook, upstream)[0] for embeddings in (mixed, same)))
    assert grad(mixed.sum(), scores, allow_unused=True) == (None,)


def test_a_share_of_the_sentences_has_the_planners_action():
    count = 20_000
    scores, actions = torch.eye(2)[torch.ones(count, dtype=torch.long)], torch.zeros(count, dtype=torch.long)
    mixing = Mixed(0.3, seed=0)
    draws = [mixing(scores, actions, torch.tensor([[0.0], [1.0]]), 1.0).squeeze() for _ in range(2)]
    for draw in draws:  # within four standard errors of a binomial share
        assert abs(draw.mean().item() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / count)
    both = (draws[0] * draws[1]).mean().item()
    assert abs(both - 0.09) < 4 * np.sqrt(0.09 * 0.91 / count), "drawn anew in every call"


def test_the_seed_decides_who_gets_the_planners_action_and_nothing_else_is_drawn():
    scores, actions, codebook = inputs(sentences=50)

    def mixed(seed: int) -> Tensor:
        return training_mixing("mixed", MixingSettings(fraction=0.5), seed)(scores, actions, codebook, 1.0)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = mixed(1)
    torch.manual_seed(5)
    assert torch.equal(mixed(1), first)
    assert not torch.equal(mixed(2), first)
    torch.manual_seed(0)
    mixed(1)
    assert torch.equal(torch.get_rng_state(), state)
