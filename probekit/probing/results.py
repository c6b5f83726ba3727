"""Results of probing: scores of readers, the table, saved linear probes, and the record of settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from probekit import distributed
from probekit.config import Position, as_position
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import METRICS, score_actions
from probekit.evaluation.metrics import balanced_accuracies, rank_correlations, two_class_metrics
from probekit.io import read_tensors
from probekit.probing.targets import Target
from probekit.probing.vectors import Candidates
from probekit.statistics import (
    Intervals,
    Resampling,
    bootstrap_ratios,
    paired_differences,
    simultaneous_ratios,
)

Facts = dict[str, Any]
"""What is known of a reader, by column of the table: what identifies it, and how it was fitted."""

SCORES = tuple(METRICS)
"""Scores of classes, by which documents are summed."""

ELEMENTS = 1 << 25
"""Log-probabilities scored at once; bounds the memory."""

LINEAR_SOLVERS = ("softmax", "ridge", "lda", "l1", "mean-difference")
"""Solvers whose probes are linear; the weights of these are kept."""

FALSE_POSITIVE_RATE = 0.05
"""That of `recall`. At 0.01, a few hundred test texts would leave one or two false positives to count."""

LAST_BAG = "bag of words (last sentence)"
"""The baseline that counts the tokens of the last sentence alone."""

MODEL_FREE = (
    *("prior", "mean", "bigram", "skip n-gram", "previous number", "previous vector", "bag of words"),
    LAST_BAG,
)
"""Baselines that need no model: a probe should gain over the strongest of them."""

CEILING = "ceiling (tokens read)"
"""The reader that nothing that sees the same tokens can beat, where the data is planted."""

_INTERVALS = (
    *(*METRICS.values(), "bits", "selectivity", "shortfall", "over_planner", "gain", "balanced_accuracy"),
)

COLUMNS = (
    {"reader": "str", "solver": "str", "variant": "str", "target": "str", "seed": "Int64"}
    | {"location": "str", "layer": "Int64", "position": "str", "distance": "Int64", "horizon": "int64"}
    | {"injected": "bool", "constant": "boolean"}
    | {"examples": "int64", "documents": "Int64", "groups": "Int64"}
    | {f"{metric}{bound}": "float64" for metric in _INTERVALS for bound in ("", "_low", "_high")}
    | {"gain_over": "str", "control_accuracy": "float64"}
    | {"code_length": "float64", "compression": "float64"}
    | {
        "l2": "float64",
        "l1": "float64",
        "nonzero": "Int64",
        "shrinkage": "float64",
        "iterations": "Int64",
        "converged": "boolean",
    }
    | {"validation_cross_entropy": "float64", "fitted_on": "Int64", "tokens_read": "Int64"}
)
"""The table's columns and their types."""

_TWO_CLASSES = ("auroc", "average_precision", "recall", "calibration_error")
_NUMBERS = ("r2", "rank_correlation", "squared_error")
_OF_VECTORS = ("cosine", "reciprocal_rank", "first_percent")
_METRICS = {"numbers": _NUMBERS, "vectors": ("r2", *_OF_VECTORS, "squared_error")}

ROW_KEY = ["reader", "solver", "variant", "seed", "location", "layer", "distance", "position", "horizon"]
"""Columns that identify a row, in the order by which rows are sorted: `distance` puts positions in order."""


