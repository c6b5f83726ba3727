"""The adapter: what it adds, where, to which token, and its gradients through the whole LM."""

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
from probekit.models.base_lm import BaseLM
from probekit.models.conditioning import LayerAdapter, location_width, new_adapter
from probekit.models.hook_points import OUTSIDE_BLOCKS, BridgeBackend, hook_name
from probekit.models.mixing import GumbelSoftmax, Mixing, Oracle, Soft, StraightThrough
from probekit.models.planner import Planner
from probekit.models.planner_lm import PlannedLM, token_losses

FAMILIES = ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen2", "qwen3"]
LAYERS = 3
LOCATIONS = [
    "attn.hook_z", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_in", "hook_resid_pre",
    "hook_resid_post", "hook_attn_out", "hook_mlp_out", "mlp.hook_pre", "mlp.hook_post",
    "ln1.hook_normalized", "ln2.hook_out",
]  # fmt: skip
DOCUMENTS = [[3, 2, 4], [1, 1, 5, 2]]  # tokens in each sentence

MakeCorpus = Callable[..., Corpus]
Base = Callable[[str], BaseLM]


def batch_of(corpus: Corpus, window: int = 32) -> Batch:
    return collate(corpus, cut_windows(corpus, np.arange(len(corpus.split)), window, window))


def adapter_for(
    lm: BaseLM, corpus: Corpus, *, seed: int = 0, size: float = 1.0, **chosen: object
) -> LayerAdapter:
    """An adapter whose projections are large enough to matter beside the LM's activations."""
    settings = ConditioningSettings(**{"skip_layers": 1, **chosen})
    adapter = new_adapter(settings, torch.from_numpy(corpus.codebook.centroids), lm, seed)
    with torch.no_grad():
        adapter.projections *= 10 * size
    return adapter


def logits(lm: BaseLM, batch: Batch, hooks: list) -> Tensor:
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
        # What is added to all keys alike changes no attention, but these differ by sentence.
        assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize(
    "location", ["attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_result", "nothing"]
)
def test_locations_without_a_vector_for_each_position_are_refused(location: str, base: Base):
    with pytest.raises(ProbekitError) as raised:
        location_width(base("gpt2"), ConditioningSettings(location=location))
    message = str(raised.value)
    assert message.startswith(f"conditioning.location is {location!r}")
    assert "hook_resid_pre" in message
    assert "\n" not in message


@pytest.mark.parametrize("location", OUTSIDE_BLOCKS)
def test_locations_that_are_in_no_layer_are_refused(location: str, base: Base):
    """They can be probed, but no projection of a layer can be added there."""
    assert location in base("gpt2").locations
    with pytest.raises(ProbekitError) as raised:
        location_width(base("gpt2"), ConditioningSettings(location=location))
    message = str(raised.value)
    assert message.startswith(f"conditioning.location is {location!r}, which is in no layer")
    assert "\n" not in message


def test_some_layer_must_be_left(base: Base, make_corpus: MakeCorpus):
    corpus = make_corpus(DOCUMENTS)
    assert len(adapter_for(base("gpt2"), corpus, skip_layers=LAYERS - 1).projections) == 1
    for skip in (LAYERS, LAYERS + 5):
        with pytest.raises(ProbekitError, match=rf"conditioning.skip_layers is {skip}.*at most {LAYERS - 1}"):
            adapter_for(base("gpt2"), corpus, skip_layers=skip)


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


@pytest.mark.parametrize("mixing", [Soft(), StraightThrough(), GumbelSoftmax()])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family_the_loss_reaches_adapter_and_planner_and_not_the_lm(
    family: str, mixing: Mixing, base: Base, make_corpus: MakeCorpus
):
    lm, corpus = base(family), make_corpus(DOCUMENTS)
    batch, adapter = batch_of(corpus), adapter_for(lm, corpus)
    planner = Planner(PlannerSettings(width=8), adapter.codebook.detach(), seed=0)
    model = PlannedLM(BridgeBackend(lm.bridged), planner, adapter, temperature=1.0)
    losses = token_losses(model(batch, mixing), batch.targets)
    losses.sum().backward()
    for gradient in (*adapter.projections.grad, adapter.codebook.grad):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-3
    for name, parameter in planner.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in lm.bridged.parameters())


@pytest.fixture
def exact(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, make_corpus: MakeCorpus
) -> tuple[PlannedLM, Batch]:
    """A planned GPT-2 and a batch, all in float64."""
    corpus = make_corpus([[2, 2, 3], [1, 4]], actions=4, dimensions=2)
    model = make_model("GPT2", len(tokenizer), hidden_size=4, num_hidden_layers=2).double()
    lm = BaseLM(lambda: model, tokenizer, "exact")
    adapter = adapter_for(lm, corpus)
    planner = Planner(PlannerSettings(width=4), adapter.codebook.detach(), seed=0).eval()
    batch = batch_of(corpus)
    batch = replace(batch, context=batch.context.double())
    return PlannedLM(BridgeBackend(lm.bridged), planner, adapter, temperature=0.7).double(), batch


@pytest.mark.parametrize("part", ["adapter.projections", "adapter.codebook", "planner."])
def test_gradients_through_the_whole_lm_are_finite_differences(part: str, exact: tuple[PlannedLM, Batch]):
    model, batch = exact
    chosen = {name: p for name, p in model.named_parameters() if name.startswith(part)}
    assert chosen

    def loss(*values: Tensor) -> Tensor:
        conditioned = functional_call(model, dict(zip(chosen, values, strict=True)), (batch, Soft()))
        return conditioned.log_softmax(-1).gather(2, batch.tokens[..., None]).sum()

    start = tuple(p.detach().clone().requires_grad_() for p in chosen.values())
    gradients = torch.autograd.grad(loss(*start), start)
    assert sum(gradient.abs().sum() for gradient in gradients) > 1e-2
    # Along random directions for the planner, which has the most parameters; one by one for the others.
    assert gradcheck(loss, start, fast_mode=part == "planner.")


@pytest.mark.parametrize("window", [32, 4, 1])
def test_a_position_carries_the_action_of_the_next_tokens_sentence(window: int, make_corpus: MakeCorpus):
    """Table made by hand: the last token of a sentence already carries the next sentence's action."""
    batch = batch_of(make_corpus([[3, 2, 4]]), window)
    carried = batch.touched[batch.sentence]  # sentences of the one document
    scored = [
        int(sentence)
        for row, target in zip(carried, batch.targets, strict=True)
        for sentence in row[target >= 0]
    ]
    # separator a a | a b | b c c c, each under the sentence of the token that comes next; the last c has none
    assert scored == [0, 0, 0, 1, 1, 2, 2, 2, 2]
