"""The display tables of compared LMs, and of the geometry of activations."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING

import pandas as pd

from probekit.config import nearest
from probekit.models.locations import label
from probekit.probing.results import main_metric, validation_loss
from probekit.reports.display import INTERVALS, Table, cell, described, display, heading, number

if TYPE_CHECKING:
    from probekit.probing.compare import Comparison

JACKKNIFE = "95 % intervals from leaving out documents"

GEOMETRY_COLUMNS = (
    *("effective_rank", "participation_ratio", "anisotropy", "anisotropy_without", "norm"),
    *("rogue", "rogue_features", "rogue_share"),
)
"""What tables show of the geometry of activations."""

MORE_COMPARED = "give more documents"
"""The remedy if few documents are compared."""


def comparison_tables(found: Comparison) -> list[Table]:
    """Layers of the same depth and, if there are labels, all readings by layer and at the best one."""
    similarity = found.similarity
    measures = ["cka", "cka_null", "procrustes", "procrustes_null"]
    first, second = found.names
    caption = f"Layers of {first} and {second} at the same depth ({JACKKNIFE})"
    shown = [display(caption, similarity[similarity.same_depth], ["layer", "second_layer", *measures])]
    if found.probes is None:
        return shown
    probes, metric = found.probes, main_metric(found.probes)
    keys = ["solver", "horizon", "layer", "second_layer"]
    text = probes.assign(text=[cell(row, metric) for row in probes.to_dict("records")])
    wide = text.set_index([*keys, "reading"]).text.unstack()  # noqa: PD010 - of texts, each once
    wide = wide[[*probes.reading.unique()]].reset_index().rename_axis(columns=None).astype("str")
    target = probes.target.iloc[0]
    documents = (
        f"{int(probes.examples.iloc[0]):,} test examples of {int(probes.documents.iloc[0]):,} documents"
    )
    of_all = wide.drop(columns=[name for name in ("solver", "horizon") if len({*wide[name]}) == 1])
    shown.append(
        Table(
            f"{described(metric).label} of {target} by layer, on {documents} ({INTERVALS})",
            of_all.rename(columns=heading),
        )
    )
    best = best_rows(probes)
    layer = int(best.layer.iloc[0])
    over = "R²" if metric == "r2" else "accuracy"
    caption = f"Layer {layer}, best of the first LM on validation documents; differences of {over} are paired"
    own = [metric] if metric in ("accuracy", "r2") else [metric, "accuracy"]
    shown.append(
        display(f"{caption} ({INTERVALS})", best, ["reading", *own, "over_first_lm", "over_refitted"])
    )
    return shown


def comparison_notes(found: Comparison) -> Iterator[str]:
    """Where the layers that are most similar are, and how many pairs are not told from permuted documents."""
    similarity = found.similarity.dropna(subset="cka")  # without layers that do not vary
    if similarity.empty:
        return
    nearest = similarity.loc[similarity.groupby("layer").cka.idxmax()]
    elsewhere = (~nearest.same_depth).sum()
    yield (
        f"of {len(nearest)} layers of {found.names[0]}, {elsewhere} are most similar (CKA) to one of another "
        f"depth; {(similarity.cka_p > 0.05).sum():,} of {len(similarity):,} pairs cannot be told from "
        "permuted documents (p above 0.05), whose mean CKA is "
        f"{number(similarity.cka_null.mean())} and Procrustes residual "
        f"{number(similarity.procrustes_null.mean())}"
    )


def best_rows(probes: pd.DataFrame) -> pd.DataFrame:
    """All readings of the probe of the first LM that is best on validation examples."""
    own = probes[probes.reading == "first"]
    keys = ["solver", "horizon", "layer"]
    return probes.merge(own.loc[[validation_loss(own).idxmin()], keys], on=keys)


# Geometry


def geometry_tables(table: pd.DataFrame) -> Iterator[Table]:
    """A table of every thick line of the picture."""
    for names, rows in table.groupby(lines_of(table), sort=False):
        here = at_nearest(rows)
        yield display(
            f"Geometry of {line_name(names, here)} ({JACKKNIFE})", here, ["layer", *GEOMETRY_COLUMNS]
        )


def line_name(names: tuple[Hashable, ...], rows: pd.DataFrame) -> str:
    """What a line is called, given the values of the columns that tell it apart, and its rows."""
    at = [f"seed {name}" if isinstance(name, int) else label(str(name)) for name in names]
    return ", ".join([*at, *(f"position {name}" for name in rows.get("position", [])[:1])])


def lines_of(table: pd.DataFrame) -> list[str]:
    """Columns that tell lines apart, but for the position."""
    return [name for name in ("variant", "seed", "location") if name in table]


def at_nearest(table: pd.DataFrame) -> pd.DataFrame:
    """The rows at the position that is nearest to what is read."""
    return table[table.position == nearest(table.position)] if "position" in table else table
