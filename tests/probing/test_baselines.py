"""Baselines and ceilings of the grid against walking through the corpus, one sentence after the other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probekit.data.corpus import export_sentences
from probekit.evaluation.action_metrics import STRENGTHS, fit_bigram
from probekit.evaluation.baselines import SkipNgram, planner_log_probabilities
from probekit.planted.ceilings import ceiling_log_probabilities, position_ceiling
from probekit.probing import baselines
from probekit.probing.baselines import ORDER, baseline_sums
from probekit.probing.grid import Grid, make_grid
from probekit.probing.labels import target_of
from probekit.probing.results import CEILING
from probekit.run.run import Run

DISTANCES, HORIZONS = (1, 9), (1, 2)
SETTINGS = {"probe.positions": list(DISTANCES), "probe.horizons": list(HORIZONS)}
CELLS = [(distance, horizon) for distance in DISTANCES for horizon in HORIZONS]

Walked = list[tuple[int, int, int]]
"""Document, anchor token and sentence of every example."""


def walk(run: Run, documents: np.ndarray, ahead: int = max(HORIZONS)) -> Walked:
    """Every sentence that the farthest distance reaches and that so many sentences are there from."""
    corpus, found = run.corpus, []
    for document in documents.tolist():
        first, last = corpus.document_sentences[document : document + 2].tolist()
        for sentence in range(first, last - ahead + 1):
            anchor = int(corpus.first_token[sentence])
            if anchor - max(DISTANCES) > corpus.document_tokens[document]:
                found.append((document, anchor, sentence))
    return found


@pytest.fixture(scope="module")
def walked(tiny_run: Run) -> dict[str, Walked]:
    return {
        "counted": walk(tiny_run, counted_in(tiny_run)),
        "test": walk(tiny_run, tiny_run.corpus.documents("test")),
    }


@pytest.fixture(scope="module")
def run(tiny_run: Run) -> Run:
    return tiny_run.with_settings(SETTINGS)


def grid_of(run: Run, seed: int = 0) -> Grid:
    probe = run.config.probe
    return make_grid(run.corpus, probe, target_of(run.corpus, run.config), seed)


@pytest.fixture(scope="module")
def grid(run: Run) -> Grid:
    return grid_of(run)


@pytest.fixture(scope="module")
def rows(run: Run, grid: Grid) -> dict[tuple[str, int, int], dict[str, Any]]:
    return rows_of(run, grid)


def rows_of(run: Run, grid: Grid) -> dict[tuple[str, int, int], dict[str, Any]]:
    """Head and sums by document, by reader, distance and horizon."""
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    for part in baseline_sums(run, grid):
        for number, head in enumerate(part.readers):
            key = head["reader"], head["position"], head["horizon"]
            assert key not in found
            found[key] = {"head": head} | {name: sums[:, number] for name, sums in part.sums.items()}
    return found


def check(row: dict[str, Any], log_p: np.ndarray, labels: np.ndarray, document: np.ndarray) -> None:
    """A row's sums are those of log-probabilities `[examples, classes]` of the examples, by document."""
    own = np.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    ahead = (log_p > own[:, None]).sum(axis=1)
    ties = (log_p == own[:, None]) & (np.arange(log_p.shape[1]) < labels[:, None])
    rank = ahead + ties.sum(axis=1)
    expected = {"cross_entropy": -own, "correct": rank == 0, "top5": rank < 5}
    for name, values in expected.items():
        sums = [values[document == number].sum() for number in dict.fromkeys(document.tolist())]
        np.testing.assert_allclose(row[name], sums, rtol=1e-9, atol=1e-9)


def counted_in(run: Run) -> np.ndarray:
    """Documents that baselines count in: those of training, and those that probes are fitted on."""
    return np.sort(np.concatenate([run.corpus.documents("train"), run.corpus.documents("probe")]))


def columns(walked: Walked) -> tuple[np.ndarray, ...]:
    document, anchor, sentence = np.array(walked).T
    return document, anchor, sentence


def test_the_readers_of_the_planted_corpus(rows: dict):
    everywhere = {"prior", "bigram", "bigram (current action)", "skip n-gram"}
    everywhere |= {f"ceiling ({of})" for of in ("actions", "words", "tokens read")}
    expected = {(reader, *cell) for reader in everywhere for cell in CELLS}
    # A planner plans the next sentence alone.
    expected |= {
        (reader, distance, 1) for reader in ("planner", "planner after joint") for distance in DISTANCES
    }
    assert set(rows) == expected


