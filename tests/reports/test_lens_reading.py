"""What the lens reads, against the plain Hugging Face module, the corpus's own readings and the results."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from probekit.config import Config
from probekit.data.windows import collate, cut_windows
from probekit.errors import ProbekitError
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import ActivationReader
from probekit.probing.probe import probe
from probekit.probing.results import Cell, SavedProbes
from probekit.probing.score import score
from probekit.probing.targets import Examples
from probekit.reports.lens_reading import LensData, kept_probes, read_text
from probekit.run.run import Run
from probekit.training.train import prepare, train

LAYERS, DISTANCES = 3, [1, 2, 4]
KINDS: dict[str, dict[str, Any]] = {
    "two classes of texts": {"target": "long", "positions": ["first", "last", "mean"]},
    "numbers of texts": {"target": "size", "positions": ["last", "mean"]},
    "classes of sentences": {"target": "turn", "positions": [1, 0, "last"], "labels": "sentences"},
    "tokens": {"target": "token", "positions": [1, 0], "anchors": "token", "labels": None},
    "sentence positions": {"target": "sentence-position", "positions": [0, 2], "labels": None},
}
"""Settings of probes of other targets, with the table that holds their labels."""


@pytest.fixture(scope="module")
def plain(probed_run: Run, text: str) -> LensData:
    """The text, read in the base LM."""
    return read_text(probed_run, text)


@pytest.fixture(scope="module")
def conditioned(probed_run: Run, text: str) -> LensData:
    """The text, read in the LM that is conditioned on the plan."""
    return read_text(probed_run, text, ["soft"])


@pytest.fixture(scope="module")
def short(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny LM and a table of short texts, two sentences each, without actions."""
    folder = tmp_path_factory.mktemp("short")
    sentences = tiny_run.corpus.sentence_texts(np.arange(800))
    texts = [" ".join(sentences[n : n + 2]) for n in range(0, 800, 2)]
    texts = [text for text in dict.fromkeys(texts) if len(text) < 90][:260]
    sizes = np.array([len(text) for text in texts])
    long = np.where(sizes > np.median(sizes), "yes", "no")
    pd.DataFrame({"text": texts, "size": sizes / 7, "long": long}).to_csv(folder / "texts.csv", index=False)
    config = Config.from_preset("any-model").override(
        {
            "device": "cpu",
            "lm.name": str(tiny_run.folder / "lm"),
            "corpus.path": str(folder / "texts.csv"),
            "actions.labels": "none",
            "training.window": 48,
        }
    )
    return prepare(config, folder / "run", quiet=True)


@pytest.fixture(scope="module", params=list(KINDS))
def other(request: pytest.FixtureRequest, short: Run, quick_probes: dict[str, Any]) -> Run:
    """Probes of another target, at one layer."""
    corpus, settings, folder = short.corpus, KINDS[request.param], short.folder.parent
    sentence = (
        np.arange(len(corpus.first_token))
        - corpus.document_sentences[corpus.document_of(np.arange(len(corpus.first_token)))]
    )
    turn = np.array(["odd", "even", "third"])[(sentence * 7 + corpus.first_token) % 3]
    document = corpus.document_of(np.arange(len(sentence)))
    table = pd.DataFrame({"document": document, "sentence": sentence, "turn": turn})
    table.to_csv(folder / "sentences.csv", index=False)
    of = settings.get("labels", "texts")
    chosen = {f"probe.{name}": value for name, value in settings.items()}
    chosen |= {"probe.labels": of and str(folder / f"{of}.csv"), "probe.layers": [2]}
    probe(short, quick_probes | chosen | {"probe.variants": ["none"]}, quiet=True)
    return Run.open(short.folder)


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
    (reading,) = plain.readings
    # The embedding is at layer 0; then the layers, each with all distances.
    assert reading.probes.points == [("hook_embed", 0), *(("hook_resid_post", n) for n in range(LAYERS))]
    assert reading.probes.positions == DISTANCES
    actions = dict(zip(plain.first_token, plain.truth.of_sentences.astype(int), strict=True))
    for layer in range(LAYERS):
        for d, distance in enumerate(DISTANCES):
            probe = saved[Cell("hook_resid_post", layer, distance)]
            scores = hidden[layer] @ probe.coef.double().numpy() + probe.intercept.double().numpy()
            odds = np.exp(scores - scores.max(1, keepdims=True))
            expected = odds / odds.sum(1, keepdims=True)
            cell = (1 + layer) * len(DISTANCES) + d
            for rank, best in enumerate(-np.sort(-expected)[:, :3].T):
                np.testing.assert_allclose(reading.read[rank, cell, :-1], best, atol=1e-4)
                # Where two actions are all but equal, rounding decides.
                chosen = expected[np.arange(len(expected)), reading.top[rank, cell, :-1].astype(int)]
                np.testing.assert_allclose(chosen, best, atol=1e-4)
            for t, value in enumerate(reading.of_true[cell]):
                # The sentence that begins next, or the one before which the probe was fitted here.
                begins = [first for first in actions if first == t + distance]
                begins += [first for first in actions if first > t]
                truth = expected[t, actions[begins[0]]] if begins else np.nan
                np.testing.assert_allclose(value, truth, atol=1e-4)


