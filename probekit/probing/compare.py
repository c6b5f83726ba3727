"""`probekit compare`: what two LMs make of the same texts, or an LM and its compressed self.

Each LM is a run of its own, with the corpus in its own tokens. Both are read at the last token of the same
sentences, words or labelled ranges: where the texts that they have read end at the same character. Layers are
compared pair by pair (`similarity`). A probe that was fitted to the first LM reads the second at the same
depth: frozen, on activations that Procrustes maps onto the first LM's, and refitted. What a refitted probe
lacks is lost; what a frozen one lacks beyond that has moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit import distributed
from probekit.config import Config, Position, user_path
from probekit.data.corpus import Corpus
from probekit.data.sentences import token_spans
from probekit.errors import ProbekitError
from probekit.io import write_json, write_table
from probekit.models.locations import at_layers
from probekit.models.pretrained import dtype_name
from probekit.probing.activations import ActivationReader, HookPoint, Placement, probing_windows
from probekit.probing.arrays import ArraySource
from probekit.probing.fitting import FitJob, fit, hold, score
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, LENSES, MINIMUM_EXAMPLES, TESTED_ON, Grid, make_grid
from probekit.probing.labels import beyond_window, target_of
from probekit.probing.probe import with_defaults
from probekit.probing.results import DocumentSums
from probekit.probing.similarity import compare_layers, rotation_onto
from probekit.probing.targets import Examples, find_examples, sentence_target
from probekit.probing.transfer import paired_table
from probekit.progress import Progress
from probekit.run.folder import Existing, provenance
from probekit.run.run import Run

POSITION = "last"
"""Where examples are read."""

MOST_EXAMPLES = 1000
"""Layers are compared on at most so many examples, at even distances: time grows with their square."""

READINGS = ("first", "frozen", "mapped", "refitted")
"""A probe of the first LM on the first, on the second as it is, and as Procrustes maps it onto the first; and
a probe of the second LM on the second."""

DRIFTED = ("frozen", "mapped")
"""Those of them whose difference from `refitted` is what has moved."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        similarity: A row for each pair of layers, `same_depth` if they are at the same share of their LMs'
            depth; see `similarity.compare_layers`.
        probes: A row for each reading, layer and solver: `reading` (of `READINGS`), `layer`, `second_layer`,
            the metrics of a run's probes, and `over_first_lm` and `over_refitted`, the accuracy, else R2,
            less that of these readings, paired differences; None if there are no labels.
        folder: Where they were written, with a run of each LM.
        names: What the LMs are called.
        notes: Lines to show the user.
    """

    similarity: pd.DataFrame
    probes: pd.DataFrame | None
    folder: Path
    names: tuple[str, str]
    notes: list[str]


def compare(
    config: Config,
    second: Mapping[str, Any],
    out: str | Path = "runs/compared",
    *,
    existing: Existing = "resume",
    permutations: int = 40,
    quiet: bool = False,
) -> Comparison:
    """Compares two LMs on the same texts.

    Args:
        config: Settings of the first LM's run, and of the comparison: the corpus, `lm.name`, `probe.layers`,
            one of `probe.locations`, `probe.solvers`, and `probe.target` and `probe.labels`. The target
            `action` without actions (`actions.labels: none`) means none: sentences, or all tokens with
            `probe.anchors: token`, are compared without probes.
        second: Settings that the second LM has instead, such as `lm.name` or `lm.compress`. With a name,
            it does not have the first's `lm.revision` and `lm.compress`, but those given here.
        out: A folder for both runs and the results.
        existing: What to do with runs that are there, as for `probekit.prepare`.
        permutations: How often documents are permuted for the null.
        quiet: Show no progress.

    Raises:
        ProbekitError: Both LMs are the same, they share too few examples, or as `probekit.probe` raises.
    """
    from probekit.training.train import prepare

    distributed.check_alone("compare")
    if "lm.name" in second:
        second = {"lm.revision": None, "lm.compress": None} | {**second}
    _check(config, config.override(second))
    config = config.override({"probe.positions": [POSITION]})
    configs = config, config.override(second)
    folder, progress = user_path(out), Progress(quiet=quiet)
    runs = [
        prepare(own, folder / name, existing=existing, quiet=quiet)
        for own, name in zip(configs, ("first", "second"), strict=True)
    ]
    first_lm, second_lm = runs
    layers = config.probe.layers
    others: Sequence[int] | None = second_lm.config.probe.layers
    if layers is not None and others == layers:  # those of the first LM
        others = _as_deep(layers, first_lm, second_lm)
    points = [_hook_points(first_lm, layers), _hook_points(second_lm, others)]
    grid, examples, notes = _shared_examples(runs)
    names = _names(*configs)
    values = [
        _read(run, own, [*part.values()], name, progress)
        for run, own, part, name in zip(runs, points, examples, names, strict=True)
    ]
    group = np.concatenate([part.group for part in examples[0].values()])
    rows = _spread(len(group))
    first, other = (own[:, torch.from_numpy(rows)] for own in values)
    notes += [*_unvarying(names[0], points[0], first), *_unvarying(names[1], points[1], other)]
    if (dtypes := [dtype_name(run.dtype) for run in runs])[0] != dtypes[1]:
        notes.append(
            f"{names[0]} is held in {dtypes[0]}, {names[1]} in {dtypes[1]}: part of what differs is "
            "rounding; --lm.dtype holds both in one"
        )
    similarity = compare_layers(
        first, other, group[rows], permutations=permutations, seed=config.seed, progress=progress
    )
    pairs = same_depth(*map(_depths, runs, points))
    similarity["same_depth"] = pairs[similarity.layer] == similarity.second_layer
    for name, own in zip(("layer", "second_layer"), points, strict=True):
        similarity[name] = [own[number][1] for number in similarity[name]]
    probes = None
    if grid is not None:
        probes, more = _probes(runs, points, pairs, values, grid, progress)
        notes += more
    settings = {
        "first": names[0],
        "second": names[1],
        "examples": len(rows),
        "permutations": permutations,
        "seed": config.seed,
        "provenance": provenance(config),
        "notes": notes,
    }
    write_table(folder / "similarity.parquet", similarity)
    if probes is not None:
        write_table(folder / "probes.parquet", probes)
    else:  # those of an earlier call with labels are of other settings
        (folder / "probes.parquet").unlink(missing_ok=True)
    write_json(folder / "settings.json", settings)
    return Comparison(similarity, probes, folder, names, notes)


def _check(first: Config, second: Config) -> None:
    """Refuses what cannot be compared, before any LM is loaded."""
    if first.lm == second.lm:
        raise ProbekitError(
            f"both LMs are {first.lm.name}; give another one, or --compress int8, prune=0.5 or rank=64"
        )
    if len(first.probe.locations) > 1:
        raise ProbekitError(
            f"probe.locations is {', '.join(first.probe.locations)}; give one, whose layers are compared"
        )
    if first.probe.positions not in (None, (POSITION,)):
        given = ", ".join(map(str, first.probe.positions))
        raise ProbekitError(
            f"probe.positions is {given}; LMs are compared at {POSITION}, where the text that they have read "
            "ends at the same character"
        )
    if lenses := LENSES.intersection(first.probe.solvers):
        raise ProbekitError(f"probe.solvers has {min(lenses)}, which is an LM's own head; give others")


def _hook_points(run: Run, layers: Sequence[int] | None) -> list[HookPoint]:
    locations = run.config.probe.locations
    run.frozen_lm().architecture.check(locations[0], "probe.locations")
    return at_layers(locations, layers, run.frozen_lm().layers, "probe.layers")


def _as_deep(layers: Iterable[int], first: Run, second: Run) -> list[int]:
    """The layers of the second LM at the same share of its depth as some of the first's; each once."""
    last, other_last = (run.frozen_lm().layers - 1 for run in (first, second))
    return sorted({round(layer * other_last / max(1, last)) for layer in layers})


