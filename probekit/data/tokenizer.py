"""The tokenizer: the LM's own, or a byte-level BPE for a new LM."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probekit.config import LanguageModelSettings
from probekit.data import hub
from probekit.data.special_tokens import ADDS_BOS, separator_id
from probekit.errors import ProbekitError, one_line
from probekit.io import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SEPARATOR = "<|endoftext|>"

OFFSETS_OF = "A sentence of some words."
"""A text with which it is found out whether a tokenizer gives offsets of characters."""


def train_tokenizer(texts: Iterable[str], vocabulary: int, folder: Path) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer, saves it in Hugging Face format and loads it back.

    Args:
        texts: Training documents, read once.
        vocabulary: Largest vocabulary size; a small corpus may offer fewer merges.
        folder: Where `AutoTokenizer.from_pretrained` will find it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[SEPARATOR],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    with atomic_folder(folder) as partial:
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=SEPARATOR,
            eos_token=SEPARATOR,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(partial)
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a local folder.

    Raises:
        ProbekitError: The folder holds no fast tokenizer (character offsets need one), or none at all.
    """
    return _load(hub.Source(str(folder), None, local_only=True), trust_remote_code=False)


def pretrained_tokenizer(settings: LanguageModelSettings) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the pre-trained LM that the settings name."""
    assert settings.name is not None  # noqa: S101 - for mypy; callers check it
    source = hub.find(settings.name, setting="lm.name", revision=settings.revision)
    return _load(source, settings.trust_remote_code)


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text without special tokens; one that is written out in the text is plain text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int] | np.ndarray) -> str:
    """The text that tokens stand for, whatever they are."""
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id of a token; `len(tokenizer)` is less where some ids have no token."""
    return 1 + max(*tokenizer.get_vocab().values(), separator_id(tokenizer))


def _load(source: hub.Source, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.name, trust_remote_code=trust_remote_code, **source.arguments
        )
        # For a folder without a tokenizer, transformers makes one up with no vocabulary.
        if not tokenizer("a", add_special_tokens=False).input_ids:
            raise ValueError("it has no vocabulary")
        if source.file is None:
            declared = get_tokenizer_config(source.name, **source.arguments)
            tokenizer.init_kwargs[ADDS_BOS] = bool(declared.get(ADDS_BOS))
    except Exception as error:
        raise ProbekitError(
            f"lm.name {source.name!r}: no tokenizer could be loaded from it; it needs a tokenizer.json and a "
            f"tokenizer_config.json ({one_line(error)[:200]})"
        ) from error
    if not tokenizer.is_fast:
        raise ProbekitError(
            f"lm.name {source.name!r}: its tokenizer gives no character offsets; save it as a fast tokenizer "
            "first"
        )
    found = tokenizer(OFFSETS_OF, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if 2 * (lost := len(found) - len({start for start, stop in found if stop > start})) > len(found):
        raise ProbekitError(
            f"lm.name {source.name!r}: its tokenizer gives no character offsets of their own to {lost} of "
            f"the {len(found)} tokens of {OFFSETS_OF!r}, so sentences cannot be found in them; give an LM "
            "whose tokenizer does"
        )
    return tokenizer
