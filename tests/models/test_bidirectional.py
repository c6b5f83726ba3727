"""Bidirectional LMs against Transformers: what is loaded of a tower, how much is read, what is refused."""

from pathlib import Path

import pytest
import torch
from random_lms import save_random_bidirectional
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, BertConfig, DistilBertConfig

from probekit.data.special_tokens import bos_rule_for, separator_id
from probekit.data.windows import close_texts
from probekit.errors import ProbekitError
from probekit.models.bidirectional import closing_id, is_bidirectional, refuse_bidirectional
from probekit.models.hook_points import examine
from probekit.models.language_model import bridge, load_model, longest_window
from probekit.models.pretrained import load_config

TEXTS = ["The old bridge was closed .", "nobody knew why"]
POSITIONS = 20
KINDS = ["bert", "roberta"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_bidirectional(
        tmp_path_factory.mktemp("lm") / request.param, TEXTS, POSITIONS, request.param
    )


@pytest.fixture(scope="module", params=KINDS)
def tower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tower")
    return save_random_bidirectional(root / request.param, TEXTS, POSITIONS, request.param, tower=True)


def test_texts_are_read_between_the_tokens_that_the_tokenizer_puts_around_them(folder: Path):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), load_config(str(folder))
    ids = tokenizer("The bridge").input_ids
    assert [separator_id(tokenizer), closing_id(tokenizer, config)] == [ids[0], ids[-1]]
    assert bos_rule_for(tokenizer, "auto") == "every-window"


def test_a_tokenizer_that_closes_no_text_is_refused(folder: Path):
    tokenizer, config = AutoTokenizer.from_pretrained(folder), load_config(str(folder))
    tokenizer.sep_token = None
    with pytest.raises(ProbekitError, match="the tokenizer has no sep_token"):
        closing_id(tokenizer, config)


def test_as_many_tokens_are_read_as_the_table_of_positions_has_rows_for(folder: Path):
    config, model = load_config(str(folder)), AutoModel.from_pretrained(folder)
    read = longest_window(config) + 1  # and the token that closes the text
    model(torch.full((1, read), 6))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, read + 1), 6))


def test_a_tower_is_loaded_whole_and_its_head_is_not_missed(tower: Path):
    model = load_model(str(tower))
    stored = load_file(tower / "model.safetensors")
    found = model.base_model.state_dict()
    assert found.keys() == {name for name in stored if not name.startswith("pooler")}
    assert all(torch.equal(found[name], stored[name]) for name in found)


def test_a_tower_without_one_of_its_weights_is_refused(tower: Path, tmp_path: Path):
    AutoTokenizer.from_pretrained(tower).save_pretrained(tmp_path)
    load_config(str(tower)).save_pretrained(tmp_path)
    stored = load_file(tower / "model.safetensors")
    del stored["encoder.layer.1.output.dense.bias"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ProbekitError, match=r"lack (bert|roberta)\.encoder\.layer\.1\.output\.dense\.bias"):
        load_model(str(tmp_path))


def test_the_residual_stream_is_what_transformers_returns_and_no_sum_is_called_one(folder: Path):
    model, tokenizer = load_model(str(folder)).eval(), AutoTokenizer.from_pretrained(folder)
    before = dict(tokenizer.special_tokens_map)
    found = examine(model.config, tokenizer, "it")
    assert tokenizer.special_tokens_map == before  # TransformerLens adds to the tokenizer that it is given
    points = found.points([f"blocks.{layer}.hook_resid_post" for layer in range(2)])
    assert points is not None
    for name in ("attn.hook_z", "attn.o.hook_out", "ln1.hook_out", "mlp.out.hook_out"):
        assert name in found.locations
    for name, instead in {
        "hook_attn_out": "attn.o.hook_out",
        "hook_resid_mid": "ln1.hook_out",
        "hook_mlp_out": "mlp.out.hook_out",
    }.items():
        with pytest.raises(ProbekitError, match=f"no residual stream runs on beside it; give {instead}"):
            found.check(name, "location")
    with pytest.raises(ProbekitError, match=r"location is 'ln_final.hook_out'.*no module of the LM holds it"):
        found.check("ln_final.hook_out", "location")
    assert bridge(model, tokenizer, "it").cfg.n_layers == 2


def test_a_decoder_of_the_same_kind_is_not_taken_for_one():
    assert is_bidirectional(BertConfig())
    assert not is_bidirectional(BertConfig(is_decoder=True))
    refuse_bidirectional(BertConfig(is_decoder=True), "it")
    with pytest.raises(ProbekitError) as raised:
        refuse_bidirectional(BertConfig(), "it")
    assert str(raised.value) == (
        "lm.name 'it': BertForMaskedLM reads in both directions and predicts no next token; it can be "
        "probed, scored and compared, but this needs a causal LM"
    )


def test_texts_are_closed_and_padding_is_masked():
    tokens, mask = close_texts(torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([3, 1]), 2)
    assert tokens.tolist() == [[5, 6, 7, 2], [8, 2, 0, 0]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_all_of_the_head_is_loaded_where_there_is_one(folder: Path):
    own, expected = load_model(str(folder)).state_dict(), AutoModelForMaskedLM.from_pretrained(folder)
    assert all(torch.equal(own[name], value) for name, value in expected.state_dict().items())


def test_other_encoders_are_refused_by_name(tmp_path: Path):
    DistilBertConfig(architectures=["DistilBertModel"]).save_pretrained(tmp_path)
    known = r"DistilBertModel is no causal LM, and of others only bert, roberta, xlm-roberta are read"
    with pytest.raises(ProbekitError, match=known):
        load_config(str(tmp_path))
