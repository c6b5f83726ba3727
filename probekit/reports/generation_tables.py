"""Generated text on the terminal, and what was measured of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from probekit.evaluation.texts import Written
from probekit.reports.console import print_table, say, warn_of_few, with_range

if TYPE_CHECKING:
    from probekit.evaluation.generation_metrics import GenerationEvaluation


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