def test_conditioned_readings_are_those_of_the_corpus(probed_run: Run, document: int, conditioned: LensData):
    """At its anchors, a document of the corpus is read as it was when it was probed."""
    run, corpus, (data,) = probed_run, probed_run.corpus, conditioned.readings
    sentences = np.arange(*corpus.document_sentences[document : document + 2])[1:]
    anchors = np.asarray(corpus.first_token[sentences])
    begin = corpus.document_tokens[document] + 1
    examples = Examples.of_tokens(
        np.full(len(anchors), document), anchors, sentences, np.zeros((len(anchors), 1))
    )
    reader = ActivationReader(run, "soft", data.probes.points, DISTANCES)
    saved = SavedProbes(run.folder / "probes", "soft", 0)
    for block, values in zip(reader.stacks, reader.read(examples), strict=True):
        for (location, layer), by_distance in zip(block.points, values, strict=True):
            for d, distance in enumerate(DISTANCES):
                cell = data.probes.points.index((location, layer)) * len(DISTANCES) + d
                read = saved[Cell(location, layer, distance)].log_probabilities(by_distance[d]).exp()
                at = anchors - distance - begin
                np.testing.assert_allclose(data.read[0, cell, at], read.max(1).values, atol=1e-5)


def test_plan_and_conditioning(probed_run: Run, document: int, conditioned: LensData):
    run, (data,), actions = probed_run, conditioned.readings, conditioned.truth.of_sentences.astype(int)
    windows = cut_windows(run.corpus, np.array([document]), 10_000, 10_000)
    batch, model = collate(run.corpus, windows), run.model("soft")
    scores = model.scores(batch)
    chances = scores.softmax(-1).numpy()
    sentences = len(actions)
    np.testing.assert_allclose(data.planner["true"], chances[np.arange(sentences), actions], atol=1e-5)
    np.testing.assert_allclose(data.planner["probability"][:-1], np.sort(chances)[:, :-6:-1], atol=1e-5)
    given = data.conditioning
    weights = (scores / run.temperature("soft")).softmax(-1).numpy()
    np.testing.assert_allclose(given["weight"][:-1], weights.max(1), atol=1e-5)
    np.testing.assert_array_equal(given["action"][:-1], weights.argmax(1))
    # Position t carries the action of the sentence that holds token t + 1.
    pieces, first = conditioned.pieces, conditioned.first_token
    carried = [np.flatnonzero(first <= t + 1)[-1] for t in range(len(pieces) - 1)]
    np.testing.assert_array_equal(given["carried"][:-1], carried)
    assert given["carried"][-1] == sentences
    # Actions are added where heads are read, from the second layer on: what leaves these layers has changed.
    skipped = run.config.conditioning.skip_layers
    assert given["changed"] == [False, *(layer >= skipped for layer in range(LAYERS))]
    assert VARIANTS["soft"].evaluation.needs_scores


def test_the_base_lm_is_not_conditioned(plain: LensData):
    assert plain.readings[0].conditioning is None
    assert plain.readings[0].planner["top"].shape == (len(plain.first_token) + 1, 5)


