"""A metric over seeds against hand computation."""

import numpy as np
import pandas as pd
import pytest

from probekit.statistics import bootstrap_ratio, over_seeds

KEYS = ["member", "metric"]
OPTIONS = {"resamples": 300, "seed": 3}


def values(seeds: int = 3, documents: int = 20, members: tuple[str, ...] = ("a", "b")) -> pd.DataFrame:
    """Losses of documents, and a score that some documents have in some seeds only."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 50, size=documents)
    rows = []
    for member in members:
        for seed in range(seeds):
            losses = tokens * generator.uniform(1.0, 2.0, size=documents)
            rows += [(member, "perplexity", seed, d, losses[d], tokens[d]) for d in range(documents)]
            counts = generator.integers(0, 3, size=documents)
            rows += [(member, "score", seed, d, counts[d] * 0.5 * (1 + seed), counts[d])
                     for d in range(documents) if counts[d]]  # fmt: skip
    return pd.DataFrame(rows, columns=[*KEYS, "seed", "document", "sum", "count"])


def test_each_seed_and_their_mean_are_as_computed_by_hand():
    table = values()
    found = over_seeds(table, KEYS, {"perplexity": np.exp}, **OPTIONS)
    assert len(found) == 2 * 2 * 4
    for member in ("a", "b"):
        own = table[(table.member == member) & (table.metric == "perplexity")]
        rows = found[(found.member == member) & (found.metric == "perplexity")].set_index("seed")
        by_seed = own.groupby("seed")[["sum", "count"]].sum()
        each = np.exp(by_seed["sum"] / by_seed["count"])
        for seed in range(3):
            assert rows.loc[seed].value == pytest.approx(each[seed])
            assert (rows.loc[seed].seeds, rows.loc[seed].documents) == (1, 20)
            assert np.isnan(rows.loc[seed].seed_spread)
        mean = rows[rows.index.isna()].iloc[0]
        of_document = own.groupby("document")[["sum", "count"]].mean()
        assert mean.value == pytest.approx(np.exp(of_document["sum"].sum() / of_document["count"].sum()))
        interval = bootstrap_ratio(of_document["sum"], of_document["count"], transform=np.exp, **OPTIONS)
        assert (mean.value_low, mean.value_high) == pytest.approx((interval.low, interval.high))
        assert mean.seed_spread == pytest.approx(np.sqrt(((each - each.mean()) ** 2).sum() / 2))
        assert (mean.seeds, mean.documents) == (3, 20)
        # All seeds are wrong alike about a hard document: the mean's interval does not shrink to nothing.
        assert mean.value_low < mean.value < mean.value_high


def test_documents_that_a_seed_lacks_count_where_they_are():
    table = values()
    found = over_seeds(table, KEYS, {}, **OPTIONS).query("metric == 'score'")
    for member, rows in found.groupby("member"):
        own = table[(table.member == member) & (table.metric == "score")]
        mean = rows[rows.seed.isna()].iloc[0]
        assert mean.value == pytest.approx(own["sum"].sum() / own["count"].sum())
        assert rows[rows.seed.notna()].value.tolist() == pytest.approx([0.5, 1.0, 1.5])
        assert mean.seed_spread == pytest.approx(0.5)
        assert mean.documents == own.document.nunique()


def test_one_seed_has_no_spread():
    found = over_seeds(values(seeds=1), KEYS, {"perplexity": np.exp}, **OPTIONS)
    assert found.seed_spread.isna().all()
    one, mean = found[found.seed.notna()], found[found.seed.isna()]
    assert one.value.tolist() == mean.value.tolist()
    assert mean.seeds.tolist() == [1] * 4
