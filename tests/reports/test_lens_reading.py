"""What the lens reads, against the plain Hugging Face module, the corpus's own readings and the results."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from probekit.data.readers import VISIBLE
from probekit.data.windows import collate, cut_windows
from probekit.errors import ProbekitError
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import Reader
from probekit.probing.probe import probe
from probekit.probing.results import Cell, SavedProbes
from probekit.probing.targets import Examples
from probekit.reports.lens_reading import LensData, cut_text, given_text, kept_probes, read_text
from probekit.run.run import Run
from probekit.training.train import train


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
    assert cut.complete
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
    assert not cut.complete
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


LAYERS, DISTANCES = 3, [1, 2, 4]


@pytest.fixture(scope="module")
def plain(probed_run: Run, text: str) -> LensData:
    """The text, read in the base LM."""
    return read_text(probed_run, text)


@pytest.fixture(scope="module")
def conditioned(probed_run: Run, text: str) -> LensData:
    """The text, read in the LM that is conditioned on the plan."""
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
    assert plain.probes.points == [("hook_embed", 0), *(("hook_resid_post", n) for n in range(LAYERS))]
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
    examples = Examples.of_tokens(
        np.full(len(anchors), document), anchors, sentences, np.zeros((len(anchors), 1))
    )
    reader = Reader(run, "soft", data.probes.points, DISTANCES)
    saved = SavedProbes(run.folder / "probes", "soft", 0)
    for block, values in zip(reader.stacks, reader.read(examples), strict=True):
        for (location, layer), by_distance in zip(block.points, values, strict=True):
            for d, distance in enumerate(DISTANCES):
                cell = data.probes.points.index((location, layer)) * len(DISTANCES) + d
                read = saved[Cell(location, layer, distance)].log_probabilities(by_distance[d]).exp()
                at = anchors - distance - begin
                np.testing.assert_allclose(data.probability[cell, at], read.max(1).values, atol=1e-5)


def test_plan_and_conditioning(probed_run: Run, document: int, conditioned: LensData):
    run, data = probed_run, conditioned
    windows = cut_windows(run.corpus, np.array([document]), 10_000, 10_000)
    batch, model = collate(run.corpus, windows), run.model("soft")
    scores = model.scores(batch)
    chances = scores.softmax(-1).numpy()
    sentences = len(data.actions)
    np.testing.assert_allclose(data.planner["true"], chances[np.arange(sentences), data.actions], atol=1e-5)
    np.testing.assert_allclose(data.planner["probability"][:-1], np.sort(chances)[:, :-6:-1], atol=1e-5)
    given = data.conditioning
    weights = (scores / run.temperature("soft")).softmax(-1).numpy()
    np.testing.assert_allclose(given["weight"][:-1], weights.max(1), atol=1e-5)
    np.testing.assert_array_equal(given["action"][:-1], weights.argmax(1))
    # Position t carries the action of the sentence that holds token t + 1.
    carried = [np.flatnonzero(data.first_token <= t + 1)[-1] for t in range(len(data.pieces) - 1)]
    np.testing.assert_array_equal(given["carried"][:-1], carried)
    assert data.complete
    assert given["carried"][-1] == sentences
    # Actions are added where heads are read, from the second layer on: what leaves these layers has changed.
    skipped = run.config.conditioning.skip_layers
    assert given["changed"] == [False, *(layer >= skipped for layer in range(LAYERS))]
    assert VARIANTS["soft"].evaluation.needs_scores


def test_the_base_lm_is_not_conditioned(plain: LensData):
    assert plain.conditioning is None
    assert plain.planner["top"].shape == (len(plain.actions) + 1, 5)


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
    assert set(probes.baselines) == {"prior", "bigram", "planner"}


def test_examples_are_training_sentences_of_the_action(probed_run: Run, plain: LensData):
    corpus = probed_run.corpus
    train = corpus.sentences(corpus.documents("train"))
    for action, shown in plain.examples.items():
        own = train[corpus.actions[train] == action]
        assert set(shown) <= set(corpus.sentence_texts(own))
        assert len(shown) == len(set(shown)) <= 3
        nearest = np.linalg.norm(corpus.embeddings[own] - corpus.codebook.centroids[action], axis=1).argmin()
        assert shown[0] == corpus.sentence_texts([own[nearest]])[0]
    assert {*plain.actions, *plain.top.ravel(), *plain.planner["top"].ravel()} == set(plain.examples)


def test_one_sentence_has_no_next_one(probed_run: Run):
    data = read_text(probed_run, "Noni noni")
    assert np.isnan(data.true_probability).all()
    assert not data.complete
    assert np.isfinite(data.probability).all()


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
    sentences = np.arange(*corpus.document_sentences[document : document + 2])
    np.testing.assert_array_equal(data.actions, corpus.actions[sentences])
    anchors = np.asarray(corpus.first_token[sentences[1:]])
    at = anchors - 1 - corpus.document_tokens[document] - 1
    examples = Examples.of_tokens(np.full(len(at), document), anchors, sentences[1:], np.zeros((len(at), 1)))
    (values,) = Reader(run, "joint", [("hook_resid_post", 1)], [1]).read(examples)
    cell = SavedProbes(run.folder / "probes", "joint", 0)[Cell("hook_resid_post", 1, 1)]
    np.testing.assert_allclose(
        data.probability[0, at], cell.log_probabilities(values[0, 0]).exp().max(1).values, atol=1e-5
    )
    scores = run.planner("joint")(torch.from_numpy(run.corpus_of("joint").embeddings[sentences])[None])[0]
    chances = scores.softmax(-1).detach().numpy()
    np.testing.assert_allclose(
        data.planner["true"], chances[np.arange(len(sentences)), data.actions], atol=1e-5
    )
    # The planning token of a sentence comes after the token that predicts its first one.
    carried = np.searchsorted(data.first_token, np.arange(len(data.pieces)), side="right") - 1
    np.testing.assert_array_equal(data.conditioning["carried"], carried)
    assert not data.probes.quality.injected.any()
