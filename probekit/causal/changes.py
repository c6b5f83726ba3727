"""The kinds of interventions: what each makes of a place, its activations and the sums over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from probekit.causal.erasure import Eraser, RandomErasers, accuracies, inlp, leace
from probekit.causal.scenes import Change, Scenes, Stage
from probekit.errors import ProbekitError
from probekit.probing.activations import HookPoint
from probekit.probing.results import Cell, LinearProbe, SavedProbes
from probekit.probing.solvers import Moments
from probekit.run.run import Run

Way = Callable[[Tensor, Tensor, float], Tensor]
"""Activations in float32 `[scenes, width]`, the action that each is moved to `[scenes]`, and a strength;
gives the moved activations."""


def straight(vectors: Tensor) -> Way:
    """Adds the action's vector, given for strength 1 `[actions, width]`, wherever the activation is."""

    def move(activations: Tensor, target: Tensor, strength: float) -> Tensor:
        return activations + strength * vectors[target]

    return move


def along_weights(probe: LinearProbe, lengths: Tensor) -> Way:
    """Adds the probe's weights of the action less the mean of all, as long as given `[actions]`."""
    weights = probe.coef.T - probe.coef.T.mean(dim=0)
    return straight(_long(weights, lengths))


def along_gradient(probe: LinearProbe, lengths: Tensor, steps: int) -> Way:
    """Follows the gradient of the probe's log-probability of the action.

    Args:
        probe: The probe of the site.
        lengths: Of the whole way to each action, for strength 1 `[actions]`; all steps are equally long.
        steps: How many.
    """

    def move(activations: Tensor, target: Tensor, strength: float) -> Tensor:
        step = strength * lengths[target] / steps
        for _ in range(steps):
            activations = activations + _long(uphill(probe, activations, target), step)
        return activations

    return move


def uphill(probe: LinearProbe, activations: Tensor, target: Tensor) -> Tensor:
    """The gradient of the log-probability of targets `[scenes]`, over the probability of all others.

    So it does not vanish, or drown in rounding, where the probe is sure of the target.

    Args:
        probe: The probe.
        activations: By which the gradient is taken `[scenes, width]`.
        target: The targets.
    """
    others = probe.log_probabilities(activations).scatter(1, target[:, None], -torch.inf).softmax(dim=1)
    return probe.coef.T[target] - others @ probe.coef.T


def _long(vectors: Tensor, lengths: Tensor) -> Tensor:
    """Vectors `[n, width]`, each scaled to a length `[n]`; none where there is no direction."""
    return torch.nn.functional.normalize(vectors, dim=1) * lengths[:, None]


INLP_ROUNDS = 2
"""Rounds of null-space projection."""

NO_DONOR = -1
"""Stands for a scene that no other one can be a donor of."""


@dataclass(frozen=True)
class Condition:
    """One way of changing activations.

    Attributes:
        name: What it is called in the table.
        change: The change.
        target: The action that each scene is moved to `[scenes]`; None where it is moved to none.
        strength: Of steering, in distances of the action's mean from the mean of all.
        scenes: Which scenes take part, bool `[scenes]`; None for all.
        beside: The conditions, by name, that it is compared with on the same scenes, and what they are
            called then.
    """

    name: str
    change: Change
    target: np.ndarray | None = None
    strength: float | None = None
    scenes: np.ndarray | None = None
    beside: Mapping[str, str] = field(default_factory=dict)


def erasing(erasers: Mapping[int, Eraser], others: Mapping[int, RandomErasers], seed: int) -> list[Condition]:
    """Erases what a linear probe can read.

    Beside it stand a random direction, in which activations are moved as far, and the erasure of as many
    dimensions that tell nothing in particular. Both are drawn for each scene: intervals that come from
    resampling scenes carry the draws' variation too.

    Args:
        erasers: By distance.
        others: The same of random dimensions.
        seed: Of the directions and dimensions.
    """

    def erase(activations: Tensor, scenes: np.ndarray, distance: int) -> Tensor:
        return erasers[distance](activations)

    def erase_other(activations: Tensor, scenes: np.ndarray, distance: int) -> Tensor:
        # Another sequence than that of the directions.
        return others[distance](activations, [np.random.default_rng([seed, n, distance, 1]) for n in scenes])

    beside = {name: name for name in ("random", "random subspace")}
    return [
        Condition("erase", erase, beside=beside),
        Condition("random", _as_far(erase, seed)),
        Condition("random subspace", erase_other),
    ]


