"""Comparisons over seeds against the paired differences of each seed and of their mean."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from shared.seeds import differences_over_seeds, with_earlier

from probekit.errors import ProbekitError
from probekit.statistics import paired_difference

OPTIONS = {"resamples": 300, "seed": 3}


def test_differences_over_seeds_are_paired_and_counted():
    generator = np.random.default_rng(0)
    length = generator.integers(5, 50, size=20)
    losses = pd.DataFrame(
        {"name": name, "seed": seed, "document": range(20), "tokens": length}
        | {"loss": length * generator.uniform(1.0, 2.0, size=20)}
        for name in ("a", "b")
        for seed in range(3)
    ).explode(["document", "tokens", "loss"])
    losses = losses.astype({"document": int, "tokens": int, "loss": float})
    found = differences_over_seeds(losses, [("a", "b"), ("b", "a")], **OPTIONS)
    by_name = losses.pivot_table(index="document", columns=["name", "seed"], values="loss")
    tokens = losses.groupby("document").tokens.first()
    for first, second in (("a", "b"), ("b", "a")):
        rows = found[found["first"] == first].set_index("seed")
        one, other = by_name[first].assign(mean=by_name[first].mean(1)), by_name[second]
        for seed, column in ((0, 0), (2, 2), (pd.NA, "mean")):
            row = rows[rows.index.isna()].iloc[0] if column == "mean" else rows.loc[seed]
            loss = other.mean(1) if column == "mean" else other[column]
            expected = paired_difference(one[column], loss, tokens, transform=np.exp, **OPTIONS)
            assert (row.value, row.value_low, row.value_high) == pytest.approx(expected[:3])
        assert rows.below.iloc[-1] == (rows.value.iloc[:-1] < 0).sum()


def losses_of(seeds: list[int], documents: int = 3) -> pd.DataFrame:
    rows = [
        {"base LM": "gpt2", "name": name, "seed": seed, "document": document, "tokens": 10 + document}
        | {"loss": 20.5 + seed + document}
        for seed in seeds
        for name in ("none", "soft")
        for document in range(documents)
    ]
    return pd.DataFrame(rows)


def test_losses_of_earlier_seeds_are_kept_and_those_of_the_runs_count(tmp_path: Path):
    path = tmp_path / "losses.csv"
    pd.testing.assert_frame_equal(with_earlier(losses_of([0, 1]), path), losses_of([0, 1]))
    again = losses_of([1, 2]).assign(loss=lambda rows: rows.loss + 0.25)
    found = with_earlier(again, path)
    pd.testing.assert_frame_equal(found, pd.concat([losses_of([0]), again], ignore_index=True))
    pd.testing.assert_frame_equal(pd.read_csv(path), found)
    with pytest.raises(ProbekitError, match="seeds of 'gpt2' there and in the runs were not evaluated on"):
        with_earlier(losses_of([3], documents=2), path)
    pd.testing.assert_frame_equal(pd.read_csv(path), found)
