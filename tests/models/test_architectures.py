"""The table of architectures in the documentation is what is found on tiny random LMs."""

import pytest
from architectures import ARCHITECTURES, PAGE, found_in, row
from transformers import PreTrainedTokenizerBase


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_row_of_the_table(name: str, tokenizer: PreTrainedTokenizerBase):
    assert row(name, found_in(name, tokenizer)) in PAGE.read_text(encoding="utf-8").splitlines()
