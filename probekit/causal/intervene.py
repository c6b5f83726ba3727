"""`probekit intervene`: does the LM use what probes read?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from probekit import distributed
from probekit.causal.boundaries import Edit, EditedLM, Outcomes, draw_boundaries
from probekit.causal.changes import (
    Condition,
    Steering,
    along_gradient,
    along_vectors,
    along_weights,
    class_mean_vectors,
    draw_patches,
    erasing,
    patching,
    replanning,
    steering,
)
from probekit.causal.erasure import RandomErasers, erasure_accuracies, inlp, leace, read_moments
from probekit.causal.variant_lm import (
    FINAL_LOCATION,
    SumsByMetric,
    final_layer_probe,
    open_run,
    write_results,
)
from probekit.causal.writing import SentenceWriter
from probekit.config import InterventionSettings
from probekit.errors import ProbekitError
from probekit.evaluation.perplexity import window_and_stride
from probekit.models.conditioning import CONDITIONINGS
from probekit.models.locations import at_layers
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import ActivationReader, HookPoint, within_memory
from probekit.probing.grid import Grid, make_grid
from probekit.probing.record import read_probe_record
from probekit.probing.results import Cell, SavedProbes
from probekit.probing.solvers import Moments
from probekit.probing.targets import Target
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import Resampling, bootstrap_ratios

PLAN = "plan"
"""Stands for the location where the adapter takes the action embedding."""

INLP_ROUNDS = 2
"""Rounds of null-space projection (`intervene.eraser inlp`)."""

TYPES = {"condition": "str", "strength": "float64", "layer": "Int64"}
"""Types of columns that may be empty."""


@dataclass(frozen=True)
class InterventionResults:
    """Effects of interventions.

    Attributes:
        table: One row for each kind, condition, strength, location, layer, distance and metric, with its 95 %
            interval from resampling documents, one sentence boundary each. Metrics are differences from the
            same boundaries without an edit: `next_loss`, `rest_loss` and `other_loss` (nats per token, of the
            next sentence, of it without its first token, and of the tokens after it), `first_kl` and
            `readout_kl` (nats, from the LM's distribution over the next token, and from the final-layer
            probe's over the next label), `readout_true` and `readout_target` (that probe's probability of
            the true label, and of the target). `next_loss_over_random` and the like are differences from a
            control on the same boundaries. `moved` is the norm of the edit as a share of the activations'.
            `fitted_accuracy`, `refitted_accuracy` and `prior_accuracy` are those of a linear probe before
            erasure, of one that is fitted again after it, and of the most frequent label;
            `erased_dimensions` are removed: with as many classes as the LM is wide, all.
            `plan_following` is the share of newly written sentences that have the target label,
            `plan_following_unedited` the same without the edit.

            `readout_direct` marks edits of the very activation that the final-layer probe reads: there the
            readout shows the edit itself, not what the LM makes of it. `injected` marks edits where the
            adapter has already conditioned the LM on the next sentence's action.
        folder: Where it was written.
        notes: Remarks on all rows together.
    """

    table: pd.DataFrame
    folder: Path
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Site:
    """Where activations are edited.

    Attributes:
        point: The location and layer; None for the action embedding that the adapter takes.
        distances: The distances that are edited at once; the last one names the site.
        moments: By distance, sums over the activations that probes are fitted on.
        activations: By distance, the activations before every boundary `[boundaries, width]`.
    """

    point: HookPoint | None
    distances: tuple[int, ...]
    moments: Mapping[int, Moments]
    activations: Mapping[int, Tensor]


def intervene(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> InterventionResults:
    """Edits activations of a probed run; writes `interventions/<variant>/`, in place of earlier results.

    Erasers and directions are fitted on the split "probe". The edits are made in test documents, at one
    sentence boundary of each, the same ones for every row.

    Args:
        run: The run or its folder; it needs probes of the variant.
        settings: Settings to replace, by dotted name, such as `intervene.layers`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run has no suitable probes, or a setting does not fit the LM.
    """
    distributed.check_alone("intervene")
    run = open_run(run, settings, "intervene")
    chosen, progress = run.config.intervene, Progress(quiet=quiet)
    window, _ = window_and_stride(run)
    documents, reach = run.corpus.documents("test"), max(chosen.distances)
    final = final_layer_probe(run, chosen.variant)
    points, target = _points(run), final[2]
    assert target.of_sentences is not None  # noqa: S101 - refused before
    drawn = chosen.boundaries, window, reach, run.config.seed
    boundaries = draw_boundaries(run.corpus, target.of_sentences, documents, *drawn)
    if "patch" in chosen.kinds:
        draw_patches(boundaries, run.config.seed)  # refuses what has no donors before the LM is run
    if "steer" in chosen.kinds and chosen.direction != "means":
        saved = SavedProbes(run.folder / "probes", chosen.variant, run.config.seed)
        saved.require(Cell(*point, distance) for point in points for distance in _distances(chosen))
    grid = _grid(run, target)
    lm = EditedLM(run, chosen.variant, boundaries, points, final)
    if "codebook" in chosen.kinds and target.name != "action":
        raise ProbekitError(
            f"intervene.kinds has 'codebook', which changes the plan, but the probes read {target.name!r}; "
            "probe the target action, or leave it out"
        )
    if "codebook" in chosen.kinds and lm.codebook is None:
        raise ProbekitError(
            f"intervene.kinds has 'codebook', but variant {chosen.variant!r} is not conditioned on actions; "
            "choose an intervene.variant that is, such as soft"
        )
    writer = SentenceWriter(lm, chosen.samples, window) if chosen.samples else None
    trials = _Trials(lm, writer, _conditioned_points(run, points))
    local = [kind for kind in chosen.kinds if kind != "codebook"]
    total = len(points) * len(set(chosen.distances)) * len(local) + (len(local) < len(chosen.kinds))
    rows: list[dict[str, Any]] = []
    with progress.task("intervene", total=total) as task:
        for site in _sites(lm, points, grid, progress):
            for kind in local if site.point is not None else ["codebook"]:
                rows += trials.rows(kind, site)
                task.advance()
    table = pd.DataFrame(rows).astype(TYPES).assign(variant=chosen.variant)
    notes = []
    if len(boundaries) < chosen.boundaries:
        notes = [
            f"{len(boundaries):,} sentence boundaries, for no more test documents have one; "
            f"intervene.boundaries asks for {chosen.boundaries:,}"
        ]
    if writer is not None and writer.judge is not None:
        notes.append(writer.judge.note)
    results = InterventionResults(table, run.folder / "interventions" / chosen.variant, notes)
    write_results(results.folder, {"results": table}, run, notes)
    return results


class _Trials:
    """Applies the conditions of a kind at a site, and compares them with the LM without an edit."""

    def __init__(self, lm: EditedLM, writer: SentenceWriter | None, conditioned: set[HookPoint]) -> None:
        self._lm, self._run, self._writer, self._conditioned = lm, lm.run, writer, conditioned
        self._plain = lm.outcomes()
        self._written = None if writer is None else writer.labels()

    def rows(self, kind: str, site: Site) -> list[dict[str, Any]]:
        """A row for every condition and metric."""
        conditions, known = self._conditions(kind, site)
        true, config = self._lm.boundaries.label, self._run.config
        resampling = config.resampling
        rows: list[dict[str, Any]] = []
        for strength in dict.fromkeys(condition.strength for condition in conditions):
            group = [condition for condition in conditions if condition.strength == strength]
            edits = {c.name: Edit(site.point, site.distances, c.change) for c in group}
            outcomes = {c.name: self._lm.outcomes(edits[c.name]) for c in group}
            for condition in group:
                _check_finite(kind, site, condition, outcomes[condition.name])
            written = {}
            if self._writer is not None and all(condition.target is not None for condition in group):
                written = {name: self._writer.labels(edit) for name, edit in edits.items()}
            for condition in group:
                sums = known | effects(condition, self._plain, outcomes, true)
                if written and self._written is not None:
                    sums |= plan_following(condition, self._written, written)
                head = self._head(kind, site, condition)
                rows += metric_rows(head, sums, condition.included, resampling)
                known = {}  # reported once, with the first condition
        return rows

    def _conditions(self, kind: str, site: Site) -> tuple[list[Condition], SumsByMetric]:
        """The conditions, and metrics that need no forward pass."""
        boundaries, chosen, seed = self._lm.boundaries, self._run.config.intervene, self._run.config.seed
        if kind == "patch":
            return patching(site.activations, boundaries, seed), {}
        if kind == "codebook":
            corpus, codebook = self._run.corpus, self._lm.codebook
            assert codebook is not None  # noqa: S101 - refused before
            known = np.unique(corpus.known_actions[corpus.sentences(corpus.documents("train"))])
            return replanning(codebook, boundaries, known[known >= 0], seed), {}
        far = site.distances[-1]
        if kind == "steer":
            known = np.flatnonzero(site.moments[far].class_counts[0].cpu().numpy())
            methods = {d: self._steering(site, d) for d in site.distances}
            return steering(methods, boundaries, known, chosen.strengths, seed), {}
        erasers = {
            d: leace(moments) if chosen.eraser == "leace" else inlp(moments, INLP_ROUNDS)
            for d, moments in site.moments.items()
        }
        random = {d: RandomErasers(moments, erasers[d].rank) for d, moments in site.moments.items()}
        measured = erasure_accuracies(
            site.moments[far], erasers[far], site.activations[far], boundaries.label
        )
        measured["erased_dimensions"] = np.full(len(boundaries), float(erasers[far].rank))
        one = np.ones(len(boundaries))
        return erasing(erasers, random, seed), {name: (values, one) for name, values in measured.items()}

    def _steering(self, site: Site, distance: int) -> Steering:
        """Steering by `intervene.direction`, always as far as the mean vectors, so that strengths compare."""
        assert site.point is not None  # noqa: S101 - the plan is not steered
        chosen, means = self._run.config.intervene, class_mean_vectors(site.moments[distance])
        if chosen.direction == "means":
            return along_vectors(means)
        saved = SavedProbes(self._run.folder / "probes", chosen.variant, self._run.config.seed)
        found = saved[Cell(*site.point, distance)]
        probe = found.to(means)
        lengths = means.norm(dim=1)
        if chosen.direction == "probe":
            return along_weights(probe, lengths)
        return along_gradient(probe, lengths, chosen.steps)

    def _head(self, kind: str, site: Site, condition: Condition) -> dict[str, Any]:
        location, layer = site.point or (PLAN, None)
        final = (FINAL_LOCATION, self._run.frozen_lm().layers - 1)
        return {
            "kind": kind,
            "condition": condition.name,
            "strength": condition.strength,
            "location": location,
            "layer": layer,
            "distance": site.distances[-1],
            "readout_direct": site.point == final and 1 in site.distances,
            "injected": site.point is None or (site.point in self._conditioned and 1 in site.distances),
        }


def effects(
    condition: Condition, plain: Outcomes, outcomes: Mapping[str, Outcomes], true: np.ndarray
) -> SumsByMetric:
    """Differences of a condition from outcomes without an edit, and from its controls, by true labels."""
    now, numbers, one = outcomes[condition.name], np.arange(len(true)), np.ones(len(true))
    rest = plain.next_tokens - 1
    probability = np.exp(now.label) - np.exp(plain.label)
    sums: SumsByMetric = {
        "next_loss": (now.next_loss - plain.next_loss, plain.next_tokens),
        "rest_loss": (_rest_loss(now) - _rest_loss(plain), rest),
        "other_loss": (now.other_loss - plain.other_loss, plain.other_tokens),
        "first_kl": (_kl(plain.first, now.first), one),
        "readout_kl": (_kl(plain.label, now.label), one),
        "readout_true": (probability[numbers, true], one),
        "moved": (now.moved, now.norm),
    }
    if condition.target is not None:
        sums["readout_target"] = (probability[numbers, condition.target], one)
    for name, called in condition.controls.items():
        control, over = outcomes[name], f"over_{called.replace(' ', '_')}"
        sums[f"next_loss_{over}"] = (now.next_loss - control.next_loss, plain.next_tokens)
        sums[f"rest_loss_{over}"] = (_rest_loss(now) - _rest_loss(control), rest)
    return sums


def plan_following(
    condition: Condition, plain: np.ndarray, written: Mapping[str, np.ndarray]
) -> SumsByMetric:
    """How many newly written sentences have the target action, by their actions without an edit and with."""
    assert condition.target is not None  # noqa: S101 - only conditions with a target are written under
    target, one = condition.target[: len(plain)], np.ones(len(plain))
    hit = (written[condition.name] == target).astype(float)
    sums: SumsByMetric = {
        "plan_following": (hit, one),
        "plan_following_unedited": ((plain == target).astype(float), one),
    }
    for name, called in condition.controls.items():
        if called == "random":
            sums["plan_following_over_random"] = (hit - (written[name] == target), one)
    return sums


def metric_rows(
    head: Mapping[str, Any], sums: SumsByMetric, included: np.ndarray | None, resampling: Resampling
) -> list[dict[str, Any]]:
    """A row for each metric, with its interval over the included boundaries, and with the columns of `head`.

    Metrics are sums by boundary; shorter ones are of the first boundaries.
    """
    rows = []
    for size in sorted({len(values) for values, _ in sums.values()}):
        own = {name: pair for name, pair in sums.items() if len(pair[0]) == size}
        weight = np.ones(size) if included is None else included[:size].astype(float)
        values, counts = (
            np.stack(part, axis=1) * weight[:, None] for part in zip(*own.values(), strict=True)
        )
        intervals = bootstrap_ratios(values, counts, **resampling)
        for number, metric in enumerate(own):
            rows.append({**head, "metric": metric, **intervals[number].columns()})
    return rows


def _rest_loss(outcomes: Outcomes) -> np.ndarray:
    """Summed loss of the next sentence without its first token `[boundaries]`."""
    return outcomes.next_loss - outcomes.first_loss


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of log-probabilities `[boundaries, classes]`, in nats `[boundaries]`."""
    found = np.empty(len(p))
    for row, own in enumerate(p):  # of a vocabulary, all in float64 would be large
        possible = np.isfinite(own)  # 0 log 0 = 0
        exact, other = own[possible].astype(np.float64), q[row, possible].astype(np.float64)
        found[row] = np.exp(exact) @ (exact - other)
    return found


