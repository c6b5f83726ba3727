"""`probekit intervene`: whether what probes read is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.config import InterventionSettings
from probekit.errors import ProbekitError
from probekit.evaluation.perplexity import window_and_stride
from probekit.evaluation.statistics import Resampling, bootstrap_ratio
from probekit.interventions.changes import Condition, erasing, patching, steering
from probekit.interventions.effects import Edit, Outcomes, Stage
from probekit.interventions.erasure import inlp, leace
from probekit.interventions.moments import moments_at
from probekit.interventions.scenes import draw_scenes
from probekit.models.language_model import check_location
from probekit.probing.activations import Place
from probekit.probing.grid import make_grid
from probekit.probing.saved import Cell, SavedProbes
from probekit.probing.solvers import Moments
from probekit.probing.targets import find_target
from probekit.progress import Progress
from probekit.run import Run
from probekit.storage import atomic_folder, write_json

READOUT = "hook_resid_post"
"""Where, in the last layer, a probe tells what the LM makes of an intervention."""

Moved = dict[tuple[Place, int], Moments]


@dataclass(frozen=True)
class InterventionResults:
    """What interventions do.

    Attributes:
        table: One row for each kind, condition, strength, location, layer, distance and metric, with its 95 %
            interval from resampling documents, one scene each. Metrics are changes against the same scenes
            left alone: `next_loss` and `other_loss` (nats a token, of the next sentence and of what is behind
            it), `first_kl` and `readout_kl` (nats, from the LM's distribution over the next token, and from a
            probe's over the next action in the last layer), `readout_true` and `readout_target` (that
            probe's probability of the true action, and of the one that was aimed at).
        folder: Where it was written.
    """

    table: pd.DataFrame
    folder: Path


def intervene(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> InterventionResults:
    """Intervenes in a probed run; writes `interventions/results.parquet`, in place of what was there.

    Args:
        run: The run or its folder; its probes are needed.
        settings: Settings to replace, by dotted name, such as `intervene.layers`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run has no probes that fit, or a setting does not fit the LM.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    run = run.with_settings(settings or {})
    chosen, progress = run.config.intervene, Progress(quiet=quiet)
    places = _places(run, chosen)
    readout = _readout(run, chosen)
    target = find_target(run.corpus, "action")
    probing = run.config.probe.model_copy(
        update={"distances": tuple(sorted(chosen.distances)), "horizons": (1,), "anchors": "sentence"}
    )
    grid = make_grid(run.corpus, probing, target, run.config.seed)
    window, _ = window_and_stride(run)
    scenes = draw_scenes(
        run.corpus, run.corpus.documents("test"), chosen.scenes, window, max(grid.distances), run.config.seed
    )
    moments = moments_at(run, chosen.variant, places, grid, progress)
    stage = Stage(run, chosen.variant, scenes, places, readout)
    plain = stage.play()
    rows: list[dict[str, Any]] = []
    nearer = {far: tuple(d for d in grid.distances if d <= far) for far in grid.distances}
    reaches = [nearer[far] if chosen.span else (far,) for far in grid.distances]
    with progress.task("intervene", total=len(places) * len(reaches) * len(chosen.kinds)) as task:
        for place in places:
            for far, distances in zip(grid.distances, reaches, strict=True):
                for kind in chosen.kinds:
                    conditions = KINDS[kind](run, stage, place, distances, moments)
                    for condition in conditions:
                        outcomes = stage.play(Edit(place, distances, condition.change))
                        head = {"kind": kind, "condition": condition.name, "strength": condition.strength}
                        head |= {"location": place[0], "layer": place[1], "distance": far}
                        _check_finite(outcomes, head)
                        rows += _rows(run, head, condition, plain, outcomes, scenes.action)
                    task.advance()
    results = InterventionResults(
        pd.DataFrame(rows).assign(variant=chosen.variant), run.folder / "interventions"
    )
    with atomic_folder(results.folder) as folder:
        results.table.to_parquet(folder / "results.parquet", index=False)
        write_json(folder / "settings.json", run.config.model_dump(mode="json"))
    return results


def _erase(run: Run, stage: Stage, place: Place, distances: Sequence[int], moments: Moved) -> list[Condition]:
    chosen = run.config.intervene
    fit = leace if chosen.eraser == "leace" else lambda sums: inlp(sums, chosen.rounds)
    return erasing({d: fit(moments[place, d])[0] for d in distances}, run.config.seed)


def _patch(run: Run, stage: Stage, place: Place, distances: Sequence[int], moments: Moved) -> list[Condition]:
    donated = dict(zip(distances, stage.activations(place, distances), strict=True))
    return patching(donated, stage.scenes, run.config.seed)


def _steer(run: Run, stage: Stage, place: Place, distances: Sequence[int], moments: Moved) -> list[Condition]:
    chosen = run.config.intervene
    vectors = {d: _means(moments[place, d]) for d in distances}
    if chosen.direction == "probe":
        saved = SavedProbes(run.folder / "probes", chosen.variant, run.config.seed)
        for distance, means in vectors.items():
            coef = saved[Cell(place[0], place[1], distance)].coef.T.to(means)
            along = coef - coef.mean(dim=0)
            # As long as the way between means, so that strengths can be compared.
            scale = means.norm(dim=1) / along.norm(dim=1).clamp(min=1e-12)
            vectors[distance] = along * scale[:, None]
    return steering(vectors, stage.scenes, chosen.strengths, run.config.seed)


KINDS: dict[str, Callable[[Run, Stage, Place, Sequence[int], Moved], list[Condition]]] = {
    "erase": _erase,
    "steer": _steer,
    "patch": _patch,
}
"""The kinds of `intervene.kinds`."""


def _means(moments: Moments) -> Tensor:
    """From the mean of all activations to that of each class `[classes, width]`; 0 where it has none."""
    counts = moments.class_counts[0][:, None]
    means = moments.class_sums[0] / counts.clamp(min=1) - moments.mean[0]
    return torch.where(counts > 0, means, 0.0).float()


def _rows(
    run: Run,
    head: dict[str, Any],
    condition: Condition,
    plain: Outcomes,
    changed: Outcomes,
    true: np.ndarray,
) -> list[dict[str, Any]]:
    """Every metric of one condition."""
    scenes = np.arange(len(true))
    there = np.ones(len(true), dtype=bool) if condition.scenes is None else condition.scenes
    one = there.astype(float)
    read, was = np.exp(changed.readout), np.exp(plain.readout)
    sums = {
        "next_loss": (changed.next_loss - plain.next_loss, plain.next_tokens),
        "other_loss": (changed.other_loss - plain.other_loss, plain.other_tokens),
        "first_kl": (_kl(plain.first, changed.first), one),
        "readout_kl": (_kl(plain.readout, changed.readout), one),
        "readout_true": ((read - was)[scenes, true], one),
    }
    if condition.target is not None:
        sums["readout_target"] = ((read - was)[scenes, condition.target], one)
    options: Resampling = {"resamples": run.config.evaluation.resamples, "seed": run.config.seed}
    rows = []
    for metric, (values, counts) in sums.items():
        found = bootstrap_ratio(values * there, counts * there, **options)
        rows.append(
            head
            | {"metric": metric, "value": found.value, "value_low": found.low, "value_high": found.high}
            | {"documents": found.documents}
        )
    return rows


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of log-probabilities `[scenes, outcomes]`, in nats `[scenes]`."""
    there = np.isfinite(p) & np.isfinite(q)
    difference = np.where(there, p, 0.0) - np.where(there, q, 0.0)
    return (np.exp(np.where(there, p, -np.inf)) * difference).sum(axis=1)


def _check_finite(outcomes: Outcomes, head: dict[str, Any]) -> None:
    if np.isfinite(outcomes.next_loss).all() and np.isfinite(outcomes.other_loss).all():
        return
    strength = head["strength"]
    remedy = "" if strength is None else f"; lower intervene.strengths, which has {strength:g}"
    raise ProbekitError(
        f"{head['kind']} ({head['condition']}) at {head['location']}, layer {head['layer']}, makes the loss "
        f"infinite or no number{remedy}"
    )


def _places(run: Run, chosen: InterventionSettings) -> list[Place]:
    layers = run.bridged.cfg.n_layers
    for location in chosen.locations:
        check_location(run.locations, location, "intervene.locations")
    for layer in chosen.layers or ():
        if layer >= layers:
            raise ProbekitError(f"intervene.layers has {layer}, but the LM's layers are 0 to {layers - 1}")
    known = ("none", *run.variants)
    if chosen.variant not in known:
        raise ProbekitError(
            f"intervene.variant is {chosen.variant!r}, which this run has not trained; it has "
            f"{', '.join(known)}"
        )
    return [(location, layer) for location in chosen.locations for layer in chosen.layers or range(layers)]


def _readout(run: Run, chosen: InterventionSettings) -> tuple[Place, Any]:
    """The probe of the last layer, right before the next sentence."""
    last = run.bridged.cfg.n_layers - 1
    saved = SavedProbes(run.folder / "probes", chosen.variant, run.config.seed)
    return (READOUT, last), saved[Cell(READOUT, last, 1)]
