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
    probes = numbers[numbers.reader == "probe"]
    cells = probes.groupby(["variant", "layer", "distance", "horizon"]).size()
    assert len(cells) == 2 * 2 * len(figure3_pretrained.DISTANCES) * len(figure3_pretrained.HORIZONS)
    assert (cells == 1).all()
    assert {*figure3_pretrained.BESIDE} < {*numbers.reader}
    planner = numbers[numbers.reader == "planner"].bits.iloc[0]
    near = probes[(probes.horizon == 1) & (probes.distance == 1)]
    np.testing.assert_allclose(near.over_planner, near.bits - planner, atol=1e-9)
    assert probes[probes.horizon > 1].over_planner.isna().all(), "the planner plans one sentence"
    for row in figure3_pretrained.best_cells(numbers).itertuples():
        same = probes[(probes.variant == row.variant) & (probes.horizon == row.horizon)]
        losses = same[same.distance == 1].validation_cross_entropy
        assert row.validation_cross_entropy == losses.min()

    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.parquet")}
    figure3_pretrained.main(words)
    assert made == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.parquet")}
    with pytest.raises(ProbekitError, match="holds results of other passages"):
        figure3_pretrained.main([*words, "--documents", "100"])
