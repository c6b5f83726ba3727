"""The separator, and where it is read, as tokenizers of real LMs have them."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from probekit.config import BosRule
from probekit.data.special_tokens import bos_rule_for, separator_id
from probekit.data.tokenizer import SEPARATOR, load_tokenizer, train_tokenizer
from probekit.errors import ProbekitError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    train_tokenizer(["One sentence. Another."] * 9, 300, folder)
    return folder


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def test_the_separator_is_the_beginning_token_else_the_end_token(tokenizer: PreTrainedTokenizerBase):
    assert separator_id(tokenizer) == tokenizer.convert_tokens_to_ids(SEPARATOR) == 0  # 0 is a token too
    tokenizer.eos_token = "a"  # noqa: S105 - a token of text, no password
    assert separator_id(tokenizer) == 0
    tokenizer.bos_token = None
    assert separator_id(tokenizer) == tokenizer.convert_tokens_to_ids("a") != 0
    tokenizer.eos_token = None
    with pytest.raises(ProbekitError, match="neither a beginning- nor an end-of-sequence token") as raised:
        separator_id(tokenizer)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("bos", "eos", "added", "rule"),
    [
        ("<s>", "</s>", True, "every-window"),  # Llama, Gemma
        ("<s>", "<s>", True, "every-window"),
        ("<s>", "<s>", False, "document"),  # GPT-2
        ("<s>", "</s>", False, "none"),  # BLOOM
        (None, "</s>", False, "none"),  # Qwen
    ],
)
def test_the_separator_is_read_as_the_lm_was_trained(
    bos: str | None, eos: str, added: bool, rule: BosRule, tmp_path: Path
):
    tokenizer = train_tokenizer(["One sentence. Another."], 300, tmp_path / "tokenizer")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": eos})
    tokenizer.bos_token = bos
    if added:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
        )
    assert bos_rule_for(tokenizer, "auto") == rule
    assert bos_rule_for(tokenizer, "none") == "none"


@pytest.mark.parametrize(("flag", "rule"), [(True, "every-window"), (False, "none"), (None, "none")])
def test_a_beginning_that_is_asked_for_and_not_added(
    flag: bool | None, rule: str, folder: Path, tmp_path: Path
):
    """Transformers ignores `add_bos_token` where tokenizer.json adds nothing; the LM was trained with it."""
    shutil.copytree(folder, tmp_path / "asked")
    file = tmp_path / "asked" / "tokenizer_config.json"
    content = json.loads(file.read_text("utf-8")) | {"eos_token": "a"}
    file.write_text(json.dumps(content if flag is None else content | {"add_bos_token": flag}), "utf-8")
    tokenizer = load_tokenizer(tmp_path / "asked")
    assert tokenizer("b").input_ids[0] != tokenizer.bos_token_id
    assert bos_rule_for(tokenizer, "auto") == rule
