"""Examples in the prompt: posteriors against sums over all hidden paths, losses against the LM itself."""

import itertools
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch

from probekit.config import Config, PlantedSettings
from probekit.errors import ProbekitError
from probekit.evaluation.baselines import SkipNgram, contexts
from probekit.io import read_table
from probekit.planted.corpus import PlantedModel, generate
from probekit.planted.posteriors import log_joint_by_type
from probekit.probing.in_context import (
    ACTION,
    EXACT,
    KNOWN,
    LM,
    NGRAM,
    PROBE,
    TOLD,
    TYPE,
    WORDS,
    Example,
    InContext,
    Queries,
    conditions,
    in_context,
    in_context_table,
    nats_of_lengths,
    of_another_type,
    of_any_order,
    predictions,
    type_posterior,
)
from probekit.run.run import Run
from probekit.training.train import train

SMALL = PlantedSettings(
    documents=12, types=3, actions=2, successors=2, sentences=(2, 2), words=(1, 2), examples=4,
    vocabulary=3, concentration=1.0,
)  # fmt: skip


def queries_of(planted: PlantedSettings) -> Queries:
    corpus = generate(planted)
    model, size = corpus.model, planted.sentences[0]
    drawn = list(corpus.documents())
    read = [model.parse(document.text) for document in drawn]
    examples = [[words[at : at + size] for at in range(0, len(words), size)] for words in read]
    last = np.array([document.actions[-1] for document in drawn])
    return Queries(model, np.arange(len(drawn)), examples, corpus.types, last)


def probability(model: PlantedModel, z: int, example: Example, last: int | None = None) -> float:
    """P(words of an example | type), by a sum over paths; with `last`, and with its last action."""
    total = 0.0
    for path in itertools.product(range(len(model.emission)), repeat=len(example)):
        if last in (None, path[-1]):
            p = model.initial[z, path[0]]
            p *= np.prod([model.transition[z, *pair] for pair in itertools.pairwise(path)])
            p *= np.prod([model.emission[a, words].prod() for a, words in zip(path, example, strict=True)])
            total += p
    return total


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_exact_posterior_equals_enumeration(count: int):
    test = queries_of(SMALL)
    model, given = test.model, [examples[:count] for examples in test.before]
    found = predictions(log_joint_by_type(model, test.query), type_posterior(model, given))
    for d, (examples, query) in enumerate(zip(given, test.query, strict=True)):
        before = model.prior * [np.prod([probability(model, z, e) for e in examples]) for z in range(3)]
        words = before @ [probability(model, z, query) for z in range(3)] / before.sum()
        # Up to the last sentence, whose words are none yet.
        cut = [query[0], np.array([], dtype=int)]
        joint = np.array([[before[z] * probability(model, z, cut, a) for a in range(2)] for z in range(3)])
        np.testing.assert_allclose(found[0][d], -np.log(words), rtol=1e-9)
        np.testing.assert_allclose(np.exp(found[1][d]), joint.sum(1) / joint.sum(), rtol=1e-9)
        np.testing.assert_allclose(np.exp(found[2][d]), joint.sum(0) / joint.sum(), rtol=1e-9)


def test_probabilities_of_all_queries_add_up_to_one():
    """The loss is one of whole lines: of words, and of where sentences end."""
    model = PlantedModel.draw(SMALL)
    sentences = [np.array(s) for n in (1, 2) for s in itertools.product(range(3), repeat=n)]
    every = [list(pair) for pair in itertools.product(sentences, repeat=2)]
    given = [queries_of(SMALL).before[0][:2]] * len(every)
    loss, _, _ = predictions(log_joint_by_type(model, every), type_posterior(model, given))
    assert np.exp(-loss - nats_of_lengths(SMALL)).sum() == pytest.approx(1.0)


def test_who_is_told_goes_through_every_order():
    test = queries_of(SMALL)
    model, given = test.model, [examples[:2] for examples in test.before]
    found = of_any_order(test, given)
    assert found is not None
    for d, examples in enumerate(given):
        weight = model.prior * [
            np.prod([probability(model, z, e) + probability(model, z, e[::-1]) for e in examples])
            for z in range(3)
        ]
        np.testing.assert_allclose(np.exp(found[d]), weight / weight.sum(), rtol=1e-9)
    long = SMALL.model_copy(update={"sentences": (7, 7)})
    assert of_any_order(queries_of(long), given) is None


