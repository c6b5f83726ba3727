"""Results of probing: scores by document, the table, saved linear probes, and the record of settings."""

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
from probekit.statistics import Intervals, Resampling, bootstrap_ratios, simultaneous_ratios

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

MODEL_FREE = ("prior", "bigram", "skip n-gram")
"""Baselines that need no model: a probe should gain over the strongest of them."""

CEILING = "ceiling (tokens read)"
"""The reader that nothing that sees the same tokens can beat, where the data is planted."""

_INTERVALS = (*METRICS.values(), "bits", "selectivity", "shortfall", "gain")

COLUMNS = (
    {"reader": "str", "solver": "str", "variant": "str", "target": "str", "seed": "Int64"}
    | {"location": "str", "layer": "Int64", "position": "str", "distance": "Int64", "horizon": "int64"}
    | {"injected": "bool", "constant": "boolean", "examples": "int64", "documents": "Int64"}
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

ROW_KEY = ["reader", "solver", "variant", "seed", "location", "layer", "distance", "position", "horizon"]
"""Columns that identify a row, in the order by which rows are sorted: `distance` puts positions in order."""


class DocumentSums:
    """Scores of readers on the same examples, summed over those of each document.

    Args:
        readers: What is known of each reader.
        documents: Number of documents.
        scores: The scores to sum.

    Attributes:
        readers: What is known of each reader `[readers]`; its row of the table begins with it.
        sums: For every score its sums, float64 `[documents, readers]`.
    """

    def __init__(self, readers: Sequence[Facts], documents: int, scores: Sequence[str] = SCORES) -> None:
        self.readers = list(readers)
        self.sums: dict[str, NDArray[np.float64]] = {
            score: np.zeros((documents, len(self.readers))) for score in scores
        }

    def add(
        self, document: np.ndarray, log_probabilities: Tensor | np.ndarray, labels: Tensor | np.ndarray
    ) -> None:
        """Scores some examples.

        Args:
            document: Number of each example's document, from 0; those of one are together `[examples]`.
            log_probabilities: In nats `[readers, examples, classes]`.
            labels: True classes `[examples]`, or `[readers, examples]` where each reader has its own.
        """
        starts = np.flatnonzero(np.diff(document, prepend=-1))
        scores = score_actions(log_probabilities, labels)
        for score, sums in self.sums.items():
            values = getattr(scores, score).astype(np.float64)
            sums[document[starts]] += np.add.reduceat(values, starts, axis=1).T

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


def table_of(
    scored: Sequence[DocumentSums], counts: np.ndarray, empty: Sequence[Facts], resampling: Resampling
) -> pd.DataFrame:
    """Makes the table of results.

    Args:
        scored: Scores of all readers on the same test examples; the prior and the other model-free baselines
            of every position and horizon are among them.
        counts: Test examples of every document `[documents]`.
        empty: What is known of the cells that are empty.
        resampling: How documents are resampled.

    Returns:
        A row for each reader and cell, with `COLUMNS`, sorted by `ROW_KEY`.
    """
    rows = pd.DataFrame([reader for part in scored for reader in part.readers]).astype({"position": str})

    def joined(score: str) -> NDArray[np.float64]:
        """The sums of a score `[documents, rows]`; NaN for readers that were not scored by it."""
        missing = [np.full((len(counts), len(part.readers)), np.nan) for part in scored]
        return np.concatenate(
            [part.sums.get(score, nan) for part, nan in zip(scored, missing, strict=True)], axis=1
        )

    def write(metric: str, numbers: np.ndarray, found: Intervals) -> None:
        for suffix, values in (("", found.value), ("_low", found.low), ("_high", found.high)):
            rows.loc[numbers, f"{metric}{suffix}"] = values

    correct, control, nats = joined("correct"), joined("control_correct"), joined("cross_entropy")
    probes = (rows.reader == "probe").to_numpy()
    prior, _ = _same_cell(rows, rows.reader == "prior")
    ceiling, has_ceiling = _same_cell(rows, rows.reader == CEILING)
    free = rows[rows.reader.isin(MODEL_FREE)]
    best = free.groupby(["position", "horizon"]).validation_cross_entropy.idxmin()
    strongest, _ = _same_cell(rows, rows.index.isin(best))

    measured = {METRICS[score]: joined(score) for score in METRICS} | {
        "bits": (nats[:, prior] - nats) / np.log(2),
        "selectivity": correct - control,
        "shortfall": np.where(has_ceiling & probes, (nats - nats[:, ceiling]) / np.log(2), np.nan),
    }
    for metric, values in measured.items():
        known = np.flatnonzero(np.isfinite(values).all(axis=0))
        write(metric, known, bootstrap_ratios(values[:, known], counts, **resampling))
    rows["control_accuracy"] = control.sum(0) / counts.sum()
    rows["examples"] = int(counts.sum())
    rows["documents"] = int(np.count_nonzero(counts))

    # The intervals of gains hold for all cells together, those where actions were injected left out.
    compared = probes & (rows.injected != True).to_numpy()  # noqa: E712 - NaN for baselines
    rows["gain_over"] = rows.reader.iloc[strongest].set_axis(rows.index).where(compared)
    if compared.any():
        gains = (nats[:, strongest[compared]] - nats[:, compared]) / np.log(2)
        draws = {"resamples": resampling["resamples"], "seed": resampling["seed"]}
        write("gain", np.flatnonzero(compared), simultaneous_ratios(gains, counts, **draws))

    table = pd.concat([rows, pd.DataFrame(list(empty))]).reindex(columns=list(COLUMNS))
    table["position"] = table.position.astype(str)
    table["distance"] = pd.to_numeric(table.position, errors="coerce")
    table["injected"] = table.injected.fillna(False).astype(bool)
    return table.astype(COLUMNS).sort_values(ROW_KEY, kind="stable", ignore_index=True)


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

    def log_probabilities(self, activations: Tensor) -> Tensor:
        """Log-probabilities of the classes in nats, given activations `[..., width]`."""
        return (activations.float() @ self.coef + self.intercept).log_softmax(dim=-1)


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
    """

    config: Config
    notes: list[str]
    documents: Mapping[str, Mapping[str, int]]
    origin: Mapping[str, Any]


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
    )