def shares(labels: np.ndarray, classes: int = 8) -> np.ndarray:
    return (np.bincount(labels, minlength=classes) + 0.5) / (len(labels) + classes / 2)


@pytest.mark.parametrize(("distance", "horizon"), CELLS)
def test_prior(rows: dict, walked: dict, run: Run, grid: Grid, distance: int, horizon: int):
    actions = np.asarray(run.corpus.actions)
    document, _, sentence = columns(walked["test"])
    prior = np.log(shares(actions[columns(walked["counted"])[2] + horizon - 1]))
    row = rows["prior", distance, horizon]
    check(row, np.tile(prior, (len(sentence), 1)), actions[sentence + horizon - 1], document)
    chosen = grid.labels("validation", horizon)
    assert row["head"]["validation_cross_entropy"] == pytest.approx(-prior[chosen].mean())


@pytest.mark.parametrize(("distance", "horizon"), CELLS)
@pytest.mark.parametrize("reader", ["bigram", "bigram (current action)"])
def test_bigram(rows: dict, walked: dict, run: Run, grid: Grid, distance: int, horizon: int, reader: str):
    """One is given the action of the last sentence wholly read at the position, the other the last one's."""
    corpus, actions = run.corpus, np.append(run.corpus.actions, -1)

    def given(anchors: np.ndarray, sentences: np.ndarray) -> np.ndarray:
        """Which row of the table; the last one is that of no sentence."""
        found = []
        for anchor, sentence in zip(anchors.tolist(), sentences.tolist(), strict=True):
            last, first = sentence - 1, corpus.document_sentences[corpus.document_of(np.array([sentence]))[0]]
            while (
                reader == "bigram" and last >= first and corpus.first_token[last + 1] > anchor - distance + 1
            ):
                last -= 1
            found.append(actions[last] if last >= first else 8)
        return np.array(found)

    document, anchors, sentence = columns(walked["test"])
    _, train_anchors, train = columns(walked["counted"])
    prior = shares(actions[train + horizon - 1])
    pairs = np.zeros((9, 8))
    np.add.at(pairs, (given(train_anchors, train), actions[train + horizon - 1]), 1)
    examples = grid.examples["validation"]
    chosen, known = examples.sentence, given(examples.start, examples.sentence)
    losses = {}
    for strength in STRENGTHS:
        table = np.log((pairs + strength * prior) / (pairs.sum(axis=1, keepdims=True) + strength))
        losses[strength] = -table[known, actions[chosen + horizon - 1]].mean(), table
    loss, table = min(losses.values(), key=lambda found: found[0])
    row = rows[reader, distance, horizon]
    check(row, table[given(anchors, sentence)], actions[sentence + horizon - 1], document)
    assert row["head"]["validation_cross_entropy"] == pytest.approx(loss)


@pytest.mark.parametrize(("distance", "horizon"), CELLS)
def test_skip_ngram(rows: dict, walked: dict, run: Run, grid: Grid, distance: int, horizon: int):
    """It is given the last tokens up to the one that is read."""
    corpus = run.corpus

    def contexts(anchors: np.ndarray) -> np.ndarray:
        found = []
        for end in (anchors - distance).tolist():
            begin = corpus.document_tokens[np.searchsorted(corpus.document_tokens, end, side="right") - 1]
            found.append(
                [int(corpus.tokens[at]) if at >= begin else -1 for at in range(end, end - ORDER, -1)]
            )
        return np.array(found)

    actions = np.asarray(corpus.actions)
    document, anchor, sentence = columns(walked["test"])
    _, train, of_train = columns(walked["counted"])
    validation = contexts(grid.examples["validation"].start), grid.labels("validation", horizon)
    labels = actions[of_train + horizon - 1].astype(np.int64)
    model = SkipNgram.fit(contexts(train), labels, 8, validation)
    row = rows["skip n-gram", distance, horizon]
    check(row, model.log_probabilities(contexts(anchor)), actions[sentence + horizon - 1], document)
    log_p = model.log_probabilities(validation[0])[np.arange(len(validation[1])), validation[1]]
    assert row["head"]["validation_cross_entropy"] == pytest.approx(-log_p.mean())


