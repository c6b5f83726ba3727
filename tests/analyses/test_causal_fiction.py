"""The script of causal tests in fiction runs on a tiny LM, and what it draws is what was measured."""

import json
from pathlib import Path

import causal_fiction
import numpy as np
import pandas as pd
import pytest
from random_lms import save_random_llama
from shared.fiction import beginning

from probekit.config import PlantedSettings
from probekit.errors import ProbekitError
from probekit.planted.corpus import generate


def test_passages_are_cut_after_whole_sentences():
    text = "“Go,” she said. He went.\n\nIt rained for days.  The end was near."
    assert beginning({"text": text}, 3) == "“Go,” she said. He went.\n\nIt rained for days."
    assert beginning({"text": text}, 9) == text


def test_speech_is_erased_and_steered_and_the_script_goes_on(tmp_path: Path):
    rng, rows = np.random.default_rng(0), []
    for number, document in enumerate(generate(PlantedSettings(documents=60)).documents()):
        sentences = document.text.removesuffix(".").split(". ")
        spoken = rng.random(len(sentences)) < 0.5
        text = " ".join(f"“{s}.”" if told else f"{s}." for s, told in zip(sentences, spoken, strict=True))
        rows.append({"author": f"Author {number % 3}", "title": f"Title {number}", "text": text})
    path = tmp_path / "fiction.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    lm = save_random_llama(tmp_path / "lm", (row["text"] for row in rows), positions=128)
    out, runs = tmp_path / "causal.png", tmp_path / "runs"
    words = [str(path), "--models", str(lm), "--sentences", "6", "--boundaries", "6", "--reach", "2"]
    words += ["--layers", "1", "--strengths", "2", "--runs", str(runs), "--out", str(out)]
    causal_fiction.main(words)
    numbers = pd.read_csv(out.with_suffix(".csv"))
    erased = numbers[numbers.kind == "erase"].set_index("metric").value
    assert erased["refitted_accuracy"] <= erased["fitted_accuracy"]
    followed = numbers[numbers.metric == "plan_following"]
    assert set(followed.condition) == {"wrong label", "true label", "random (wrong)", "random (true)"}
    assert followed.value.between(0, 1).all()
    assert str(tmp_path) not in out.with_suffix(".json").read_text(), "paths mean nothing on another machine"
    out.unlink()
    made = {file: file.stat().st_mtime_ns for file in runs.rglob("*.parquet")}
    causal_fiction.main(words)
    assert out.exists()
    assert made == {file: file.stat().st_mtime_ns for file in runs.rglob("*.parquet")}
    with pytest.raises(ProbekitError, match="holds results of other passages"):
        causal_fiction.main([*words, "--boundaries", "5"])
