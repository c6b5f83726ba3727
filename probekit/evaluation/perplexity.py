"""Perplexity: next-token losses summed by document, over the same tokens for all that is compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.config import Config
from probekit.data.corpus import Corpus
from probekit.data.windows import Batch, Windows, collate, cut_windows
from probekit.distributed import autocast
from probekit.errors import ProbekitError
from probekit.io import write_json, write_table
from probekit.models.language_model import longest_window
from probekit.models.mixing import Mixing
from probekit.models.planner_lm import PlannedLM, token_losses
from probekit.progress import Task
from probekit.run.run import Run
from probekit.statistics import Interval, Resampling, bootstrap_ratio, paired_difference

TokenLosses = Callable[[Batch, Mixing], Tensor]
"""Next-token losses of some readers in nats `[readers, windows, positions]`, zero where nothing is scored."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; every number has a 95 % interval (`_low`, `_high`) from resampling documents.

    Attributes:
        perplexity: One row for each model and source of its actions.
        differences: One row for each pair of them: difference of perplexities, paired over documents.
        losses: One row for each document, model and source of actions: tokens and summed loss in nats, from
            which any other comparison can be resampled.
        settings: How it was measured.
    """

    perplexity: pd.DataFrame
    differences: pd.DataFrame
    losses: pd.DataFrame
    settings: dict[str, Any]

    def write(self, run: Run, **tables: pd.DataFrame) -> None:
        """Writes `losses.parquet`, and `evaluation.json` with more tables beside those of perplexity."""
        write_table(run.folder / "losses.parquet", self.losses)
        shown = {"perplexity": self.perplexity, "differences": self.differences} | tables
        records = {
            # An interval that does not exist is null: JSON knows no NaN.
            name: table.replace({np.nan: None}).to_dict(orient="records")
            for name, table in shown.items()
        }
        write_json(run.folder / "evaluation.json", {"settings": self.settings} | records)


@dataclass(frozen=True)
class Pass:
    """What every setting is evaluated on.

    Attributes:
        corpus: The corpus.
        windows: Windows over the evaluated documents; they score every token of theirs once.
        batch_size: Windows in one forward pass.
        precision: The setting `training.precision`.
        device: Where to compute.
    """

    corpus: Corpus
    windows: Windows
    batch_size: int
    precision: str
    device: torch.device

    @property
    def documents(self) -> np.ndarray:
        """The evaluated documents, sorted `[documents]`."""
        return np.unique(self.windows.document)

    @property
    def tokens(self) -> np.ndarray:
        """Scored tokens of each document `[documents]`."""
        return self._by_document(self.windows.document, self.windows.scored)

    def document_losses(self, losses: TokenLosses, mixing: Mixing, task: Task) -> np.ndarray:
        """Sum of next-token losses of each reader and document, in nats `[readers, documents]`."""
        parts: list[np.ndarray] = []
        # Windows of a length go together, so that little is padded.
        order = np.argsort(self.windows.length, kind="stable")
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = collate(self.corpus, self.windows[rows]).to(self.device)
            with torch.no_grad(), autocast(self.device, self.precision):
                found = losses(batch, mixing)
            parts.append(found.double().sum(dim=2).cpu().numpy())
            task.advance(len(rows))
        by_window = np.concatenate(parts, axis=1)[:, np.argsort(order)]
        return np.stack([self._by_document(self.windows.document, one) for one in by_window])

    def _by_document(self, document: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.bincount(np.searchsorted(self.documents, document), weights=values)


def own_losses(model: PlannedLM) -> TokenLosses:
    """The losses of a model's own logits: one reader."""
    return lambda batch, mixing: token_losses(model(batch, mixing), batch.targets)[None]


def scoring_pass(run: Run) -> Pass:
    """All tokens of the test documents."""
    window, stride = window_and_stride(run)
    return Pass(
        run.corpus,
        cut_windows(run.corpus, run.corpus.documents("test"), window, stride),
        run.config.evaluation.batch_size,
        run.config.training.precision,
        run.device,
    )


def record_of(config: Config) -> dict[str, Any]:
    """How an evaluation with some settings measures, as it is recorded; windows and strides in tokens."""
    window = config.evaluation.window or config.training.window
    stride = config.evaluation.stride or max(1, window // 2)
    resamples = config.evaluation.resamples
    record = {"split": "test", "window": window, "stride": stride, "resamples": resamples}
    if config.method == "depth-ensemble":
        record |= config.evaluation.model_dump(include={"questions", "questions_file"})
    return record


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


def losses_table(losses: dict[tuple[str, str], np.ndarray], scoring: Pass) -> pd.DataFrame:
    """Tokens and summed losses by document, for sums `[documents]` by model and source of actions."""
    parts = [
        pd.DataFrame(
            {"document": scoring.documents, "variant": variant, "actions": actions}
            | {"tokens": scoring.tokens.astype(np.int64), "loss": sums}
        )
        for (variant, actions), sums in losses.items()
    ]
    return pd.concat(parts, ignore_index=True)


def perplexity_table(
    config: Config, losses: dict[tuple[str, str], np.ndarray], tokens: np.ndarray
) -> pd.DataFrame:
    """Perplexities.

    Args:
        config: How to resample.
        losses: Sums of losses `[documents]` by model and source of actions.
        tokens: How many tokens they are of `[documents]`.
    """
    options = _resampling(config)
    return pd.DataFrame(
        {"variant": variant, "actions": actions, "tokens": int(tokens.sum())}
        | interval_columns("perplexity", bootstrap_ratio(sums, tokens, **options))
        for (variant, actions), sums in losses.items()
    )


def differences_table(
    config: Config, losses: dict[tuple[str, str], np.ndarray], tokens: np.ndarray
) -> pd.DataFrame:
    """Differences of the perplexities of every two; the arguments are those of `perplexity_table`."""
    options = _resampling(config)
    return pd.DataFrame(
        {"first": _label(*first), "second": _label(*second)}
        | interval_columns("difference", paired_difference(losses[first], losses[second], tokens, **options))
        for first, second in itertools.combinations(losses, 2)
    )


def _resampling(config: Config) -> Resampling:
    return {"resamples": config.evaluation.resamples, "seed": config.seed, "transform": np.exp}


def _label(variant: str, actions: str) -> str:
    return f"{variant} ({actions} actions)" if variant == "oracle" else variant


def interval_columns(name: str, interval: Interval) -> dict[str, Any]:
    """A metric and its interval as columns of a table."""
    return {
        name: interval.value,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
        "documents": interval.documents,
    }
