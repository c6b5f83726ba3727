"""Draws follow the probabilities that the settings leave, and depend on one number each."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from probekit.config import GenerationSettings
from probekit.generation.generate import draw

SHARES = np.array([0.05, 0.3, 0.02, 0.4, 0.0, 0.2, 0.03])
LOGITS = torch.tensor(np.log(np.maximum(SHARES, 1e-300)))


def left(temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """Probabilities by the definitions, one token after the other."""
    shares = SHARES ** (1 / temperature)
    order = sorted(range(len(SHARES)), key=lambda i: -shares[i])[: top_k or len(SHARES)]
    total = sum(shares[i] for i in order)
    kept: list[int] = []
    for i in order:
        if top_p is None or sum(shares[j] for j in kept) / total < top_p:
            kept.append(i)
    result = np.zeros(len(SHARES))
    result[kept] = shares[kept] / shares[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    itertools.product([0.5, 1.0, 2.0], [None, 1, 3, 50], [None, 0.3, 0.7, 0.95, 1.0]),
)
def test_frequencies_are_the_probabilities(temperature: float, top_k: int | None, top_p: float | None):
    settings = GenerationSettings(temperature=temperature, top_k=top_k, top_p=top_p)
    uniforms = torch.tensor(np.random.default_rng(0).random(20_000))
    drawn = draw(LOGITS.expand(len(uniforms), -1), uniforms, settings)
    counts = np.bincount(drawn.numpy(), minlength=len(SHARES))
    expected = left(temperature, top_k, top_p)
    assert (counts[expected == 0] == 0).all()
    there = expected > 0
    if there.sum() > 1:
        assert chisquare(counts[there], expected[there] * len(uniforms)).pvalue > 1e-3


def test_temperature_zero_takes_the_most_probable():
    settings = GenerationSettings(temperature=0.0, top_k=2)
    assert draw(LOGITS[None], torch.tensor([0.99]), settings).tolist() == [3]


def test_a_row_is_drawn_by_its_own_number_alone():
    settings = GenerationSettings(top_p=0.9)
    rng = np.random.default_rng(1)
    logits, uniforms = torch.tensor(rng.normal(size=(9, 30))), torch.tensor(rng.random(9))
    together = draw(logits, uniforms, settings)
    alone = [draw(logits[i : i + 1], uniforms[i : i + 1], settings).item() for i in range(9)]
    assert together.tolist() == alone


@pytest.mark.parametrize("settings", [GenerationSettings(), GenerationSettings(top_k=4, top_p=1.0)])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_never_draw_the_impossible(uniform: float, settings: GenerationSettings):
    logits = torch.tensor([[-np.inf, 0.0, -np.inf, 1.0, -np.inf]])
    assert draw(logits, torch.tensor([uniform], dtype=torch.float64), settings).item() in (1, 3)
