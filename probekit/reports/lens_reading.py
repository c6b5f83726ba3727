"""What the lens shows, as numbers: what a run's probes, and the LM itself, read at every token of a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probekit.config import VariantName
from probekit.data.codebook import nearest_sentences
from probekit.data.corpus import Corpus, too_few
from probekit.data.tokenizer import decoded
from probekit.errors import ProbekitError
from probekit.models.conditioning import CONDITIONINGS
from probekit.models.locations import RESIDUAL, hook_name, label
from probekit.models.mixing import VARIANTS
from probekit.models.unembedding import Unembedding, find_unembedding, rows_at_once
from probekit.probing.activations import ActivationReader, HookPoint
from probekit.probing.targets import NO_LABEL, Examples
from probekit.probing.vectors import Candidates, sentence_candidates
from probekit.progress import Progress, Task
from probekit.reports.display import shortened
from probekit.reports.lens_probes import KeptProbes, kept_probes
from probekit.reports.lens_text import LIMIT, Text, TextRun, Truth, cut_text, find_truth
from probekit.run.run import Run

RANKS = 3
"""How many of the most probable classes, and of the LM's next tokens, are shown."""

PLANNED = 5
"""How many of the planner's most probable actions are shown."""

EXAMPLES = 3
"""Sentences that illustrate an action; fewer where they have the same text."""

WORDS = 24
"""Characters of the short name of a sentence."""


@dataclass(frozen=True)
class Reading:
    """What is read of a text in the activations of one variant.

    Cells are numbered point by point and, within a point, position by position.

    Attributes:
        probes: The probes.
        read: What they read: the number, of two classes the probability of the second, of more those of the
            `RANKS` most probable ones; of embeddings the cosines of the nearest sentences of test documents.
            The last column is the reading of the mean of all tokens `[ranks, cells, tokens + 1]`.
        top: The classes (or sentences) that these are the probabilities (or cosines) of, if there are more
            than two; else empty `[ranks, cells, tokens + 1]`.
        of_true: Probability of the true class, or cosine to the true embedding; NaN where none is known, and
            of numbers `[cells, tokens]`.
        next: The LM's own next tokens by the logit lens, or None: `points`, the points with a residual
            stream; `tokens` and `probability`, `[points, RANKS, tokens]`.
        planner: The planner's forecast of every sentence from those before it, or None: `top` and
            `probability`, the most probable actions `[sentences + 1, PLANNED]`, and `true`, the probability
            of the true action `[sentences]`.
        conditioning: What the LM was conditioned on, or None: `action` and `weight`, the action with the
            largest weight in each sentence's mix `[sentences + 1]`; `carried`, the sentence whose plan the LM
            received last at each token `[tokens]`; `planned`, whether a planner chose it; `changed`, whether
            it changes the activation of each point at the token itself `[points]`.
    """

    probes: KeptProbes
    read: np.ndarray
    top: np.ndarray
    of_true: np.ndarray
    next: dict[str, Any] | None
    planner: dict[str, np.ndarray] | None
    conditioning: dict[str, Any] | None


@dataclass(frozen=True)
class LensData:
    """What the lens shows of a text.

    Attributes:
        facts: What was read with what, in words.
        language: Of the text.
        labels: Short name of each point's location.
        ids: The tokens `[tokens]`.
        pieces: The text that each token adds `[tokens]`.
        first_token: Each sentence's first token `[sentences]`.
        truth: What is known to be true.
        readings: What is read, of one variant or two.
        scale: The ends of the scale of numbers: the least and the largest that probes were fitted on.
        names: A short and a full name of each class that occurs.
        actions: The name of each action that occurs, be it a class or in a plan.
        examples: The training sentences nearest to each of these actions.
        words: Texts of the next tokens that occur, by id.
        notes: What to know of the text.
    """

    facts: dict[str, str]
    language: str
    labels: list[str]
    ids: list[int]
    pieces: list[str]
    first_token: np.ndarray
    truth: Truth
    readings: list[Reading]
    scale: tuple[float, float]
    names: Mapping[int, tuple[str, str]]
    actions: Mapping[int, str]
    examples: Mapping[int, list[str]]
    words: Mapping[int, str]
    notes: list[str]

    @property
    def probes(self) -> KeptProbes:
        """The probes of the first variant; those of another are of the same grid."""
        return self.readings[0].probes


