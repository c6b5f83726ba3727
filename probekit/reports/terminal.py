"""What each command prints: its display tables, notes and warnings, and where all rows are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from probekit.data.corpus import Corpus, too_few, too_few_groups
from probekit.data.splits import group_note
from probekit.reports import tables, tables_compare
from probekit.reports.display import Table, number, visible

if TYPE_CHECKING:  # these import models and probes, which a command that needs none of them need not wait for
    from probekit.evaluation.ask import Asked
    from probekit.evaluation.perplexity import Evaluation
    from probekit.generation.evaluate import GenerationEvaluation
    from probekit.generation.generate import Written
    from probekit.probing.compare import Comparison
    from probekit.probing.over_training import TrainingProbes
    from probekit.probing.probe import ProbeResults
    from probekit.run.run import Run


def print_tables(shown: Iterable[Table]) -> None:
    """Prints display tables; what is in them appears as it is."""
    for table in shown:
        grid = RichTable(title=_literal(table.caption), title_justify="left", title_style="bold")
        for name, numeric in zip(table.cells.columns, table.numeric, strict=True):
            grid.add_column(_literal(name), justify="right" if numeric else "left", overflow="fold")
        for row in table.cells.itertuples(index=False, name=None):
            grid.add_row(*map(_literal, row))
        _console().print(grid)


def print_lines(*lines: str | None) -> None:
    """Prints lines as they are; those that are None are left out."""
    for line in lines:
        if line is not None:
            _console().print(_literal(line))


def print_corpus(corpus: Corpus, nearest: int) -> None:
    """Sizes, sentence lengths, and the actions with the sentences nearest to each."""
    facts = corpus.facts
    print_tables(tables.corpus_tables(corpus, nearest))
    index, groups = facts.get("adjusted_rand_index"), facts.get("groups", facts["documents"])
    print_lines(
        group_note(groups, facts["documents"]),
        f"{facts['blank_documents_dropped']:,} blank documents dropped; {facts['one_sentence_documents']:,} "
        f"documents of one sentence, kept out of planner training; vocabulary of {facts['vocabulary']:,} "
        "tokens",
        None if index is None else f"Clusters against planted actions: adjusted Rand index {number(index)}",
    )


def print_training(run: Run) -> None:
    """The finished stages of a run, their times and their parameters."""
    print_tables([tables.stages_table(run.stages)])
    print_lines(
        f"The run is in {run.folder}. Next: probekit evaluate {run.folder}, probekit probe {run.folder}"
    )


def print_evaluation(evaluation: Evaluation) -> None:
    """Perplexities and their differences, then planner metrics or multiple choice."""
    print_lines(too_few(evaluation.perplexity.documents.iloc[0]))
    print_tables(tables.perplexity_tables(evaluation.perplexity, evaluation.differences))
    if evaluation.planner is not None:
        print_tables([tables.planner_table(evaluation.planner)])
    if evaluation.accuracy is not None and evaluation.accuracy_differences is not None:
        print_tables(tables.choice_tables(evaluation.accuracy, evaluation.accuracy_differences))


def print_asked(asked: Asked, folder: str) -> None:
    """What an LM prefers, and what to know of it."""
    print_tables([tables.asked_table(asked.table)])
    print_lines(
        too_few(int(asked.table.groups.min()), "give more items", "groups of items of a kind"),
        *tables.asked_notes(asked.table, asked.answers),
        f"All of it: {folder}/results.parquet; every choice: {folder}/answers.parquet",
    )


def print_sweep(table: pd.DataFrame, missing: Iterable[object], folder: Path) -> None:
    """The mean over seeds of every metric of a sweep, and which of its runs are not finished."""
    print_lines(too_few(table.documents[table.seed.isna()].min()))
    print_tables(tables.sweep_tables(table))
    unfinished = ", ".join(map(str, missing))
    print_lines(
        f"Not finished, and not in the table: {unfinished}" if unfinished else None,
        f"All rows, of single seeds too: {folder / 'results.parquet'}; runs: {folder}/*/seed*",
    )


def print_generation(evaluation: GenerationEvaluation) -> None:
    """The metrics of generated text."""
    print_lines(too_few(evaluation.settings["prompts"]))
    print_tables(tables.generation_tables(evaluation.metrics))
    print_lines(*tables.generation_notes(evaluation.metrics), *evaluation.notes)


def print_texts(written: Written) -> None:
    """Prompts and continuations, sentence by sentence with the action that was given to each."""
    columns = ["", "most probable action" if written.mixed else "action", "text"]
    parts = zip(written.prompts, written.continuations, written.sentences, strict=True)
    for count, (prompt, continuation, sentences) in enumerate(parts):
        rows = [["", "" if action is None else str(action), text] for text, action in sentences]
        if prompt.text.strip():
            rows.insert(0, ["prompt", "", prompt.text.strip()])
        document = f", document {prompt.document}" if prompt.document >= 0 else ""
        caption = f"Text {count}{document}, {len(continuation.tokens):,} tokens by {written.variant}"
        print_tables([Table(caption, pd.DataFrame(rows, columns=columns, dtype="str"))])
    texts, stopped = len(written.continuations), sum(text.ended == "plan" for text in written.continuations)
    if written.lacking:
        print_lines(
            f"Texts asked for: {texts + written.lacking:,}, written: {texts:,}; no other test document is "
            "longer than generation.context tokens"
        )
    if stopped:
        print_lines(f"Ended where the plan ends: {stopped:,} of {texts:,}")
    if written.slid:
        print_lines(
            f"Longer than the {written.window:,} tokens that the LM reads at once: {written.slid:,} of "
            f"{texts:,}; whenever these were full, it went on from the last half of them"
        )


def print_probes(results: ProbeResults) -> None:
    """The best cells, the baselines on the same examples, and what to know of all cells together."""
    from probekit.probing.geometry import geometry_notes

    table = results.table
    probes = table[table.reader == "probe"]
    best = results.best_cells()
    print_tables(tables.probe_tables(table, best))
    if results.transfer is not None:
        print_tables(tables.transfer_tables(results.transfer, best))
    if results.geometry is not None:
        print_tables(tables_compare.geometry_tables(results.geometry))
    print_lines(
        too_few_groups(int(table.groups.max()), int(table.documents.max())),
        *tables.probe_notes(probes),
        *tables.baseline_notes(table),
        *(() if results.transfer is None else tables.transfer_notes(results.transfer, best)),
        *tables.unreliable_probes(probes),
        *(() if results.geometry is None else geometry_notes(results.geometry)),
        *results.notes,
        f"All {len(table):,} rows: {results.folder / 'results.parquet'}; pictures: {results.folder}",
    )


def print_comparison(found: Comparison, picture: Path) -> None:
    """How similar layers of the same depth are, and what probes of the first LM read of the second."""
    print_tables(tables_compare.comparison_tables(found))
    print_lines(
        too_few(int(found.similarity.documents.max()), tables_compare.MORE_COMPARED, "documents or groups"),
        *tables_compare.comparison_notes(found),
        *found.notes,
        f"All {len(found.similarity):,} pairs of layers: {found.folder / 'similarity.parquet'}; "
        f"picture: {picture}",
        None if found.probes is None else f"All probes: {found.folder / 'probes.parquet'}",
    )


def print_over_training(results: TrainingProbes, picture: Path) -> None:
    """The layer that is best on validation documents at every checkpoint, at the nearest position."""
    print_tables([tables.over_training_table(results.table, results.stage)])
    print_lines(
        too_few(int(tables.best_by_step(results.table).groups.max())),
        *results.notes,
        f"All {len(results.table):,} rows: {results.path}; picture: {picture}",
    )


def print_interventions(table: pd.DataFrame, notes: Iterable[str], folder: Path) -> None:
    """Every kind of intervention at all layers, at the nearest distance, beside its controls."""
    near = table[table.distance == table.groupby("kind").distance.transform("min")]
    print_tables(tables.intervention_tables(near))
    print_lines(
        too_few(int(near.documents.min()), tables.MORE_BOUNDARIES),
        *tables.intervention_notes(near),
        *notes,
        f"All {len(table):,} rows: {folder / 'results.parquet'}",
    )


def print_subnetwork(table: pd.DataFrame, mask: pd.DataFrame, notes: Iterable[str], folder: Path) -> None:
    """What is lost without the subnetwork and without what it is compared with; its components."""
    print_tables([tables.subnetwork_table(table)])
    print_lines(
        too_few(int(table.documents.max()), tables.MORE_SUBNETWORK_DOCUMENTS),
        *tables.subnetwork_notes(table, mask),
        *notes,
        f"All {len(table):,} rows: {folder / 'results.parquet'}",
        f"Every component: {folder / 'mask.parquet'}",
    )


def print_continuation(table: pd.DataFrame, notes: Iterable[str], folder: Path) -> None:
    """What is written after one activation, beside its controls."""
    print_tables(tables.continuation_tables(table))
    print_lines(
        too_few(int(table.documents.max()), tables.MORE_CONTINUED),
        *notes,
        f"All {len(table):,} rows: {folder / 'results.parquet'}",
        f"What was written: {folder / 'written.parquet'}",
    )


class _Output(Console):
    """Standard output that leaves it to the command what happens when nobody reads on."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def _console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal and has no width of its own."""
    console = _Output(soft_wrap=True)
    return console if console.is_terminal else _Output(soft_wrap=True, width=240)


def _literal(text: str) -> Text:
    """The text without markup, emoji, or control characters, which would steer the terminal."""
    return Text(visible(text))
