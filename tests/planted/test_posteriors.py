"""The exact posteriors of the planted corpus against a sum over every hidden path."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probekit.config import PlantedSettings
from probekit.planted.corpus import PlantedModel, generate
from probekit.planted.posteriors import (
    log_joint_by_type,
    posterior_at,
    posterior_given_actions,
    posterior_given_words,
)

# Every document has four sentences, so that `enumerate_posterior` can walk all 2 * 3 ** 4 hidden paths.
SMALL = PlantedSettings(
    documents=4, types=2, actions=3, successors=2, sentences=(4, 4), words=(1, 3),
    vocabulary=5, concentration=0.5,
)  # fmt: skip


# And here two examples of two sentences.
EXAMPLES = SMALL.model_copy(update={"sentences": (2, 2), "examples": 2})


def enumerate_posterior(model, likelihood, horizon, example=None):
    """Rows of the posterior by summing the probability of every path; likelihood: [sentences, actions]."""
    sentences, actions = likelihood.shape
    rows = np.zeros((sentences, actions))
    for j, z in itertools.product(range(sentences), range(len(model.prior))):
        for path in itertools.product(range(actions), repeat=j + horizon):
            probability = model.prior[z] * model.initial[z, path[0]]
            for place, (before, after) in enumerate(itertools.pairwise(path), 1):
                anew = example and place % example == 0
                probability *= model.initial[z, after] if anew else model.transition[z, before, after]
            for sentence, action in enumerate(path[:j]):
                probability *= likelihood[sentence, action]
            rows[j, path[-1]] += probability
    return rows / rows.sum(axis=1, keepdims=True)


def cross_entropy(posteriors, documents):
    """Mean over all sentences, in nats."""
    rows = np.concatenate(posteriors)
    actions = np.concatenate([document.actions for document in documents])
    return -np.log(rows[np.arange(len(rows)), actions]).mean()


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    horizon=st.integers(1, 3),
    successors=st.integers(1, 3),
    planted=st.sampled_from([SMALL, EXAMPLES]),
)
def test_posteriors_equal_enumeration(seed, horizon, successors, planted):
    corpus = generate(planted.model_copy(update={"seed": seed, "successors": successors}))
    example = 2 if planted is EXAMPLES else None
    model, drawn = corpus.model, list(corpus.documents())
    given_actions = posterior_given_actions(model, [document.actions for document in drawn], horizon)
    given_words = posterior_given_words(model, [model.parse(document.text) for document in drawn], horizon)
    for document, from_actions, from_words in zip(drawn, given_actions, given_words, strict=True):
        seen = np.eye(3)[list(document.actions)]
        np.testing.assert_allclose(
            from_actions, enumerate_posterior(model, seen, horizon, example), atol=1e-12
        )
        read = np.array([model.emission[:, words].prod(axis=1) for words in model.parse(document.text)])
        np.testing.assert_allclose(from_words, enumerate_posterior(model, read, horizon, example), atol=1e-12)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**32 - 1), planted=st.sampled_from([SMALL, EXAMPLES]))
def test_posteriors_within_a_sentence_equal_enumeration(seed, planted):
    corpus, example = generate(planted.model_copy(update={"seed": seed})), 2 if planted is EXAMPLES else None
    model, drawn = corpus.model, list(corpus.documents())
    read = [model.parse(document.text) for document in drawn]
    rows = [(d, i, ahead) for d in range(len(drawn)) for i in range(4) for ahead in range(4 - i)]
    document, sentence, ahead = np.random.default_rng(seed).permutation(rows).T
    partial = np.random.default_rng(seed).dirichlet(np.ones(3), size=len(rows))
    found = posterior_at(model, read, document, sentence, np.log(partial), ahead)
    for row in range(len(rows)):
        words = read[document[row]][: sentence[row]]
        whole = [model.emission[:, ids].prod(axis=1) for ids in words]
        likelihood = np.array([*whole, partial[row]])
        if ahead[row]:
            # Row j of the enumeration is given j sentences: all of those read need one row more.
            padded = np.vstack([likelihood, np.ones(3)])
            expected = enumerate_posterior(model, padded, int(ahead[row]), example)[-1]
        else:
            expected = enumerate_posterior(model, likelihood, 1, example)[-1] * partial[row]
            expected /= expected.sum()
        np.testing.assert_allclose(found[row], expected, atol=1e-12)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), planted=st.sampled_from([SMALL, EXAMPLES]))
def test_joints_by_type_equal_enumeration(seed, planted):
    corpus = generate(planted.model_copy(update={"seed": seed}))
    model, sentences = corpus.model, planted.sentences[0]
    examples = [model.parse(document.text)[:sentences] for document in corpus.documents()]
    found = np.exp(log_joint_by_type(model, examples))
    assert found.shape == (4, sentences + 1, 2, 3)
    for example, own in zip(examples, found, strict=True):
        read = np.array([model.emission[:, words].prod(axis=1) for words in example])
        expected = np.zeros((sentences, 2, 3))
        for j, z in itertools.product(range(sentences), range(2)):
            for path in itertools.product(range(3), repeat=j + 1):
                chain = [
                    model.initial[z, path[0]],
                    *(model.transition[z, *p] for p in itertools.pairwise(path)),
                ]
                expected[j, z, path[-1]] += np.prod(chain) * read[range(j), path[:j]].prod()
        np.testing.assert_allclose(own[:-1], expected, atol=1e-15)
        np.testing.assert_allclose(own[-1].sum(axis=-1), (expected[-1] * read[-1]).sum(axis=-1), rtol=1e-9)


def test_types_carry_over_from_example_to_example():
    """A document's posterior is that of its last example, with what the others say of the type as prior."""
    corpus = generate(EXAMPLES.model_copy(update={"documents": 50, "examples": 5}))
    model = corpus.model
    read = [model.parse(document.text) for document in corpus.documents()]
    joint = np.stack(
        [log_joint_by_type(model, [words[at : at + 2] for words in read]) for at in range(0, 10, 2)]
    )
    said = np.log(model.prior) + np.logaddexp.reduce(joint[:-1, :, -1], axis=-1).sum(axis=0)
    for place in (0, 1):
        expected = np.exp(said[:, :, None] + joint[-1, :, place]).sum(axis=1)
        found = np.array([rows[8 + place] for rows in posterior_given_words(model, read)])
        np.testing.assert_allclose(found, expected / expected.sum(axis=1, keepdims=True), rtol=1e-9)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    horizon=st.integers(1, 5),
    actions=st.integers(2, 40),
    concentration=st.floats(1e-6, 100.0),
)
@pytest.mark.filterwarnings("error")
def test_rows_are_distributions_in_the_documents_order(seed, horizon, actions, concentration):
    drawn_from = PlantedSettings(
        documents=20, seed=seed, actions=actions, successors=2, concentration=concentration
    )
    corpus = generate(drawn_from)
    drawn = list(corpus.documents())
    read = [corpus.model.parse(document.text) for document in drawn]
    for posteriors in (
        posterior_given_actions(corpus.model, [document.actions for document in drawn], horizon),
        posterior_given_words(corpus.model, read, horizon),
    ):
        assert [rows.shape for rows in posteriors] == [(len(d.actions), actions) for d in drawn]
        for rows in posteriors:
            assert (rows >= 0).all()
            np.testing.assert_allclose(rows.sum(axis=1), 1.0)


