"""The script compares a tiny LM with a compressed self and a tuned one, and draws."""

import json
from pathlib import Path

import compare_compressed
import numpy as np
import pandas as pd
from random_lms import save_random_llama

from probekit.config import PlantedSettings
from probekit.planted.corpus import generate


def test_the_script_compares_and_draws(tmp_path: Path):
    rng, rows = np.random.default_rng(0), []
    for number, document in enumerate(generate(PlantedSettings(documents=60)).documents()):
        sentences = document.text.split(". ")
        ends = rng.choice([". ", ".” "], size=len(sentences))
        text = "".join(map("".join, zip(sentences, ends, strict=True)))
        rows.append({"author": f"Author {number % 3}", "title": f"Story {number}", "text": text})
    path, out, runs = tmp_path / "fiction.jsonl", tmp_path / "compressed.png", tmp_path / "runs"
    path.write_text("\n".join(map(json.dumps, rows)))
    lm = save_random_llama(tmp_path / "lm", (row["text"] for row in rows), positions=128)
    words = [
        str(path),
        "--model",
        str(lm),
        "--compress",
        "rank=2",
        "--authors",
        "3",
        "--passages",
        "12",
        "--tune",
        "20",
    ]
    compare_compressed.main([*words, "--sentences", "4", "--runs", str(runs), "--out", str(out)])
    numbers = pd.read_csv(out.with_suffix(".csv"))
    assert set(zip(numbers.change, numbers.table, strict=True)) == {
        (change, table) for change in ("rank=2", "tuned on fiction") for table in ("similarity", "probes")
    }
    assert set(numbers.reading.dropna()) == {"first", "frozen", "mapped", "refitted"}
    assert out.exists()
    tuned_on = {
        json.loads(line)["title"] for line in (runs / "tuned" / "passages.jsonl").read_text().splitlines()
    }
    assert len(tuned_on) == 20
    assert not {f"Author {n}: {title}" for n in range(3) for title in tuned_on} & {
        *pd.read_csv(runs / "labels.csv").story
    }
    assert str(tmp_path) not in out.with_suffix(".json").read_text(), "paths mean nothing on another machine"
