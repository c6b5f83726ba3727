"""Transfer: probes fitted on one value of a column of the labels, such as a topic, tested on every other.

A probe of the concept reads it whatever the topic is; one of what goes with it in one topic does not. Every
value has a probe of its own, fitted on its examples of the split "probe" and chosen on those of "validation";
a further one has the examples of all. Each is tested on the test examples of every value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from probekit.config import Config
from probekit.data.corpus import Corpus
from probekit.errors import ProbekitError
from probekit.probing.baselines import prior_sums
from probekit.probing.fitting import FitJob, fit, score
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, MINIMUM_EXAMPLES, TESTED_ON, Grid
from probekit.probing.labels import target_of
from probekit.probing.memory import HeldActivations, HeldSubset
from probekit.probing.results import DocumentSums, table_of
from probekit.probing.targets import NO_LABEL, Examples, find_examples
from probekit.progress import Progress
from probekit.statistics import Resampling

TRANSFER = "transfer.parquet"
"""The file in the folder of probes."""

ALL = "all values"
"""What the probe fitted on the examples of all values is called."""

MOST_VALUES = 20
"""So many values are compared, those with most examples to fit on."""

LEFT_OUT = ("reader", "gain", "gain_over", "control_accuracy", "control_r2")
"""Columns of the table of probes that this one does not have, with their intervals."""

Scored = dict[tuple[str, str], list[DocumentSums]]
"""Scores of probes by the value that they were fitted on and that of the test examples."""


@dataclass(frozen=True)
class Values:
    """The values of a column that are compared.

    Attributes:
        column: The column.
        names: The values.
        of: By split the number of each example's value, `NO_LABEL` where it has none of these `[examples]`.
        notes: Lines to show the user.
    """

    column: str
    names: tuple[str, ...]
    of: Mapping[str, np.ndarray]
    notes: tuple[str, ...] = ()

    def rows(self, value: str, split: str) -> np.ndarray:
        """The examples of a split that have a value, or of `ALL`."""
        number = None if value == ALL else self.names.index(value)
        return np.arange(len(self.of[split])) if number is None else np.flatnonzero(self.of[split] == number)


def find_values(corpus: Corpus, grid: Grid, config: Config) -> Values:
    """The values of the column `probe.transfer` that have enough examples in every split.

    Raises:
        ProbekitError: The table of labels has no such column, or fewer than two of its values have enough.
    """
    name = config.probe.transfer
    column = target_of(corpus, config.override({"probe.target": name, "probe.kind": "classes"}))
    codes = {}

    def bounds(of: Examples) -> pd.MultiIndex:
        return pd.MultiIndex.from_arrays([of.start, of.stop, *(() if of.second is None else of.second.T)])

    for split, examples in grid.examples.items():
        documents = np.unique(examples.document)
        found = find_examples(corpus, documents, column, (1,), config.probe.anchors)
        known = pd.Series(found.labels[:, 0], bounds(found))
        known = known[~known.index.duplicated()]
        of_examples = known.reindex(bounds(examples), fill_value=NO_LABEL)
        codes[split] = of_examples.to_numpy(np.int64)
    return enough_examples(grid, str(name), tuple(map(column.name_of, range(column.classes))), codes)


def enough_examples(
    grid: Grid, column: str, names: tuple[str, ...], codes: Mapping[str, np.ndarray]
) -> Values:
    """The values that have enough examples in every split, of two labels at least.

    Args:
        grid: The examples.
        column: What the values are called.
        names: All values.
        codes: By split the number of each example's value `[examples]`.

    Raises:
        ProbekitError: Fewer than two have.
    """
    every = np.arange(len(names))
    counts = {split: (code[:, None] == every).sum(0) for split, code in codes.items()}
    labels = grid.examples[FITTED_ON].labels[:, 0]
    differ = [len(np.unique(labels[codes[FITTED_ON] == value])) > 1 for value in every]
    enough = np.min([*counts.values()], axis=0) >= MINIMUM_EXAMPLES
    by_size = np.argsort(-counts[FITTED_ON], kind="stable")
    kept = np.sort(by_size[(enough & differ)[by_size]][:MOST_VALUES])
    if len(kept) < 2:
        raise ProbekitError(
            f"transfer over {column!r} needs two values with {MINIMUM_EXAMPLES} examples, of two labels, in "
            f"each of the splits {', '.join(codes)}, and {len(kept)} of {len(names):,} have them; label "
            "more, and keep no value in one split (corpus.group_column, groups)"
        )
    notes: tuple[str, ...] = ()
    if left := [names[value] for value in every if value not in kept]:
        shown = ", ".join(left[:5]) + (", …" if len(left) > 5 else "")
        notes = (
            f"transfer over {column!r} compares {len(kept)} of {len(names):,} values, at most {MOST_VALUES}, "
            f"that have {MINIMUM_EXAMPLES} examples in every split and two labels; left out: {shown}",
        )
    number = np.full(len(names) + 1, NO_LABEL)  # the last one is that of no value
    number[kept] = np.arange(len(kept))
    of = {split: number[code] for split, code in codes.items()}
    return Values(column, tuple(names[value] for value in kept), of, notes)


def transferred(held: HeldActivations, job: FitJob, values: Values) -> Scored:
    """Fits probes of every value and of all, and scores each on the test examples of every value.

    Args:
        held: Activations of all splits.
        job: What is fitted; the control task and code lengths are left out.
        values: The values.
    """
    plain = job.settings.model_copy(update={"code_length": False})
    quiet = replace(job, control=None, settings=plain, progress=Progress(quiet=True))
    scored: Scored = {}
    every, progress = (*values.names, ALL), job.progress
    with progress.task(f"{job.name}: transfer over {values.column}", total=len(every), unit="values") as task:
        for fitted_on in task.track(every):
            fitted = None
            for tested_on in values.names:
                part = HeldSubset(held, job.grid.examples, _rows(values, fitted_on, tested_on))
                of_part = replace(quiet, grid=replace(job.grid, examples=part.examples))
                fitted = fitted or fit(part, of_part, job.settings.solvers)
                scored[fitted_on, tested_on] = score(part, of_part, fitted)
    return scored


def transfer_table(scored: Scored, grid: Grid, values: Values, resampling: Resampling) -> pd.DataFrame:
    """Makes the table of transfer.

    Args:
        scored: The scores of all probes.
        grid: All examples.
        values: The values.
        resampling: How groups of test examples are resampled.

    Returns:
        A row for each probe and value that it was tested on: `by` (the column), `fitted_on` and `tested_on`
        (values), `fitted_examples`, and the columns of the table of probes. `bits` and R2 are over the prior
        (or mean) of the tested value's own examples to fit on. `over_own` is the accuracy, else R2,
        less that of the tested value's own probe, a paired difference.
    """
    tables = []
    for (fitted_on, tested_on), own in scored.items():
        rows = _rows(values, tested_on, tested_on)
        of_tested = replace(grid, examples={split: grid.examples[split][rows[split]] for split in rows})
        table = paired_table(own, scored[tested_on, tested_on], of_tested, resampling)
        table = table.rename(columns={"fitted_on": "fitted_examples"})
        tables.append(table.assign(by=values.column, fitted_on=fitted_on, tested_on=tested_on))
    found = pd.concat(tables, ignore_index=True).assign(target=grid.target.name)
    first = ["by", "fitted_on", "tested_on", "fitted_examples"]
    return found[first + [name for name in found if name not in first and found[name].notna().any()]]


def paired_table(
    scored: Sequence[DocumentSums], own: Sequence[DocumentSums], grid: Grid, resampling: Resampling
) -> pd.DataFrame:
    """The table of some probes beside others on the same test examples.

    The others take the place of the control task in `scored`, which is changed, so that the selectivity of
    `table_of` is the paired difference from them.

    Args:
        scored: The scores of probes.
        own: Those of the probes that they are compared with; `over_own` is missing if they are the same.
        grid: The examples.
        resampling: How groups of test examples are resampled.

    Returns:
        A row for each probe: the columns of the table of probes but `LEFT_OUT`, and `over_own`, the accuracy,
        else R2, less that of the other probe, a paired difference.
    """
    prior = prior_sums(grid)
    for sums, of_own in zip(scored, own, strict=True):
        if grid.target.kind != "classes":
            error = of_own.sums["squared_error"]
            horizon = sums.readers[0]["horizon"]
            mean = next(part.sums["squared_error"] for part in prior if part.readers[0]["horizon"] == horizon)
            sums.sums |= {
                "control_squared_error": error,
                "control_total": np.broadcast_to(mean[:, :1], error.shape),
            }
        else:
            sums.sums["control_correct"] = of_own.sums["correct"]
    table = table_of([*prior, *scored], grid.tested(), [], resampling)
    table = table[table.reader == "probe"].assign(documents=len(np.unique(grid.examples[TESTED_ON].document)))
    if scored is own:
        table[[f"selectivity{end}" for end in ("", "_low", "_high")]] = np.nan
    dropped = [f"{name}{end}" for name in LEFT_OUT for end in ("", "_low", "_high")]
    renamed = {f"selectivity{end}": f"over_own{end}" for end in ("", "_low", "_high")}
    return table.drop(columns=dropped, errors="ignore").rename(columns=renamed)


def _rows(values: Values, fitted_on: str, tested_on: str) -> dict[str, np.ndarray]:
    of = {FITTED_ON: fitted_on, CHOSEN_ON: fitted_on, TESTED_ON: tested_on}
    return {split: values.rows(value, split) for split, value in of.items()}