def read_text(
    run: Run,
    text: str,
    variants: Sequence[str | None] = (None,),
    *,
    locations: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    limit: int = LIMIT,
    progress: Progress | None = None,
) -> LensData:
    """Reads a text with a run's probes at every token.

    As in probing, each token is read in the window that scores the one after it.

    Args:
        run: The run.
        text: The text.
        variants: Whose activations, one or two; None: those of the first variant that was probed.
        locations: Read only these.
        layers: Read only these.
        limit: The largest number of tokens.
        progress: Where progress is shown.

    Raises:
        ProbekitError: The run has no such probes, or the text is blank or too long.
    """
    names = [*map(str, variants)]
    if not 1 <= len({*names}) == len(names) <= 2:
        raise ProbekitError(f"--variant is {', '.join(names)}; give one, or two different ones")
    every = [kept_probes(run, variant, locations, layers) for variant in variants]
    probes, record = every[0], every[0].record
    run.require_causal()
    _ = run.locations  # loads the LM, which the caller's run keeps for the next text
    run = run.with_settings({"probe.window": record.config.probe.window})
    progress = progress or Progress(quiet=True)
    with progress.task("cut the text"):
        cuts = [cut_text(run, text, _planned_for(own), limit) for own in every]
        truth = find_truth(run, cuts[0], record, probes.positions, probes.horizon)
    notes: list[str] = []
    if run.corpus.facts.get("chats"):
        notes.append("The text is read as plain text, though the probes were fitted on chats.")
    readings = []
    candidates = sentence_candidates(run) if probes.of_embeddings else None
    for own, cut in zip(every, cuts, strict=True):
        sentences = None if candidates is None else _Sentences(candidates, cut)
        with progress.task(f"read the text in {own.variant}", total=len(cut.pieces)) as task:
            readings.append(_reading(TextRun(run, cut), own, cut, truth, sentences, notes, task))

    of_actions, classes, actions = probes.of_actions, [], []
    for reading in readings:
        classes += [reading.top]
        actions += [reading.conditioning["action"]] if reading.conditioning else []
        actions += [reading.planner["top"]] if reading.planner else []
    classes += [truth.labels, truth.of_sentences, np.arange(2 * (len(probes.classes) == 2))]
    occurring = _different(classes) if probes.classes or probes.of_embeddings else []
    examples = _examples(run.corpus, _different([*actions, *(classes if of_actions else [])]))
    named = {action: f"action {run.corpus.action_name(action)}" for action in examples}
    cut = cuts[0]
    if of_actions and not cut.known.all():
        notes.append(
            f"{int((~cut.known).sum())} of {len(cut.known)} sentences have no word that the corpus's encoder "
            "knows: their actions mean nothing, and are not shown as true"
        )
    read = readings[0].read
    following = _different([reading.next["tokens"] for reading in readings if reading.next])
    return LensData(
        facts=reading_facts(run, every),
        language=run.config.corpus.language,
        labels=[label(location) for location, _ in probes.points],
        ids=cut.corpus.tokens[1:-1].tolist(),
        pieces=cut.pieces,
        first_token=cut.first_token,
        truth=truth,
        readings=readings,
        scale=record.range or (float(read.min()), float(read.max())),
        names=_names(run.corpus, probes, cut, occurring, named),
        actions=named,
        examples=examples,
        words={token: decoded(run.corpus.tokenizer, [token]) for token in following},
        notes=[*dict.fromkeys(notes)],
    )


def _names(
    corpus: Corpus, probes: KeptProbes, cut: Text, occurring: Sequence[int], actions: Mapping[int, str]
) -> dict[int, tuple[str, str]]:
    """A short and a full name of classes; of sentences, their texts."""
    if probes.of_actions:
        return {number: (str(number), actions[number]) for number in occurring}
    if not probes.of_embeddings:
        return {number: (probes.classes[number],) * 2 for number in occurring}
    there = [number for number in occurring if number < len(corpus.first_token)]
    texts = dict(zip(there, corpus.sentence_texts(np.array(there, np.int64)), strict=True))
    spans = enumerate(pairwise([*cut.first_token, len(cut.pieces)]), cut.first_number)
    texts |= {number: "".join(cut.pieces[slice(*span)]) for number, span in spans if number in occurring}
    return {number: (shortened(text, WORDS), text) for number, text in texts.items()}


def _different(numbers: Iterable[np.ndarray]) -> list[int]:
    """All different numbers from 0 on."""
    flat = np.concatenate([np.ravel(part) for part in numbers] or [np.zeros(0)])
    return np.unique(flat[flat >= 0]).astype(int).tolist()


def _planned_for(probes: KeptProbes) -> VariantName:
    """Whose planner reads: an LM with random weights is not conditioned, like the base LM."""
    return "none" if probes.variant == "random" else probes.variant


