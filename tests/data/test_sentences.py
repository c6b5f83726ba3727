"""Sentence spans lose nothing, and every token finds its sentence, whatever the text."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from probekit.config import CorpusSettings
from probekit.data.readers import VISIBLE, write_documents
from probekit.data.sentences import (
    _tokenizer,
    align,
    complete_spans,
    sentence_spans,
    sentences_of_batch,
    tokenize_batch,
    tokens_of,
)
from probekit.data.tokenizer import train_tokenizer
from probekit.errors import ProbekitError
from probekit.progress import Progress

HARD = {
    "abbreviations": "Dr. Smith met Mr. J. R. Jones, e.g. in the U.S. He left! Did he? \u201cYes.\u201d",
    "no final period": "One. No final period",
    "white space": "  leading. Then more  \n\n\n  indented\tline\t\n",
    "CRLF": "CRLF here.\r\nNext line.\r\n\r\nLast\rMac",
    "emoji": "Family \U0001f468\u200d\U0001f469\u200d\U0001f467! Flag \U0001f1e9\U0001f1ea. Done \U0001f600",
    "combining accents": "Cafe\u0301 ole\u0301. A\u030a stro\u0308m? !\u0301?\u0301",
    "astral letters": "\U0001d518\U0001d4d0. \U00020000\U00020001\u3002\U0010ffff",
    "rare line breaks": "one\u0085two.\u2028Three four.\u2029five\x0bsix\x0cseven\x1ceight",
    # sentencex 1.0.32 panics on a capital, a space of several bytes and a period.
    "wide spaces": "Vitamin C\u00a0. An initial A\u2003. and\u3000more. W\u00a0.",
    "Chinese": "\u4f60\u597d\u3002\u518d\u89c1\u3002Wow\u203c\ufe0f Next.",
    "hardly visible": "\u200b.\u200b \ufeff A.\x00\x01. \u202e.",
    "dots": "...\n...\n? ? ?\n\n\n\n\n\n.",
    "one long sentence": "word " * 4000 + "end. And another.",
    "many line breaks": "\n" * 20_000 + "a" + "\n" * 20_000,
}
BLANK = ["", " ", "\n\n\r\n\t", "\u2028\u3000\u00a0"]
PIECES = [
    ".", "!", "?", "...", "\u3002", '"', "'", "\u201c", "\u201d", "(", ")", "Dr.", "e.g.", "U.S.", "A", "b",
    "Word", "2.", "3.5", "[1]", "e\u0301", "\u0301", "\u00df", "\u200b", "\U0001d518", "\U0001f600",
    "\U0001f469\u200d\U0001f680", "\U0001f1e9\U0001f1ea",
]  # fmt: skip
SPACES = [" ", "  ", "\n", "\r\n", "\r", "\t", "\u00a0", "\u3000", "\u0085", "\u2028", "\x1c"]
LANGUAGES = ["en", "de", "fr", "ja", "hi", "my", "el", "pt-br", "xx"]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(PIECES) | st.sampled_from(SPACES), max_size=25
).map("".join)
hard = pytest.mark.parametrize("text", HARD.values(), ids=HARD)
many = settings(max_examples=500)


def byte_level_bpe(*, regex, trim_offsets):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text[:300] for text in HARD.values()] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {
    "GPT-2's": byte_level_bpe(regex=True, trim_offsets=False),
    # Merges run over spaces, line breaks and sentence ends: tokens that lie in several sentences.
    "no regex": byte_level_bpe(regex=False, trim_offsets=False),
    "trimmed offsets": byte_level_bpe(regex=True, trim_offsets=True),
}


def blank(text):
    return not VISIBLE.search(text)


def assert_partition(text, spans):
    assert spans.dtype == np.int64
    assert spans.shape == (len(spans), 2)
    assert "".join(text[start:end] for start, end in spans) == ("" if blank(text) else text)
    assert (spans[1:, 0] == spans[:-1, 1]).all()
    assert not any(blank(text[start:end]) for start, end in spans)


def owners_one_by_one(text, spans, offsets):
    """The rule of `align` written out token by token."""
    owners = [0]
    for start, end in offsets:
        inside = range(start, end) or [max(start - 1, 0)]
        anchor = next((i for i in inside if not text[i].isspace()), inside[0])
        owner = next(j for j, (first, last) in enumerate(spans) if first <= anchor < last)
        owners.append(max(owner, owners[-1]))
    return owners[1:]


def assert_aligned(text, offsets):
    spans = sentence_spans(text)
    aligned = align(text, spans, offsets)
    assert aligned.first_token.dtype == np.int64
    if not (len(spans) and len(offsets)):
        assert aligned.spans.shape == (0, 2)
        assert aligned.first_token.shape == (0,)
        return
    assert_partition(text, aligned.spans)
    assert len(aligned.first_token) == len(aligned.spans)
    assert aligned.first_token[0] == 0
    owned = np.diff(aligned.first_token, append=len(offsets))
    assert (owned > 0).all()
    owners = owners_one_by_one(text, spans, offsets)
    survivors = sorted(set(owners))
    np.testing.assert_array_equal(np.repeat(survivors, owned), owners)
    np.testing.assert_array_equal(aligned.spans[1:, 0], spans[survivors[1:], 0])


def assert_tokenized(text, tokenizer):
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"], clean_up_tokenization_spaces=False) == text
    assert_aligned(text, encoded["offset_mapping"])


@hard
def test_hard_texts_are_partitioned(text):
    assert_partition(text, sentence_spans(text))


@many
@given(text=texts, language=st.sampled_from(LANGUAGES))
def test_any_text_is_partitioned(text, language):
    spans = sentence_spans(text, language)
    assert_partition(text, spans)
    assert not any(text[start].isspace() for start in spans[1:, 0])
    for start, end in spans:
        assert sum(not blank(line) for line in text[start:end].splitlines()) == 1


@pytest.mark.parametrize("text", BLANK)
def test_a_blank_text_has_no_sentence(text):
    assert sentence_spans(text).shape == (0, 2)


def test_sentences_are_what_a_reader_would_say():
    text = "Dr. Smith left.  Did he?\r\n\r\nYes: \U0001f468\u200d\U0001f469! The end"
    sentences = [text[start:end] for start, end in sentence_spans(text)]
    assert sentences == [
        "Dr. Smith left.  ",
        "Did he?\r\n\r\n",
        "Yes: \U0001f468\u200d\U0001f469! ",
        "The end",
    ]


def test_the_language_is_used():
    text = "Das gilt bzw. Hr. Meier. Ende."
    assert len(sentence_spans(text, "de")) == 2
    assert len(sentence_spans(text, "en")) == 3


@pytest.mark.parametrize("language", ["", "english", "EN", "de_DE", "e", "en\n", "\u65e5\u672c"])
def test_what_is_no_language_code_is_refused(language):
    with pytest.raises(ProbekitError, match=r"^corpus\.language is .*such as en") as caught:
        sentence_spans("A text.", language)
    assert repr(language) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_endless_line_is_split():
    sentence = "This is a sentence of a line that never ends. "
    spans = sentence_spans(sentence * 20_000)  # sentencex needs minutes for a whole line of this length
    np.testing.assert_array_equal(spans[:, 0], np.arange(20_000) * len(sentence))


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@hard
def test_tokens_of_hard_texts_find_their_sentences(text, tokenizer):
    assert_tokenized(text, tokenizer)


@many
@given(text=texts, tokenizer=st.sampled_from(list(TOKENIZERS.values())))
def test_tokens_of_any_text_find_their_sentences(text, tokenizer):
    assert_tokenized(text, tokenizer)


@many
@given(text=texts, cuts=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 9)), max_size=30))
def test_any_offsets_give_the_sentences_that_the_rule_gives(text, cuts):
    offsets = [(min(start, len(text)), min(start + size, len(text))) for start, size in sorted(cuts)]
    assert_aligned(text, offsets)


def test_sentences_without_a_token_are_merged():
    text = "One. Two. Six. Ten."
    spans = sentence_spans(text)
    assert spans[:, 0].tolist() == [0, 5, 10, 15]
    # No token for the first sentence, and one for the end of the second and all of the third.
    aligned = align(text, spans, [(5, 7), (7, 15), (15, 19)])
    assert aligned.spans.tolist() == [[0, 15], [15, 19]]
    assert aligned.first_token.tolist() == [0, 2]


def test_a_token_goes_to_no_sentence_before_that_of_the_last_one():
    text = "One.  Two."
    aligned = align(text, sentence_spans(text), [(4, 10), (4, 5)])  # the second holds white space alone
    assert aligned.spans.tolist() == [[0, 10]]
    assert aligned.first_token.tolist() == [0]


def test_special_tokens_go_with_the_token_before_them():
    text = "One. Two."
    aligned = align(text, sentence_spans(text), [(0, 0), (0, 4), (4, 8), (8, 9), (0, 0)])
    assert aligned.spans.tolist() == [[0, 5], [5, 9]]
    assert aligned.first_token.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("", []),
        ("\n \n", []),
        ("It goes", []),
        ("It goes.", ["It goes."]),
        ("It goes. ", ["It goes. "]),
        ("It goes. On", ["It goes. "]),
        ("They saw Mr.", []),
        ("No stop\n", ["No stop\n"]),
        ("One. Two!\n\n", ["One. ", "Two!\n\n"]),
        ("It cost 3.", ["It cost 3."]),
        ("It cost 3.14", []),
    ],
)
def test_sentences_that_are_over(text: str, complete: list[str]):
    found = [text[a:b] for a, b in complete_spans(text)]
    assert [part.strip() for part in found] == [part.strip() for part in complete]
    assert "".join(found) == "".join(complete)


# Batches of a corpus that is being built

DOCUMENTS = [
    "Dr. Smith left.  Did he?\r\n\r\nYes: \U0001f468\u200d\U0001f469! The end",
    " ",
    "It is <|endoftext|> spelled out. Is it one token?",
    "\u4f60\u597d\u3002\u518d\u89c1\u3002 " * 30,
    "word " * 400 + "end. And another.",
]


def test_a_batch_has_the_tokens_of_transformers(tmp_path: Path):
    tokenizer = train_tokenizer(DOCUMENTS, 400, tmp_path / "tokenizer")
    # Settings of a tokenizer's file that must neither truncate nor pad texts.
    tokenizer.backend_tokenizer.enable_truncation(8)
    tokenizer.backend_tokenizer.enable_padding(length=600)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
    _tokenizer.cache_clear()
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    corpus_settings = CorpusSettings(reader="jsonl", path=str(source))
    write_documents(corpus_settings, tmp_path / "documents.arrow", Progress(quiet=True))
    separator = tokenizer.bos_token_id
    found = tokenize_batch(tmp_path, 0, separator, "en")

    written = [text for text in DOCUMENTS if text.strip()]
    begins = [0, *itertools.accumulate(found.document_tokens.tolist())]
    sentences = [0, *itertools.accumulate(found.document_sentences.tolist())]
    assert (begins[-1], sentences[-1]) == (len(found.tokens), len(found.spans))
    for n, text in enumerate(written):
        expected = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            split_special_tokens=True,
        )
        assert found.tokens[begins[n] : begins[n + 1]].tolist() == [separator, *expected["input_ids"]]
        aligned = align(text, sentence_spans(text), expected["offset_mapping"])
        here = slice(sentences[n], sentences[n + 1])
        np.testing.assert_array_equal(found.spans[here], aligned.spans)
        np.testing.assert_array_equal(found.first_token[here], begins[n] + 1 + aligned.first_token)
    assert (found.tokens == separator).sum() == len(written)  # one that is written out is plain text
    assert found.planted_actions is None

    np.save(tmp_path / "document_sentences.npy", np.array([0, *sentences]))  # as if one came before
    np.save(tmp_path / "spans.npy", found.spans)
    owners = np.repeat(np.arange(len(written)), np.diff(sentences))
    texts_of_sentences = [
        written[owner][a:b].strip() for owner, (a, b) in zip(owners, found.spans, strict=True)
    ]
    assert sentences_of_batch(tmp_path, 0, 1) == texts_of_sentences


def test_what_processes_import_does_not_import_torch():
    script = "import sys, probekit.data.encoders, probekit.data.sentences; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


# Sentences as readers part them

JUDGED = {
    "en": [
        "Dr. Smith arrived at 5 p.m. on Friday. ",
        "He paid $3.50 for it, i.e. too much. ",
        "“Why?” she asked. ",
        "Nobody knew. ",
        "The U.S. Senate voted 51–49! ",
        "See Fig. 3 for details. ",
        "It ended... or did it? ",
        "It ended… or did it? ",
        "He waited… ",
        "Then she came, “and so…” ",
        "“Yes…” ",
        "J. R. R. Tolkien wrote it.",
    ],
    "de": [
        "Am 3. Oktober 1990 wurde Deutschland vereint. ",
        "Am 14. Februar, einem Montag, fiel Schnee. ",
        "Vom 3. bis zum 5. März, also drei Tage, und am 3. Jan. wieder… ",
        "Dann ging er. ",
        "Er kam als Nr. 3. ",
        "Mehr ist nicht bekannt. ",
        "Das gilt z. B. für Berlin. ",
        "Dr. Müller kam um 15.30 Uhr. ",
        "„Warum nicht?“, fragte sie. ",
        "Der Krieg endete am 8. Mai 1945. ",
        "Er wohnt in der Hauptstr. 5 in Köln. ",
        "Das war’s!",
    ],
    "es": [
        "¿Qué hora es? ",
        "¡Vámonos ya! ",
        "Esperó… ",
        "¿Vendría? ",
        "El Sr. García vive en EE. UU. desde 1990. ",
        "La Sra. López llegó a las 8.30 h. ",
        "Costó 3.500 euros, p. ej. para viajar. ",
        "—No lo sé —dijo él. ",
        "Fin.",
    ],
    "fr": [
        "M. Dupont est arrivé. ",
        "Il a dit : « Je viens demain. » ",
        "Mme Curie reçut le prix en 1903. ",
        "Cela coûte 3,50 € ! ",
        "Pourquoi pas ? ",
        "L’art. 5 s’applique, cf. p. 12. ",
        "C’est tout.",
    ],
    "it": [
        "Il sig. Rossi abita a Roma. ",
        "La dott.ssa Bianchi è arrivata alle 9.30. ",
        "Che cosa vuoi? ",
        "Ecc. ecc. non basta. ",
        "Nacque nel 100 a.C. a Siracusa. ",
        "Basta!",
    ],
    "ru": [
        "А. С. Пушкин родился в 1799 г. в Москве. ",
        "Он жил на ул. Ленина, д. 5. ",
        "Это стоит 100 руб. в месяц. ",
        "«Почему?» — спросила она. ",
        "И т. д. и т. п. не считаются. ",
        "Конец.",
    ],
    "ar": [
        "وصل د. أحمد إلى القاهرة. ",
        "هل رأيته؟ ",
        "نعم! ",
        "ولد سنة 570 م. في مكة. ",
        "قال: «لا أعرف». ",
        "انتهى.",
    ],
    "hi": [
        "डॉ. शर्मा दिल्ली गए। ",
        "क्या वह आया? ",
        "हाँ! ",
        "उसने ३.५ रुपये दिए। ",
        "श्री. वर्मा ने कहा, “मैं नहीं जानता।” ",
        "समाप्त।",
    ],
    "zh": [
        "我们去北京。",
        "你来吗？",
        "“好的。”他说。",
        "太好了！",
        "价格是3.5元……真的吗？",
        "结束了。",
    ],
    "ja": [
        "東京へ行きました。",
        "「本当ですか？」と彼は聞いた。",
        "はい！",
        "価格は3.5ドルです。",
        "彼は「行く。」と言った。",
        "終わり。",
    ],
    "ko": [
        "김 박사는 서울에 갔다. ",
        "정말이야? ",
        "네! ",
        "가격은 3.5달러이다. ",
        "“모른다.”라고 그가 말했다. ",
        "끝.",
    ],
    "el": [
        "Ο κ. Παπαδόπουλος ήρθε. ",
        "Πού πας; ",
        "Ναι! ",
        "Γεννήθηκε το 484 π.Χ. στην Αλικαρνασσό. ",
        "Τέλος.",
    ],
    "pl": [
        "Dr Nowak przyszedł o godz. 8.30. ",
        "To jest np. Kraków, ul. Długa 5. ",
        "Kto to? ",
        "Urodził się w 1867 r. w Warszawie. ",
        "Koniec.",
    ],
    "pt": [
        "O Sr. Silva mora na R. Augusta, n.º 5. ",
        "Nasceu em 50 a.C. em Roma. ",
        "Quem é? ",
        "Custou 3,50 €!",
    ],
    "sv": [
        "Det gäller t.ex. Stockholm. ",
        "Hr. Berg kom kl. 8. ",
        "Varför?",
    ],
    "nb": ["Den 14. februar, en mandag, kom han. ", "Han er nr. 3. ", "Så gikk han."],
    "cs": ["Přišel 14. února, v pondělí. ", "Pak odešel."],
    "hu": ["1990. február 14., szerda volt. ", "Aztán elment."],
}
"""Sentences as a reader of the language would part them."""


@pytest.mark.parametrize("language", JUDGED)
def test_sentences_of_many_languages(language):
    sentences = JUDGED[language]
    text = "".join(sentences)
    assert [text[start:end] for start, end in sentence_spans(text, language)] == sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            "Great day! 😀 Tomorrow we go. 🎉🎉 Yes!😀Next.",
            ["Great day! 😀 ", "Tomorrow we go. 🎉🎉 ", "Yes!😀", "Next."],
        ),
        ("A family 👩‍👩‍👧‍👦. ❤️ All well.", ["A family 👩‍👩‍👧‍👦. ❤️ ", "All well."]),
        ("🎉 begins. Then.", ["🎉 begins. ", "Then."]),
        ("hello. how are you? i am fine.", ["hello. ", "how are you? ", "i am fine."]),
        (
            "One.\n\u200b\nTwo.\n\x10\n\ufeff\u2060\nThree.",
            ["One.\n\u200b\n", "Two.\n\x10\n\ufeff\u2060\n", "Three."],
        ),
        ("\u200b\n\x10\nOne.", ["\u200b\n\x10\nOne."]),
        ("\u200b\n\x10", []),
    ],
)
def test_emoji_and_what_is_not_seen(text, sentences):
    assert [text[start:end] for start, end in sentence_spans(text)] == sentences


@pytest.mark.parametrize(
    ("language", "text", "found"),
    [
        ("de", "Der 2. Weltkrieg begann.", ["Der 2. ", "Weltkrieg begann."]),
        ("zh", "（他笑了。）结束了。", ["（他笑了。）结束了。"]),
        ("zh", "“再见。”他走了。", ["“再见。”他走了。"]),
        ("th", "ฉันไปตลาด เขากลับบ้าน", ["ฉันไปตลาด เขากลับบ้าน"]),
    ],
)
def test_limits_that_the_documentation_tells(language, text, found):
    assert [text[start:end] for start, end in sentence_spans(text, language)] == found


@pytest.mark.parametrize("text", ["\u200b", "\x10\x1b", "\ufeff\u2060\u200d", "\xad \u202e", "\ufe0f"])
def test_format_and_control_characters_are_not_seen(text):
    assert blank(text)
    assert not blank(text + ".")


def test_tokens_that_hold_some_characters():
    spans = [(0, 3), (3, 4), (4, 4), (4, 9)]
    for start in range(10):
        for end in range(start + 1, 11):
            held = [n for n, (a, b) in enumerate(spans) if {*range(a, b)} & {*range(start, end)}]
            assert [n for n in tokens_of(spans, start, end) if n != 2] == held
    assert tokens_of([], 0, 5).tolist() == []
