"""Vectors as targets: ranks by brute force, planted vectors, embeddings of sentences, and their baselines."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

import probekit
from probekit.config import ProbeSettings
from probekit.errors import ProbekitError
from probekit.probing import baselines, vectors
from probekit.probing import probe as probing
from probekit.probing.activations import ActivationReader
from probekit.probing.baselines import counted_examples
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, TESTED_ON, make_grid
from probekit.probing.results import Cell, main_metric
from probekit.probing.targets import NO_LABEL, Target, find_target, sentence_target
from probekit.probing.vectors import Candidates, nearest
from probekit.reports import plot_probes, tables
from probekit.run.run import Run

SIGNAL = 0.7
"""The share of the vectors' variance that the planted activations hold."""


# Ranks


def ranked(predicted: np.ndarray, pool: np.ndarray, true: int, centre: np.ndarray) -> tuple[float, float]:
    """The expected reciprocal rank, and share in the first 1 %, over all orders of equal cosines."""

    def unit(vectors: np.ndarray) -> np.ndarray:
        norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
        return np.divide(vectors, norm, out=np.zeros_like(vectors), where=norm > 0)

    cosines = unit(pool - centre) @ unit(predicted - centre)
    ahead = cosines - cosines[true]
    ahead, tied = (ahead > 1e-6).sum(), (np.abs(ahead) <= 1e-6).sum()
    ranks = [1 + ahead + order.index(0) for order in itertools.permutations(range(tied))]
    return float(np.mean(1 / np.array(ranks))), float(np.mean(np.array(ranks) <= np.ceil(len(pool) / 100)))


def test_ranks_are_those_of_brute_force():
    generator = np.random.default_rng(0)
    known = generator.normal(size=(150, 4)) + 3
    known[40] = known[7]  # the same vector twice is one candidate
    centre, step = np.array([3.0, 3.0, 2.5, 3.0]), np.array([1, 1, 0, 0])
    known[60], known[61] = centre + step, centre + 2 * step  # equal cosines
    labels = generator.permutation(np.repeat(np.arange(150), 2))
    candidates = Candidates(known, labels, centre)
    pool = np.unique(known, axis=0)
    assert candidates.count == len(pool) == 149
    predicted = known[labels] + generator.normal(size=(2, 300, 4)) * [[[0.5]], [[3.0]]]
    found = candidates.scores(torch.from_numpy(predicted[:, 20:250]), slice(20, 250))
    for reader, example in itertools.product(range(2), range(230)):
        row = labels[20 + example]
        true = int(np.flatnonzero((pool == known[row]).all(1))[0])
        given = predicted[reader, 20 + example]
        expected = ranked(given, pool, true, centre)
        assert found["reciprocal_rank"][reader, example] == pytest.approx(expected[0], abs=1e-6)
        assert found["first_percent"][reader, example] == pytest.approx(expected[1], abs=1e-6)
        own = known[row] - centre
        cosine = own @ (given - centre) / np.linalg.norm(own) / np.linalg.norm(given - centre)
        assert found["cosine"][reader, example] == pytest.approx(cosine, abs=1e-5)
    assert found["reciprocal_rank"][0].mean() > 3 * found["reciprocal_rank"][1].mean()


def test_the_vectors_themselves_come_first_and_the_mean_is_at_chance():
    generator = np.random.default_rng(1)
    known, centre = generator.normal(size=(420, 6)), np.full(6, 0.3)
    labels = np.arange(420)
    candidates = Candidates(known, labels, centre)
    mean = np.tile(centre, (420, 1)) + 1e-14  # but for rounding
    found = candidates.scores(torch.from_numpy(np.stack([known, mean])), slice(0, 420))
    assert found["reciprocal_rank"][0] == pytest.approx(1)
    assert (found["first_percent"][0] == 1).all()
    assert found["cosine"][0] == pytest.approx(1, abs=1e-6)
    harmonic = sum(1 / n for n in range(1, 421)) / 420
    assert candidates.chance == pytest.approx((harmonic, 5 / 420))
    assert found["reciprocal_rank"][1] == pytest.approx(harmonic)
    assert found["first_percent"][1] == pytest.approx(5 / 420)
    assert (found["cosine"][1] == 0).all()


