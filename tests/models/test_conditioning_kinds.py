"""All kinds of conditioning: what each adds, what reaches which token, on both roads through the LM."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probekit.config import ConditioningSettings, PlannerSettings
from probekit.data.corpus import Corpus
from probekit.data.windows import Batch, collate, cut_windows
from probekit.errors import ProbekitError
from probekit.models.base_lm import BaseLM
from probekit.models.conditioning import (
    CONDITIONINGS,
    Adapter,
    Conditioned,
    PlanningToken,
    location_width,
    new_adapter,
)
from probekit.models.hook_points import Backend, BridgeBackend, HFBackend, Hook
from probekit.models.language_model import load_model
from probekit.models.mixing import Oracle, Soft
from probekit.models.planner import Planner
from probekit.models.planner_lm import PlannedLM, token_losses

FAMILIES = ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen2", "qwen3"]
DOCUMENTS = [[3, 2, 4], [1, 1, 5, 2]]  # tokens in each sentence
SIZES = [size for document in DOCUMENTS for size in document]

MakeCorpus = Callable[..., Corpus]
Base = Callable[[str], BaseLM]


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> dict[str, PreTrainedModel]:
    """The plain LM of every family; tests must not change them."""
    return {family: load_model(str(folders[family])) for family in FAMILIES}


def adapter_for(lm: BaseLM, kind: str) -> Adapter:
    """An adapter whose projections are large enough to matter beside the LM's activations."""
    codebook = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    adapter = new_adapter(ConditioningSettings(kind=kind, skip_layers=1), codebook, lm, seed=0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter *= 1 if name == "codebook" else 20
    return adapter


def embeddings_of(batch: Batch) -> Tensor:
    return torch.randn(len(batch.touched), 3, generator=torch.Generator().manual_seed(1))


def windows_of(corpus: Corpus, window: int) -> Batch:
    return collate(corpus, cut_windows(corpus, np.arange(len(corpus.split)), window, window))


def logits(backend: Backend, read: Conditioned, *more: Hook) -> Tensor:
    found = backend.logits(read.tokens, [*read.hooks, *more], read.positions)
    return found if read.slots is None else read.slots.predictions(found)


def test_slots_made_by_hand():
    sentence = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 3]])
    read = adapter_for_width(4).conditioned(
        torch.arange(10, 20).view(2, 5), torch.arange(12.0).view(4, 3), sentence
    )
    slots = read.slots
    # t is a token, p a planning one: t p t t p t t, and t p t t t t p
    assert slots.planning.int().tolist() == [[0, 1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 0, 0, 1]]
    assert slots.own.tolist() == [[0, 2, 3, 5, 6], [0, 2, 3, 4, 5]]
    assert slots.predicting.tolist() == [[1, 2, 4, 5, 6], [1, 2, 3, 4, 6]]
    assert read.positions.tolist() == [[0, 0, 1, 2, 2, 3, 4], [0, 0, 1, 2, 3, 4, 4]]
    assert read.tokens.tolist() == [[10, 10, 11, 12, 12, 13, 14], [15, 15, 16, 17, 18, 19, 19]]
    values = torch.randn(2, 7, 6)
    expected = torch.stack([values[0, [1, 2, 4, 5, 6]], values[1, [1, 2, 3, 4, 6]]])
    assert torch.equal(slots.predictions(values), expected)


def test_windows_with_fewer_planning_tokens_are_padded_at_the_end():
    sentence = torch.tensor([[0, 1, 2], [3, 3, 3]])
    read = adapter_for_width(4).conditioned(torch.arange(6).view(2, 3), torch.randn(4, 3), sentence)
    assert read.positions.tolist() == [[0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2]]
    assert read.slots.planning.int().tolist() == [[0, 1, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0]]


def adapter_for_width(width: int) -> PlanningToken:
    return PlanningToken(torch.randn(5, 3), width=width, seed=0)