def test_who_is_told_of_another_type_takes_every_donor_for_as_likely():
    test = queries_of(SMALL.model_copy(update={"documents": 40}))
    model, given = test.model, conditions(test, seed=0)["another type"]
    found = of_another_type(test, given)
    for d, examples in enumerate(given):
        evidence = [np.prod([probability(model, z, e) for e in examples]) for z in range(3)]
        weight = np.zeros(3)
        for own in range(3):
            others = test.types[test.types != own]
            weight[own] = model.prior[own] * np.mean([evidence[other] for other in others])
        np.testing.assert_allclose(np.exp(found[d]), weight / weight.sum(), rtol=1e-9)


def test_conditions_change_what_they_say():
    test = queries_of(SMALL.model_copy(update={"documents": 60, "sentences": (4, 4)}))
    given = conditions(test, seed=1)
    assert given["same type"] == test.before
    moved = 0
    for d, own in enumerate(test.before):
        for one, other in zip(own, given["other order"][d], strict=True):
            assert sorted(map(tuple, one)) == sorted(map(tuple, other))
            moved += [*map(tuple, one)] != [*map(tuple, other)]
        first = given["another type"][d][0]
        (donor,) = (e for e, before in enumerate(test.before) if before[0] is first)
        assert test.types[donor] != test.types[d]
    assert moved > 100
    again = conditions(test, seed=1)
    assert all(test.prompts(given[name], 3) == test.prompts(again[name], 3) for name in given)


def test_one_type_alone_is_refused():
    with pytest.raises(ProbekitError, match="all of one type"):
        conditions(queries_of(SMALL.model_copy(update={"types": 1})), seed=0)


