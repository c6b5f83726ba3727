"""Words as tokens under several tokenizers, against the tokens of whole documents."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from probekit.config import PlantedSettings
from probekit.data.tokenizer import train_tokenizer
from probekit.errors import ProbekitError
from probekit.planted.ceilings import Forms, Units
from probekit.planted.corpus import PlantedCorpus, generate

SETTINGS = PlantedSettings(documents=12, actions=3, vocabulary=30, concentration=0.5, words=(4, 6), seed=4)
PLANTED = generate(SETTINGS)
TEXTS = [document.text for document in PLANTED.documents()]
WITH_LINES = generate(SETTINGS.model_copy(update={"sentences": (3, 3), "examples": 4}))


def byte_level(vocabulary: int, folder: Path):
    return train_tokenizer(TEXTS, vocabulary, folder / "tokenizer")


def sentencepiece_like(vocabulary: int, folder: Path):
    """A space in front of a document, and words that carry theirs, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")  # noqa: S106 - no password


def glued(vocabulary: int, folder: Path):
    """Cuts at spaces alone, so that a full stop may share a token with letters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")  # noqa: S106 - no password


def as_corpus(tokenizer, texts: list[str]) -> SimpleNamespace:
    ids = [[tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
    return SimpleNamespace(
        tokens=np.concatenate(ids), document_tokens=np.cumsum([0, *map(len, ids)]), folder="corpus"
    )


def words_of(planted: PlantedCorpus, documents: list[int]) -> list[list[np.ndarray]]:
    return [planted.model.parse(TEXTS[document]) for document in documents]


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("vocabulary", [258, 290, 600])
def test_units_carry_their_own_text(make, vocabulary, tmp_path):
    tokenizer = make(vocabulary, tmp_path)
    corpus, model = as_corpus(tokenizer, TEXTS), PLANTED.model
    documents = [1, 2, 7, 11]
    words = words_of(PLANTED, documents)
    forms = Forms.of(model, tokenizer)
    units = Units.of(words, np.array(documents), forms, corpus)
    ends = {d: int(corpus.document_tokens[d + 1]) for d in documents}
    unit = 0
    for position, document in enumerate(documents):
        place = int(corpus.document_tokens[document]) + 1
        for number, sentence in enumerate(words[position]):
            first = unit
            expected = [model.words[word] for word in sentence]
            for text in [expected[0].capitalize(), *expected[1:], "."]:
                assert units.start[unit] == place
                assert (units.document[unit], units.sentence[unit]) == (position, number)
                assert units.first[unit] == first
                length = len(forms.tokens[units.form[unit]])
                pieces = tokenizer.convert_ids_to_tokens(corpus.tokens[place : place + length].tolist())
                assert "".join(pieces).strip("Ġ▁") == text
                assert (units.form[unit] == forms.stop) == (text == ".")
                place += length
                unit += 1
        assert place == ends[document]
    assert len(units.form) == unit


@pytest.mark.parametrize("vocabulary", [258, 290, 600])
def test_first_tokens_of_a_word_stand_for_all_words_that_begin_so(vocabulary, tmp_path):
    tokenizer = byte_level(vocabulary, tmp_path)
    model = PLANTED.model
    forms = Forms.of(model, tokenizer)
    cut = {
        3: [tokenizer(f"x {word}").input_ids[1:] for word in model.words],
        2: [tokenizer(f"x {word.capitalize()}").input_ids[1:] for word in model.words],
    }
    for form_of_word, tokens in cut.items():
        for word in range(len(model.words)):
            for read in range(1, len(tokens[word]) + 1):
                begin_so = [w for w, other in enumerate(tokens) if other[:read] == tokens[word][:read]]
                form = np.array([form_of_word * len(model.words) + word])
                found = forms.log_likelihood(form, np.array([read]))
                np.testing.assert_allclose(np.exp(found[0]), model.emission[:, begin_so].sum(1))


@pytest.mark.parametrize("vocabulary", [258, 600])
def test_lines_begin_and_end_with_forms_of_their_own(vocabulary, tmp_path):
    texts = [document.text for document in WITH_LINES.documents()]
    tokenizer = train_tokenizer(texts, vocabulary, tmp_path / "tokenizer")
    corpus, model = as_corpus(tokenizer, texts), WITH_LINES.model
    forms = Forms.of(model, tokenizer)
    words = [model.parse(texts[document]) for document in (0, 5)]
    units = Units.of(words, np.array([0, 5]), forms, corpus, model.example_length)
    spelled = [tokenizer.decode(forms.tokens[form]) for form in units.form]
    assert "".join(spelled) == texts[0] + texts[5]
    assert (np.char.endswith(spelled, ".\n") == (units.form == forms.stop + 1)).all()
    assert (units.form == forms.stop + 1).sum() == 2 * 3  # no line break after the last of four
    with pytest.raises(ProbekitError, match="the tokens of document 5 are not those of its words"):
        Units.of(words[1:], np.array([5]), forms, corpus)


def test_some_words_share_their_first_tokens(tmp_path):
    """The test above would be empty without."""
    forms = Forms.of(PLANTED.model, byte_level(290, tmp_path))
    assert len(forms.prefix_log_likelihood) < 0.8 * len(forms.prefix)


def test_a_tokenizer_that_glues_words_to_full_stops_is_refused(tmp_path):
    tokenizer = glued(400, tmp_path)
    forms = Forms.of(PLANTED.model, tokenizer)
    with pytest.raises(ProbekitError, match=r"corpus: the tokens of document 3 are not .* cuts at spaces"):
        Units.of(words_of(PLANTED, [3]), np.array([3]), forms, as_corpus(tokenizer, TEXTS))
