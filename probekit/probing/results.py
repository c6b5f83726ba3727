"""How a run's probes were made, as `probes/settings.json` tells it, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from probekit import distributed
from probekit.config import Config
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import METRICS, score_actions
from probekit.io import one_line, read_json, read_tensors, write_tensors
from probekit.statistics import Intervals, Resampling, bootstrap_ratios, simultaneous_ratios

if TYPE_CHECKING:
    from probekit.probing.activations import Stack
    from probekit.probing.fitting import Fitted


Row = dict[str, Any]

SCORES = tuple(METRICS)
"""Fields of `ActionScores`."""

ELEMENTS = 1 << 25
"""Log-probabilities scored at once: bounds the memory."""


class Tally:
    """Sums over the examples of each document, for readers that are scored on the same examples.

    Attributes:
        heads: What is known of each reader `[readers]`: its row of results begins with it.
        sums: For every score its sums, float64 `[documents, readers]`.
    """

    def __init__(self, heads: Sequence[Row], documents: int, scores: Sequence[str] = SCORES) -> None:
        self.heads = list(heads)
        self.sums: dict[str, NDArray[np.float64]] = {
            score: np.zeros((documents, len(self.heads))) for score in scores
        }

    def add(
        self, document: np.ndarray, log_probabilities: Tensor | np.ndarray, labels: Tensor | np.ndarray
    ) -> None:
        """Scores some examples.

        Args:
            document: Number of each example's document, from 0, those of one document together `[examples]`.
            log_probabilities: In nats `[readers, examples, classes]`.
            labels: True classes `[examples]`, or `[readers, examples]` where each reader has its own.
        """
        starts = np.flatnonzero(np.diff(document, prepend=-1))
        scores = score_actions(log_probabilities, labels)
        for score, sums in self.sums.items():
            values = getattr(scores, score).astype(np.float64)
            sums[document[starts]] += np.add.reduceat(values, starts, axis=1).T

    def over_processes(self, device: torch.device) -> None:
        """Takes in what all processes have scored."""
        for score, sums in self.sums.items():
            summed = torch.from_numpy(sums).to(device)
            distributed.add_up([summed])
            self.sums[score] = summed.cpu().numpy()


def row_slices(readers: int, examples: int, classes: int) -> list[slice]:
    """Cuts examples so that log-probabilities of all readers stay within `ELEMENTS`."""
    size = max(1, ELEMENTS // (readers * classes))
    return [slice(start, start + size) for start in range(0, examples, size)]


MODEL_FREE = ("prior", "bigram", "skip n-gram")
"""Baselines that no model is needed for: a probe has to read more than the strongest of them."""

CEILING = "ceiling (tokens read)"
"""What no reader of a position can beat."""

NONE = -1
"""Number of a row that is not there."""

_INTERVALS = (*METRICS.values(), "bits", "selectivity", "shortfall", "gain")

COLUMNS = (
    {"reader": "str", "solver": "str", "variant": "str", "target": "str", "seed": "Int64"}
    | {"location": "str", "layer": "Int64", "distance": "int64", "horizon": "int64"}
    | {"injected": "bool", "constant": "boolean", "examples": "int64", "documents": "Int64"}
    | {f"{metric}{bound}": "float64" for metric in _INTERVALS for bound in ("", "_low", "_high")}
    | {"gain_over": "str", "control_accuracy": "float64"}
    | {"code_length": "float64", "compression": "float64"}
    | {"l2": "float64", "shrinkage": "float64", "iterations": "Int64", "converged": "boolean"}
    | {"validation_cross_entropy": "float64", "fitted_on": "Int64"}
)
"""The table's columns and their types; those with a capital, and boolean, can say that nothing applies."""

CELL = ["reader", "solver", "variant", "seed", "location", "layer", "distance", "horizon"]
"""Columns that name a row."""


