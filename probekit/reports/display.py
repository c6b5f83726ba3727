"""How results are shown: one description of each column, numbers and text as strings, display tables.

In a result table the 95 % interval of a column `x` is in `x_low` and `x_high`. A display table holds strings
only: the terminal, the report and notebooks show the same ones, so that nothing is formatted twice.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple
from unicodedata import category

import pandas as pd

from probekit.probing.results import FALSE_POSITIVE_RATE

INTERVALS = "95 % intervals from resampling documents"

DECIMALS = 3
"""Of a number without an interval, and at least so many in tables."""

JOINERS = "\u200c\u200d"
"""Invisible characters that scripts and emoji need to be displayed correctly."""


class Column(NamedTuple):
    """How a column or metric is shown: `better` is 1 (higher), -1 (lower) or 0 (neither)."""

    label: str
    unit: str = ""
    better: int = 0
    decimals: int = DECIMALS
    signed: bool = False


COLUMNS: dict[str, Column] = {
    # Perplexity and multiple choice
    "perplexity": Column("perplexity", better=-1),
    "difference": Column("first - second", signed=True),
    # Planners, probes, multiple choice
    "accuracy": Column("accuracy", better=1),
    "top5": Column("top-5 accuracy", better=1),
    "cross_entropy": Column("cross-entropy", "nats", better=-1),
    "bits": Column("bits over the prior", better=1),
    "gain": Column("gain in bits", better=1, signed=True),
    "gain_over": Column("gain over"),
    "selectivity": Column("selectivity", better=1, signed=True),
    "over_first_lm": Column("over the first LM", signed=True),
    "over_refitted": Column("over the refitted", signed=True),
    "over_own": Column("over its own probe", signed=True),
    "compression": Column("compression", better=1),
    "shortfall": Column("below the ceiling", "bits", better=-1),
    "over_planner": Column("over the planner", "bits"),
    "balanced_accuracy": Column("balanced accuracy", better=1),
    "auroc": Column("AUROC", better=1),
    "average_precision": Column("average precision", better=1),
    "recall": Column(f"recall at {FALSE_POSITIVE_RATE:.0%} false positives", better=1),
    "calibration_error": Column("calibration error", better=-1),
    "r2": Column("R²", better=1),
    "gain_r2": Column("gain in R²", better=1, signed=True),
    "rank_correlation": Column("rank correlation", better=1),
    "cosine": Column("cosine", better=1),
    "reciprocal_rank": Column("mean reciprocal rank", better=1),
    "first_percent": Column("in the first 1 %", better=1),
    "squared_error": Column("mean squared error", better=-1),
    # Forced choice
    "preference": Column("prefers the first"),
    "over_prior": Column("over the prior", signed=True),
    "over_first": Column("over the first revision", signed=True),
    "margin": Column("margin", "nats", signed=True),
    # Pairs of layers of two LMs
    "second_layer": Column("layer of the second LM"),
    "cka": Column("CKA", better=1),
    "cka_null": Column("CKA, permuted"),
    "procrustes": Column("Procrustes residual", better=-1),
    "procrustes_null": Column("residual, permuted"),
    # Geometry
    "effective_rank": Column("effective rank"),
    "participation_ratio": Column("participation ratio"),
    "anisotropy": Column("mean cosine"),
    "anisotropy_without": Column("mean cosine without rogue"),
    "norm": Column("norm"),
    "rogue_share": Column("rogue share of the squared norm"),
    # Generated text
    "rouge2": Column("ROUGE-2", better=1),
    "levenshtein": Column("edit distance", "actions", better=-1),
    "levenshtein_normalised": Column("edit distance, normalised", better=-1),
    "latent_perplexity": Column("latent perplexity", better=-1),
    "mauve": Column("MAUVE", better=1),
    "empty": Column("blank texts"),
    "plan_following": Column("given action", better=1),
    "plan_following_by_chance": Column("given action, by chance"),
    # Interventions: changes of the loss, in nats per token, and what probes read
    "next_loss": Column("next sentence", signed=True),
    "next_loss_over_random": Column("over random", signed=True),
    "rest_loss_over_random": Column("rest, over random", signed=True),
    "other_loss": Column("later sentences", signed=True),
    "readout_true": Column("probe, true label"),
    "fitted_accuracy": Column("before erasing"),
    "refitted_accuracy": Column("refitted after erasing"),
    "prior_accuracy": Column("most frequent action"),
    "plan_following_unedited": Column("without the edit"),
    "plan_following_over_random": Column("given action, over random", better=1, signed=True),
    # Continuations after one activation
    "true_action": Column("true action", better=1),
    "cosine_over_other": Column("cosine over other", better=1, signed=True),
    "cosine_over_nothing": Column("cosine over nothing", better=1, signed=True),
    "cosine_over_ridge": Column("cosine over ridge", better=1, signed=True),
    "true_action_over_other": Column("true action over other", better=1, signed=True),
    # Subnetworks
    "removed": Column("components"),
    "first_loss_change": Column("first token", signed=True),
    "rest_loss_change": Column("rest of it", signed=True),
    "other_loss_change": Column("first sentences", signed=True),
    "refitted_bits": Column("bits, refitted probe", better=1),
    # Sweeps and stages
    "seed_spread": Column("spread over seeds"),
    "seconds": Column("seconds", decimals=1),
    "tuned_parameters": Column("and of its LM"),
    "taken_from": Column("taken from"),
    # Losses of a stage of training
    "first_loss": Column("first", decimals=4),
    "last_loss": Column("last", decimals=4),
    "lowest_validation_loss": Column("lowest in validation", decimals=4),
}
"""All columns whose label is not simply their name, metrics in the order in which tables show them."""

ORDER = {name: number for number, name in enumerate(COLUMNS)}


class Table(NamedTuple):
    """A display table: strings by column label, and whether a page hides it until it is asked for."""

    caption: str
    cells: pd.DataFrame
    folded: bool = False

    @property
    def numeric(self) -> list[bool]:
        """Whether each column holds nothing but numbers, and is aligned to the right."""
        return [bool(self.cells[name].str.match(r"[-+]?\d|$").all()) for name in self.cells]


def described(name: str) -> Column:
    """The description of a column; one that is not listed is called by its name."""
    return COLUMNS.get(name, Column(name.replace("_", " ")))


def heading(name: str) -> str:
    """A column's label with its unit, and an arrow towards better values."""
    column = described(name)
    unit = f" ({column.unit})" if column.unit else ""
    return column.label + unit + {1: " ↑", -1: " ↓", 0: ""}[column.better]


