"""The text of the lens: which one is meant, how it is cut, and what is known to be true of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probekit.config import Config
from probekit.data.readers import VISIBLE
from probekit.errors import ProbekitError
from probekit.probing.label_table import labels_digest
from probekit.probing.record import ProbeRecord
from probekit.reports.lens_text import Truth, cut_text, find_truth, given_text
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
    assert len(cut.corpus.first_token) == len(cut.first_token) + 1
    # The sentence to come begins at the token after the text.
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
    assert len(cut.corpus.first_token) == len(cut.actions) == 2


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_pieces_are_the_text(probed_run: Run, text: str):
    if not VISIBLE.search(text) or not _encodes(text):
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


POSITIONS = [2, 0, "first", "last", "mean"]


def truth(
    run: Run, text: str, extent: str = "sentences", positions: list = POSITIONS, **settings: object
) -> Truth:
    """What is known of a text, of probes of a target."""
    config: Config = run.config.override({f"probe.{name}": value for name, value in settings.items()})
    classes = {
        "token": run.corpus.tokenizer.convert_ids_to_tokens(range(len(run.corpus.tokenizer))),
        "sentence-position": range(16),
        "size": (),
    }.get(config.probe.target, range(8))
    origin = {"labels": labels_digest(config)}
    record = ProbeRecord(config, [], {}, origin, tuple(map(str, classes)), extent, None)
    cut = cut_text(run, text, "none")
    return find_truth(run, cut, record, positions, 1)


def test_sentences_are_read_before_and_in_themselves(probed_run: Run):
    cut = cut_text(probed_run, "One two three. Four five. Six", "none")
    found = truth(probed_run, "One two three. Four five. Six", target="sentence-position")
    first, tokens = cut.first_token.tolist(), np.arange(len(cut.pieces))
    own = np.searchsorted(first, tokens, side="right") - 1
    before, at, first_, last, mean = found.labels
    expected = [n + 1.0 if n + 1 < len(first) else np.nan for n in own]
    fitted = {begin - 2: number for number, begin in enumerate(first) if begin >= 2}
    expected = [fitted.get(t, label) for t, label in enumerate(expected)]
    np.testing.assert_array_equal(before, expected)
    for inside in (at, first_, last, mean):
        np.testing.assert_array_equal(inside, own)
    np.testing.assert_array_equal(np.flatnonzero(found.fitted[0]), sorted(fitted))
    np.testing.assert_array_equal(np.flatnonzero(found.fitted[1]), first)
    np.testing.assert_array_equal(
        np.flatnonzero(found.fitted[3]), [*(np.array(first[1:]) - 1), len(tokens) - 1]
    )
    assert not found.fitted[4].any()
    np.testing.assert_array_equal(found.of_sentences, np.arange(len(first)))
    assert found.words == "Sentences are numbered from 0."


def test_a_token_is_that_of_the_text(probed_run: Run):
    cut = cut_text(probed_run, "One two three. Four", "none")
    found = truth(probed_run, "One two three. Four", positions=[2, 0, -1], target="token", anchors="token")
    ids = [*cut.corpus.tokens[1:-1], np.nan, np.nan]
    for labels, ahead in zip(found.labels, (2, 0, -1), strict=True):
        expected = [ids[t + ahead] if t + ahead >= 0 else np.nan for t in range(len(cut.pieces))]
        np.testing.assert_array_equal(labels, expected)
    assert found.fitted[1].all()


@pytest.fixture
def sizes(probed_run: Run, tmp_path: Path) -> str:
    """A table of a number for each document, and one of a span."""
    count = len(probed_run.corpus.split)
    table = pd.DataFrame({"document": range(count), "size": np.arange(count) + 0.5})
    path = tmp_path / "sizes.csv"
    table.to_csv(path, index=False)
    return str(path)


def test_labels_of_a_table_are_known_of_its_own_documents(
    probed_run: Run, sizes: str, document: int, text: str
):
    found = truth(probed_run, text, "texts", target="size", labels=sizes)
    inside = found.labels[1:]
    assert (inside == document + 0.5).all()
    assert np.isnan(found.labels[0]).all()  # no text follows
    assert [np.flatnonzero(fits).tolist() for fits in found.fitted] == [
        [],
        [0],
        [0],
        [inside.shape[1] - 1],
        [],
    ]
    assert f"document {document:,} of the corpus" in found.words
    assert np.isnan(found.of_sentences).all()


def test_of_another_text_nothing_is_known(probed_run: Run, sizes: str, text: str):
    other = truth(probed_run, "Noni mumi.", "texts", target="size", labels=sizes)
    spans = truth(probed_run, "Noni mumi.", "spans", target="size", labels=sizes)
    for found in (other, spans):
        assert np.isnan(found.labels).all()
        assert "not of this text" in found.words
    # The probe of a text's last token was fitted at such a token all the same.
    assert other.fitted[3, -1]
    assert not spans.fitted.any()
