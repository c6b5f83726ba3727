"""Metrics of masks, against the same summed up one token and one sentence at a time."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from probekit.causal.components import MaskedLM
from probekit.causal.masks import Measured, Readout, measure, states_of
from probekit.data.windows import cut_windows
from probekit.probing.results import Cell, LinearProbe, SavedProbes
from probekit.progress import Progress
from probekit.run.run import Run

LAST = ("hook_resid_post", 2)
MASKS = torch.tensor([[0.0] * 6, [1.0, 0, 0, 0, 0, 0], [0, 1.0, 0, 1.0, 1.0, 0]])


class Setting:
    """A masked LM, windows and a readout."""

    def __init__(self, run: Run) -> None:
        self.run, self.masked = run, MaskedLM(run, "none", LAST)
        corpus = run.corpus
        self.windows = cut_windows(corpus, corpus.documents("test")[:5], 48, 24)
        self.masked.measure_means(
            cut_windows(corpus, corpus.documents("probe")[:4], 48, 24), 8, Progress(quiet=True)
        )
        prior = torch.arange(1.0, corpus.k + 1).log_softmax(0)
        self.readout = Readout(SavedProbes(run.folder / "probes", "none", 0)[Cell(*LAST, 1)], prior)

    def measured(self, batch_size: int) -> Measured:
        with Progress(quiet=True).task("measure") as task:
            return measure(self.masked, self.windows, MASKS, self.readout, batch_size, task)


@pytest.fixture(scope="module")
def setting(probed_run: Run) -> Setting:
    return Setting(probed_run)


def by_hand(setting: Setting, mask: torch.Tensor) -> dict[str, np.ndarray]:
    """Every metric summed by document `[documents]`."""
    corpus, documents = setting.run.corpus, np.unique(setting.windows.document)
    found: dict[str, Any] = {}
    for n in range(len(setting.windows)):
        scored = setting.masked.scored(setting.windows[np.array([n])])
        with torch.no_grad():
            whole, _ = setting.masked(scored, setting.masked.nothing)
            logits, states = setting.masked(scored, mask[None])
        document = int(np.searchsorted(documents, setting.windows.document[n]))
        sentences = iter(states)
        for t in range(int(setting.windows.length[n])):
            target = int(scored.batch.targets[0, t])
            if target < 0:
                continue
            token = setting.windows.start[n] + t + 1
            sentence = int(np.searchsorted(corpus.first_token, token, side="right") - 1)
            alone = sentence == corpus.document_sentences[setting.windows.document[n]]
            begins = corpus.first_token[sentence] == token
            now, before = Categorical(logits=logits[0, t]), Categorical(logits=whole[0, t])
            loss = -float(now.log_prob(torch.tensor(target)))
            values = {"other_loss" if alone else "first_loss" if begins else "rest_loss": loss}
            if begins and not alone:
                told = Categorical(logits=setting.readout.probe.log_probabilities(next(sentences)))
                prior, action = Categorical(logits=setting.readout.prior), int(corpus.actions[sentence])
                true = told.log_prob(torch.tensor(action))
                values |= {
                    "information": float(kl_divergence(told, prior)),
                    "bits": float(true - prior.log_prob(torch.tensor(action))) / np.log(2),
                    "true": float(true.exp()),
                    "accuracy": float(told.probs.argmax() == action),
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
        states, actions = states_of(setting.masked, setting.windows, MASKS, 6, task)
    torch.testing.assert_close(found.states, states, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(found.actions, actions.numpy())
    np.testing.assert_array_equal(np.bincount(found.document), found.sums["bits"][1])


def test_classes_that_were_not_there_to_fit_on_cost_nothing():
    probe = LinearProbe(torch.zeros(2, 3), torch.tensor([0.0, 0.0, -torch.inf]))
    readout = Readout(probe, torch.tensor([0.5, 0.25, 0.25]).log())
    told = readout.told(torch.zeros(1, 2))
    expected = 0.5 * np.log(0.5 / 0.5) + 0.5 * np.log(0.5 / 0.25)
    assert readout.information(told).item() == pytest.approx(expected)
