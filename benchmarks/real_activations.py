"""Residual streams of a real LM before each sentence of real text, read once and kept in a folder.

There are three labels of an example: the action of the sentence that begins there, of 64 and of 512, with
encoder and codebook fitted as the package does it to the articles that the LM does not read; and the token
at the farthest distance, one of the most frequent or another, which the first layers encode exactly, so that
the best penalty is a weak one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from planted_activations import SPLITS, Data
from torch import Tensor

from probekit.data.codebook import fit_codebook
from probekit.data.encoders import TfidfEncoder
from probekit.data.sentences import align, sentence_spans
from probekit.io import read_tensors, write_tensors

LAYERS, DISTANCES, CLASSES = (0, 10, 20, 29), (1, 4), (64, 512)
TOKENS = 64
"""Classes of the token at the farthest distance: the most frequent ones, the last for all others."""
SHARES = (0.7, 0.15, 0.15)
"""Of the articles, by split."""
WINDOW = 768
"""Tokens read of each article, from its beginning."""
DIMENSIONS, SEED = 64, 0
AT_ONCE = 4
"""Articles in a batch; those of like length are together."""


@dataclass(frozen=True)
class Source:
    """Where activations come from."""

    lm: Path  # a Hugging Face folder of a causal LM
    text: Path  # JSON lines with the field `text`
    articles: int  # read by the LM, drawn from the text; all others fit the codebook
    kept: Path  # the folder in which activations are kept


def real_activations(source: Source) -> dict[str, Data]:
    """By labels the activations of the residual stream; reads the LM at most once.

    Probes are in the order of layers, then distances. Classes without an example to fit on are left out:
    solvers differ in what they make of them.
    """
    path = source.kept / f"{source.lm.name}-{source.text.stem}-{source.articles}.safetensors"
    if not path.exists():
        write_tensors(path, _read(source))
    tensors = read_tensors(path)
    named = [name for name in tensors if name.startswith("labels ")]
    return {
        name.removeprefix("labels "): _data(tensors["activations"], tensors[name], tensors["split"])
        for name in named
    }


def _data(activations: Tensor, labels: Tensor, split: Tensor) -> Data:
    known = labels[split == 0].unique()
    rows = {
        name: ((split == number) & torch.isin(labels, known)).nonzero()[:, 0]
        for number, name in enumerate(SPLITS)
    }
    X = {name: activations[:, part] for name, part in rows.items()}
    y = {name: torch.searchsorted(known, labels[part]) for name, part in rows.items()}
    return Data(X, y, len(known))


def _read(source: Source) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = source.text.read_text("utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    order = np.random.default_rng(SEED).permutation(len(texts))
    read, others = order[: source.articles], order[source.articles :]
    tokenizer = AutoTokenizer.from_pretrained(source.lm)
    encoded = [tokenizer(texts[number], return_offsets_mapping=True) for number in read]
    sentences, anchors = [], []
    for number, tokens in zip(read, encoded, strict=True):
        text = texts[number]
        aligned = align(text, sentence_spans(text), tokens["offset_mapping"])
        seen = (aligned.first_token >= max(DISTANCES)) & (aligned.first_token < WINDOW)
        sentences += [text[first:last] for first, last in aligned.spans[seen]]
        anchors.append(aligned.first_token[seen])
    model = AutoModelForCausalLM.from_pretrained(source.lm, dtype=torch.float32).eval()
    ids = [torch.tensor(tokens["input_ids"][:WINDOW]) for tokens in encoded]
    article = np.repeat(np.arange(len(read)), [len(part) for part in anchors])
    ends = np.cumsum(SHARES) * len(read)
    labels = _labels([texts[number] for number in others], sentences)
    far = [part[torch.from_numpy(at) - max(DISTANCES)] for part, at in zip(ids, anchors, strict=True)]
    labels["token read"] = _ranked(torch.cat(far).numpy())
    return {
        "activations": _residuals(model, ids, anchors),
        "split": torch.from_numpy(np.searchsorted(ends[:-1], article, side="right")),
    } | {f"labels {name}": torch.from_numpy(found) for name, found in labels.items()}


def _ranked(tokens: np.ndarray) -> np.ndarray:
    """Ranks of tokens by frequency, from 0, the last of `TOKENS` for all rarer ones."""
    _, inverse, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    return np.minimum(np.argsort(np.argsort(-counts, kind="stable"))[inverse], TOKENS - 1)


def _labels(texts: list[str], sentences: list[str]) -> dict[str, np.ndarray]:
    """The actions of sentences, by codebooks fitted to other texts."""
    known = [text[first:last] for text in texts for first, last in sentence_spans(text)]
    encoder = TfidfEncoder.fit(known, DIMENSIONS, SEED)
    embeddings, asked = encoder.encode(known), encoder.encode(sentences)
    return {
        f"{k} actions": fit_codebook(embeddings, k, SEED).nearest(asked).astype(np.int64) for k in CLASSES
    }


@torch.inference_mode()
def _residuals(model: Any, ids: list[Tensor], anchors: list[np.ndarray]) -> Tensor:
    """Outputs of `LAYERS` at `DISTANCES` before the anchors of all articles [probes, examples, width]."""
    layers, seen = model.base_model.layers, {}
    for layer in LAYERS:
        layers[layer].register_forward_hook(
            lambda _, __, output, layer=layer: seen.update(
                {layer: output if isinstance(output, Tensor) else output[0]}
            )
        )
    found: list[Any] = [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    for start in range(0, len(order), AT_ONCE):
        batch = order[start : start + AT_ONCE]
        # Padding on the right changes nothing before it.
        model.base_model(torch.nn.utils.rnn.pad_sequence([ids[number] for number in batch], batch_first=True))
        for row, number in enumerate(batch):
            at = [torch.from_numpy(anchors[number]) - distance for distance in DISTANCES]
            found[number] = torch.stack([seen[layer][row, where] for layer in LAYERS for where in at])
        print(f"read {start + len(batch)} of {len(ids)} articles", flush=True)
    return torch.cat(found, 1)
