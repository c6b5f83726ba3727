"""Tables on the terminal: what each command ends with."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from probekit.corpus.inspect import action_table, sentence_lengths, sizes
from probekit.corpus.store import Corpus
from probekit.evaluation.evaluate import Evaluation
from probekit.probing.probe import ProbeResults
from probekit.run import Run
from probekit.storage import read_json

DISPLAY_ACTIONS = 30
"""Actions that the corpus's table shows; the rest is counted."""


def print_training(run: Run) -> None:
    """The stages of a run, their times and what they left."""
    stages = read_json(run.folder / "run.json")["stages"]
    rows = [
        (name, f"{facts['seconds']:.1f}", f"{facts['parameters']:,}" if "parameters" in facts else "")
        for name, facts in stages.items()
    ]
    _print("Training", ["stage", "seconds", "parameters"], rows)
    _say(f"The run is in {run.folder}. Next: probekit evaluate {run.folder}, probekit probe {run.folder}")


def print_corpus(corpus: Corpus, nearest: int) -> None:
    """Sizes, sentence lengths, the actions' histogram and the sentences nearest to each action."""
    table = sizes(corpus)
    _print(
        "Corpus",
        ["split", *table.columns],
        (
            [split, *(f"{value:,}" for value in row)]
            for split, row in zip(table.index, table.to_numpy(), strict=True)
        ),
    )
    lengths = sentence_lengths(corpus)
    _print("Sentence lengths in tokens", [f"{q:.0%}" for q in lengths.index], [[f"{v:.0f}" for v in lengths]])
    facts = corpus.facts
    _say(
        f"{facts['blank_documents_dropped']:,} blank documents dropped; {facts['one_sentence_documents']:,} documents "
        f"of one sentence, kept out of planner training; vocabulary of {facts['vocabulary']:,} tokens"
    )
    if "adjusted_rand_index" in facts:
        _say(f"Clusters against planted actions: adjusted Rand index {facts['adjusted_rand_index']:.3f}")
    actions = action_table(corpus, nearest)
    most = actions.share.max()
    _print(
        f"Actions ({corpus.k}, by training sentences)",
        ["action", "sentences", "share", "", "nearest sentences"],
        (
            [
                str(action),
                f"{row.sentences:,}",
                f"{row.share:.1%}",
                "█" * round(12 * row.share / most),
                "\n".join(text if len(text) <= 100 else text[:99] + "…" for text in row.nearest),
            ]
            for action, row in actions.head(DISPLAY_ACTIONS).iterrows()
        ),
    )
    if len(actions) > DISPLAY_ACTIONS:
        _say(f"… and {len(actions) - DISPLAY_ACTIONS:,} rarer actions")


def print_evaluation(evaluation: Evaluation) -> None:
    """Perplexities with intervals, differences to the variant before, planner metrics."""
    table = evaluation.perplexity
    documents, tokens = table.documents.iloc[0], table.tokens.iloc[0]
    _print(
        f"Perplexity on {documents:,} test documents, {tokens:,} tokens (95 % intervals from resampling documents)",
        ["variant", "actions", "perplexity", "95 % interval"],
        (
            [
                row.variant,
                row.actions,
                f"{row.perplexity:.3f}",
                _range(row.perplexity_low, row.perplexity_high, 3),
            ]
            for row in table.itertuples()
        ),
    )
    _print(
        "Differences of perplexity, paired over documents",
        ["first", "second", "first - second", "95 % interval"],
        (
            [
                row.first,
                row.second,
                f"{row.difference:+.3f}",
                _range(row.difference_low, row.difference_high, 3),
            ]
            for row in evaluation.differences.itertuples()
        ),
    )
    planner = evaluation.planner
    wide = planner.pivot_table(
        index="reader", columns="metric", values=["value", "value_low", "value_high"], sort=False
    )
    metrics = planner.metric.unique()
    _print(
        f"Next action on {planner.sentences.iloc[0]:,} test sentences of {planner.documents.iloc[0]:,} documents",
        ["reader", *(f"{metric} (nats)" if metric == "cross_entropy" else metric for metric in metrics)],
        (
            [
                reader,
                *(
                    f"{row['value', m]:.3f} {_range(row['value_low', m], row['value_high', m], 3)}"
                    for m in metrics
                ),
            ]
            for reader, row in wide.iterrows()
        ),
    )


def print_probes(results: ProbeResults) -> None:
    """The best cell of every variant and location beside the baselines of the same cell."""
    table = results.table
    rows = []
    for best in results.best_cells().itertuples():
        beside = table[
            (table.reader != "probe") & (table.distance == best.distance) & (table.horizon == best.horizon)
        ]
        cell = f"{best.variant}, {best.location}, layer {best.layer:.0f}, distance {best.distance}, horizon {best.horizon}"
        for row in [best, *beside.itertuples()]:
            rows.append(
                [
                    cell if row.reader == "probe" else "",
                    row.reader,
                    f"{row.accuracy:.3f} {_range(row.accuracy_low, row.accuracy_high, 3)}",
                    f"{row.bits:.3f} {_range(row.bits_low, row.bits_high, 3)}",
                    f"{row.examples:,} / {row.documents:.0f}",
                ]
            )
    _print(
        "Best cell of each variant and location (chosen on validation), and the baselines on the same examples",
        ["cell", "reader", "accuracy", "bits over the prior", "examples / documents"],
        rows,
    )
    probes = table[table.reader == "probe"]
    empty, unconverged = int(probes.accuracy.isna().sum()), int((probes.converged == False).sum())  # noqa: E712
    if empty or unconverged:
        _say(
            f"Of {len(probes):,} probes {empty:,} are empty (too few examples), {unconverged:,} did not converge"
        )
    _say(f"All {len(table):,} rows: {results.folder / 'results.parquet'}; pictures: {results.folder}")


def _range(low: float, high: float, digits: int) -> str:
    return "(no interval)" if pd.isna(low) else f"[{low:.{digits}f}, {high:.{digits}f}]"


def _print(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(escape(_printable(cell)) for cell in row))
    _console().print(table)


def _say(line: str) -> None:
    _console().print(escape(line), highlight=False)


def _console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal that says how wide it is."""
    console = Console(soft_wrap=True)
    return console if console.is_terminal else Console(soft_wrap=True, width=140)


def _printable(text: str) -> str:
    """Text from a corpus may hold control characters that would steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
