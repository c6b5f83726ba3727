"""Masks: gates against their distribution, metrics summed token by token, how masks are chosen, controls."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.distributions import Categorical, kl_divergence

from probekit.causal.components import Component, MaskedLM
from probekit.causal.masks import (
    Candidate,
    Measured,
    choose,
    draw_random_masks,
    draw_removal,
    expected_removals,
    hard_sigmoid,
    information,
    masked_states,
    measure,
    objectives,
    refit_probes,
)
from probekit.causal.variant_lm import SumsByMetric
from probekit.config import ProbeSettings
from probekit.data.windows import cut_windows
from probekit.probing.results import LinearProbe
from probekit.progress import Progress
from probekit.run.run import Run

# Gates

LOG_ALPHA = torch.tensor([-4.0, -1.0, 0.0, 0.7, 4.0])


def draws(log_alpha: torch.Tensor = LOG_ALPHA, count: int = 20_000) -> torch.Tensor:
    return draw_removal(log_alpha, count, torch.Generator().manual_seed(0))


def test_the_expected_number_of_removals_is_how_often_draws_are_not_zero():
    found = draws()
    assert ((found >= 0) & (found <= 1)).all()
    often = (found > 0).float().sum(1).mean().item()
    assert expected_removals(LOG_ALPHA).item() == pytest.approx(often, abs=0.02)
    # By symmetry a draw is 1 as often as one of the opposite parameter is 0.
    zeros = 1 - torch.stack([expected_removals(-value[None]) for value in LOG_ALPHA])
    torch.testing.assert_close((found == 1).float().mean(0), zeros, atol=0.02, rtol=0)


def test_gates_without_noise_are_on_the_side_of_the_median_draw():
    found = hard_sigmoid(LOG_ALPHA)
    assert found[[0, 2, 4]].tolist() == [0.0, 0.5, 1.0]
    sides = [0, 1, 3, 4]  # the median of the symmetrical one is on neither
    assert torch.equal(found[sides] > 0.5, draws().median(0).values[sides] > 0.5)


def test_draws_depend_on_the_seed_and_their_gradient_is_that_of_the_mean():
    assert torch.equal(draws(count=10), draws(count=10))
    log_alpha = torch.zeros(1, requires_grad=True)
    draws(log_alpha, 50_000).mean().backward()
    high, low = (draws(torch.tensor([at]), 50_000).mean().item() for at in (0.05, -0.05))
    assert log_alpha.grad is not None
    assert log_alpha.grad.item() == pytest.approx((high - low) / 0.1, rel=1e-2)


# Metrics

MASKS = torch.tensor([[0.0] * 6, [1.0, 0, 0, 0, 0, 0], [0, 1.0, 0, 1.0, 1.0, 0]])


class Setting:
    """A masked LM, windows and a prior."""

    def __init__(self, run: Run) -> None:
        self.corpus, self.masked = run.corpus, MaskedLM(run, "none")
        self.windows = cut_windows(run.corpus, run.corpus.documents("test")[:5], 48, 24)
        fitted_on = cut_windows(run.corpus, run.corpus.documents("probe")[:4], 48, 24)
        self.masked.measure_means(fitted_on, 8, Progress(quiet=True))
        self.prior = torch.arange(1.0, run.corpus.k + 1).log_softmax(0)

    def measured(self, batch_size: int) -> Measured:
        with Progress(quiet=True).task("measure") as task:
            return measure(self.masked, self.windows, MASKS, self.prior, batch_size, task)


@pytest.fixture(scope="module")
def setting(probed_run: Run) -> Setting:
    return Setting(probed_run)


def by_hand(setting: Setting, mask: torch.Tensor) -> dict[str, np.ndarray]:
    """Every metric's sums and counts by document `[2, documents]`, one token at a time."""
    corpus, windows = setting.corpus, setting.windows
    documents = np.unique(windows.document)
    found: dict[str, Any] = {}
    for n in range(len(windows)):
        scored = setting.masked.scored(windows[np.array([n])])
        with torch.no_grad():
            whole, _ = setting.masked(scored, setting.masked.nothing)
            logits, states = setting.masked(scored, mask[None])
        document = int(np.searchsorted(documents, windows.document[n]))
        sentences = iter(states)
        for t in range(int(windows.length[n])):
            target = int(scored.batch.targets[0, t])
            if target < 0:
                continue
            token = windows.start[n] + t + 1
            sentence = int(np.searchsorted(corpus.first_token, token, side="right") - 1)
            in_first = sentence == corpus.document_sentences[windows.document[n]]
            begins = corpus.first_token[sentence] == token
            now, before = Categorical(logits=logits[0, t]), Categorical(logits=whole[0, t])
            loss = -float(now.log_prob(torch.tensor(target)))
            values = {"other_loss" if in_first else "first_loss" if begins else "rest_loss": loss}
            if begins and not in_first:
                read = Categorical(logits=setting.masked.probe.log_probabilities(next(sentences)))
                prior, action = Categorical(logits=setting.prior), int(corpus.actions[sentence])
                true = read.log_prob(torch.tensor(action))
                values |= {
                    "information": float(kl_divergence(read, prior)),
                    "bits": float(true - prior.log_prob(torch.tensor(action))) / np.log(2),
                    "true": float(true.exp()),
                    "accuracy": float(read.probs.argmax() == action),
                }
            else:
                values["kept_kl"] = float(kl_divergence(before, now))
            for name, value in values.items():
                sums = found.setdefault(name, np.zeros((2, len(documents))))
                sums[:, document] += value, 1
    return found


