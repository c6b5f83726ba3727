"""Documents cut from a tokenizer's file against transformers' own call of the tokenizer."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probekit.config import CorpusSettings
from probekit.data import sentences as cutting
from probekit.data.readers import write_documents
from probekit.data.sentences import Cut, Cutter, align, sentence_spans
from probekit.data.tokenizer import train_tokenizer
from probekit.progress import Progress

TEXTS = [
    "Dr. Smith left.  Did he?\r\n\r\nYes: \U0001f468\u200d\U0001f469! The end",
    " ",
    "It is <|endoftext|> written out. Is it one token?",
    "\u4f60\u597d\u3002\u518d\u89c1\u3002 " * 30,
    "word " * 400 + "end. And another.",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("tokenizers") / "tokenizer")
    # Settings of a tokenizer's file that must not cut texts short, nor fill them up.
    made.backend_tokenizer.enable_truncation(8)
    made.backend_tokenizer.enable_padding(length=600)
    made.backend_tokenizer.save(str(Path(made.name_or_path) / "tokenizer.json"))
    return made


def cut(tokenizer: Any, folder: Path, split_special_tokens: bool = False) -> Cut:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    documents = folder / "documents.arrow"
    write_documents(CorpusSettings(reader="jsonl", path=str(folder)), documents, Progress(quiet=True))
    file = Path(tokenizer.name_or_path) / "tokenizer.json"
    cutting._tokenizer.cache_clear()
    return Cutter(documents, file, split_special_tokens, tokenizer.bos_token_id, "en", planted=False)(0)


@pytest.mark.parametrize("split_special_tokens", [False, True])
@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
def test_cuts_are_those_of_transformers(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, split_special_tokens: bool
):
    monkeypatch.setattr(cutting, "_CHARACTERS_AT_ONCE", at_once)
    found = cut(tokenizer, tmp_path, split_special_tokens)
    texts = [text for text in TEXTS if text.strip()]
    begins = [0, *itertools.accumulate(found.document_tokens.tolist())]
    sentences = [0, *itertools.accumulate(found.document_sentences.tolist())]
    assert (begins[-1], sentences[-1]) == (len(found.tokens), len(found.spans))
    for n, text in enumerate(texts):
        expected = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=split_special_tokens,
        )
        tokens = found.tokens[begins[n] : begins[n + 1]].tolist()
        assert tokens == [tokenizer.bos_token_id, *expected["input_ids"]]
        aligned = align(text, sentence_spans(text), expected["offset_mapping"])
        here = slice(sentences[n], sentences[n + 1])
        np.testing.assert_array_equal(found.spans[here], aligned.spans)
        np.testing.assert_array_equal(found.first_token[here], begins[n] + 1 + aligned.first_token)
    special = (found.tokens == tokenizer.bos_token_id).sum() - len(texts)
    assert special == (0 if split_special_tokens else 1)
    assert found.planted_actions is None
