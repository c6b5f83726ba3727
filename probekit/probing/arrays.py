"""Activations in, probes out: the grid of `probekit probe` on arrays that the user holds.

    results = probekit.fit_grid(activations, labels, groups=authors)
    results.table, results.probes[12], results.save("truth.safetensors")

Solvers, scores, intervals and the table are those of a run. The control task is that of shuffled labels:
arrays do not say which tokens were read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit import distributed
from probekit.config import Config, Position, SolverName, user_path
from probekit.data.corpus import MORE_GROUPS, too_few
from probekit.distributed import compute_device
from probekit.errors import ProbekitError, one_line
from probekit.io import read_array, read_metadata, read_tensors, write_tensors
from probekit.probing.activations import Activations, Chunk, Done, HookPoint, Stack
from probekit.probing.baselines import prior_sums
from probekit.probing.fitting import FitJob, ProbingTask, fit, fit_sums, hold, score
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, MINIMUM_EXAMPLES, TESTED_ON, Grid, check_solvers
from probekit.probing.results import Cell, LinearProbe, cells_of, probes_of, table_of, validation_loss
from probekit.probing.targets import MOST_CLASSES, Examples, Target, are_numbers, nearly_two_classes, vary
from probekit.probing.texts import TextActivations
from probekit.probing.transfer import Values, enough_examples, transfer_table, transferred
from probekit.probing.vectors import PENALTIES
from probekit.progress import Progress
from probekit.statistics import Resampling

SPLITS = {FITTED_ON: 0.6, CHOSEN_ON: 0.2, TESTED_ON: 0.2}
"""The share of the examples in each split."""

CHUNK_EXAMPLES = 1024
"""Examples of an array that are handed on at once."""

CARD = (
    *("solver", "location", "layer", "position", "accuracy", "accuracy_low", "accuracy_high"),
    *("auroc", "auroc_low", "auroc_high", "r2", "r2_low", "r2_high", "cross_entropy", "bits", "bits_low"),
    *("bits_high", "control_accuracy", "control_r2", "examples", "documents"),
)
"""Columns of the table that a card of probes has, where its target has them."""

READ_OF_CARD = ("model", "position", "points", "classes")
"""What applying probes needs to know; the rest of a card is for people."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of activations that are kept as they are."""

MOST_SHOWN = 20
"""Most classes whose probabilities have a column each in a table of predictions."""

Arrays = TextActivations | np.ndarray | Tensor | str | Path
"""Activations `[examples, width]` or `[layers, examples, width]`, or a .npy or .safetensors file of such."""