def table_of(
    tallies: Sequence[Tally], counts: np.ndarray, empty: Sequence[Row], resampling: Resampling
) -> pd.DataFrame:
    """The table of results.

    Args:
        tallies: What readers got right; among them the prior and the other model-free baselines of every
            distance and horizon. All were scored on the same test examples.
        counts: Test examples of every document `[documents]`.
        empty: Rows of cells that are empty.
        resampling: How documents are resampled.
    """
    rows = pd.DataFrame([head for tally in tallies for head in tally.heads])
    sums = {
        score: np.concatenate([_column(tally, score, len(counts)) for tally in tallies], axis=1)
        for score in (*METRICS, "control_correct")
    }
    nats = sums["cross_entropy"]
    priors = _beside(rows, rows.reader == "prior")
    strongest = _beside(rows, _strongest(rows))
    measured = {METRICS[score]: sums[score] for score in METRICS} | {
        "bits": (nats[:, priors] - nats) / np.log(2),
        "selectivity": sums["correct"] - sums["control_correct"],
        "shortfall": _shortfall(rows, nats),
    }
    for name, values in measured.items():
        there = np.flatnonzero(np.isfinite(values).all(axis=0))
        _write(rows, name, there, bootstrap_ratios(values[:, there], counts, **resampling))
    rows["control_accuracy"] = sums["control_correct"].sum(0) / counts.sum()
    rows["examples"] = int(counts.sum())
    rows["documents"] = int(np.count_nonzero(counts))
    rows["gain_over"] = rows.reader.iloc[strongest].set_axis(rows.index).where(_compared(rows))
    compared = np.flatnonzero(_compared(rows))
    if len(compared):
        gains = (nats[:, strongest[compared]] - nats[:, compared]) / np.log(2)
        draws = {"resamples": resampling["resamples"], "seed": resampling["seed"]}
        _write(rows, "gain", compared, simultaneous_ratios(gains, counts, **draws))
    table = pd.concat([rows, pd.DataFrame(list(empty))]).reindex(columns=list(COLUMNS))
    table["injected"] = table.injected.fillna(False).astype(bool)
    return table.astype(COLUMNS).sort_values(CELL, kind="stable", ignore_index=True)


def _shortfall(rows: pd.DataFrame, nats: np.ndarray) -> np.ndarray:
    """Bits by which each probe is below the ceiling `[documents, readers]`; NaN where none is known."""
    ceilings = _beside(rows, rows.reader == CEILING)
    known = (ceilings != NONE) & (rows.reader == "probe").to_numpy()
    return np.where(known, (nats - nats[:, ceilings]) / np.log(2), np.nan)


def _write(rows: pd.DataFrame, name: str, numbers: np.ndarray, found: Intervals) -> None:
    """Writes a metric and its interval into some rows."""
    for suffix, values in (("", found.value), ("_low", found.low), ("_high", found.high)):
        rows.loc[numbers, f"{name}{suffix}"] = values


def _column(tally: Tally, score: str, documents: int) -> np.ndarray:
    """Sums `[documents, readers]`; NaN where the readers were not scored so."""
    missing = np.full((documents, len(tally.heads)), np.nan)
    return tally.sums.get(score, missing)


def _compared(rows: pd.DataFrame) -> pd.Series:
    """Which rows are compared with the strongest baseline, all together: probes that nothing was told."""
    return (rows.reader == "probe") & (rows.injected != True)  # noqa: E712 - baselines have no such entry


def _strongest(rows: pd.DataFrame) -> np.ndarray:
    """The model-free baseline of each distance and horizon that is best on validation documents."""
    free = rows[rows.reader.isin(MODEL_FREE)]
    best = free.groupby(["distance", "horizon"]).validation_cross_entropy.idxmin()
    return np.asarray(rows.index.isin(best))


def _beside(rows: pd.DataFrame, chosen: pd.Series | np.ndarray) -> np.ndarray:
    """For each row the number of the chosen row of its distance and horizon, `NONE` where there is none."""
    cell = pd.MultiIndex.from_frame(rows[["distance", "horizon"]])
    return pd.Series(np.arange(len(rows)), cell)[np.asarray(chosen)].reindex(cell, fill_value=NONE).to_numpy()


LINEAR_SOLVERS = ("softmax", "ridge", "lda")
"""Solvers whose probes are linear."""


@dataclass(frozen=True)
class Cell:
    """What a probe reads: where, when and what.

    Attributes:
        location: TransformerLens hook, without the layer.
        layer: The layer.
        distance: Tokens before the anchor.
        horizon: Sentences ahead.
        solver: How it was fitted.
    """

    location: str
    layer: int
    distance: int
    horizon: int = 1
    solver: str = "softmax"

    def __str__(self) -> str:
        return f"{self.location}, layer {self.layer}, distance {self.distance}, horizon {self.horizon}"

    @property
    def key(self) -> str:
        """Its name in the file."""
        return "|".join(map(str, (self.solver, self.location, self.layer, self.distance, self.horizon)))

    @classmethod
    def of(cls, key: str) -> Cell:
        """The cell of a name in the file."""
        solver, location, layer, distance, horizon = key.split("|")
        return cls(location, int(layer), int(distance), int(horizon), solver)


@dataclass(frozen=True)
class LinearProbe:
    """A probe on raw activations.

    Attributes:
        coef: `[width, classes]`.
        intercept: `[classes]`; minus infinity for a class that was not there to fit on.
    """

    coef: Tensor
    intercept: Tensor

    def log_probabilities(self, activations: Tensor) -> Tensor:
        """Log-probabilities of the classes in nats, of activations `[..., width]`."""
        return (activations.float() @ self.coef + self.intercept).log_softmax(dim=-1)


