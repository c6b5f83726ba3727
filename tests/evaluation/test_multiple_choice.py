"""Losses of choices against the plain model and the corpus's own windows, one choice at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_trainings import with_strong_adapters
from torch import Tensor
from torch.nn.functional import cross_entropy

from probekit.config import BosRule
from probekit.data.windows import Batch, Windows, collate
from probekit.errors import ProbekitError
from probekit.evaluation.multiple_choice import Question, by_document, choice_losses, corpus_questions, solved
from probekit.evaluation.perplexity import own_losses
from probekit.models.mixing import VARIANTS, Mixing
from probekit.models.planned_lm import token_losses
from probekit.progress import Progress
from probekit.run.run import Run

WINDOW = 36


CONDITIONED = ["fixed", "oracle", "soft", "joint"]


@pytest.fixture(scope="module")
def run(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Contexts must be cut."""
    return with_strong_adapters(tiny_run, tmp_path_factory.mktemp("strong"), 300).with_settings(
        {"training.window": WINDOW, "evaluation.batch_size": 7, "mixing.temperature": 0.1}
    )


@pytest.fixture(scope="module")
def questions(run: Run) -> list[Question]:
    """Some with short contexts, some with contexts longer than what is read."""
    found = corpus_questions(run.corpus, run.corpus.documents("test"), 25, WINDOW, 0)
    lengths = [len(question.context) for question in found]
    assert min(lengths) < WINDOW - 20
    assert max(lengths) > WINDOW + 20
    assert len({question.longest for question in found}) > 3
    return found


def losses_of(run: Run, variant: str, questions: Sequence[Question]) -> np.ndarray:
    with Progress(quiet=True).task("choose") as task:
        return choice_losses(run, variant, questions, own_losses(run.model(variant)), task)


def read_of(question: Question, bos: BosRule = "document") -> np.ndarray:
    """What is read of a context: what leaves room for the longest choice, whose last token is not."""
    context = question.context[1:] if bos == "none" else question.context
    read = context[-(WINDOW - question.longest + 1) :].copy()
    if bos == "every-window":
        read[0] = question.context[0]
    return read


