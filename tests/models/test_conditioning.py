"""Conditioning: what each kind adds, which token it reaches, and its gradients through the whole LM."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probekit.config import ConditioningSettings, PlannerSettings
from probekit.data.corpus import Corpus
from probekit.data.windows import Batch, collate, cut_windows
from probekit.errors import ProbekitError
from probekit.models.backends import Backend, BridgeBackend, HFBackend, Hook
from probekit.models.conditioning import (
    CONDITIONINGS,
    Adapter,
    Conditioned,
    LayerAdapter,
    PlanningToken,
    location_width,
    new_adapter,
)
from probekit.models.frozen_lm import FrozenLM
from probekit.models.locations import hook_name
from probekit.models.mixing import Oracle, Soft
from probekit.models.planned_lm import PlannedLM, token_losses
from probekit.models.planner import Planner

FAMILIES = ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen2", "qwen3"]
LAYERS = 3
LOCATIONS = [
    "attn.hook_z", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_in", "hook_resid_pre",
    "hook_resid_post", "hook_attn_out", "hook_mlp_out", "mlp.hook_pre", "mlp.hook_post",
    "ln1.hook_normalized", "ln2.hook_out",
]  # fmt: skip
DOCUMENTS = [[3, 2, 4], [1, 1, 5, 2]]  # tokens in each sentence

MakeCorpus = Callable[..., Corpus]
Base = Callable[[str], FrozenLM]


def batch_of(corpus: Corpus, window: int = 32) -> Batch:
    return collate(corpus, cut_windows(corpus, np.arange(len(corpus.split)), window, window))


def adapter_for(
    lm: FrozenLM, corpus: Corpus, *, seed: int = 0, size: float = 1.0, **chosen: object
) -> LayerAdapter:
    """An adapter whose projections are large enough to matter beside the LM's activations."""
    settings = ConditioningSettings(**{"skip_layers": 1, **chosen})
    adapter = new_adapter(settings, torch.from_numpy(corpus.codebook.centroids), lm, seed)
    with torch.no_grad():
        adapter.projections *= 10 * size
    return adapter


def logits(lm: FrozenLM, batch: Batch, hooks: list) -> Tensor:
    with lm.bridged.hooks(fwd_hooks=hooks):
        return lm.bridged(batch.tokens)


def recorder(into: dict[str, Tensor], names: list[str]) -> list:
    """Hooks that copy what passes them."""

    def record(activation: Tensor, hook: object, name: str) -> None:
        into[name] = activation.detach().clone()

    return [(name, lambda x, hook, name=name: record(x, hook, name)) for name in names]


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_gets_its_projection_of_the_tokens_action(
    family: str, skip: int, base: Base, make_corpus: MakeCorpus
):
    lm, corpus = base(family), make_corpus(DOCUMENTS)
    batch, adapter = batch_of(corpus), adapter_for(lm, corpus, skip_layers=skip)
    embeddings = torch.randn(len(batch.touched), 3, generator=torch.Generator().manual_seed(1))
    names = [hook_name("attn.hook_z", layer) for layer in range(LAYERS)]
    before, after = {}, {}
    with torch.no_grad():
        hooks = [
            *recorder(before, names),
            *adapter.hooks(embeddings, batch.sentence),
            *recorder(after, names),
        ]
        logits(lm, batch, hooks)
    for layer, name in enumerate(names):
        added = (after[name] - before[name]).flatten(2)
        if layer < skip:
            assert not added.any()
            continue
        for window, sentences in enumerate(batch.sentence):
            for position, sentence in enumerate(sentences):
                expected = sum(
                    embeddings[sentence, d] * adapter.projections[layer - skip, d] for d in range(3)
                )
                torch.testing.assert_close(added[window, position], expected, atol=1e-5, rtol=1e-5)