@pytest.mark.parametrize("variant", [None, "joint"])
def test_planners(rows: dict, walked: dict, run: Run, variant: str | None):
    corpus, (document, _, sentence) = run.corpus, columns(walked["test"])
    documents = corpus.documents("test")
    every = planner_log_probabilities(run.planner(variant), corpus, documents)
    at = [int(np.flatnonzero(corpus.sentences(documents) == j)[0]) for j in sentence]
    name = f"planner after {variant}" if variant else "planner"
    for distance in DISTANCES:
        check(rows[name, distance, 1], every[at], np.asarray(corpus.actions)[sentence], document)
        assert "validation_cross_entropy" not in rows[name, distance, 1]["head"]


@pytest.mark.parametrize(("distance", "horizon"), CELLS)
def test_ceilings(rows: dict, walked: dict, run: Run, distance: int, horizon: int):
    corpus, (document, anchor, sentence) = run.corpus, columns(walked["test"])
    documents, labels = corpus.documents("test"), np.asarray(corpus.actions)[sentence + horizon - 1]
    at = [int(np.flatnonzero(corpus.sentences(documents) == j)[0]) for j in sentence]
    for name, log_p in ceiling_log_probabilities(run.config, corpus, documents, horizon).items():
        check(rows[name, distance, horizon], log_p[at], labels, document)
    read = position_ceiling(run.config, corpus, anchor - distance, sentence + horizon - 1)
    check(rows["ceiling (tokens read)", distance, horizon], read, labels, document)


# Other targets


def sentence_file(run: Run, folder: Path) -> Path:
    """The table of sentences with a column of the length of each in words, a few of them missing."""
    import pandas as pd

    path = export_sentences(run.corpus, folder / "sentences.parquet")
    table = pd.read_parquet(path)
    words = table.text.str.split().str.len()
    table.assign(words=words.where(table.index % 50 != 0)).to_parquet(path)
    return path


@pytest.mark.parametrize(
    ("settings", "readers"),
    [
        ({"probe.target": "token"}, {"prior", "skip n-gram"}),
        ({"probe.target": "sentence-position"}, {"prior", "skip n-gram"}),
        ({"probe.target": "document-type"}, {"prior", "skip n-gram"}),
        (
            {"probe.target": "words"},
            {"prior", "bigram", "bigram (current action)", "skip n-gram", "bag of words"},
        ),
    ],
)
def test_readers_of_other_targets(tiny_run: Run, tmp_path: Path, settings: dict, readers: set[str]):
    labels = {"probe.labels": str(sentence_file(tiny_run, tmp_path))} if "words" in settings.values() else {}
    run = tiny_run.with_settings(SETTINGS | settings | labels)
    grid = grid_of(run)
    rows = rows_of(run, grid)
    assert {reader for reader, _, _ in rows} == readers
    training = _training_labels(run, grid)
    for distance, horizon in CELLS:
        h = HORIZONS.index(horizon)
        prior = np.log(shares(training[:, h], grid.target.classes))
        tested = grid.labels("test", horizon)
        log_p = np.tile(prior, (len(tested), 1))
        check(rows["prior", distance, horizon], log_p, tested, grid.examples["test"].document)


def _training_labels(run: Run, grid: Grid) -> np.ndarray:
    """Labels of the target for every training sentence that all cells can use."""
    _, anchor, sentence = columns(walk(run, counted_in(run), ahead=1))
    labels = np.stack([grid.target.labels(anchor, sentence, horizon) for horizon in HORIZONS], axis=1)
    return labels[(labels >= 0).all(axis=1)]


def test_the_bigram_of_a_column_is_given_the_label_before(tiny_run: Run, tmp_path: Path):
    labels = {"probe.target": "words", "probe.labels": str(sentence_file(tiny_run, tmp_path))}
    run = tiny_run.with_settings(labels)
    target = target_of(run.corpus, run.config)
    sentences = np.arange(len(run.corpus.first_token))
    found = run.corpus.previous_labels(target.of_sentences, sentences)
    texts = run.corpus.sentence_texts(sentences)
    lengths = sorted({len(text.split()) for text in texts})
    first = set(run.corpus.document_sentences.tolist())
    for j in sentences.tolist():
        known = j not in first and (j - 1) % 50 != 0
        assert found[j] == (lengths.index(len(texts[j - 1].split())) if known else -1)