@pytest.fixture(scope="module")
def run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny LM on documents of three examples."""
    changes = {
        "corpus.planted.documents": 200,
        "corpus.planted.examples": 3,
        "corpus.planted.sentences": (2, 2),
        "corpus.planted.words": (1, 3),
        "corpus.planted.vocabulary": 20,
        "corpus.planted.concentration": 0.3,
        "mixing.variants": ["fixed"],
    }
    config = tiny_config.override(changes)
    return train(config, tmp_path_factory.mktemp("in_context") / "run", quiet=True)


@pytest.fixture(scope="module")
def found(run: Run) -> InContext:
    settings = {"probe.l2": [0.1], "evaluation.resamples": 200}
    return in_context(run, settings, quiet=True)


def values_of(found: InContext, **key: object) -> pd.DataFrame:
    rows = found.values
    for name, value in key.items():
        rows = rows[rows[name] == value]
    return rows.set_index("document")


def test_losses_are_those_of_the_lm_after_the_prompt(run: Run, found: InContext):
    model, corpus = run.plain_model(), run.corpus
    test = Queries.of(run, PlantedModel.draw(run.config.corpus.planted), "test")
    for condition, count in (("same type", 0), ("same type", 2), ("other order", 2), ("another type", 1)):
        given = conditions(test, run.config.corpus.seed)[condition]
        own = values_of(found, measure=WORDS, condition=condition, examples=count, reader=LM)
        for d in (0, 7):
            lines = [" ".join(map(test.model.spell, example)) for example in given[d][:count]]
            query = " ".join(map(test.model.spell, test.query[d]))
            ids = corpus.tokenizer("\n".join([*lines, query])).input_ids
            size = len(corpus.tokenizer(query).input_ids)
            tokens = torch.tensor([[corpus.separator, *ids]])
            logits = model(tokens).logits.detach()[0, -size - 1 : -1].log_softmax(-1)
            expected = -logits[torch.arange(size), tokens[0, -size:]].sum()
            row = own.loc[test.documents[d]]
            assert row["sum"] == pytest.approx(float(expected), rel=1e-4)
            assert row["count"] == len(query.split())


def test_the_ngram_is_that_of_the_documents(run: Run, found: InContext):
    """After all examples of its own document, a query stands where the corpus has it."""
    corpus = run.corpus
    read = {}
    for split in ("train", "validation", "test"):
        inside = np.isin(np.arange(len(corpus.tokens)), corpus.document_tokens[:-1], invert=True)
        document = np.searchsorted(corpus.document_tokens, np.arange(len(corpus.tokens)), side="right") - 1
        targets = np.flatnonzero(inside & np.isin(document, corpus.documents(split)))
        read[split] = contexts(corpus, targets - 1, 6), corpus.tokens[targets].astype(int), targets
    ngram = SkipNgram.fit(*read["train"][:2], len(corpus.tokenizer), read["validation"][:2])
    own = values_of(found, measure=WORDS, condition="same type", examples=2, reader=NGRAM)
    context, label, targets = read["test"]
    losses = -ngram.log_probabilities(context)[np.arange(len(label)), label]
    for document in corpus.documents("test")[:5]:
        first = corpus.first_token[corpus.document_sentences[document + 1] - 2]
        there = (targets >= first) & (targets < corpus.document_tokens[document + 1])
        assert own.loc[document, "sum"] == pytest.approx(losses[there].sum())


def test_every_reader_has_its_rows_and_none_is_too_good(run: Run, found: InContext):
    table = found.table
    size = table.groupby(["measure", "condition", "examples"]).reader.nunique()
    assert set(size[WORDS, "same type"]) == {5}
    assert set(size[WORDS, "another type"]) == {4}
    assert set(size[TYPE]) == {4}
    assert set(size[ACTION]) == {5}
    assert set(table.examples) == {0, 1, 2}
    assert (table.documents == len(run.corpus.documents("test"))).all()
    assert not table[table.reader == LM].too_good.any()
    assert not table[table.reader == KNOWN].too_good.any()
    assert (table[table.reader == TOLD].behind_told == 0).all()
    same = table[(table.condition == "same type") & (table.reader == EXACT)]
    exact = same.pivot_table(index="examples", columns="measure", values="value")
    assert exact[TYPE].is_monotonic_increasing
    assert exact[WORDS][2] < exact[WORDS][0]
    without = table[table.examples == 0].groupby(["measure", "reader"]).value
    np.testing.assert_allclose(without.max(), without.min(), atol=1e-6)  # nothing to shuffle, no examples
    pd.testing.assert_frame_equal(read_table(run.folder / "in_context" / "results.parquet"), table)


def test_differences_are_signed_by_what_is_better():
    rng = np.random.default_rng(0)
    key = {"condition": "same type", "count": 2, "document": np.arange(50)}
    readers = {EXACT: 1.0, TOLD: 0.9, PROBE: 1.5, KNOWN: 0.5}
    noise = rng.normal(0, 0.01, 50)
    values = pd.concat(
        [
            pd.DataFrame(key | {"measure": measure, "reader": reader, "examples": count, "sum": sums})
            for measure in (WORDS, TYPE)
            for reader, value in readers.items()
            for count, sums in ((0, 4.0), (1, 2 * value + noise))
        ]
    )
    table = in_context_table(values, resamples=100, seed=0)
    table = table[table.examples == 1].set_index(["measure", "reader"])
    for sign, measure in ((1, WORDS), (-1, TYPE)):
        for reader, value in readers.items():
            row = table.loc[(measure, reader)]
            assert row.value == pytest.approx(value + noise.mean() / 2)
            assert row.gain == pytest.approx(sign * (2.0 - row.value))
            assert row.behind_exact == pytest.approx(sign * (value - 1.0), abs=1e-9)
            assert row.behind_told == pytest.approx(sign * (value - 0.9), abs=1e-9)
            assert row.too_good == (row.behind_told_high < 0 and reader != KNOWN)
    assert table.too_good[TYPE, PROBE]
    assert not table.too_good[WORDS, PROBE]


def test_runs_without_examples_and_wrong_numbers_are_refused(tiny_run: Run, run: Run):
    with pytest.raises(ProbekitError, match="not several examples of a known type"):
        in_context(tiny_run, quiet=True)
    with pytest.raises(ProbekitError, match=r"examples is \[0, 3\]; documents hold 3"):
        in_context(run, examples=[3, 0], quiet=True)
    with (
        patch.dict(run.corpus.facts, {"bos": "none"}),
        pytest.raises(ProbekitError, match=r"lm\.bos is none, but probes"),
    ):
        in_context(run, quiet=True)
