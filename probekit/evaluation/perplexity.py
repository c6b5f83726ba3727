"""Perplexity: next-token losses summed by document, over the same tokens for all that is compared."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.config import Config, VariantName
from probekit.data.corpus import Corpus
from probekit.data.windows import Batch, Windows, collate, cut_windows
from probekit.distributed import autocast
from probekit.errors import ProbekitError
from probekit.io import write_json, write_table
from probekit.models.language_model import longest_window
from probekit.models.mixing import VARIANTS, Mixing, evaluation_mixing
from probekit.models.planned_lm import PlannedLM, token_losses
from probekit.progress import Task
from probekit.run.run import Run
from probekit.statistics import Resampling, bootstrap_ratio, paired_difference, sum_groups

TokenLosses = Callable[[Batch, Mixing], Tensor]
"""Next-token losses of some readers in nats `[readers, windows, positions]`, zero where nothing is scored."""

Losses = Mapping[tuple[str, str], np.ndarray]
"""Summed next-token losses in nats `[documents]`, by model and source of its actions."""


@dataclass(frozen=True)
class Evaluation:
    """Results of an evaluation; every value has a 95 % interval (`_low`, `_high`) from resampling documents.

    Documents of one group are resampled together: `documents` counts groups.

    Of a depth ensemble, `variant` is a member, or one of its layers read by that layer's own norm, such as
    `ensemble, layer 2`; columns `member` and `layer` (missing where all layers count) hold the two apart.

    Attributes:
        perplexity: One row for each model and source of its actions.
        differences: One row for each pair of them: difference of perplexities, paired over documents.
        losses: One row for each document, model and source of actions: tokens and summed loss in nats, from
            which any other comparison can be resampled.
        settings: How it was measured.
        planner: One row for each reader of actions (planners, baselines, ceilings) and metric.
        accuracy: Of a depth ensemble: the share of multiple-choice questions that each model solves, and
            that expected by chance.
        accuracy_differences: One row for each two members: difference of accuracies, paired over documents.
        choices: One row for each model and question: whether it is solved.
    """

    perplexity: pd.DataFrame
    differences: pd.DataFrame
    losses: pd.DataFrame
    settings: dict[str, Any]
    planner: pd.DataFrame | None = None
    accuracy: pd.DataFrame | None = None
    accuracy_differences: pd.DataFrame | None = None
    choices: pd.DataFrame | None = None

    def write(self, run: Run) -> None:
        """Writes `losses.parquet`, `choices.parquet` and, with all other tables, `evaluation.json`."""
        write_table(run.folder / "losses.parquet", self.losses)
        choices = run.folder / "choices.parquet"
        if self.choices is None:
            choices.unlink(missing_ok=True)  # of an earlier evaluation
        else:
            write_table(choices, self.choices)
        names = ("perplexity", "differences", "planner", "accuracy", "accuracy_differences")
        tables = {name: getattr(self, name) for name in names}
        records = {
            # An interval that does not exist is null: JSON knows no NaN.
            name: table.replace({np.nan: None}).to_dict(orient="records")
            for name, table in tables.items()
            if table is not None
        }
        write_json(run.folder / "evaluation.json", {"settings": self.settings} | records)


@dataclass(frozen=True)
class EvaluationPass:
    """A pass over some documents, the same for all models that are compared.

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
        return self._by_document(self.windows.scored)

    def document_losses(self, losses: TokenLosses, mixing: Mixing, task: Task) -> np.ndarray:
        """Sum of next-token losses of each reader and document, in nats `[readers, documents]`."""
        parts: list[np.ndarray] = []
        # Windows of about the same length share a batch, so that little is padded.
        order = np.argsort(self.windows.length, kind="stable")
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = collate(self.corpus, self.windows[rows]).to(self.device)
            with torch.no_grad(), autocast(self.device, self.precision):
                found = losses(batch, mixing)
            parts.append(found.double().sum(dim=2).cpu().numpy())
            task.advance(len(rows))
        by_window = np.concatenate(parts, axis=1)[:, np.argsort(order)]
        return np.stack([self._by_document(reader) for reader in by_window])

    def by_group(self, losses: Losses) -> tuple[Losses, np.ndarray]:
        """Losses and numbers of scored tokens, summed over each group of documents `[groups]`."""
        group = self.corpus.group[self.documents]
        return {key: sum_groups(group, sums) for key, sums in losses.items()}, sum_groups(group, self.tokens)

    def _by_document(self, by_window: np.ndarray) -> np.ndarray:
        return np.bincount(np.searchsorted(self.documents, self.windows.document), weights=by_window)


