"""Language models of several families: bridged they stay themselves; what cannot work says so in one line."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from probekit.config import LanguageModelSettings
from probekit.errors import ProbekitError
from probekit.models.hook_points import (
    OUTSIDE_BLOCKS,
    check_location,
    find_hook_point,
    hook_name,
    layer_of,
    locations,
)
from probekit.models.language_model import (
    bridge,
    load_model,
    longest_window,
    new_model,
    random_weights,
    shallow,
)

FAMILIES = ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen2", "qwen3"]
COMMON = {
    "hook_resid_pre",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "mlp.hook_post",
    *OUTSIDE_BLOCKS,
}
SMALL = LanguageModelSettings(layers=2, width=16, heads=2, positions=24)


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(200, (rows, columns), generator=torch.Generator().manual_seed(0))


def refusal(folder: Path) -> str:
    with pytest.raises(ProbekitError) as raised:
        load_model(str(folder))
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"lm.name {str(folder)!r}")
    assert len(message) < 500
    return message


@pytest.mark.parametrize("family", FAMILIES)
def test_bridging_changes_no_logit(family: str, folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase):
    plain = AutoModelForCausalLM.from_pretrained(folders[family]).eval()
    model = load_model(str(folders[family])).train()
    bridged = bridge(model, tokenizer, family)
    assert not any(module.training for module in bridged.modules())
    assert not any(parameter.requires_grad for parameter in bridged.parameters())
    for shape in [(1, 1), (3, 17), (2, longest_window(plain.config))]:
        with torch.no_grad():
            expected = plain(tokens(*shape)).logits
            torch.testing.assert_close(bridged(tokens(*shape)), expected, atol=1e-5, rtol=0)
        assert expected.std() > 0.1  # else the tolerance would mean nothing


def test_weights_are_the_saved_ones_in_float32(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    make_model("GPT2", len(tokenizer)).bfloat16().save_pretrained(tmp_path)
    loaded, saved = load_model(str(tmp_path)).state_dict(), load_file(tmp_path / "model.safetensors")
    assert saved
    for name, tensor in saved.items():
        assert loaded[name].dtype == torch.float32
        torch.testing.assert_close(loaded[name], tensor.float(), atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_longest_window(family: str, folders: dict[str, Path]):
    assert longest_window(load_model(str(folders[family])).config) == 32


def test_a_model_without_a_table_of_positions_has_no_longest_window(tokenizer: PreTrainedTokenizerBase):
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=8, n_layer=1, n_head=1)
    assert longest_window(config) > 10**9


@pytest.mark.parametrize("family", FAMILIES)
def test_every_location_fires_in_every_layer_with_a_vector_for_each_position(family: str, bridged: dict):
    lm = bridged[family]
    found = locations(lm)
    assert found.keys() >= COMMON
    assert [found[name] for name in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")] == [16] * 3
    assert [found[name] for name in OUTSIDE_BLOCKS] == [16] * 2
    assert found["attn.hook_z"] == (12 if family == "qwen3" else 16)
    assert found["mlp.hook_post"] == (64 if family == "gpt2" else 24)
    seen = {}
    hooks = [
        (hook_name(location, layer), lambda x, hook, at=(location, layer): seen.update({at: x.shape}))
        for location in found
        for layer in range(3)
    ]
    with torch.no_grad(), lm.hooks(fwd_hooks=hooks):
        lm(tokens(1, 5))
    for location, features in found.items():
        for layer in range(3):
            assert seen[location, layer][:2] == (1, 5)
            assert seen[location, layer][2:].numel() == features


def test_hooks_by_location_and_layer():
    names = [hook_name(location, 12) for location in ("attn.hook_z", "hook_resid_pre", *OUTSIDE_BLOCKS)]
    assert names == ["blocks.12.attn.hook_z", "blocks.12.hook_resid_pre", "hook_embed", "ln_final.hook_out"]
    assert [layer_of(name) for name in names] == [12, 12, 0, None]


@pytest.mark.parametrize("family", FAMILIES)
def test_locations_outside_the_blocks_are_the_models_first_and_last_word(
    family: str, bridged: dict, folders: dict[str, Path]
):
    plain = load_model(str(folders[family])).eval()
    with torch.no_grad():
        states = plain(tokens(2, 9), output_hidden_states=True).hidden_states
        _, cache = bridged[family].run_with_cache(
            tokens(2, 9), names_filter=list(OUTSIDE_BLOCKS), output_attentions=False
        )
        embedded = plain.get_input_embeddings()(tokens(2, 9))
    torch.testing.assert_close(cache["hook_embed"], embedded)
    torch.testing.assert_close(cache["ln_final.hook_out"], states[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [1, 2, 3, 4])
def test_positions_are_never_taken_for_heads(
    heads: int, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    model = make_model("GPT2", len(tokenizer), hidden_size=12, num_attention_heads=heads)
    found = locations(bridge(model, tokenizer, "tiny"))
    assert [found[f"attn.hook_{name}"] for name in "qkvz"] == [12] * 4
    assert "attn.hook_pattern" not in found
    assert "attn.hook_attn_scores" not in found


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
    like = bridge(shallow(model.config), tokenizer, name)
    bridged, plain = bridge(copy.deepcopy(model), tokenizer, name), model
    assert locations(like) == locations(bridged)
    for location in locations(bridged):
        hook = hook_name(location, bridged.cfg.n_layers - 1)
        assert find_hook_point(like, plain, hook) == find_hook_point(bridged, plain, hook), hook


def test_a_shallow_lm_has_a_layer_of_every_kind(make_model: Callable[..., PreTrainedModel]):
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 3
    config = make_model("Gemma2", 50, num_hidden_layers=7, layer_types=kinds, num_key_value_heads=1).config
    like = shallow(config)
    assert like.config.layer_types == kinds[:4]
    assert like(tokens(1, 5) % 50).logits.shape == (1, 5, 50)
    assert config.num_hidden_layers == 7
    assert shallow(make_model("Llama", 50, num_hidden_layers=7).config).config.num_hidden_layers == 2


def test_locations_of_an_lm_of_one_layer_and_two_positions(
    make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    model = make_model("GPT2", len(tokenizer), num_hidden_layers=1, max_position_embeddings=2)
    assert locations(bridge(model, tokenizer, "tiny"))["hook_resid_pre"] == 16


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
@pytest.mark.filterwarnings("error")
def test_unusable_locations_are_refused_and_usable_ones_listed(family: str, location: str, bridged: dict):
    with pytest.raises(ProbekitError) as raised:
        check_location(locations(bridged[family]), location, "probe.locations")
    message = str(raised.value)
    assert message.startswith(f"probe.locations is {location!r}")
    assert "\n" not in message
    listed = set(message.split(" at ")[-1].split(", "))
    assert listed == locations(bridged[family]).keys()
    for name in listed:
        check_location(locations(bridged[family]), name, "probe.locations")


def test_a_new_model_has_the_settings_sizes_and_no_dropout(tokenizer: PreTrainedTokenizerBase):
    model = new_model(SMALL, tokenizer, seed=1)
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head) == (2, 16, 2)
    assert longest_window(model.config) == 24
    assert config.vocab_size == len(tokenizer)
    assert config.bos_token_id == config.eos_token_id == tokenizer.bos_token_id
    model.train()
    assert torch.equal(model(tokens(2, 24)).logits, model(tokens(2, 24)).logits)


def test_a_new_models_weights_come_from_the_seed_alone(tokenizer: PreTrainedTokenizerBase):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = new_model(SMALL, tokenizer, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    same, other = (new_model(SMALL, tokenizer, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(same[name], tensor) for name, tensor in one.items())
    drawn = [name for name, tensor in one.items() if tensor.std() > 0]
    assert len(drawn) >= 2 + 4 * 2  # the embeddings, and every matrix of the two layers
    assert not any(torch.equal(other[name], one[name]) for name in drawn)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_are_of_the_same_shapes_and_come_from_the_seed_alone(
    family: str, folders: dict[str, Path]
):
    model = load_model(str(folders[family]))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = random_weights(model, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    same, other = (random_weights(model, seed=seed).state_dict() for seed in (1, 2))
    true = model.state_dict()
    assert {name: tensor.shape for name, tensor in one.items()} == {n: t.shape for n, t in true.items()}
    assert all(torch.equal(same[name], tensor) for name, tensor in one.items())
    drawn = [name for name, tensor in one.items() if tensor.std() > 0]
    assert len(drawn) >= 1 + 4 * 3  # the embeddings, and every matrix of the three layers
    for unlike in (other, true):
        assert not any(torch.equal(unlike[name], one[name]) for name in drawn)


def test_random_weights_of_a_model_in_less_precision_are_float32(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    make_model("GPT2", len(tokenizer)).bfloat16().save_pretrained(tmp_path)
    made = random_weights(load_model(str(tmp_path)), seed=0)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}


def test_a_folder_without_weights(tmp_path: Path, folders: dict[str, Path]):
    shutil.copy(folders["gpt2"] / "config.json", tmp_path)
    assert "model.safetensors" in refusal(tmp_path)


def test_a_folder_without_config(tmp_path: Path, folders: dict[str, Path]):
    shutil.copy(folders["gpt2"] / "model.safetensors", tmp_path)
    assert "config.json" in refusal(tmp_path)


def test_weights_that_are_cut_short(tmp_path: Path, folders: dict[str, Path]):
    shutil.copytree(folders["gpt2"], tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refusal(tmp_path)


def test_weights_of_another_size(tmp_path: Path, folders: dict[str, Path]):
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 20}))
    refusal(tmp_path)


def test_a_missing_tensor_is_not_made_up(tmp_path: Path, folders: dict[str, Path]):
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.self_attn.q_proj.weight" in refusal(tmp_path)


def test_an_lm_without_its_head_is_refused_unless_the_head_is_tied(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    make_model("GPT2", len(tokenizer)).transformer.save_pretrained(tmp_path / "tied")
    assert load_model(str(tmp_path / "tied")).lm_head.weight.shape == (len(tokenizer), 16)
    make_model("Llama", len(tokenizer)).model.save_pretrained(tmp_path / "headless")
    assert "lm_head.weight" in refusal(tmp_path / "headless")


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra"])
def test_a_masked_lm_is_refused_for_it_reads_ahead(
    name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
):
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=32,
    )  # fmt: skip
    getattr(transformers, f"{name}ForMaskedLM")(config).save_pretrained(tmp_path)
    assert "causal" in refusal(tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "T5Config" in refusal(tmp_path)


def test_an_architecture_that_cannot_be_bridged(tokenizer: PreTrainedTokenizerBase):
    config = transformers.BioGptConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    with pytest.raises(ProbekitError) as raised:
        bridge(transformers.BioGptForCausalLM(config), tokenizer, "some/biogpt")
    message = str(raised.value)
    assert message.startswith("lm.name 'some/biogpt'")
    assert "BioGptForCausalLM" in message
    assert "\n" not in message
    assert len(message) < 500


def test_without_a_network_nothing_is_tried_twice(monkeypatch: pytest.MonkeyPatch):
    """The hub's own loader would retry for most of a minute."""
    calls = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: calls.append("loader"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unreachable(*_: object, **arguments: object) -> None:
        calls.append(arguments["timeout"])
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(ProbekitError, match="cannot be reached") as raised:
        load_model("nobody/nothing")
    assert "nobody/nothing" in str(raised.value)
    assert len(calls) == 1
    assert calls[0] <= 5


def test_a_cached_model_loads_without_a_network(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    """By a branch's name and by commit, from a cache as the hub's client leaves it."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(folders["gpt2"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = load_model(str(folders["gpt2"])).state_dict()
    for revision in (None, "main", commit):
        loaded = load_model("someone/tiny", revision=revision).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ProbekitError, match=f"only revision {commit}"):
        load_model("someone/tiny", revision="v2")