def test_every_metric_is_the_sum_over_its_tokens(setting: Setting):
    found = setting.measured(4)
    for number, mask in enumerate(MASKS):
        expected = by_hand(setting, mask)
        assert expected.keys() == found.sums.keys()
        for name, (sums, counts) in found.sums.items():
            np.testing.assert_allclose(sums[number], expected[name][0], rtol=1e-3, atol=2e-3, err_msg=name)
            np.testing.assert_array_equal(counts, expected[name][1], err_msg=name)


def test_batches_change_nothing(setting: Setting):
    first, second = (setting.measured(size) for size in (3, 50))
    for name, (sums, counts) in first.sums.items():
        np.testing.assert_allclose(sums, second.sums[name][0], rtol=1e-3, atol=1e-3, err_msg=name)
        np.testing.assert_array_equal(counts, second.sums[name][1])
    torch.testing.assert_close(first.states, second.states, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(first.document, second.document)


def test_states_and_their_documents(setting: Setting):
    found = setting.measured(4)
    with Progress(quiet=True).task("read") as task:
        states, actions = masked_states(setting.masked, setting.windows, MASKS, 6, task)
    torch.testing.assert_close(found.states, states, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(found.labels, actions.numpy())
    np.testing.assert_array_equal(np.bincount(found.document), found.sums["bits"][1])


def test_classes_without_examples_add_no_information(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    probe = LinearProbe(torch.zeros(2, 3), torch.tensor([0.0, 0.0, -torch.inf]))
    monkeypatch.setattr(setting.masked, "probe", probe)
    log_p = setting.masked.label_log_probabilities(torch.zeros(1, 2))
    found = information(log_p, torch.tensor([0.5, 0.25, 0.25]).log())
    assert found.item() == pytest.approx(0.5 * np.log(0.5 / 0.5) + 0.5 * np.log(0.5 / 0.25))


# The choice of a mask, and controls


def sums_of(information: list[list[float]], kept: list[list[float]]) -> SumsByMetric:
    """Of masks by documents, each with two sentences and ten tokens."""
    documents = len(information[0])
    return {
        "information": (np.array(information), np.full(documents, 2.0)),
        "kept_kl": (np.array(kept), np.full(documents, 10.0)),
    }


def test_objectives_and_their_errors():
    value, deviation = objectives(sums_of([[2.0, 4.0, 6.0]], [[10.0, 0.0, 5.0]]), 0.5)
    assert value[0] == pytest.approx(12 / 6 + 0.5 * 15 / 30)
    each = np.array([2 / 2 + 0.5 * 10 / 10, 4 / 2 + 0, 6 / 2 + 0.5 * 5 / 10])
    assert np.linalg.norm(deviation[0]) == pytest.approx(each.std() / np.sqrt(3))


@pytest.mark.parametrize(
    ("removed", "levels", "expected"),
    [
        ((0, 5, 2), (9.0, 1.0, 1.001), 2),  # as good as the best, and smaller
        ((0, 5, 2), (9.0, 1.0, 3.0), 1),
        ((0, 5, 2), (1.0, 1.0, 1.0), 0),
        ((3, 3, 3), (1.002, 1.0, 1.001), 1),  # of equal size, the better one
    ],
)
def test_the_smallest_mask_within_one_error_of_the_best_is_chosen(removed, levels, expected):
    noise = np.random.default_rng(0).normal(scale=0.1, size=(3, 50))
    noise -= noise.mean(axis=1, keepdims=True)
    shared = np.random.default_rng(1).normal(size=50)  # how hard documents are is the same for all masks
    values = [(level + own + shared).tolist() for level, own in zip(levels, noise, strict=True)]
    candidates = [Candidate(0.1, np.where(np.arange(6) < count, 0.0, 1.0)) for count in removed]
    assert choose(candidates, sums_of(values, [[0.0] * 50] * 3), 1.0) == expected


def test_random_masks_have_as_many_of_every_kind_in_every_layer():
    groups: list[Any] = [("head", 0), ("head", 1), ("adapter", 1)]
    components = [Component(kind, layer, head) for kind, layer in groups for head in range(4)]
    removed = np.array([1, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0], dtype=bool)
    masks = draw_random_masks(components, removed, 300, 0)
    assert masks.shape == (300, 12)
    for first, count in ((0, 1), (4, 3), (8, 0)):
        assert (masks[:, first : first + 4].sum(1) == count).all()
        # Each as often as the others.
        np.testing.assert_allclose(masks[:, first : first + 4].mean(0), count / 4, atol=0.1)
    np.testing.assert_array_equal(masks, draw_random_masks(components, removed, 300, 0))
    assert not np.array_equal(masks, draw_random_masks(components, removed, 300, 1))


def test_refitted_probes_are_separate_regressions():
    X = torch.randn(2, 900, 5, generator=torch.Generator().manual_seed(0))
    y = X[0, :, :3].argmax(1)  # nothing in the second mask's states predicts it
    parts = [(X[:, at], y[at]) for at in (slice(0, 400), slice(400, 600))]
    log_p = refit_probes(ProbeSettings(l2=(0.01,), max_iterations=300), 3, *parts, X[:, 600:])
    assert log_p.shape == (2, 300, 3)
    right = (log_p.argmax(2) == y[600:]).float().mean(1)
    assert right[0] > 0.9
    assert right[1] < 0.45
    mean, scale = X[0, :400].mean(0), X[0, :400].std(0, unbiased=False)
    Z = (X[0] - mean) / scale
    oracle = LogisticRegression(C=1 / (400 * 0.01), tol=1e-8, max_iter=1000).fit(Z[:400], y[:400])
    np.testing.assert_allclose(log_p[0].numpy(), oracle.predict_log_proba(Z[600:]), atol=5e-3)
