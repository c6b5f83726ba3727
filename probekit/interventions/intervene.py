"""`probekit intervene`: whether what probes read is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probekit.config import InterventionSettings
from probekit.errors import ProbekitError
from probekit.evaluation.perplexity import window_and_stride
from probekit.evaluation.statistics import Resampling
from probekit.interventions.changes import Condition
from probekit.interventions.effects import Edit, Outcomes, Stage
from probekit.interventions.kinds import KINDS, PLAN, Site
from probekit.interventions.measures import Sums, changes, follows, rows
from probekit.interventions.moments import moments_at
from probekit.interventions.readout import READOUT, last_probe
from probekit.interventions.sampling import Writer
from probekit.interventions.scenes import draw_scenes
from probekit.models.conditioning import CONDITIONINGS
from probekit.models.language_model import OUTSIDE_BLOCKS, check_location
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import Place, Reader
from probekit.probing.grid import Grid, make_grid
from probekit.probing.locations import per_layer
from probekit.probing.targets import find_target
from probekit.progress import Progress
from probekit.run import Run
from probekit.storage import atomic_folder, write_json
from probekit.table_files import write_table

TYPES = {"condition": "str", "strength": "float64", "layer": "Int64"}
"""Types of columns that may be empty."""


@dataclass(frozen=True)
class InterventionResults:
    """What interventions do.

    Attributes:
        table: One row for each kind, condition, strength, location, layer, distance and metric, with its 95 %
            interval from resampling documents, one scene each. Metrics are changes against the same scenes
            left alone: `next_loss`, `rest_loss` and `other_loss` (nats a token, of the next sentence, of it
            without its first token, and of what is behind it), `first_kl` and `readout_kl` (nats, from the
            LM's distribution over the next token, and from a probe's over the next action in the last layer),
            `readout_true` and `readout_target` (that probe's probability of the true action, and of the one
            that was aimed at). `next_loss_over_random` and the like are differences from a control on the
            same scenes. `moved` is by what share of their norm activations were moved. `fitted_accuracy`,
            `refitted_accuracy` and `prior_accuracy` tell what a linear probe reads before and after erasing,
            which takes `erased_dimensions` away: with as many actions as the LM is wide, all.
            `plan_following` is the share of sentences written anew that have the action aimed at,
            `plan_following_unedited` the same without the edit.

            `readout_direct` marks edits of the very activation that the last layer's probe reads: there the
            readout tells what was put in, and not what the LM makes of it. `injected` marks edits where the
            adapter has told the LM of the next sentence's action already.
        folder: Where it was written.
        notes: What to know of all rows together.
    """

    table: pd.DataFrame
    folder: Path
    notes: list[str] = field(default_factory=list)


def intervene(
    run: Run | str | Path, settings: Mapping[str, Any] | None = None, *, quiet: bool = False
) -> InterventionResults:
    """Intervenes in a probed run; writes `interventions/<variant>/`, in place of what was there.

    Erasers and directions are fitted on the split "probe"; the scenes are test documents, one sentence
    boundary of each, and the same ones for every row.

    Args:
        run: The run or its folder; its probes are needed.
        settings: Settings to replace, by dotted name, such as `intervene.layers`.
        quiet: Show no progress.

    Raises:
        ProbekitError: The run has no probes that fit, or a setting does not fit the LM.
    """
    run = Run.at(run, settings)
    run.require("lm")
    chosen, progress = run.config.intervene, Progress(quiet=quiet)
    places = _places(run, chosen)
    readout = last_probe(run, chosen.variant)
    window, _ = window_and_stride(run)
    reach = max(chosen.distances)
    scenes = draw_scenes(
        run.corpus, run.corpus.documents("test"), chosen.scenes, window, reach, run.config.seed
    )
    grid = _grid(run, chosen)
    stage = Stage(run, chosen.variant, scenes, places, readout)
    _check_plan(stage, chosen)
    writer = Writer(run, stage, chosen.samples, window) if chosen.samples else None
    trial = _Trial(run, stage, writer, _told_at(run, chosen, places))
    found: list[dict[str, Any]] = []
    with progress.task("intervene", total=_passes(chosen, places)) as task:
        for site in _sites(run, stage, places, grid, progress):
            for kind in chosen.kinds:
                if (kind == "codebook") == (site.place is None):
                    found += trial.rows(kind, site)
                    task.advance()
    table = pd.DataFrame(found).astype(TYPES).assign(variant=chosen.variant)
    results = InterventionResults(
        table, run.folder / "interventions" / chosen.variant, _notes(run, len(scenes))
    )
    with atomic_folder(results.folder) as folder:
        write_table(folder / "results.parquet", results.table)
        write_json(folder / "settings.json", run.config.model_dump(mode="json") | {"notes": results.notes})
    return results


class _Trial:
    """Tries conditions on the scenes, and on the same scenes left alone."""

    def __init__(self, run: Run, stage: Stage, writer: Writer | None, told: set[Place]) -> None:
        self._run, self._stage, self._writer, self._told = run, stage, writer, told
        self._resampling: Resampling = {
            "resamples": run.config.evaluation.resamples,
            "seed": run.config.seed,
        }
        self._plain = stage.play()
        self._written = None if writer is None else writer.actions()

    def rows(self, kind: str, site: Site) -> list[dict[str, Any]]:
        """Every metric of every condition of a kind at a site."""
        measured, true = KINDS[kind](self._run, self._stage, site), self._stage.scenes.action
        found: list[dict[str, Any]] = []
        one = np.ones(len(true))
        # What is known without running the LM is told once, of the first condition.
        known: Sums = {name: (values, one) for name, values in measured.sums.items()}
        for strength in dict.fromkeys(condition.strength for condition in measured.conditions):
            conditions = [c for c in measured.conditions if c.strength == strength]
            outcomes = {c.name: self._played(kind, site, c) for c in conditions}
            written = self._rewritten(site, conditions)
            for condition in conditions:
                sums = known | changes(condition, self._plain, outcomes, true)
                if self._written is not None and written:
                    sums |= follows(condition, self._written, written)
                head = self._head(kind, site, condition)
                found += rows(head, sums, condition.scenes, self._resampling)
                known = {}
        return found

    def _head(self, kind: str, site: Site, condition: Condition) -> dict[str, Any]:
        location, layer = site.place or (PLAN, None)
        return {
            "kind": kind,
            "condition": condition.name,
            "strength": condition.strength,
            "location": location,
            "layer": layer,
            "distance": site.distance,
            "readout_direct": site.place == (READOUT, self._run.bridged.cfg.n_layers - 1)
            and 1 in site.distances,
            "injected": site.place is None or (site.place in self._told and 1 in site.distances),
        }

    def _played(self, kind: str, site: Site, condition: Condition) -> Outcomes:
        outcomes = self._stage.play(Edit(site.place, site.distances, condition.change))
        seen = (outcomes.next_loss, outcomes.other_loss, outcomes.moved)
        if all(np.isfinite(values).all() for values in seen):
            return outcomes
        remedy = ""
        if condition.strength is not None:
            remedy = f"; lower intervene.strengths, which has {condition.strength:g}"
        location, layer = site.place or (PLAN, None)
        raise ProbekitError(
            f"{kind} ({condition.name}) at {location}, layer {layer}, moves activations, or makes the loss, "
            f"beyond what numbers can tell{remedy}"
        )

    def _rewritten(self, site: Site, conditions: Sequence[Condition]) -> dict[str, np.ndarray]:
        """The actions of sentences written under conditions that aim at one."""
        if self._writer is None or any(condition.target is None for condition in conditions):
            return {}
        return {c.name: self._writer.actions(Edit(site.place, site.distances, c.change)) for c in conditions}


def _sites(run: Run, stage: Stage, places: Sequence[Place], grid: Grid, progress: Progress) -> Iterator[Site]:
    """Where something is changed, one site at a time; the plan, which is no place, last."""
    chosen = run.config.intervene
    if set(chosen.kinds) != {"codebook"}:
        moments = moments_at(run, chosen.variant, places, grid, progress)
        for place in places:
            seen = dict(zip(grid.distances, stage.activations(place, grid.distances), strict=True))
            for far in sorted(chosen.distances):
                reached = tuple(range(1, far + 1)) if chosen.span else (far,)
                sums = {distance: moments[place, distance] for distance in reached}
                yield Site(place, reached, sums, {distance: seen[distance] for distance in reached})
    if "codebook" in chosen.kinds:
        yield Site(None, (1,), {}, {})


def _passes(chosen: InterventionSettings, places: Sequence[Place]) -> int:
    """How many kinds are tried at how many sites."""
    local = [kind for kind in chosen.kinds if kind != "codebook"]
    return len(places) * len(set(chosen.distances)) * len(local) + (len(local) < len(chosen.kinds))


def _grid(run: Run, chosen: InterventionSettings) -> Grid:
    """The examples that erasers and directions are fitted on, at every distance that is changed."""
    farthest = max(chosen.distances)
    distances = tuple(range(1, farthest + 1)) if chosen.span else tuple(sorted(set(chosen.distances)))
    probing = run.config.probe.model_copy(
        update={"distances": distances, "horizons": (1,), "anchors": "sentence"}
    )
    grid = make_grid(run.corpus, probing, find_target(run.corpus, "action"), run.config.seed)
    if missing := sorted({*distances} - {*grid.distances}):
        raise ProbekitError(
            f"intervene.distances goes to {farthest}, but too few sentences begin behind so many tokens "
            f"that something can be fitted at distance {missing[0]}; give less"
        )
    return grid


def _places(run: Run, chosen: InterventionSettings) -> list[Place]:
    """Every location at every layer of the settings; one outside the blocks at the layer beside it."""
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
    beside = dict(zip(OUTSIDE_BLOCKS, (0, layers - 1), strict=True))
    return [
        (location, layer)
        for location in dict.fromkeys(chosen.locations)
        for layer in (
            dict.fromkeys(chosen.layers or range(layers)) if per_layer(location) else [beside[location]]
        )
    ]


def _check_plan(stage: Stage, chosen: InterventionSettings) -> None:
    if "codebook" in chosen.kinds and stage.codebook is None:
        raise ProbekitError(
            f"intervene.kinds has 'codebook', but variant {chosen.variant!r} is told no actions; choose an "
            "intervene.variant that is conditioned on them, such as soft"
        )


def _told_at(run: Run, chosen: InterventionSettings, places: Sequence[Place]) -> set[Place]:
    """The places at which the token before the next sentence has been told of its action."""
    if chosen.variant not in VARIANTS or not VARIANTS[chosen.variant].evaluation.needs_scores:
        return set()
    if CONDITIONINGS[run.config.conditioning.kind].lag:
        return set()
    return Reader(run, chosen.variant, places, (1,)).changed_by_conditioning()


def _notes(run: Run, scenes: int) -> list[str]:
    asked = run.config.intervene.scenes
    if scenes == asked:
        return []
    return [f"{scenes:,} scenes, for no more test documents have one; intervene.scenes asks for {asked:,}"]
