"""Figure 5 of arXiv 2410.13077: perplexity and accuracy over the numbers of layers k and of weights kept.

    python analyses/depth_figure5_grid.py --preset demo --seeds 3 --runs runs/depth-grid
    python analyses/depth_figure5_grid.py --runs runs/depth-grid

With a preset, what is missing in the folder is trained and measured: member `ensemble` for every k
(`depth.layers`) and every Top-K (`depth.top_k`) up to it, and `plain` once. Without, what exists is drawn;
any sweep over these settings will do. Cells are means over seeds of a document's sums. All of them are
measured on test documents, so the best cell must not be chosen here; the CSV has each cell's interval, and
its difference from `plain`, paired over documents, with its own.
"""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from shared.depth import check_method, differences_of, sums_of, values_of
from shared.script import add_training_options, run_script, save_figure, script_parser, training_config

import probekit
from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.run.run import Run

LAYERS, TOP_K, MEMBERS = "depth.layers", "depth.top_k", "depth.members"
REFERENCE, CELL = "plain", "ensemble"

METRICS = {"perplexity": "test perplexity", "accuracy": "accuracy on questions"}

Cell = tuple[int, int]
"""Numbers of layers and of weights kept."""


def members(config: Config, layers: list[int] | None) -> dict[str, dict[str, Any]]:
    """Returns the sweep's members: the reference and every cell."""
    if layers is None and config.lm.name is not None:
        raise ProbekitError(f"lm.name is {config.lm.name}; give --layers, the numbers of layers to train")
    numbers = layers or range(1, config.lm.layers + 1)
    cells = {
        f"layers={k},top_k={kept}": {MEMBERS: [CELL], LAYERS: k, TOP_K: kept}
        for k in numbers
        for kept in range(1, k + 1)
    }
    return {REFERENCE: {MEMBERS: [REFERENCE]}, **cells}


def swept(given: argparse.Namespace) -> probekit.Sweep:
    """Returns the sweep in the folder; with a preset, trains what is missing first."""
    if given.preset is None:
        return probekit.Sweep.open(given.runs)
    config, seeds = training_config(given)
    config = config.override({"method": "depth-ensemble"})
    return probekit.sweep(config, members(config, given.layers), seeds, given.runs)


def cells_of(sweep: probekit.Sweep) -> tuple[dict[Cell, dict[int, Run]], dict[int, Run]]:
    """Returns runs by seed: of every cell, and of the reference.

    Raises:
        ProbekitError: The sweep is over something else or has no ensemble; two members have one cell.
    """
    if others := {*sweep.settings} - {LAYERS, TOP_K, MEMBERS}:
        over = ", ".join(sorted(others))
        raise ProbekitError(f"{sweep.folder} sweeps over {over} too, not over {LAYERS} and {TOP_K} alone")
    names: dict[Cell, str] = {}
    cells: dict[Cell, dict[int, Run]] = {}
    references: dict[int, Run] = {}
    for place, run in sweep.runs.items():
        check_method(run)
        depth = run.config.depth
        if REFERENCE in depth.members:
            references[place.seed] = run
        if CELL in depth.members:
            cell = depth.layers, depth.top_k or depth.layers
            if names.setdefault(cell, place.member) != place.member:
                raise ProbekitError(
                    f"{sweep.folder}: {names[cell]} and {place.member} both have {LAYERS} {cell[0]} and "
                    f"{TOP_K} {cell[1]}; leave one out"
                )
            cells.setdefault(cell, {})[place.seed] = run
    if not cells or not references:
        raise ProbekitError(
            f"{sweep.folder} has no finished run with the member {REFERENCE if cells else CELL}; go on with "
            "the command that began it"
        )
    return cells, references


def grid(sweep: probekit.Sweep) -> pd.DataFrame:
    """Measures all cells, and their differences from the reference, as the column `what` says."""
    cells, references = cells_of(sweep)
    resamples = sweep.config.evaluation.resamples
    plain = _sums(references, REFERENCE)
    parts = [values_of(plain, resamples=resamples).assign(what="value")]
    for (layers, kept), runs in sorted(cells.items()):
        own = _sums(runs, CELL)
        found = [values_of(own, resamples=resamples).assign(what="value")]
        if both := runs.keys() & references.keys():
            paired = pd.concat([own[own.seed.isin(both)], plain[plain.seed.isin(both)]])
            difference = differences_of(paired, [(CELL, REFERENCE)], resamples=resamples)
            found.append(difference.assign(what="difference", name=f"{CELL} − {REFERENCE}"))
        parts += [part.assign(layers=layers, top_k=kept) for part in found]
    return (
        pd.concat(parts, ignore_index=True)
        .drop(columns=["first", "second"], errors="ignore")
        .astype({"layers": "Int64", "top_k": "Int64"})
    )


def _sums(runs: dict[int, Run], name: str) -> pd.DataFrame:
    sums = sums_of([*runs.values()])
    return sums[sums.name == name]


def draw(table: pd.DataFrame) -> Figure:
    """Draws a heat map for each metric."""
    means = table[table.seed.isna() & (table.what == "value")]
    cells = means[means.name == CELL]
    width = 2 * (1.6 + 0.95 * means.top_k.nunique()) + 1.6
    figure = Figure(figsize=(width, 2.1 + 0.62 * means.layers.nunique()), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 2), METRICS.items(), strict=True):
        digits = 2 if metric == "perplexity" else 3
        values = cells[cells.metric == metric].pivot_table("value", "layers", "top_k")
        sns.heatmap(
            values.sort_index(ascending=False).astype(float),
            annot=True,
            fmt=f".{digits}f",
            annot_kws={"fontsize": 10},
            cmap="cividis",
            linewidths=1,
            cbar_kws={"label": title},
            ax=axes,
        )
        reference = means[(means.name == REFERENCE) & (means.metric == metric)].value.item()
        axes.set_title(f"{title} (plain: {reference:.{digits}f})", fontsize=11)
        axes.set(xlabel="weights kept, Top-K", ylabel="layers k")
        axes.tick_params(axis="y", rotation=0)
    documents, seeds = cells.groupby("metric").documents.max(), int(cells.seeds.max())
    figure.supxlabel(
        f"mean of {seeds} seed{'s' * (seeds > 1)}; {documents['perplexity']} documents, questions on "
        f"{documents['accuracy']}",
        fontsize=9,
    )
    return figure


def main() -> None:
    """Trains what is missing, compares, saves."""
    parser = script_parser(__doc__, "figures/depth_figure5_grid.png")
    add_training_options(parser, "runs/depth-grid", preset=None, seeds=3)
    parser.add_argument(
        "--layers", type=int, nargs="+", help="with --preset: the k to train (all up to the LM's layers)"
    )
    given = parser.parse_args()
    sweep = swept(given)
    table = grid(sweep)
    settings = {"preset": given.preset, "seeds": list(sweep.seeds)}
    shown = table[table.seed.isna()].drop(columns="seed")
    save_figure(draw(table), table, given.out, settings, [*sweep.runs.values()], shown)
    if sweep.missing:
        print(f"not finished, and not drawn: {', '.join(map(str, sweep.missing))}")  # noqa: T201


if __name__ == "__main__":
    run_script(main)
