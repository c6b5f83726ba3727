"""Bidirectional LMs, such as BERT: which ones are read, how their texts end, and where they are refused.

They predict masked tokens from both sides. What they hold at a token depends on the text after it, so that
a probe of what is still to come must not see that text: an LM of this kind reads a text up to the position
of a probe, and no further. The towers of sentence encoders are LMs of this kind without a head.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit.errors import ProbekitError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

BRIDGED = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "xlm-roberta": "RobertaForMaskedLM",
}
"""By the `model_type` of a configuration, the architecture as which TransformerLens bridges it."""

FIRST_POSITION_AFTER_PADDING = ("roberta", "xlm-roberta")
"""Kinds whose positions begin after the id of the padding token: so many rows of their table are not used."""


def is_bidirectional(config: PreTrainedConfig) -> bool:
    """Whether the LM of a configuration reads the tokens after a position, too."""
    return getattr(config, "model_type", None) in BRIDGED and not getattr(config, "is_decoder", False)


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of Transformers that makes the LM of a configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForMaskedLM if is_bidirectional(config) else AutoModelForCausalLM


def closing_id(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> int | None:
    """The id of the token that a bidirectional LM reads after every text; None if the LM is causal.

    Raises:
        ProbekitError: The tokenizer of a bidirectional LM has no such token.
    """
    if not is_bidirectional(config):
        return None
    if tokenizer.sep_token_id is None:
        raise ProbekitError(
            f"the tokenizer has no sep_token, which {BRIDGED[config.model_type]} reads after every text; set "
            "it to the token that the LM was trained with, such as [SEP] or </s>"
        )
    return int(tokenizer.sep_token_id)


def unread_positions(config: PreTrainedConfig) -> int:
    """Rows of the table of positions that no token of a text can have."""
    if not is_bidirectional(config):
        return 0
    reserved = config.pad_token_id + 1 if config.model_type in FIRST_POSITION_AFTER_PADDING else 0
    return reserved + 1  # the token that closes the text has one, too


def refuse_bidirectional(config: PreTrainedConfig, name: str | Path) -> None:
    """Refuses a bidirectional LM where next-token predictions are needed.

    Raises:
        ProbekitError: It names the LM, and what can be done with it.
    """
    if is_bidirectional(config):
        raise ProbekitError(
            f"lm.name {str(name)!r}: {BRIDGED[config.model_type]} reads in both directions and predicts no "
            "next token; it can be probed, scored and compared, but this needs a causal LM"
        )
