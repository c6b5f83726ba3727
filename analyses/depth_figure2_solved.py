"""Figure 2 of arXiv 2410.13077: which multiple-choice questions do the layers of an ensemble solve?

    python analyses/depth_figure2_solved.py runs/depth
    python analyses/depth_figure2_solved.py --preset demo --seeds 3 --runs runs/depth

A folder is a single run, or a sweep, of which the seeds of each member are taken together. With `--preset`
the sweep is trained first, into `RUNS/PRESET`, or gone on with: one member for each of `--tunings`. Two or
three layers are a Venn diagram, more an UpSet diagram; counts are means over seeds. Intervals are at 95 %,
from resampling documents. That any layer solves a question says what choosing the right layer would bring,
not that it can be chosen: one that guesses among four answers solves a quarter of what the last one fails.
"""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from late_layers import Groups, add_run_options, depth_runs, layer_name, layer_style, members_of
from manifest import save_figure
from matplotlib.figure import Figure, SubFigure
from overlap import VENN, draw_upset, draw_venn, intersections
from scripts import run_script, script_parser

import probekit
from probekit.config import MemberName
from probekit.errors import ProbekitError
from probekit.statistics import over_seeds

WHOLE, LAST = 0, -1
"""Columns of `solved`: the ensemble itself, and its last layer."""

SHARES: dict[str, Callable[[pd.DataFrame, pd.Series], pd.Series]] = {
    "the ensemble": lambda layers, whole: whole,
    "any layer": lambda layers, whole: layers.any(axis=1),
    "all layers": lambda layers, whole: layers.all(axis=1),
    "any layer but not the last one": lambda layers, whole: layers.any(axis=1) & ~layers[LAST],
    "any layer but not the ensemble": lambda layers, whole: layers.any(axis=1) & ~whole,
    "the ensemble but not the last layer": lambda layers, whole: whole & ~layers[LAST],
    "the last layer but not the ensemble": lambda layers, whole: layers[LAST] & ~whole,
}
"""What is told of the questions, from who solves them."""

WRITTEN = ("any layer but not the last one", "the ensemble", "the ensemble but not the last layer")
"""Shares under each diagram, behind that of the last layer."""


def solved(run: probekit.Run, member: MemberName) -> pd.DataFrame:
    """Who solves which question: a row for each, by question and document; columns are layers from behind.

    Raises:
        ProbekitError: The run, or this member of it, is not evaluated.
    """
    choices = run.choices()
    own = choices[choices.member == member]
    if own.layer.isna().all():
        raise ProbekitError(
            f"{run.folder / 'choices.parquet'} has no layers of {member}; run "
            f"`probekit evaluate {run.folder}`"
        )
    numbers = (own.layer - own.layer.max() - 1).fillna(WHOLE).astype(int)
    table = own.assign(number=numbers).pivot_table(
        "solved", ["question", "document"], "number", aggfunc="first"
    )
    return table.astype(bool)


def shares(tables: dict[int, pd.DataFrame], resamples: int) -> pd.DataFrame:
    """Shares of questions, from `solved` of every seed; as `over_seeds` has them."""
    parts = []
    for seed, table in tables.items():
        layers, whole = table.drop(columns=WHOLE), table[WHOLE]
        told = {layer_name(int(number)): layers[number] for number in sorted(layers.columns, reverse=True)}
        told |= {name: of(layers, whole) for name, of in SHARES.items()}
        for name, one in told.items():
            sums = one.groupby("document").agg(["sum", "count"]).reset_index()
            parts.append(sums.assign(seed=seed, name=name, metric="share"))
    return over_seeds(pd.concat(parts), ["metric", "name"], {}, resamples=resamples, seed=0)


def overlaps(tables: dict[int, pd.DataFrame]) -> pd.DataFrame:
    """Questions solved by some layers and no other: means over seeds, which ask the same."""
    every = pd.concat([table.drop(columns=WHOLE) for table in tables.values()])
    counts = intersections(every[sorted(every.columns, reverse=True)])
    return counts.assign(count=counts["count"] / len(tables))