def test_layers_below_are_untouched_and_the_projection_enters_before_the_output_matrix(
    base: Base, folders: dict, make_corpus: MakeCorpus
):
    lm, corpus = base("gpt2"), make_corpus(DOCUMENTS)
    batch, adapter = batch_of(corpus), adapter_for(lm, corpus, skip_layers=1)
    embeddings = Oracle()(torch.empty(0), batch.actions, adapter.codebook, 1.0)
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_attn_out", "blocks.2.hook_resid_pre"]
    base, conditioned = {}, {}
    with torch.no_grad():
        logits(lm, batch, recorder(base, names))
        logits(lm, batch, [*adapter.hooks(embeddings, batch.sentence), *recorder(conditioned, names)])
        below, attention, above = names
        assert torch.equal(base[below], conditioned[below])
        output = load_file(folders["gpt2"] / "model.safetensors")["transformer.h.1.attn.c_proj.weight"]
        expected = (embeddings @ adapter.projections[0] @ output)[batch.sentence]
    torch.testing.assert_close(conditioned[attention] - base[attention], expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(base[above], conditioned[above], atol=1e-2)


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.filterwarnings("ignore:A forward hook edited")
def test_other_locations_condition_too(family: str, location: str, base: Base, make_corpus: MakeCorpus):
    lm, corpus = base(family), make_corpus(DOCUMENTS)
    batch, adapter = batch_of(corpus), adapter_for(lm, corpus, location=location)
    one_head = family == "llama" and location in (
        "attn.hook_k",
        "attn.hook_v",
    )  # two heads share one of these
    width = 8 if one_head else {"gpt2": 64, "llama": 24}[family] if location.startswith("mlp.") else 16
    assert adapter.projections.shape == (2, 3, width)
    embeddings = Soft()(torch.randn(len(batch.touched), 5), batch.actions, adapter.codebook, 1.0)
    conditioned = logits(lm, batch, adapter.hooks(embeddings, batch.sentence))
    assert not torch.allclose(conditioned, logits(lm, batch, []), atol=1e-2)
    token_losses(conditioned, batch.targets).sum().backward()
    for gradient in (adapter.codebook.grad, *adapter.projections.grad):
        # What is added equally to all keys changes no attention, but these differ by sentence.
        assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("kind", CONDITIONINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_reaches_adapter_and_planner_and_not_the_lm(
    family: str, kind: str, base: Base, plain: dict, make_corpus: MakeCorpus
):
    batch, adapter = batch_of(make_corpus(DOCUMENTS)), kind_adapter(base(family), kind)
    planner = Planner(PlannerSettings(width=8), adapter.codebook.detach(), seed=0)
    model = PlannedLM(base(family).backend_for(adapter.names, plain[family]), planner, adapter, 1.0)
    token_losses(model(batch, Soft()), batch.targets).sum().backward()
    for name, parameter in [*adapter.named_parameters(), *planner.named_parameters()]:
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in plain[family].parameters())


@pytest.mark.parametrize("part", ["adapter.projection", "adapter.codebook", "planner."])
@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_gradients_through_the_whole_lm_are_finite_differences(
    kind: str,
    part: str,
    make_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    make_corpus: MakeCorpus,
):
    """In float64; along random directions for the planner, which has the most parameters."""
    tiny = make_model("GPT2", len(tokenizer), hidden_size=4, num_hidden_layers=2).double()
    lm, batch = (
        FrozenLM(lambda: tiny, tiny.config, tokenizer, "exact"),
        batch_of(make_corpus([[2, 2, 3], [1, 4]])),
    )
    batch = replace(batch, context=batch.context.double())
    adapter = kind_adapter(lm, kind)
    planner = Planner(PlannerSettings(width=4), adapter.codebook.detach(), seed=0).eval()
    model = PlannedLM(BridgeBackend(lm.bridged), planner, adapter, temperature=0.7).double()
    chosen = {name: p for name, p in model.named_parameters() if name.startswith(part)}

    def loss(*values: Tensor) -> Tensor:
        conditioned = functional_call(model, dict(zip(chosen, values, strict=True)), (batch, Soft()))
        return conditioned.log_softmax(-1).gather(2, batch.tokens[..., None]).sum()

    start = tuple(p.detach().clone().requires_grad_() for p in chosen.values())
    assert sum(gradient.abs().sum() for gradient in torch.autograd.grad(loss(*start), start)) > 1e-2
    assert gradcheck(loss, start, fast_mode=part == "planner.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"location": "attn.hook_pattern"},
            "conditioning.location is 'attn.hook_pattern', where .* hook_resid_pre",
        ),
        ({"location": "hook_embed"}, "conditioning.location is 'hook_embed', which is in no layer"),
        (
            {"location": "ln_final.hook_out"},
            "conditioning.location is 'ln_final.hook_out', which is in no layer",
        ),
        ({"skip_layers": LAYERS}, rf"skip_layers is {LAYERS}.*at most {LAYERS - 1}"),
    ],
)
def test_what_does_not_fit_the_lm_is_refused(settings: dict, message: str, base: Base):
    with pytest.raises(ProbekitError, match=message) as raised:
        location_width(base("gpt2"), ConditioningSettings(**settings))
    assert "\n" not in str(raised.value)
    for kind in ("embedding", "token"):  # which have no location or layers of their own
        assert location_width(base("gpt2"), ConditioningSettings(kind=kind, **settings)) == 16


def test_every_layer_starts_different_and_the_seed_decides_how(base: Base, make_corpus: MakeCorpus):
    """The first authors' projections all start identical (reference.md, section 4, number 5)."""
    lm, corpus = base("gpt2"), make_corpus(DOCUMENTS)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = adapter_for(lm, corpus, skip_layers=0, seed=1).projections
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    same, other = (adapter_for(lm, corpus, skip_layers=0, seed=seed).projections for seed in (1, 2))
    assert torch.equal(one, same)
    starts = [*one, *other]
    for i, projection in enumerate(starts):
        for another in starts[:i]:
            assert abs(torch.corrcoef(torch.stack([projection.flatten(), another.flatten()]))[0, 1]) < 0.6


def test_an_adapter_trains_its_own_codebook():
    codebook = torch.randn(5, 3)
    adapter = LayerAdapter(codebook, [f"blocks.{layer}.attn.hook_z" for layer in (1, 2)], width=4, seed=0)
    assert torch.equal(adapter.codebook, codebook)
    assert {name for name, _ in adapter.named_parameters()} == {"codebook", "projections"}
    with torch.no_grad():
        adapter.codebook.zero_()
    assert codebook.any()


