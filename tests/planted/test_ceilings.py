"""Ceilings of a built corpus: against posteriors straight from the generator, and against enumeration."""

import itertools

import numpy as np
import pytest

from probekit.config import Config
from probekit.data.build import write_corpus
from probekit.data.corpus import Corpus
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import score_actions
from probekit.planted.ceilings import ceiling_log_probabilities, position_ceiling
from probekit.planted.corpus import PlantedModel, generate
from probekit.planted.posteriors import posterior_given_actions, posterior_given_words
from probekit.progress import Progress
from probekit.run.run import Run

FEW_WORDS = {
    "corpus.planted.documents": 60,
    "corpus.planted.types": 2,
    "corpus.planted.actions": 3,
    "corpus.planted.successors": 2,
    "corpus.planted.sentences": (3, 4),
    "corpus.planted.words": (1, 3),
    "corpus.planted.vocabulary": 5,
    "corpus.planted.concentration": 0.5,
    "corpus.probe_fraction": 0.25,
    "corpus.validation_fraction": 0.25,
    "corpus.test_fraction": 0.25,
    "actions.k": 8,
    "actions.dimensions": 4,
}
"""A corpus whose every document and every sentence that could stand in it can be gone through."""


def built(folder, **settings) -> tuple[Config, Corpus]:
    config = Config.from_preset("demo").override({"device": "cpu"} | settings)
    return config, write_corpus(config, folder / "corpus", Progress(quiet=True))


@pytest.mark.parametrize("horizon", [1, 2])
def test_rows_are_the_generators_posteriors(tiny_run: Run, horizon: int):
    corpus = tiny_run.corpus
    documents = np.concatenate([corpus.documents("test"), corpus.documents("probe")[:5]])
    found = ceiling_log_probabilities(tiny_run.config, corpus, documents, horizon)
    truth = generate(tiny_run.config.corpus.planted)
    row = 0
    for document in documents:
        first, last = truth.document_starts[document : document + 2]
        actions = truth.actions[first:last]
        bounds = truth.sentence_starts[first : last + 1]
        words = [truth.words[start:stop] for start, stop in itertools.pairwise(bounds)]
        given_actions = posterior_given_actions(truth.model, [actions], horizon)[0]
        given_words = posterior_given_words(truth.model, [words], horizon)[0]
        rows = slice(row, row + len(actions))
        np.testing.assert_allclose(np.exp(found["ceiling (actions)"][rows]), given_actions, atol=1e-12)
        np.testing.assert_allclose(np.exp(found["ceiling (words)"][rows]), given_words, atol=1e-12)
        row += len(actions)
    assert {len(values) for values in found.values()} == {row}


def test_the_truth_is_as_probable_as_a_ceiling_says(tiny_run: Run):
    """Calibration: over all sentences the probability of the best guess is how often it is right."""
    documents, actions = np.arange(160), np.array(tiny_run.corpus.actions)
    for log_probabilities in ceiling_log_probabilities(tiny_run.config, tiny_run.corpus, documents).values():
        correct = score_actions(log_probabilities, actions)["correct"]
        said = np.exp(log_probabilities.max(axis=1))
        # Given what came before, the errors of a true posterior are uncorrelated: 4 standard deviations.
        spread = np.sqrt((said * (1 - said)).sum())
        assert abs(correct.sum() - said.sum()) < 4 * spread
        # Lined up a sentence too late or too early it would be right far less often.
        assert score_actions(log_probabilities[1:], actions[:-1])["correct"].mean() < correct.mean() - 0.1
        assert score_actions(log_probabilities[:-1], actions[1:])["correct"].mean() < correct.mean() - 0.1


