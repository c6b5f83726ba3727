"""Compressed weights against their definitions, and that compressing nothing changes nothing."""

import copy

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.models.compression import compressed, of_rank, pruned, to_int8


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    torch.manual_seed(0)
    if request.param == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2))
    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, **size))


def layers_map(model):
    if isinstance(model, GPT2LMHeadModel):
        return model.transformer.h[0].mlp.c_fc.weight.T  # [outputs, inputs]
    return model.model.layers[0].mlp.up_proj.weight


def test_int8_rounds_each_output_to_255_levels():
    weight = torch.tensor([[1.27, -0.5049, 0.0], [0.0, 0.0, 0.0], [-254.0, 3.1, 100.0]])
    expected = torch.tensor([[1.27, -0.50, 0.0], [0.0, 0.0, 0.0], [-254.0, 4.0, 100.0]])
    torch.testing.assert_close(to_int8(weight), expected)


def test_pruning_takes_the_smallest():
    weight = torch.tensor([[1.0, -4.0, 0.1], [-0.2, 3.0, 2.0]])
    assert pruned(weight, 0.5).tolist() == [[0.0, -4.0, 0.0], [0.0, 3.0, 2.0]]


def test_a_rank_is_that_of_the_nearest_matrix():
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    found = of_rank(weight, 2)
    assert torch.linalg.matrix_rank(found) == 2
    left_out = torch.linalg.svdvals(weight)[2:]
    torch.testing.assert_close((weight - found).norm(), left_out.norm())


@pytest.mark.parametrize("how", ["int8", "prune=0.5", "rank=3"])
def test_the_maps_of_the_layers_and_nothing_else_are_compressed(model, how):
    before = copy.deepcopy(model)
    compressed(model, how)
    changed = {
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    }
    linear = {
        name
        for name, value in model.state_dict().items()
        if value.ndim == 2 and ("layers" in name or ".h." in name)
    }
    assert changed == linear
    weight, own = layers_map(before), layers_map(model)
    if how == "int8":
        steps = own / (weight.abs().amax(1, keepdim=True) / 127)
        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    elif how == "rank=3":
        assert torch.linalg.matrix_rank(own, rtol=1e-4) == 3
    else:
        assert (own == 0).float().mean() == 0.5


@pytest.mark.parametrize("how", ["prune=0", "rank=8", "rank=1000"])
def test_compressing_nothing_changes_no_bit(model, how):
    before = copy.deepcopy(model.state_dict())
    compressed(model, how)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "how", ["int4", "prune=1", "prune=half", "prune", "rank=0", "rank=1.5", "rank=-3", "", "nan"]
)
def test_wrong_forms_are_refused(how):
    with pytest.raises(ProbekitError, match=r"lm.compress.*must be int8, prune=SHARE .* or rank=NUMBER"):
        Config().override({"lm.compress": how})


def test_a_model_without_linear_maps_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=0, n_head=2))
    with pytest.raises(ProbekitError, match="GPT2LMHeadModel holds its layers' weights in no linear maps"):
        compressed(model, "int8")


def test_fused_experts_are_refused_before_anything_is_changed():
    size = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=30, num_key_value_heads=2, num_local_experts=2, **size)
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ProbekitError, match=r"belong to no linear map of PyTorch, such as 0\.mlp\."):
        compressed(model, "int8")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_maps_outside_the_layers_stay():
    size = {"hidden_size": 8, "ffn_dim": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = OPTForCausalLM(
        OPTConfig(vocab_size=30, max_position_embeddings=16, word_embed_proj_dim=4, **size)
    )
    outside = {name: value.clone() for name, value in model.state_dict().items() if "project_" in name}
    assert len(outside) == 2
    compressed(model, "prune=0.5")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in outside.items())
    assert (model.model.decoder.layers[1].fc1.weight == 0).float().mean() == 0.5


def test_a_run_reads_the_compressed_lm(tiny_run):
    """As `lm.compress` says what a run's LM is, its digest tells it from the LM itself."""
    run = type(tiny_run)(tiny_run.folder, tiny_run.config.override({"lm.compress": "prune=0.5"}))
    weight = run.plain_model().transformer.h[0].mlp.c_fc.weight
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=1e-3)
    assert run.weights_digest("none") == f"{tiny_run.weights_digest('none')} prune=0.5"
    with pytest.raises(ProbekitError, match=r"lm\.compress was None when the lm of"):
        tiny_run.with_settings({"lm.compress": "int8"})


def test_int8_of_bfloat16_keeps_the_dtype():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    ).bfloat16()
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    compressed(model, "int8")
    found = model.transformer.h[0].mlp.c_fc.weight
    assert found.dtype == torch.bfloat16
    assert (found - weight).abs().max() < weight.abs().max() / 100
