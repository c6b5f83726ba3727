"""Comparisons over runs that differ in their seed, as the figures and tables of the papers need them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from probekit.statistics import paired_differences, seed_rows


def differences_over_seeds(
    losses: pd.DataFrame, pairs: Iterable[tuple[str, str]], *, resamples: int, seed: int
) -> pd.DataFrame:
    """Differences of perplexities, paired over documents, of each seed and of the mean over seeds.

    Args:
        losses: Columns `name` (what is compared), `seed`, `document` (or its group; see `Corpus.by_group`),
            `tokens` and `loss` in nats; every name has the same seeds and documents.
        pairs: Names, of which the second's perplexity is taken from the first's.
        resamples: Number of resamples of documents.
        seed: Seed of their draws.

    Returns:
        As `over_seeds`, for each `first` and `second`, and `below`, the number of seeds whose value is below
        zero.
    """
    one = losses[(losses.name == losses.name.iloc[0]) & (losses.seed == losses.seed.iloc[0])]
    tokens = one.groupby("document").tokens.sum()
    by_name = {
        name: rows.pivot_table(index="document", columns="seed", values="loss", aggfunc="sum").loc[
            tokens.index
        ]
        for name, rows in losses.groupby("name", sort=False)
    }
    parts = []
    for first, second in pairs:
        one, other = (by_name[name].assign(mean=by_name[name].mean(axis=1)) for name in (first, second))
        found = paired_differences(one, other, tokens, resamples=resamples, seed=seed, transform=np.exp)
        below = (found.value[:-1] < 0).astype(int)
        rows = seed_rows({"first": first, "second": second}, by_name[first].columns, found)
        rows.insert(len(rows.columns) - 2, "below", [*below, below.sum()])
        parts.append(rows)
    return pd.concat(parts, ignore_index=True)
