"""A metric of several runs that differ in their seed: each, their mean, and how far they are apart.

The mean over seeds is of a document's sums and counts (of its losses, for perplexity), so its interval, from
resampling documents, speaks of other documents; of other seeds, the spread of the single ones does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from probekit.evaluation.statistics import Floats, Resampling, bootstrap_ratios, paired_differences


def over_seeds(
    values: pd.DataFrame,
    keys: Sequence[str],
    transforms: Mapping[str, Callable[[Floats], Floats]],
    *,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    """One row for each metric and seed, and one over all seeds, where `seed` is missing.

    Args:
        values: Columns `seed`, `document`, `sum` and `count`, and `keys`, of which `metric` is one.
        keys: What tells a metric from the others.
        transforms: Applied to a metric's ratio, such as `np.exp` to perplexity's; by the metric's name.
        resamples: Number of resamples of documents.
        seed: Seed of their draws, which are the same for all metrics on as many documents.

    Returns:
        The keys, `seed`, `value` with its 95 % interval (`value_low`, `value_high`), `seed_spread`, which is
        the standard deviation of the seeds' values (divided by seeds - 1; missing for one seed), `seeds` and
        `documents`.
    """
    parts = []
    for names, rows in values.groupby([*keys], sort=False, dropna=False):
        key = dict(zip(keys, names, strict=True))
        tables = rows.pivot_table(index="document", columns="seed", values=["sum", "count"], aggfunc="sum")
        sums, counts = (tables[name].fillna(0).to_numpy(float) for name in ("sum", "count"))
        options: Resampling = {
            "resamples": resamples,
            "seed": seed,
            "transform": transforms.get(str(key["metric"])),
        }
        with_mean = [np.column_stack([part, part.mean(1)]) for part in (sums, counts)]
        intervals = bootstrap_ratios(*with_mean, **options)
        each = intervals.value[:-1]
        parts.append(
            pd.DataFrame(key, index=range(len(each) + 1)).assign(
                seed=pd.array([*tables["sum"].columns, None], dtype="Int64"),
                value=intervals.value,
                value_low=intervals.low,
                value_high=intervals.high,
                seed_spread=[*[np.nan] * len(each), np.std(each, ddof=1) if len(each) > 1 else np.nan],
                seeds=[*[1] * len(each), len(each)],
                documents=intervals.documents,
            )
        )
    return pd.concat(parts, ignore_index=True)


def differences_over_seeds(
    losses: pd.DataFrame, pairs: Iterable[tuple[str, str]], *, resamples: int, seed: int
) -> pd.DataFrame:
    """Differences of perplexities, paired over documents: a row for each pair and seed, one over all seeds.

    Args:
        losses: Columns `name` (what is compared), `seed`, `document`, `tokens` and `loss` in nats; every name
            has the same seeds and documents.
        pairs: Names, of which the second's perplexity is taken from the first's.
        resamples: Number of resamples of documents.
        seed: Seed of their draws.

    Returns:
        As `over_seeds`, for each `first` and `second`, and `below`, the number of seeds whose value is below
        zero.
    """
    tokens = losses.groupby("document").tokens.first()
    by_name = {
        name: rows.pivot_table(index="document", columns="seed", values="loss", aggfunc="sum").loc[
            tokens.index
        ]
        for name, rows in losses.groupby("name", sort=False)
    }
    parts = []
    for first, second in pairs:
        with_mean = [
            table.assign(mean=table.mean(axis=1)).to_numpy() for table in (by_name[first], by_name[second])
        ]
        found = paired_differences(
            with_mean[0], with_mean[1], tokens, resamples=resamples, seed=seed, transform=np.exp
        )
        each = found.value[:-1]
        parts.append(
            pd.DataFrame({"first": first, "second": second}, index=range(len(each) + 1)).assign(
                seed=pd.array([*by_name[first].columns, None], dtype="Int64"),
                value=found.value,
                value_low=found.low,
                value_high=found.high,
                seed_spread=[*[np.nan] * len(each), np.std(each, ddof=1) if len(each) > 1 else np.nan],
                below=[*(each < 0).astype(int), int((each < 0).sum())],
                seeds=[*[1] * len(each), len(each)],
                documents=found.documents,
            )
        )
    return pd.concat(parts, ignore_index=True)