class LinearProbes:
    """Linear probes, and a card that says what they read; `probes[layer]` is one of them.

    Attributes:
        card: `model`, `revision`, `position`, `points` (location and layer, in the order of the activations),
            `target`, `classes` (names), and a list of `scores` of each cell.
    """

    def __init__(self, probes: Mapping[Cell, LinearProbe], card: Mapping[str, Any]) -> None:
        self._probes, self.card = dict(probes), dict(card)

    @property
    def cells(self) -> list[Cell]:
        """Where each probe reads and how it was fitted; the best on validation examples comes first."""
        return list(self._probes)

    def __getitem__(self, at: int | Cell) -> LinearProbe:
        """The probe of a layer (the best one, if there are several), or of a cell."""
        found = [cell for cell in self._probes if at in (cell, cell.layer)]
        if not found:
            raise ProbekitError(
                f"no linear probe at {at}; there are {'; '.join(map(str, self.cells)) or 'none'}"
            )
        return self._probes[found[0]]

    def score(self, activations: Arrays, layer: int | Cell | None = None) -> pd.DataFrame:
        """What a probe predicts for new activations, a row for each example.

        Args:
            activations: What `probekit.activations` gave of the same model and position; or an array of one
                layer, or of all that the probes were fitted to, in the same order.
            layer: The layer or the cell; None: that of the probe that was best on validation examples.

        Raises:
            ProbekitError: There is no such layer, or the activations are not those that the probe reads.
        """
        values, points = arrays_of(activations)
        cells = [cell for cell in self.cells if layer is None or layer in (cell, cell.layer)]
        if not cells:
            raise ProbekitError(f"layer is {layer}; the probes are of {'; '.join(map(str, self.cells))}")
        if isinstance(activations, TextActivations):
            for name in ("model", "position"):
                given = getattr(activations, name)
                if self.card[name] not in (None, given):
                    raise ProbekitError(
                        f"activations: {name} is {given!r}, but the probes read {self.card[name]!r}; give "
                        "`.values` of one layer to apply a probe all the same"
                    )
        elif len(values) == 1:
            points = ((cells[0].location, cells[0].layer),)
        else:
            points = tuple((location, number) for location, number in self.card["points"])
            if len(points) != len(values):
                raise ProbekitError(
                    f"activations has {len(values)} layers, but the probes were fitted to "
                    f"{len(points)}; give as many, or one"
                )
        cell = next((cell for cell in cells if (cell.location, cell.layer) in points), None)
        if cell is None or (layer is None and cell != cells[0]):
            held = "; ".join(f"{location}, layer {number}" for location, number in points)
            raise ProbekitError(f"the probe reads {cells[0]}, but the activations are of {held}")
        own, probe = values[points.index((cell.location, cell.layer))], self[cell]
        if own.shape[1] != len(probe.coef):
            raise ProbekitError(
                f"activations have width {own.shape[1]}, but the probe reads {len(probe.coef)}"
            )
        return predictions(probe, own, self.card["classes"])

    def save(self, path: str | Path) -> None:
        """Writes the probes and their card into one safetensors file, which `probekit.load_probes` reads."""
        tensors = {
            f"{cell.key}|{part}": getattr(probe, part).contiguous()
            for cell, probe in self._probes.items()
            for part in ("coef", "intercept")
        }
        cells = [cell.key for cell in self._probes]
        write_tensors(user_path(path), tensors, {"card": json.dumps(self.card), "cells": json.dumps(cells)})


def load_probes(path: str | Path) -> LinearProbes:
    """Reads what `LinearProbes.save` wrote.

    Raises:
        ProbekitError: The file is no such file.
    """
    path = user_path(path)
    metadata, tensors = read_metadata(path), read_tensors(path)
    try:
        known = probes_of(tensors)
        probes = {cell: known[cell] for cell in map(Cell.of, json.loads(metadata["cells"]))}
        card = json.loads(metadata["card"])
        return LinearProbes(probes, {name: card[name] for name in READ_OF_CARD} | card)
    except (KeyError, ValueError, TypeError):
        raise ProbekitError(f"{path} has no card of probes; give a file that `results.save` wrote") from None


def predictions(probe: LinearProbe, activations: Tensor, classes: Sequence[str]) -> pd.DataFrame:
    """What a probe says of examples: a number, a vector, or the most probable class and its probability.

    Args:
        probe: The probe.
        activations: The examples [examples, width].
        classes: Names of the classes, of which each has a column too if they are few; none for numbers, and
            vectors, which have a column for each of their numbers.
    """
    if not classes:
        found = probe.scores(activations).numpy().astype(np.float64)
        of_vector = [f"predicted_{n}" for n in range(found.shape[1])]
        return pd.DataFrame(found, columns=of_vector if len(of_vector) > 1 else ["predicted"])
    p = probe.log_probabilities(activations).exp()
    best, names = p.argmax(-1).numpy(), np.array(classes)
    table = pd.DataFrame({"predicted": names[best], "probability": p.amax(-1).numpy().astype(np.float64)})
    if len(classes) <= MOST_SHOWN:
        table[[f"p({name})" for name in classes]] = p.numpy().astype(np.float64)
    return table


@dataclass(frozen=True)
class ArrayResults:
    """Results of `fit_grid`.

    Attributes:
        table: A row for the prior and each probe, with the columns of a run's `probes/results.parquet`.
        probes: The linear probes.
        notes: What to know of all rows together.
        transfer: What probes of each value of the argument `transfer` read of the others, with the columns
            of a run's `probes/transfer.parquet`; None without it.
    """

    table: pd.DataFrame
    probes: LinearProbes
    notes: list[str]
    transfer: pd.DataFrame | None = None

    def score(self, activations: Arrays, layer: int | Cell | None = None) -> pd.DataFrame:
        """What a probe predicts for new activations; see `LinearProbes.score`."""
        return self.probes.score(activations, layer)

    def save(self, path: str | Path) -> None:
        """Writes the linear probes and their card; see `LinearProbes.save`."""
        self.probes.save(path)


