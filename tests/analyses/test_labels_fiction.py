"""The labels of fiction are right by hand, and the script draws those of a tiny LM."""

import json
from pathlib import Path

import labels_fiction
import numpy as np
import pandas as pd
import pytest
from random_lms import save_random_llama
from shared import fiction

from probekit.config import PlantedSettings
from probekit.errors import ProbekitError
from probekit.planted.corpus import generate

TEXT = "“Go,” she said. He went.\n\nIt rained for days.\nThe end was near. So it was."


def test_labels_of_a_passage():
    passage = {"text": TEXT, "author": "A. Author", "title": "The House"}
    table = pd.DataFrame(fiction.labelled_sentences(passage, most=3))
    read = [text[start:end] for text, start, end in zip(table.text, table.start, table.end, strict=True)]
    assert read == ["“Go,” she said.", "He went.", "It rained for days."]
    assert set(table.text) == {"“Go,” she said. He went.\n\nIt rained for days."}
    assert [*table["speech"]] == [True, False, False]
    assert [*table["next speech"]] == [False, False, False]
    assert [*table["next paragraph"]] == [False, True, True]
    assert [*table["place"]] == [0, 1, 2]
    titles = {"The House": True, "A Man": False, "An Oak": False, "Man": False, "'House'": True}
    assert table["title"].all(), "an article does not count"
    for title, first_half in titles.items():
        row = next(fiction.labelled_sentences(passage | {"title": title}, most=1))
        assert row["title"] == first_half, title
    assert set(table["story"]) == {"A. Author: The House"}


def test_what_shows_at_the_surface_ends_with_the_sentence():
    passage = {"text": TEXT, "author": "A. Author", "title": "The House"}
    for row in fiction.labelled_sentences(passage, most=3):
        place = [row[name] for name in ("start", "end", "place")]
        cut = row["text"][: row["end"]]
        assert labels_fiction.surface(row["text"], *place) == labels_fiction.surface(cut, *place)


def test_every_story_is_drawn_from_before_a_second_passage(tmp_path: Path):
    rows = [
        {"author": author, "title": f"{author}{story}", "text": f"{author} {story} {part}"}
        for author, stories in {"a": 4, "b": 3, "c": 1}.items()
        for story in range(stories)
        for part in range(5)
    ]
    path = tmp_path / "fiction.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    drawn = pd.DataFrame(fiction.passages(path, authors=2, each=6, seed=0))
    assert drawn.groupby("author").size().to_dict() == {"a": 6, "b": 6}
    assert drawn.text.is_unique
    counts = drawn.groupby(["author", "title"]).size()
    assert set(counts["a"]) == {1, 2}
    assert set(counts["b"]) == {2}


def test_the_script_draws_and_goes_on(tmp_path: Path):
    planted = generate(PlantedSettings(documents=90))
    rng = np.random.default_rng(0)
    rows = []
    for number, document in enumerate(planted.documents()):
        sentences = document.text.split(". ")
        ends = rng.choice([". ", ".” ", ".\n\n"], size=len(sentences))
        text = "".join(map("".join, zip(sentences, ends, strict=True)))
        rows.append({"author": f"Author {number % 3}", "title": f"{'BZ'[number % 2]} {number}", "text": text})
    path = tmp_path / "fiction.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    lm = save_random_llama(tmp_path / "lm", (row["text"] for row in rows), positions=128)
    out, runs = tmp_path / "labels.png", tmp_path / "runs"
    words = [str(path), "--models", str(lm), "--variants", "none"]
    words += ["--authors", "3", "--sentences", "6", "--runs", str(runs), "--out", str(out)]
    labels_fiction.main(words)
    numbers = pd.read_csv(out.with_suffix(".csv"))
    assert set(numbers.target) == set(labels_fiction.TARGETS)
    assert str(tmp_path) not in out.with_suffix(".json").read_text(), "paths mean nothing on another machine"
    probes = numbers[numbers.reader == "probe"]
    for target, metric in labels_fiction.TARGETS.items():
        assert probes[probes.target == target][metric].notna().all(), target
    surface = numbers[numbers.reader == "surface"].set_index("target")
    assert {*surface.index} == {name for name, metric in labels_fiction.TARGETS.items() if metric == "auroc"}
    assert surface.auroc["speech"] > 0.99, "whether a sentence holds quotation marks is at its surface"
    assert (surface.auroc_low <= surface.auroc).all()
    made = {file: file.stat().st_mtime_ns for file in runs.rglob("*.parquet")}
    out.unlink()
    labels_fiction.main(words)
    assert out.exists()
    assert made == {file: file.stat().st_mtime_ns for file in runs.rglob("*.parquet")}
    with pytest.raises(ProbekitError, match="holds results of other passages"):
        labels_fiction.main([*words, "--passages", "5"])
    with pytest.raises(ProbekitError, match="has two LMs called lm"):
        labels_fiction.main([*words, "--models", str(lm), str(lm)])


def test_a_passage_may_hold_any_character_and_must_say_whose_it_is(tmp_path: Path):
    path = tmp_path / "fiction.jsonl"
    passage = {"author": "A", "title": "T", "text": "One\u2028two\x85three."}
    path.write_text(json.dumps(passage, ensure_ascii=False) + "\n\n", "utf-8")
    (drawn,) = fiction.passages(path, authors=1, each=2, seed=0)
    assert drawn["text"] == passage["text"]
    path.write_text('{"text": "One."}', "utf-8")
    with pytest.raises(ProbekitError, match=r"fiction.jsonl:1: a passage must have text, author and title"):
        next(fiction.passages(path, authors=1, each=2, seed=0))
