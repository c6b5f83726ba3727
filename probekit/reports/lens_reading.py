"""What the lens shows of a text, as numbers: what probes read at each token, what is true and planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.config import Config, ProbedName, ProbeSettings, VariantName
from probekit.data.codebook import Codebook, nearest_sentences
from probekit.data.corpus import SPLITS, Corpus, too_few
from probekit.errors import ProbekitError
from probekit.models.conditioning import CONDITIONINGS
from probekit.models.mixing import VARIANTS
from probekit.probing.activations import HookPoint, Reader
from probekit.probing.locations import label, per_layer
from probekit.probing.results import (
    LINEAR_SOLVERS,
    Cell,
    LinearProbe,
    SavedProbes,
    SplitDocuments,
    read_probe_record,
)
from probekit.probing.targets import Examples
from probekit.progress import Progress, Task
from probekit.reports.lens_text import LIMIT, Text, TextRun, cut_text
from probekit.run.run import Run

BASELINES = ("prior", "bigram", "planner")
"""Readers that stand beside a probe's accuracy."""


@dataclass(frozen=True)
class Quality:
    """How good a reader is on test documents.

    Attributes:
        accuracy: Share of sentences whose action it names, with its 95 % interval.
        documents: Test documents that were resampled.
        examples: Sentences.
        injected: Whether the readings had been told of the target's own action.
    """

    accuracy: tuple[float, float, float]
    documents: int
    examples: int
    injected: bool = False


@dataclass(frozen=True)
class KeptProbes:
    """Probes for the next sentence's action, of one variant, seed and solver.

    Attributes:
        variant: Whose activations they read.
        seed: Of the documents drawn to fit on.
        solver: How they were fitted.
        places: Locations and layers, those of a location together.
        distances: Tokens before the sentence begins, rising; every place has all.
        config: Settings that they were fitted with.
        documents: Documents of each split that they were fitted on, chosen on and tested on.
        quality: Of every cell, in the order of `cells`.
        baselines: By name, of every distance.
        best: Number of the cell that is best on validation documents, among those that nothing was told.
    """

    variant: ProbedName
    seed: int
    solver: str
    places: list[HookPoint]
    distances: list[int]
    config: Config
    documents: SplitDocuments
    quality: list[Quality]
    baselines: dict[str, list[Quality]]
    best: int
    _saved: SavedProbes

    def at(self, place: HookPoint) -> LinearProbe:
        """The probes of a place for all distances: `coef` `[distances, width, actions]`."""
        location, layer = place
        return self._saved.stacked(
            [Cell(location, layer, distance, 1, self.solver) for distance in self.distances]
        )


