"""`probekit evaluate`: perplexity of every model on the same tokens, and how well planners plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.evaluation.action_metrics import METRICS, score_actions
from probekit.evaluation.baselines import action_predictions
from probekit.evaluation.depth_ensemble import evaluate_ensembles
from probekit.evaluation.perplexity import (
    Evaluation,
    differences_table,
    evaluation_record,
    interval_columns,
    losses_table,
    own_losses,
    perplexity_table,
    scoring_pass,
    source_of_actions,
)
from probekit.models.mixing import VARIANTS, Fixed, Mixing, Oracle
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import bootstrap_ratio


def evaluate(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> Evaluation:
    """Evaluates a run on its test documents; writes `evaluation.json`, and `losses.parquet` by document.

    Args:
        run: The run or its folder.
        settings: Settings to replace for this evaluation, by dotted name, such as `evaluation.stride`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run lacks a stage, or a setting does not fit its LM.
    """
    run = Run.at(run, settings)
    run.check_writable()
    progress = Progress(quiet=quiet)
    depth = run.config.method == "depth-ensemble"
    evaluation = evaluate_ensembles(run, progress) if depth else _evaluate_planners(run, progress)
    evaluation.write(run)
    return evaluation


def _evaluate_planners(run: Run, progress: Progress) -> Evaluation:
    run.require("planner")
    scoring = scoring_pass(run)
    losses: dict[tuple[str, str], np.ndarray] = {}
    for variant, actions, mixing in variants_and_actions(run):
        with progress.task(f"evaluate {variant} ({actions})", total=len(scoring.windows)) as task:
            read = replace(scoring, corpus=run.corpus_of(variant))
            model = run.model(variant, fast=True)
            (losses[variant, actions],) = read.document_losses(own_losses(model), mixing, task)
    with progress.task("evaluate planners"):
        planner = _planner_table(run)
    return Evaluation(
        perplexity_table(run.config, losses, scoring.tokens),
        differences_table(run.config, losses, scoring.tokens),
        losses_table(losses, scoring),
        evaluation_record(run.config),
        planner=planner,
    )


def variants_and_actions(run: Run) -> list[tuple[Any, str, Mixing]]:
    """Every model with the source of its actions; oracle-trained variants are measured on both sources.

    Of a depth ensemble, these are the LM beneath it and its members.
    """
    if run.config.method == "depth-ensemble":
        beneath = run.config.depth.variant
        return [(name, *source_of_actions(beneath)) for name in (beneath, *run.members)]
    rows: list[tuple[Any, str, Mixing]] = [("none", "none", Fixed())]
    for variant in run.variants:
        rows.append((variant, *source_of_actions(variant)))
        if isinstance(VARIANTS[variant].training, Oracle):
            rows.append((variant, "true", Oracle()))
    return rows


def _planner_table(run: Run) -> pd.DataFrame:
    """Accuracy, top-5 and cross-entropy over all test sentences that have one before them."""
    corpus = run.corpus
    documents = corpus.documents("test")
    sentences = corpus.sentences(documents)
    later = sentences > corpus.document_sentences[corpus.document_of(sentences)]
    document = np.searchsorted(documents, corpus.document_of(sentences[later]))
    actions = corpus.actions[sentences[later]]
    counts = np.bincount(document, minlength=len(documents))
    rows = []
    for reader, log_probabilities in action_predictions(run, documents).items():
        scores = score_actions(log_probabilities[later], actions)
        for score, metric in METRICS.items():
            sums = np.bincount(document, weights=getattr(scores, score), minlength=len(documents))
            found = bootstrap_ratio(
                sums, counts, resamples=run.config.evaluation.resamples, seed=run.config.seed
            )
            rows.append(
                {"reader": reader, "metric": metric, "sentences": len(actions)}
                | interval_columns("value", found)
            )
    return pd.DataFrame(rows)