@pytest.mark.parametrize("kind", ["embedding", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_lm_on_embeddings_made_by_hand(
    family: str, kind: str, base: Base, plain: dict, make_corpus: MakeCorpus
):
    """Window by window, with a mask that says itself what may be seen."""
    batch, model = windows_of(make_corpus(DOCUMENTS), 7), plain[family]
    adapter, embeddings = adapter_for(base(family), kind), embeddings_of(batch)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        read = adapter.conditioned(batch.tokens, embeddings, batch.sentence)
        backend = base(family).forward_pass([*adapter.names, "ln_final.hook_out"], model)
        assert isinstance(backend, HFBackend)
        fast, slow = logits(backend, read), logits(BridgeBackend(base(family).bridged), read)
        for row, tokens in enumerate(batch.tokens):
            carried = (embeddings @ adapter.projection)[batch.sentence[row]]
            vectors, positions, predicting = [], [], []
            for t, token in enumerate(tokens):
                vectors.append(table[token] + (carried[t] if kind == "embedding" else 0))
                positions.append(t)
                if kind == "token" and (t == 0 or batch.sentence[row, t] != batch.sentence[row, t - 1]):
                    vectors.append(carried[t])
                    positions.append(t)
                predicting.append(len(vectors) - 1)
            hidden = torch.full((len(vectors), len(vectors)), torch.finfo(torch.float32).min).triu(1)
            expected = model(
                inputs_embeds=torch.stack(vectors)[None],
                position_ids=torch.tensor([positions]),
                attention_mask=hidden[None, None],
                use_cache=False,
            ).logits[0, predicting]
            scored = batch.targets[row] >= 0
            torch.testing.assert_close(fast[row, scored], expected[scored], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(slow[row, scored], expected[scored], atol=1e-4, rtol=1e-4)
    base = BridgeBackend(base(family).bridged).logits(batch.tokens, [])
    assert not torch.allclose(fast, base, atol=0.1)


@pytest.mark.parametrize("kind", list(CONDITIONINGS))
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("window", [32, 5])
def test_an_action_reaches_no_token_before_its_sentence(
    family: str, kind: str, window: int, base: Base, make_corpus: MakeCorpus
):
    """By gradient: the prediction of a token sees the actions of its sentence and of those before it."""
    lm, corpus = base(family), make_corpus(DOCUMENTS)
    windows = cut_windows(corpus, np.arange(2), window, window)
    batch, adapter = collate(corpus, windows), adapter_for(lm, kind)
    embeddings = embeddings_of(batch).requires_grad_()
    read = adapter.conditioned(batch.tokens, embeddings, batch.sentence)
    conditioned = logits(BridgeBackend(lm.bridged), read)
    weights = torch.randn(conditioned.shape[-1], generator=torch.Generator().manual_seed(2))
    # `touched` counts rows of the padded context; these are the documents and the numbers in the corpus.
    document, within = np.divmod(batch.touched.numpy(), batch.context.shape[1])
    numbers = corpus.document_sentences[document] + within
    for row in range(len(windows)):
        start, length = windows.start[row], windows.length[row]
        for position in range(length):
            (gradient,) = torch.autograd.grad(
                conditioned[row, position] @ weights, embeddings, retain_graph=True
            )
            for i, sees in enumerate(gradient.any(-1)):
                begins = corpus.first_token[numbers[i]]
                last = begins + SIZES[numbers[i]] - 1
                carried = begins - 1 <= start + position and last - 1 >= start
                assert sees == (carried and document[i] == windows.document[row]), (row, position, numbers[i])


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("kind", list(CONDITIONINGS))
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_a_prediction_sees_every_token_before_it_and_none_behind(
    family: str, kind: str, fast: bool, base: Base, plain: dict, make_corpus: MakeCorpus
):
    """By gradient, through what is added to the embeddings of the windows' own tokens."""
    lm, batch = base(family), windows_of(make_corpus(DOCUMENTS), 8)
    adapter = adapter_for(lm, kind)
    read = adapter.conditioned(batch.tokens, embeddings_of(batch), batch.sentence)
    added = torch.zeros(*batch.tokens.shape, 16, requires_grad=True)

    def add(activation: Tensor, hook: object = None) -> Tensor:
        if read.slots is None:
            return activation + added
        windows = torch.arange(len(added))[:, None]
        return activation.index_put((windows, read.slots.own), added, accumulate=True)

    names = [*adapter.names, "hook_embed"]
    backend = lm.forward_pass(names, plain[family]) if fast else BridgeBackend(lm.bridged)
    assert isinstance(backend, HFBackend if fast else BridgeBackend)
    found = logits(backend, read, ("hook_embed", add))
    weights = torch.randn(found.shape[-1], generator=torch.Generator().manual_seed(2))
    for row, targets in enumerate(batch.targets):
        for position in range(int((targets >= 0).sum())):
            (gradient,) = torch.autograd.grad(found[row, position] @ weights, added, retain_graph=True)
            seen = [(row, t) for t in range(position + 1)]
            assert (
                list(zip(*map(Tensor.tolist, gradient.any(-1).nonzero(as_tuple=True)), strict=True)) == seen
            )


@pytest.mark.parametrize("kind", ["embedding", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_reaches_adapter_and_planner_and_not_the_lm(
    family: str, kind: str, base: Base, plain: dict, make_corpus: MakeCorpus
):
    batch, adapter = windows_of(make_corpus(DOCUMENTS), 32), adapter_for(base(family), kind)
    planner = Planner(PlannerSettings(width=8), adapter.codebook.detach(), seed=0)
    backend = base(family).forward_pass(adapter.names, plain[family])
    model = PlannedLM(backend, planner, adapter, 1.0)
    token_losses(model(batch, Soft()), batch.targets).sum().backward()
    for name, parameter in [*adapter.named_parameters(), *planner.named_parameters()]:
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in [*plain[family].parameters()])


@pytest.mark.parametrize("kind", ["embedding", "token"])
def test_gradients_are_finite_differences(
    kind: str,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    make_corpus: MakeCorpus,
):
    model = make_model("GPT2", len(tokenizer), hidden_size=4, num_hidden_layers=2).double()
    lm = BaseLM(lambda: model, tokenizer, "exact")
    batch, adapter = windows_of(make_corpus([[2, 2, 3], [1, 4]]), 32), adapter_for(lm, kind).double()

    def loss(projection: Tensor, codebook: Tensor) -> Tensor:
        given = {"projection": projection, "codebook": codebook}
        embeddings = Oracle()(torch.empty(0), batch.actions, given["codebook"], 1.0)
        with torch.no_grad():
            adapter.codebook.copy_(codebook)
        read = torch.func.functional_call(
            _Conditioning(adapter), {"adapter.projection": projection}, (batch, embeddings)
        )
        return (
            logits(BridgeBackend(lm.bridged), read).log_softmax(-1).gather(2, batch.tokens[..., None]).sum()
        )

    start = tuple(p.detach().clone().requires_grad_() for p in (adapter.projection, adapter.codebook))
    assert torch.autograd.gradcheck(loss, start)


class _Conditioning(torch.nn.Module):
    """Calls an adapter's method as a module, so that its parameters can be replaced."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, batch: Batch, embeddings: Tensor) -> Conditioned:
        return self.adapter.conditioned(batch.tokens, embeddings, batch.sentence)


def test_a_window_as_long_as_the_table_of_positions_is_read(base: Base, make_corpus: MakeCorpus):
    lm = base("gpt2")
    longest = lm.config.max_position_embeddings
    batch = windows_of(make_corpus([[3] * 20]), longest)
    adapter = adapter_for(lm, "token")
    read = adapter.conditioned(batch.tokens, embeddings_of(batch), batch.sentence)
    assert read.tokens.shape[1] > longest == batch.tokens.shape[1]
    assert logits(BridgeBackend(lm.bridged), read).shape[:2] == batch.tokens.shape


def test_an_lm_that_takes_no_positions_is_refused(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    lm = BaseLM(lambda: make_model("Bloom", len(tokenizer), n_layer=2, n_head=2), tokenizer, "bloom")
    for kind in ("adapter", "embedding"):
        location_width(lm, ConditioningSettings(kind=kind, skip_layers=1))
    with pytest.raises(ProbekitError) as raised:
        location_width(lm, ConditioningSettings(kind="token"))
    message = str(raised.value)
    assert message.startswith("conditioning.kind is 'token', but BloomForCausalLM takes no positions")
    assert "\n" not in message


def test_layers_are_skipped_by_adapters_alone(base: Base):
    for kind in ("embedding", "token"):
        assert location_width(base("gpt2"), ConditioningSettings(kind=kind, skip_layers=99)) == 16


@pytest.mark.parametrize("kind", ["embedding", "token"])
def test_the_seed_decides_how_an_adapter_begins(kind: str, base: Base):
    first, same, other = (
        new_adapter(ConditioningSettings(kind=kind), torch.randn(5, 3), base("gpt2"), seed).projection
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.allclose(first, other, atol=1e-2)
