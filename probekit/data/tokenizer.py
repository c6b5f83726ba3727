"""The tokenizer (the LM's own, or a byte-level BPE for a new LM), and where the LM reads its BOS token."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from probekit.config import BosRule, LanguageModelSettings
from probekit.data import hub
from probekit.errors import ProbekitError, one_line
from probekit.io import atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SEPARATOR = "<|endoftext|>"

ADDS_BOS = "add_bos_token"
"""What tokenizer_config.json says of an LM that was trained with a beginning-of-sequence token."""

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


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token put before every document, from which the first token is predicted.

    The classification token if the tokenizer itself begins texts with it, as BERT's does; else the
    beginning-of-sequence token if there is one, else the end-of-sequence token.

    Raises:
        ProbekitError: The tokenizer has none of them.
    """
    first = tokenizer("a").input_ids[0]
    own = first if first == tokenizer.cls_token_id else None
    for token_id in (own, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ProbekitError(
        f"lm.name {tokenizer.name_or_path!r}: its tokenizer has neither a beginning- nor an end-of-sequence "
        "token; set one of them in its tokenizer_config.json"
    )


def bos_rule_for(tokenizer: PreTrainedTokenizerBase, setting: BosRule | Literal["auto"]) -> BosRule:
    """Where an LM reads the separator: in every window, once a document, or never.

    Args:
        tokenizer: The LM's; under `auto` it says how the LM was trained.
        setting: The setting `lm.bos`.
    """
    if setting != "auto":
        return setting
    # Some classes of Transformers leave out what tokenizer_config.json asks for, as those of OPT's do.
    asked = tokenizer.init_kwargs.get(ADDS_BOS) and tokenizer.bos_token_id is not None
    if asked or tokenizer("a").input_ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        return "every-window"
    # GPT-2 and its like were trained on documents that this token separates.
    return "document" if tokenizer.bos_token_id == tokenizer.eos_token_id else "none"


def bos_rule_of_chats(tokenizer: PreTrainedTokenizerBase, rule: BosRule, chat: str) -> BosRule:
    """Where an LM reads the separator if texts are chats.

    Where their template writes it, as in plain texts, or before every document if those have none; otherwise
    nowhere.

    Args:
        tokenizer: The LM's.
        rule: The rule for plain texts.
        chat: A rendered chat.
    """
    if not chat.startswith(str(tokenizer.convert_ids_to_tokens(separator_id(tokenizer)))):
        return "none"
    return "document" if rule == "none" else rule


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id of a token; `len(tokenizer)` is less where some ids have no token."""
    return 1 + max(*tokenizer.get_vocab().values(), separator_id(tokenizer))


def drawable_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids of all tokens but special ones, in order: those that a written text can be made of."""
    return np.array(sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}), np.int64)


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