def fit_grid(
    activations: Arrays,
    labels: Any,
    *,
    groups: Any = None,
    split: Any = None,
    transfer: Any = None,
    solvers: SolverName | Sequence[SolverName] | None = None,
    seed: int = 0,
    control: bool = True,
    code_length: bool = False,
    kind: Literal["classes", "numbers"] | None = None,
    name: str = "label",
    device: str = "auto",
    resamples: int = 1000,
    quiet: bool = True,
    **settings: Any,
) -> ArrayResults:
    """Fits a probe to every layer of some activations, and measures it on examples of other groups.

    Args:
        activations: What `probekit.activations` gave, an array of NumPy or PyTorch `[examples, width]` or
            `[layers, examples, width]`, or a .npy or .safetensors file of one.
        labels: A label of each example: a class, or a number [examples], or a vector [examples, outputs].
        groups: What never crosses splits, and is resampled for intervals, such as the author of each example
            [examples]; None: every example with its copies, which have the same activations.
        split: `train`, `validation` or `test` for each example [examples]; None: 60, 20 and 20 percent of the
            examples, by groups drawn with the seed.
        transfer: A value of each example, such as its topic [examples]: probes are also fitted on each value
            alone, and tested on all.
        solvers: How probes are fitted, as in `probe.solvers`; None: `softmax`, or `ridge` for others.
        seed: Seed of the split, the shuffled labels and the MLP.
        control: Fit every probe to shuffled labels, too: in the table, `control_accuracy`, `control_r2` and
            `selectivity` are theirs, and not those of the control task of a run.
        code_length: Measure the code length of softmax probes.
        kind: Whether labels are `classes` or `numbers`; None: numbers if some have fractions or more than
            4,096 are different.
        name: What the labels are called in the table and the card.
        device: Where to fit: cpu, cuda, or auto.
        resamples: Bootstrap resamples of the groups.
        quiet: Show no progress.
        settings: Further settings of the section `probe`, such as `l2`, `l1` or `hidden`.

    Raises:
        ProbekitError: An argument does not fit the others, or something is missing in it.
    """
    config = Config().override({"seed": seed, "device": device, "evaluation.resamples": resamples})
    if not isinstance(name, str):
        raise ProbekitError(f"name is {name!r}; give what the labels are called")
    if kind not in (None, "classes", "numbers"):
        raise ProbekitError(f"kind is {kind!r}; it must be classes or numbers")
    values, points = arrays_of(activations)
    target, numbered = _target(labels, values.shape[1], name, kind)
    notes: list[str] = []
    if groups is None:
        groups, notes = _copies(values, split)
    splits, group_of = _splits(groups, split, values.shape[1], seed)
    position = activations.position if isinstance(activations, TextActivations) else "last"
    grid = _grid(target, numbered, position, splits, group_of)
    compared = None if transfer is None else _values(grid, transfer, values.shape[1])
    options = {"control": control, "code_length": code_length, **settings}
    options["solvers"] = solvers or ("softmax" if target.kind == "classes" else "ridge")
    if target.kind == "vectors":
        options.setdefault("l2", PENALTIES)
    if isinstance(options["solvers"], str):
        options["solvers"] = [options["solvers"]]
    config = config.override({f"probe.{option}": value for option, value in options.items()})
    check_solvers(target, config.probe)
    progress = Progress(quiet=quiet)
    read = {position: int(np.median(getattr(activations, "tokens_read", 0)))}
    on, generator = compute_device(device), np.random.default_rng(seed)
    shuffled = ProbingTask.control(
        {name: generator.permutation(grid.labels(name, 1)) for name in splits}, target
    )
    with tempfile.TemporaryDirectory() as folder:
        job = FitJob(
            grid, config.probe, shuffled if control else None, seed, on, progress, name, Path(folder), read
        )
        source = ArraySource(values, points, on)
        resampling = Resampling(resamples=resamples, seed=seed)
        if target.kind != "classes":
            fitted = fit_sums(source, job, config.probe.solvers)
        else:
            fitted = fit(hold(source, job, [FITTED_ON, CHOSEN_ON]), job, config.probe.solvers)
        scored = [*prior_sums(grid), *score(source, job, fitted)]
        matrix = None
        if compared is not None:
            moved = transferred(hold(source, job, [*SPLITS]), job, compared)
            matrix = transfer_table(moved, grid, compared, resampling)
    table = table_of(scored, grid.tested(), [], resampling).assign(target=name)
    weights: dict[str, Tensor] = {}
    for batch in fitted:
        weights |= batch.weights(source.stacks, grid)
    rows = table[table.reader == "probe"]
    rows = rows.iloc[np.argsort(validation_loss(rows), kind="stable")]
    known = probes_of(weights)
    probes = {cell: known[cell] for cell in cells_of(rows) if cell in known}
    card = _card(activations, points, target, rows, seed)
    more = () if compared is None else compared.notes
    return ArrayResults(table, LinearProbes(probes, card), [*notes, *grid.notes, *more], matrix)