def _reading(
    run: TextRun,
    probes: KeptProbes,
    cut: Text,
    truth: Truth,
    sentences: _Sentences | None,
    notes: list[str],
    task: Task,
) -> Reading:
    """Reads the text in one variant; adds to the notes."""
    reader = ActivationReader(run, probes.variant, probes.points, ["first"], probes.seed)
    residual = [number for number, (location, _) in enumerate(probes.points) if location in RESIDUAL]
    unembed = _unembedding(run, probes, residual, notes) if residual else None
    # Every token is an example; token 0 of the document is the separator.
    tokens = len(cut.pieces)
    zeros = np.zeros(tokens, np.int64)
    examples = Examples.of_tokens(zeros, 1 + np.arange(tokens), zeros, zeros[:, None])
    parts, following = [], []
    sums: dict[HookPoint, Tensor] = {}
    for rows, stacks in reader.chunks(examples):
        values = {
            point: of_point[0]
            for stack, points in zip(reader.stacks, stacks, strict=True)
            for point, of_point in zip(stack.points, points, strict=True)
        }
        parts.append(_outputs(probes, values, truth.labels[:, rows], sentences))
        if unembed is not None:
            of_points = [_next_tokens(unembed, values[probes.points[number]]) for number in residual]
            following.append([np.stack(part) for part in zip(*of_points, strict=True)])
        sums = {point: sums.get(point, 0) + own.double().sum(0, True) for point, own in values.items()}
        task.advance(rows.stop - rows.start)
    means = {point: (total / tokens).float() for point, total in sums.items()}
    of_mean = _outputs(probes, means, np.full((len(probes.positions), 1), np.nan), sentences)
    read, top, of_true = (np.concatenate(part, axis=-1) for part in zip(*parts, of_mean, strict=True))
    scores = _planner_scores(run, _planned_for(probes), cut)
    next_tokens: dict[str, Any] | None = None
    if unembed is not None:
        joined = (np.concatenate(part, axis=-1) for part in zip(*following, strict=True))
        next_tokens = dict(zip(("tokens", "probability"), joined, strict=True), points=residual)
    return Reading(
        probes,
        read,
        top,
        of_true[:, :-1],
        next_tokens,
        _forecast(scores, cut) if scores is not None and probes.of_actions else None,
        _conditioning(run, probes, reader, scores, cut),
    )


