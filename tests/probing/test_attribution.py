"""Contributions of tokens to a score, against closed forms and one replacement at a time."""

import numpy as np
import pytest
import torch
from torch import Tensor

from probekit.models.conditioning import EMBEDDING
from probekit.probing.attribution import (
    EmbeddingScore,
    integrated_gradients,
    neutral_token,
    occlusion,
    token_embeddings,
)
from probekit.run.run import Run

READ, PLANTED = 7, 4
"""The token that is read, and the one before it that the planted score depends on."""


def readout(
    run: Run, layer: int = 2, location: str = "hook_resid_post"
) -> tuple[EmbeddingScore, Tensor, Tensor]:
    """A curved score of one token's activation, in the middle of a text; embeddings and the baseline."""
    name = f"blocks.{layer}.{location}"
    backend = run.backend_for([EMBEDDING, name])
    tokens = torch.from_numpy(run.corpus.tokens[:12].astype(np.int64))
    weights = torch.randn(run.config.lm.width, 3, generator=torch.Generator().manual_seed(0))
    neutral = torch.tensor([neutral_token(run.corpus)])
    score = EmbeddingScore(backend, tokens, name, READ, lambda x: (x @ weights).log_softmax(-1)[:, 0])
    return score, token_embeddings(backend, tokens), token_embeddings(backend, neutral).expand(12, -1)


def test_embeddings_are_those_of_the_plain_module(tiny_run: Run):
    _, embeddings, neutral = readout(tiny_run)
    table, corpus = tiny_run.plain_model().get_input_embeddings().weight, tiny_run.corpus
    torch.testing.assert_close(embeddings, table[torch.from_numpy(corpus.tokens[:12].astype(int))])
    words = [token for token in corpus.tokens.tolist() if token != corpus.separator]
    torch.testing.assert_close(neutral[0], table[max({*words}, key=words.count)])


@pytest.mark.parametrize("location", ["hook_resid_post", "attn.hook_q"])
def test_integrated_gradients_add_up_to_the_difference_of_scores(tiny_run: Run, location: str):
    """Also where a hook keeps heads apart."""
    score, embeddings, neutral = readout(tiny_run, location=location)
    found = integrated_gradients(score, embeddings, neutral, 64)
    with torch.no_grad():
        text, nothing = score(torch.stack([embeddings, neutral]))
    assert abs(text - nothing) > 0.05
    assert abs(found.sum() - (text - nothing)) < 1e-3
    one_step = integrated_gradients(score, embeddings, neutral, 1).sum()
    assert abs(one_step - (text - nothing)) > abs(found.sum() - (text - nothing))


def test_a_sharp_turn_on_the_path_is_found():
    """A score that steps somewhere on the path: points at fixed places see nothing of it, or too much."""
    difference = torch.tensor([[1.0], [2.0]])

    def score(given: Tensor) -> Tensor:
        return 10 * torch.sigmoid(3000 * (given.sum(dim=(1, 2)) - 3 * 0.3123))

    calls = []

    def counted(given: Tensor) -> Tensor:
        if given.requires_grad:
            calls.append(len(given))
        return score(given)

    found = integrated_gradients(counted, difference, torch.zeros(2, 1), 400)
    torch.testing.assert_close(found, torch.tensor([10 / 3, 20 / 3]), atol=0.01, rtol=0)
    assert sum(calls) <= 400
    spent = sum(calls)
    nodes, weights = np.polynomial.legendre.leggauss(spent)
    path = torch.from_numpy((nodes + 1) / 2).float()[:, None, None] * difference
    path.requires_grad_()
    (gradient,) = torch.autograd.grad(score(path).sum(), path)
    fixed = float((torch.from_numpy(weights / 2).float()[:, None] * (gradient * difference).sum(2)).sum())
    assert abs(fixed - 10) > 10 * abs(float(found.sum()) - 10), "as many fixed points do worse"


@pytest.mark.parametrize("steps", [1, 3, 4, 11, 12, 50])
def test_gradients_are_taken_at_no_more_points_than_asked(steps: int):
    points = 0

    def score(given: Tensor) -> Tensor:
        nonlocal points
        points += len(given) * given.requires_grad
        return 1e3 * given.abs().sqrt().sum(dim=(1, 2))  # no quadrature is exact

    integrated_gradients(score, torch.ones(2, 1), -0.9 * torch.ones(2, 1), steps)
    assert steps - 8 < points <= steps


def test_occlusion_in_batches_is_that_of_one_token_at_a_time(tiny_run: Run, monkeypatch: pytest.MonkeyPatch):
    score, embeddings, neutral = readout(tiny_run)
    expected = []
    for position in range(12):
        replaced = embeddings.clone()
        replaced[position] = neutral[position]
        with torch.no_grad():
            expected.append(float(score(embeddings[None]) - score(replaced[None])))
    assert max(map(abs, expected)) > 0.01
    for tokens in (2048, 60):  # all at once, or five inputs of twelve tokens
        monkeypatch.setattr("probekit.probing.attribution.TOKENS", tokens)
        np.testing.assert_allclose(occlusion(score, embeddings, neutral), expected, atol=1e-5)


def test_only_tokens_up_to_the_one_read_contribute(tiny_run: Run):
    score, embeddings, neutral = readout(tiny_run)
    for found in (integrated_gradients(score, embeddings, neutral, 8), occlusion(score, embeddings, neutral)):
        differ = (embeddings != neutral).any(1)[: READ + 1]
        assert (found[: READ + 1].abs() > 1e-6).equal(differ)
        assert differ.sum() > 3
        np.testing.assert_allclose(found[READ + 1 :], 0, atol=1e-6)


def test_a_planted_dependence_is_found():
    """Of a score that reads one token linearly and the square of another, both methods are known exactly."""
    rng = torch.Generator().manual_seed(1)
    embeddings, neutral = torch.randn(9, 5, generator=rng), torch.randn(9, 5, generator=rng)
    weights = torch.randn(5, generator=rng)
    expected = torch.zeros(9)
    expected[PLANTED] = (embeddings - neutral)[PLANTED] @ weights
    expected[READ] = embeddings[READ].square().sum() - neutral[READ].square().sum()

    def score(given: Tensor) -> Tensor:
        return given[:, PLANTED] @ weights + given[:, READ].square().sum(1)

    torch.testing.assert_close(integrated_gradients(score, embeddings, neutral, 2), expected)
    torch.testing.assert_close(occlusion(score, embeddings, neutral), expected)
