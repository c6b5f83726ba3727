"""`probekit intervene`: whether what probes read is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.causal.changes import KINDS, PLAN, Condition, Site
from probekit.causal.erasure import moments_at
from probekit.causal.scenes import Edit, Outcomes, Stage, draw_scenes
from probekit.config import GenerationSettings, InterventionSettings, VariantName
from probekit.data.windows import IGNORE, Batch, Windows
from probekit.errors import ProbekitError
from probekit.evaluation.action_metrics import NO_ACTION
from probekit.evaluation.perplexity import window_and_stride
from probekit.generation.generate import draw
from probekit.generation.labelling import Labeller
from probekit.io import atomic_folder, write_json, write_table
from probekit.models.conditioning import CONDITIONINGS
from probekit.models.language_model import OUTSIDE_BLOCKS, check_location
from probekit.models.mixing import VARIANTS
from probekit.models.replanning import Draft
from probekit.probing.activations import HookPoint, Reader
from probekit.probing.grid import Grid, make_grid
from probekit.probing.locations import per_layer
from probekit.probing.results import Cell, LinearProbe, SavedProbes, read_probe_record
from probekit.probing.targets import find_target
from probekit.progress import Progress
from probekit.run.run import Run
from probekit.statistics import Resampling, bootstrap_ratios

READOUT = "hook_resid_post"
"""Where, in the last layer, it reads."""


def last_probe(run: Run, variant: VariantName) -> tuple[HookPoint, LinearProbe]:
    """Where it reads, and the probe, as `probekit probe` left it.

    Raises:
        ProbekitError: The run has no such probe, or those of something else.
    """
    last = run.base_lm().layers - 1
    folder = run.folder / "probes"
    saved = SavedProbes(folder, variant, run.config.seed)
    probed = read_probe_record(run.folder).config.probe
    if (probed.target, probed.labels, probed.anchors) != ("action", None, "sentence"):
        raise ProbekitError(
            f"{folder} holds probes of {probed.target!r} before every {probed.anchors}, but "
            "interventions need those of the next sentence's action; run "
            f"`probekit probe {run.folder} --probe.variants {variant}`"
        )
    return (READOUT, last), saved[Cell(READOUT, last, 1)]


Sums = dict[str, tuple[np.ndarray, np.ndarray]]
"""By metric its sums and counts `[scenes]`."""


def changes(condition: Condition, plain: Outcomes, changed: Mapping[str, Outcomes], true: np.ndarray) -> Sums:
    """What a condition changes in every scene, against the scene left alone and against other conditions.

    Args:
        condition: The condition.
        plain: The scenes left alone.
        changed: What was seen under every condition of the site, by name.
        true: The true actions `[scenes]`.
    """
    now, scenes = changed[condition.name], np.arange(len(true))
    one = np.ones(len(true))
    read = np.exp(now.readout) - np.exp(plain.readout)
    rest = plain.next_tokens - 1
    sums: Sums = {
        "next_loss": (now.next_loss - plain.next_loss, plain.next_tokens),
        "rest_loss": (_rest(now) - _rest(plain), rest),
        "other_loss": (now.other_loss - plain.other_loss, plain.other_tokens),
        "first_kl": (_kl(plain.first, now.first), one),
        "readout_kl": (_kl(plain.readout, now.readout), one),
        "readout_true": (read[scenes, true], one),
        "moved": (now.moved, now.norm),
    }
    if condition.target is not None:
        sums["readout_target"] = (read[scenes, condition.target], one)
    for name, called in condition.beside.items():
        control, over = changed[name], f"over_{called.replace(' ', '_')}"
        sums[f"next_loss_{over}"] = (now.next_loss - control.next_loss, plain.next_tokens)
        sums[f"rest_loss_{over}"] = (_rest(now) - _rest(control), rest)
    return sums


def follows(condition: Condition, plain: np.ndarray, changed: Mapping[str, np.ndarray]) -> Sums:
    """How many of the sentences written anew have the action that they were moved to.

    Args:
        condition: The condition.
        plain: The action of each sentence that was written without an edit `[scenes]`.
        changed: The same under every condition of the site, by name.
    """
    if condition.target is None:
        return {}
    target, one = condition.target[: len(plain)], np.ones(len(plain))
    hit = (changed[condition.name] == target).astype(float)
    sums: Sums = {
        "plan_following": (hit, one),
        "plan_following_unedited": ((plain == target).astype(float), one),
    }
    for name, called in condition.beside.items():
        if called == "random":
            sums["plan_following_over_random"] = (hit - (changed[name] == target), one)
    return sums


def rows(head: Mapping[str, Any], sums: Sums, there: np.ndarray | None, resampling: Resampling) -> list[dict]:
    """A row for each metric.

    Args:
        head: What all rows share.
        sums: The metrics; those of fewer scenes are of the first ones.
        there: Which scenes take part `[scenes]`; None for all.
        resampling: How intervals are made.
    """
    found = []
    for size in sorted({len(values) for values, _ in sums.values()}):
        own = {name: pair for name, pair in sums.items() if len(pair[0]) == size}
        part = np.ones(size) if there is None else there[:size].astype(float)
        values, counts = (
            np.stack([pair[which] for pair in own.values()], axis=1) * part[:, None] for which in (0, 1)
        )
        intervals = bootstrap_ratios(values, counts, **resampling)
        for number, metric in enumerate(own):
            interval = intervals[number]
            found.append(
                dict(head)
                | {"metric": metric, "value": interval.value}
                | {"value_low": interval.low, "value_high": interval.high, "documents": interval.documents}
            )
    return found


def _rest(outcomes: Outcomes) -> np.ndarray:
    """Loss of the next sentence without its first token, summed `[scenes]`."""
    return outcomes.next_loss - outcomes.first_loss


def _kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) of log-probabilities `[scenes, outcomes]`, in nats `[scenes]`."""
    there = np.isfinite(p)  # what is sure not to be costs nothing
    p, q = np.where(there, p, 0.0).astype(np.float64), np.where(there, q, 0.0).astype(np.float64)
    return (np.where(there, np.exp(p), 0.0) * (p - q)).sum(axis=1)


