"""Right and wrong sentences of the pairs are balanced; the script draws what a tiny LM says of them."""

import json
from collections import Counter
from pathlib import Path

import minimal_pairs
import numpy as np
import pandas as pd
import pytest
from random_lms import save_random_llama
from shared.english_pairs import PHENOMENA, Pair, pairs, plural

from probekit.errors import ProbekitError
from probekit.evaluation.items import ALL_KINDS


@pytest.fixture(scope="module", params=PHENOMENA)
def made(request: pytest.FixtureRequest) -> list[Pair]:
    return list(PHENOMENA[request.param]())


def test_what_is_right_in_one_pair_is_wrong_in_another_of_its_group(made: list[Pair]):
    """So no resample of groups favours who prefers one word, or one order of words, to another."""
    for group in {group for group, _, _ in made}:
        differing = []
        for _, right, wrong in (pair for pair in made if pair[0] == group):
            words = zip(right.strip(".?").split(), wrong.strip(".?").split(), strict=True)
            differing.append(tuple(zip(*((a, b) for a, b in words if a != b), strict=True)))
        assert Counter(differing) == Counter((wrong, right) for right, wrong in differing)


def test_sentences_are_distinct_and_whole(made: list[Pair]):
    assert len(made) >= 50
    assert len({group for group, _, _ in made}) >= 40
    assert not {right for _, right, _ in made} & {wrong for _, _, wrong in made}
    assert len(set(made)) == len(made)
    for _, *sentences in made:
        assert len({sentence.split()[0] for sentence in sentences}) == 1
        assert all(sentence[0].isupper() and sentence[-1] in ".?" for sentence in sentences)
        assert not any("{" in sentence for sentence in sentences)


def test_plurals():
    assert [*map(plural, ("box", "witch", "princess", "key", "wife", "man"))] == [
        "boxes", "witches", "princesses", "keys", "wives", "men",
    ]  # fmt: skip


def test_answers_stand_first_as_often_as_second():
    rows = pd.DataFrame(pairs())
    assert (rows.groupby("kind").answer.mean() == 0.5).all()
    right = [choices[answer] for choices, answer in zip(rows.choices, rows.answer, strict=True)]
    assert right == [right for make in PHENOMENA.values() for _, right, _ in make()]


def test_the_script_draws_what_lms_say(tmp_path: Path):
    lms = [tmp_path / name for name in ("one", "two")]
    for choice, lm in enumerate(lms):  # whose tokenizers differ
        save_random_llama(lm, (pair["choices"][choice] for pair in pairs()), positions=128)
    out, runs = tmp_path / "pairs.png", tmp_path / "runs"
    words = ["--models", *map(str, lms), "--runs", str(runs), "--out", str(out), "--random", "2"]
    minimal_pairs.main(words)
    numbers = pd.read_csv(out.with_suffix(".csv")).set_index(["model", "kind"])
    assert {*numbers.loc["one"].index} == {*PHENOMENA, ALL_KINDS}
    for lm in ("one", "two"):
        answers = pd.read_parquet(runs / lm / "answers.parquet")
        answers = answers[answers.revision.isna() | (answers.revision == "own weights")]
        own = answers.pivot_table(index="item", columns="choice", values="log_probability").to_numpy()
        answer = np.array([json.loads(line)["answer"] for line in (runs / "items.jsonl").open()])
        margin = np.where(answer, -1, 1) * (own[:, 0] - own[:, 1])
        row = numbers.loc[lm, ALL_KINDS]
        assert row.accuracy == pytest.approx((margin > 0).mean())
        assert row.margin == pytest.approx(margin.mean())
    assert {*numbers.index.get_level_values("model")} == {
        "one",
        "two",
        "random weights 0",
        "random weights 1",
    }
    difference = numbers.accuracy["two"] - numbers.accuracy["one"]
    assert numbers.over_first["two"].to_numpy() == pytest.approx(difference.to_numpy())
    manifest = out.with_suffix(".json").read_text()
    assert str(tmp_path) not in manifest, "paths mean nothing on another machine"
    assert [lm["name"] for lm in json.loads(manifest)["settings"]["models"]] == ["one", "one", "one", "two"]


def test_lms_of_one_name_are_refused(tmp_path: Path):
    with pytest.raises(ProbekitError, match="has two LMs called lm"):
        minimal_pairs.main(["--models", "a/lm", "b/lm", "--runs", str(tmp_path)])