def enumerated(
    model: PlantedModel, corpus: Corpus, config: Config, document: int, position: int, target: int
):
    """P(action of a document's sentence | tokens up to a position), from all texts that begin with these."""
    planted = config.corpus.planted
    tokenizer, start = corpus.tokenizer, int(corpus.document_tokens[document])
    text = corpus.texts[document].text
    read = corpus.tokens[start + 1 : position + 1].tolist()
    encoded = tokenizer(text, return_offsets_mapping=True)
    stops = [place + 1 for place, letter in enumerate(text) if letter == "."]
    # A space that is a token of its own and the last one read belongs to the next sentence's first word.
    first = encoded["offset_mapping"][len(read) - 1][0]
    sentence = sum(stop <= first for stop in stops)
    space = "\n" if planted.examples > 1 and sentence % planted.sentences[0] == 0 else " "
    before = text[: stops[sentence - 1]] + space if sentence else ""

    likelihood = [model.emission[:, ids].prod(axis=1) for ids in model.parse(text)[:sentence]]
    partly = np.zeros(planted.actions)
    lengths = range(planted.words[0], planted.words[1] + 1)
    for words in itertools.chain(*(itertools.product(range(planted.vocabulary), repeat=n) for n in lengths)):
        candidate = before + " ".join(model.words[word] for word in words).capitalize() + "."
        if tokenizer(candidate).input_ids[: len(read)] == read:
            partly += model.emission[:, list(words)].prod(axis=1) / len(lengths)
    likelihood = np.array([*likelihood, partly])

    posterior = np.zeros(planted.actions)
    for z in range(planted.types):
        for path in itertools.product(range(planted.actions), repeat=max(target, sentence) + 1):
            p = model.prior[z] * model.initial[z, path[0]]
            for place, (one, next_one) in enumerate(itertools.pairwise(path), 1):
                anew = planted.examples > 1 and place % planted.sentences[0] == 0
                p *= model.initial[z, next_one] if anew else model.transition[z, one, next_one]
            posterior[path[target]] += p * likelihood[range(sentence + 1), path[: sentence + 1]].prod()
    return posterior / posterior.sum()


@pytest.mark.parametrize(
    ("vocabulary", "seed", "examples"), [(258, 0, 1), (270, 1, 1), (400, 2, 1), (258, 3, 2), (400, 4, 2)]
)
def test_position_ceiling_equals_enumeration(vocabulary: int, seed: int, examples: int, tmp_path):
    """At every token of documents and for every sentence from there on, words being of one token or many."""
    changes = FEW_WORDS | {"lm.vocabulary": vocabulary, "corpus.planted.seed": seed}
    if examples > 1:
        changes |= {"corpus.planted.examples": examples, "corpus.planted.sentences": (2, 2)}
    config, corpus = built(tmp_path, **changes)
    model = PlantedModel.draw(config.corpus.planted)
    rows, ended = [], []
    for document in (2, 9):
        sentences = corpus.sentences(np.array([document]))
        starts = corpus.first_token[sentences]
        separator, end = corpus.document_tokens[document : document + 2]
        for position in range(separator + 1, end):
            # The space in front of the next sentence's first word tells of that word.
            alone = not corpus.tokenizer.decode([corpus.tokens[position]]).strip()
            holds = int(np.searchsorted(starts, position + alone, side="right")) - 1
            rows += [(document, position, target) for target in range(holds, len(sentences))]
            if position < starts[holds]:  # and it is the last token of the sentence before
                ended.append((document, position, holds - 1))
    rows = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:60]] + ended
    assert ended or vocabulary == 400
    document, position, target = np.array(rows).T
    found = position_ceiling(config, corpus, position, corpus.document_sentences[document] + target)
    for row, log_probabilities in zip(rows, found, strict=True):
        expected = enumerated(model, corpus, config, *row)
        np.testing.assert_allclose(np.exp(log_probabilities), expected, atol=1e-12)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Corpus]:
    """The demo's corpus, smaller, with words of several tokens."""
    return built(
        tmp_path_factory.mktemp("planted"), **{"corpus.planted.documents": 300, "lm.vocabulary": 400}
    )