def test_rows_do_not_depend_on_the_batch(corpus, documents):
    actions = [document.actions for document in documents[:600]]
    batched = posterior_given_actions(corpus.model, actions)
    for d in (0, 255, 256, 599):
        alone = posterior_given_actions(corpus.model, [actions[d]])[0]
        np.testing.assert_allclose(batched[d], alone, atol=1e-14)


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_knowing_nothing_gives_the_marginal(corpus, horizon):
    model = corpus.model
    marginal = model.initial
    for _ in range(horizon - 1):
        marginal = np.einsum("za,zab->zb", marginal, model.transition)
    rows = posterior_given_words(model, [[[], []]], horizon)[0]
    np.testing.assert_allclose(rows[0], model.prior @ marginal)
    # An empty sentence tells nothing: a row later is a sentence further ahead.
    np.testing.assert_allclose(rows[1], model.prior @ np.einsum("za,zab->zb", marginal, model.transition))


def test_the_ceiling_is_above_what_can_be_fitted(corpus, documents):
    fitted, held_out = documents[:4000], documents[4000:]
    model = corpus.model
    ceiling = cross_entropy(posterior_given_actions(model, [d.actions for d in held_out]), held_out)
    reading = cross_entropy(posterior_given_words(model, [model.parse(d.text) for d in held_out]), held_out)
    # The bigram has one more row, for the start of a document.
    counts = np.full((25, 24), 0.1)
    for document in fitted:
        np.add.at(counts, ([-1, *document.actions[:-1]], document.actions), 1)
    bigram = counts / counts.sum(axis=1, keepdims=True)
    predicted = [bigram[[-1, *document.actions[:-1]]] for document in held_out]
    assert ceiling <= reading < cross_entropy(predicted, held_out) - 0.5


def test_an_unlikely_type_survives_until_it_is_confirmed():
    """Type 1 is after by 600 orders of magnitude, until an action that only it can have appears."""
    stay = np.eye(3)
    leave = np.array([[1 - 1e-9, 1e-9, 0], [0, 1, 0], [0, 0, 1]])
    start = np.array([[1.0, 0, 0], [1e-300, 0, 1 - 1e-300]])
    rare = PlantedModel(
        np.array([1 - 1e-300, 1e-300]), start, np.stack([stay, leave]), np.eye(3), ("a", "b", "c")
    )
    rows = posterior_given_actions(rare, [[0, 0, 1, 1]])[0]
    np.testing.assert_allclose(rows[1:], [[1, 0, 0], [1, 0, 0], [0, 1, 0]], atol=1e-8)
