"""Evaluations on the terminal, of one run and of all runs of a sweep."""

from __future__ import annotations

import pandas as pd

from probekit.evaluation.ensembles import EnsembleEvaluation
from probekit.evaluation.evaluate import PlannerEvaluation
from probekit.evaluation.perplexity import Evaluation
from probekit.reports.console import interval, print_table, say, warn_of_few, with_range
from probekit.sweeps.results import Sweep


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
    if isinstance(evaluation, PlannerEvaluation):
        _print_planners(evaluation.planner)
    if isinstance(evaluation, EnsembleEvaluation):
        _print_choices(evaluation)


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


def _print_choices(evaluation: EnsembleEvaluation) -> None:
    accuracy = evaluation.accuracy
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
            for row in evaluation.accuracy_differences.to_dict("records")
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
