"""`probekit.activations` against Transformers' own hidden states, one text at a time."""

import copy
import warnings

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import probekit
from probekit.data.tokenizer import train_tokenizer
from probekit.errors import ProbekitError
from probekit.models.language_model import bridge
from probekit.probing.texts import activation_at, whole_texts

TEXTS = ["the plan and the text", "a", "the text is a plan, and the plan", "text", "and the plan is the text"]
POSITIONS, LAYERS, WIDTH = 24, 3, 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXTS, 270, tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request, tokenizer):
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    if request.param == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(**size, n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS, n_head=2)
        ).train()
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = LlamaConfig(**size, **shape, intermediate_size=24, max_position_embeddings=POSITIONS)
    return LlamaForCausalLM(config).train()


def hidden_states(model, tokenizer, text: str) -> torch.Tensor:
    """After all layers but the last, which Transformers normalises [layers - 1, tokens, width]."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
    with torch.no_grad():
        states = copy.deepcopy(model).eval()(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return torch.cat(states[1:-1])[:, 1:]


@pytest.mark.parametrize(
    ("position", "at"),
    [
        ("last", lambda states: states[:, -1]),
        ("first", lambda states: states[:, 0]),
        ("mean", lambda states: states.mean(1)),
    ],
)
def test_reads_what_transformers_computes(model, tokenizer, position, at):
    found = probekit.activations(
        model, tokenizer, TEXTS, range(LAYERS - 1), position=position, batch_size=2, quiet=True
    )
    assert found.layers == (0, 1)
    expected = torch.stack([at(hidden_states(model, tokenizer, text)) for text in TEXTS], 1)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found), found.values.numpy())


def test_positions_count_from_the_end(model, tokenizer):
    texts = [TEXTS[0], TEXTS[2]]
    found = probekit.activations(model, tokenizer, texts, 1, position="last-2", quiet=True)
    expected = torch.stack([hidden_states(model, tokenizer, text)[1, -3] for text in texts])
    torch.testing.assert_close(found.values[0], expected, rtol=1e-4, atol=1e-5)
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    assert found.positions.tolist() == [length - 3 for length in lengths]


def test_the_model_is_left_as_it_was(model, tokenizer):
    weights = copy.deepcopy(model.state_dict())
    next(model.parameters()).requires_grad_(False)
    probekit.activations(model, tokenizer, TEXTS, quiet=True)
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_bridge_reads_the_same(model, tokenizer):
    bridged = bridge(copy.deepcopy(model), tokenizer, "tiny")
    for location in ("hook_resid_post", "attn.hook_z", ["hook_embed", "ln_final.hook_out"]):
        plain = probekit.activations(model, tokenizer, TEXTS, location=location, quiet=True)
        found = probekit.activations(bridged, None, TEXTS, location=location, quiet=True)
        assert found.points == plain.points
        torch.testing.assert_close(found.values, plain.values, rtol=1e-4, atol=1e-4)


def test_long_texts_are_cut_if_asked_for(model, tokenizer):
    long = " ".join(TEXTS * 3)
    with pytest.raises(ProbekitError, match=r"text 1 has \d+ tokens, but the LM reads 23 of a text; 1 of 2"):
        probekit.activations(model, tokenizer, ["a", long], quiet=True)
    found = probekit.activations(model, tokenizer, ["a", long], truncate=True, quiet=True)
    assert found.tokens_read.tolist()[1] == POSITIONS - 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"texts": "the plan"}, "give a list of texts"),
        ({"texts": ["a", ""]}, "text 1 is empty, as are 1 of 2 texts"),
        ({"layers": 3}, "layers has 3, but the LM's layers are 0 to 2"),
        ({"location": "hook_resid"}, "location is 'hook_resid'"),
        (
            {"position": -2},
            r"position is -2; it must be first, mean, last, last-1 \(the token before the last\)",
        ),
        ({"position": "last-2"}, "text 1 has 1 tokens, but position is last-2"),
        ({"model": 3}, "model is a int"),
        ({"texts": ["a", None]}, "text 1 is None; it must be a string"),
        ({"texts": ["a", "\ud800"]}, "text 1 is .* halves of surrogate pairs"),
        ({"texts": iter(["a"])}, "give a list of texts"),
        ({"layers": "last"}, "layers has l, but the LM's layers are 0 to 2"),
        ({"layers": 1.5}, "layers has 1.5, but"),
        ({"layers": []}, "layers has none, but"),
        ({"location": 3}, "location is 3; give TransformerLens hooks"),
        ({"batch_size": 0}, "batch_size is 0; it must be a whole number from 1 on"),
    ],
)
def test_bad_input_is_refused_in_one_line(model, tokenizer, changed, message):
    given = {"model": model, "tokenizer": tokenizer, "texts": TEXTS, "quiet": True} | changed
    with pytest.raises(ProbekitError, match=message) as caught:
        probekit.activations(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("units", [False, True])
def test_a_dtype_that_the_cpu_emulates_is_warned_of(model, tokenizer, monkeypatch, units):
    monkeypatch.setattr("probekit.probing.texts.cpu_has_bfloat16", lambda: units)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        half = probekit.activations(copy.deepcopy(model).bfloat16(), tokenizer, TEXTS, 0, quiet=True)
        probekit.activations(model, tokenizer, TEXTS, 0, quiet=True)
    assert half.values.dtype == torch.bfloat16
    said = [str(warning.message) for warning in caught if "this CPU" in str(warning.message)]
    assert len(said) == (not units)
    if said:
        assert "no units for bfloat16" in said[0]
        assert "model.float()" in said[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_half_precision_are_summed_in_float32(dtype):
    """The sum of 200 activations of 1,000 is beyond float16, and bfloat16 would round it."""
    values = torch.full((1, 202, 1), 1000.0, dtype=dtype)
    values[:, 1::2] = 1008
    values[0, [0, 201]] = torch.inf  # before and after the text
    assert activation_at("mean", values, *whole_texts(1, torch.tensor([200]))).item() == 1004
