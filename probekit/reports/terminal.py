"""Probes on the terminal: the best cells, what they are compared with, and what to mind."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from probekit.data.corpus import MORE_DOCUMENTS, Corpus, action_table, sentence_lengths, sizes, too_few
from probekit.evaluation.perplexity import Evaluation
from probekit.generation.texts import Written
from probekit.io import read_json
from probekit.probing.over_training import TrainingProbes
from probekit.probing.probe import ProbeResults
from probekit.run.run import Run
from probekit.sweep import Sweep

if TYPE_CHECKING:
    from probekit.generation.evaluate import GenerationEvaluation


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints a table of texts as they are."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(_literal, row))
    _console().print(table)


def say(line: str) -> None:
    """Prints a line as it is."""
    _console().print(_literal(line))


def warn_of_few(documents: int, remedy: str = MORE_DOCUMENTS) -> None:
    """Says so where test documents are few, and what is to be done."""
    if warning := too_few(documents, remedy):
        say(warning)


def with_range(row: Mapping[Hashable, Any], value: str) -> str:
    """A row's value with its interval, empty where it has none."""
    return f"{row[value]:.3f} {interval(row, value)}" if pd.notna(row[value]) else ""


def interval(row: Mapping[Hashable, Any], value: str) -> str:
    """The interval of a row's value, and words where there is none."""
    low, high = row[f"{value}_low"], row[f"{value}_high"]
    return "(no interval)" if pd.isna(low) else f"[{low:.3f}, {high:.3f}]"


class _Output(Console):
    """Standard output that leaves it to the command what happens when nobody reads on."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal that says how wide it is."""
    console = _Output(soft_wrap=True)
    return console if console.is_terminal else _Output(soft_wrap=True, width=160)


def _literal(text: str) -> Text:
    """The text as it is: no markup, no emoji, and no control characters, which would steer the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))


DISPLAY_ACTIONS = 30
"""Actions that the corpus's table shows; the rest is counted."""

SIZES = ("parameters", "tuned_parameters")
"""Facts of a stage: what was trained beside the LM (or all of a new one), and of the LM with it."""


def print_training(run: Run) -> None:
    """The stages of a run, their times and what they left."""
    stages = read_json(run.folder / "run.json")["stages"]
    rows = [
        [
            name,
            f"{facts['seconds']:.1f}" if "seconds" in facts else "",
            *(f"{facts[key]:,}" if key in facts else "" for key in SIZES),
        ]
        for name, facts in stages.items()
    ]
    print_table("Training", ["stage", "seconds", "parameters", "and of its LM"], rows)
    say(f"The run is in {run.folder}. Next: probekit evaluate {run.folder}, probekit probe {run.folder}")


