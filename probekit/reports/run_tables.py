"""A run's stages and its corpus on the terminal."""

from __future__ import annotations

from probekit.corpus.inspect import action_table, sentence_lengths, sizes
from probekit.corpus.store import Corpus
from probekit.reports.console import print_table, say
from probekit.run import Run
from probekit.storage import read_json

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
