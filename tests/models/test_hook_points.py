"""Hook points of architectures: what a shallow LM shows is true of the deep one, what is wrong is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from probekit.errors import ProbekitError
from probekit.models import hook_points
from probekit.models.backends import BridgeBackend, HFBackend
from probekit.models.hook_points import Architecture, architecture_of, broken_sums, examine, find_module
from probekit.models.language_model import bridge, shallow
from probekit.models.locations import OUTSIDE_BLOCKS, hook_name

FAMILIES = ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen2", "qwen3"]
TOKENS = torch.randint(200, (4, 11), generator=torch.Generator().manual_seed(0))
Architectures = Callable[[str], Architecture]

COMMON = {
    "hook_resid_pre",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "mlp.hook_post",
    *OUTSIDE_BLOCKS,
}


def read(backend: BridgeBackend | HFBackend, names: list[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    hooks = [(name, lambda x, name=name: seen.update({name: x.flatten(2).clone()})) for name in names]
    with torch.no_grad():
        backend(TOKENS, hooks, len(names) + 1)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_location_fires_in_every_layer_with_a_vector_for_each_position(
    family: str, bridged: dict, architectures: Architectures
):
    found = architectures(family)
    assert found.locations.keys() >= COMMON
    assert [found.locations[name] for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")] == [16] * 3
    assert [found.locations[name] for name in OUTSIDE_BLOCKS] == [16] * 2
    assert found.locations["attn.hook_z"] == (12 if family == "qwen3" else 16)
    assert found.locations["mlp.hook_post"] == (64 if family == "gpt2" else 24)
    names = {
        hook_name(location, layer): width for location, width in found.locations.items() for layer in range(3)
    }
    seen = read(BridgeBackend(bridged[family]), [*names])
    assert {name: tuple(value.shape) for name, value in seen.items()} == {
        name: (*TOKENS.shape, width) for name, width in names.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_found_on_a_shallow_lm_is_true_of_the_deep_one(
    family: str, bridged: dict, plain: dict, architectures: Architectures
):
    """Every hook that the plain module has sees what the bridge sees, in every layer, with other weights."""
    found = architectures(family)
    names = [hook_name(location, layer) for location in found.locations for layer in range(3)]
    names = [name for name in dict.fromkeys(names) if found.points([name])]
    assert len(names) > 50
    expected = read(BridgeBackend(bridged[family]), names)
    for name, value in read(HFBackend(plain[family], found.points(names)), names).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("family", "location"),
    [
        ("gpt2", "attn.hook_q"),
        ("gpt2", "attn.hook_pattern"),
        ("gpt2", "ln1.hook_normalized"),
        ("llama", "attn.hook_rot_q"),
        ("olmo2", "attn.hook_q_normed"),
        ("gpt_neox", "attn.hook_v"),
    ],
)
def test_hooks_without_a_module_are_left_to_the_bridge(
    family: str, location: str, architectures: Architectures
):
    names = ["blocks.1.hook_resid_pre", f"blocks.1.{location}"]
    assert architectures(family).points(names[:1]) is not None
    assert architectures(family).points(names) is None


def test_a_module_that_sees_another_shape_is_left_to_the_bridge(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    """OPT folds windows and positions into one axis in front of its MLP; the bridge does not."""
    model = make_model("OPT", len(tokenizer), ffn_dim=24, pad_token_id=1)
    found = examine(model.config, tokenizer, "facebook/opt-125m")
    assert found.locations["hook_resid_mid"] == 16
    assert found.points(["blocks.1.hook_resid_mid"]) is None


def test_an_architecture_is_examined_once(
    monkeypatch: pytest.MonkeyPatch, plain: dict, tokenizer: PreTrainedTokenizerBase
):
    examined = []

    def count(config: PreTrainedConfig, *given: Any) -> Architecture:
        examined.append(config)
        return examine(config, *given)

    monkeypatch.setattr(hook_points, "examine", count)
    monkeypatch.setattr(hook_points, "_EXAMINED", {})
    config = plain["gpt2"].config
    moved, wider = copy.deepcopy(config), copy.deepcopy(config)
    moved.name_or_path, wider.n_inner = "elsewhere", 24
    found = architecture_of(config, tokenizer, "here")
    assert found == examine(config, tokenizer, "here")
    assert architecture_of(moved, tokenizer, "there") is found
    assert examined == [config]
    assert architecture_of(wider, tokenizer, "here").locations["mlp.hook_post"] == 24
    assert architecture_of(plain["llama"].config, tokenizer, "here").name == "LlamaForCausalLM"
    assert len(examined) == 3


def test_modules_that_see_something_else_are_found_out(
    monkeypatch: pytest.MonkeyPatch, bridged: dict, plain: dict, tokenizer: PreTrainedTokenizerBase
):
    def wrong(lm: object, model: PreTrainedModel, name: str) -> object:
        right = find_module(lm, model, name)
        return find_module(lm, model, "blocks.1.hook_resid_pre") if name == "blocks.0.hook_mlp_out" else right

    monkeypatch.setattr(hook_points, "find_module", wrong)
    found = examine(plain["llama"].config, tokenizer, "llama")
    assert found.points(["blocks.1.hook_mlp_out"]) is None
    assert found.points(["blocks.1.hook_attn_out"]) is not None


def test_a_difference_in_what_a_change_does_is_found_out(
    monkeypatch: pytest.MonkeyPatch, plain: dict, tokenizer: PreTrainedTokenizerBase
):
    """Both see the same where they look, but what one changes does not reach its next layer."""
    first: list[Tensor] = []

    def ignore_changes(_: object, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        hidden = inputs[0]
        if len(hidden) <= 3:  # nothing is changed yet
            first.append(hidden[:1].clone())
            return None
        return (first[-1].expand_as(hidden), *inputs[1:])

    def deaf(config: object) -> PreTrainedModel:
        model = shallow(config)
        model.transformer.h[1].register_forward_pre_hook(ignore_changes)
        return model

    config = plain["gpt2"].config
    assert examine(config, tokenizer, "gpt2").points(["blocks.0.hook_mlp_out"]) is not None
    monkeypatch.setattr(hook_points, "shallow", deaf)
    monkeypatch.setattr(hook_points, "bridge", lambda model, *names: bridge(shallow(config), *names))
    found = examine(config, tokenizer, "gpt2")
    assert found.points(["blocks.0.hook_mlp_out"]) is None
    assert found.points(["ln_final.hook_out"]) is not None
    assert "hook_mlp_out" in found.locations


def test_an_lm_that_transformer_lens_cannot_run(tokenizer: PreTrainedTokenizerBase):
    """An OPT whose norms come last, as of OPT-350m."""
    config = transformers.OPTConfig(
        vocab_size=64, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=2,
        ffn_dim=24, max_position_embeddings=32, do_layer_norm_before=False,
    )  # fmt: skip
    with pytest.raises(ProbekitError, match=r"lm.name 'opt': TransformerLens bridges OPT.*but cannot run it"):
        examine(config, tokenizer, "opt")


class OddError(Exception):
    """Of no class that this package knows."""


@pytest.mark.parametrize("where", ["shallow", "find_module", "boot_transformers"])
def test_whatever_an_architecture_raises_is_one_line(
    where: str, plain: dict, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: object, **__: object) -> None:
        raise OddError("line one\nline two " + "and on " * 100)

    owner = TransformerBridge if where == "boot_transformers" else hook_points
    monkeypatch.setattr(owner, where, fails)
    with pytest.raises(ProbekitError) as raised:
        examine(plain["llama"].config, tokenizer, "tiny")
    message = str(raised.value)
    assert message.startswith("lm.name 'tiny': ")
    assert "LlamaForCausalLM" in message
    assert "(line one line two and on" in message
    assert message.endswith("…)")


def test_a_configuration_that_names_no_architecture(plain: dict, tokenizer: PreTrainedTokenizerBase):
    config = copy.deepcopy(plain["llama"].config)
    config.architectures = None
    assert examine(config, tokenizer, "tiny").locations.keys() >= COMMON


@pytest.mark.parametrize("parallel", [True, False])
def test_where_transformer_lens_computes_other_numbers_the_lms_own_are_read(
    parallel: bool, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    """Falcon's ALiBi, which eager attention scales otherwise than the LM's usual one."""
    model = make_model("Falcon", len(tokenizer), alibi=True, parallel_attn=parallel).eval()
    deep = bridge(copy.deepcopy(model), tokenizer, "falcon")
    with torch.no_grad():
        own = model(TOKENS, output_hidden_states=True)
        assert not torch.allclose(BridgeBackend(deep).logits(TOKENS, []), own.logits, rtol=1e-2, atol=1e-2)
    found = examine(model.config, tokenizer, "falcon")
    assert found.note is not None
    assert "TransformerLens computes other logits than FalconForCausalLM itself" in found.note
    assert found.locations.keys() >= COMMON
    with pytest.raises(ProbekitError, match=r"'attn.hook_q': in FalconForCausalLM, TransformerLens computes"):
        found.check("attn.hook_q", "probe.locations")
    names = [hook_name(location, layer) for location in found.locations for layer in range(3)]
    backend = HFBackend(model, found.points(names))
    seen = read(backend, [*dict.fromkeys(names)])
    for layer in range(3):
        pre, attention, mlp, post = (
            seen[hook_name(f"hook_{name}", layer)]
            for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        assert torch.equal(pre, own.hidden_states[layer])
        torch.testing.assert_close(pre + attention + mlp, post, rtol=1e-4, atol=1e-4)
    assert torch.equal(seen["ln_final.hook_out"], own.hidden_states[3])
    assert torch.equal(backend.logits(TOKENS, []), own.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_noted_where_transformer_lens_computes_the_same(family: str, architectures: Architectures):
    assert architectures(family).note is None


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_positions_are_never_taken_for_heads(
    heads: int, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    model = make_model("GPT2", len(tokenizer), hidden_size=12, num_attention_heads=heads)
    found = examine(model.config, tokenizer, "tiny").locations
    assert [found[f"attn.hook_{name}"] for name in "qkvz"] == [12] * 4
    assert "attn.hook_pattern" not in found
    assert "attn.hook_attn_scores" not in found


PRE, ATTENTION, MLP = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
SERIAL = {
    "hook_resid_pre": PRE,
    "hook_attn_out": ATTENTION,
    "hook_resid_mid": PRE + ATTENTION,
    "hook_mlp_out": MLP,
    "hook_resid_post": PRE + ATTENTION + MLP,
}
PARALLEL = {name: value for name, value in SERIAL.items() if name != "hook_resid_mid"}


@pytest.mark.parametrize(
    ("seen", "broken"),
    [
        (SERIAL, []),
        (PARALLEL, []),
        ({"hook_resid_pre": PRE, "hook_resid_post": MLP}, []),  # no attention, no MLP
        (SERIAL | {"hook_attn_out": 0.22 * ATTENTION}, ["hook_attn_out"]),  # scaled before it is added
        (SERIAL | {"hook_mlp_out": MLP / MLP.norm(dim=-1, keepdim=True)}, ["hook_mlp_out"]),  # normed
        (PARALLEL | {"hook_mlp_out": 0.22 * MLP}, ["hook_attn_out", "hook_mlp_out"]),
        (SERIAL | {"hook_resid_post": None}, ["hook_mlp_out"]),
        (SERIAL | {"hook_attn_out": None}, []),
    ],
)
def test_what_is_not_added_to_the_residual_stream_is_refused(seen: dict, broken: list[str]):
    assert sorted(broken_sums(seen)) == broken


def test_a_location_that_is_not_what_it_is_called_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, plain: dict, tokenizer: PreTrainedTokenizerBase
):
    reason = {"hook_mlp_out": "it is not what is added to the residual stream"}
    monkeypatch.setattr(hook_points, "broken_sums", lambda seen: reason)
    found = examine(plain["llama"].config, tokenizer, "llama")
    assert "hook_mlp_out" not in found.locations
    with pytest.raises(
        ProbekitError, match=r"probe.locations is 'hook_mlp_out': in LlamaForCausalLM, it is not"
    ):
        found.check("hook_mlp_out", "probe.locations")


MIXTURES = {
    "Mixtral": {"num_key_value_heads": 1, "num_local_experts": 2},
    "Qwen3Moe": {
        "num_key_value_heads": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "head_dim": 8,
    },
    "Gemma2": {"num_key_value_heads": 1, "head_dim": 8},
    "Phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "GPT2": {"num_hidden_layers": 1},
}
"""Architectures that alternate two kinds of layers, or fuse some weights."""


@pytest.mark.parametrize("name", MIXTURES)
def test_a_shallow_lm_has_the_hooks_of_the_deep_one(
    name: str, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    model = make_model(name, len(tokenizer), **MIXTURES[name])
    deep = bridge(copy.deepcopy(model), tokenizer, name)
    found = examine(model.config, tokenizer, name)
    for location in found.locations:
        hook = hook_name(location, deep.cfg.n_layers - 1)
        if points := found.points([hook]):
            assert points[hook] == find_module(deep, model, hook)


def test_layers_of_two_kinds(make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase):
    """LFM2 has layers without attention: what only some layers have is refused, the rest is read in all."""
    settings = {
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention"],
        "block_multiple_of": 1,
    }
    model = make_model("Lfm2", len(tokenizer), **settings)
    found = examine(model.config, tokenizer, "lfm2")
    assert found.like == (0, 0, 2, 0, 2)
    with pytest.raises(
        ProbekitError, match=r"is 'hook_attn_out': in Lfm2ForCausalLM, only some layers hold it"
    ):
        found.check("hook_attn_out", "probe.locations")
    names = [
        hook_name(f"hook_{name}", layer)
        for name in ("resid_mid", "mlp_out", "resid_post")
        for layer in range(5)
    ]
    seen = read(HFBackend(model.eval(), found.points(names)), names)
    expected = read(BridgeBackend(bridge(copy.deepcopy(model), tokenizer, "lfm2")), names)
    for name, value in seen.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("family", "location"),
    [
        ("gpt_neox", "hook_resid_mid"),  # its attention and MLP are parallel
        ("llama", "attn.hook_pattern"),  # heads before positions
        ("qwen3", "attn.hook_q_normed"),  # the same
        ("gpt2", "hook_mlp_in"),  # switched off
        ("gpt2", "attn.qkv.hook_out"),  # never fires
        ("gpt2", "attn"),  # a module
        ("gpt2", "blocks.0.hook_resid_pre"),  # with its layer
        ("gpt2", ""),
    ],
)
def test_unusable_locations_are_refused_and_usable_ones_listed(
    family: str, location: str, architectures: Architectures
):
    found = architectures(family)
    with pytest.raises(ProbekitError) as raised:
        found.check(location, "probe.locations")
    message = str(raised.value)
    assert message.startswith(f"probe.locations is {location!r}")
    assert "\n" not in message
    assert set(message.split(" at ")[-1].split(", ")) == found.locations.keys()
    for name in found.locations:
        found.check(name, "probe.locations")


def test_an_lm_that_reads_what_it_should_predict_is_refused(tokenizer: PreTrainedTokenizerBase):
    config = transformers.ElectraConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    with pytest.raises(ProbekitError, match=r"lm.name 'electra': ElectraForCausalLM reads the tokens"):
        examine(config, tokenizer, "electra")


def test_what_the_last_norm_reads_is_a_hook_point_of_the_plain_module(architectures: Architectures):
    """The depth ensemble reads it."""
    points = architectures("llama").points(["ln_final.hook_in"])
    assert points is not None
    assert points["ln_final.hook_in"].is_input
