"""Language models of several families: bridged they stay themselves; what cannot work says so in one line."""

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
from probekit.models.language_model import (
    bridge,
    load_model,
    longest_window,
    new_model,
    random_weights,
    shallow,
)

FAMILIES = ["gpt2", "gpt_neox", "llama", "olmo", "olmo2", "qwen2", "qwen3"]
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


def test_a_shallow_lm_has_a_layer_of_every_kind(make_model: Callable[..., PreTrainedModel]):
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 3
    config = make_model("Gemma2", 50, num_hidden_layers=7, layer_types=kinds, num_key_value_heads=1).config
    like = shallow(config)
    assert like.config.layer_types == kinds[:4]
    assert like(tokens(1, 5) % 50).logits.shape == (1, 5, 50)
    assert config.num_hidden_layers == 7
    assert shallow(make_model("Llama", 50, num_hidden_layers=7).config).config.num_hidden_layers == 2


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


def test_random_weights_are_not_those_that_an_lm_of_the_seed_began_with(tokenizer: PreTrainedTokenizerBase):
    for seed in (0, 1, 2**31, 2**32 - 1):
        begun = new_model(SMALL, tokenizer, seed=seed)
        drawn = random_weights(begun.config, seed).state_dict()
        varied = {name: tensor for name, tensor in begun.state_dict().items() if tensor.std() > 0}
        assert not any(torch.equal(drawn[name], tensor) for name, tensor in varied.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_are_of_the_same_shapes_and_come_from_the_seed_alone(
    family: str, folders: dict[str, Path]
):
    model = load_model(str(folders[family]))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = random_weights(model.config, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    same, other = (random_weights(model.config, seed=seed).state_dict() for seed in (1, 2))
    true = model.state_dict()
    assert {name: tensor.shape for name, tensor in one.items()} == {n: t.shape for n, t in true.items()}
    assert all(torch.equal(same[name], tensor) for name, tensor in one.items())
    drawn = [name for name, tensor in one.items() if tensor.std() > 0]
    assert len(drawn) >= 1 + 4 * 3  # the embeddings, and every matrix of the three layers
    for unlike in (other, true):
        assert not any(torch.equal(unlike[name], one[name]) for name in drawn)


def test_an_lm_without_its_head_is_refused_unless_the_head_is_tied(
    tmp_path: Path, make_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase
):
    make_model("GPT2", len(tokenizer)).transformer.save_pretrained(tmp_path / "tied")
    assert load_model(str(tmp_path / "tied")).lm_head.weight.shape == (len(tokenizer), 16)
    make_model("Llama", len(tokenizer)).model.save_pretrained(tmp_path / "headless")
    assert "lm_head.weight" in refusal(tmp_path / "headless")


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


def without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def without_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "model.safetensors"


def cut_short(folder: Path) -> str:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return "model.safetensors"


def of_another_size(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 20}))
    return ""


def without_a_tensor(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "harm", [without_config, without_weights, cut_short, of_another_size, without_a_tensor]
)
def test_a_folder_that_holds_no_whole_lm(
    harm: Callable[[Path], str], tmp_path: Path, folders: dict[str, Path]
):
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    assert harm(tmp_path) in refusal(tmp_path)


def test_what_is_no_causal_lm_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "T5ForConditionalGeneration is no causal LM" in refusal(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_longest_window(family: str, plain: dict):
    assert longest_window(plain[family].config) == 32
    assert longest_window(transformers.BloomConfig()) > 10**9  # which has no table of positions
