"""`probekit evaluate`: perplexity of every variant on the same tokens, and how well planners plan."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.config import Config
from probekit.corpus.examples import cut_windows
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import METRICS, score_actions
from probekit.evaluation.baselines import baselines
from probekit.evaluation.perplexity import Pass
from probekit.evaluation.statistics import Interval, Resampling, bootstrap_ratio, paired_difference
from probekit.models.language_model import longest_window
from probekit.models.mixing import VARIANTS, Fixed, Mixing, Oracle
from probekit.progress import Progress
from probekit.run import Run
from probekit.storage import atomic_path, write_json


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; every number has a 95 % interval (`_low`, `_high`) from resampling documents.

    Attributes:
        perplexity: One row for each variant and source of actions.
        differences: One row for each pair of them: difference of perplexities, paired over documents.
        planner: One row for each reader of actions (planners, baselines, ceilings) and metric.
        losses: One row for each document, variant and source of actions: tokens and summed loss in nats, from
            which any other comparison can be resampled.
        settings: How it was measured.
    """

    perplexity: pd.DataFrame
    differences: pd.DataFrame
    planner: pd.DataFrame
    losses: pd.DataFrame
    settings: dict[str, Any]


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
    run = run if isinstance(run, Run) else Run.open(run)
    run = run.with_settings(settings or {})
    run.require("planner")
    progress = Progress(quiet=quiet)
    window, stride = window_and_stride(run)
    documents = run.corpus.documents("test")
    scoring = Pass(
        run.corpus,
        cut_windows(run.corpus, documents, window, stride),
        run.config.evaluation.batch_size,
        run.config.training.precision,
        run.device,
    )
    losses: dict[tuple[str, str], np.ndarray] = {}
    for variant, actions, mixing in variants_and_actions(run):
        with progress.task(f"evaluate {variant} ({actions})", total=len(scoring.windows)) as task:
            read = replace(scoring, corpus=run.corpus_of(variant))
            losses[variant, actions] = read.document_losses(run.model(variant), mixing, task)
    with progress.task("evaluate planners"):
        planner = _planner_table(run)
    evaluation = Evaluation(
        *_perplexity_tables(run, losses, scoring.tokens),
        planner,
        _losses_table(losses, scoring),
        record_of(run.config),
    )
    tables = {
        # An interval that does not exist is null: JSON knows no NaN.
        name: getattr(evaluation, name).replace({np.nan: None}).to_dict(orient="records")
        for name in ("perplexity", "differences", "planner")
    }
    with atomic_path(run.folder / "losses.parquet") as path:
        evaluation.losses.to_parquet(path, index=False)
    write_json(run.folder / "evaluation.json", {"settings": evaluation.settings} | tables)
    return evaluation


def variants_and_actions(run: Run) -> list[tuple[Any, str, Mixing]]:
    """Every variant with the source of its actions; oracle-trained ones are measured on both sources."""
    rows: list[tuple[Any, str, Mixing]] = [("none", "none", Fixed())]
    for variant in run.variants:
        mixing = VARIANTS[variant].evaluation
        rows.append((variant, "planner" if mixing.needs_scores else "constant", mixing))
        if isinstance(VARIANTS[variant].training, Oracle):
            rows.append((variant, "true", Oracle()))
    return rows


def record_of(config: Config) -> dict[str, Any]:
    """How an evaluation with some settings measures, as it is recorded; windows and strides in tokens."""
    window = config.evaluation.window or config.training.window
    stride = config.evaluation.stride or max(1, window // 2)
    resamples = config.evaluation.resamples
    return {"split": "test", "window": window, "stride": stride, "resamples": resamples}


def window_and_stride(run: Run) -> tuple[int, int]:
    """Length and stride of evaluation windows, in tokens, checked against the LM."""
    window, stride = (record_of(run.config)[name] for name in ("window", "stride"))
    positions = longest_window(run.bridged.original_model)
    if window > positions:
        raise ProbekitError(f"evaluation.window is {window}, but the LM reads at most {positions} positions")
    if stride > window:
        raise ProbekitError(
            f"evaluation.stride is {stride}, longer than the window of {window}: tokens would be left out"
        )
    return window, stride


def _losses_table(losses: dict[tuple[str, str], np.ndarray], scoring: Pass) -> pd.DataFrame:
    parts = [
        pd.DataFrame(
            {"document": scoring.documents, "variant": variant, "actions": actions}
            | {"tokens": scoring.tokens.astype(np.int64), "loss": sums}
        )
        for (variant, actions), sums in losses.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _perplexity_tables(
    run: Run, losses: dict[tuple[str, str], np.ndarray], tokens: np.ndarray
) -> tuple[pd.DataFrame, pd.DataFrame]:
    options: Resampling = {
        "resamples": run.config.evaluation.resamples,
        "seed": run.config.seed,
        "transform": np.exp,
    }
    perplexity = [
        {"variant": variant, "actions": actions, "tokens": int(tokens.sum())}
        | _interval("perplexity", bootstrap_ratio(sums, tokens, **options))
        for (variant, actions), sums in losses.items()
    ]
    differences = [
        {"first": _label(*first), "second": _label(*second)}
        | _interval("difference", paired_difference(losses[first], losses[second], tokens, **options))
        for first, second in itertools.combinations(losses, 2)
    ]
    return pd.DataFrame(perplexity), pd.DataFrame(differences)


def _label(variant: str, actions: str) -> str:
    return f"{variant} ({actions} actions)" if variant == "oracle" else variant


def _interval(name: str, interval: Interval) -> dict[str, Any]:
    return {
        name: interval.value,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
        "documents": interval.documents,
    }


def _planner_table(run: Run) -> pd.DataFrame:
    """Accuracy, top-5 and cross-entropy over all test sentences that have one before them."""
    corpus = run.corpus
    documents = corpus.documents("test")
    sentences = corpus.sentences(documents)
    later = sentences > corpus.document_sentences[corpus.document_of(sentences)]
    document = np.searchsorted(documents, corpus.document_of(sentences[later]))
    actions = corpus.actions[sentences[later]]
    counts = np.bincount(document, minlength=len(documents))
    options: Resampling = {"resamples": run.config.evaluation.resamples, "seed": run.config.seed}
    rows = []
    for reader, log_probabilities in baselines(run, documents, horizon=1).items():
        scores = score_actions(log_probabilities[later], actions)
        for metric in ("correct", "top5", "cross_entropy"):
            sums = np.bincount(document, weights=getattr(scores, metric), minlength=len(documents))
            interval = bootstrap_ratio(sums, counts, **options)
            rows.append(
                {"reader": reader, "metric": METRICS[metric], "sentences": len(actions)}
                | _interval("value", interval)
            )
    return pd.DataFrame(rows)