def patching(donated: Mapping[int, Tensor], scenes: Scenes, seed: int) -> list[Condition]:
    """Puts a donor's activation in place, of a scene whose next sentence has another action.

    Beside it stand a random direction as far as that, and a donor whose next sentence has the same action.
    Scenes take part that have both donors.

    Args:
        donated: What stands at the place in every scene, by distance `[scenes, width]`.
        scenes: The scenes.
        seed: Of the draw of donors.

    Raises:
        ProbekitError: No scene has both.
    """
    donors = {same: draw_donors(scenes.action, same=same, seed=seed) for same in (False, True)}
    there = np.logical_and.reduce([donor != NO_DONOR for donor in donors.values()])
    if not there.any():
        raise ProbekitError(
            f"intervene.kinds has patch, but of {len(scenes)} scenes none has both a donor whose next "
            "sentence has the same action and one whose has another; raise intervene.scenes"
        )

    def given_by(donor: np.ndarray) -> Change:
        def patch(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
            rows = torch.from_numpy(np.where(there, donor, np.arange(len(donor)))[numbers])
            return donated[distance][rows.to(activations.device)].to(activations)

        return patch

    target = np.where(there, scenes.action[donors[False]], scenes.action)
    patch, same = (given_by(donors[same]) for same in (False, True))
    beside = {"random": "random", "same action": "same action"}
    return [
        Condition("patch", patch, target, scenes=there, beside=beside),
        Condition("random", _as_far(patch, seed), target, scenes=there),
        Condition("same action", same, scenes.action, scenes=there),
    ]


def steering(
    ways: Mapping[int, Way],
    scenes: Scenes,
    known: np.ndarray,
    strengths: Sequence[float],
    seed: int,
) -> list[Condition]:
    """Moves toward an action, a wrong one and the true one; each beside a random direction as far.

    Args:
        ways: By distance, how activations are moved.
        scenes: The scenes.
        known: The actions that have a direction.
        strengths: By which lengths are multiplied.
        seed: Of wrong actions and of random directions.
    """

    def toward(strength: float, target: np.ndarray) -> Change:
        def steer(activations: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
            actions = torch.from_numpy(target[numbers]).to(activations.device)
            return ways[distance](activations.float(), actions, strength).to(activations.dtype)

        return steer

    targets = {"wrong": draw_wrong(scenes.action, known, seed), "true": scenes.action}
    return [
        condition
        for strength in strengths
        for condition in _targeted(targets, partial(toward, strength), strength, seed)
    ]


def replanning(codebook: Tensor, scenes: Scenes, known: np.ndarray, seed: int) -> list[Condition]:
    """Replaces the plan that a conditioned LM is given for the next sentence by an action's embedding.

    A wrong action's or the true one's; each beside a random direction as far from the plan.

    Args:
        codebook: The adapter's embeddings `[actions, dimensions]`.
        scenes: The scenes.
        known: Actions that sentences have.
        seed: Of wrong actions and of random directions.
    """

    def toward(target: np.ndarray) -> Change:
        def replace(embeddings: Tensor, numbers: np.ndarray, distance: int) -> Tensor:
            return codebook[torch.from_numpy(target[numbers]).to(codebook.device)].to(embeddings)

        return replace

    targets = {"wrong": draw_wrong(scenes.action, known, seed), "true": scenes.action}
    return _targeted(targets, toward, None, seed)


def draw_wrong(action: np.ndarray, known: np.ndarray, seed: int) -> np.ndarray:
    """For every scene one of the known actions that is not its own `[scenes]`; its own if there is none."""
    generator = np.random.default_rng(seed)
    others = (known[known != own] for own in action)
    return np.array(
        [generator.choice(other) if len(other) else own for own, other in zip(action, others, strict=True)]
    )


def draw_donors(action: np.ndarray, *, same: bool, seed: int) -> np.ndarray:
    """For every scene the number of another with the same action, or another one; or `NO_DONOR`."""
    generator = np.random.default_rng(seed)
    donors = np.full(len(action), NO_DONOR)
    for scene, own in enumerate(action):
        fitting = np.flatnonzero((action == own) == same)
        fitting = fitting[fitting != scene]
        if len(fitting):
            donors[scene] = generator.choice(fitting)
    return donors


def _targeted(
    targets: Mapping[str, np.ndarray],
    toward: Callable[[np.ndarray], Change],
    strength: float | None,
    seed: int,
) -> list[Condition]:
    """Each target's condition, and beside it a random direction as far."""
    conditions = []
    for name, target in targets.items():
        change, random = toward(target), f"random ({name})"
        conditions.append(Condition(f"{name} action", change, target, strength, beside={random: "random"}))
        conditions.append(Condition(random, _as_far(change, seed), target, strength))
    return conditions


def _as_far(change: Change, seed: int) -> Change:
    """Moves every activation as far as a change does, in a direction drawn for each scene and distance."""

    def move(activations: Tensor, scenes: np.ndarray, distance: int) -> Tensor:
        before = activations.float()
        moved = (change(activations, scenes, distance).float() - before).norm(dim=-1, keepdim=True)
        drawn = np.stack(
            [np.random.default_rng([seed, n, distance]).normal(size=before.shape[1]) for n in scenes]
        )
        direction = torch.from_numpy(drawn).to(before)
        return (before + moved * direction / direction.norm(dim=-1, keepdim=True)).to(activations.dtype)

    return move


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

    place: HookPoint | None
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
    (eraser,) = leace(moments) if chosen.eraser == "leace" else inlp(moments, INLP_ROUNDS)
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