def kept_probes(
    run: Run,
    variant: str | None = None,
    locations: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> KeptProbes:
    """The probes of a run that the lens reads with: those for the next sentence, of the first seed.

    Args:
        run: The run.
        variant: Whose; None: the first one that was probed.
        locations: Only these.
        layers: Only these, at locations that every layer has.

    Raises:
        ProbekitError: The run has none, or none of that variant, location or layer; it says which command
            makes them.
    """
    folder = run.folder / "probes"
    seeds = _kept_seeds(run)
    record = read_probe_record(run.folder)
    probed = record.config.probe
    _check_target(run, probed)
    known = [name for name in probed.variants if name in seeds and str(seeds[name]) in record.documents]
    if not known:
        raise ProbekitError(
            f"{folder} keeps probes of {', '.join(sorted(seeds))}, of which its settings.json does not tell; "
            f"run `probekit probe {run.folder}`"
        )
    variant = known[0] if variant is None else variant
    if variant not in known:
        raise ProbekitError(
            f"--variant is {variant!r}, of which {folder} keeps no linear probes; it has {', '.join(known)}; "
            f"for others run `probekit probe {run.folder} --probe.variants ...`"
        )
    saved, seed = SavedProbes(folder, variant, seeds[variant]), seeds[variant]
    cells = [cell for cell in saved.cells if cell.horizon == 1]
    solver = next((solver for solver in LINEAR_SOLVERS if solver in {cell.solver for cell in cells}), None)
    if solver is None:
        raise ProbekitError(
            f"the probes in {folder} have no horizon 1; run `probekit probe {run.folder} --probe.horizons 1`"
        )
    found = sorted({(cell.location, cell.layer) for cell in cells})
    order = dict.fromkeys([*probed.locations, *(location for location, _ in found)])
    there = [place for location in order for place in found if place[0] == location]
    places = _chosen(there, locations, layers)
    distances = sorted({cell.distance for cell in cells})
    rows = run.probes().query("horizon == 1")
    own = rows.query("reader == 'probe' and variant == @variant and solver == @solver and seed == @seed")
    own = own.set_index(["location", "layer", "distance"])
    own = own.loc[[(*place, distance) for place in places for distance in distances]]
    untold = own.validation_cross_entropy.where(~own.injected).fillna(float("inf")).to_numpy()
    return KeptProbes(
        variant,
        seed,
        solver,
        places,
        distances,
        record.config,
        record.documents[str(seed)],
        _qualities(own),
        {
            name: _qualities(baseline.set_index("distance").loc[distances])
            for name in BASELINES
            if len(baseline := rows[rows.reader == name])
        },
        int(untold.argmin()),
        saved,
    )


def _kept_seeds(run: Run) -> dict[str, int]:
    """The lowest seed of each variant whose linear probes are kept."""
    seeds: dict[str, int] = {}
    for path in (run.folder / "probes").glob("*-seed*.safetensors"):
        variant, _, seed = path.stem.rpartition("-seed")
        seeds[variant] = min(int(seed), seeds.get(variant, int(seed)))
    if not seeds:
        raise ProbekitError(f"{run.folder} keeps no linear probes; run `probekit probe {run.folder}`")
    return seeds


def _check_target(run: Run, probed: ProbeSettings) -> None:
    if (probed.target, probed.labels, probed.anchors) != ("action", None, "sentence"):
        raise ProbekitError(
            f"the probes of {run.folder} read {probed.target!r} at every {probed.anchors}, but the "
            "lens shows what is read of the next sentence's action; run "
            f"`probekit probe {run.folder} --probe.target action --probe.anchors sentence`"
        )


def _chosen(
    there: list[HookPoint], locations: Sequence[str] | None, layers: Sequence[int] | None
) -> list[HookPoint]:
    """The places that are asked for."""
    _check_known("--locations", locations, sorted({location for location, _ in there}))
    _check_known("--layers", layers, sorted({layer for _, layer in there}))
    chosen = [
        (location, layer)
        for location, layer in there
        if (locations is None or location in locations)
        and (layers is None or layer in layers or not per_layer(location))
    ]
    if not chosen:
        raise ProbekitError("--locations and --layers together leave no place that a probe reads; give one")
    return chosen


def _check_known(option: str, asked: Sequence[Any] | None, known: Sequence[Any]) -> None:
    if unknown := [value for value in asked or () if value not in known]:
        there = ", ".join(map(str, known))
        raise ProbekitError(f"{option} has {unknown[0]!r}, where no probe reads; there are {there}")


def _qualities(rows: pd.DataFrame) -> list[Quality]:
    accuracy = rows[["accuracy", "accuracy_low", "accuracy_high"]].to_numpy().tolist()
    others = (rows[name].tolist() for name in ("documents", "examples", "injected"))
    return [Quality(tuple(triple), *more) for triple, *more in zip(accuracy, *others, strict=True)]


PLANNED = 5
"""How many of the planner's actions are shown."""

EXAMPLES = 3
"""Sentences that show what an action is; fewer where they are alike."""

NONE = -1
"""Where there is no action."""


@dataclass(frozen=True)
class Forecast:
    """What the planner expects of every sentence, from those before it.

    Attributes:
        top: The most probable actions `[sentences + 1, PLANNED]`.
        probability: Their probabilities `[sentences + 1, PLANNED]`.
        true: The probability of the true action `[sentences]`.
    """

    top: np.ndarray
    probability: np.ndarray
    true: np.ndarray


@dataclass(frozen=True)
class Told:
    """What the LM was told of every sentence, where the variant is conditioned.

    Attributes:
        action: The one with the most weight in the mix `[sentences + 1]`.
        weight: Its weight `[sentences + 1]`.
        carried: The sentence of whose plan the LM has been told last at each token `[tokens]`.
        planned: Whether a planner chose; else it is the same whatever the text.
        changed: Whether the reading of a place has been told of it at the token itself `[places]`.
    """

    action: np.ndarray
    weight: np.ndarray
    carried: np.ndarray
    planned: bool
    changed: list[bool]


@dataclass(frozen=True)
class LensData:
    """A text as the lens shows it.

    Cells are numbered place by place and, within a place, distance by distance. Sentence number `sentences`
    is the one that comes after the text, of which nothing is true yet.

    Attributes:
        facts: What was read by what, in words.
        language: Of the text.
        probes: Those that read.
        labels: Short name of each place's location.
        pieces: The text that each token adds `[tokens]`.
        first_token: Each sentence's first token `[sentences]`.
        truth: Where true actions come from, in a sentence.
        actions: True actions, -1 where the encoder makes nothing of a sentence `[sentences]`.
        over: Whether the last sentence is over.
        top: The most probable action `[cells, tokens]`.
        probability: Its probability `[cells, tokens]`.
        true_probability: That of the next sentence's true action; NaN where no sentence follows
            `[cells, tokens]`.
        planner: What the planner expects, or None.
        told: What the LM was told, or None.
        examples: The training sentences nearest to each action that occurs.
        notes: What a reader of the page is to know of the text.
    """

    facts: dict[str, str]
    language: str
    probes: KeptProbes
    labels: list[str]
    pieces: list[str]
    first_token: np.ndarray
    truth: str
    actions: np.ndarray
    over: bool
    top: np.ndarray
    probability: np.ndarray
    true_probability: np.ndarray
    planner: Forecast | None
    told: Told | None
    examples: Mapping[int, list[str]]
    notes: list[str]


def read_text(
    run: Run,
    text: str,
    variant: str | None = None,
    *,
    locations: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    limit: int = LIMIT,
    progress: Progress | None = None,
) -> LensData:
    """Reads a text with a run's probes at every token.

    As in probing, each token is read in the window that scores the one behind it.

    Args:
        run: The run.
        text: The text.
        variant: Whose activations; None: those of the first variant that was probed.
        locations: Read only these.
        layers: Read only these.
        limit: The most tokens.
        progress: Told how far it is.

    Raises:
        ProbekitError: The run has no such probes, or the text is blank or too long.
    """
    probes = kept_probes(run, variant, locations, layers)
    used = probes.config.evaluation
    windows = {"evaluation.window": used.window, "evaluation.stride": used.stride}
    run.require("lm")
    _ = run.locations  # loaded here, it stays with the caller's run for the next text
    run = run.with_settings(windows)
    progress = progress or Progress(quiet=True)
    with progress.task("cut the text"):
        # Random weights are told nothing, as the base LM is not.
        planned_for: VariantName = "none" if probes.variant == "random" else probes.variant
        cut = cut_text(run, text, planned_for, limit)
    alone = TextRun(run, cut)
    tokens = np.arange(len(cut.pieces))
    following = np.searchsorted(cut.first_token, tokens, side="right")
    true = np.append(np.where(cut.known, cut.actions, NONE), NONE)[following]
    reader = Reader(alone, probes.variant, probes.places, [0], probes.seed)
    with progress.task("read the text", total=len(tokens)) as task:
        top, probability, true_probability = _read(probes, reader, true, task)
    scores = _scores(alone, planned_for, cut)
    planner = None if scores is None else _forecast(scores, cut.actions)
    told = _told(alone, probes, reader, scores, cut)
    shown = [cut.actions, top] + ([] if planner is None else [planner.top])
    shown += [] if told is None else [told.action]
    with progress.task("find the sentences nearest to the actions"):
        examples = _examples(run.corpus, np.unique(np.concatenate([np.ravel(part) for part in shown])))
    return LensData(
        facts=_facts(run, probes),
        language=run.config.corpus.language,
        probes=probes,
        labels=[label(location) for location, _ in probes.places],
        pieces=cut.pieces,
        first_token=cut.first_token,
        truth=_truth(run.corpus, cut),
        actions=np.where(cut.known, cut.actions, NONE),
        over=cut.over,
        top=top,
        probability=probability,
        true_probability=true_probability,
        planner=planner,
        told=told,
        examples=examples,
        notes=_notes(cut),
    )


def _truth(corpus: Corpus, cut: Text) -> str:
    """Where true actions come from."""
    if cut.document is None:
        return "A sentence's true action is the one whose centre is nearest to it."
    split = SPLITS[corpus.split[cut.document]]
    return (
        f"The text is document {cut.document:,} of the corpus, of the split {split!r}: a sentence's true "
        "action is the one that the corpus has of it."
    )


def _notes(cut: Text) -> list[str]:
    """What a reader of the page is to know of the text."""
    if cut.known.all():
        return []
    return [
        f"{int((~cut.known).sum())} of {len(cut.known)} sentences have no word that the corpus's encoder "
        "knows: their actions mean nothing, and none is told as true"
    ]


def _every_token(tokens: int) -> Examples:
    """Every token of the text as an anchor that is read at itself; the separator is none."""
    zeros = np.zeros(tokens, np.int64)
    return Examples(zeros, 1 + np.arange(tokens), zeros, np.zeros((tokens, 1), np.int64))


def _read(
    probes: KeptProbes, reader: Reader, true: np.ndarray, task: Task
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every cell reads at every token, given the next sentence's true action there `[tokens]`.

    Returns:
        The most probable action, its probability, and that of the true action, each `[cells, tokens]`.
    """
    parts = []
    for part, blocks in reader.chunks(_every_token(len(true))):
        at = {
            place: values[0]
            for block, places in zip(reader.stacks, blocks, strict=True)
            for place, values in zip(block.points, places, strict=True)
        }
        parts.append(_read_chunk(probes, at, torch.from_numpy(true[part])))
        task.advance(part.stop - part.start)
    top, probability, of_true = (np.concatenate(columns, axis=1) for columns in zip(*parts, strict=True))
    return top, probability, of_true


def _read_chunk(
    probes: KeptProbes, activations: Mapping[tuple[str, int], Tensor], true: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of some tokens, given activations `[tokens, width]` of each place."""
    read = []
    for place in probes.places:
        values, probe = activations[place], probes.at(place)
        probe = type(probe)(probe.coef.to(values.device), probe.intercept.to(values.device))
        probabilities = probe.log_probabilities(values).exp().cpu()
        highest = probabilities.max(dim=-1)
        own = true.clamp(min=0).expand(len(probabilities), -1)[..., None]
        right = probabilities.gather(-1, own)[..., 0].masked_fill(true == NONE, torch.nan)
        read.append((highest.indices, highest.values, right))
    top, probability, of_true = (torch.cat(columns).numpy() for columns in zip(*read, strict=True))
    return top, probability, of_true


def _scores(run: TextRun, variant: VariantName, cut: Text) -> Tensor | None:
    """The planner's scores of every sentence and of the one behind them `[sentences + 1, actions]`."""
    if not run.finished("planner"):
        return None
    planner = run.planner(variant)
    embeddings = torch.from_numpy(np.pad(cut.embeddings, ((0, 1), (0, 0)))).to(run.device)
    with torch.no_grad():
        return planner(embeddings[None])[0].cpu()


def _forecast(scores: Tensor, actions: np.ndarray) -> Forecast:
    probabilities = scores.softmax(dim=-1)
    best = probabilities.sort(dim=-1, descending=True, stable=True)
    return Forecast(
        best.indices[:, :PLANNED].numpy(),
        best.values[:, :PLANNED].numpy(),
        probabilities[np.arange(len(actions)), actions].numpy(),
    )


def _told(run: TextRun, probes: KeptProbes, reader: Reader, scores: Tensor | None, cut: Text) -> Told | None:
    if (variant := probes.variant) not in VARIANTS:
        return None
    mixing = VARIANTS[variant].evaluation
    sentences = torch.zeros(len(cut.actions) + 1, dtype=torch.long)
    # Mixing the rows of an identity matrix gives the weights of the actions.
    weights = mixing(
        torch.empty(0) if scores is None else scores,
        sentences,
        torch.eye(run.corpus.k),
        run.temperature(variant),
    )
    changed = reader.changed_by_conditioning() if mixing.needs_scores else set()
    lag = CONDITIONINGS[run.config.conditioning.kind].lag
    predicted = np.arange(len(cut.pieces)) + 1 - lag
    weight, action = weights.max(dim=-1)
    return Told(
        action.numpy(),
        weight.numpy(),
        np.searchsorted(run.corpus.first_token - 1, predicted, side="right") - 1,
        mixing.needs_scores,
        [place in changed for place in probes.places],
    )


def _examples(corpus: Corpus, actions: np.ndarray) -> dict[int, list[str]]:
    """The training sentences nearest to each of some actions, no two alike."""
    train = np.zeros(len(corpus.first_token), bool)
    train[corpus.sentences(corpus.documents("train"))] = True
    # What is not of the training split gets an action of its own, so that embeddings need not be copied.
    labels = np.where(train, corpus.actions, corpus.k)
    centroids = np.pad(corpus.codebook.centroids, ((0, 1), (0, 0)))
    nearest = nearest_sentences(corpus.embeddings, labels, Codebook(centroids), 2 * EXAMPLES)
    texts = {int(action): corpus.sentence_texts(nearest[action][nearest[action] >= 0]) for action in actions}
    return {action: list(dict.fromkeys(found))[:EXAMPLES] for action, found in texts.items()}


def _facts(run: Run, probes: KeptProbes) -> dict[str, str]:
    lm, corpus = run.config.lm, run.config.corpus
    documents = probes.documents
    return {
        "Run": run.folder.resolve().name,
        "Variant": probes.variant,
        "Model": lm.name or f"new GPT-2, {lm.layers} layers of width {lm.width}",
        "Corpus": corpus.path or f"{corpus.reader} ({run.corpus.facts['documents']:,} documents)",
        "Probes": f"{probes.solver}, seed {probes.seed}, for one of {run.corpus.k:,} actions; fitted on "
        f"{documents.probe:,} documents, chosen on {documents.validation:,}, tested on "
        f"{documents.test:,}",
    } | ({"Beware": few} if (few := too_few(documents.test)) else {})