def test_quality_is_that_of_the_results(probed_run: Run, conditioned: LensData):
    table, probes = probed_run.probes(), conditioned.probes
    rows = table[(table.reader == "probe") & (table.variant == "soft")]
    keys = ["location", "layer", "position"]
    cells = [(*point, str(distance)) for point in probes.points for distance in DISTANCES]
    assert probes.quality.index.to_list() == cells
    expected = rows.set_index(keys).loc[cells]
    for column in ("accuracy", "accuracy_low", "accuracy_high", "documents", "injected"):
        assert probes.quality[column].to_list() == expected[column].to_list()
    best = probes.quality.iloc[probes.best]
    assert not best.injected
    free = rows[~rows.injected]
    assert best.accuracy == free.loc[free.validation_cross_entropy.idxmin()].accuracy
    assert {"prior", "bigram", "planner", "token embedding"} <= set(probes.baselines)
    bigram = table[(table.reader == "bigram")].set_index("position").loc[[*map(str, DISTANCES)]]
    assert probes.baselines["bigram"].accuracy.to_list() == bigram.accuracy.to_list()


def test_examples_are_training_sentences_of_the_action(probed_run: Run, plain: LensData):
    corpus = probed_run.corpus
    train = corpus.sentences(corpus.documents("train"))
    for action, shown in plain.examples.items():
        own = train[corpus.actions[train] == action]
        assert set(shown) <= set(corpus.sentence_texts(own))
        assert len(shown) == len(set(shown)) <= 3
        nearest = np.linalg.norm(corpus.embeddings[own] - corpus.codebook.centroids[action], axis=1).argmin()
        assert shown[0] == corpus.sentence_texts([own[nearest]])[0]
    (reading,) = plain.readings
    shown = {*plain.truth.of_sentences, *reading.top.ravel(), *reading.planner["top"].ravel()}
    assert shown == set(plain.examples) == set(plain.actions)


def test_one_sentence_has_no_next_one(probed_run: Run):
    data = read_text(probed_run, "Noni noni")
    assert np.isnan(data.readings[0].of_true).all()
    assert np.isfinite(data.readings[0].read).all()


def test_every_target_is_read_as_probekit_score_reads_it(other: Run):
    """At every token, and the whole text at its last token, its first one and their mean."""
    document = int(other.corpus.documents("test")[0])
    text = other.corpus.texts[document].text
    data = read_text(other, text)
    (reading,), probes, tokens = data.readings, data.probes, len(data.pieces)
    assert probes.points == [("hook_resid_post", 2)]
    for c, position in enumerate(probes.positions):
        cell = Cell("hook_resid_post", 2, position, 1, probes.solver).key
        table = score(other, [text], cell, tokens=True, quiet=True)
        columns = [*range(tokens)]
        if isinstance(position, str):
            table = pd.concat([table, score(other, [text], cell, quiet=True)])
            columns.append({"first": 0, "last": tokens - 1, "mean": tokens}[position])
        read, names = reading.read[0, c, columns], np.array(probes.classes)
        true = data.truth.labels[c]
        known = np.flatnonzero(~np.isnan(true))
        assert len(known)
        if not len(names):
            np.testing.assert_allclose(read, table.predicted, atol=1e-5)
            continue
        if len(names) == 2:
            np.testing.assert_allclose(read, table[f"p({names[1]})"], atol=1e-5)
        else:
            np.testing.assert_allclose(read, table.probability, atol=1e-5)
            assert (names[reading.top[0, c, columns].astype(int)] == table.predicted).all()
        if len(names) <= 20:
            each = table[[f"p({name})" for name in names]].to_numpy()
            expected = each[known, true[known].astype(int)]
            np.testing.assert_allclose(reading.of_true[c, known], expected, atol=1e-5)