class _Sentences:
    """What predicted embeddings are compared with: sentences of test documents, and the text's own."""

    def __init__(self, candidates: Candidates, cut: Text) -> None:
        self._candidates = candidates
        self._own, self._first = cut.encodings, cut.first_number

    def compared(self, predicted: Tensor, true: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """What is read of embeddings; see `_outputs`.

        Args:
            predicted: Of every position `[positions, tokens, dimensions]`.
            true: Numbers of the true sentences `[positions, tokens]`.
        """
        flat = predicted.flatten(0, 1)
        rows, cosines = self._candidates.nearest(flat, RANKS)
        known = np.isfinite(true)
        of_true = np.full(true.shape, np.nan)
        own = self._own[true[known].astype(int) - self._first]
        of_true[known] = self._candidates.cosines(predicted[torch.from_numpy(known)], own)
        ranked = [torch.from_numpy(part.T.reshape(-1, *true.shape).copy()) for part in (cosines, rows)]
        return ranked[0].float(), ranked[1].float(), torch.from_numpy(of_true)


def _outputs(
    probes: KeptProbes,
    activations: Mapping[HookPoint, Tensor],
    true: np.ndarray,
    sentences: _Sentences | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What every cell says of tokens.

    Args:
        probes: The probes.
        activations: Of every point `[tokens, width]`.
        true: True labels `[positions, tokens]`, NaN where none is known.
        sentences: What embeddings are compared with.

    Returns:
        `read`, `top` and `of_true`, as in `Reading`.
    """
    known = torch.from_numpy(np.nan_to_num(true, nan=NO_LABEL)).long()
    found = []
    for point in probes.points:
        values, probe = activations[point], probes.at(point)
        probe = probe.to(values.device)
        scores = probe.scores(values).cpu()
        if sentences is not None:
            found.append(sentences.compared(scores, true))
            continue
        none = torch.empty(0, *known.shape)
        if not probes.classes:
            found.append((scores.movedim(-1, 0), none, torch.full(known.shape, torch.nan)))
            continue
        probabilities = scores.softmax(-1)
        wanted = known.clamp(min=0)[..., None]
        of_true = probabilities.gather(-1, wanted)[..., 0].masked_fill(known == NO_LABEL, torch.nan)
        if len(probes.classes) == 2:
            found.append((probabilities[..., 1][None], none, of_true))
            continue
        highest, best = probabilities.topk(min(RANKS, probabilities.shape[-1]))
        found.append((highest.movedim(-1, 0), best.movedim(-1, 0).float(), of_true))
    parts = [*zip(*found, strict=True)]
    return torch.cat(parts[0], 1).numpy(), torch.cat(parts[1], 1).numpy(), torch.cat(parts[2]).numpy()


def _unembedding(
    run: TextRun, probes: KeptProbes, residual: Sequence[int], notes: list[str]
) -> Unembedding | None:
    """What the logit lens reads some points with, or a note why there is none."""
    lm = run.frozen_lm(probes.variant, probes.seed)
    if lm.architecture.points([hook_name(*probes.points[number]) for number in residual]) is None:
        notes.append("no logit lens: only TransformerLens has these locations")
        return None
    try:
        return find_unembedding(lm, lm.plain)
    except ProbekitError as error:
        notes.append(f"no logit lens: {error}")
        return None


def _next_tokens(unembed: Unembedding, residual: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The most probable next tokens and their probabilities, each `[RANKS, tokens]`, of `[tokens, width]`."""
    with torch.no_grad():
        found = [unembed(part).softmax(-1).topk(RANKS) for part in residual.split(rows_at_once(unembed.head))]
    return (
        torch.cat([part.indices for part in found]).T.cpu().numpy(),
        torch.cat([part.values for part in found]).T.cpu().numpy(),
    )


def _planner_scores(run: TextRun, variant: VariantName, cut: Text) -> Tensor | None:
    """The planner's scores of every sentence and of the one after them `[sentences + 1, actions]`."""
    if not run.finished("planner"):
        return None
    embeddings = torch.from_numpy(np.pad(cut.embeddings, ((0, 1), (0, 0)))).to(run.device)
    with torch.no_grad():
        return run.planner(variant)(embeddings[None])[0].cpu()


def _forecast(scores: Tensor, cut: Text) -> dict[str, np.ndarray]:
    """The planner's forecast; see `Reading`."""
    chances = scores.softmax(dim=-1)
    best = chances.sort(dim=-1, descending=True, stable=True)
    return {
        "top": best.indices[:, :PLANNED].numpy(),
        "probability": best.values[:, :PLANNED].numpy(),
        "true": chances[np.arange(len(cut.actions)), cut.actions].numpy(),
    }


def _conditioning(
    run: TextRun, probes: KeptProbes, reader: ActivationReader, scores: Tensor | None, cut: Text
) -> dict[str, Any] | None:
    """What the LM was conditioned on; see `Reading`."""
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
    weight, action = weights.max(dim=-1)
    changed = reader.changed_by_conditioning() if mixing.needs_scores else set()
    predicted = np.arange(len(cut.pieces)) + 1 - CONDITIONINGS[run.config.conditioning.kind].lag
    return {
        "action": action.numpy(),
        "weight": weight.numpy(),
        "carried": np.searchsorted(run.corpus.first_token - 1, predicted, side="right") - 1,
        "planned": mixing.needs_scores,
        "changed": [point in changed for point in probes.points],
    }


def _examples(corpus: Corpus, actions: Sequence[int]) -> dict[int, list[str]]:
    """Different training sentences nearest to each of some actions."""
    if not actions:
        return {}
    train = np.zeros(len(corpus.first_token), bool)
    train[corpus.sentences(corpus.documents("train"))] = True
    labels = np.where(train, corpus.known_actions, -1)
    nearest = nearest_sentences(corpus.embeddings, labels, corpus.codebook, 2 * EXAMPLES)
    texts = {int(action): corpus.sentence_texts(nearest[action][nearest[action] >= 0]) for action in actions}
    return {action: list(dict.fromkeys(found))[:EXAMPLES] for action, found in texts.items()}


def reading_facts(run: Run, every: Sequence[KeptProbes]) -> dict[str, str]:
    """What is read with what, in words."""
    probes = every[0]
    lm, corpus, config = run.config.lm, run.config.corpus, probes.record.config.probe
    documents = probes.record.documents[str(probes.seed)]
    target = repr(config.target) if config.labels is not None else config.target
    kind = f"one of {len(probes.classes):,} classes" if probes.classes else "a number"
    kind = "a vector" if probes.of_embeddings else kind
    ahead = f", {probes.horizon} ahead" if probes.horizon > 1 else ""
    facts = {
        "Run": run.folder.resolve().name,
        "Variant": " and ".join(own.variant for own in every),
        "Model": lm.name or f"new GPT-2, {lm.layers} layers of width {lm.width}",
        "Corpus": corpus.path or f"{corpus.reader} ({run.corpus.facts['documents']:,} documents)",
        "Probes": f"{probes.solver}, seed {probes.seed}, for {target}{ahead}: {kind}; fitted on "
        f"{documents['probe']:,} documents, selected on {documents['validation']:,}, tested on "
        f"{documents['test']:,}",
    }
    few = too_few(documents["test"])
    return facts | ({"Beware": few} if few else {})