class ArraySource(Activations):
    """Activations in memory; an example's `start` is its row.

    Args:
        values: The activations [points, examples, width].
        points: Location and layer of each.
        device: Where they are wanted.
    """

    def __init__(self, values: Tensor, points: Sequence[HookPoint], device: torch.device) -> None:
        self.stacks, self.dtype = [Stack(values.shape[2], tuple(points))], values.dtype
        self._values, self._device = values, device

    def chunks(self, examples: Examples, done: Done = lambda read: None) -> Iterator[Chunk]:
        """See `Activations.chunks`."""
        for start in distributed.share(range(0, len(examples), CHUNK_EXAMPLES)):
            rows = slice(start, min(start + CHUNK_EXAMPLES, len(examples)))
            chunk = self._values[:, torch.from_numpy(examples.start[rows])]
            yield rows, [chunk[:, None].to(self._device)]
            done(rows.stop - rows.start)


def arrays_of(activations: Arrays) -> tuple[Tensor, tuple[HookPoint, ...]]:
    """The activations [points, examples, width], and location and layer of each point.

    Raises:
        ProbekitError: They are not of that shape, not all finite, or the file holds no such array.
    """
    values: Any = activations.values if isinstance(activations, TextActivations) else activations
    if isinstance(activations, str | Path):
        path = user_path(activations)
        if path.suffix not in (".npy", ".safetensors"):
            raise ProbekitError(f"activations is {str(path)!r}; it must end in .npy or .safetensors")
        if path.suffix == ".npy":
            values = np.array(read_array(path))
        else:
            tensors = read_tensors(path)
            if len(tensors) != 1:
                raise ProbekitError(
                    f"{path} holds {len(tensors)} tensors ({', '.join(tensors)}); it must be one"
                )
            (values,) = tensors.values()
    values = _numbers(values)
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or not values.numel():
        raise ProbekitError(
            f"activations {list(values.shape)} must be [examples, width] or [layers, examples, width], none 0"
        )
    for layer, value in enumerate(values):
        if not value.isfinite().all():
            example = int((~value.isfinite()).any(1).nonzero()[0])
            raise ProbekitError(
                f"activations: example {example} of layer {layer} is not finite; leave it out"
            )
    if isinstance(activations, TextActivations):
        return values, activations.points
    return values, tuple(("activations", layer) for layer in range(len(values)))


def _numbers(values: Any) -> Tensor:
    """An array as a tensor on the CPU, in float32 if its numbers are no usual floats."""
    try:
        found = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
        if found.is_complex():
            raise TypeError("they are complex")
        return found.to_dense() if found.dtype in FLOATS else found.to_dense().float()
    except (TypeError, ValueError, RuntimeError) as error:  # words, rows of different lengths, no storage
        raise ProbekitError(
            f"activations is a {type(values).__name__} that makes no array of numbers ({one_line(error)})"
        ) from None