SIZES = [size for document in DOCUMENTS for size in document]


def kind_adapter(lm: FrozenLM, kind: str) -> Adapter:
    """An adapter whose projections are large enough to matter beside the LM's activations."""
    codebook = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    adapter = new_adapter(ConditioningSettings(kind=kind, skip_layers=1), codebook, lm, seed=0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter *= 1 if name == "codebook" else 20
    return adapter


def embeddings_of(batch: Batch) -> Tensor:
    return torch.randn(len(batch.touched), 3, generator=torch.Generator().manual_seed(1))


def logits_of(backend: Backend, read: Conditioned, *more: Hook) -> Tensor:
    found = backend.logits(read.tokens, [*read.hooks, *more], read.positions)
    return found if read.slots is None else read.slots.predictions(found)


def test_slots_made_by_hand():
    sentence = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 3]])
    read = token_adapter(4).conditioned(
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
    read = token_adapter(4).conditioned(torch.arange(6).view(2, 3), torch.randn(4, 3), sentence)
    assert read.positions.tolist() == [[0, 0, 1, 1, 2, 2], [0, 0, 1, 2, 2, 2]]
    assert read.slots.planning.int().tolist() == [[0, 1, 0, 1, 0, 1], [0, 1, 0, 0, 0, 0]]


def token_adapter(width: int) -> PlanningToken:
    return PlanningToken(torch.randn(5, 3), width=width, seed=0)


@pytest.mark.parametrize("kind", ["embedding", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_lm_on_embeddings_made_by_hand(
    family: str, kind: str, base: Base, plain: dict, make_corpus: MakeCorpus
):
    """Window by window, with a mask that says itself what may be seen."""
    batch, model = batch_of(make_corpus(DOCUMENTS), 7), plain[family]
    adapter, embeddings = kind_adapter(base(family), kind), embeddings_of(batch)
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        read = adapter.conditioned(batch.tokens, embeddings, batch.sentence)
        backend = base(family).backend_for([*adapter.names, "ln_final.hook_out"], model)
        assert isinstance(backend, HFBackend)
        fast, slow = logits_of(backend, read), logits_of(BridgeBackend(base(family).bridged), read)
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
    batch, adapter = collate(corpus, windows), kind_adapter(lm, kind)
    embeddings = embeddings_of(batch).requires_grad_()
    read = adapter.conditioned(batch.tokens, embeddings, batch.sentence)
    conditioned = logits_of(BridgeBackend(lm.bridged), read)
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
    lm, batch = base(family), batch_of(make_corpus(DOCUMENTS), 8)
    adapter = kind_adapter(lm, kind)
    read = adapter.conditioned(batch.tokens, embeddings_of(batch), batch.sentence)
    added = torch.zeros(*batch.tokens.shape, 16, requires_grad=True)

    def add(activation: Tensor, hook: object = None) -> Tensor:
        if read.slots is None:
            return activation + added
        windows = torch.arange(len(added))[:, None]
        return activation.index_put((windows, read.slots.own), added, accumulate=True)

    names = [*adapter.names, "hook_embed"]
    backend = lm.backend_for(names, plain[family]) if fast else BridgeBackend(lm.bridged)
    assert isinstance(backend, HFBackend if fast else BridgeBackend)
    found = logits_of(backend, read, ("hook_embed", add))
    weights = torch.randn(found.shape[-1], generator=torch.Generator().manual_seed(2))
    for row, targets in enumerate(batch.targets):
        for position in range(int((targets >= 0).sum())):
            (gradient,) = torch.autograd.grad(found[row, position] @ weights, added, retain_graph=True)
            seen = [(row, t) for t in range(position + 1)]
            assert (
                list(zip(*map(Tensor.tolist, gradient.any(-1).nonzero(as_tuple=True)), strict=True)) == seen
            )


def test_a_window_as_long_as_the_table_of_positions_is_read(base: Base, make_corpus: MakeCorpus):
    lm = base("gpt2")
    longest = lm.config.max_position_embeddings
    batch = batch_of(make_corpus([[3] * 20]), longest)
    adapter = kind_adapter(lm, "token")
    read = adapter.conditioned(batch.tokens, embeddings_of(batch), batch.sentence)
    assert read.tokens.shape[1] > longest == batch.tokens.shape[1]
    assert logits_of(BridgeBackend(lm.bridged), read).shape[:2] == batch.tokens.shape


def test_an_lm_that_takes_no_positions_is_refused(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    model = make_model("Bloom", len(tokenizer), n_layer=2, n_head=2)
    lm = FrozenLM(lambda: model, model.config, tokenizer, "bloom")
    for kind in ("adapter", "embedding"):
        location_width(lm, ConditioningSettings(kind=kind, skip_layers=1))
    with pytest.raises(ProbekitError) as raised:
        location_width(lm, ConditioningSettings(kind="token"))
    message = str(raised.value)
    assert message.startswith("conditioning.kind is 'token', but BloomForCausalLM takes no positions")
    assert "\n" not in message
