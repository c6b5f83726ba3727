"""Sections of a report that tell what was found: perplexity, planners, questions, generated text, probes."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from probekit.probing.locations import label
from probekit.reports.document import Block, Fold, Items, Paragraph, Picture, estimate, fold_if, table
from probekit.reports.figures import panels, svg_of
from probekit.reports.over_training import plot_over_training
from probekit.reports.plots import PREFERRED, plot_curve, plot_perplexity, plot_probes, probed_variants
from probekit.reports.report_findings import Findings
from probekit.reports.terminal import beaten_baselines, best_by_step

Row = Mapping[Hashable, Any]

MANY = 12
"""Rows of a table of differences from which on it is folded."""

UNFOLDED = 2
"""Places whose pictures are shown at once; more are folded."""

INTERVALS = "95 % intervals from resampling documents"


def perplexity(found: Findings) -> list[Block]:
    """Perplexities and their differences."""
    rows = found.evaluation["perplexity"]
    documents, tokens = int(rows.documents.iloc[0]), int(rows.tokens.iloc[0])
    best = rows.sort_values("perplexity").iloc[0]
    picture = Picture(
        "perplexity",
        f"Perplexity per token of {documents:,} test documents; lower is better.",
        f"Perplexity of {len(rows)} models with intervals; the lowest is {best.perplexity:.3f}, of "
        f"{best.variant}. The table below has all.",
        svg_of(plot_perplexity(found.run)),
    )
    caption = f"Perplexity per token on {documents:,} test documents, {tokens:,} tokens ({INTERVALS})"
    columns = ["variant", "actions", "perplexity", "documents"]
    cells = [
        (row["variant"], row["actions"], _estimate(row, "perplexity"), int(row["documents"]))
        for row in rows.to_dict("records")
    ]
    differences = found.evaluation["differences"]
    return [picture, table(caption, columns, cells, words=2), *_differences(differences, "perplexity")]


def _differences(rows: pd.DataFrame, of: str) -> Iterator[Block]:
    if len(rows):
        caption = f"Differences of {of}, paired over documents ({INTERVALS})"
        cells = [
            (row["first"], row["second"], _estimate(row, "difference", signed=True), int(row["documents"]))
            for row in rows.to_dict("records")
        ]
        numbers = table(caption, ["first", "second", "first - second", "documents"], cells, words=2)
        yield fold_if(len(rows) > MANY, f"All {len(rows):,} differences of {of}", numbers)


def planners(found: Findings) -> list[Block]:
    """Planners beside their baselines and ceilings."""
    rows = found.evaluation["planner"]
    metrics = list(rows.metric.unique())
    caption = (
        f"Next action on {int(rows.sentences.iloc[0]):,} test sentences of {int(rows.documents.iloc[0]):,} "
        f"documents ({INTERVALS})"
    )
    cells = []
    for reader, own in rows.groupby("reader", sort=False):
        by_metric = {row["metric"]: row for row in own.to_dict("records")}
        cells.append((reader, *(_estimate(by_metric[m], "value") if m in by_metric else "" for m in metrics)))
    names = ["cross-entropy (nats)" if metric == "cross_entropy" else metric for metric in metrics]
    blocks: list[Block] = [table(caption, ["reader", *names], cells)]
    if rows.reader.str.startswith("ceiling").any():
        blocks.append(
            Paragraph(
                "A ceiling is the exact posterior of the planted corpus, given the words of all sentences "
                "before, or their true actions: nobody who reads these can do better."
            )
        )
    return blocks


def choices(found: Findings) -> list[Block]:
    """Multiple choice."""
    rows = found.evaluation["accuracy"]
    caption = (
        f"Accuracy on {int(rows.questions.iloc[0]):,} multiple-choice questions of "
        f"{int(rows.documents.iloc[0]):,} documents ({INTERVALS})"
    )
    cells = [(row["variant"], _estimate(row, "accuracy")) for row in rows.to_dict("records")]
    differences = found.evaluation["accuracy_differences"]
    return [table(caption, ["variant", "accuracy"], cells), *_differences(differences, "accuracy")]


def generation(found: Findings) -> list[Block]:
    """Metrics of generated text: a table for each kind and length of texts, and one of plans."""
    metrics = found.generation["metrics"]
    planned = metrics.metric.str.startswith("plan_following")
    blocks: list[Block] = []
    for (texts, length), own in metrics[~planned].groupby(["texts", "length"], sort=False):
        blocks.append(_metrics(f"Generated {texts} of {length:,} tokens ({INTERVALS})", own))
        if blank := int(own.groupby(["variant", "actions"])["empty"].max().sum()):
            blocks.append(Paragraph(f"Blank among these: {blank:,}."))
    if planned.any():
        blocks.append(
            _metrics(f"Sentences that have the action they were given ({INTERVALS})", metrics[planned])
        )
    notes = found.generation["notes"]
    return [*blocks, *([Items(tuple(map(str, notes)))] if notes else [])]


def _metrics(caption: str, rows: pd.DataFrame) -> Block:
    names = list(rows.metric.unique())
    cells = []
    for (variant, actions), own in rows.groupby(["variant", "actions"], sort=False):
        by_metric = {row["metric"]: row for row in own.to_dict("records")}
        shown = (_over_seeds(by_metric[name]) if name in by_metric else "" for name in names)
        cells.append((variant, actions, *shown, int(own.documents.max())))
    columns = ["variant", "actions", *(name.replace("_", " ") for name in names), "documents"]
    return table(caption, columns, cells, words=2)


def _over_seeds(row: Row) -> str:
    spread = row["seed_spread"]
    return _estimate(row, "value") + ("" if pd.isna(spread) else f"\nspread over seeds {spread:.3g}")


def probes(found: Findings) -> list[Block]:
    """The best cells beside what they have to beat, pictures of all, and what to know of them."""
    results = found.probes
    rows = results.table
    cells = rows[rows.reader == "probe"]
    best = results.best_cells().sort_values(["horizon", "variant", "location", "solver", "seed"])
    beside = rows[rows.reader != "probe"].merge(best[["distance", "horizon"]].drop_duplicates())
    beside = beside.sort_values(["horizon", "distance"], kind="stable")
    examples = int(rows.examples[rows.accuracy.notna()].max())
    lines = [*beaten_baselines(cells), *results.notes]
    return [
        Paragraph(
            f"Probes of {cells.target.iloc[0]} on {examples:,} test examples of "
            f"{int(rows.documents.max()):,} documents. Accuracy and bits have {INTERVALS}; the intervals of "
            "the gain over the strongest baseline that needs no model hold for all cells together."
        ),
        _best(best),
        table(
            "Baselines and ceilings at the distances and horizons of these cells, on the same examples",
            ["reader", "distance", "horizon", "accuracy", "bits over the prior"],
            map(_beside, beside.to_dict("records")),
        ),
        *([Items(tuple(map(str, lines)))] if lines else []),
        *_pictures(found),
    ]


def _best(cells: pd.DataFrame) -> Block:
    caption = "The best cell of each variant, location, solver and horizon, chosen on validation documents"
    numbers = ["layer", "distance", "horizon", "seed"]
    return _cells(caption, cells, numbers, ["solver", "horizon", "seed"], list(MEASURES))


def _cells(
    caption: str,
    cells: pd.DataFrame,
    numbers: Sequence[str],
    optional: Sequence[str],
    measures: Sequence[str],
) -> Block:
    """A row for each cell; what may be told once, and is the same of all, stands in the caption."""
    same = [name for name in optional if len(cells[name].unique()) == 1]
    words = [name for name in ("variant", "location", "solver") if name not in same]
    numbers = [name for name in numbers if name not in same]
    told = ", ".join(f"{name} {cells[name].iloc[0]}" for name in same)
    rows = (
        [
            *(row[name] for name in words),
            *(int(row[name]) for name in numbers),
            *(MEASURES[name](row) for name in measures),
        ]
        for row in cells.to_dict("records")
    )
    columns = [*words, *numbers, *measures]
    return table(f"{caption} ({told})" if told else caption, columns, rows, words=len(words))


def _beside(row: Row) -> tuple[object, ...]:
    reader: str = row["reader"] if pd.isna(row["seed"]) else f"{row['reader']}, seed {row['seed']}"
    return (
        *(reader, int(row["distance"]), int(row["horizon"])),
        *(_estimate(row, "accuracy"), _estimate(row, "bits")),
    )


def _pictures(found: Findings) -> Iterator[Block]:
    """A heat map of all variants and a curve for each location, horizon and solver; the usual one first."""
    rows = found.probes.table
    places: dict[tuple[str, int, str], set[str]] = {}
    for panel in panels(rows):
        places.setdefault((panel.location, panel.horizon, panel.solver), set()).add(panel.variant)
    order = sorted(places, key=lambda place: place[0] != PREFERRED["location"])
    for number, place in enumerate(order):
        variants = [name for name in probed_variants(rows) if name in places[place]]
        where: dict[str, Any] = dict(zip(("location", "horizon", "solver"), place, strict=True))
        location, horizon, solver = place
        name, shown = f"{label(location)}, horizon {horizon}, {solver}", ", ".join(variants)
        file = re.sub(r"[^\w-]+", "_", f"{location}_h{horizon}_{solver}")
        heat = Picture(
            f"heatmap_{file}",
            f"{name}: test accuracy by layer and distance, all on one scale.",
            f"Heat maps of accuracy by layer and distance at {location}, for {shown}.",
            svg_of(plot_probes(found.run, variants, **where)),
        )
        curve = Picture(
            f"curve_{file}",
            f"{name}: accuracy of each variant's best layer against distance, with baselines and ceilings.",
            f"Accuracy against distance at {location}, for {shown}, beside baselines and ceilings.",
            svg_of(plot_curve(found.run, variants, **where)),
        )
        yield from (heat, curve) if number < UNFOLDED else (Fold(f"Pictures: {name}", (heat, curve)),)


def over_training(found: Findings, stage: str) -> list[Block]:
    """What probes read at a stage's checkpoints: the picture, and the best layer by step."""
    results = found.over_training(stage)
    best = best_by_step(results.table).sort_values(
        ["variant", "location", "solver", "horizon", "seed", "step"], kind="stable"
    )
    near, documents = int(best.distance.min()), int(best.documents.max())
    picture = Picture(
        f"over_training_{stage.replace('/', '_')}",
        f"Test accuracy at {best.step.nunique():,} steps of {stage}, by layer and by distance; bands are "
        f"{INTERVALS}, and below are the losses.",
        f"Accuracy against training steps of {stage}; the table below has the best layer at every step.",
        svg_of(plot_over_training(found.run, stage)),
    )
    numbers = _cells(
        f"The layer that is best on validation documents behind each step of {stage}, at distance {near}, "
        f"on {documents:,} test documents ({INTERVALS})",
        best,
        ["step", "layer", "horizon", "seed"],
        ["variant", "location", "solver", "horizon", "seed"],
        ["accuracy", "bits over the prior", "gain in bits", "gained over"],
    )
    return [picture, numbers, *([Items(tuple(results.notes))] if results.notes else [])]


def _estimate(row: Row, name: str, *, signed: bool = False) -> str:
    return estimate(row[name], row[f"{name}_low"], row[f"{name}_high"], signed=signed)


MEASURES: dict[str, Callable[[Row], str]] = {
    "accuracy": lambda row: _estimate(row, "accuracy"),
    "bits over the prior": lambda row: _estimate(row, "bits"),
    "gain in bits": lambda row: _estimate(row, "gain", signed=True),
    "gained over": lambda row: "" if pd.isna(row["gain_over"]) else row["gain_over"],
    "selectivity": lambda row: _estimate(row, "selectivity", signed=True),
    "compression": lambda row: "" if pd.isna(row["compression"]) else f"{row['compression']:.3f}",
}
"""What tables of cells tell of each, by the column's name."""