def print_corpus(corpus: Corpus, nearest: int) -> None:
    """Sizes, sentence lengths, the actions' histogram and the sentences nearest to each action."""
    table = sizes(corpus)
    print_table(
        "Corpus",
        ["split", *table.columns],
        (
            [split, *(f"{value:,}" for value in row)]
            for split, row in zip(table.index, table.to_numpy(), strict=True)
        ),
    )
    lengths = sentence_lengths(corpus)
    print_table(
        "Sentence lengths in tokens", [f"{q:.0%}" for q in lengths.index], [[f"{v:.0f}" for v in lengths]]
    )
    facts = corpus.facts
    say(
        f"{facts['blank_documents_dropped']:,} blank documents dropped; {facts['one_sentence_documents']:,} "
        "documents of one sentence, kept out of planner training; "
        f"vocabulary of {facts['vocabulary']:,} tokens"
    )
    if "adjusted_rand_index" in facts:
        say(f"Clusters against planted actions: adjusted Rand index {facts['adjusted_rand_index']:.3f}")
    actions = action_table(corpus, nearest)
    most = actions.share.max()
    print_table(
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
        say(f"… and {len(actions) - DISPLAY_ACTIONS:,} rarer actions")


def print_evaluation(evaluation: Evaluation) -> None:
    """Perplexities with intervals, the difference of every two, planner metrics or multiple choice."""
    table = evaluation.perplexity
    warn_of_few(table.documents.iloc[0])
    documents, tokens = table.documents.iloc[0], table.tokens.iloc[0]
    print_table(
        f"Perplexity per token on {documents:,} test documents, {tokens:,} tokens "
        "(95 % intervals from resampling documents)",
        ["variant", "actions", "perplexity", "95 % interval"],
        (
            [row["variant"], row["actions"], f"{row['perplexity']:.3f}", interval(row, "perplexity")]
            for row in table.to_dict("records")
        ),
    )
    print_table(
        "Differences of perplexity, paired over documents",
        ["first", "second", "first - second", "95 % interval"],
        (
            [row["first"], row["second"], f"{row['difference']:+.3f}", interval(row, "difference")]
            for row in evaluation.differences.to_dict("records")
        ),
    )
    if evaluation.planner is not None:
        _print_planners(evaluation.planner)
    if evaluation.accuracy is not None and evaluation.accuracy_differences is not None:
        _print_choices(evaluation.accuracy, evaluation.accuracy_differences)


def _print_planners(planner: pd.DataFrame) -> None:
    metrics = planner.metric.unique()
    print_table(
        f"Next action on {planner.sentences.iloc[0]:,} test sentences of "
        f"{planner.documents.iloc[0]:,} documents",
        ["reader", *(f"{metric} (nats)" if metric == "cross_entropy" else metric for metric in metrics)],
        (
            [str(reader), *(with_range(row, "value") for row in rows.to_dict("records"))]
            for reader, rows in planner.groupby("reader", sort=False)
        ),
    )


def _print_choices(accuracy: pd.DataFrame, differences: pd.DataFrame) -> None:
    questions, documents = accuracy.questions.iloc[0], accuracy.documents.iloc[0]
    print_table(
        f"Multiple choice: {questions:,} questions of {documents:,} documents (by chance "
        f"{accuracy.chance.iloc[0]:.3f})",
        ["variant", "accuracy", "95 % interval"],
        (
            [row["variant"], f"{row['accuracy']:.3f}", interval(row, "accuracy")]
            for row in accuracy.to_dict("records")
        ),
    )
    print_table(
        "Differences of accuracy, paired over documents",
        ["first", "second", "first - second", "95 % interval"],
        (
            [row["first"], row["second"], f"{row['difference']:+.3f}", interval(row, "difference")]
            for row in differences.to_dict("records")
        ),
    )


def print_sweep(sweep: Sweep) -> None:
    """The mean over seeds of every metric, with its interval and the seeds' spread."""
    table = sweep.table()
    means = table[table.seed.isna()]
    warn_of_few(means.documents.min())
    for (metric, texts, length), own in means.groupby(["metric", "texts", "length"], sort=False):
        print_table(
            f"{str(metric).replace('_', ' ')} of {texts}{f' of {length:,} tokens' if length else ''}, mean "
            "over seeds (95 % intervals from resampling documents)",
            ["member", "variant", "actions", "mean", "spread over seeds", "seeds", "documents"],
            (
                [
                    *(row["member"], row["variant"], row["actions"], with_range(row, "value")),
                    "" if pd.isna(row["seed_spread"]) else f"{row['seed_spread']:.3f}",
                    *(str(row["seeds"]), f"{row['documents']:,}"),
                ]
                for row in own.to_dict("records")
            ),
        )
    if sweep.missing:
        say(f"Not finished, and not in the table: {', '.join(map(str, sweep.missing))}")
    say(f"All rows, of single seeds too: {sweep.folder / 'results.parquet'}; runs: {sweep.folder}/*/seed*")


def print_generation(evaluation: GenerationEvaluation) -> None:
    """What was found of generated text: a table for each kind and length of texts, and one of plans."""
    metrics = evaluation.metrics
    warn_of_few(evaluation.settings["prompts"])
    planned = metrics.metric.str.startswith("plan_following")
    for (texts, length), own in metrics[~planned].groupby(["texts", "length"], sort=False):
        title = f"Generated {texts} of {length:,} tokens (95 % intervals from resampling documents)"
        _print_metrics(title, own)
        if blank := int(own.groupby(["variant", "actions"])["empty"].max().sum()):
            say(
                f"Blank among these: {blank:,}; as far from true ones as can be, and not in latent perplexity"
            )
    if planned.any():
        _print_metrics("Sentences that have the action they were given", metrics[planned])
    for line in evaluation.notes:
        say(line)


def _print_metrics(title: str, metrics: pd.DataFrame) -> None:
    """A row for each variant and source of actions, a column for each metric."""
    names = list(metrics.metric.unique())
    rows = []
    for (variant, actions), own in metrics.groupby(["variant", "actions"], sort=False):
        found = {row["metric"]: row for row in own.to_dict("records")}
        cells = (_metric(found[name]) if name in found else "" for name in names)
        rows.append([str(variant), str(actions), *cells])
    print_table(title, ["variant", "actions", *(name.replace("_", " ") for name in names)], rows)


def _metric(row: Mapping[Hashable, Any]) -> str:
    spread = row["seed_spread"]
    return with_range(row, "value") + ("" if pd.isna(spread) else f"\nspread over seeds {spread:.3f}")


def print_texts(written: Written) -> None:
    """Prompts and continuations, sentence by sentence with the action given to each."""
    parts = zip(written.prompts, written.continuations, written.sentences, strict=True)
    for number, (prompt, more, sentences) in enumerate(parts):
        where = f", document {prompt.document}" if prompt.document >= 0 else ""
        begun = [["prompt", "", prompt.text.strip()]] if prompt.text.strip() else []
        rows = [["", "" if action is None else str(action), text] for text, action in sentences]
        title = f"Text {number}{where}, {len(more.tokens):,} tokens by {written.variant}"
        print_table(title, ["", "most probable action" if written.mixed else "action", "text"], begun + rows)
    texts = len(written.continuations)
    if written.lacking:
        say(
            f"Texts asked for: {texts + written.lacking:,}, written: {texts:,}; no more test documents go on "
            "behind their first generation.context tokens"
        )
    if stopped := sum(more.ended == "plan" for more in written.continuations):
        say(f"Ended where the plan ends: {stopped:,} of {texts:,}")
    if written.slid:
        say(
            f"Longer than the {written.window:,} tokens that the LM reads at once: {written.slid:,} of "
            f"{texts:,}; whenever these were full, it went on from the last half of them"
        )


def print_probes(results: ProbeResults) -> None:
    """The best cells, the baselines on the same examples, and what to know of all cells together."""
    table = results.table
    best = results.best_cells().sort_values(["horizon", "variant", "location", "solver", "seed"])
    examples, documents = table.examples[table.accuracy.notna()].max(), table.documents.max()
    print_table(
        f"Best cells, chosen on validation, on {examples:,} test examples of {documents:,} documents",
        ["cell", "accuracy", "bits over the prior", "gain in bits", "selectivity", "compression"],
        [_cell_row(row) for row in best.to_dict("records")],
    )
    beside = table[table.reader != "probe"].merge(best[["distance", "horizon"]].drop_duplicates())
    beside = beside.sort_values(["horizon", "distance"], kind="stable")
    print_table(
        "Baselines and ceilings at the distances and horizons of these cells, on the same examples",
        ["distance", "horizon", "reader", "accuracy", "bits over the prior"],
        (
            [str(row["distance"]), str(row["horizon"]), _reader(row), *_scores(row)]
            for row in beside.to_dict("records")
        ),
    )
    warn_of_few(documents)
    probes = table[table.reader == "probe"]
    for line in [*beaten_baselines(probes), *unreliable_cells(probes), *results.notes]:
        say(line)
    say(f"All {len(table):,} rows: {results.folder / 'results.parquet'}; pictures: {results.folder}")


def print_over_training(results: TrainingProbes, picture: Path) -> None:
    """The layer that is best on validation documents at every checkpoint, at the nearest distance."""
    best = best_by_step(results.table)
    documents = int(best.documents.max())
    print_table(
        f"Best layer behind each step of {results.stage}, distance {best.distance.min()}, on {documents:,} "
        "test documents",
        ["step", "cell", "accuracy", "bits over the prior", "gain in bits"],
        (
            [
                f"{row['step']:,}",
                f"{row['variant']}, {row['location']}, {row['solver']}, layer {row['layer']}",
                *_scores(row),
                f"{with_range(row, 'gain')} over the {row['gain_over']}",
            ]
            for row in best.to_dict("records")
        ),
    )
    warn_of_few(documents)
    for line in results.notes:
        say(line)
    say(f"All {len(results.table):,} rows: {results.path}; picture: {picture}")


def best_by_step(table: pd.DataFrame) -> pd.DataFrame:
    """The probes of the layer that is best on validation documents, of a table of `probe_checkpoints`.

    One at every step, at the nearest distance, for each variant, location, solver, horizon and seed.
    """
    probes = table[(table.reader == "probe") & table.accuracy.notna()]
    near = probes[probes.distance == probes.distance.min()]
    cells = near.groupby(["variant", "location", "solver", "horizon", "seed", "step"])
    return near.loc[cells.validation_cross_entropy.idxmin()]


def _cell_row(row: Mapping[Hashable, Any]) -> list[str]:
    target = "" if row["target"] == "action" else f"{row['target']}, "
    return [
        f"{target}{row['variant']}, {row['location']}, {row['solver']}\n"
        f"layer {row['layer']}, distance {row['distance']}, horizon {row['horizon']}, seed {row['seed']}",
        *_scores(row),
        f"{with_range(row, 'gain')}\nover the {row['gain_over']}",
        with_range(row, "selectivity"),
        "" if pd.isna(row["compression"]) else f"{row['compression']:.3f}",
    ]


def _reader(row: Mapping[Hashable, Any]) -> str:
    return row["reader"] if pd.isna(row["seed"]) else f"{row['reader']}, seed {row['seed']}"


def beaten_baselines(probes: pd.DataFrame) -> Iterator[str]:
    """How many cells read more than the strongest baseline that needs no model."""
    compared = probes[probes.gain_low.notna() & ~probes.injected]
    if len(compared):
        beat = (compared.gain_low > 0.0).groupby(compared.variant).agg(["sum", "count"])
        each = ", ".join(f"{variant} {won} of {of}" for variant, won, of in beat.itertuples())
        yield (
            f"{beat['sum'].sum():,} of {len(compared):,} cells read more than the "
            f"{' or '.join(sorted(compared.gain_over.unique()))}, 95 % for all together ({each})"
        )


def unreliable_cells(probes: pd.DataFrame) -> Iterator[str]:
    """How many cells have nothing to say, or nothing to rely on."""
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
    return [with_range(row, "accuracy"), with_range(row, "bits")]