@dataclass(frozen=True)
class ScoredExamples:
    """The test examples, on which all readers are scored.

    Attributes:
        target: What is predicted.
        group: Number of each example's group from 0 `[examples]`; groups are what intervals resample.
        labels: Labels `[examples]` by horizon.
        centres: The mean of the vectors of the examples fitted on `[outputs]`, by horizon.
    """

    target: Target
    group: NDArray[np.int64]
    labels: Mapping[int, np.ndarray]
    centres: Mapping[int, np.ndarray] = field(default_factory=dict)

    @cached_property
    def candidates(self) -> dict[int, Candidates]:
        """The vectors that predictions are ranked among, by horizon."""
        return {h: Candidates(self.target.vectors, self.labels[h], mean) for h, mean in self.centres.items()}

    @property
    def counts(self) -> NDArray[np.int64]:
        """Examples of every group `[groups]`."""
        return np.bincount(self.group)

    def pairs(self, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Groups with each class that they have `[pairs, 2]`, examples `[pairs]`, and each example's pair."""
        each = self.group * self.target.classes + self.labels[horizon]
        pairs, pair, counts = np.unique(each, return_inverse=True, return_counts=True)
        return np.stack(np.divmod(pairs, self.target.classes), 1), counts, pair

    def rows(self, horizon: int, *, control: bool) -> dict[str, np.ndarray]:
        """By score the row of its sums that each example is added to `[examples]`; see `DocumentSums`."""
        kind, single = self.target.kind, np.arange(len(self.group))
        if control:
            scores = ("correct",) if kind == "classes" else ("squared_error", "total")
            return dict.fromkeys(scores, self.group)
        if kind == "vectors":
            return dict.fromkeys(("squared_error", *_OF_VECTORS), self.group)
        if kind == "numbers":
            return {"squared_error": self.group, "predicted": single}
        rows = dict.fromkeys(SCORES, self.group) | {"class_correct": self.pairs(horizon)[2]}
        return rows | {"log_odds": single} if self.target.classes == 2 else rows

    def differ(self, horizon: int) -> bool:
        """Whether there are two labels at least; else no reader can be told from another."""
        return len(np.unique(self.labels[horizon])) > 1


class DocumentSums:
    """Scores of readers on the same test examples, summed over those of each document or group.

    Args:
        readers: What is known of each reader, all of one horizon.
        tested: The examples; None: nothing is scored.
        control: Score the control task, of which less is reported.

    Attributes:
        readers: What is known of each reader `[readers]`; its row of the table begins with it.
        sums: Sums by score, float64 `[rows, readers]`. A row is a group, for scores that are reported as
            means: `correct`, `top5` and `cross_entropy` of classes; `squared_error` of numbers and vectors,
            and their squares, `total`; `Candidates.scores` of vectors. It is a group and a class
            (`ScoredExamples.pairs`) for correct predictions, `class_correct`. It is an example where order or
            size is measured: `log_odds` of the second of two classes, float32, and `predicted` numbers.
    """

    def __init__(
        self, readers: Sequence[Facts], tested: ScoredExamples | None = None, *, control: bool = False
    ) -> None:
        self.readers = list(readers)
        self._rows = {} if tested is None else tested.rows(readers[0]["horizon"], control=control)
        self._candidates: Candidates | None = None
        if "cosine" in self._rows and tested is not None:
            self._candidates = tested.candidates[readers[0]["horizon"]]
        self.sums: dict[str, NDArray[Any]] = {
            score: np.zeros(
                (int(row.max()) + 1, len(self.readers)), np.float32 if score == "log_odds" else np.float64
            )
            for score, row in self._rows.items()
        }

    def add(self, rows: slice, predicted: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
        """Scores some examples.

        Args:
            rows: Which examples.
            predicted: Log-probabilities in nats `[readers, examples, classes]`, numbers `[readers, examples]`
                or vectors `[readers, examples, outputs]`.
            labels: True labels `[examples]`, or `[readers, examples]` where each reader has its own; vectors
                have a further axis.
        """
        of = _number_scores if "squared_error" in self.sums else _class_scores
        found = torch.as_tensor(predicted)
        scores = of(found, labels)
        if self._candidates is not None:
            scores |= self._candidates.scores(found, rows)
        for score, sums in self.sums.items():
            row, values = self._rows[score][rows], scores[score].astype(sums.dtype)
            if (np.diff(row) < 0).any():
                order = np.argsort(row, kind="stable")
                row, values = row[order], values[:, order]
            starts = np.flatnonzero(np.diff(row, prepend=-1))
            sums[row[starts]] += np.add.reduceat(values, starts, axis=1).T

    def over_processes(self, device: torch.device) -> None:
        """Adds up what all processes have scored."""
        for score, sums in self.sums.items():
            summed = torch.from_numpy(sums).to(device)
            distributed.add_up([summed])
            self.sums[score] = summed.cpu().numpy()


def _number_scores(predicted: Tensor, labels: Tensor | np.ndarray) -> dict[str, NDArray[Any]]:
    """Scores of numbers by name `[readers, examples]`; those of vectors are sums over their numbers."""
    truth = torch.as_tensor(labels, device=predicted.device).expand_as(predicted)
    scores = {"predicted": predicted, "squared_error": (predicted - truth).square(), "total": truth.square()}
    if predicted.ndim == 3:
        scores = {score: scores[score].sum(2) for score in ("squared_error", "total")}
    return {score: values.double().cpu().numpy() for score, values in scores.items()}


def _class_scores(predicted: Tensor, labels: Tensor | np.ndarray) -> dict[str, NDArray[Any]]:
    """Scores of log-probabilities by name `[readers, examples]`."""
    scores = score_actions(predicted, labels)
    scores["class_correct"] = scores["correct"]
    if predicted.shape[-1] == 2:
        scores["log_odds"] = (predicted[..., 1] - predicted[..., 0]).float().cpu().numpy()
    return scores


def row_slices(readers: int, examples: int, classes: int) -> list[slice]:
    """Cuts examples so that the log-probabilities of all readers stay within `ELEMENTS`."""
    size = max(1, ELEMENTS // (readers * classes))
    return [slice(start, start + size) for start in range(0, examples, size)]


def columns_of(target: Target) -> dict[str, str]:
    """The columns of a target's table, and their types: `COLUMNS`, and those of its kind."""
    numbers = target.kind != "classes"
    metrics = _METRICS.get(target.kind, _TWO_CLASSES if target.classes == 2 else ())
    own = {f"{metric}{bound}": "float64" for metric in metrics for bound in ("", "_low", "_high")}
    return (
        COLUMNS
        | own
        | (dict.fromkeys(("control_r2", "validation_squared_error"), "float64") if numbers else {})
    )


def main_metric(table: pd.DataFrame) -> str:
    """The metric that a target is shown by: R2 of numbers and vectors, AUROC of two classes, or accuracy."""
    return next((name for name in ("r2", "auroc") if name in table and table[name].notna().any()), "accuracy")


def validation_loss(table: pd.DataFrame) -> pd.Series:
    """What readers are chosen by on validation examples: cross-entropy, of numbers the squared error."""
    both = (f"validation_{loss}" for loss in ("cross_entropy", "squared_error"))
    first, second = (np.asarray(table.get(name, np.full(len(table), np.nan)), float) for name in both)
    return pd.Series(np.where(np.isnan(first), second, first), table.index)


def table_of(
    scored: Sequence[DocumentSums], tested: ScoredExamples, empty: Sequence[Facts], resampling: Resampling
) -> pd.DataFrame:
    """Makes the table of results.

    Args:
        scored: Scores of all readers; the prior and the other model-free baselines
            of every position and horizon are among them.
        tested: The test examples.
        empty: What is known of the cells that are empty.
        resampling: How groups are resampled.

    Returns:
        A row for each reader and cell, with `columns_of` the target, sorted by `ROW_KEY`. Where all test
        examples have one label, nothing has an interval.
    """
    rows, numbers = _Rows(scored, tested, resampling), tested.target.kind != "classes"
    loss = rows.sums("squared_error" if numbers else "cross_entropy")
    prior = rows.in_same_cell(rows.table.reader.isin(("prior", "mean")))
    # R2 is a share of the squared error of the mean, bits over the prior are those of an example.
    weight, unit = (loss[:, prior], 1.0) if numbers else (rows.counts[:, None], np.log(2))
    rows.write_ratios("r2" if numbers else "bits", (loss[:, prior] - loss) / unit, weight)
    if numbers:
        _write_numbers(rows, loss, weight)
    else:
        _write_classes(rows, loss)
    _write_single_examples(rows)
    _write_gains(rows, loss, weight, unit)
    table = rows.table.assign(examples=int(rows.counts.sum()))
    table["documents"] = table["groups"] = int(np.count_nonzero(rows.counts))
    columns = columns_of(tested.target)
    bounds = [name for name in columns if name.endswith(("_low", "_high")) and name in table]
    table.loc[~rows.differ, bounds] = np.nan

    table = pd.concat([table, pd.DataFrame(list(empty))]).reindex(columns=list(columns))
    table["position"] = table.position.astype(str)
    table["distance"] = pd.to_numeric(table.position, errors="coerce")
    table["injected"] = table.injected.fillna(False).astype(bool)
    return table.astype(columns).sort_values(ROW_KEY, kind="stable", ignore_index=True)


class _Rows:
    """The rows of a table while its metrics are written into it.

    Attributes:
        table: What is known of each reader, and its metrics `[rows]`.
        counts: Examples of every group `[groups]`.
        probes: Whether a row is a probe's `[rows]`.
        differ: Whether the labels of a row's horizon differ `[rows]`.
    """

    def __init__(
        self, scored: Sequence[DocumentSums], tested: ScoredExamples, resampling: Resampling
    ) -> None:
        self.scored, self.tested, self.resampling = scored, tested, resampling
        self.table = pd.DataFrame([reader for part in scored for reader in part.readers])
        self.table = self.table.astype({"position": str})
        self.counts = tested.counts
        self.probes = (self.table.reader == "probe").to_numpy()
        self.differ = self.table.horizon.map(tested.differ).to_numpy(bool)

    def sums(self, score: str) -> NDArray[np.float64]:
        """The sums of a score `[groups, rows]`; NaN for readers that were not scored by it."""
        shape = len(self.counts)
        parts = [part.sums.get(score, np.full((shape, len(part.readers)), np.nan)) for part in self.scored]
        return np.concatenate(parts, axis=1)

    def in_same_cell(self, chosen: pd.Series | np.ndarray) -> np.ndarray:
        """For each row the number of the chosen row of its position and horizon, -1 where there is none."""
        cell = pd.MultiIndex.from_frame(self.table[["position", "horizon"]])
        numbers = pd.Series(np.arange(len(cell)), cell)[np.asarray(chosen)]
        return numbers.reindex(cell, fill_value=-1).to_numpy()

    def write(self, metric: str, at: np.ndarray, found: Intervals) -> None:
        """Writes a metric and its bounds into some rows, given by their numbers."""
        for suffix, values in (("", found.value), ("_low", found.low), ("_high", found.high)):
            self.table.loc[at, f"{metric}{suffix}"] = values

    def write_ratios(self, metric: str, sums: NDArray[np.float64], weight: np.ndarray) -> None:
        """Writes sums `[groups, rows]` over weights `[groups, rows or 1]`, where the sums are known."""
        known = np.flatnonzero(np.isfinite(sums).all(axis=0))
        of_known = weight if weight.shape[1] == 1 else weight[:, known]
        found = bootstrap_ratios(sums[:, known], of_known, examples=self.counts, **self.resampling)
        self.write(metric, known, found)


def _write_numbers(rows: _Rows, loss: NDArray[np.float64], weight: np.ndarray) -> None:
    """Writes means over examples, and how far R2 is above that of the control task."""
    for score in ("squared_error", *(_OF_VECTORS if rows.tested.target.kind == "vectors" else ())):
        rows.write_ratios(score, rows.sums(score), rows.counts[:, None])
    control, total = rows.sums("control_squared_error"), rows.sums("control_total")
    with np.errstate(invalid="ignore"):  # the control labels of all test examples may be the mean
        rows.table["control_r2"] = 1 - control.sum(0) / total.sum(0)
    known = np.flatnonzero(rows.table.control_r2.notna())
    each = (values[:, known] for values in (control, loss, total))
    gap = paired_differences(*each, second_counts=weight[:, known], examples=rows.counts, **rows.resampling)
    rows.write("selectivity", known, gap)


def _write_classes(rows: _Rows, loss: NDArray[np.float64]) -> None:
    """Writes means over examples, and differences from the control task, the ceiling and the planner."""
    counts = rows.counts[:, None]
    for score, metric in METRICS.items():
        rows.write_ratios(metric, rows.sums(score), counts)
    control = rows.sums("control_correct")
    rows.table["control_accuracy"] = control.sum(0) / counts.sum()
    rows.write_ratios("selectivity", rows.sums("correct") - control, counts)
    for metric, reader, sign in (("shortfall", CEILING, 1), ("over_planner", "planner", -1)):
        beside = rows.in_same_cell(rows.table.reader == reader)
        gap = sign * (loss - loss[:, beside]) / np.log(2)
        rows.write_ratios(metric, np.where((beside >= 0) & rows.probes, gap, np.nan), counts)


def _write_single_examples(rows: _Rows) -> None:
    """Writes metrics that are no ratios of sums."""
    tested, resampling, end = rows.tested, rows.resampling, 0
    for part in rows.scored:
        own, horizon = part.sums, part.readers[0]["horizon"]
        found: dict[str, Intervals] = {}
        if "class_correct" in own:
            pairs, counts, _ = tested.pairs(horizon)
            found["balanced_accuracy"] = balanced_accuracies(
                own["class_correct"], counts, pairs[:, 1], pairs[:, 0], **resampling
            )
        if "log_odds" in own:
            second = tested.labels[horizon] == 1
            found |= two_class_metrics(
                own["log_odds"], second, tested.group, FALSE_POSITIVE_RATE, **resampling
            )
        if "predicted" in own:
            found["rank_correlation"] = rank_correlations(
                own["predicted"], tested.labels[horizon], tested.group, **resampling
            )
        start, end = end, end + len(part.readers)
        for metric, intervals in found.items():
            rows.write(metric, np.arange(start, end), intervals)


def _write_gains(rows: _Rows, loss: NDArray[np.float64], weight: np.ndarray, unit: float) -> None:
    """Writes gains over the strongest baseline without a model; their intervals hold for all cells together.

    Cells where actions were injected, or all labels are one, are left out.
    """
    table = rows.table
    free = table[table.reader.isin(MODEL_FREE)]
    best = validation_loss(free).groupby([free.position, free.horizon]).idxmin()
    strongest = rows.in_same_cell(table.index.isin(best))
    compared = rows.probes & (table.injected != True).to_numpy() & rows.differ  # noqa: E712 - NaN for baselines
    table["gain_over"] = table.reader.iloc[strongest].set_axis(table.index).where(compared)
    if not compared.any():
        return
    gains = (loss[:, strongest[compared]] - loss[:, compared]) / unit
    if rows.tested.target.kind != "classes":  # a probe that keeps the mean differs from it by rounding
        weight = weight[:, compared]
        # Where the mean is exact, the rounding is still that of numbers as large as the others are.
        gains = np.where(np.abs(gains) > 1e-9 * np.maximum(weight, weight.mean(0)), gains, 0.0)
    resamples, seed = rows.resampling["resamples"], rows.resampling["seed"]
    found = simultaneous_ratios(gains, weight, resamples=resamples, seed=seed, examples=rows.counts)
    rows.write("gain", np.flatnonzero(compared), found)


@dataclass(frozen=True)
class Cell:
    """A cell of the grid: where a probe reads, what it predicts and how it was fitted.

    Attributes:
        location: TransformerLens hook, without the layer.
        layer: The layer.
        position: Where it reads, in or near its example.
        horizon: Sentences ahead.
        solver: How it was fitted.
    """

    location: str
    layer: int
    position: Position
    horizon: int = 1
    solver: str = "softmax"

    def __str__(self) -> str:
        return f"{self.location}, layer {self.layer}, position {self.position}, horizon {self.horizon}"

    @property
    def key(self) -> str:
        """Its name in the file of probes."""
        return "|".join(map(str, (self.solver, self.location, self.layer, self.position, self.horizon)))

    @classmethod
    def of(cls, key: str) -> Cell:
        """The cell of a name in the file of probes."""
        solver, location, layer, position, horizon = key.split("|")
        return cls(location, int(layer), as_position(position), int(horizon), solver)


def cells_of(rows: pd.DataFrame) -> list[Cell]:
    """The cell of each row of a table of results that is a probe's."""
    columns = rows[["location", "layer", "position", "horizon", "solver"]]
    return [
        Cell(location, int(layer), as_position(position), int(horizon), solver)
        for location, layer, position, horizon, solver in columns.itertuples(index=False, name=None)
    ]


@dataclass(frozen=True)
class LinearProbe:
    """A linear probe on raw activations.

    Attributes:
        coef: Weights `[width, classes]`.
        intercept: Intercepts `[classes]`; minus infinity for a class without examples to fit on.
    """

    coef: Tensor
    intercept: Tensor

    def to(self, like: torch.device | Tensor) -> LinearProbe:
        """The same on a device, or on that and in the type of a tensor."""
        return LinearProbe(self.coef.to(like), self.intercept.to(like))

    def scores(self, activations: Tensor) -> Tensor:
        """The scores of classes, or the number `[..., 1]`, given activations `[..., width]`."""
        return activations.float() @ self.coef + self.intercept

    def log_probabilities(self, activations: Tensor) -> Tensor:
        """Log-probabilities of the classes in nats, given activations `[..., width]`."""
        return self.scores(activations).log_softmax(dim=-1)


def probes_of(tensors: Mapping[str, Tensor]) -> dict[Cell, LinearProbe]:
    """Probes from tensors by the names that they are saved under."""
    keys = [name.removesuffix("|coef") for name in tensors if name.endswith("|coef")]
    return {Cell.of(key): LinearProbe(tensors[f"{key}|coef"], tensors[f"{key}|intercept"]) for key in keys}


def _sorted(values: Iterable[int | str]) -> list[str]:
    """Distinct values, numbers before words."""
    return [str(value) for value in sorted({*values}, key=lambda value: (isinstance(value, str), value))]


def weights_file(folder: Path, variant: str, seed: int) -> Path:
    """The file in the folder of probes that holds the linear ones of a variant and seed."""
    return folder / f"{variant}-seed{seed}.safetensors"


class SavedProbes:
    """The linear probes of one variant and seed of a run.

    Args:
        folder: The folder of results, `probes/` of a run.
        variant: The variant.
        seed: Seed of the documents drawn to fit on.

    Raises:
        ProbekitError: There are none; it says which command makes them.
    """

    def __init__(self, folder: Path, variant: str, seed: int) -> None:
        self._folder, self._variant = folder, variant
        path = weights_file(folder, variant, seed)
        if not path.is_file():
            kept = sorted(other.stem for other in folder.glob("*-seed*.safetensors"))
            # Probing replaces all results, so the command has to name the variants that are there too.
            wanted = dict.fromkeys([*(name.rpartition("-seed")[0] for name in kept), variant])
            raise ProbekitError(
                f"{path} does not exist: no linear probes of {variant!r} with seed {seed} are kept "
                f"(there are {', '.join(kept) or 'none'}); run `probekit probe {folder.parent} "
                f"--probe.variants {' '.join(wanted)}`"
            )
        self._probes = probes_of(read_tensors(path))

    @property
    def cells(self) -> list[Cell]:
        """The cells that have a probe."""
        return [*self._probes]

    def __getitem__(self, cell: Cell) -> LinearProbe:
        """The probe of a cell.

        Raises:
            ProbekitError: There is none.
        """
        self.require([cell])
        return self._probes[cell]

    def require(self, cells: Iterable[Cell]) -> None:
        """Checks that cells have a probe.

        Raises:
            ProbekitError: One has none.
        """
        for cell in cells:
            if cell in self._probes:
                continue
            known = "; ".join(
                f"{name}s {', '.join(_sorted(getattr(other, name) for other in self.cells))}"
                for name in ("location", "layer", "position", "horizon", "solver")
            )
            raise ProbekitError(
                f"{self._folder} has no {cell.solver} probe of {self._variant!r} at {cell}; it has {known}"
            )

    def stacked(self, cells: list[Cell]) -> LinearProbe:
        """The probes of several cells of one width together: `coef` `[cells, width, classes]`."""
        probes = [self[cell] for cell in cells]
        return LinearProbe(
            torch.stack([probe.coef for probe in probes]),
            torch.stack([probe.intercept for probe in probes])[:, None],
        )