def _names(first: Config, second: Config) -> tuple[str, str]:
    """What two LMs are called: the names of their folders, whole if they are equal, and how they are held."""
    paths = [Path(str(config.lm.name)) for config in (first, second)]
    whole = paths[0] != paths[1] and paths[0].name == paths[1].name
    held = [
        (config.lm.revision, config.lm.dtype.replace("auto", ""), config.lm.compress)
        for config in (first, second)
    ]
    one, two = (
        " ".join(filter(None, (str(path) if whole else path.name, *how)))
        for path, how in zip(paths, held, strict=True)
    )
    return one, two


# Examples


def _shared_examples(runs: Sequence[Run]) -> tuple[Grid | None, list[dict[str, Examples]], list[str]]:
    """The examples that both LMs read, by split for each run; their grid if there are labels; notes.

    Raises:
        ProbekitError: There are too few.
    """
    grid, notes = None, list[str]()
    first, second = (run.corpus.texts for run in runs)
    if runs[0].corpus.facts["chats"] and any(first[n].text != second[n].text for n in range(len(first))):
        raise ProbekitError(
            "the texts are chats, which the LMs' chat templates write out in different ways; give plain texts"
        )
    if runs[0].config.probe.target == "action" and not runs[0].corpus.has_actions:
        every = [{"all": _sentences(run)} for run in runs]
    else:
        targets = [target_of(run.corpus, run.config) for run in runs]
        settings = with_defaults(runs[0], targets[0]).config
        grids = [
            make_grid(run.corpus, settings.probe, target, settings.seed)
            for run, target in zip(runs, targets, strict=True)
        ]
        every, grid = [{**own.examples} for own in grids], grids[0]
        beyond = beyond_window(runs[0].corpus, targets[0], probing_windows(runs[0])[0])
        notes = [*targets[0].notes, *grid.notes, *([beyond] if beyond else [])]
    examples: list[dict[str, Examples]] = [{}, {}]
    for split in every[0]:
        ends = [_ends(run.corpus, own[split]) for run, own in zip(runs, every, strict=True)]
        both = ends[0].reset_index().merge(ends[1].reset_index(), on=[*ends[0]], sort=False)
        rows = _spread(len(both)) if grid is None else np.arange(len(both))
        for own, part, column in zip(examples, every, ("index_x", "index_y"), strict=True):
            own[split] = part[split][both[column].to_numpy()[rows]]
        if len(both) < min(MINIMUM_EXAMPLES, len(ends[0])):
            raise ProbekitError(
                f"of {len(ends[0]):,} examples ({split}) {len(both):,} end at the same character in both "
                f"LMs, fewer than {MINIMUM_EXAMPLES}; give more texts, or LMs with more similar tokenizers"
            )
        if len(both) < len(ends[0]):
            notes.append(
                f"{split}: {len(ends[0]) - len(both):,} of {len(ends[0]):,} examples end within a token of "
                "the other LM, and are left out"
            )
    if grid is not None:
        grid = replace(grid, examples=examples[0])
    return grid, examples, notes


