"""Writes reference/architectures.md: which locations work in which architecture, found on tiny random LMs.

    python docs/architectures.py

`tests/models/test_architectures.py` compares every row with what it finds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers

from probekit.data.tokenizer import train_tokenizer
from probekit.errors import ProbekitError
from probekit.models.hook_points import Architecture, examine
from probekit.models.locations import BEFORE, LABELS, hook_name

PAGE = Path(__file__).parent / "reference" / "architectures.md"

SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
EXPERTS = GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
ROUTED = {
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
}
DEEPSEEK = ROUTED | {
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
STATES = {"mamba_n_heads": 2, "mamba_d_state": 4, "mamba_n_groups": 1}
JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
    "pad_token_id": 0,
}
CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"]}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Apertus": ("ApertusForCausalLM", GROUPED),
    "Arcee": ("ArceeForCausalLM", GROUPED),
    "BERT": ("BertForMaskedLM", {"pad_token_id": 0}),
    "BLOOM": ("BloomForCausalLM", {}),
    "Cohere (Command R)": ("CohereForCausalLM", GROUPED),
    "Cohere 2": ("Cohere2ForCausalLM", GROUPED),
    "DeepSeek V2": ("DeepseekV2ForCausalLM", DEEPSEEK),
    "DeepSeek V3": ("DeepseekV3ForCausalLM", DEEPSEEK),
    "Ernie 4.5": ("Ernie4_5ForCausalLM", GROUPED),
    "Ernie 4.5 MoE": (
        "Ernie4_5_MoeForCausalLM",
        GROUPED | {"moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 8},
    ),
    "EXAONE 4": ("Exaone4ForCausalLM", GROUPED | SLIDING),
    "Falcon": ("FalconForCausalLM", {"num_kv_heads": 1}),
    "Falcon H1": (
        "FalconH1ForCausalLM",
        GROUPED | STATES | {"mamba_d_ssm": 16, "mamba_d_head": 8, "pad_token_id": 0},
    ),
    "Falcon Mamba": ("FalconMambaForCausalLM", {"state_size": 4}),
    "FlexOlmo": (
        "FlexOlmoForCausalLM",
        GROUPED | {"num_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0},
    ),
    "Gemma": ("GemmaForCausalLM", GROUPED),
    "Gemma 2": ("Gemma2ForCausalLM", GROUPED),
    "Gemma 3": ("Gemma3ForCausalLM", GROUPED | SLIDING),
    "Gemma 4": ("Gemma4ForCausalLM", GROUPED | SLIDING),
    "GLM": ("GlmForCausalLM", GROUPED),
    "GLM-4": ("Glm4ForCausalLM", GROUPED),
    "GLM-4 MoE": ("Glm4MoeForCausalLM", GROUPED | ROUTED),
    "GPT-2": ("GPT2LMHeadModel", {}),
    "GPT-BigCode": ("GPTBigCodeForCausalLM", {}),
    "GPT-J": ("GPTJForCausalLM", {"rotary_dim": 4}),
    "GPT-Neo": ("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1], [["global"], 1]]}),
    "GPT-NeoX (Pythia)": ("GPTNeoXForCausalLM", {}),
    "gpt-oss": ("GptOssForCausalLM", EXPERTS | SLIDING),
    "Granite": ("GraniteForCausalLM", GROUPED | {"residual_multiplier": 0.3}),
    "Granite MoE": ("GraniteMoeForCausalLM", EXPERTS | {"residual_multiplier": 0.3}),
    "Hunyuan": ("HunYuanDenseV1ForCausalLM", GROUPED),
    "Jamba": ("JambaForCausalLM", GROUPED | JAMBA),
    "LFM2": ("Lfm2ForCausalLM", GROUPED | CONVOLUTIONS),
    "LFM2 MoE": ("Lfm2MoeForCausalLM", GROUPED | MOE | CONVOLUTIONS | {"num_dense_layers": 1}),
    "Llama": ("LlamaForCausalLM", GROUPED),
    "Llama 4": ("Llama4ForCausalLM", EXPERTS | {"intermediate_size_mlp": 24, "pad_token_id": 0}),
    "Mamba": ("MambaForCausalLM", {"state_size": 4}),
    "Mamba 2": ("Mamba2ForCausalLM", {"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}),
    "MiniMax M2": ("MiniMaxM2ForCausalLM", EXPERTS | {"rotary_dim": 4}),
    "Ministral 3": ("Ministral3ForCausalLM", GROUPED),
    "Mistral": ("MistralForCausalLM", GROUPED),
    "Mixtral": ("MixtralForCausalLM", EXPERTS),
    "MPT": ("MptForCausalLM", {"d_model": 16, "n_layers": 3, "n_heads": 2, "max_seq_len": 32}),
    "Nemotron": ("NemotronForCausalLM", GROUPED),
    "OLMo": ("OlmoForCausalLM", GROUPED),
    "OLMo-2": ("Olmo2ForCausalLM", GROUPED),
    "OLMo-3": ("Olmo3ForCausalLM", GROUPED),
    "OLMoE": ("OlmoeForCausalLM", GROUPED | {"num_experts": 2, "num_experts_per_tok": 1}),
    "OPT": ("OPTForCausalLM", {"ffn_dim": 24, "pad_token_id": 1, "word_embed_proj_dim": 16}),
    "Phi": ("PhiForCausalLM", {}),
    "Phi-3": ("Phi3ForCausalLM", GROUPED | {"pad_token_id": 0}),
    "Qwen 2": ("Qwen2ForCausalLM", GROUPED),
    "Qwen 2 MoE": ("Qwen2MoeForCausalLM", GROUPED | MOE | {"shared_expert_intermediate_size": 8}),
    "Qwen 3": ("Qwen3ForCausalLM", GROUPED),
    "Qwen 3 MoE": (
        "Qwen3MoeForCausalLM",
        GROUPED | MOE,
    ),
    "Qwen 3 Next": ("Qwen3NextForCausalLM", GROUPED | MOE | LINEAR | {"shared_expert_intermediate_size": 8}),
    "Qwen 3.5": ("Qwen3_5ForCausalLM", GROUPED | LINEAR),
    "RoBERTa": ("RobertaForMaskedLM", {"pad_token_id": 1}),
    "Seed OSS": ("SeedOssForCausalLM", GROUPED),
    "SmolLM 3": ("SmolLM3ForCausalLM", GROUPED | {"pad_token_id": 0}),
    "StableLM": ("StableLmForCausalLM", {"num_key_value_heads": 1}),
    "StarCoder 2": ("Starcoder2ForCausalLM", GROUPED),
    "VaultGemma": ("VaultGemmaForCausalLM", GROUPED),
    "XGLM": (
        "XGLMForCausalLM",
        {"d_model": 16, "num_layers": 3, "attention_heads": 2, "ffn_dim": 24, "pad_token_id": 1},
    ),
    "XLM-RoBERTa": ("XLMRobertaForMaskedLM", {"pad_token_id": 1}),
}
"""Architectures by their usual name: the class in Transformers, and settings of a tiny LM beside `SIZE`."""

COLUMNS = [location for location in LABELS if not location.endswith(BEFORE)]


def found_in(name: str, tokenizer: Any) -> Architecture:
    """What a tiny LM of an architecture has."""
    architecture, settings = ARCHITECTURES[name]
    model = getattr(transformers, architecture)
    return examine(
        model.config_class(**SIZE | settings, architectures=[architecture]), tokenizer, architecture
    )


def row(name: str, found: Architecture) -> str:
    """A row of the table."""
    return f"| {name} | {' | '.join(_cell(found, location) for location in COLUMNS)} |"


def _cell(found: Architecture, location: str) -> str:
    if location in found.refused:
        return "some layers" if "only some layers" in found.refused[location] else "refused"
    if location not in found.locations:
        return "–"
    return "yes" if found.points([hook_name(location, 0)]) else "bridge"


def main() -> None:
    """Writes the page."""
    transformers.logging.set_verbosity_error()
    with TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(["the plan"], 260, Path(folder) / "tokenizer")
        rows = []
        for name in ARCHITECTURES:
            try:
                rows.append(row(name, found_in(name, tokenizer)))
            except ProbekitError as error:
                sys.exit(f"{name}: {error}")
    names = [location.removeprefix("hook_") for location in COLUMNS]
    head = [f"| architecture | {' | '.join(names)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(f"{text[: text.index(head[0].split(' |')[0])]}{chr(10).join([*head, *rows])}\n", "utf-8")


if __name__ == "__main__":
    main()
