"""Tiny random LMs of every family, saved as a user would have them, corpora small enough to check by hand."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from probekit.data.codebook import Codebook
from probekit.data.corpus import Corpus
from probekit.data.tokenizer import train_tokenizer
from probekit.models.frozen_lm import FrozenLM
from probekit.models.hook_points import Architecture, examine
from probekit.models.language_model import bridge, load_model
from probekit.models.pretrained import load_config

transformers.logging.disable_progress_bar()

POSITIONS = 32
FAMILIES = {
    "gpt2": ("GPT2", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "llama": ("Llama", {"num_key_value_heads": 1}),
    "olmo": ("Olmo", {"num_key_value_heads": 2}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 6}),
}


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with next to no merges."""
    return train_tokenizer(["the plan and the text"], 260, tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Builds a causal LM from the name of its family and its settings."""
    return _random_model


def _random_model(name: str, vocabulary: int, **settings: object) -> PreTrainedModel:
    """A causal LM of a family, with weights ten times the usual: no effect drowns in rounding."""
    config = getattr(transformers, f"{name}Config")(
        **{
            "vocab_size": vocabulary,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": POSITIONS,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
            **settings,
        }
    )
    architecture = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    config.architectures = [architecture]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, architecture)(config)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> dict[str, Path]:
    """A folder with a tiny LM and its tokenizer, for every family."""
    root = tmp_path_factory.mktemp("models")
    for family, (name, settings) in FAMILIES.items():
        _random_model(name, len(tokenizer), **settings).save_pretrained(root / family)
        tokenizer.save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="session")
def bridged(folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase) -> dict:
    """The bridged LM of every family; tests must not change them."""
    return {family: bridge(load_model(str(folder)), tokenizer, folder) for family, folder in folders.items()}


@pytest.fixture(scope="session")
def base(folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase) -> Callable[[str], FrozenLM]:
    """The LM of a family, plain and bridged."""
    found: dict[str, FrozenLM] = {}

    def make(family: str) -> FrozenLM:
        if family not in found:
            found[family] = FrozenLM(
                lambda: load_model(str(folders[family])), load_config(str(folders[family])), tokenizer, family
            )
        return found[family]

    return make


@pytest.fixture(scope="session")
def architectures(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase
) -> Callable[[str], Architecture]:
    """The hook points of a family."""
    return cache(lambda family: examine(load_config(str(folders[family])), tokenizer, family))


@pytest.fixture(scope="session")
def plain(folders: dict[str, Path]) -> dict[str, PreTrainedModel]:
    """The plain LM of every family; tests must not change them."""
    return {family: load_model(str(folder)) for family, folder in folders.items()}


@pytest.fixture(scope="session")
def make_corpus() -> Callable[..., Corpus]:
    """Builds a corpus from the number of tokens in each sentence of each document."""

    def make(documents: list[list[int]], *, actions: int = 5, dimensions: int = 3, seed: int = 0) -> Corpus:
        generator = np.random.default_rng(seed)
        lengths = [1 + sum(document) for document in documents]  # a separator before each
        starts = np.concatenate([[0], np.cumsum(lengths)])
        sentences = np.concatenate([[0], np.cumsum([len(document) for document in documents])])
        tokens = generator.integers(1, 200, size=starts[-1]).astype(np.uint16)
        tokens[starts[:-1]] = 0
        first = [
            start + 1 + sum(document[:j])
            for start, document in zip(starts, documents, strict=False)
            for j in range(len(document))
        ]
        centroids = generator.normal(size=(actions, dimensions)).astype(np.float32)
        return Corpus(
            folder=Path("nowhere"),
            tokens=tokens,
            document_tokens=starts,
            document_sentences=sentences,
            first_token=np.array(first),
            spans=np.zeros((len(first), 2), dtype=np.int64),
            split=np.zeros(len(documents), dtype=np.uint8),
            group=np.arange(len(documents)),
            embeddings=generator.normal(size=(len(first), dimensions)).astype(np.float32),
            actions=generator.integers(actions, size=len(first)).astype(np.int32),
            codebook=Codebook(centroids),
            facts={"bos": "document", "chats": 0},
        )

    return make
