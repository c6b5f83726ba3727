"""The planned LM as a whole: the base LM where nothing is added, frozen, and left as it was found."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from probekit.config import ConditioningSettings, MixingSettings, PlannerSettings
from probekit.data.corpus import Corpus
from probekit.data.windows import IGNORE, Batch, collate, cut_windows
from probekit.models import planned_lm
from probekit.models.backends import BridgeBackend
from probekit.models.conditioning import new_adapter
from probekit.models.frozen_lm import FrozenLM
from probekit.models.language_model import load_model
from probekit.models.mixing import (
    VARIANTS,
    Oracle,
    Predicted,
    Soft,
    Uniform,
    training_mixing,
)
from probekit.models.planned_lm import PlannedLM, token_losses
from probekit.models.planner import Planner
from probekit.models.pretrained import load_config

Base = Callable[[str], FrozenLM]
DOCUMENTS = [[3, 2, 4, 2], [2, 6], [1, 1, 5, 2, 3, 1]]
WINDOW = 6


@pytest.fixture(scope="module")
def corpus(make_corpus: Callable[..., Corpus]) -> Corpus:
    return make_corpus(DOCUMENTS)


@pytest.fixture(scope="module")
def batch(corpus: Corpus) -> Batch:
    return collate(corpus, cut_windows(corpus, np.arange(3), WINDOW, WINDOW))


def planned(lm: FrozenLM, corpus: Corpus, *, size: float = 10.0) -> PlannedLM:
    codebook = torch.from_numpy(corpus.codebook.centroids)
    adapter = new_adapter(ConditioningSettings(skip_layers=1), codebook, lm, seed=0)
    with torch.no_grad():
        adapter.projections *= size
    planner = Planner(PlannerSettings(width=8), codebook, seed=0)
    return PlannedLM(BridgeBackend(lm.bridged), planner, adapter, temperature=1.0).eval()


@pytest.fixture
def model(base: Base, corpus: Corpus) -> PlannedLM:
    """A planned GPT-2 with an adapter that matters; the LM in it is shared."""
    return planned(base("gpt2"), corpus)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "olmo2", "qwen2", "qwen3"])
def test_with_no_adapter_or_a_zero_one_it_is_the_base_lm(
    family: str, folders: dict, base: Base, corpus: Corpus, batch: Batch
):
    lm = base(family)
    zeroed = planned(lm, corpus, size=0.0)
    bare = PlannedLM(BridgeBackend(lm.bridged), zeroed.planner, None, temperature=1.0)
    with torch.no_grad():
        alone = lm.bridged(batch.tokens)
        assert torch.equal(bare(batch, Soft()), alone)
        assert torch.equal(zeroed(batch, Soft()), alone)
        plain = AutoModelForCausalLM.from_pretrained(folders[family]).eval()(batch.tokens).logits
        torch.testing.assert_close(alone, plain, atol=1e-5, rtol=0)
        assert not torch.allclose(planned(lm, corpus)(batch, Soft()), alone, atol=0.1)


def test_training_moves_adapter_and_planner_and_not_a_bit_of_the_lm(
    folders: dict, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, batch: Batch
):
    folder = str(folders["gpt2"])
    base = FrozenLM(lambda: load_model(folder), load_config(folder), tokenizer, "gpt2")
    lm, model = base.bridged, planned(base, corpus)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    untrained = {name: value.clone() for name, value in lm.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = token_losses(model(batch, Soft()), batch.targets).mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, _ in model.named_parameters()}
    assert changed == trained
    assert all(torch.equal(value, untrained[name]) for name, value in lm.state_dict().items())
    assert {"adapter.codebook", "adapter.projections", "planner.start"} <= trained


def test_scores_are_the_planners_for_each_touched_sentence(model: PlannedLM, corpus: Corpus, batch: Batch):
    with torch.no_grad():
        scores = model.scores(batch)
    document, sentence = np.divmod(batch.touched.numpy(), batch.context.shape[1])
    assert sorted(zip(document, sentence, strict=True)) == [
        (d, s) for d, sizes in enumerate(DOCUMENTS) for s in range(len(sizes))
    ]
    for row, d, s in zip(scores, document, sentence, strict=True):
        first = corpus.document_sentences[d]
        read = torch.from_numpy(corpus.embeddings[first : first + s + 1])
        with torch.no_grad():
            torch.testing.assert_close(row, model.planner(read[None])[0, s], atol=1e-5, rtol=1e-5)


def test_a_window_is_planned_from_its_documents_beginning(model: PlannedLM, corpus: Corpus):
    """A later window alone has the scores it has beside the earlier ones."""
    windows = cut_windows(corpus, np.array([2]), WINDOW, WINDOW)
    assert len(windows) > 2
    together = collate(corpus, windows)
    with torch.no_grad():
        everything = model(together, Soft())
        for row in range(len(windows)):
            alone = collate(corpus, windows[row : row + 1])
            expected = everything[row : row + 1, : windows.length[row]]
            torch.testing.assert_close(model(alone, Soft()), expected, atol=1e-5, rtol=1e-5)


def test_known_scores_are_used_and_certain_ones_make_predicted_the_oracle(model: PlannedLM, batch: Batch):
    certain = torch.nn.functional.one_hot(batch.actions, 5).float()
    with torch.no_grad():
        oracle = model(batch, Oracle())
        assert torch.equal(model(batch, Predicted(), certain), oracle)
        assert not torch.allclose(model(batch, Predicted(), certain.roll(1, dims=1)), oracle, atol=1e-2)
        assert torch.equal(model(batch, Predicted()), model(batch, Predicted(), model.scores(batch)))


def test_the_temperature_is_the_one_given(base: Base, corpus: Corpus, batch: Batch):
    def model(temperature: float, learned: bool) -> PlannedLM:
        like = planned(base("gpt2"), corpus)
        return PlannedLM(
            like.backend, like.planner, like.adapter, temperature, learn_temperature=learned
        ).eval()

    with torch.no_grad():
        soft = planned(base("gpt2"), corpus)(batch, Soft())
        for learned in (False, True):
            cold, hot = model(1e-5, learned), model(1e7, learned)
            torch.testing.assert_close(cold(batch, Soft()), cold(batch, Predicted()), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(hot(batch, Soft()), hot(batch, Uniform()), atol=1e-4, rtol=1e-4)
            assert not torch.allclose(soft, hot(batch, Soft()), atol=1e-2)
            assert ("log_temperature" in cold.state_dict()) == learned


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_planner_runs_only_where_its_scores_count(
    variant: str, model: PlannedLM, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    calls = []
    forward = model.planner.forward
    monkeypatch.setattr(model.planner, "forward", lambda *given: calls.append(1) or forward(*given))
    with torch.no_grad():
        model(batch, training_mixing(variant, MixingSettings(), seed=0))
    assert len(calls) == (variant not in ("fixed", "uniform", "oracle"))


def test_token_losses_are_the_cross_entropy_of_scored_tokens_and_zero_elsewhere():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 6, generator=generator, requires_grad=True)
    targets = torch.tensor([[1, 5, IGNORE, IGNORE], [IGNORE, 0, 0, 3]])
    losses = token_losses(logits, targets)
    for window in range(2):
        for position in range(4):
            target, row = int(targets[window, position]), logits[window, position].detach().double()
            expected = 0.0 if target == IGNORE else (row.exp().sum().log() - row[target]).item()
            assert losses[window, position].item() == pytest.approx(expected, abs=1e-6)
    losses.sum().backward()
    assert torch.equal(logits.grad.any(-1), targets != IGNORE)


def test_token_losses_of_bfloat16_logits_are_computed_in_float32():
    logits = (5 * torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(0))).bfloat16()
    targets = torch.arange(21).view(3, 7)
    losses = token_losses(logits, targets)
    assert losses.dtype == torch.float32
    expected = -logits.double().log_softmax(-1).gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_once", [1, 150, 10**6])
def test_token_losses_and_their_gradient_are_those_of_all_logits_at_once(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(planned_lm, "CACHED_LOGITS", at_once)  # a row at a time, three rows, all
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(2, 4, 50, generator=generator)).to(dtype)
    weights = torch.randn(2, 4, generator=generator)  # of both signs, as differences of losses have
    targets = torch.tensor([[1, 49, IGNORE, 7], [IGNORE, 0, 0, 3]])
    ours, whole = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = token_losses(ours, targets)
    expected = F.cross_entropy(
        whole.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(2, 4)
    assert torch.equal(losses, expected)
    for loss in (losses, expected):
        (weights * loss).sum().backward()
    assert ours.grad.dtype == dtype
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.grad, whole.grad, atol=1e-6, rtol=rounding)
