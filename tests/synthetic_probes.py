"""A table of probe results whose numbers follow from their cell, so that tests can say what must be shown."""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

LAYERS, DISTANCES = (0, 1, 2), (1, 2, 4, 8)
BASELINES = (
    *("prior", "bigram", "skip n-gram", "token embedding", "planner", "planner after joint"),
    *("ceiling (tokens read)", "ceiling (words)", "ceiling (actions)"),
)
BASELINE_METRICS = ("accuracy", "top5", "cross", "bits")
ONCE = {"hook_embed": 0, "ln_final.hook_out": 2}
TYPES = {
    **dict.fromkeys(("layer", "seed", "distance", "documents", "groups", "iterations", "fitted_on"), "Int64"),
    **dict.fromkeys(("reader", "solver", "variant", "target", "location", "position", "gain_over"), "str"),
    **dict.fromkeys(("converged", "constant"), "boolean"),
}


def accuracy_of(layer: int, distance: int, horizon: int = 1, variant: str = "none", seed: int = 0) -> float:
    """Another accuracy for every cell; the upper layer reads best, and the random one next to nothing."""
    scale = {"none": 1.0, "random": 0.2}.get(variant, 1.2)
    return scale * (0.15 + 0.05 * layer + 0.02 * LAYERS[layer] / distance) + 0.1 * (horizon - 1) + 0.01 * seed


def probe_table(
    variants: Sequence[str] = ("none", "soft", "random"),
    locations: Sequence[str] = ("hook_resid_post", "attn.hook_z", "ln_final.hook_out"),
    *,
    distances: Sequence[int] = DISTANCES,
    horizons: Sequence[int] = (1, 2),
    solvers: Sequence[str] = ("softmax", "ridge"),
    seeds: Sequence[int] = (0,),
) -> pd.DataFrame:
    """Probes and baselines in no order, with the columns of `probekit probe`.

    Layer 1 at distance 4 is empty. Layer 2 of soft has the target's own action at distance 1 of horizon 1.
    """
    rows = []
    grid = itertools.product(variants, locations, LAYERS, distances, horizons, solvers, seeds)
    for variant, location, layer, distance, horizon, solver, seed in grid:
        if layer != ONCE.get(location, layer):
            continue
        injected = variant == "soft" and (layer, distance, horizon) == (2, 1, 1)
        accuracy = accuracy_of(layer, distance, horizon, variant, seed) - (0.02 if solver == "ridge" else 0)
        accuracy = 0.95 if injected else np.nan if (layer, distance) == (1, 4) else accuracy
        rows.append(
            {"reader": "probe", "solver": solver, "variant": variant, "seed": seed, "location": location}
            | {"layer": layer, "distance": distance, "horizon": horizon, "injected": injected}
            | _metrics(accuracy, compared=not injected)
            | {
                "gain_over": None
                if np.isnan(accuracy) or injected
                else "bigram"
                if distance > 1
                else "skip n-gram"
            }
            | {"iterations": 20, "fitted_on": 500, "constant": None if np.isnan(accuracy) else False}
            | {"converged": None if solver != "softmax" or np.isnan(accuracy) else True}
        )
    for reader, distance, horizon in itertools.product(BASELINES, distances, horizons):
        if not (reader.startswith("planner") and horizon > 1):
            cell = {"reader": reader, "distance": distance, "horizon": horizon, "injected": False}
            accuracy = 0.02 * len(reader) + 0.01 * horizon + 0.01 / distance
            metrics = {k: v for k, v in _metrics(accuracy).items() if k.split("_")[0] in BASELINE_METRICS}
            rows.append(cell | metrics)
    table = pd.DataFrame(rows).assign(target="action", examples=200, documents=16, groups=16)
    table["position"] = table.distance.astype(str)
    return table.astype(TYPES).sample(frac=1, random_state=0, ignore_index=True)


def _metrics(accuracy: float, *, compared: bool = True) -> dict[str, float]:
    """Metrics that follow from one accuracy, with intervals that are not symmetric."""
    values = {
        "accuracy": accuracy,
        "top5": accuracy + 0.3,
        "cross_entropy": 3.0 - accuracy,
        "bits": 2 * accuracy,
        "gain": 2 * accuracy - 0.5 if compared else np.nan,
        "selectivity": accuracy - 0.1,
    }
    bounds = {f"{name}_low": value - 0.02 for name, value in values.items()}
    bounds |= {f"{name}_high": value + 0.03 for name, value in values.items()}
    rest = {"control_accuracy": 0.1, "code_length": 4 - accuracy, "compression": 1 + accuracy, "l2": 0.01}
    rest["validation_cross_entropy"] = 3.1 - accuracy
    if np.isnan(accuracy):
        rest = dict.fromkeys(rest, np.nan)
    return values | bounds | rest