def _spread(examples: int) -> np.ndarray:
    """The rows of `MOST_EXAMPLES`, or of all if they are fewer, at even distances."""
    return np.unique(np.linspace(0, examples - 1, min(examples, MOST_EXAMPLES)).round().astype(np.int64))


def _sentences(run: Run) -> Examples:
    """All sentences, or all of their tokens."""
    corpus = run.corpus
    none = sentence_target(corpus, "sentence", 1, np.zeros(len(corpus.first_token), np.int64))
    return find_examples(corpus, np.arange(len(corpus.split)), none, (1,), run.config.probe.anchors)


def _ends(corpus: Corpus, examples: Examples) -> pd.DataFrame:
    """Where the text that is read up to an example's last token ends.

    Returns:
        `document`, `end`, the number of characters up to the last visible one, and `number`, which tells
        examples of one end apart `[examples]`.
    """
    last = examples.last_read(POSITION) - corpus.document_tokens[examples.document] - 1
    end = np.empty(len(examples), np.int64)
    for document in np.unique(examples.document):
        rows, own = examples.document == document, corpus.texts[int(document)]
        visible = np.flatnonzero([not character.isspace() for character in own.text])
        ends = token_spans(corpus.folder, own, corpus.separator)[last[rows], 1]
        end[rows] = np.append(-1, visible)[np.searchsorted(visible, ends)] + 1
    found = pd.DataFrame({"document": examples.document, "end": end})
    return found.assign(number=found.groupby(["document", "end"]).cumcount())


def _read(
    run: Run, points: Sequence[HookPoint], parts: Sequence[Examples], name: str, progress: Progress
) -> Tensor:
    """The activations of all examples `[layers, examples, width]`, on the CPU; the LM is let go then."""
    reader = ActivationReader(run, "none", points, (POSITION,))
    held: list[Tensor] = []
    total = sum(reader.size(part) for part in parts)
    with progress.task(f"read {name}", total=total, unit="tokens") as task:
        for part in parts:
            held += [values[:, 0].cpu() for _, (values,) in reader.chunks(part, task.advance)]
    run.frozen_lm().let_go()
    return torch.cat(held, dim=1)


def _unvarying(name: str, points: Sequence[HookPoint], values: Tensor) -> list[str]:
    """A note on the layers of an LM `[layers, examples, width]` that do not vary, if there are any."""
    same = (values == values[:, :1]).all(2).all(1)
    layers = ", ".join(str(layer) for (_, layer), constant in zip(points, same, strict=True) if constant)
    return [f"{name}: all examples are the same at layer {layers}: nothing is said of it"] if layers else []