def test_every_token_as_anchor(tiny_run: Run):
    """Planner and ceiling know of each token's own sentence; others are given what is before it."""
    run = tiny_run.with_settings({"probe.anchors": "token", "probe.positions": [1, 2], "probe.horizons": [2]})
    grid = grid_of(run)
    rows = rows_of(run, grid)
    counted = {"prior", "bigram", "bigram (current action)", "skip n-gram"}
    assert {key[0] for key in rows if key[1] == 1} == counted | {"ceiling (tokens read)"}
    # The ceiling is given how many sentences ahead the anchor's is, which is news two tokens before it.
    assert {key[0] for key in rows if key[1] == 2} == counted
    corpus, test = run.corpus, grid.examples["test"]
    assert len(test) > 4 * len(corpus.sentences(corpus.documents("test")))
    read = position_ceiling(run.config, corpus, test.start - 1, test.sentence + 1)
    check(rows["ceiling (tokens read)", 1, 2], read, test.labels[:, 0], test.document)


# At and behind the first token


def test_what_baselines_know_behind_the_first_token(tiny_run: Run):
    """No bigram is given the label that is asked for, and a ceiling stands where it holds."""
    positions = [1, 0, -1, -40, "last", "mean"]
    run = tiny_run.with_settings({"probe.positions": positions, "probe.horizons": [1, 2]})
    grid = grid_of(run)
    rows, corpus, test = rows_of(run, grid), run.corpus, grid.examples["test"]
    assert grid.positions == tuple(positions)
    ahead = {position for name, position, _ in rows if name in ("ceiling (actions)", "ceiling (words)")}
    assert ahead == {1}
    exact = {
        position: {h for name, at, h in rows if (name, at) == (CEILING, position)} for position in positions
    }
    assert exact == {position: set() if position == -40 else {1, 2} for position in positions}
    nats = [rows[CEILING, position, 1]["cross_entropy"].sum() for position in (1, 0, -1, "last")]
    assert nats == sorted(nats, reverse=True)
    last = position_ceiling(run.config, corpus, test.stop - 1, test.sentence)
    for position in ("last", "mean"):
        check(rows[CEILING, position, 1], last, test.labels[:, 0], test.document)

    current = rows["bigram (current action)", 1, 1]
    for position in positions:
        np.testing.assert_array_equal(rows["bigram", position, 1]["cross_entropy"], current["cross_entropy"])
    # Of the sentence after it, the label of the whole sentence is the one that a bigram is given.
    training = baselines.counted_examples(corpus, run.config.probe, grid, 0)
    chosen = grid.examples["validation"]
    own = fit_bigram(
        corpus.actions[training.sentence].astype(np.int64),
        training.labels[:, 1],
        8,
        (corpus.actions[chosen.sentence].astype(np.int64), chosen.labels[:, 1]),
    )
    log_p = own.log_probabilities(corpus.actions[test.sentence].astype(np.int64))
    for position in ("last", "mean", -40):
        check(rows["bigram", position, 2], log_p, test.labels[:, 1], test.document)
    for position in (0, -1):
        farther = rows["bigram (current action)", position, 2]
        np.testing.assert_array_equal(rows["bigram", position, 2]["cross_entropy"], farther["cross_entropy"])


def test_of_a_token_itself_the_ceiling_is_exact(tiny_run: Run):
    settings = {"probe.anchors": "token", "probe.positions": [0, "mean", -1], "probe.horizons": [1]}
    run = tiny_run.with_settings(settings)
    grid = grid_of(run)
    rows, test = rows_of(run, grid), grid.examples["test"]
    # The token after a sentence's last one is in the next: nothing of that action is left to predict.
    assert {position for name, position, _ in rows if name == CEILING} == {0, "mean"}
    read = position_ceiling(run.config, run.corpus, test.start, test.sentence)
    for position in (0, "mean"):
        check(rows[CEILING, position, 1], read, test.labels[:, 0], test.document)


# What is missing


def test_a_run_that_trained_nothing_has_what_counting_gives(tiny_run: Run, monkeypatch: pytest.MonkeyPatch):
    run = tiny_run.with_settings({"actions.labels": "clusters"})
    finished: Callable[[str], bool] = run.finished
    monkeypatch.setattr(run, "finished", lambda stage: stage in ("corpus", "lm") and finished(stage))
    counted = {"prior", "bigram", "bigram (current action)", "skip n-gram", "bag of words"}
    assert {key[0] for key in rows_of(run, grid_of(run))} == counted


def test_baselines_are_counted_on_whole_documents(run: Run, grid: Grid, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(baselines, "MOST_EXAMPLES", 500)
    training = baselines.counted_examples(run.corpus, run.config.probe, grid, run.config.seed)
    drawn = np.unique(training.document)
    assert set(drawn) < set(counted_in(run))
    assert columns(walk(run, drawn))[1].tolist() == training.start.tolist()
    assert 500 - 16 < len(run.corpus.sentences(drawn)) <= 500
