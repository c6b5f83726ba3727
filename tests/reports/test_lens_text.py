"""One text as a corpus: the same tokens, sentences and actions as if it had been in the run's own."""

import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probekit.errors import ProbekitError
from probekit.reports.lens_text import TextRun, cut_text, given_text, visible
from probekit.run.run import Run


@pytest.mark.parametrize(
    "text", ["Words.", "", " ", "a/b c", "see notes.txt now", "x" * 5000, "a\0b", "and so on..."]
)
def test_what_is_no_name_of_a_file_is_the_text(text: str):
    assert given_text(text) == text


def test_a_file_that_exists_is_read_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("some words").write_bytes("\ufeffÄ line.\r\nAnother.".encode())
    assert given_text("some words") == given_text(Path("some words")) == "Ä line.\r\nAnother."


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("missing.txt", r"^--text missing\.txt: does not exist"),
        ("no/such", "^--text no/such: does not exist"),
        (Path("nothing"), "^--text nothing: does not exist"),
        ("notes.md", "^--text notes.md: does not exist"),
        (".", r"^--text \.: cannot be read \(Is a directory\)$"),
        ("latin", r"^--text latin: is not UTF-8 \(byte 3\)"),
        ("lone \udcff surrogate", "^--text is not valid Unicode"),
    ],
)
def test_what_cannot_be_read(text: str | Path, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("latin").write_bytes("caf\xe9.".encode("latin-1"))
    with pytest.raises(ProbekitError, match=said):
        given_text(text)


def test_a_document_of_the_corpus_is_cut_as_the_corpus_was(probed_run: Run, document: int, text: str):
    corpus, cut = probed_run.corpus, cut_text(probed_run, text, "none")
    begin, end = corpus.document_tokens[document : document + 2]
    sentences = slice(*corpus.document_sentences[document : document + 2])
    np.testing.assert_array_equal(cut.corpus.tokens[:-1], corpus.tokens[begin:end])
    np.testing.assert_array_equal(cut.first_token, corpus.first_token[sentences] - begin - 1)
    np.testing.assert_array_equal(cut.embeddings, corpus.embeddings[sentences])
    assert cut.document == document
    np.testing.assert_array_equal(cut.actions, corpus.actions[sentences])
    assert cut.over
    # The sentence to come begins at the token behind the text.
    np.testing.assert_array_equal(cut.corpus.first_token, [*(cut.first_token + 1), end - begin])
    assert (cut.corpus.embeddings[-1] == 0).all()


def test_true_actions_are_those_of_the_corpus_only_of_its_own_documents(
    probed_run: Run, document: int, text: str
):
    """Planted actions, here all another than that of the nearest centre."""
    run = Run.open(probed_run.folder)
    corpus = run.corpus
    run.corpus = replace(corpus, actions=(corpus.actions + 1) % corpus.k)
    sentences = slice(*corpus.document_sentences[document : document + 2])
    np.testing.assert_array_equal(cut_text(run, text, "none").actions, run.corpus.actions[sentences])
    more = cut_text(run, f"{text} Mumi.", "none")
    assert more.document is None
    nearest = corpus.codebook.nearest(corpus.embeddings[sentences])
    np.testing.assert_array_equal(more.actions[: len(nearest)], nearest)
    # As many tokens as a document, but others.
    ids = corpus.tokens[slice(*corpus.document_tokens[document : document + 2])][1:]
    assert cut_text(run, corpus.tokenizer.decode(ids[::-1]), "none").document is None


def test_a_sentence_that_goes_on_keeps_the_token_behind_it(probed_run: Run):
    cut = cut_text(probed_run, "One is over. The other goes", "none")
    assert not cut.over
    assert len(cut.corpus.first_token) == len(cut.actions) == 2


def test_a_special_token_is_text(probed_run: Run):
    cut = cut_text(probed_run, "Some <|endoftext|> words.", "none")
    separators = np.flatnonzero(cut.corpus.tokens == probed_run.corpus.separator)
    np.testing.assert_array_equal(separators, [0, len(cut.corpus.tokens) - 1])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_pieces_are_the_text(probed_run: Run, text: str):
    if not text.strip() or not _encodes(text):
        return
    cut = cut_text(probed_run, text, "none")
    assert "".join(cut.pieces) == text
    assert len(cut.pieces) == len(cut.corpus.tokens) - 2
    assert cut.first_token[0] == 0


def _encodes(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def test_too_long_or_blank(probed_run: Run):
    with pytest.raises(ProbekitError, match=r"^--text is blank"):
        cut_text(probed_run, " \n\t", "none")
    tokens = len(cut_text(probed_run, "Some words.", "none").pieces)
    with pytest.raises(ProbekitError, match=rf"^--text has {tokens} tokens, more than --limit {tokens - 1};"):
        cut_text(probed_run, "Some words.", "none", limit=tokens - 1)


def test_the_run_of_a_text_shares_what_is_loaded(probed_run: Run):
    cut = cut_text(probed_run, "Some words.", "none")
    bridged = probed_run.bridged
    alone = TextRun(probed_run, cut)
    assert alone.corpus is cut.corpus
    assert alone.corpus_of("joint") is cut.corpus
    assert alone.bridged is bridged


@given(st.text())
def test_nothing_invisible_is_left(text: str):
    shown = visible(text)
    assert not {unicodedata.category(c) for c in shown if c not in "\u200c\u200d"} & {"Cc", "Cf", "Zl", "Zp"}
    assert shown.isprintable() or shown != text or not text.isprintable()


def test_visible_symbols():
    assert visible("a\tb\r\n\0\x85\u202e\u2028") == "a⇥b↩↵‹U+0000›‹U+0085›‹U+202E›↵"
    plain = "Straße, 12 € “naïve” 👩\u200d👧 नमस्ते"
    assert visible(plain) == plain