# Probes


def _probes(
    runs: Sequence[Run],
    points: Sequence[Sequence[HookPoint]],
    pairs: np.ndarray,
    values: Sequence[Tensor],
    grid: Grid,
    progress: Progress,
) -> tuple[pd.DataFrame, list[str]]:
    """The table of all readings, and notes."""
    run = with_defaults(runs[0], grid.target)
    config, device = run.config, run.device
    tested = Placement.of(run.corpus, grid.examples[TESTED_ON], (POSITION,), *probing_windows(run))
    grid, rows = _rows_of_arrays(grid)
    arrays, notes = _readings(values[0], values[1][torch.from_numpy(pairs)], rows[FITTED_ON])
    sources = {name: ArraySource(array, points[0], device) for name, array in arrays.items()}
    plain = config.probe.model_copy(update={"control": False, "code_length": False})
    read: dict[Position, int] = {POSITION: int(np.median(tested.tokens_read))}
    job = FitJob(grid, plain, None, config.seed, device, progress, "probes", run.folder, read)
    fitted, refitted = (
        fit(hold(sources[name], job, [FITTED_ON, CHOSEN_ON]), job, config.probe.solvers)
        for name in ("first", "refitted")
    )
    scored: dict[str, list[DocumentSums]] = {
        name: score(source, job, refitted if name == "refitted" else fitted)
        for name, source in sources.items()
    }
    resampling = config.resampling
    tables = []
    for name, own in scored.items():
        rows_of = _renamed(paired_table(own, scored["first"], grid, resampling), "over_first_lm")
        if name in DRIFTED:
            beside = _renamed(paired_table(own, scored["refitted"], grid, resampling), "over_refitted")
            rows_of = rows_of.join(beside.filter(regex="^over_refitted"))
        tables.append(rows_of.assign(reading=name))
    table = pd.concat(tables, ignore_index=True)
    second_layer = {layer: points[1][number][1] for (_, layer), number in zip(points[0], pairs, strict=True)}
    table = table.assign(second_layer=table.layer.map(second_layer), target=grid.target.name)
    table = table.drop(columns=["variant", "injected"])
    begin = ["reading", "layer", "second_layer"]
    return table[begin + [name for name in table if name not in begin and table[name].notna().any()]], notes


def _renamed(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """A paired table whose difference has this name."""
    return table.rename(columns=lambda column: column.replace("over_own", name))


def _readings(first: Tensor, second: Tensor, fitted_on: np.ndarray) -> tuple[dict[str, Tensor], list[str]]:
    """What probes read `[layers, examples, width]`, by reading, and notes.

    Args:
        first: Activations of the first LM.
        second: Those of the second LM at the same depths.
        fitted_on: The examples that maps are fitted to.
    """
    mapped = torch.stack(
        [
            (own.double() @ matrix + shift).float()
            for target, own in zip(first, second, strict=True)
            for matrix, shift in [rotation_onto(own[fitted_on], target[fitted_on])]
        ]
    )
    arrays = {"first": first, "frozen": second, "mapped": mapped, "refitted": second}
    if first.shape[2] == second.shape[2]:
        return arrays, []
    del arrays["frozen"]
    note = f"no frozen probe: one of {first.shape[2]} features cannot read the other LM's {second.shape[2]}"
    return arrays, [note]


def _rows_of_arrays(grid: Grid) -> tuple[Grid, dict[str, np.ndarray]]:
    """The grid with examples that are rows of arrays, and these rows by split."""
    ends = np.cumsum([0, *map(len, grid.examples.values())])
    rows = {name: np.arange(*bounds) for name, bounds in zip(grid.examples, pairwise(ends), strict=True)}
    examples = {
        name: replace(own, start=rows[name], stop=rows[name] + 1, second=None)
        for name, own in grid.examples.items()
    }
    return replace(grid, examples=examples), rows


def _depths(run: Run, points: Sequence[HookPoint]) -> np.ndarray:
    """How deep in its LM each layer is, from 0 to 1 `[layers]`."""
    return np.array([layer for _, layer in points]) / max(1, run.frozen_lm().layers - 1)


def same_depth(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """For each layer of one LM the number of the other's that is nearest in depth `[layers of the first]`."""
    return np.abs(first[:, None] - second).argmin(1)
