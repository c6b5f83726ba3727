"""Table 2: what every variant writes, by all metrics: words, structure, and how well the plan is followed.

    python analyses/table2_generation.py runs/table1/demo
    python analyses/table2_generation.py runs/demo

A folder is a sweep, whose seeds are taken together, or a single run; runs whose generated text is not
measured yet are measured first. Of a sweep, points are means over seeds with 95 % intervals from resampling
documents and thin marks are single seeds; MAUVE, of all texts at once, has intervals for single runs alone.
The picture shows the longest texts, the CSV all lengths. "true" is true text in generated text's place,
"other document" the true continuation of another document.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from manifest import save_figure
from matplotlib.figure import Figure
from scripts import run_script, script_parser

import probekit
from probekit.reports.figures import draw_intervals

PANELS = {
    ("perplexity", "test documents"): "perplexity ↓",
    ("rouge2", "continuations"): "ROUGE-2 ↑",
    ("mauve", "samples"): "MAUVE of samples ↑",
    ("levenshtein_normalised", "continuations"): "Levenshtein distance of actions ↓",
    ("latent_perplexity", "samples"): "latent perplexity of samples ↓",
    ("plan_following", "continuations"): "sentences with the action given ↑",
}
"""Metric and texts of each panel, its title, and which way is better."""


def measured(folder: Path) -> tuple[list[probekit.Run], pd.DataFrame]:
    """The runs in a folder, and their metrics with a column `name`: the variant, and whose actions."""
    single = not probekit.Sweep.is_in(folder)
    runs = [probekit.load_run(folder)] if single else list(probekit.Sweep.open(folder).runs.values())
    for run in runs:
        if not (run.folder / "generation.json").is_file():
            probekit.evaluate_generation(run)
    table = _of_run(runs[0]) if single else probekit.Sweep.open(folder).table()
    told = table.variant.eq("oracle") & table.actions.eq("true")
    return runs, table.assign(name=table.variant.mask(told, "oracle (true actions)"))


def _of_run(run: probekit.Run) -> pd.DataFrame:
    """A single run's metrics, as a sweep's table has those over all seeds."""
    perplexity = pd.DataFrame(run.evaluation()["perplexity"]).rename(
        columns={f"perplexity{end}": f"value{end}" for end in ("", "_low", "_high")}
    )
    perplexity = perplexity.assign(metric="perplexity", texts="test documents", length=0)
    generated = pd.DataFrame(run.generation_metrics()["metrics"])
    return pd.concat([perplexity, generated], ignore_index=True).assign(seed=pd.NA)


def draw(table: pd.DataFrame) -> Figure:
    """A panel for each metric, a line for each variant."""
    names = list(dict.fromkeys(table.name))
    figure = Figure(figsize=(15, 0.32 * len(names) * 2 + 2.2), layout="constrained")
    for axes, ((metric, texts), title) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        part = table[(table.metric == metric) & (table.texts == texts)]
        part = part[part.length == part.length.max()]
        draw_intervals(axes, part, names)
        length = f", {part.length.max():,} tokens" if len(part) and part.length.max() else ""
        axes.set_title(title + length, fontsize=10)
    return figure


def main() -> None:
    """Measures what is missing, saves."""
    parser = script_parser(__doc__, "figures/table2_generation.png")
    parser.add_argument("folder", type=Path, help="a sweep or a run, trained and evaluated")
    given = parser.parse_args()
    runs, table = measured(given.folder)
    path = save_figure(
        draw(table), table, given.out, script="analyses/table2_generation.py", settings={}, runs=runs
    )
    shown = table[table.seed.isna()].pivot_table("value", "name", ["metric", "texts", "length"], sort=False)
    print(shown.to_string())  # noqa: T201 - a script tells what it found
    print(path)  # noqa: T201


if __name__ == "__main__":
    run_script(main)
