"""True texts in place of generated ones: what is drawn, what it scores, and what is too short."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest

from probekit.errors import ProbekitError
from probekit.generation.evaluate import TrueTexts, beginnings
from probekit.run.run import Run

SETTINGS = {
    "generation.prompts": 12,
    "generation.context": 24,
    "generation.lengths": [10, 40],
    "generation.samples": 9,
}


@pytest.fixture(scope="module")
def run(tiny_run: Run) -> Run:
    return tiny_run.with_settings(SETTINGS)


@pytest.fixture(scope="module")
def true(run: Run) -> TrueTexts:
    return TrueTexts.of(run)


def means(values: pd.DataFrame, length: int = 40) -> pd.Series:
    sums = values[values.length == length].groupby("metric")[["sum", "count"]].sum()
    return sums["sum"] / sums["count"]


def test_prompts_are_beginnings_of_test_documents_and_continuations_go_on(run: Run, true: TrueTexts):
    corpus = run.corpus
    documents = [prompt.document for prompt in true.prompts]
    assert len({*documents}) == len(documents) == 12
    assert {*documents} <= {*corpus.documents("test")}
    assert documents != sorted(documents)
    for prompt, tokens in zip(true.prompts, true.tokens, strict=True):
        begin = corpus.document_tokens[prompt.document]
        whole = corpus.tokens[begin : begin + len(prompt.tokens) + 40]
        assert np.concatenate([prompt.tokens, tokens]).tolist() == whole.tolist()
        assert len(prompt.tokens) > 24


@pytest.mark.parametrize("split", ["test", "probe"])
def test_beginnings(run: Run, split: str):
    corpus, (documents, found) = run.corpus, beginnings(run, split)
    assert len(found) == len({*documents}) == 9
    assert {*documents} <= {*corpus.documents(split)}
    for document, tokens in zip(documents, found, strict=True):
        start = corpus.document_tokens[document] + 1
        assert tokens.tolist() == corpus.tokens[start : start + 40].tolist()


def test_all_runs_on_a_corpus_have_the_same_documents(run: Run, true: TrueTexts):
    """Whatever their own seed; the corpus's decides."""
    other = TrueTexts.of(run.with_settings({"seed": 1}))
    assert [p.document for p in other.prompts] == [p.document for p in true.prompts]
    assert other.sampled.tolist() == true.sampled.tolist()
    assert other.sampled.tolist() != sorted(other.sampled)
    other = TrueTexts.of(run.with_settings({"corpus.seed": 1}))
    assert [p.document for p in other.prompts] != [p.document for p in true.prompts]


def test_true_samples_have_their_documents(true: TrueTexts):
    values = dict(true.references())["true"]
    samples = values[values.texts == "samples"]
    assert samples.document.tolist() == true.sampled.tolist()
    assert samples["count"].tolist() == [len(a) for a in true.labeller.cut(true.samples, [40])[40].actions]


def test_true_text_is_perfect_and_labelled_as_planted_but_for_the_labeller(run: Run, true: TrueTexts):
    plans = [prompt.plan for prompt in true.prompts]
    found = means(true.continuation_values(true.tokens, plans))
    assert found["rouge2"] == 1.0
    assert found["levenshtein"] == found["levenshtein_normalised"] == 0.0
    agreement = [
        (actions == plan[: len(actions)]) for actions, plan in zip(true.cuts[40].actions, plans, strict=True)
    ]
    assert found["plan_following"] == pytest.approx(np.concatenate(agreement).mean())
    assert found["plan_following"] > 0.9
    assert found["plan_following_by_chance"] < 0.3


def test_nothing_in_place_of_text_is_as_far_as_can_be_and_never_nan(true: TrueTexts):
    nothing = [tokens[:0] for tokens in true.tokens]
    values = true.continuation_values(nothing, [np.zeros(0, np.int64) for _ in nothing])
    assert values["empty"].all()
    assert not values.isna().any(axis=None)
    found = means(values)
    assert found["rouge2"] == 0.0
    assert found["levenshtein"] == np.mean([len(actions) for actions in true.cuts[40].actions])
    assert found["levenshtein_normalised"] == 1.0
    samples = true.sample_values(nothing)
    assert samples["empty"].all()
    assert (samples["count"] == 0).all()
    assert set(values.metric) == {"rouge2", "levenshtein", "levenshtein_normalised", "latent_perplexity"}


def shuffled(true: TrueTexts, run: Run) -> list[np.ndarray]:
    """True continuations with their whole sentences in another order."""
    corpus, generator, texts = run.corpus, np.random.default_rng(0), []
    for prompt, tokens in zip(true.prompts, true.tokens, strict=True):
        begin = corpus.document_tokens[prompt.document] + len(prompt.tokens)
        first = corpus.first_token[corpus.sentences(np.array([prompt.document]))] - begin
        cuts = [*first[(first >= 0) & (first < len(tokens))], len(tokens)]
        parts = [tokens[a:b] for a, b in itertools.pairwise(cuts)]
        order = generator.permutation(len(parts) - 1)
        texts.append(np.concatenate([*(parts[i] for i in order), parts[-1]]))
    return texts


def test_sentences_in_another_order_are_worse(run: Run, true: TrueTexts):
    right, wrong = (means(true.continuation_values(t)) for t in (true.tokens, shuffled(true, run)))
    assert wrong["levenshtein_normalised"] > 0.3
    assert wrong["latent_perplexity"] > right["latent_perplexity"] + 0.3
    assert 0.3 < wrong["rouge2"] < 1.0


def test_references(true: TrueTexts):
    found = dict(true.references())
    own, other = found["true"], found["other document"]
    assert {*own.metric} == {"latent_perplexity", "plan_following", "plan_following_by_chance"}
    assert {*own.texts} == {"continuations", "samples"}
    assert {*other.metric} == {"rouge2", "levenshtein", "levenshtein_normalised"}
    assert means(other)["levenshtein_normalised"] > 0.5
    assert means(other)["rouge2"] < 0.3


def test_a_metric_is_by_document_and_length(true: TrueTexts):
    values = true.continuation_values(true.tokens)
    documents = [prompt.document for prompt in true.prompts]
    for _, own in values.groupby(["metric", "length"]):
        assert own.document.tolist() == documents
    short = values[(values.metric == "latent_perplexity") & (values.length == 10)]
    assert short["count"].tolist() == [len(actions) for actions in true.cuts[10].actions]


@pytest.mark.parametrize(("context", "length"), [(24, 4000), (4000, 10)])
def test_too_few_long_documents_are_refused_in_one_line(tiny_run: Run, context: int, length: int):
    run = tiny_run.with_settings({"generation.context": context, "generation.lengths": [8, length]})
    sizes = np.diff(run.corpus.document_tokens)[run.corpus.documents("test")] - 1
    message = (
        f"0 of the 16 test documents go on for {length:,} tokens behind the first end of a sentence after "
        f"{context:,} (the longest has {sizes.max():,}), and it takes two; lower generation.lengths or "
        "generation.context"
    )
    with pytest.raises(ProbekitError, match=re.escape(message)):
        TrueTexts.of(run)
