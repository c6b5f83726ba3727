"""What the lens reads, against the plain Hugging Face module, the corpus's own readings and the results."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from probekit.data.windows import collate, cut_windows
from probekit.errors import ProbekitError
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import Reader
from probekit.probing.probe import probe
from probekit.probing.results import Cell, SavedProbes
from probekit.probing.targets import Examples
from probekit.reports.lens_reading import LensData, kept_probes, read_text
from probekit.run.run import Run
from probekit.training.train import train

LAYERS, DISTANCES = 3, [1, 2, 4]


@pytest.fixture(scope="module")
def plain(probed_run: Run, text: str) -> LensData:
    """The text, read in the base LM."""
    return read_text(probed_run, text)


@pytest.fixture(scope="module")
def conditioned(probed_run: Run, text: str) -> LensData:
    """The text, read in the LM that is told the plan."""
    return read_text(probed_run, text, "soft")


def states(run: Run, ids: np.ndarray) -> np.ndarray:
    """What leaves each layer at every token, read in the window that scores the next one."""
    model, found = run.plain_model(), np.empty((LAYERS, len(ids), run.config.lm.width))
    window, stride = run.config.training.window, run.config.training.window // 2
    read: dict[int, torch.Tensor] = {}
    for number, block in enumerate(model.transformer.h):
        block.register_forward_hook(
            lambda _, given, out, number=number: read.__setitem__(
                number, out[0] if isinstance(out, tuple) else out
            )
        )
    for position in range(len(ids)):
        start = max(0, -(-(position + 1 - window) // stride)) * stride
        with torch.no_grad():
            model(torch.tensor(ids[None, start : position + 1].astype(np.int64)))
        found[:, position] = [read[layer].reshape(-1, found.shape[-1])[-1] for layer in range(LAYERS)]
    return found


def test_numbers_are_those_of_the_plain_model(probed_run: Run, document: int, plain: LensData):
    corpus = probed_run.corpus
    ids = corpus.tokens[slice(*corpus.document_tokens[document : document + 2])]
    hidden = states(probed_run, ids)[:, 1:]
    saved = SavedProbes(probed_run.folder / "probes", "none", 0)
    # The embedding is at layer 0; then the layers, each with all distances.
    assert plain.probes.places == [("hook_embed", 0), *(("hook_resid_post", n) for n in range(LAYERS))]
    assert plain.probes.distances == DISTANCES
    for layer in range(LAYERS):
        for d, distance in enumerate(DISTANCES):
            probe = saved[Cell("hook_resid_post", layer, distance)]
            scores = hidden[layer] @ probe.coef.double().numpy() + probe.intercept.double().numpy()
            odds = np.exp(scores - scores.max(1, keepdims=True))
            expected = odds / odds.sum(1, keepdims=True)
            cell = (1 + layer) * len(DISTANCES) + d
            np.testing.assert_allclose(plain.probability[cell], expected.max(1), atol=1e-4)
            # Where two actions are all but equal, rounding decides.
            chosen = expected[np.arange(len(expected)), plain.top[cell]]
            np.testing.assert_allclose(chosen, expected.max(1), atol=1e-4)
            for t, value in enumerate(plain.true_probability[cell]):
                later = [s for s, first in enumerate(plain.first_token) if first > t]
                truth = expected[t, plain.actions[later[0]]] if later else np.nan
                np.testing.assert_allclose(value, truth, atol=1e-4)


def test_conditioned_readings_are_those_of_the_corpus(probed_run: Run, document: int, conditioned: LensData):
    """At its anchors, a document of the corpus is read as it was when it was probed."""
    run, corpus, data = probed_run, probed_run.corpus, conditioned
    sentences = np.arange(*corpus.document_sentences[document : document + 2])[1:]
    anchors = np.asarray(corpus.first_token[sentences])
    begin = corpus.document_tokens[document] + 1
    examples = Examples(np.full(len(anchors), document), anchors, sentences, np.zeros((len(anchors), 1)))
    reader = Reader(run, "soft", data.probes.places, DISTANCES)
    saved = SavedProbes(run.folder / "probes", "soft", 0)
    for block, values in zip(reader.stacks, reader.read(examples), strict=True):
        for (location, layer), by_distance in zip(block.points, values, strict=True):
            for d, distance in enumerate(DISTANCES):
                cell = data.probes.places.index((location, layer)) * len(DISTANCES) + d
                read = saved[Cell(location, layer, distance)].log_probabilities(by_distance[d]).exp()
                at = anchors - distance - begin
                np.testing.assert_allclose(data.probability[cell, at], read.max(1).values, atol=1e-5)


def test_conditioning_changes_what_is_read(plain: LensData, conditioned: LensData):
    assert np.abs(plain.probability - conditioned.probability).max() > 1e-3


def test_plan_and_what_was_told(probed_run: Run, document: int, conditioned: LensData):
    run, data = probed_run, conditioned
    windows = cut_windows(run.corpus, np.array([document]), 10_000, 10_000)
    batch, model = collate(run.corpus, windows), run.model("soft")
    scores = model.scores(batch)
    chances = scores.softmax(-1).numpy()
    sentences = len(data.actions)
    np.testing.assert_allclose(data.planner.true, chances[np.arange(sentences), data.actions], atol=1e-5)
    np.testing.assert_allclose(data.planner.probability[:-1], np.sort(chances)[:, :-6:-1], atol=1e-5)
    told = data.told
    weights = (scores / run.temperature("soft")).softmax(-1).numpy()
    np.testing.assert_allclose(told.weight[:-1], weights.max(1), atol=1e-5)
    np.testing.assert_array_equal(told.action[:-1], weights.argmax(1))
    # Position t carries the action of the sentence that holds token t + 1.
    carried = [np.flatnonzero(data.first_token <= t + 1)[-1] for t in range(len(data.pieces) - 1)]
    np.testing.assert_array_equal(told.carried[:-1], carried)
    assert data.over
    assert told.carried[-1] == sentences
    # Actions are added where heads are read, from the second layer on: what leaves these layers has changed.
    skipped = run.config.conditioning.skip_layers
    assert told.changed == [False, *(layer >= skipped for layer in range(LAYERS))]
    assert VARIANTS["soft"].evaluation.needs_scores


def test_the_base_lm_is_told_nothing(plain: LensData):
    assert plain.told is None
    assert plain.planner.top.shape == (len(plain.actions) + 1, 5)


def test_quality_is_that_of_the_results(probed_run: Run, conditioned: LensData):
    table = probed_run.probes()
    rows = table[(table.reader == "probe") & (table.variant == "soft")]
    for (location, layer), qualities in zip(
        conditioned.probes.places, np.reshape(conditioned.probes.quality, (-1, len(DISTANCES))), strict=True
    ):
        for distance, quality in zip(DISTANCES, qualities, strict=True):
            (row,) = rows[
                (rows.location == location) & (rows.layer == layer) & (rows.distance == distance)
            ].itertuples()
            assert quality.accuracy == (row.accuracy, row.accuracy_low, row.accuracy_high)
            assert (quality.documents, quality.injected) == (row.documents, row.injected)
    best = conditioned.probes.quality[conditioned.probes.best]
    assert not best.injected
    untold = rows[~rows.injected]
    assert best.accuracy[0] == untold.loc[untold.validation_cross_entropy.idxmin()].accuracy
    assert set(conditioned.probes.baselines) == {"prior", "bigram", "planner"}


def test_examples_are_training_sentences_of_the_action(probed_run: Run, plain: LensData):
    corpus = probed_run.corpus
    train = corpus.sentences(corpus.documents("train"))
    for action, shown in plain.examples.items():
        own = train[corpus.actions[train] == action]
        assert set(shown) <= set(corpus.sentence_texts(own))
        assert len(shown) == len(set(shown)) <= 3
        nearest = np.linalg.norm(corpus.embeddings[own] - corpus.codebook.centroids[action], axis=1).argmin()
        assert shown[0] == corpus.sentence_texts([own[nearest]])[0]
    assert {*plain.actions, *plain.top.ravel(), *plain.planner.top.ravel()} == set(plain.examples)


def test_one_sentence_has_no_next_one(probed_run: Run):
    data = read_text(probed_run, "Noni noni")
    assert np.isnan(data.true_probability).all()
    assert not data.over
    assert np.isfinite(data.probability).all()


def test_fewer_places(probed_run: Run):
    def chosen(**asked: list) -> list:
        return kept_probes(probed_run, **asked).places

    assert chosen(layers=[2]) == [("hook_embed", 0), ("hook_resid_post", 2)]
    assert chosen(layers=[1, 0], locations=["hook_resid_post"]) == [("hook_resid_post", n) for n in (0, 1)]
    with pytest.raises(ProbekitError, match=r"^--layers has 7, where no probe reads; there are 0, 1, 2$"):
        chosen(layers=[7])
    with pytest.raises(
        ProbekitError, match=r"^--locations has 'hook_z', .* there are hook_embed, hook_resid_post$"
    ):
        chosen(locations=["hook_z"])


def test_planning_tokens_and_encoders_of_their_own(
    tiny_run: Run, quick_probes: dict[str, Any], tmp_path: Path
):
    """A document is read as it was when probed, with tokens between its own and a planner's own encoder."""
    settings = {
        "conditioning.kind": "token",
        "mixing.variants": ["joint"],
        "training.joint.encoder_learning_rate": 1e-5,
        "actions.labels": "clusters",
    }
    run = train(tiny_run.config.override(settings), tmp_path / "run", quiet=True)
    probe(run, quick_probes | {"probe.variants": ["joint"], "probe.layers": [1]}, quiet=True)
    corpus, document = run.corpus, int(run.corpus.documents("test")[0])
    data = read_text(run, corpus.texts[document].text)
    sentences = np.arange(*corpus.document_sentences[document : document + 2])
    np.testing.assert_array_equal(data.actions, corpus.actions[sentences])
    anchors = np.asarray(corpus.first_token[sentences[1:]])
    at = anchors - 1 - corpus.document_tokens[document] - 1
    examples = Examples(np.full(len(at), document), anchors, sentences[1:], np.zeros((len(at), 1)))
    (values,) = Reader(run, "joint", [("hook_resid_post", 1)], [1]).read(examples)
    cell = SavedProbes(run.folder / "probes", "joint", 0)[Cell("hook_resid_post", 1, 1)]
    np.testing.assert_allclose(
        data.probability[0, at], cell.log_probabilities(values[0, 0]).exp().max(1).values, atol=1e-5
    )
    scores = run.planner("joint")(torch.from_numpy(run.corpus_of("joint").embeddings[sentences])[None])[0]
    chances = scores.softmax(-1).detach().numpy()
    np.testing.assert_allclose(data.planner.true, chances[np.arange(len(sentences)), data.actions], atol=1e-5)
    # The planning token of a sentence comes behind the token that predicts its first one.
    carried = np.searchsorted(data.first_token, np.arange(len(data.pieces)), side="right") - 1
    np.testing.assert_array_equal(data.told.carried, carried)
    assert not any(quality.injected for quality in data.probes.quality)