def _copies(values: Tensor, split: Any) -> tuple[np.ndarray, list[str]]:
    """Groups of examples whose activations are equal at all points `[examples]`, and what to note of them."""
    raw = values.contiguous().view(torch.uint8).numpy()
    examples = values.shape[1]
    keys = pd.Series([blake2b(raw[:, row].tobytes()).digest() for row in range(examples)])
    group = pd.factorize(keys)[0]
    if not (copies := examples - len(np.unique(group))):
        return group, []
    note = f"{copies:,} of {examples:,} examples have the same activations as another, and are of its group"
    if split is not None:  # groups may not cross the splits that are given
        apart = pd.factorize(pd.Series(list(zip(group, column_of(split, "split", examples), strict=True))))[0]
        if crossing := len(np.unique(apart)) - len(np.unique(group)):
            note += f" within a split; {crossing:,} have such a copy in another split"
        group = apart
    elif examples - copies < len(SPLITS):
        raise ProbekitError(
            f"activations: only {examples - copies} of {examples:,} examples differ; give at least "
            f"{len(SPLITS)}, or the split"
        )
    return group, [note]


def column_of(values: Any, name: str, examples: int) -> pd.Series:
    """Labels, groups or splits as a column without gaps."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise ProbekitError(f"{name} is {values!r}; give a list or an array with a value for each example")
    try:
        column = pd.Series(values.tolist() if isinstance(values, Tensor | np.ndarray) else list(values))
    except UnicodeEncodeError:
        raise ProbekitError(f"{name} holds half a surrogate pair; correct it") from None
    if not column.map(lambda value: isinstance(value, Hashable)).all():
        raise ProbekitError(f"{name} holds lists or objects; give words or numbers")
    if len(column) != examples:
        raise ProbekitError(
            f"{name} has {len(column):,} values, but activations {examples:,} examples: they must be as many"
        )
    if column.isna().any():
        first = int(column.isna().to_numpy().argmax())
        raise ProbekitError(
            f"{name}: {column.isna().sum():,} of {examples:,} are missing, the first is number {first}; "
            "leave these examples out"
        )
    return column


def _target(
    labels: Any, examples: int, name: str, kind: Literal["classes", "numbers"] | None
) -> tuple[Target, np.ndarray]:
    """The target, and the class or number (see `are_numbers`) or row of a vector of every example."""
    if getattr(labels, "ndim", 1) == 2:
        return _vector_target(labels, examples, name, kind)
    column = column_of(labels, "labels", examples)
    if pd.api.types.is_complex_dtype(column):
        raise ProbekitError("labels holds complex numbers; give words or numbers")
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    if kind == "numbers" or (kind is None and numeric and are_numbers(column.to_numpy())):
        if not pd.api.types.is_numeric_dtype(column):
            raise ProbekitError("labels holds words, but kind is numbers; give numbers, or kind classes")
        values = column.to_numpy(np.float64)
        if not vary(values):
            raise ProbekitError("labels: numbers must be finite, not all the same, and not of extreme size")
        return Target(name, 0, lambda start, *_: values[start], kind="numbers"), values
    if pd.api.types.is_float_dtype(column) and not (column % 1 != 0).any():
        column = column.astype("int64")
    try:
        codes, classes = pd.factorize(column, sort=True)
    except TypeError:
        raise ProbekitError("labels holds lists or objects; give words or numbers") from None
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise ProbekitError(f"labels has {len(classes):,} classes; it must have 2 to {MOST_CLASSES:,}")
    codes = codes.astype(np.int64)
    names = tuple(map(str, classes))
    return Target(name, len(classes), lambda start, *_: codes[start], names=names), codes


def _vector_target(labels: Any, examples: int, name: str, kind: str | None) -> tuple[Target, np.ndarray]:
    """The target of vectors `[examples, outputs]`."""
    vectors, rows = _numbers(labels).double().numpy(), np.arange(examples)
    if kind is not None or len(vectors) != examples or not vectors.shape[1] or not vary(vectors):
        raise ProbekitError(
            f"labels {list(vectors.shape)} must be [examples, outputs], of {examples:,} examples, without a "
            "kind; finite, not all the same, and not of extreme size"
        )
    return Target(name, 0, lambda start, *_: rows[start], kind="vectors", vectors=vectors), rows


def _splits(groups: Any, split: Any, examples: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of every split, those of a group together, and the group of each example."""
    group, names = pd.factorize(column_of(groups, "groups", examples))
    taken = np.random.default_rng(seed).permutation(len(names))  # groups in the order in which they are taken
    if split is None:
        if len(names) < len(SPLITS):
            raise ProbekitError(
                f"groups has {len(names)} groups, but {', '.join(SPLITS)} need one each; give more of them"
            )
        size, left, of_group = np.bincount(group) / examples, dict(SPLITS), np.empty(len(names), dtype=object)
        for number, own in enumerate(taken):
            # The first groups fill no split twice; then each goes where most is missing.
            name = [*SPLITS][number] if number < len(SPLITS) else max(left, key=left.__getitem__)
            left[name] -= size[own]
            of_group[own] = name
        split_of = of_group[group]
    else:
        split_of = column_of(split, "split", examples).replace({"train": FITTED_ON}).to_numpy()
        for row, name in enumerate(split_of):
            if name not in SPLITS:
                raise ProbekitError(f"split has {name!r} at {row}; it must be train, validation or test")
        crossing = pd.Series(split_of).groupby(group).nunique().to_numpy() > 1
        if crossing.any():
            raise ProbekitError(f"groups: {names[int(crossing.argmax())]} is in more than one split")
    order = np.argsort(np.argsort(taken)[group], kind="stable")
    rows = {name: order[split_of[order] == name] for name in SPLITS}
    if empty := [name for name, part in rows.items() if not len(part)]:
        raise ProbekitError(f"split has no {'train' if empty[0] == FITTED_ON else empty[0]} examples")
    return rows, group


