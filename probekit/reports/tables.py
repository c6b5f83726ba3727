"""Tables on the terminal: what each command ends with."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from probekit.corpus.inspect import action_table, sentence_lengths, sizes
from probekit.corpus.store import Corpus
from probekit.evaluation.evaluate import Evaluation
from probekit.probing.probe import ProbeResults
from probekit.run import Run
from probekit.storage import read_json

FEW_DOCUMENTS = 40
"""Below so many test documents the terminal warns: 95 % intervals cover 91 % at 40, 88 % at 9 (simulated)."""

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
        f"{facts['blank_documents_dropped']:,} blank documents dropped; {facts['one_sentence_documents']:,} "
        "documents of one sentence, kept out of planner training; "
        f"vocabulary of {facts['vocabulary']:,} tokens"
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
                f"{row['sentences']:,}",
                f"{row['share']:.1%}",
                "█" * round(12 * row["share"] / most),
                "\n".join(text if len(text) <= 100 else text[:99] + "…" for text in row["nearest"]),
            ]
            for action, row in actions.head(DISPLAY_ACTIONS).iterrows()
        ),
    )
    if len(actions) > DISPLAY_ACTIONS:
        _say(f"… and {len(actions) - DISPLAY_ACTIONS:,} rarer actions")


def print_evaluation(evaluation: Evaluation) -> None:
    """Perplexities with intervals, the difference of every two, planner metrics."""
    table = evaluation.perplexity
    _warn_of_few(table.documents.iloc[0])
    documents, tokens = table.documents.iloc[0], table.tokens.iloc[0]
    _print(
        f"Perplexity per token on {documents:,} test documents, {tokens:,} tokens "
        "(95 % intervals from resampling documents)",
        ["variant", "actions", "perplexity", "95 % interval"],
        (
            [row["variant"], row["actions"], f"{row['perplexity']:.3f}", _range(row, "perplexity")]
            for row in table.to_dict("records")
        ),
    )
    _print(
        "Differences of perplexity, paired over documents",
        ["first", "second", "first - second", "95 % interval"],
        (
            [row["first"], row["second"], f"{row['difference']:+.3f}", _range(row, "difference")]
            for row in evaluation.differences.to_dict("records")
        ),
    )
    planner = evaluation.planner
    metrics = planner.metric.unique()
    _print(
        f"Next action on {planner.sentences.iloc[0]:,} test sentences of "
        f"{planner.documents.iloc[0]:,} documents",
        ["reader", *(f"{metric} (nats)" if metric == "cross_entropy" else metric for metric in metrics)],
        (
            [str(reader), *(_with_range(row, "value") for row in rows.to_dict("records"))]
            for reader, rows in planner.groupby("reader", sort=False)
        ),
    )


def print_probes(results: ProbeResults) -> None:
    """The best cells, the baselines on the same examples, and what to know of all cells together."""
    table = results.table
    best = results.best_cells().sort_values(["horizon", "variant", "location", "solver", "seed"])
    examples, documents = table.examples[table.accuracy.notna()].max(), table.documents.max()
    _print(
        f"Best cells, chosen on validation, on {examples:,} test examples of {documents:,} documents",
        ["cell", "accuracy", "bits over the prior", "gain in bits", "selectivity", "compression"],
        [_cell_row(row) for row in best.to_dict("records")],
    )
    beside = table[table.reader != "probe"].merge(best[["distance", "horizon"]].drop_duplicates())
    beside = beside.sort_values(["horizon", "distance"], kind="stable")
    _print(
        "Baselines and ceilings at the distances and horizons of these cells, on the same examples",
        ["distance", "horizon", "reader", "accuracy", "bits over the prior"],
        (
            [str(row["distance"]), str(row["horizon"]), _reader(row), *_scores(row)]
            for row in beside.to_dict("records")
        ),
    )
    _warn_of_few(documents)
    for line in [*_cell_lines(table[table.reader == "probe"]), *results.notes]:
        _say(line)
    _say(f"All {len(table):,} rows: {results.folder / 'results.parquet'}; pictures: {results.folder}")


def _cell_row(row: Mapping[Hashable, Any]) -> list[str]:
    target = "" if row["target"] == "action" else f"{row['target']}, "
    return [
        f"{target}{row['variant']}, {row['location']}, {row['solver']}\n"
        f"layer {row['layer']}, distance {row['distance']}, horizon {row['horizon']}, seed {row['seed']}",
        *_scores(row),
        f"{_with_range(row, 'gain')}\nover the {row['gain_over']}",
        _with_range(row, "selectivity"),
        "" if pd.isna(row["compression"]) else f"{row['compression']:.3f}",
    ]


def _reader(row: Mapping[Hashable, Any]) -> str:
    return row["reader"] if pd.isna(row["seed"]) else f"{row['reader']}, seed {row['seed']}"


def _cell_lines(probes: pd.DataFrame) -> Iterator[str]:
    """How many cells beat the baselines, and how many have nothing to say, or nothing to rely on."""
    compared = probes[probes.gain_low.notna() & ~probes.injected]
    if len(compared):
        beat = (compared.gain_low > 0.0).groupby(compared.variant).agg(["sum", "count"])
        each = ", ".join(f"{variant} {won} of {of}" for variant, won, of in beat.itertuples())
        yield (
            f"{beat['sum'].sum():,} of {len(compared):,} cells read more than the "
            f"{' or '.join(sorted(compared.gain_over.unique()))}, 95 % for all together ({each})"
        )
    empty = probes[probes.accuracy.isna()]
    if len(empty):
        where = [
            f"distance {', '.join(map(str, sorted(cells.distance.unique())))} of horizon {horizon}"
            for horizon, cells in empty.groupby("horizon")
        ]
        yield f"{len(empty):,} of {len(probes):,} cells are empty (too few examples): {'; '.join(where)}"
    if constant := int(probes.constant.fillna(value=False).sum()):
        yield f"{constant:,} of {len(probes):,} cells have the same activation in all examples"
    if unconverged := int((~probes.converged.fillna(value=True)).sum()):
        yield f"{unconverged:,} of {len(probes):,} probes did not converge"


def _scores(row: Mapping[Hashable, Any]) -> list[str]:
    return [_with_range(row, "accuracy"), _with_range(row, "bits")]


def _warn_of_few(documents: int) -> None:
    if documents < FEW_DOCUMENTS:
        _say(
            f"Only {documents} test documents: intervals from resampling so few are too narrow to trust; "
            "give more documents, or a larger corpus.test_fraction"
        )


def _with_range(row: Mapping[Hashable, Any], value: str) -> str:
    return f"{row[value]:.3f} {_range(row, value)}" if pd.notna(row[value]) else ""


def _range(row: Mapping[Hashable, Any], value: str) -> str:
    low, high = row[f"{value}_low"], row[f"{value}_high"]
    return "(no interval)" if pd.isna(low) else f"[{low:.3f}, {high:.3f}]"


def _print(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(_literal, row))
    _console().print(table)


def _say(line: str) -> None:
    _console().print(_literal(line))


def _console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal that says how wide it is."""
    console = Console(soft_wrap=True)
    return console if console.is_terminal else Console(soft_wrap=True, width=160)


def _literal(text: str) -> Text:
    """The text as it is: no markup, no emoji, and no control characters, which would steer the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))
