"""The tokenizer gives back every text, and what is no usable tokenizer is refused in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Config, PreTrainedTokenizerBase

from probekit.config import LanguageModelSettings
from probekit.data.special_tokens import drawable_ids
from probekit.data.tokenizer import (
    SEPARATOR,
    load_tokenizer,
    pretrained_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from probekit.errors import ProbekitError

TEXTS = [
    "The plan of the next sentence is in the last token of this sentence. ",
    "The next sentence is here.",
] * 9

HARD = [
    "",
    " ",
    "  two spaces,\ttab,\n newline\r\n and \r alone  ",
    "again.He",
    "it 's , well . do n't ! ?",  # what decoders like to clean up
    "naïve café: e\u0301 is not é, \ufb01 is not fi",
    "漢字とかな 한국어 العربية",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "\x00\x01\x7f\u200b\u2028\ufeff\ufffd",
    f"a{SEPARATOR}b {SEPARATOR} c",
    "<s> </s> [CLS] [MASK] <pad> <|im_start|>",
    "a" * 3000,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    train_tokenizer(TEXTS, 300, folder)
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


@pytest.fixture
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(folder)


def refusal(folder: Path) -> str:
    with pytest.raises(ProbekitError) as raised:
        load_tokenizer(folder)
    message = str(raised.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def assert_round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < len(tokenizer) for token in ids)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back(tokenizer: PreTrainedTokenizerBase, text: str):
    assert_round_trip(tokenizer, text)


@settings(max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(shared: PreTrainedTokenizerBase, text: str):
    assert_round_trip(shared, text)


@pytest.mark.parametrize("vocabulary", [257, 258, 280])
def test_the_vocabulary_has_at_most_the_size_asked_for(vocabulary: int, tmp_path: Path):
    tokenizer = train_tokenizer(TEXTS, vocabulary, tmp_path / "t")
    assert len(tokenizer) == vocabulary
    assert_round_trip(tokenizer, HARD[2])


def test_a_small_corpus_offers_fewer_merges(tmp_path: Path):
    assert len(train_tokenizer(["ab"], 5000, tmp_path / "one")) == 256 + 1 + 1
    assert len(train_tokenizer([], 5000, tmp_path / "none")) == 256 + 1


def test_merges_are_learned_from_the_texts(tokenizer: PreTrainedTokenizerBase):
    assert len(tokenizer(" sentence").input_ids) == 1
    assert len(tokenizer(" qxzvkj").input_ids) == 7


def test_training_is_repeatable(tmp_path: Path, folder: Path):
    train_tokenizer(iter(TEXTS), 300, tmp_path / "again")
    written, again = (sorted(f.glob("*.json")) for f in (folder, tmp_path / "again"))
    assert [path.name for path in written] == [path.name for path in again]
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]


def test_tokens_come_with_the_characters_they_stand_for(tokenizer: PreTrainedTokenizerBase):
    text = "The next sentence,  naïvely."
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert "".join(text[start:end] for start, end in encoded.offset_mapping if end > start).startswith(
        "The next"
    )
    for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        if text[start:end].isascii():
            assert tokenizer.decode([token]) == text[start:end]


def test_other_programs_load_the_folder(folder: Path, tokenizer: PreTrainedTokenizerBase):
    plain = AutoTokenizer.from_pretrained(folder)
    text = "The next sentence is  here ."
    assert plain(text).input_ids == tokenizer(text).input_ids
    assert plain.bos_token == plain.eos_token == SEPARATOR


def test_a_slow_tokenizer_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    slow = AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(type(slow), "is_fast", False)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: slow)
    assert "fast tokenizer" in refusal(folder)


@pytest.mark.parametrize("content", [None, "", "{", "{}", "[]", '{"model": 3}'])
def test_a_folder_without_a_usable_tokenizer_is_refused(content: str | None, folder: Path, tmp_path: Path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    assert "tokenizer.json" in refusal(tmp_path)


def test_a_models_folder_without_its_tokenizer_is_not_given_an_empty_one(tmp_path: Path):
    GPT2Config().save_pretrained(tmp_path)
    assert "no vocabulary" in refusal(tmp_path)


def test_the_tokenizer_of_a_named_lm(folder: Path):
    text = "The plan"
    loaded = pretrained_tokenizer(LanguageModelSettings(name=str(folder)))
    assert loaded(text).input_ids == load_tokenizer(folder)(text).input_ids
    with pytest.raises(ProbekitError, match=r"^lm\.name is './nowhere'"):
        pretrained_tokenizer(LanguageModelSettings(name="./nowhere"))


def test_code_in_a_folder_runs_only_where_it_is_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A tokenizer that brings its own class: loading it would import the folder's Python file."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    own, mark = tmp_path / "own", tmp_path / "ran"
    shutil.copytree(folder, own)
    config = json.loads((own / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    (own / "own.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    assert "custom code" in refusal(own)
    assert not mark.exists()
    trusting = LanguageModelSettings(name=str(own), trust_remote_code=True)
    assert type(pretrained_tokenizer(trusting)).__name__ == "Own"
    assert mark.exists()


def sparse_tokenizer(folder: Path, largest: int) -> PreTrainedTokenizerBase:
    """A tokenizer that has ids without tokens, and 'Z' last."""
    train_tokenizer(TEXTS, 300, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["model"]["vocab"]["Z"] = largest
    file.write_text(json.dumps(content), "utf-8")
    return load_tokenizer(folder)


@pytest.mark.parametrize("largest", [70_000, 2**16, 2**16 - 1])
def test_ids_without_tokens_count_in_the_vocabulary(largest: int, tmp_path: Path):
    tokenizer = sparse_tokenizer(tmp_path / "sparse", largest)
    assert len(tokenizer) <= 300
    assert vocabulary_size(tokenizer) == largest + 1
    ids = drawable_ids(tokenizer)
    assert ids[-1] == largest
    assert len(ids) == len(tokenizer) - 1  # all but the separator
    assert tokenizer.decode(ids[-1:]) == "Z"


def test_a_tokenizer_without_offsets_is_refused(folder: Path, tmp_path: Path):
    """One whose normaliser replaces the text as a whole has tokens that are nowhere in it."""
    shutil.copytree(folder, tmp_path / "lost")
    file = tmp_path / "lost" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "^.*$"}, "content": "words of no text"}
    file.write_text(json.dumps(content), "utf-8")
    assert re.search(
        r"no character offsets of their own to \d+ of the \d+ tokens", refusal(tmp_path / "lost")
    )
