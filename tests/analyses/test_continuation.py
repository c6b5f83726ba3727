"""The script has a tiny LM write on, draws it, and goes on where it was."""

import json
from pathlib import Path

import continuation
import pandas as pd
import pytest
from random_lms import save_random_llama
from shared.fiction import beginning

from probekit.config import PlantedSettings
from probekit.errors import ProbekitError
from probekit.planted.corpus import generate


def test_the_script_draws_and_goes_on(tmp_path: Path):
    documents = generate(PlantedSettings(documents=90)).documents()
    rows = [{"author": f"{n % 3}", "title": f"{n}", "text": d.text} for n, d in enumerate(documents)]
    path = tmp_path / "fiction.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    lm = save_random_llama(tmp_path / "lm", (row["text"] for row in rows), positions=128)
    out, runs = tmp_path / "continuation.png", tmp_path / "runs"
    words = [str(path), "--models", str(lm), "--layers", "1", "--authors", "3", "--passages", "30"]
    words += ["--sentences", "8", "--runs", str(runs), "--out", str(out)]
    continuation.main(words)
    numbers = pd.read_csv(out.with_suffix(".csv"))
    assert set(continuation.CONDITIONS) == set(numbers.condition)
    assert set(numbers.horizon) == {1, 2}
    assert str(tmp_path) not in out.with_suffix(".json").read_text(), "paths mean nothing on another machine"
    made = {file: file.stat().st_mtime_ns for file in runs.rglob("*.parquet")}
    out.unlink()
    continuation.main(words)
    assert out.exists()
    assert made == {file: file.stat().st_mtime_ns for file in runs.rglob("*.parquet")}
    with pytest.raises(ProbekitError, match="holds results of other passages"):
        continuation.main([*words, "--passages", "29"])


def test_a_passage_is_cut_after_some_sentences():
    passage = {"text": "It rained. He went home. The end was near."}
    assert beginning(passage, 2) == "It rained. He went home."
    assert beginning(passage, 9) == passage["text"]
