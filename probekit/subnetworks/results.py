"""The table of a subnetwork and of what it is compared with, with intervals from resampling documents.

What is of the mean over random draws has intervals over documents and draws (`evaluation.crossed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from probekit.evaluation.crossed import mean_over_draws
from probekit.evaluation.statistics import Interval, Resampling, bootstrap_ratios
from probekit.subnetworks.components import Component
from probekit.subnetworks.learning import Candidate
from probekit.subnetworks.measures import Sums

WHOLE, SUBNETWORK, ALONE, RANDOM = "whole", "subnetwork", "alone", "random"
"""Conditions: nothing removed, the learned mask, as many components that are best removed alone, and as many
drawn at random in every layer."""

CONDITIONS = (WHOLE, SUBNETWORK, ALONE)
"""Those of one mask each, in the order of their masks; random ones come behind."""

PROBES = ("bits", "refitted_bits")
"""What the saved probe reads, and one that is fitted again."""

FEW_LOST = 0.5
"""A probe that is fitted again loses little if it loses less than this share of what the first one does,
each as a share of what it had."""


def results_table(sums: Sums, masks: np.ndarray, resampling: Resampling) -> pd.DataFrame:
    """A row for every condition, draw and metric.

    Args:
        sums: By metric; masks in the order of `CONDITIONS`, then one for each draw.
        masks: What they remove `[masks, components]`, bool.
        resampling: How intervals are made.
    """
    rows = [
        {"condition": name, "draw": draw, "metric": metric}
        | {"value": interval.value, "value_low": interval.low, "value_high": interval.high}
        | {"documents": interval.documents}
        for name, draw, metric, interval in _intervals(sums, resampling)
    ]
    table = pd.DataFrame(rows).astype({"draw": "Int64"})
    subnetwork = masks[CONDITIONS.index(SUBNETWORK)]
    # Equal in all draws, as the number of removed components is.
    number = {name: masks[n] for n, name in enumerate(CONDITIONS)} | {RANDOM: masks[-1]}
    shared = {name: (mask & subnetwork).sum() for name, mask in number.items()}
    shared[RANDOM] = (masks[len(CONDITIONS) :] & subnetwork).sum(1).mean()
    return table.assign(
        removed=table.condition.map({name: int(mask.sum()) for name, mask in number.items()}),
        shared=table.condition.map(shared).astype(float),
        components=masks.shape[1],
    )


def cautions(table: pd.DataFrame, masks: np.ndarray) -> list[str]:
    """What speaks against a subnetwork, from its rows and the masks that they are of."""
    subnetwork, drawn = masks[CONDITIONS.index(SUBNETWORK)], masks[len(CONDITIONS) :]
    if not subnetwork.any():
        return ["no mask was better than to remove nothing, on validation documents"]
    found = []
    forced = drawn.all(axis=0) & subnetwork
    if len(drawn) and 2 * forced.sum() >= subnetwork.sum():
        found.append(
            f"{forced.sum()} of the {subnetwork.sum()} components are in every random draw, too, for so few "
            "others are in their layers: over random there is little to see"
        )
    rows = table[table.condition == SUBNETWORK].set_index("metric")
    # As shares of what each had: one that is fitted on few documents has less to lose.
    lost, gone = (rows.value[f"{of}_change"] / (rows.value[f"{of}_change"] - rows.value[of]) for of in PROBES)
    if lost > 0 and gone < FEW_LOST * lost:
        found.append(
            f"the probe loses {lost:.0%} of its bits, but one that is fitted again only {gone:.0%} of its "
            "own: much of it has not gone, but moved"
        )
    over = rows.value_high["refitted_bits_over_random"]
    if np.isnan(over):
        found.append(
            f"over random there is no interval: it takes two draws and two documents, and of draws there are "
            f"{len(drawn)}"
        )
    elif over >= 0:
        found.append(
            "a probe that is fitted again does not lose more than with as many components removed at random "
            "in the same layers"
        )
    return found


def _intervals(sums: Sums, resampling: Resampling) -> Iterator[tuple[str, int | None, str, Interval]]:
    """Conditions, draws (none for the mean over draws), metrics and their values."""
    first, whole, own = (len(CONDITIONS), *(CONDITIONS.index(name) for name in (WHOLE, SUBNETWORK)))
    for metric, (values, counts) in sums.items():
        lines: list[tuple[str, int | None, np.ndarray]] = [
            *((name, None, values[number]) for number, name in enumerate(CONDITIONS)),
            *((RANDOM, draw, drawn) for draw, drawn in enumerate(values[first:])),
        ]
        cells = [(name, draw, metric, line) for name, draw, line in lines]
        cells += [
            (name, draw, f"{metric}_change", line - values[whole])
            for name, draw, line in lines
            if name != WHOLE
        ]
        found = bootstrap_ratios(np.stack([line for *_, line in cells], axis=1), counts, **resampling)
        for number, (name, draw, called, _) in enumerate(cells):
            yield name, draw, called, found[number]
        drawn = values[first:]
        yield RANDOM, None, metric, mean_over_draws(drawn, counts)
        yield RANDOM, None, f"{metric}_change", mean_over_draws(drawn - values[whole], counts)
        # Of the subnetwork alone: the numbers by layer are its own.
        yield SUBNETWORK, None, f"{metric}_over_random", mean_over_draws(values[own] - drawn, counts)


def mask_table(
    components: Sequence[Component], mask: Candidate, alone: Sums, resampling: Resampling
) -> pd.DataFrame:
    """A row for every component.

    Args:
        components: All of them.
        mask: The learned mask.
        alone: What is left when each is removed alone; the last one is of the whole LM.
        resampling: How intervals are made.
    """
    table = pd.DataFrame(
        [{"component": str(c), "kind": c.kind, "layer": c.layer, "head": c.head} for c in components]
    ).astype({"layer": "Int64", "head": "Int64"})
    table["gate"], table["removed"] = mask.gates, mask.removed
    for metric in ("information", "kept_kl"):
        values, counts = alone[metric]
        found = bootstrap_ratios((values[:-1] - values[-1]).T, counts, **resampling)
        name = f"alone_{metric}"
        table[name], table[f"{name}_low"], table[f"{name}_high"] = found.value, found.low, found.high
        table["documents"] = found.documents
    return table


def candidate_table(
    candidates: Sequence[Candidate], chosen: int, objective: np.ndarray, error: np.ndarray
) -> pd.DataFrame:
    """A row for every mask that was tried, with its objective and standard error `[candidates]`."""
    return pd.DataFrame(
        {
            "penalty": [candidate.penalty for candidate in candidates],
            "removed": [int(candidate.removed.sum()) for candidate in candidates],
            "objective": objective,
            "error": error,
            "chosen": np.arange(len(candidates)) == chosen,
        }
    ).astype({"penalty": "float64"})
