"""Special tokens: the separator of documents (BOS), where an LM reads it, and what text is never made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from probekit.config import BosRule
from probekit.errors import ProbekitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADDS_BOS = "add_bos_token"
"""What tokenizer_config.json says of an LM that was trained with a beginning-of-sequence token."""


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


def drawable_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Ids of all tokens but special ones, in order: those that a written text can be made of."""
    return np.array(sorted({*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}), np.int64)