@pytest.mark.parametrize("bos", get_args(BosRule))
@torch.no_grad()
def test_losses_equal_the_plain_models(
    bos: BosRule, run: Run, questions: list[Question], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(run.corpus.facts, "bos", bos)
    plain = run.plain_model().eval()
    found = losses_of(run, "none", questions)
    assert found.shape == (1, len(questions), 4)
    for number, question in enumerate(questions):
        context = read_of(question, bos)
        for choice, ids in enumerate(question.choices):
            inputs = torch.tensor([*context, *ids])
            assert len(inputs) <= WINDOW + 1
            logits = plain(inputs[None, :-1]).logits[0, len(context) - 1 :]
            expected = cross_entropy(logits, torch.tensor(ids)).item()
            assert found[0, number, choice] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("variant", CONDITIONED)
@torch.no_grad()
def test_losses_equal_the_conditioned_models_over_windows_of_the_corpus(
    variant: str, run: Run, questions: list[Question]
):
    """Of the wrong choices, too: they carry what the true one does, as nobody knows which it is."""
    corpus, model, mixing = run.corpus, run.model(variant), VARIANTS[variant].evaluation
    found = losses_of(run, variant, questions)[0]
    for number, question in enumerate(questions):
        read = len(read_of(question))
        cut = int(corpus.document_tokens[question.document]) + len(question.context)
        for choice, ids in enumerate(question.choices):
            length = read + len(ids) - 1
            if choice == question.answer:
                batch = collate(corpus, one(question.document, cut - read, length, len(ids)))
            else:
                known = collate(corpus, one(question.document, cut - read, read, 1))
                more = known.sentence[:, -1:].expand(-1, len(ids) - 1)
                behind = torch.tensor(ids)[None]
                batch = replace(
                    known,
                    tokens=torch.cat([known.tokens, behind[:, :-1]], dim=1),
                    targets=torch.cat([torch.full((1, read - 1), -100), behind], dim=1),
                    sentence=torch.cat([known.sentence, more], dim=1),
                )
            expected = token_losses(model(batch, mixing), batch.targets).sum() / len(ids)
            assert found[number, choice] == pytest.approx(expected.item(), rel=1e-4)
    alone = losses_of(run, "none", questions)[0]
    assert np.abs(found / alone - 1).mean() > 0.03


def one(document: int, start: int, length: int, scored: int) -> Windows:
    return Windows(*(np.array([value]) for value in (document, start, length, scored)))


@pytest.mark.parametrize("variant", ["none", "soft"])
@pytest.mark.parametrize("size", [1, 1000])
def test_losses_do_not_depend_on_the_batch(size: int, variant: str, run: Run, questions: list[Question]):
    other = run.with_settings({"evaluation.batch_size": size})
    expected = losses_of(run, variant, questions)
    np.testing.assert_allclose(losses_of(other, variant, questions), expected, rtol=1e-4)
    turned = losses_of(run, variant, questions[::-1])[:, ::-1]
    np.testing.assert_allclose(turned, expected, rtol=1e-4)


def test_every_reader_has_its_losses(run: Run, questions: list[Question]):
    models = [run.model("none"), run.model("soft")]

    def both(batch: Batch, mixing: Mixing) -> Tensor:
        return torch.cat([own_losses(model)(batch, mixing) for model in models])

    with Progress(quiet=True).task("choose") as task:
        found = choice_losses(run, "soft", questions, both, task)
    expected = [losses_of(run, variant, questions)[0] for variant in ("none", "soft")]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_nothing_but_the_separator_may_be_read(run: Run, questions: list[Question]):
    ids = [np.array([5, 6, 7]), np.arange(WINDOW), np.array([9])]
    longest = Question(questions[0].context, tuple(ids), 0, 1)
    bare = Question(np.array([run.corpus.separator]), (ids[0], ids[2]), 0, 2)
    found = losses_of(run, "soft", [longest, bare])
    assert np.isfinite(found[0, 0]).all()
    assert found[0, 1, 2] == np.inf
    alone = replace(longest, context=longest.context[-1:])
    assert losses_of(run, "none", [alone]) == pytest.approx(losses_of(run, "none", [longest]), rel=1e-5)


def test_a_choice_that_leaves_nothing_to_read_is_refused(run: Run, questions: list[Question]):
    long = replace(questions[0], choices=(np.arange(WINDOW + 1), np.array([3])), document=77)
    said = "document or line 77 has a choice of 37 tokens, but the LM reads 36 at once; .* 36 at most"
    with pytest.raises(ProbekitError, match=said):
        losses_of(run, "none", [questions[0], long])


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), min_size=2, max_size=4), st.integers(0, 3), st.integers(0, 5)),
        min_size=1,
        max_size=12,
    )
)
def test_the_lowest_loss_solves(rows: list[tuple[list[int], int, int]]):
    nothing = np.array([0])
    questions = [
        Question(nothing, (nothing,) * len(losses), answer % len(losses), document)
        for losses, answer, document in rows
    ]
    table = np.full((2, len(rows), 4), np.inf)
    for i, (losses, _, _) in enumerate(rows):
        table[0, i, : len(losses)] = losses
        table[1, i, : len(losses)] = losses[::-1]
    found = solved(table, questions)
    for i, (losses, _, _) in enumerate(rows):
        for reader, own in enumerate((losses, losses[::-1])):
            best = [choice for choice, loss in enumerate(own) if loss == min(own)]
            assert found[reader, i] == (best == [questions[i].answer])
    sums, counts = by_document(found, questions)
    documents = sorted({document for *_, document in rows})
    for row, document in enumerate(documents):
        own = [i for i, question in enumerate(questions) if question.document == document]
        assert counts[row] == len(own)
        assert sums[row].tolist() == found[:, own].sum(axis=1).tolist()