def test_at_the_end_of_a_sentence_all_its_words_are_read(planted: tuple[Config, Corpus]):
    config, corpus = planted
    documents = np.array([3, 40, 41, 299])
    sentences = corpus.sentences(documents)
    words = ceiling_log_probabilities(config, corpus, documents)["ceiling (words)"]
    later = np.flatnonzero(sentences > corpus.document_sentences[corpus.document_of(sentences)])
    later = np.random.default_rng(0).permutation(later)
    positions = corpus.first_token[sentences[later]] - 1
    # A space that is a token of its own tells of the next sentence's first word.
    stops = corpus.tokens[positions] == corpus.tokenizer.convert_tokens_to_ids(".")
    assert stops.mean() > 0.5
    later, positions = later[stops], positions[stops]
    found = position_ceiling(config, corpus, positions, sentences[later])
    np.testing.assert_allclose(np.exp(found), np.exp(words[later]), atol=1e-9)


def test_at_a_separator_nothing_is_read(planted: tuple[Config, Corpus]):
    config, corpus = planted
    model = PlantedModel.draw(config.corpus.planted)
    first = corpus.document_sentences[7:9]
    found = position_ceiling(
        config, corpus, corpus.document_tokens[[7, 8, 8]], np.array([first[0], first[1], first[1] + 1])
    )
    start = model.prior @ model.initial
    after = model.prior @ np.einsum("za,zab->zb", model.initial, model.transition)
    np.testing.assert_allclose(np.exp(found), [start, start, after])


def test_the_farther_the_less_is_known(planted: tuple[Config, Corpus]):
    """And at every distance the ceiling is calibrated: it says how often its best guess is right."""
    config, corpus = planted
    sentences = corpus.sentences(np.arange(300))
    distances = (1, 6, 10, 16, 24, 40)
    reached = corpus.first_token[sentences] - 40 > corpus.document_tokens[corpus.document_of(sentences)]
    sentences = sentences[reached]
    actions, losses = corpus.actions[sentences], []
    for distance in distances:
        found = position_ceiling(config, corpus, corpus.first_token[sentences] - distance, sentences)
        scores = score_actions(found, actions)
        losses.append(scores["cross_entropy"].mean())
        said = np.exp(found.max(axis=1))
        # Examples of one document that share what was read are correlated, hence a wide margin.
        assert abs(scores["correct"].mean() - said.mean()) < 0.04
    assert losses == sorted(losses)
    assert losses[-1] > losses[0] + 1


def test_rows_do_not_depend_on_each_other(planted: tuple[Config, Corpus]):
    config, corpus = planted
    sentences = np.random.default_rng(1).permutation(len(corpus.first_token))[:400]
    positions = np.maximum(
        corpus.first_token[sentences] - 5, corpus.document_tokens[corpus.document_of(sentences)]
    )
    whole = position_ceiling(config, corpus, positions, sentences)
    parts = [
        position_ceiling(config, corpus, *part)
        for part in zip(np.array_split(positions, 9), np.array_split(sentences, 9), strict=True)
    ]
    np.testing.assert_allclose(np.exp(np.concatenate(parts)), np.exp(whole), atol=1e-12)


@pytest.mark.parametrize(("offset", "sentence"), [(-1, 0), (0, 30), (9, 0), (60, 1)])
def test_positions_that_no_ceiling_is_for_are_refused(
    planted: tuple[Config, Corpus], offset: int, sentence: int
):
    """In the document before, in one before that of the sentence, and after the sentence."""
    config, corpus = planted
    position = corpus.document_tokens[5] + offset
    if offset == 9:
        position = corpus.first_token[corpus.document_sentences[5] + 2]
    with pytest.raises(ProbekitError, match=f"position {position} is not in the document of sentence"):
        position_ceiling(config, corpus, np.array([position]), corpus.document_sentences[[5]] + sentence)


def test_other_planted_settings_are_refused(planted: tuple[Config, Corpus]):
    config, corpus = planted
    other = config.override({"corpus.planted.seed": 1})
    with pytest.raises(ProbekitError, match=r"corpus\.planted settings"):
        position_ceiling(other, corpus, corpus.first_token[[4]] - 1, np.array([4]))