MOST_TOKENS = 24
"""A sentence that is not over after so many tokens is cut."""

DRAWN = GenerationSettings(temperature=1.0, top_k=None, top_p=None)
"""Tokens are drawn as the LM has them."""


class Writer:
    """Writes the next sentence of some scenes anew.

    The edit holds its positions while the text grows, and every token reads the whole window again. What is
    drawn for a scene depends on the seed and its number alone, so that edits are compared on equal draws.

    Args:
        run: The run.
        stage: What runs its LM on the scenes.
        count: Of how many scenes, the first ones.
        window: Tokens that are read at once.
    """

    def __init__(self, run: Run, stage: Stage, count: int, window: int) -> None:
        self._run, self._stage = run, stage
        self._rows = np.arange(min(count, len(stage.scenes)))
        self._labeller = Labeller(run)
        self._most = min(MOST_TOKENS, window - int(stage.scenes.column[self._rows].max()))
        special = {*run.corpus.tokenizer.all_special_ids}
        self._drawable = torch.tensor([n not in special for n in range(len(run.corpus.tokenizer))])

    def actions(self, edit: Edit | None = None) -> np.ndarray:
        """The action of the sentence that is written in each scene `[scenes]`; none for a blank one."""
        written = [text for rows in self._stage.batches(self._rows) for text in self._write(rows, edit)]
        contexts = [self._context(row) for row in self._rows.tolist()]
        cut = self._labeller.cut(written, [self._most], contexts)[self._most]
        return np.array([own[0] if len(own) else NO_ACTION for own in cut.actions], np.int64)

    def _context(self, row: int) -> np.ndarray:
        """The tokens of a scene's window before the boundary, without the separator."""
        corpus, scenes = self._run.corpus, self._stage.scenes
        start = scenes.windows.start[row]
        end = start + scenes.column[row] + 1
        first = start + (start == corpus.document_tokens[scenes.windows.document[row]])
        return np.asarray(corpus.tokens[first:end], dtype=np.int64)

    def _write(self, rows: np.ndarray, edit: Edit | None) -> list[np.ndarray]:
        """The tokens of the next sentence of some scenes."""
        corpus, column = self._run.corpus, torch.from_numpy(self._stage.scenes.column[rows])
        drafts = [
            Draft([corpus.separator, *self._context(row)], corpus.tokenizer, self._run.config.corpus.language)
            for row in rows.tolist()
        ]
        going = list(range(len(rows)))
        uniforms = np.stack(
            [np.random.default_rng([self._run.config.seed, row]).random(self._most) for row in rows]
        )
        batch = self._begun(rows)
        for step in range(self._most):
            part = _first(batch, int(column.max()) + step + 1)
            seen = self._stage.predict(part, rows, edit)
            logits = seen.logits[torch.arange(len(rows)), column + step]
            tokens = self._drawn(logits.float(), torch.from_numpy(uniforms[:, step]))
            for number in going:
                drafts[number].text.tokens.append(int(tokens[number]))
                drafts[number].read()
            going = [n for n in going if len(drafts[n].sentences) <= drafts[n].first]
            if not going or step + 1 == self._most:
                break
            batch.tokens[torch.arange(len(rows)), column + step + 1] = tokens
        return [np.array(draft.written, dtype=np.int64) for draft in drafts]

    def _begun(self, rows: np.ndarray) -> Batch:
        """The windows up to the boundary, with room for the sentence, which every new token belongs to."""
        scenes = self._stage.scenes
        column = scenes.column[rows]
        windows = scenes.windows[rows]
        batch = self._stage.read(Windows(windows.document, windows.start, column + 1, column + 1))
        device = batch.tokens.device
        more = (0, int(column.max()) + self._most - batch.tokens.shape[1])
        at = torch.from_numpy(column).to(device)[:, None]
        tokens, sentence = (torch.nn.functional.pad(part, more) for part in (batch.tokens, batch.sentence))
        behind = torch.arange(tokens.shape[1], device=device) > at
        sentence = torch.where(behind, batch.sentence.gather(1, at), sentence)
        return replace(batch, tokens=tokens, sentence=sentence, targets=torch.full_like(tokens, IGNORE))

    def _drawn(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """A token of each scene; special ones and rows of the embedding that no token has are never drawn."""
        drawable = self._drawable[: logits.shape[1]].to(logits.device)
        known = logits[:, : len(drawable)].masked_fill(~drawable, -torch.inf)
        return draw(known, uniforms.to(logits.device), DRAWN)


def _first(batch: Batch, length: int) -> Batch:
    """A batch's first positions; what is written into its tokens is seen."""
    parts = {name: getattr(batch, name)[:, :length] for name in ("tokens", "sentence", "targets")}
    return replace(batch, **parts)


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

    def __init__(self, run: Run, stage: Stage, writer: Writer | None, told: set[HookPoint]) -> None:
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
            "readout_direct": site.place == (READOUT, self._run.base_lm().layers - 1) and 1 in site.distances,
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


def _sites(
    run: Run, stage: Stage, places: Sequence[HookPoint], grid: Grid, progress: Progress
) -> Iterator[Site]:
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


def _passes(chosen: InterventionSettings, places: Sequence[HookPoint]) -> int:
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


def _places(run: Run, chosen: InterventionSettings) -> list[HookPoint]:
    """Every location at every layer of the settings; one outside the blocks at the layer beside it."""
    layers = run.base_lm().layers
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


def _told_at(run: Run, chosen: InterventionSettings, places: Sequence[HookPoint]) -> set[HookPoint]:
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
