"""Folders with tiny random LMs and their tokenizers, as users have pre-trained ones."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from probekit.data.tokenizer import train_tokenizer


def save_random_llama(folder: Path, texts: Iterable[str], positions: int, **other_size: int) -> Path:
    """Saves a Llama of two layers that reads at most so many positions, with a tokenizer of the texts."""
    tokenizer = train_tokenizer(texts, 300, folder)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "max_position_embeddings": positions, "vocab_size": len(tokenizer)}
    size |= other_size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    return folder