def test_predictions_that_know_nothing_are_at_chance():
    generator = np.random.default_rng(2)
    known = generator.normal(size=(300, 8))
    candidates = Candidates(known, np.arange(300), np.zeros(8))
    noise = torch.from_numpy(generator.normal(size=(20, 300, 8)))
    found = candidates.scores(noise, slice(0, 300))
    for name, chance in zip(("reciprocal_rank", "first_percent"), candidates.chance, strict=True):
        error = found[name].mean(0).std() / np.sqrt(300)
        assert abs(found[name].mean() - chance) < 4 * error


def test_of_many_vectors_some_are_candidates_and_the_true_one(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(3)
    known = generator.normal(size=(300, 5))
    monkeypatch.setattr(vectors, "MOST_CANDIDATES", 100)
    candidates = Candidates(known, np.arange(300), np.zeros(5))
    assert candidates.count == 100
    predicted = known + generator.normal(size=known.shape)
    found = candidates.scores(torch.from_numpy(predicted[None]), slice(0, 300))["reciprocal_rank"][0]
    for example in range(300):
        others = np.delete(known[::3], example // 3, 0) if example % 3 == 0 else known[::3]
        pool = np.concatenate([known[[example]], others])
        assert found[example] == pytest.approx(ranked(predicted[example], pool, 0, np.zeros(5))[0], abs=1e-6)


# Arrays


def arrays(shuffled: bool = False, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations of two layers, of which the second holds vectors linearly; the vectors, and groups."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(2, 3000, 10)) + 20
    signal = X[1] @ generator.normal(size=(10, 16))
    noise = generator.normal(size=signal.shape) * signal.std(0) * np.sqrt(1 / SIGNAL - 1)
    Y = 5 + signal + noise
    return X, generator.permutation(Y) if shuffled else Y, np.repeat(np.arange(300), 10)


def test_planted_vectors_are_read_where_they_are_with_the_r2_that_they_must_have():
    X, Y, groups = arrays()
    split = np.array(["train", "validation", "test"])[np.searchsorted([180, 240], groups, side="right")]
    results = probekit.fit_grid(X, Y, groups=groups, split=split, l2=[1e-4], resamples=300)
    table = results.table
    rows = table[table.reader == "probe"].set_index("layer")
    assert rows.r2[1] == pytest.approx(SIGNAL, abs=0.02)
    assert rows.r2_low[1] < SIGNAL < rows.r2_high[1]
    assert abs(rows.r2[0]) < 0.01
    train, test = split == "train", split == "test"
    scaler = StandardScaler().fit(X[1, train])
    ridge = Ridge(alpha=1e-4 * train.sum()).fit(scaler.transform(X[1, train]), Y[train])
    predicted, centre = ridge.predict(scaler.transform(X[1, test])), Y[train].mean(0)
    error = ((predicted - Y[test]) ** 2).sum()
    assert rows.r2[1] == pytest.approx(1 - error / ((Y[test] - centre) ** 2).sum(), abs=1e-5)
    assert rows.squared_error[1] == pytest.approx(error / test.sum(), rel=1e-4)
    ranks = [ranked(vector, Y[test], n, centre) for n, vector in enumerate(predicted)]
    assert rows.reciprocal_rank[1] == pytest.approx(np.mean([rank for rank, _ in ranks]), abs=2e-3)
    assert rows.first_percent[1] == pytest.approx(np.mean([first for _, first in ranks]), abs=2e-3)
    assert rows.first_percent_low[1] < rows.first_percent[1] < rows.first_percent_high[1]
    mean = table.set_index("reader").loc["mean"]
    assert (mean.r2, mean.cosine) == (0, 0)
    assert mean.reciprocal_rank == pytest.approx(sum(1 / n for n in range(1, 601)) / 600)
    assert mean.first_percent == pytest.approx(6 / 600)
    assert rows.reciprocal_rank_low[1] > 10 * mean.reciprocal_rank
    # A probe of the mean has the ranks of chance, summed in another order.
    low, high = rows.reciprocal_rank_low[0] - 1e-9, rows.reciprocal_rank_high[0] + 1e-9
    assert low <= mean.reciprocal_rank <= high
    assert rows.control_r2.abs().max() < 0.01, "vectors of other examples"
    assert rows.selectivity[1] == pytest.approx(rows.r2[1] - rows.control_r2[1])
    assert rows.gain[1] == pytest.approx(rows.r2[1])
    assert main_metric(table) == "r2"
    assert rows[["accuracy", "bits", "cross_entropy"]].isna().all(axis=None)
    scored = results.score(X[1, test], 1)
    assert scored.columns.tolist() == [f"predicted_{n}" for n in range(16)]
    np.testing.assert_allclose(scored, predicted, atol=1e-3)


def test_shuffled_vectors_are_at_zero():
    for seed in range(4):
        X, Y, groups = arrays(shuffled=True, seed=seed)
        table = probekit.fit_grid(X, Y, groups=groups, control=False, resamples=300).table
        rows = table[table.reader == "probe"]
        chance = table.reciprocal_rank[table.reader == "mean"].iloc[0]
        assert rows.r2.abs().max() < 0.01
        assert rows.gain_low.max() <= 0
        # A probe of the mean has the ranks of chance, summed in another order.
        low, high = rows.reciprocal_rank_low - 1e-9, rows.reciprocal_rank_high + 1e-9
        assert ((low <= chance) & (chance <= high)).all()


def test_arrays_of_labels_that_are_no_vectors_are_refused():
    X = np.random.default_rng(0).normal(size=(60, 4))
    shape = r"must be \[examples, outputs\], of 60 examples, without a kind; finite, not all the same"
    cases = [
        (np.ones((59, 2)), {}, r"labels \[59, 2\] " + shape),
        (np.ones((60, 2)), {}, r"labels \[60, 2\] " + shape),
        (np.full((60, 2), np.nan), {}, shape),
        (X, {"kind": "numbers"}, shape),
        (X, {"solvers": "softmax"}, "softmax, which read classes, and 'label' holds vectors"),
    ]
    for labels, options, message in cases:
        with pytest.raises(ProbekitError, match=message):
            probekit.fit_grid(X, labels, **options)


# On a run


SETTINGS = {
    "probe.variants": ["none"],
    "probe.target": "embedding",
    "probe.positions": [1, 3],
    "probe.horizons": [1, 2],
}


@pytest.fixture(scope="module")
def probed(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the tiny run whose sentences' embeddings are probed."""
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path_factory.mktemp("vectors") / "run"))
    probing.probe(run, SETTINGS, quiet=True)
    return run.with_settings(SETTINGS | {"probe.solvers": ["ridge"]})


def test_embeddings_of_sentences_are_probed_beside_their_baselines(probed: Run):
    table = probed.probes()
    free = ["mean", "previous vector", "bag of words", "bag of words (last sentence)"]
    assert set(table.reader) == {"probe", "token embedding", *free}
    assert (table.r2[table.reader == "mean"] == 0).all()
    metrics = ["r2", "cosine", "reciprocal_rank", "first_percent", "squared_error"]
    assert table[[f"{name}{end}" for name in metrics for end in ("", "_low", "_high")]].notna().all(axis=None)
    probes = table[table.reader == "probe"]
    assert probes[["selectivity", "control_r2", "gain_low"]].notna().all(axis=None)
    for row in probes.itertuples():
        own = table[(table.position == row.position) & (table.horizon == row.horizon)].set_index("reader")
        assert row.gain_over == own.loc[free].validation_squared_error.idxmin()
        assert row.gain == pytest.approx(row.r2 - own.r2[row.gain_over])
    corpus = probed.corpus
    grid = make_grid(corpus, probed.config.probe, find_target(corpus, "embedding"), probed.config.seed)
    for horizon in (1, 2):
        distinct = len(np.unique(corpus.embeddings[grid.labels(TESTED_ON, horizon)], axis=0))
        means = table[(table.reader == "mean") & (table.horizon == horizon)]
        assert means.reciprocal_rank.to_numpy() == pytest.approx((1 / np.arange(1, distinct + 1)).mean())


def test_probes_are_those_of_scikit_learn_on_the_activations_that_are_read(probed: Run):
    corpus, table = probed.corpus, probed.probes()
    target = find_target(corpus, "embedding")
    grid = make_grid(corpus, probed.config.probe, target, probed.config.seed)
    reader = ActivationReader(probed, "none", [("hook_resid_post", 2)], grid.positions)
    X = {split: reader.read(part)[0][0, 1].double().numpy() for split, part in grid.examples.items()}
    y = {split: corpus.embeddings[grid.labels(split, 2)] for split in grid.examples}
    row = table[
        (table.reader == "probe") & (table.layer == 2) & (table.position == "3") & (table.horizon == 2)
    ]
    scaler = StandardScaler().fit(X[FITTED_ON])
    errors = {}
    for l2 in (*ProbeSettings().l2, 10.0, 100.0):
        ridge = Ridge(alpha=l2 * len(X[FITTED_ON])).fit(scaler.transform(X[FITTED_ON]), y[FITTED_ON])
        squared = {s: ((ridge.predict(scaler.transform(X[s])) - y[s]) ** 2).sum(1).mean() for s in X}
        errors[l2] = squared[CHOSEN_ON], squared[TESTED_ON]
    level = ((y[TESTED_ON] - y[FITTED_ON].mean(0)) ** 2).sum(1).mean()
    chosen, tested = errors[row.l2.item()]
    assert chosen == min(error for error, _ in errors.values())
    assert row.validation_squared_error.item() == pytest.approx(chosen, rel=1e-4)
    assert row.squared_error.item() == pytest.approx(tested, rel=1e-4)
    assert row.r2.item() == pytest.approx(1 - tested / level, abs=1e-4)


def test_the_previous_vector_and_the_last_sentence_are_ridge_too(probed: Run):
    corpus, table = probed.corpus, probed.probes()
    grid = make_grid(corpus, probed.config.probe, find_target(corpus, "embedding"), probed.config.seed)
    training = counted_examples(corpus, probed.config.probe, grid, probed.config.seed)
    parts = {FITTED_ON: training} | {split: grid.examples[split] for split in (CHOSEN_ON, TESTED_ON)}
    embeddings = corpus.embeddings

    def previous(examples) -> np.ndarray:
        assert (examples.sentence > corpus.document_sentences[examples.document]).all()
        return np.hstack([embeddings[examples.sentence - 1], np.zeros((len(examples), 1))])

    def last(examples) -> np.ndarray:
        first = corpus.first_token[examples.sentence - 1]
        return np.stack(
            [
                np.log1p(np.bincount(corpus.tokens[a:b], minlength=len(corpus.tokenizer)))
                for a, b in zip(first, examples.start, strict=True)
            ]
        )

    for name, features in {"previous vector": previous, "bag of words (last sentence)": last}.items():
        X = {split: features(examples) for split, examples in parts.items()}
        y = {split: embeddings[examples.labels[:, 0]] for split, examples in parts.items()}
        scaler = StandardScaler().fit(X[FITTED_ON])
        found = {}
        for l2 in baselines.BAG_PENALTIES:
            ridge = Ridge(alpha=l2 * len(X[FITTED_ON])).fit(scaler.transform(X[FITTED_ON]), y[FITTED_ON])
            error = {s: ((ridge.predict(scaler.transform(X[s])) - y[s]) ** 2).sum(1).mean() for s in X}
            found[error[CHOSEN_ON]] = error[TESTED_ON]
        row = table[(table.reader == name) & (table.position == "1") & (table.horizon == 1)]
        assert row.validation_squared_error.item() == pytest.approx(min(found), rel=1e-3)
        assert row.squared_error.item() == pytest.approx(found[min(found)], rel=1e-3)


def test_vectors_made_of_a_hook_are_read_best_there(tiny_run: Run, tmp_path: Path):
    """What attention writes in layer 2, right before a sentence, by a linear map, and noise."""
    run = Run.open(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    corpus, location = run.corpus, "hook_attn_out"
    settings = {"probe.variants": ["none"], "probe.positions": [1], "probe.solvers": ["ridge"]}
    run = run.with_settings(
        settings | {"probe.locations": [location], "probe.l2": [1e-6], "probe.control": False}
    )
    grid = make_grid(corpus, run.config.probe, find_target(corpus, "embedding"), 0)
    reader = ActivationReader(run, "none", [(location, 2)], [1])
    rows = np.concatenate([part.sentence for part in grid.examples.values()])
    X = torch.cat([reader.read(part)[0] for part in grid.examples.values()], 2)[0, 0].double().numpy()
    generator = np.random.default_rng(0)
    basis = np.linalg.svd((X - X.mean(0)) / np.sqrt(len(X)), full_matrices=False)
    whitened = (X - X.mean(0)) @ basis.Vh[:8].T / basis.S[:8]
    signal = whitened @ generator.normal(size=(8, 6))
    noise = generator.normal(size=signal.shape) * signal.std(0) * np.sqrt(1 / SIGNAL - 1)
    of_sentences = np.full(len(corpus.first_token), NO_LABEL)
    of_sentences[rows] = np.arange(len(rows))
    target = sentence_target(corpus, "made", 0, of_sentences, vectors=signal + noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "target_of", lambda corpus, config: target)
        table = probing.probe(run, quiet=True).table
    rows = table[table.reader == "probe"].set_index("layer")
    assert rows.r2[2] == pytest.approx(SIGNAL, abs=0.06)
    assert rows.r2[2] > rows.r2[[0, 1]].max()
    assert rows.r2_low[2] > table.r2_high[table.reader == "token embedding"].item()


def test_tables_and_plots_show_vectors(probed: Run):
    table = probed.probes()
    best = probing.ProbeResults(table, probed.folder / "probes").best_cells()
    cells, beside = (part.cells for part in tables.probe_tables(table, best))
    for shown in (cells, beside):
        for column in ("R² ↑", "cosine ↑", "mean reciprocal rank ↑", "in the first 1 % ↑"):
            assert shown[column].str.contains(r"\[").all()
        assert not {"rank correlation ↑", "accuracy ↑"} & {*shown.columns}
    assert "previous vector" in set(beside.reader)
    for metric in (None, "first_percent", "gain"):
        assert plot_probes.plot_probes(probed, metric=metric).axes
        figure = plot_probes.plot_curve(probed, metric=metric)
        assert metric == "gain" or "previous vector" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_a_run_of_vectors_is_scored_and_refused_by_causal_tests(probed: Run):
    scored = probekit.score(probed.folder, ["One two three.", "Four."], quiet=True)
    assert scored.columns[2:].tolist() == [f"predicted_{n}" for n in range(16)]
    with pytest.raises(ProbekitError, match=r"holds probes of 'embedding' \(vectors, .* need a class"):
        probekit.intervene(probed.folder, quiet=True)


def test_the_lens_shows_the_nearest_sentences_of_what_scores_predict(probed: Run, tmp_path: Path):
    corpus = probed.corpus
    split = {name: corpus.sentences(corpus.documents(name)) for name in ("probe", "test")}
    first = int(corpus.document_sentences[corpus.documents("test")[0]])
    text = " ".join(corpus.sentence_texts(first + np.arange(2)))
    shown = probekit.lens(probed.folder, text, tmp_path / "lens.html", quiet=True)
    data, (reading,) = shown.data, shown.data.readings
    cells = [(point, position) for point in data.probes.points for position in data.probes.positions]
    c = len(cells) - 2
    (location, layer), position = cells[c]
    key = Cell(location, layer, position, 1, "ridge").key
    scored = probekit.score(probed.folder, [text], key, tokens=True, quiet=True)
    predicted = scored[[f"predicted_{n}" for n in range(16)]].to_numpy()
    centre = corpus.embeddings[split["probe"]].mean(0)

    def units(vectors: np.ndarray) -> np.ndarray:
        away = vectors - centre
        return np.asarray(away / np.linalg.norm(away, axis=1, keepdims=True))

    cosines = units(predicted) @ units(corpus.embeddings[split["test"]]).T
    np.testing.assert_allclose(reading.read[0, c, :-1], cosines.max(1), atol=1e-4)
    best = [int(np.flatnonzero(split["test"] == number)[0]) for number in reading.top[0, c, :-1]]
    np.testing.assert_allclose(cosines[np.arange(len(best)), best], cosines.max(1), atol=1e-4)
    second = len(corpus.first_token) + 1  # the text is no document of the corpus
    token = int(data.first_token[1]) - position
    assert data.truth.labels[data.probes.positions.index(position), token] == second
    own = units(predicted[[token]]) @ units(corpus.embeddings[[first + 1]]).T
    assert reading.of_true[c, token] == pytest.approx(own.item(), abs=1e-4)
    assert data.names[second][1].strip() == corpus.sentence_texts(np.array([first + 1]))[0]
    assert all(len(short) <= 24 for short, _ in data.names.values())
    assert "The embedding of a sentence" in shown.html

    document = int(corpus.documents("test")[0])
    whole = probekit.lens(probed.folder, corpus.texts[document].text, tmp_path / "w.html", quiet=True).data
    known = whole.truth.labels[~np.isnan(whole.truth.labels)].astype(int)
    assert {*known} <= {*range(*corpus.document_sentences[document : document + 2])}


def test_a_sentence_without_known_words_has_no_vector(tiny_run: Run):
    corpus = tiny_run.corpus
    blank = np.array(corpus.embeddings)
    blank[5] = 0
    target = find_target(replace(corpus, embeddings=blank), "embedding")
    assert isinstance(target, Target)
    assert (target.kind, target.outputs, target.classes) == ("vectors", blank.shape[1], 0)
    assert np.flatnonzero(target.of_sentences == NO_LABEL).tolist() == [5]
    np.testing.assert_array_equal(target.values(np.array([7, 9])), corpus.embeddings[[7, 9]])


def test_the_nearest_sentences_are_those_of_the_test_documents_by_brute_force(tiny_run: Run):
    corpus = tiny_run.corpus
    sentences = {split: corpus.sentences(corpus.documents(split)) for split in ("probe", "test")}
    centre = corpus.embeddings[sentences["probe"]].mean(0)
    predicted = corpus.embeddings[sentences["probe"][:9]] + 0.1
    found = nearest(tiny_run, torch.from_numpy(predicted), 4)
    known = corpus.embeddings[sentences["test"]]
    distinct, first = np.unique(known, axis=0, return_index=True)
    units = (distinct - centre) / np.linalg.norm(distinct - centre, axis=1, keepdims=True)
    cosines = (predicted - centre) @ units.T
    for row, cosine in zip(found, cosines, strict=True):
        assert row.tolist() == sentences["test"][first[np.argsort(-cosine)[:4]]].tolist()