def test_two_variants_are_read_as_each_alone(
    probed_run: Run, text: str, plain: LensData, conditioned: LensData
):
    both = read_text(probed_run, text, ["soft", "none"])
    for reading, alone in zip(both.readings, (conditioned, plain), strict=True):
        (expected,) = alone.readings
        assert reading.probes.variant == expected.probes.variant
        np.testing.assert_array_equal(reading.read, expected.read)
        np.testing.assert_array_equal(reading.of_true, expected.of_true)
        assert (reading.conditioning is None) == (expected.conditioning is None)
    np.testing.assert_array_equal(both.truth.labels, plain.truth.labels)
    for variants in (["soft", "soft"], ["none", "soft", "oracle"], []):
        with pytest.raises(ProbekitError, match=r"^--variant is .*; give one, or two different ones"):
            read_text(probed_run, text, variants)


def test_the_logit_lens_ends_in_what_the_lm_predicts(probed_run: Run, plain: LensData, conditioned: LensData):
    """At the last layer, of a text of one window; before it, norm and head are applied by hand."""
    run, data = probed_run, read_text(probed_run, "Noni noni mumi. Rata")
    ids = torch.tensor([[run.corpus.separator, *data.ids]])
    model, following = run.plain_model(), data.readings[0].next
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
        hidden = [model.transformer.ln_f(state[0, 1:]) for state in found.hidden_states[1:-1]]
        logits = [model.lm_head(state) for state in hidden] + [found.logits[0, 1:]]
    assert following["points"] == [1, 2, 3]
    assert following["tokens"].shape == (LAYERS, 3, len(data.pieces))
    for layer, expected in enumerate(logits):
        chances = expected.softmax(-1).numpy()
        best = -np.sort(-chances)[:, :3].T
        np.testing.assert_allclose(following["probability"][layer], best, atol=1e-5)
        given = np.take_along_axis(chances, following["tokens"][layer].T, 1).T
        np.testing.assert_allclose(given, best, atol=1e-5)
    decoder = run.corpus.tokenizer
    assert data.words == {n: decoder.decode([n]) for n in np.unique(following["tokens"])}
    # A conditioned LM predicts something else.
    assert not np.allclose(plain.readings[0].next["probability"], conditioned.readings[0].next["probability"])


def test_there_is_no_logit_lens_where_no_residual_stream_is_read(probed_run: Run):
    assert read_text(probed_run, "Some words.", locations=["hook_embed"]).readings[0].next is None


def test_fewer_points(probed_run: Run):
    def chosen(**asked: list) -> list:
        return kept_probes(probed_run, **asked).points

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
    changed = {
        "conditioning.kind": "token",
        "mixing.variants": ["joint"],
        "training.joint.encoder_learning_rate": 1e-5,
        "actions.labels": "clusters",
    }
    run = train(tiny_run.config.override(changed), tmp_path / "run", quiet=True)
    probe(run, quick_probes | {"probe.variants": ["joint"], "probe.layers": [1]}, quiet=True)
    corpus, document = run.corpus, int(run.corpus.documents("test")[0])
    data = read_text(run, corpus.texts[document].text)
    (reading,) = data.readings
    sentences = np.arange(*corpus.document_sentences[document : document + 2])
    actions = corpus.actions[sentences]
    np.testing.assert_array_equal(data.truth.of_sentences, actions)
    anchors = np.asarray(corpus.first_token[sentences[1:]])
    at = anchors - 1 - corpus.document_tokens[document] - 1
    examples = Examples.of_tokens(np.full(len(at), document), anchors, sentences[1:], np.zeros((len(at), 1)))
    (values,) = ActivationReader(run, "joint", [("hook_resid_post", 1)], [1]).read(examples)
    cell = SavedProbes(run.folder / "probes", "joint", 0)[Cell("hook_resid_post", 1, 1)]
    np.testing.assert_allclose(
        reading.read[0, 0, at], cell.log_probabilities(values[0, 0]).exp().max(1).values, atol=1e-5
    )
    scores = run.planner("joint")(torch.from_numpy(run.corpus_of("joint").embeddings[sentences])[None])[0]
    chances = scores.softmax(-1).detach().numpy()
    np.testing.assert_allclose(
        reading.planner["true"], chances[np.arange(len(sentences)), actions], atol=1e-5
    )
    # The planning token of a sentence comes after the token that predicts its first one.
    carried = np.searchsorted(data.first_token, np.arange(len(data.pieces)), side="right") - 1
    np.testing.assert_array_equal(reading.conditioning["carried"], carried)
    assert not data.probes.quality.injected.any()
