"""`probekit probe`: softmax probes by variant, location, layer, distance and horizon, with baselines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.errors import ProbekitError
from probekit.evaluation.evaluate import METRICS
from probekit.models.language_model import check_location
from probekit.probing.activations import Place
from probekit.probing.grid import CHOSEN_ON, FITTED_ON, MINIMUM_EXAMPLES, TESTED_ON, Grid
from probekit.progress import Progress
from probekit.run import Run
from probekit.storage import atomic_folder, write_json

CELL = ["reader", "variant", "location", "layer", "distance", "horizon"]

_COLUMNS = (
    {"reader": "str", "variant": "str", "location": "str", "layer": "Int64", "distance": "int64"}
    | {"horizon": "int64", "injected": "bool", "examples": "int64", "documents": "Int64"}
    | {
        f"{metric}{bound}": "float64"
        for metric in (*METRICS.values(), "bits")
        for bound in ("", "_low", "_high")
    }
    | {"l2": "float64", "iterations": "Int64", "converged": "boolean", "validation_cross_entropy": "float64"}
    | {"fitted_on": "Int64"}
)
"""The table's columns and their types; those with a capital, and boolean, can say that nothing applies."""


@dataclass(frozen=True)
class ProbeResults:
    """What probes and baselines read.

    Attributes:
        table: One row for each reader (probe, prior, bigram, planner, ceilings) and cell; accuracy, top5,
            cross_entropy (nats) and bits (gained over the prior) on test documents, each with `_low` and
            `_high`. `injected` marks cells that read where a variant adds its action for the target, in a
            layer that it conditions. Cells with too few examples are empty.
        folder: Where it was written.
    """

    table: pd.DataFrame
    folder: Path

    def best_cells(self) -> pd.DataFrame:
        """The best probe of each variant and location, chosen by cross-entropy on validation documents.

        Cells where the target's own action was injected, and empty ones, take no part.
        """
        probes = self.table[(self.table.reader == "probe") & ~self.table.injected]
        probes = probes[probes.validation_cross_entropy.notna()]
        return probes.loc[probes.groupby(["variant", "location"]).validation_cross_entropy.idxmin()]


def probe(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> ProbeResults:
    """Fits the probe grid of a run and writes it into `probes/`, in place of what was there.

    Probes are fitted on the documents of the split "probe", their penalty is chosen on "validation", and they
    are measured on "test"; the LM and the planner were trained on none of these.

    Args:
        run: The run or its folder.
        settings: Settings to replace, by dotted name, such as `probe.distances`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run lacks a stage, a location, layer or variant that is to be probed, or examples.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    run = Run(run.folder, run.config.override(settings or {}))
    run.require("planner")
    _check_variants(run)
    places = _places(run)
    progress = Progress(quiet=quiet)
    documents = {split: run.corpus.documents(split) for split in (CHOSEN_ON, TESTED_ON)}
    documents[FITTED_ON] = _enough(run, run.corpus.documents(FITTED_ON))
    grid = Grid(run, documents)
    if all(cell.empty for cell in grid.cells):
        raise ProbekitError(
            f"no distance and horizon has {MINIMUM_EXAMPLES} examples in each of the splits "
            f"{', '.join(documents)}; lower probe.distances or probe.horizons, raise probe.max_examples, or "
            "give more documents"
        )
    rows = list(grid.baseline_rows())
    for variant in run.config.probe.variants:
        rows += grid.probe_rows(variant, places, progress)
    results = ProbeResults(_table(rows), run.folder / "probes")
    with atomic_folder(results.folder) as folder:
        results.table.to_parquet(folder / "results.parquet", index=False)
        write_json(
            folder / "settings.json",
            run.config.model_dump(mode="json", include={"seed", "probe", "evaluation"})
            | {"documents": {split: len(numbers) for split, numbers in documents.items()}},
        )
    return results


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows).reindex(columns=list(_COLUMNS)).astype(_COLUMNS)
    return table.sort_values(CELL, kind="stable", ignore_index=True)


def _check_variants(run: Run) -> None:
    for variant in run.config.probe.variants:
        if variant != "none" and variant not in run.variants:
            raise ProbekitError(
                f"probe.variants has {variant!r}, which this run has not trained; it has "
                f"{', '.join(['none', *run.variants])}"
            )


def _places(run: Run) -> list[Place]:
    """Every location at every layer of the settings."""
    settings, layers = run.config.probe, run.bridged.cfg.n_layers
    for location in settings.locations:
        check_location(run.bridged, location, "probe.locations")
    for layer in settings.layers or ():
        if layer >= layers:
            raise ProbekitError(f"probe.layers has {layer}, but the LM's layers are 0 to {layers - 1}")
    return [(name, layer) for name in settings.locations for layer in settings.layers or range(layers)]


def _enough(run: Run, documents: np.ndarray) -> np.ndarray:
    """Whole documents, drawn at random, as long as they hold at most `probe.max_examples` examples."""
    if not len(documents):
        raise ProbekitError(
            "the corpus keeps no documents to fit probes on; build it with a corpus.probe_fraction above 0"
        )
    order = np.random.default_rng(run.config.seed).permutation(documents)
    sentences = run.corpus.document_sentences
    examples = np.cumsum(sentences[order + 1] - sentences[order] - 1)
    return np.sort(order[examples <= run.config.probe.max_examples])
