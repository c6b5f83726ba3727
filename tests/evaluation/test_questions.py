"""Questions against the documents that they come from, and files of questions against what was written."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probekit.config import Config
from probekit.data.build import write_corpus
from probekit.data.corpus import Corpus
from probekit.data.tokenizer import decoded
from probekit.errors import ProbekitError
from probekit.evaluation.multiple_choice import CHOICES, Question, corpus_questions, read_questions
from probekit.progress import Progress
from probekit.run.run import Run

WORDS = ["river", "stone", "bird", "cloud", "winter", "garden", "letter", "engine", "music", "window"]


WINDOW = 48


def article(number: int) -> str:
    """Headings, paragraphs without spaces before them, and sentences that come again."""
    rng = np.random.default_rng(number)

    def sentence() -> str:
        if rng.random() < 0.2:
            return "This comes again."
        return " ".join(rng.choice(WORDS, size=rng.integers(2, 15))).capitalize() + "."

    parts = [f"Article {number}"]
    for part in range(rng.integers(2, 6)):
        parts += [f"Part {part}", " ".join(sentence() for _ in range(rng.integers(1, 9)))]
    return "\n\n".join(parts) + "\n"


@pytest.fixture(scope="module")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("articles")
    lines = [json.dumps({"text": article(number)}) for number in range(40)]
    (folder / "documents.jsonl").write_text("\n".join(lines), "utf-8")
    config = Config().override(
        {"actions.k": 8, "actions.dimensions": 8, "lm.vocabulary": 300}
        | {"corpus.reader": "jsonl", "corpus.path": str(folder)}
    )
    return write_corpus(config, folder / "corpus", Progress(quiet=True))


@pytest.fixture(scope="module", params=["planted", "articles"])
def corpus(request: pytest.FixtureRequest, tiny_run: Run) -> Corpus:
    return tiny_run.corpus if request.param == "planted" else request.getfixturevalue("articles")


def tokens_of(corpus: Corpus, document: int) -> np.ndarray:
    return np.array(corpus.tokens[slice(*corpus.document_tokens[document : document + 2])], dtype=np.int64)


def places(corpus: Corpus, document: int) -> list[tuple[int, int]]:
    """Where each sentence of a document begins and ends, counted from its separator."""
    start, end = corpus.document_tokens[document : document + 2]
    first = corpus.first_token[corpus.sentences(np.array([document]))]
    return list(zip(first - start, [*first[1:] - start, end - start], strict=True))


def same(first: list[Question], second: list[Question]) -> bool:
    """Whether questions are the same in all."""
    flat = [
        [(q.document, q.answer, q.context.tolist(), [c.tolist() for c in q.choices]) for q in questions]
        for questions in (first, second)
    ]
    return flat[0] == flat[1]


# Questions of a corpus


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 80), window=st.integers(16, 64), seed=st.integers(0, 10**6))
def test_choices_are_the_true_sentence_and_others_that_were_not_read(
    corpus: Corpus, count: int, window: int, seed: int
):
    documents = corpus.documents("train")
    try:
        questions = corpus_questions(corpus, documents, count, window, seed)
    except ProbekitError:
        assert window < 40
        return
    assert len(questions) <= count
    for question in questions:
        tokens, own = tokens_of(corpus, question.document), places(corpus, question.document)
        cut = len(question.context)
        assert question.document in documents
        assert question.context.tolist() == tokens[:cut].tolist()
        assert cut > 1
        (true,) = [(a, b) for a, b in own if a == cut]
        assert question.choices[question.answer].tolist() == tokens[slice(*true)].tolist()
        kept = window + 1 - question.longest
        read = {decoded(corpus.tokenizer, tokens[a:b]).strip() for a, b in own if cut - kept < b <= cut}
        assert len(question.choices) == CHOICES
        assert question.longest <= window // 2
        texts = [decoded(corpus.tokenizer, choice) for choice in question.choices]
        assert len({text.strip() for text in texts}) == len({tuple(c) for c in question.choices}) == CHOICES
        assert len({re.sub(r"\S(.*\S)?", "|", text, flags=re.DOTALL) for text in texts}) == 1
        assert not read & {text.strip() for text in texts}
        for choice in question.choices:
            found = [(a, b) for a, b in own if tokens[a:b].tolist() == choice.tolist()]
            assert any(a >= cut or b <= cut - kept for a, b in found)


def test_wrong_choices_stand_behind_where_enough_do(articles: Corpus):
    wide = corpus_questions(articles, articles.documents("train"), 200, 10_000, 0)
    narrow = corpus_questions(articles, articles.documents("train"), 200, WINDOW, 0)

    def begins(question: Question) -> list[bool]:
        """Whether each wrong choice begins after the true one."""
        tokens, own = tokens_of(articles, question.document), places(articles, question.document)
        last = {tuple(tokens[a:b]): a for a, b in own}
        wrong = [c for i, c in enumerate(question.choices) if i != question.answer]
        return [last[tuple(choice)] > len(question.context) for choice in wrong]

    # What stands before has been read where the window holds all of it.
    assert all(all(begins(question)) for question in wide)
    assert any(not all(begins(question)) for question in narrow)
    for question in narrow:
        if not all(begins(question)):
            alone = [q for q in wide if np.array_equal(q.context, question.context)]
            assert not alone


def test_white_space_does_not_tell_the_truth(articles: Corpus):
    """Headings stand between line breaks, sentences between spaces; both are asked for, never together."""
    questions = corpus_questions(articles, articles.documents("train"), 300, WINDOW, 0)
    ends = Counter()
    for question in questions:
        breaks = {decoded(articles.tokenizer, choice).endswith("\n") for choice in question.choices}
        before = decoded(articles.tokenizer, question.context).endswith("\n")
        assert len(breaks) == 1
        ends[before, breaks.pop()] += 1
    assert ends[False, False] > 20
    assert len(ends) > 1


def test_answers_stand_anywhere(corpus: Corpus):
    questions = corpus_questions(corpus, corpus.documents("train"), 400, WINDOW, 0)
    found = np.bincount([question.answer for question in questions], minlength=CHOICES)
    expected = len(questions) / CHOICES
    assert ((found - expected) ** 2 / expected).sum() < 21.1  # chi-square, 3 degrees: once in ten thousand


def test_documents_are_asked_in_turn(corpus: Corpus):
    documents = corpus.documents("train")
    every = corpus_questions(corpus, documents, 10**6, WINDOW, 3)
    most = Counter(question.document for question in every)
    assert len({(q.document, len(q.context)) for q in every}) == len(every)
    for count in (1, len(most) - 1, len(most), 2 * len(most)):
        some = Counter(q.document for q in corpus_questions(corpus, documents, count, WINDOW, 3))
        turns = max(some.values())
        assert some.total() == min(count, len(every))
        assert all(some[document] >= min(turns - 1, most[document]) for document in most)


def test_the_same_arguments_give_the_same_questions(corpus: Corpus):
    documents = corpus.documents("train")
    first = corpus_questions(corpus, documents, 60, WINDOW, 5)
    assert same(first, corpus_questions(corpus, documents, 60, WINDOW, 5))
    assert same(first[:17], corpus_questions(corpus, documents, 17, WINDOW, 5))
    assert not same(first, corpus_questions(corpus, documents, 60, WINDOW, 6))


def test_no_question_is_an_error(corpus: Corpus):
    with pytest.raises(ProbekitError, match="none of 2 documents has a sentence that could be asked") as said:
        corpus_questions(corpus, corpus.documents("train")[:2], 5, 4, 0)
    assert "outside the 4 tokens" in str(said.value)
    assert "at most 2 tokens" in str(said.value)
    assert "\n" not in str(said.value)


# Questions of a file


SKY = {"question": "Bolura at night?", "choices": ["Red.", "Black, mostly.", " Green"]}


def written(folder: Path, *rows: object) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return path


def test_a_line_is_a_question(tiny_run: Run, tmp_path: Path):
    corpus = tiny_run.corpus
    (question,) = read_questions(written(tmp_path, SKY | {"answer": 1, "id": "x7"}), corpus)
    assert question.answer == 1
    assert question.document == 1
    assert question.context[0] == corpus.separator
    assert decoded(corpus.tokenizer, question.context[1:]) == "Bolura at night?"
    texts = [decoded(corpus.tokenizer, choice) for choice in question.choices]
    assert texts == [" Red.", " Black, mostly.", " Green"]
    for choice, text in zip(question.choices, texts, strict=True):
        whole = corpus.tokenizer(f"Bolura at night?{text}", add_special_tokens=False).input_ids
        assert [*question.context[1:], *choice] == whole


def test_white_space_behind_a_question_is_read_with_the_choice(tiny_run: Run, tmp_path: Path):
    """A space is part of the token that begins with it."""
    corpus = tiny_run.corpus
    row = SKY | {"answer": 0}
    spaced = [row | {"question": "Bolura at night?" + space} for space in (" ", "\n")]
    (plain, behind, line) = read_questions(written(tmp_path, row, *spaced), corpus)
    assert behind.choices[0].tolist() == plain.choices[0].tolist()
    assert decoded(corpus.tokenizer, line.choices[0]) == "\nRed."
    assert all(q.context.tolist() == plain.context.tolist() for q in (behind, line))


def test_lines_are_numbered_and_blank_ones_passed_over(tiny_run: Run, tmp_path: Path):
    odd = {"question": "A\u2028B <|endoftext|>", "choices": ["x", "y"], "answer": 0}
    rows = ["\ufeff" + json.dumps(SKY | {"answer": 2}), "", "  \r", json.dumps(odd, ensure_ascii=False)]
    first, second = read_questions(written(tmp_path, *rows), tiny_run.corpus)
    assert (first.document, second.document) == (1, 4)
    assert decoded(tiny_run.corpus.tokenizer, second.context[1:]) == odd["question"]
    assert (second.context == tiny_run.corpus.separator).sum() == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"question": ', "is no JSON object with question, choices and answer: "),
        ("[" * 100_000, "is no JSON object"),
        (SKY, "is no JSON object with question, choices and answer"),
        (SKY | {"answer": 0, "question": " "}, "question is ' '; give a text that is not blank"),
        (SKY | {"answer": 0, "question": "\ud800"}, r"question is '\\ud800'; give a text"),
        (
            SKY | {"answer": 0, "choices": ["x", 2]},
            r"choices is \['x', 2\]; give a list of two texts or more",
        ),
        (SKY | {"answer": 0, "choices": ["x", "y", " x"]}, "choice ' x' has the same tokens as another"),
        (SKY | {"answer": 3}, "answer is 3; give the number of a choice, from 0 to 2"),
        (SKY | {"answer": True}, "answer is True"),
    ],
)
def test_a_bad_line_is_named(row: object, said: str, tiny_run: Run, tmp_path: Path):
    path = written(tmp_path, SKY | {"answer": 0}, "", row)
    named = f"^evaluation.questions_file {re.escape(str(path))}, line 3: {said}"
    with pytest.raises(ProbekitError, match=named) as raised:
        read_questions(path, tiny_run.corpus)
    assert str(raised.value).isascii()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read as UTF-8 text"),
        (b"", "holds no question; give one a line, as JSON"),
        (b" \n\n", "holds no question"),
        (b'{"question"\xff', "cannot be read as UTF-8 text"),
    ],
)
def test_a_bad_file_is_named(content: bytes | None, said: str, tiny_run: Run, tmp_path: Path):
    path = tmp_path / "questions.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ProbekitError, match=re.escape(f"evaluation.questions_file {path}: {said}")):
        read_questions(path, tiny_run.corpus)
