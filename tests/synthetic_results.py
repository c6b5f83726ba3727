"""Made-up results of interventions, subnetworks and checkpoints, and their files in a run."""

import itertools
from typing import Any

import numpy as np
import pandas as pd
from synthetic_probes import probe_table

from probekit.io import write_json, write_table
from probekit.run.run import Run

STEPS = (0, 7, 40)
DOCUMENTS = 50
"""More than are few."""

LOSSES = ("next_loss", "next_loss_over_random", "rest_loss_over_random")
STEERING = ("plan_following", "plan_following_unedited", "plan_following_over_random")
ERASURE = ("fitted_accuracy", "refitted_accuracy", "prior_accuracy")
SUBNETWORK = ("first_loss_change", "rest_loss_change", "other_loss_change", "bits", "refitted_bits")
CONDITIONS = {"whole": 0, "subnetwork": 2, "alone": 2, "random": 2}


def measured(head: dict[str, Any], metrics: tuple[str, ...], documents: int, number: int) -> list[dict]:
    """A row for each metric, with other values for every number."""
    rows = []
    for metric in metrics:
        generator = np.random.default_rng([number, *metric.encode()])
        value, below, above = generator.normal(0.3, 0.2), *generator.uniform(0.01, 0.2, 2)
        bounds = {"value": value, "value_low": value - below, "value_high": value + above}
        rows.append(head | {"metric": metric} | bounds | {"documents": documents})
    return rows


def interventions(variant: str, documents: int = DOCUMENTS) -> pd.DataFrame:
    """Erasing and steering at two distances, each beside its random control."""
    rows: list[dict] = []
    conditions = [("erase", np.nan), ("steer", 0.0), ("steer", 2.0)]
    grid = itertools.product(conditions, (2, 4), (False, True))
    for number, ((kind, strength), distance, control) in enumerate(grid):
        head = {"kind": kind, "condition": "random" if control else kind, "strength": strength, "layer": 1}
        head |= {"location": "hook_resid_post", "distance": distance, "readout_direct": True}
        head |= {"injected": variant == "soft"}
        metrics = LOSSES[:1] if control else LOSSES + (ERASURE if kind == "erase" else ())
        rows += measured(head, metrics, documents, number)
        if kind == "steer":  # fewer sentences are written anew
            rows += measured(head, STEERING, documents - 5, number)
    types = {"condition": "str", "strength": "float64", "layer": "Int64"}
    return pd.DataFrame(rows).astype(types).assign(variant=variant)


def subnetwork(documents: int = DOCUMENTS) -> pd.DataFrame:
    """The whole LM, which has no changes, a subnetwork, and what that is compared with; two random draws."""
    rows: list[dict] = []
    for number, (condition, removed) in enumerate(CONDITIONS.items()):
        head = {"condition": condition, "draw": None, "removed": removed, "components": 6}
        rows += measured(head, SUBNETWORK[3:] if condition == "whole" else SUBNETWORK, documents, number)
    for draw in (0, 1):
        rows += measured(head | {"draw": draw}, SUBNETWORK, documents, 10 + draw)
    return pd.DataFrame(rows).astype({"draw": "Int64"}).assign(variant="none")


def continuation(documents: int = DOCUMENTS) -> pd.DataFrame:
    """What is written after the activation of one layer and of all, and with the context, at two horizons."""
    rows: list[dict] = []
    conditions = (("context", None), ("activation", 1), ("activation", None))
    for number, ((condition, layer), horizon) in enumerate(itertools.product(conditions, (1, 2))):
        head = {"condition": condition, "layer": layer, "horizon": horizon}
        rows += measured(head, ("cosine", "true_action"), documents, number)
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def over_training(documents: int = DOCUMENTS) -> pd.DataFrame:
    """Probes at three checkpoints; another layer is best on validation documents at every step."""
    parts = []
    for step in STEPS:
        part = probe_table(("none",), ("hook_resid_post",), horizons=(1,), solvers=("softmax",))
        layer = part.layer.astype(float)
        part["validation_cross_entropy"] = np.where(layer == STEPS.index(step), 0.5, 1.0 + layer)
        parts.append(part.assign(step=step, documents=documents, groups=documents))
    return pd.concat(parts, ignore_index=True)


def write_interventions(run: Run, variant: str, documents: int = DOCUMENTS, **settings: Any) -> None:
    write_table(run.folder / f"interventions/{variant}/results.parquet", interventions(variant, documents))
    _settings(
        run, f"interventions/{variant}", f"note on {variant}", {"intervene.variant": variant} | settings
    )


def write_continuation(run: Run, documents: int = DOCUMENTS, **settings: Any) -> None:
    write_table(run.folder / "continuation/results.parquet", continuation(documents))
    _settings(run, "continuation", "a note on what was written", settings)


def write_subnetwork(run: Run, documents: int = DOCUMENTS, **settings: Any) -> None:
    folder = run.folder / "subnetworks/none"
    write_table(folder / "results.parquet", subnetwork(documents))
    removed = [number in (0, 3) for number in range(6)]
    names = [f"head {number}" for number in range(6)]
    mask = pd.DataFrame({"component": names, "removed": removed, "variant": "none"})
    write_table(folder / "mask.parquet", mask)
    _settings(run, "subnetworks/none", "a note on the mask", settings)


def write_over_training(run: Run, table: pd.DataFrame, **settings: Any) -> None:
    for step in STEPS:
        folder = run.checkpoints_of("lm") / f"step{step:07d}"
        write_json(folder / "run.json", {"format": 1, "stages": {"lm": {"step": step}}})
        where = folder.relative_to(run.folder).as_posix()
        _settings(run, f"{where}/probes", "a note on the steps", {"probe.variants": ["none"]} | settings)
    write_table(run.probes_file("lm"), table)


def _settings(run: Run, folder: str, note: str, settings: dict[str, Any]) -> None:
    used = run.config.override(settings).model_dump(mode="json")
    facts = {
        "notes": [note],
        "cautions": [],
        "classes": ["a", "b"],
        "range": None,
        "extent": "sentences",
        "of": {},
        "documents": {},
    }
    write_json(run.folder / folder / "settings.json", used | facts)
