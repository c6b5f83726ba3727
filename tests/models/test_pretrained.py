"""Checkpoints in every form that they come in, and what is refused before anything is loaded."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from probekit.config import LanguageModelSettings
from probekit.data import hub
from probekit.data.tokenizer import load_tokenizer, pretrained_tokenizer
from probekit.errors import ProbekitError
from probekit.models import pretrained
from probekit.models.language_model import load_model, save_model
from probekit.models.pretrained import (
    check_tokenizer,
    check_weights,
    count_weights,
    dtype_of,
    load_config,
)

CPU = torch.device("cpu")
TOKENS = torch.arange(1, 13).view(2, 6)
MakeModel = Callable[..., PreTrainedModel]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


def refusal(name: str | Path, **arguments: Any) -> str:
    with pytest.raises(ProbekitError) as raised:
        load_model(str(name), **arguments)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"lm.name {str(name)!r}")
    return message


# dtype


@pytest.mark.parametrize(
    ("setting", "own", "units", "expected"),
    [
        ("auto", torch.float32, True, torch.float32),
        ("auto", torch.bfloat16, True, torch.bfloat16),
        ("auto", torch.float16, True, torch.bfloat16),
        ("auto", torch.bfloat16, False, torch.float32),
        ("auto", torch.float16, False, torch.float32),
        ("auto", torch.float64, True, torch.float32),
        ("auto", None, True, torch.float32),
        ("float32", torch.bfloat16, True, torch.float32),
        ("bfloat16", torch.float32, False, torch.bfloat16),
    ],
)
def test_the_dtype_on_a_cpu(
    setting: str,
    own: torch.dtype | None,
    units: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
):
    known = {"avx512_bf16": units, "avx2": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert dtype_of(setting, transformers.LlamaConfig(dtype=own), CPU) is expected


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_on_a_gpu(own: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """The checkpoint's own, unless the GPU does not compute in it."""
    gpu = torch.device("cuda")
    for computes in (True, False):
        monkeypatch.setattr(pretrained, "_computes_in", lambda dtype, device, known=computes: known)
        assert dtype_of("auto", transformers.LlamaConfig(dtype=own), gpu) is (
            own if computes else torch.float32
        )
    with pytest.raises(ProbekitError, match=r"lm.dtype is 'bfloat16', in which cuda does not compute; give"):
        dtype_of("bfloat16", transformers.LlamaConfig(), gpu)


def test_weights_are_held_in_the_dtype_that_is_asked_for(
    tmp_path: Path, make_model: MakeModel, tokenizer: PreTrainedTokenizerBase
):
    make_model("GPT2", len(tokenizer)).bfloat16().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(str(tmp_path), dtype=dtype).state_dict()
        for name, tensor in saved.items():
            assert loaded[name].dtype == dtype
            torch.testing.assert_close(loaded[name].float(), tensor.float(), atol=0, rtol=0)


# Forms


def test_sharded_weights_are_read_and_written(
    tmp_path: Path, make_model: MakeModel, tokenizer: PreTrainedTokenizerBase
):
    model = make_model("Llama", len(tokenizer))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len([*(tmp_path / "sharded").glob("*.safetensors")]) > 2
    assert torch.equal(logits(load_model(str(tmp_path / "sharded"))), logits(model))


def test_whoever_reads_the_config_reads_all_shards(
    tmp_path: Path, make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
):
    model = make_model("GPT2", len(tokenizer))  # whose head is tied
    whole = model.save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda *a, **k: whole(*a, max_shard_size="10KB", **k))
    save_model(model, tmp_path)
    files = [path for path in tmp_path.iterdir() if path.suffix in (".json", ".safetensors")]
    assert len(files) > 3
    assert len({path.stat().st_mode for path in files}) == 1
    assert torch.equal(logits(load_model(str(tmp_path))), logits(model))