def _check_finite(kind: str, site: Site, condition: Condition, outcomes: Outcomes) -> None:
    if all(np.isfinite(part).all() for part in (outcomes.next_loss, outcomes.other_loss, outcomes.moved)):
        return
    remedy = ""
    if condition.strength is not None:
        remedy = f"; lower intervene.strengths, which has {condition.strength:g}"
    location, layer = site.point or (PLAN, None)
    raise ProbekitError(
        f"{kind} ({condition.name}) at {location}, layer {layer}, makes activations or losses "
        f"overflow{remedy}"
    )


def _sites(lm: EditedLM, points: Sequence[HookPoint], grid: Grid, progress: Progress) -> Iterator[Site]:
    """All sites, one at a time; the plan, which is no hook point, comes last."""
    chosen, edited = lm.run.config.intervene, _distances(lm.run.config.intervene)
    if set(chosen.kinds) != {"codebook"}:
        for group in _groups(lm.run, points, grid):
            moments = read_moments(lm.run, chosen.variant, group, grid, progress)
            for point in group:
                activations = dict(zip(edited, lm.activations(point, edited), strict=True))
                for far in sorted(chosen.distances):
                    distances = tuple(range(1, far + 1)) if chosen.span else (far,)
                    sums = {distance: moments[point, distance] for distance in distances}
                    yield Site(
                        point, distances, sums, {distance: activations[distance] for distance in distances}
                    )
    if "codebook" in chosen.kinds:
        yield Site(None, (1,), {}, {})