# Numbers and text


def number(value: float, decimals: int = DECIMALS, *, signed: bool = False) -> str:
    """A number as text: `1,234.500`, never `-0.000`."""
    return f"{value:{'+' if signed else '-'}z,.{decimals}f}"


def decimals_for(size: float) -> int:
    """Decimals that show a size to two digits, six at most."""
    return min(6, max(0, 1 - math.floor(math.log10(size)))) if size > 0 else DECIMALS


def with_interval(
    value: float | None,
    low: float | None,
    high: float | None,
    *,
    decimals: int = DECIMALS,
    signed: bool = False,
) -> str:
    """A value with its interval, as `12.300 [11.900, 12.800]`; empty where there is no value.

    The half-width of the interval is shown to two digits: there are as many decimals as that needs (up to
    six), and at least `decimals`.
    """
    if value is None or math.isnan(value):
        return ""
    if low is None or high is None or not math.isfinite(half := (high - low) / 2):
        return f"{number(value, signed=signed)} (no interval)"
    decimals = max(decimals, decimals_for(half))
    value_, low_, high_ = (number(end, decimals, signed=signed) for end in (value, low, high))
    return f"{value_} [{low_}, {high_}]"


def visible(text: str) -> str:
    """The text with a mark for every character that would not be seen or would steer the display."""

    def mark(c: str) -> str:
        shown = c.isprintable() or c in "\n\t" + JOINERS or category(c) == "Zs"
        return c if shown else f"‹U+{ord(c):04X}›"

    return "".join(map(mark, text))


def shortened(text: str, characters: int = 100) -> str:
    """A sentence, its end cut off where it is too long to be shown."""
    return text if len(text) <= characters else text[: characters - 1].rstrip() + "…"


# Tables


def cell(row: Mapping[Hashable, Any], name: str) -> str:
    """A row's value as text, with its interval and its spread over seeds where the table has them."""
    value, column = row[name], described(name)
    if pd.isna(value):
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    if f"{name}_low" not in row:
        return number(value, column.decimals, signed=column.signed)
    text = with_interval(value, row[f"{name}_low"], row[f"{name}_high"], signed=column.signed)
    spread = row.get(f"{name}_spread")
    return text if spread is None or pd.isna(spread) else f"{text}\nspread over seeds {spread:.4g}"


def display(
    caption: str,
    table: pd.DataFrame,
    columns: Iterable[str],
    *,
    optional: Sequence[str] = (),
    folded: bool = False,
) -> Table:
    """The display table of some columns of a result table.

    Args:
        caption: What it shows.
        table: The results.
        columns: Which of its columns, in their order.
        optional: Columns that are left out where they are empty, and that the caption names where all rows
            have the same value.
        folded: Whether a page hides it until it is asked for.
    """
    shown, same = [], []
    for name in columns:
        if name in optional and (name not in table or table[name].isna().all()):
            continue
        if name in optional and len(table[name].unique()) == 1:
            same.append(f"{described(name).label} {cell(table.iloc[0].to_dict(), name)}")
        else:
            shown.append(name)
    rows = table.to_dict("records")
    cells = pd.DataFrame({heading(name): [cell(row, name) for row in rows] for name in shown}, dtype="str")
    return Table(f"{caption}; {', '.join(same)}" if same else caption, cells, folded)


def by_metric(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Turns a table with a row for each metric into one with a column for each.

    Args:
        table: Columns `metric`, `value`, `value_low`, `value_high`, and `documents`, `seed_spread` or `empty`
            where these are known.
        keys: What rows of one condition have in common; values may be missing.

    Returns:
        A row for each condition, in the order in which they come: the keys, for each metric `m` columns
        `m`, `m_low`, `m_high` and `m_spread`, and the largest number of `documents` and `empty` texts.
    """
    rows = []
    for key, own in table.groupby(keys, sort=False, dropna=False):
        row: dict[Hashable, Any] = dict(zip(keys, key, strict=True))
        for name in ("documents", "empty"):
            if name in own:
                row[name] = int(own[name].max())
        for found in own.to_dict("records"):
            for end in ("", "_low", "_high"):
                row[f"{found['metric']}{end}"] = found[f"value{end}"]
            row[f"{found['metric']}_spread"] = found.get("seed_spread")
        rows.append(row)
    return pd.DataFrame(rows)


def ordered(metrics: Iterable[str]) -> list[str]:
    """Metrics in the order in which tables show them; those that are not described come last."""
    return sorted(dict.fromkeys(metrics), key=lambda name: ORDER.get(name, len(ORDER)))
