"""The kinds of interventions: what each makes of a place, its activations and the sums over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probekit.interventions.changes import Condition, erasing, patching, replanning, steering
from probekit.interventions.effects import Stage
from probekit.interventions.erasure import Eraser, RandomErasers, inlp, leace
from probekit.interventions.refit import accuracies
from probekit.interventions.ways import Way, along_gradient, along_weights, straight
from probekit.probing.activations import Place
from probekit.probing.saved import Cell, LinearProbe, SavedProbes
from probekit.probing.solvers import Moments
from probekit.run import Run

PLAN = "plan"
"""Stands for the location where the adapter is given a plan."""


@dataclass(frozen=True)
class Site:
    """Where something is changed.

    Attributes:
        place: The location and layer; None for the plan that the adapter is given.
        distances: The distances that are changed at once; the last is the one that the site is named by.
        moments: By distance, sums over the activations of the split that probes are fitted on.
        activations: What stands there in every scene, by distance `[scenes, width]`.
    """

    place: Place | None
    distances: tuple[int, ...]
    moments: Mapping[int, Moments]
    activations: Mapping[int, Tensor]

    @property
    def distance(self) -> int:
        """The farthest."""
        return self.distances[-1]


@dataclass(frozen=True)
class Measured:
    """What is done at a site.

    Attributes:
        conditions: What is changed.
        sums: What is known of the first one without running the LM, by metric `[scenes]`.
    """

    conditions: list[Condition]
    sums: Mapping[str, np.ndarray]


def _erase(run: Run, stage: Stage, site: Site) -> Measured:
    erasers = {d: _eraser(run, moments) for d, moments in site.moments.items()}
    others = {d: RandomErasers(moments, erasers[d].rank) for d, moments in site.moments.items()}
    far = site.distance
    kept = accuracies(site.moments[far], erasers[far], site.activations[far], stage.scenes.action)
    rank = np.full(len(stage.scenes), float(erasers[far].rank))
    return Measured(erasing(erasers, others, run.config.seed), kept | {"erased_dimensions": rank})


def _eraser(run: Run, moments: Moments) -> Eraser:
    chosen = run.config.intervene
    (eraser,) = leace(moments) if chosen.eraser == "leace" else inlp(moments, chosen.rounds)
    return eraser


def _patch(run: Run, stage: Stage, site: Site) -> Measured:
    return Measured(patching(site.activations, stage.scenes, run.config.seed), {})


def _steer(run: Run, stage: Stage, site: Site) -> Measured:
    chosen = run.config.intervene
    means = {distance: _means(moments) for distance, moments in site.moments.items()}
    if chosen.direction == "means":
        ways = {distance: straight(vectors) for distance, vectors in means.items()}
    else:
        ways = {distance: _read_way(run, site, distance, vectors) for distance, vectors in means.items()}
    known = np.flatnonzero(site.moments[site.distance].class_counts[0].cpu().numpy())
    return Measured(steering(ways, stage.scenes, known, chosen.strengths, run.config.seed), {})


def _read_way(run: Run, site: Site, distance: int, means: Tensor) -> Way:
    """Along what the probe of the site reads; as long as the way between means, to compare strengths."""
    assert site.place is not None  # noqa: S101 - only plans are at no place, and those are not steered
    chosen = run.config.intervene
    saved = SavedProbes(run.folder / "probes", chosen.variant, run.config.seed)
    found = saved[Cell(*site.place, distance)]
    probe = LinearProbe(found.coef.to(means), found.intercept.to(means))
    lengths = means.norm(dim=1)
    if chosen.direction == "probe":
        return along_weights(probe, lengths)
    return along_gradient(probe, lengths, chosen.steps)


def _replan(run: Run, stage: Stage, site: Site) -> Measured:
    assert stage.codebook is not None  # noqa: S101 - refused before, where there is none
    known = np.unique(run.corpus.actions[run.corpus.sentences(run.corpus.documents("train"))])
    return Measured(replanning(stage.codebook, stage.scenes, known, run.config.seed), {})


KINDS: dict[str, Callable[[Run, Stage, Site], Measured]] = {
    "erase": _erase,
    "steer": _steer,
    "patch": _patch,
    "codebook": _replan,
}
"""The kinds of `intervene.kinds`."""


def _means(moments: Moments) -> Tensor:
    """From the mean of all activations to that of each class `[classes, width]`; 0 where it has none."""
    counts = moments.class_counts[0][:, None]
    means = moments.class_sums[0] / counts.clamp(min=1) - moments.mean[0]
    return torch.where(counts > 0, means, 0.0).float()