def own_losses(model: PlannedLM) -> TokenLosses:
    """The losses of a model's own logits: one reader."""
    return lambda batch, mixing: token_losses(model(batch, mixing), batch.targets)[None]


def scoring_pass(run: Run) -> EvaluationPass:
    """All tokens of the test documents."""
    window, stride = window_and_stride(run)
    windows = cut_windows(run.corpus, run.corpus.documents("test"), window, stride)
    batch_size, precision = run.config.evaluation.batch_size, run.config.training.precision
    return EvaluationPass(run.corpus, windows, batch_size, precision, run.device)


def evaluation_record(config: Config) -> dict[str, Any]:
    """How an evaluation with these settings measures, as `evaluation.json` records it; lengths in tokens."""
    window = config.evaluation.window or config.training.window
    stride = config.evaluation.stride or max(1, window // 2)
    record = {
        "split": "test",
        "window": window,
        "stride": stride,
        "resamples": config.evaluation.resamples,
    }
    if config.method == "depth-ensemble":
        record |= config.evaluation.model_dump(include={"questions", "questions_file"})
    return record


def window_and_stride(run: Run) -> tuple[int, int]:
    """Length and stride of evaluation windows, in tokens.

    Raises:
        ProbekitError: The window is longer than the LM reads, or shorter than the stride.
    """
    record = evaluation_record(run.config)
    window, stride = record["window"], record["stride"]
    positions = longest_window(run.frozen_lm().config)
    if window > positions:
        raise ProbekitError(f"evaluation.window is {window}, but the LM reads at most {positions} positions")
    if stride > window:
        raise ProbekitError(
            f"evaluation.stride is {stride}, longer than the window of {window}: tokens would be left out"
        )
    return window, stride


def source_of_actions(variant: VariantName) -> tuple[str, Mixing]:
    """Where a variant's actions come from when it is evaluated, and how they are mixed."""
    mixing = evaluation_mixing(variant)
    if variant not in VARIANTS:
        return "none", mixing
    return "planner" if mixing.needs_scores else "constant", mixing


def losses_table(losses: Losses, scoring: EvaluationPass) -> pd.DataFrame:
    """Tokens and summed losses by document, model and source of actions."""
    documents, tokens = scoring.documents, scoring.tokens.astype(np.int64)
    names = ("document", "variant", "actions", "tokens", "loss")
    parts = [
        pd.DataFrame(dict(zip(names, (documents, *key, tokens, sums), strict=True)))
        for key, sums in losses.items()
    ]
    return pd.concat(parts, ignore_index=True)


def perplexity_table(config: Config, losses: Losses, tokens: np.ndarray) -> pd.DataFrame:
    """Perplexities of losses, which are summed over `tokens` `[groups]` tokens of each group of documents."""
    options = _resampling(config)
    return pd.DataFrame(
        {"variant": variant, "actions": actions, "tokens": int(tokens.sum())}
        | bootstrap_ratio(sums, tokens, **options).columns("perplexity")
        for (variant, actions), sums in losses.items()
    )


def differences_table(config: Config, losses: Losses, tokens: np.ndarray) -> pd.DataFrame:
    """Differences of the perplexities of every two; the arguments are those of `perplexity_table`."""
    options = _resampling(config)
    labels = {
        (variant, actions): f"{variant} ({actions} actions)" if variant == "oracle" else variant
        for variant, actions in losses
    }
    return pd.DataFrame(
        {"first": labels[first], "second": labels[second]}
        | paired_difference(losses[first], losses[second], tokens, **options).columns("difference")
        for first, second in itertools.combinations(losses, 2)
    )


def _resampling(config: Config) -> Resampling:
    return {**config.resampling, "transform": np.exp}