def _grid(
    target: Target,
    values: np.ndarray,
    position: Position,
    splits: Mapping[str, np.ndarray],
    group: np.ndarray,
) -> Grid:
    """The grid of one position, whose examples say which row of the arrays they are."""
    notes = [
        f"the split {name} has {len(rows):,} examples, fewer than {MINIMUM_EXAMPLES}: intervals are wide"
        for name, rows in splits.items()
        if len(rows) < MINIMUM_EXAMPLES
    ]
    labels = {name: values[rows] for name, rows in splits.items()}
    known = np.unique(labels[FITTED_ON])
    if len(known) < 2:
        raise ProbekitError("labels: all examples to fit on have the same; split them otherwise")
    if few := too_few(len(np.unique(group[splits[TESTED_ON]])), MORE_GROUPS, "groups of test examples"):
        notes.append(few)
    counts = np.bincount(values, minlength=target.classes) if target.kind == "classes" else np.zeros(0)
    if slips := nearly_two_classes(target.name, target.names, counts):
        notes.append(slips)
    if target.kind == "classes" and len(unseen := np.setdiff1d(labels[TESTED_ON], known)):
        named = target.name_of(unseen[0])
        notes.append(f"{len(unseen)} classes of test examples, such as {named}, are in none to fit on")
    examples = {
        name: Examples(group[rows], rows, rows + 1, rows, group[rows], labels[name][:, None])
        for name, rows in splits.items()
    }
    return Grid(target, (position,), (1,), examples, {}, tuple(notes))


def _values(grid: Grid, transfer: Any, examples: int) -> Values:
    """The values between which probes are transferred; the examples of the grid say which row they are."""
    code, names = pd.factorize(column_of(transfer, "transfer", examples).astype(str), sort=True)
    codes = {split: code[part.start] for split, part in grid.examples.items()}
    return enough_examples(grid, "transfer", tuple(names), codes)


def _card(
    activations: Arrays, points: Sequence[HookPoint], target: Target, rows: pd.DataFrame, seed: int
) -> dict[str, Any]:
    """What probes read, and how well."""
    texts = activations if isinstance(activations, TextActivations) else None
    scored = [name for name in CARD if name in rows]
    return {
        "model": None if texts is None else texts.model,
        "revision": None if texts is None else texts.revision,
        "position": None if texts is None else texts.position,
        "points": [[location, int(layer)] for location, layer in points],
        "target": target.name,
        "classes": list(target.names),
        "seed": seed,
        "version": version("probekit-lm"),
        "scores": json.loads(rows[scored].to_json(orient="records")),
    }
