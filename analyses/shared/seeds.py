"""Comparisons over runs that differ in their seed, as the figures and tables of the papers need them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from probekit.errors import ProbekitError
from probekit.io import write_text
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


def with_earlier(losses: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Adds the losses of seeds that a file keeps and that are not among those given, and keeps all in it.

    Args:
        losses: Columns `base LM`, `name`, `seed`, `document`, `tokens` and `loss`.
        path: The CSV file, of the same columns; written anew, or for the first time.

    Returns:
        All losses, by base LM and seed.

    Raises:
        ProbekitError: Seeds of one base LM have other names, documents or tokens than others.
    """
    columns, one = ["base LM", "name", "seed", "document", "tokens", "loss"], ["base LM", "seed"]
    found = losses[columns]
    if path.is_file():
        kept = pd.read_csv(path)
        known = pd.MultiIndex.from_frame(found[one].drop_duplicates())
        found = pd.concat([kept[~pd.MultiIndex.from_frame(kept[one]).isin(known)], found])
    found = found.sort_values([*one, "name", "document"], ignore_index=True)
    for model, of_model in found.groupby("base LM"):
        asked = [
            {*rows[["name", "document", "tokens"]].itertuples(index=False, name=None)}
            for _, rows in of_model.groupby("seed")
        ]
        if any(other != asked[0] for other in asked):
            raise ProbekitError(
                f"{path}: the seeds of {model!r} there and in the runs were not evaluated on the same "
                "variants and documents; give another file"
            )
    write_text(path, found.to_csv(index=False, float_format="%.6g"))
    return found
