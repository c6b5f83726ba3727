"""Folders with tiny random LMs and their tokenizers, as users have pre-trained ones."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

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


SPECIAL = {
    "bert": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "roberta": {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>"},
}
"""Special tokens of bidirectional LMs, in the order of their ids."""


def save_random_bidirectional(
    folder: Path, texts: Iterable[str], positions: int, kind: str = "bert", *, tower: bool = False
) -> Path:
    """Saves a BERT or RoBERTa of two layers, or its tower, with a table of so many positions.

    Its tokenizer knows the words of the texts; its weights are large, so that all tokens see each other.
    """
    names = SPECIAL[kind]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text.lower())})
    vocabulary = {token: number for number, token in enumerate([*names.values(), *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=names["unk"]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    first, last = (names.get(one) or names[other] for one, other in (("cls", "bos"), ("sep", "eos")))
    ends = [(token, vocabulary[token]) for token in (first, last)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ends)
    named = {f"{name}_token": token for name, token in ({"cls": first, "sep": last} | names).items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=positions,
        initializer_range=0.3,
        pad_token_id=vocabulary[names["pad"]],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = AutoModel if tower else AutoModelForMaskedLM
        made.from_config(config).save_pretrained(folder)
    return folder
