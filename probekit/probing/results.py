"""Results of probing: scores of readers, the table, saved linear probes, and the record of settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from probekit import distributed
from probekit.config import Config, Position, as_position
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import METRICS, score_actions
from probekit.io import read_json, read_tensors
from probekit.probing.targets import Target
from probekit.statistics import (
    Intervals,
    Resampling,
    balanced_accuracies,
    bootstrap_ratios,
    paired_differences,
    rank_correlations,
    simultaneous_ratios,
    two_class_metrics,
)

Facts = dict[str, Any]
"""What is known of a reader, by column of the table: what identifies it, and how it was fitted."""

SCORES = tuple(METRICS)
"""Fields of `ActionScores`."""

ELEMENTS = 1 << 25
"""Log-probabilities scored at once; bounds the memory."""

SETTINGS = "settings.json"
"""The file in the folder of probes that says how they were made."""

LINEAR_SOLVERS = ("softmax", "ridge", "lda", "l1", "mean-difference")
"""Solvers whose probes are linear; the weights of these are kept."""

FALSE_POSITIVE_RATE = 0.05
"""That of `recall`. At 0.01, a few hundred test texts would leave one or two false positives to count."""

MODEL_FREE = ("prior", "mean", "bigram", "skip n-gram", "previous number", "bag of words")
"""Baselines that need no model: a probe should gain over the strongest of them."""

CEILING = "ceiling (tokens read)"
"""The reader that nothing that sees the same tokens can beat, where the data is planted."""

_INTERVALS = (*METRICS.values(), "bits", "selectivity", "shortfall", "gain", "balanced_accuracy")

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

ROW_KEY = ["reader", "solver", "variant", "seed", "location", "layer", "distance", "position", "horizon"]
"""Columns that identify a row, in the order by which rows are sorted: `distance` puts positions in order."""


@dataclass(frozen=True)
class ScoredExamples:
    """The test examples, on which all readers are scored.

    Attributes:
        target: What is predicted.
        group: Number of each example's group from 0 `[examples]`; groups are what intervals resample.
        labels: Labels `[examples]` by horizon.
    """

    target: Target
    group: NDArray[np.int64]
    labels: Mapping[int, np.ndarray]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Examples of every group `[groups]`."""
        return np.bincount(self.group)

    def pairs(self, horizon: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Groups with each class that they have `[pairs, 2]`, examples `[pairs]`, and each example's pair."""
        each = self.group * self.target.classes + self.labels[horizon]
        pairs, pair, counts = np.unique(each, return_inverse=True, return_counts=True)
        return np.stack(np.divmod(pairs, self.target.classes), 1), counts, pair

    def differ(self, horizon: int) -> bool:
        """Whether there are two labels at least; else no reader can be told from another."""
        return len(np.unique(self.labels[horizon])) > 1


class DocumentSums:
    """Scores of readers on the same examples, summed over those of each document or group.

    Args:
        readers: What is known of each reader, all of one horizon.
        tested: The examples; None: nothing is scored.
        control: Score the control task, of which less is reported.

    Attributes:
        readers: What is known of each reader `[readers]`; its row of the table begins with it.
        sums: For every score its sums, float64 `[groups, readers]`. For classes `class_correct`, correct
            predictions, is by group and class `[pairs, readers]`. `log_odds` of the second of two classes,
            float32, and `predicted` numbers are single ones `[examples, readers]`.
    """

    def __init__(
        self, readers: Sequence[Facts], tested: ScoredExamples | None = None, *, control: bool = False
    ) -> None:
        self.readers = list(readers)
        self.sums: dict[str, NDArray[Any]] = {}
        if tested is None:
            return
        examples = np.arange(len(tested.group))
        if tested.target.kind == "numbers":
            of_groups: Sequence[str] = ("squared_error", "total") if control else ("squared_error",)
            single = {} if control else {"predicted": examples}
        else:
            of_groups = ("correct",) if control else SCORES
            single = {"log_odds": examples} if tested.target.classes == 2 and not control else {}
        self._rows = dict.fromkeys(of_groups, tested.group) | single
        if not control and tested.target.kind == "classes":
            self._rows["class_correct"] = tested.pairs(readers[0]["horizon"])[2]
        for score, row in self._rows.items():
            kind = np.float32 if score == "log_odds" else np.float64
            self.sums[score] = np.zeros((int(row.max()) + 1, len(self.readers)), kind)

    def add(self, rows: slice, predicted: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
        """Scores some examples.

        Args:
            rows: Which examples.
            predicted: Log-probabilities in nats `[readers, examples, classes]`, or numbers
                `[readers, examples]`.
            labels: True labels `[examples]`, or `[readers, examples]` where each reader has its own.
        """
        found = torch.as_tensor(predicted)
        scores: dict[str, NDArray[Any]]
        if "squared_error" in self.sums:
            truth = torch.as_tensor(labels, device=found.device)
            parts = {"predicted": found, "squared_error": (found - truth).square()}
            parts["total"] = truth.square().expand_as(found)
            scores = {score: parts[score].double().cpu().numpy() for score in self.sums}
        else:
            scores = dict(vars(score_actions(found, labels)))
            scores["class_correct"] = scores["correct"]
            if "log_odds" in self.sums:
                scores["log_odds"] = (found[..., 1] - found[..., 0]).float().cpu().numpy()
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


def row_slices(readers: int, examples: int, classes: int) -> list[slice]:
    """Cuts examples so that the log-probabilities of all readers stay within `ELEMENTS`."""
    size = max(1, ELEMENTS // (readers * classes))
    return [slice(start, start + size) for start in range(0, examples, size)]


def columns_of(target: Target) -> dict[str, str]:
    """The columns of a target's table, and their types: `COLUMNS`, and those of its kind."""
    numbers = target.kind == "numbers"
    metrics = _NUMBERS if numbers else _TWO_CLASSES if target.classes == 2 else ()
    own = {f"{metric}{bound}": "float64" for metric in metrics for bound in ("", "_low", "_high")}
    return (
        COLUMNS
        | own
        | (dict.fromkeys(("control_r2", "validation_squared_error"), "float64") if numbers else {})
    )


def main_metric(table: pd.DataFrame) -> str:
    """The metric that a table's target is shown by: R2 of numbers, AUROC of two classes, else accuracy."""
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
    rows = pd.DataFrame([reader for part in scored for reader in part.readers]).astype({"position": str})
    counts, numbers = tested.counts, tested.target.kind == "numbers"

    def joined(score: str) -> NDArray[np.float64]:
        """The sums of a score `[groups, rows]`; NaN for readers that were not scored by it."""
        missing = [np.full((len(counts), len(part.readers)), np.nan) for part in scored]
        return np.concatenate(
            [part.sums.get(score, nan) for part, nan in zip(scored, missing, strict=True)], axis=1
        )

    def write(metric: str, numbers: np.ndarray, found: Intervals) -> None:
        for suffix, values in (("", found.value), ("_low", found.low), ("_high", found.high)):
            rows.loc[numbers, f"{metric}{suffix}"] = values

    # Bits over the prior divide by the number of examples, R2 by the squared error of the mean.
    loss, unit = (joined("squared_error"), 1.0) if numbers else (joined("cross_entropy"), np.log(2))
    probes = (rows.reader == "probe").to_numpy()
    prior, _ = _same_cell(rows, rows.reader.isin(("prior", "mean")))
    weight = loss[:, prior] if numbers else counts[:, None]
    free = rows[rows.reader.isin(MODEL_FREE)]
    best = validation_loss(free).groupby([free.position, free.horizon]).idxmin()
    strongest, _ = _same_cell(rows, rows.index.isin(best))

    def ratios(metric: str, values: NDArray[np.float64], weight: np.ndarray) -> None:
        known = np.flatnonzero(np.isfinite(values).all(axis=0))
        of_known = weight if weight.shape[1] == 1 else weight[:, known]
        found = bootstrap_ratios(values[:, known], of_known, examples=counts, **resampling)
        write(metric, known, found)

    ratios("r2" if numbers else "bits", (loss[:, prior] - loss) / unit, weight)
    if numbers:
        ratios("squared_error", loss, counts[:, None])
        control, total = joined("control_squared_error"), joined("control_total")
        rows["control_r2"] = 1 - control.sum(0) / total.sum(0)
        known = np.flatnonzero(rows.control_r2.notna())
        each = (values[:, known] for values in (control, loss, total))
        gap = paired_differences(*each, second_counts=weight[:, known], examples=counts, **resampling)
        write("selectivity", known, gap)
    else:
        correct, control = joined("correct"), joined("control_correct")
        ceiling, has_ceiling = _same_cell(rows, rows.reader == CEILING)
        for score, metric in METRICS.items():
            ratios(metric, joined(score), counts[:, None])
        ratios("selectivity", correct - control, counts[:, None])
        shortfall = np.where(has_ceiling & probes, (loss - loss[:, ceiling]) / unit, np.nan)
        ratios("shortfall", shortfall, counts[:, None])
        rows["control_accuracy"] = control.sum(0) / counts.sum()
    ends = np.cumsum([len(part.readers) for part in scored])
    for part, end in zip(scored, ends, strict=True):
        for metric, found in _of_single_examples(part, tested, resampling).items():
            write(metric, np.arange(end - len(part.readers), end), found)
    rows["examples"] = int(counts.sum())
    rows["documents"] = rows["groups"] = int(np.count_nonzero(counts))

    differ = rows.horizon.map(tested.differ).to_numpy(bool)
    compared = probes & (rows.injected != True).to_numpy() & differ  # noqa: E712 - NaN for baselines
    rows["gain_over"] = rows.reader.iloc[strongest].set_axis(rows.index).where(compared)
    if compared.any():
        gains = (loss[:, strongest[compared]] - loss[:, compared]) / unit
        write(
            "gain",
            np.flatnonzero(compared),
            _of_gains(gains, weight[:, compared] if numbers else weight, counts, resampling),
        )
    columns = columns_of(tested.target)
    bounds = [name for name in columns if name.endswith(("_low", "_high")) and name in rows]
    rows.loc[~differ, bounds] = np.nan

    table = pd.concat([rows, pd.DataFrame(list(empty))]).reindex(columns=list(columns))
    table["position"] = table.position.astype(str)
    table["distance"] = pd.to_numeric(table.position, errors="coerce")
    table["injected"] = table.injected.fillna(False).astype(bool)
    return table.astype(columns).sort_values(ROW_KEY, kind="stable", ignore_index=True)


def _of_gains(
    gains: NDArray[np.float64], weight: np.ndarray, counts: np.ndarray, resampling: Resampling
) -> Intervals:
    """Intervals that hold for all cells together, those where actions were injected left out."""
    if weight.shape == gains.shape:  # numbers: a probe that keeps the mean differs from it by rounding
        # Where the mean is exact, the rounding is still that of numbers as large as the others are.
        gains = np.where(np.abs(gains) > 1e-9 * np.maximum(weight, weight.mean(0)), gains, 0.0)
    resamples, seed = resampling["resamples"], resampling["seed"]
    return simultaneous_ratios(gains, weight, resamples=resamples, seed=seed, examples=counts)


def _of_single_examples(
    part: DocumentSums, tested: ScoredExamples, resampling: Resampling
) -> dict[str, Intervals]:
    """Metrics that are no ratios of sums, by name."""
    found: dict[str, Intervals] = {}
    horizon = part.readers[0]["horizon"]
    if "class_correct" in part.sums:
        pairs, counts, _ = tested.pairs(horizon)
        own = part.sums["class_correct"]
        found["balanced_accuracy"] = balanced_accuracies(own, counts, pairs[:, 1], pairs[:, 0], **resampling)
    if "log_odds" in part.sums:
        second = tested.labels[horizon] == 1
        own = part.sums["log_odds"]
        found |= two_class_metrics(own, second, tested.group, FALSE_POSITIVE_RATE, **resampling)
    if "predicted" in part.sums:
        own = part.sums["predicted"]
        found["rank_correlation"] = rank_correlations(own, tested.labels[horizon], tested.group, **resampling)
    return found


def _same_cell(rows: pd.DataFrame, chosen: pd.Series | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row the number of the chosen row of its position and horizon, and whether there is one."""
    cell = pd.MultiIndex.from_frame(rows[["position", "horizon"]])
    numbers = pd.Series(np.arange(len(rows)), cell)[np.asarray(chosen)].reindex(cell, fill_value=-1)
    return numbers.to_numpy(), numbers.to_numpy() >= 0


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

    def scores(self, activations: Tensor) -> Tensor:
        """The scores of classes, or the number `[..., 1]`, given activations `[..., width]`."""
        return activations.float() @ self.coef + self.intercept

    def log_probabilities(self, activations: Tensor) -> Tensor:
        """Log-probabilities of the classes in nats, given activations `[..., width]`."""
        return self.scores(activations).log_softmax(dim=-1)


def _sorted(values: Iterable[int | str]) -> list[str]:
    """Distinct values, numbers before words."""
    return [str(value) for value in sorted({*values}, key=lambda value: (isinstance(value, str), value))]


def probes_file(folder: Path, variant: str, seed: int) -> Path:
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
        path = probes_file(folder, variant, seed)
        if not path.is_file():
            kept = sorted(other.stem for other in folder.glob("*-seed*.safetensors"))
            # Probing replaces all results, so the command has to name the variants that are there too.
            wanted = dict.fromkeys([*(name.rpartition("-seed")[0] for name in kept), variant])
            raise ProbekitError(
                f"{path} does not exist: no linear probes of {variant!r} with seed {seed} are kept "
                f"(there are {', '.join(kept) or 'none'}); run `probekit probe {folder.parent} "
                f"--probe.variants {' '.join(wanted)}`"
            )
        self._tensors = read_tensors(path)

    @property
    def cells(self) -> list[Cell]:
        """The cells that have a probe."""
        return [Cell.of(name.removesuffix("|coef")) for name in self._tensors if name.endswith("|coef")]

    def __getitem__(self, cell: Cell) -> LinearProbe:
        """The probe of a cell.

        Raises:
            ProbekitError: There is none.
        """
        if f"{cell.key}|coef" not in self._tensors:
            known = "; ".join(
                f"{name}s {', '.join(_sorted(getattr(other, name) for other in self.cells))}"
                for name in ("location", "layer", "position", "horizon", "solver")
            )
            raise ProbekitError(
                f"{self._folder} has no {cell.solver} probe of {self._variant!r} at {cell}; it has {known}"
            )
        return LinearProbe(*(self._tensors[f"{cell.key}|{part}"] for part in ("coef", "intercept")))

    def stacked(self, cells: list[Cell]) -> LinearProbe:
        """The probes of several cells of one width together: `coef` `[cells, width, classes]`."""
        probes = [self[cell] for cell in cells]
        return LinearProbe(
            torch.stack([probe.coef for probe in probes]),
            torch.stack([probe.intercept for probe in probes])[:, None],
        )


@dataclass(frozen=True)
class ProbeRecord:
    """How a run's probes were made, as `probes/settings.json` records it.

    Attributes:
        config: All settings.
        notes: What to know of all rows together.
        documents: By seed and split the documents that examples were drawn from.
        origin: What the results depend on beside settings and weights; see `probe.origin`.
        classes: Names of the classes, none of numbers; None of probes of an earlier version.
    """

    config: Config
    notes: list[str]
    documents: Mapping[str, Mapping[str, int]]
    origin: Mapping[str, Any]
    classes: tuple[str, ...] | None


def read_probe_record(run: Path) -> ProbeRecord:
    """Reads the record of the probes in a run's folder.

    Raises:
        ProbekitError: There is none.
    """
    path = run / "probes" / SETTINGS
    if not path.exists():
        raise ProbekitError(f"{path} does not exist; run `probekit probe {run}`")
    recorded = read_json(path)
    settings = {name: value for name, value in recorded.items() if name in Config.model_fields}
    return ProbeRecord(
        Config.from_dict(settings),
        recorded.get("notes", []),
        recorded.get("documents", {}),
        recorded.get("of", {}),
        None if (classes := recorded.get("classes")) is None else tuple(classes),
    )