def weights_of(
    fitted: Iterable[Fitted], blocks: list[Stack], distances: tuple[int, ...]
) -> dict[str, Tensor]:
    """The weights of fitted probes that are linear, by the names that they are kept under."""
    weights: dict[str, Tensor] = {}
    for batch in fitted:
        if batch.solver not in LINEAR_SOLVERS:
            continue
        places = [(place, distance) for place in blocks[batch.block].points for distance in distances]
        for ((location, layer), distance), coef, intercept in zip(
            places, batch.probes.coef_, batch.probes.intercept_, strict=True
        ):
            key = Cell(location, layer, distance, batch.horizon, batch.solver).key
            # Copied: a row of a batch would keep the whole batch.
            weights[f"{key}|coef"] = coef.detach().float().cpu().clone()
            weights[f"{key}|intercept"] = intercept.detach().float().cpu().clone()
    return weights


def write_probes(folder: Path, variant: str, seed: int, weights: Mapping[str, Tensor]) -> None:
    """Writes the weights of a variant's probes into the folder of results."""
    write_tensors(_file(folder, variant, seed), weights)


class SavedProbes:
    """The linear probes of one variant and seed of a run.

    Args:
        folder: The folder of results, `probes/` of a run.
        variant: Whose.
        seed: Of the documents drawn to fit on.

    Raises:
        ProbekitError: There are none; it says which command makes them.
    """

    def __init__(self, folder: Path, variant: str, seed: int) -> None:
        self._folder, self._variant = folder, variant
        path = _file(folder, variant, seed)
        if not path.is_file():
            there = sorted(other.stem for other in folder.glob("*-seed*.safetensors"))
            # A probing takes the place of the one before: what is there is to be asked for again.
            wanted = dict.fromkeys([*(name.rpartition("-seed")[0] for name in there), variant])
            raise ProbekitError(
                f"{path} does not exist: no linear probes of {variant!r} with seed {seed} are kept "
                f"(there are {', '.join(there) or 'none'}); run `probekit probe {folder.parent} "
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
                f"{name}s {', '.join(map(str, sorted({getattr(other, name) for other in self.cells})))}"
                for name in ("location", "layer", "distance", "horizon", "solver")
            )
            raise ProbekitError(
                f"{self._folder} has no {cell.solver} probe of {self._variant!r} at {cell}; it has {known}"
            )
        return LinearProbe(*(self._tensors[f"{cell.key}|{part}"] for part in ("coef", "intercept")))

    def stacked(self, cells: list[Cell]) -> LinearProbe:
        """The probes of several cells of one width at once: `coef` `[cells, width, classes]`."""
        probes = [self[cell] for cell in cells]
        return LinearProbe(
            torch.stack([probe.coef for probe in probes]),
            torch.stack([probe.intercept for probe in probes])[:, None],
        )


def _file(folder: Path, variant: str, seed: int) -> Path:
    return folder / f"{variant}-seed{seed}.safetensors"


SETTINGS = "settings.json"
"""The file in the folder of probes."""

Count = Annotated[int, Field(ge=0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class SplitDocuments(_Record):
    """How many documents probes were fitted on, chosen on and tested on."""

    probe: Count
    validation: Count
    test: Count


class ProbeRecord(_Record):
    """How probes were made.

    Attributes:
        config: All settings.
        notes: What to know of all rows together.
        documents: By seed of the documents drawn to fit on.
    """

    config: Config
    notes: list[str] = []
    documents: dict[str, SplitDocuments] = {}


def read_probe_record(run: Path) -> ProbeRecord:
    """The record of the probes in a run's folder.

    Raises:
        ProbekitError: There is none, or it is not what `probekit probe` writes.
    """
    path = run / "probes" / SETTINGS
    recorded = read_json(path)
    try:
        if not isinstance(recorded, dict) or not recorded.keys() & Config.model_fields.keys():
            raise ValueError("it holds no settings")
        settings = {name: value for name, value in recorded.items() if name in Config.model_fields}
        rest = {name: recorded[name] for name in ("notes", "documents") if name in recorded}
        return ProbeRecord.model_validate({"config": Config.from_dict(settings), **rest})
    except (ProbekitError, ValueError) as error:
        raise ProbekitError(
            f"{path} is no record of a probing ({_first(error)}); run `probekit probe {run}`"
        ) from None


def _first(error: Exception) -> str:
    """What is wrong, on one line; of several things the first."""
    if not isinstance(error, ValidationError):
        return one_line(error)
    found: dict[str, Any] = dict(error.errors(include_url=False)[0])
    return f"{'.'.join(map(str, found['loc']))} is {found['input']!r}: {found['msg']}"