def _groups(run: Run, points: Sequence[HookPoint], grid: Grid) -> Iterator[list[HookPoint]]:
    """Hook points whose sums, in float64, stay within half of `probe.memory`: of two groups some are held."""
    widths = [run.locations[location] for location, _ in points]
    sizes = [8 * len(grid.positions) * width * (width + grid.target.classes) for width in widths]
    return within_memory(points, sizes, run.config.probe.memory / 2)


def _distances(chosen: InterventionSettings) -> tuple[int, ...]:
    """Every distance that is edited, ascending."""
    return tuple(range(1, max(chosen.distances) + 1) if chosen.span else sorted(chosen.distances))


def _grid(run: Run, target: Target) -> Grid:
    """The examples that erasers and directions are fitted on, at every distance that is edited."""
    distances = _distances(run.config.intervene)
    settings = run.config.probe.model_copy(
        update={"positions": distances, "horizons": (1,), "anchors": "start"}
    )
    grid = make_grid(run.corpus, settings, target, run.config.seed)
    if missing := sorted({*distances} - {*grid.positions}):
        raise ProbekitError(
            f"intervene.distances has {distances[-1]}, but too few sentences begin after so many tokens to "
            f"fit anything at distance {missing[0]}; give smaller distances"
        )
    return grid


def _points(run: Run) -> list[HookPoint]:
    """Every location at every layer of the settings, else at every layer that was probed."""
    chosen, lm = run.config.intervene, run.frozen_lm()
    for location in chosen.locations:
        lm.architecture.check(location, "intervene.locations")
    layers = chosen.layers or read_probe_record(run.folder).config.probe.layers
    return at_layers(chosen.locations, layers, lm.layers, "intervene.layers")


def _conditioned_points(run: Run, points: Sequence[HookPoint]) -> set[HookPoint]:
    """The hook points where the token before the next sentence is conditioned on that sentence's action."""
    variant = run.config.intervene.variant
    if variant not in VARIANTS or not VARIANTS[variant].evaluation.needs_scores:
        return set()
    if CONDITIONINGS[run.config.conditioning.kind].lag:
        return set()
    return ActivationReader(run, variant, points, (1,)).changed_by_conditioning()