@pytest.mark.parametrize("name", ["with blanks in it", "~/my model"])
def test_paths_with_blanks_and_home(
    name: str, tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders["gpt2"], Path(name).expanduser())
    assert torch.equal(logits(load_model(name)), logits(load_model(str(folders["gpt2"]))))
    assert len(pretrained_tokenizer(LanguageModelSettings(name=name)))


def test_the_revision_of_a_hub_model(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]):
    """The hub pins a branch to a commit, and that commit is loaded."""
    asked: list[dict[str, Any]] = []
    source = hub.Source(str(folders["gpt2"]), "abc123", local_only=False)
    monkeypatch.setattr(hub, "find", lambda name, setting, revision: asked.append({name: revision}) or source)
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *names, **given: asked.append({"revision": given["revision"]}) or load(*names, **given),
    )
    load_model("some/gpt2", revision="branch")
    assert asked == [{"some/gpt2": "branch"}, {"some/gpt2": "branch"}, {"revision": "abc123"}]


def write_gguf(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The Llama of a folder as a GGUF file of float32, with a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    path, config = folder / "tiny llama.gguf", model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            stem, kind = f"blk.{layer}.{parts[part]}", parts[part]
            if kind in heads:  # llama.cpp interleaves the halves that are rotated together
                halves = tensor.view(heads[kind], 2, -1, tensor.shape[1]).swapaxes(1, 2)
                tensor = halves.reshape(tensor.shape)
        else:
            stem = names[stem]
        writer.add_tensor(f"{stem}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(
    tmp_path: Path,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerBase,
    capsys: pytest.CaptureFixture[str],
):
    size = {"hidden_size": 32, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    model = make_model("Llama", len(tokenizer), **size)
    path = write_gguf(tmp_path, model, tokenizer)
    capsys.readouterr()
    found = load_model(str(path))
    assert capsys.readouterr().err == ""
    torch.testing.assert_close(logits(found), logits(model), atol=1e-4, rtol=1e-4)
    read = pretrained_tokenizer(LanguageModelSettings(name=str(path)))
    assert read("the plan").input_ids == tokenizer("the plan").input_ids
    save_model(found, tmp_path / "saved")
    torch.testing.assert_close(
        logits(load_model(str(tmp_path / "saved"))), logits(model), atol=1e-4, rtol=1e-4
    )
    assert f"it holds {path.name}: give the path of a GGUF file itself" in refusal(tmp_path)


def test_a_gguf_file_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    assert "pip install gguf" in refusal(tmp_path / "tiny.gguf")


def test_a_gguf_file_that_is_not_there(tmp_path: Path):
    with pytest.raises(ProbekitError, match=r"no such folder or .gguf file"):
        load_model(str(tmp_path / "none.gguf"))


def test_the_text_tower_of_a_multimodal_checkpoint(tmp_path: Path):
    size = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    }  # fmt: skip
    text = size | {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
    vision = size | {"image_size": 28, "patch_size": 14}
    kinds = ["sliding_attention", "full_attention"]
    gemma = transformers.Gemma3Config(
        text_config=text | {"layer_types": kinds}, vision_config=vision, mm_tokens_per_image=4
    )
    llava = transformers.LlavaConfig(
        text_config=text | {"model_type": "llama"},
        vision_config=vision | {"model_type": "clip_vision_model"},
    )
    for config, tower in ((gemma, "Gemma3ForCausalLM"), (llava, "LlamaForCausalLM")):
        name = type(config).__name__.removesuffix("Config")
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
        model.save_pretrained(tmp_path / name)
        found = load_model(str(tmp_path / name))
        assert type(found).__name__ == tower
        torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=1e-4)


def test_a_multimodal_checkpoint_without_a_causal_lm_is_refused_by_name(tmp_path: Path):
    transformers.Qwen2_5_VLConfig(architectures=["Qwen2_5_VLForConditionalGeneration"]).save_pretrained(
        tmp_path
    )
    message = refusal(tmp_path)
    assert (
        "Qwen2_5_VLForConditionalGeneration, which is multimodal; give an LM that reads text alone" in message
    )


@pytest.mark.parametrize(
    ("quantised", "shown"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "(fp8)"),
    ],
)
def test_quantised_weights_are_refused_by_the_name_of_the_quantisation(
    quantised: dict[str, Any], shown: str, tmp_path: Path, folders: dict[str, Path]
):
    shutil.copytree(folders["llama"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    message = refusal(tmp_path)
    assert shown in message
    assert "asks for quantisation" in message
    assert "its weights are plain; remove quantization_config from config.json" in message
    weights = load_file(tmp_path / "model.safetensors")
    for kind, changed in (
        ("packed", {name: tensor.to(torch.uint8) for name, tensor in weights.items()}),
        ("scaled", weights | {"model.layers.0.mlp.down_proj.weight_scale_inv": torch.ones(1)}),
    ):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        message = refusal(tmp_path)
        assert f"its weights are quantised ({shown.strip('()')}" in message, kind
        assert "give the checkpoint that they were made from, or a GGUF file" in message


# Folders from which no LM can be loaded


ADAPTER = (
    "it holds a peft adapter, which is no LM: load some/base with it, and save what its merge_and_unload"
)


def adapter_alone(folder: Path, model: PreTrainedModel) -> str:
    settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(copy.deepcopy(model), settings)
    tuned.peft_config["default"].base_model_name_or_path = "some/base"
    tuned.save_pretrained(folder)
    return ADAPTER


def adapter_beside_a_config(folder: Path, model: PreTrainedModel) -> str:
    adapter_alone(folder, model)
    model.config.save_pretrained(folder)
    return ADAPTER


def adapter_beside_an_lm(folder: Path, model: PreTrainedModel) -> str:
    """Transformers would load the LM that the adapter names."""
    model.save_pretrained(folder)
    adapter_alone(folder, model)
    return ADAPTER


def pickled(folder: Path, model: PreTrainedModel) -> str:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return "its weights are a pickle (pytorch_model.bin)"


def without_config(folder: Path, model: PreTrainedModel) -> str:
    model.save_pretrained(folder)
    (folder / "config.json").unlink()
    return "it lacks config.json, and holds generation_config.json, model.safetensors"


def without_weights(folder: Path, model: PreTrainedModel) -> str:
    model.config.save_pretrained(folder)
    return "it lacks model.safetensors, and holds config.json"


def empty(folder: Path, model: PreTrainedModel) -> str:
    return "it lacks config.json and model.safetensors, and holds no file"


@pytest.mark.parametrize(
    "make",
    [
        adapter_alone,
        adapter_beside_a_config,
        adapter_beside_an_lm,
        pickled,
        without_config,
        without_weights,
        empty,
    ],
)
def test_a_folder_says_what_it_holds(
    make: Callable[[Path, PreTrainedModel], str], tmp_path: Path, make_model: MakeModel
):
    expected = make(tmp_path, make_model("Llama", 60))
    assert expected in refusal(tmp_path)


# Memory and tokenizers


def free_memory(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=size))


def test_a_checkpoint_larger_than_memory_is_refused_before_it_is_loaded(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    model = load_model(str(folders["llama"]))
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert count_weights(model.config) == weights
    free_memory(monkeypatch, 4 * weights)
    assert load_model(str(folders["llama"]), dtype=torch.bfloat16) is not None
    assert load_model(str(folders["llama"]), device_map="cpu") is not None
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded")
    )
    message = refusal(folders["llama"])
    assert f"take {1.05 * 4 * weights / 1e9:.1f} GB in float32" in message
    assert "lm.dtype bfloat16, lm.device_map auto" in message


def test_the_configuration_says_how_large_an_lm_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So nothing that is too large is downloaded; here Llama 3.1 70B, without any weights."""
    size = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256}
    transformers.LlamaConfig(**size, **heads).save_pretrained(tmp_path)
    free_memory(monkeypatch, 24e9)
    message = refusal(tmp_path, dtype=torch.bfloat16)
    assert "take 148.2 GB in bfloat16, and 24.0 GB of memory are free; give lm.device_map auto" in message


@pytest.mark.parametrize(
    ("line", "files"),
    [
        (
            "0::/box\n",
            {"box/memory.max": 1000, "box/memory.current": 700, "box/memory.stat": "inactive_file 50"},
        ),
        ("0::/box\n", {"memory.max": 1000, "memory.current": 700, "memory.stat": "anon 1\ninactive_file 50"}),
        (
            "9:memory:/a/b\n0::/\n",
            {
                "memory/a/memory.limit_in_bytes": 1000,
                "memory/a/memory.usage_in_bytes": 700,
                "memory/a/memory.stat": "inactive_file 9\ntotal_inactive_file 50",
            },
        ),
    ],
)
def test_a_containers_limit_counts(
    line: str,
    files: dict[str, object],
    tmp_path: Path,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
):
    """A container is stopped at its own limit, whatever the machine has free."""
    (tmp_path / "cgroup").write_text(line)
    for name, value in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{value}\n")
    monkeypatch.setattr(pretrained, "PROCESS", tmp_path)
    monkeypatch.setattr(pretrained, "GROUPS", tmp_path)
    assert list(pretrained._left_to_group()) == [350]
    assert "0.0 GB of memory are free" in refusal(folders["llama"])
    for name in files:
        if name.endswith(("max", "limit_in_bytes")):
            (tmp_path / name).write_text("max\n" if name.endswith("max") else f"{2**63 - 4096}\n")
    assert load_model(str(folders["llama"])) is not None
    (tmp_path / "cgroup").unlink()
    assert list(pretrained._left_to_group()) == []


def test_a_tokenizer_whose_ids_exceed_the_embedding(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    config = load_config(str(folders["llama"]))
    check_tokenizer(tokenizer, config, "tiny")
    tokenizer.save_pretrained(tmp_path)
    larger = load_tokenizer(tmp_path)
    larger.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_tokenizer(larger, config, "tiny")  # as of a multimodal LM's text tower
    larger.add_tokens(["plans"])
    with pytest.raises(
        ProbekitError, match=r"tokenizer has 'plans' with id \d+, but its embedding has \d+ rows"
    ):
        check_tokenizer(larger, config, "tiny")


@pytest.mark.parametrize(
    ("value", "dtype", "advice"),
    [
        (float("nan"), torch.float32, "float32: they are damaged"),
        (float("inf"), torch.bfloat16, "bfloat16: they are damaged"),
        (1e6, torch.float16, "float16: they are too large for float16; give lm.dtype bfloat16"),
        (1e6, torch.bfloat16, None),
    ],
)
def test_weights_that_are_not_finite(
    value: float, dtype: torch.dtype, advice: str | None, tmp_path: Path, make_model: MakeModel
):
    model = make_model("Llama", 60)
    check_weights(model, "tiny")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = value
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=dtype)
    if advice is None:
        check_weights(loaded, "tiny")
        return
    with pytest.raises(ProbekitError) as raised:
        check_weights(loaded, "tiny")
    message = "its weights model.layers.1.mlp.up_proj.weight are not all finite in "
    assert message + advice in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("architectures", 3, "has 3 as architectures, where a list"),
        ("architectures", "LlamaForCausalLM", "has 'LlamaForCausalLM' as architectures, where a list"),
        ("text_config", [1], r"has \[1\] as text_config, where a configuration"),
        ("dtype", -1, "has -1 as dtype, where the name of a dtype"),
    ],
)
def test_values_of_another_type_in_a_configuration(
    folders: dict[str, Path], tmp_path: Path, key: str, value: object, expected: str
):
    config = json.loads((folders["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ProbekitError, match=expected):
        load_config(str(tmp_path))
