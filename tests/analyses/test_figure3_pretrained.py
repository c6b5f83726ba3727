"""The script probes LMs beside a planner, says what it read, and goes on where it was."""

import json
from pathlib import Path

import figure3_pretrained
import numpy as np
import pandas as pd
import pytest
from random_lms import save_random_llama

from probekit.config import PlantedSettings
from probekit.errors import ProbekitError
from probekit.planted.corpus import generate
from probekit.probing.targets import find_examples, find_target
from probekit.run.run import Run


def test_a_mixture_finds_what_labels_were_drawn_from():
    rng = np.random.default_rng(0)
    truth = np.log(rng.dirichlet(np.ones(5), size=6000))
    labels = np.array([rng.choice(5, p=row) for row in np.exp(truth)])
    flat = 0.5 * truth - np.log(np.exp(0.5 * truth).sum(axis=1, keepdims=True))
    noise = np.log(rng.dirichlet(np.ones(5), size=6000))
    weights = figure3_pretrained.mixture_weights([flat, noise], labels)
    np.testing.assert_allclose(weights, [2.0, 0.0], atol=0.1)
    np.testing.assert_allclose(figure3_pretrained.mixture([flat, noise], [2.0, 0.0]), truth, atol=1e-9)


def test_parts_of_an_action_are_a_chain():
    said = np.log(np.random.default_rng(0).dirichlet(np.ones(4), size=3))
    p = np.exp(said)
    parts = figure3_pretrained.by_part(said, np.array([2, 0, 3]), np.array([2, 1, 0]))
    stays = [p[0, 2], 1 - p[1, 1], 1 - p[2, 0]]
    np.testing.assert_allclose(np.exp(parts["stays"]), stays)
    np.testing.assert_allclose(np.exp(parts["other"]), [np.nan, p[1, 0] / stays[1], p[2, 3] / stays[2]])
    np.testing.assert_allclose(parts["action"], parts["stays"] + np.nan_to_num(parts["other"]))


def test_features_of_sentences_are_those_before(tiny_run: Run):
    corpus = tiny_run.corpus
    examples = find_examples(
        corpus, corpus.documents("test")[:3], find_target(corpus, "action"), (1,), "start"
    )
    examples = examples[examples.sentence > corpus.document_sentences[examples.document]]
    found = figure3_pretrained.sentence_features(corpus, examples)
    for row, document, sentence in zip(found, examples.document, examples.sentence, strict=True):
        before = corpus.embeddings[corpus.document_sentences[document] : sentence]
        np.testing.assert_allclose(row, np.concatenate([before[-1], before.mean(axis=0)]), atol=1e-6)


def test_probes_stand_beside_what_counting_and_a_planner_know(tmp_path: Path):
    texts = [document.text for document in generate(PlantedSettings(documents=240)).documents()]
    path = tmp_path / "articles.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    lm = save_random_llama(tmp_path / "lm", texts, positions=128)
    words = [str(path), "--models", str(lm), "--encoder", "tfidf", "--layers", "2"]
    words += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "figure3.png")]
    figure3_pretrained.main(words)
    numbers = pd.read_csv(tmp_path / "figure3.csv")
    assert str(tmp_path) not in (tmp_path / "figure3.json").read_text()
    probes = numbers[(numbers.reader == "probe") & numbers.part.isna()]
    cells = probes.groupby(["variant", "layer", "distance", "horizon"]).size()
    assert len(cells) == 2 * 2 * len(figure3_pretrained.DISTANCES) * len(figure3_pretrained.HORIZONS)
    assert (cells == 1).all()
    assert {*figure3_pretrained.BESIDE} < {*numbers.reader}
    planner = numbers[(numbers.reader == "planner") & numbers.part.isna()].bits.iloc[0]
    near = probes[(probes.horizon == 1) & (probes.distance == 1)]
    np.testing.assert_allclose(near.over_planner, near.bits - planner, atol=1e-9)
    assert probes[probes.horizon > 1].over_planner.isna().all(), "the planner plans one sentence"
    for row in figure3_pretrained.best_cells(numbers).itertuples():
        same = probes[(probes.variant == row.variant) & (probes.horizon == row.horizon)]
        losses = same[same.distance == 1].validation_cross_entropy
        assert row.validation_cross_entropy == losses.min()

    beyond = numbers[numbers.part.notna()].set_index(["reader", "part"])
    assert {*beyond.index} == {
        (reader, part) for reader in figure3_pretrained.READERS for part in figure3_pretrained.PARTS
    }
    sums = beyond.value * beyond.examples
    stays, other = (sums.xs(part, level="part") for part in ("stays", "other"))
    action = beyond.xs("action", level="part")
    np.testing.assert_allclose((stays + other) / action.examples, action.value, atol=1e-9)
    for name in ("counts", "planner", "text"):
        level = beyond.loc[name].value.reindex(beyond.index, level=1)
        np.testing.assert_allclose(beyond[f"over_{name}"], beyond.value - level, atol=1e-9)

    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.parquet")}
    figure3_pretrained.main(words)
    assert made == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.parquet")}
    with pytest.raises(ProbekitError, match="holds results of other passages"):
        figure3_pretrained.main([*words, "--documents", "100"])