Measured = dict[tuple[str, MemberName], tuple[pd.DataFrame, pd.DataFrame]]
"""Shares and overlaps of members by the name of their group."""


def measured(groups: Groups) -> Measured:
    """All ensembles of all groups."""
    found: Measured = {}
    for name, runs in groups.items():
        needed = "two layers or more: members ensemble or distilled, and depth.layers 2 or more"
        each = [members_of(run, reads=["late"], needed=needed) for run in runs]
        for member in each[0]:
            tables = {run.config.seed: solved(run, member) for run in runs}
            found[name, member] = shares(tables, runs[0].config.evaluation.resamples), overlaps(tables)
    return found


def numbers(found: Measured) -> pd.DataFrame:
    """All numbers; the column `what` tells shares from overlaps, whose `name` are the layers that solve."""
    parts = []
    for (runs, member), (share, counts) in found.items():
        layers = counts.columns.drop("count")
        names = [
            " & ".join(layer_name(int(n)) for n, inside in zip(layers, row, strict=True) if inside) or "none"
            for row in counts[layers].to_numpy(bool)
        ]
        overlap = pd.DataFrame({"name": names, "value": counts["count"], "seeds": share.seeds.max()})
        for what, part in (("share", share.drop(columns="metric")), ("questions", overlap)):
            parts.append(part.assign(runs=runs, member=member, what=what))
    return pd.concat(parts, ignore_index=True)


def draw(found: Measured) -> Figure:
    """A row for each group, a diagram for each member."""
    groups, members = (list(dict.fromkeys(key[part] for key in found)) for part in (0, 1))
    layers = max(len(counts.columns) - 1 for _, counts in found.values())
    width, height = (5.2, 4.6) if layers <= VENN else (8.0, 4.4 + 0.2 * layers)
    figure = Figure(figsize=(width * len(members), height * len(groups)), layout="constrained")
    places = figure.subfigures(len(groups), len(members), squeeze=False, hspace=0.06)
    for (group, member), (share, counts) in found.items():
        place = places[groups.index(group), members.index(member)]
        _draw_overlap(place, counts)
        seeds = int(share.seeds.max())
        of = f", mean of {seeds} seeds" if seeds > 1 else ""
        place.suptitle(f"{group}: {member}{of}", fontsize=11)
        place.supxlabel(_told(share), fontsize=9)
    return figure


def _draw_overlap(place: SubFigure, counts: pd.DataFrame) -> None:
    layers = [int(number) for number in counts.columns.drop("count")]
    names = {number: layer_name(number) for number in layers}
    colours = {number: layer_style(number)["color"] for number in layers}
    if len(layers) <= VENN:
        draw_venn(place.subplots(), counts, [*names.values()], [*colours.values()])
    else:
        draw_upset(place, counts, names, colours)


def _told(share: pd.DataFrame) -> str:
    whole = share[share.seed.isna()].set_index("name")
    rows = [
        (name, *whole.loc[name, ["value", "value_low", "value_high"]])
        for name in (layer_name(LAST), *WRITTEN)
    ]
    questions = f"95 % intervals, {int(whole.documents.max())} documents"
    lines = [f"{name}: {100 * v:.1f} % [{100 * low:.1f}, {100 * high:.1f}]" for name, v, low, high in rows]
    return "\n".join(["solved by", *lines, questions])


def main() -> None:
    """Trains what is missing, counts, saves."""
    parser = script_parser(__doc__, "figures/depth_figure2_solved.png")
    add_run_options(parser)
    given = parser.parse_args()
    groups = depth_runs(given, parser)
    found = measured(groups)
    table = numbers(found)
    path = save_figure(
        draw(found),
        table,
        given.out,
        script="analyses/depth_figure2_solved.py",
        settings={"preset": given.preset},
        runs=[run for runs in groups.values() for run in runs],
    )
    shown = table[(table.what == "share") & table.seed.isna()].drop(columns=["what", "seed"])
    print(shown.to_string(index=False))  # noqa: T201 - a script tells what it found
    print(path)  # noqa: T201


if __name__ == "__main__":
    run_script(main)
