"""Masks over components: how they are learned, measured and chosen, and their controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from probekit.causal.components import Component, MaskedLM, ScoredWindows
from probekit.causal.variant_lm import SumsByMetric
from probekit.config import ProbeSettings, SubnetworkSettings
from probekit.data.windows import Windows, chunks
from probekit.models.planned_lm import token_losses
from probekit.probing.solvers import SoftmaxProbes
from probekit.progress import Task

LOW, HIGH = -0.1, 1.1
"""Range that the sigmoid of hard concrete gates is stretched to, before it is clamped to 0 and 1."""

TEMPERATURE = 2 / 3
"""Of that sigmoid: low enough for most draws to be near 0 or 1, high enough for a gradient."""

START = -2.0
"""Initial log alpha: little is removed, but each component in some draws, so that it has a gradient."""

BATCH_SIZE = 16
"""Windows in each step of learning a mask."""

REMOVED = 0.5
"""A component is removed if at least so much of it is removed where nothing is drawn."""


def draw_removal(log_alpha: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws hard concrete variables (Louizos et al. 2018), how much of each component is removed.

    Draws `[count, components]`, from 0 to 1, are differentiable by the parameters `[components]`. The
    generator is on the CPU, so that they are equal on every device.
    """
    uniform = torch.rand(count, len(log_alpha), generator=generator).clamp(1e-6, 1 - 1e-6)
    return hard_sigmoid((uniform.logit().to(log_alpha) + log_alpha) / TEMPERATURE)


def hard_sigmoid(scores: Tensor) -> Tensor:
    """The stretched and clamped sigmoid; of log alpha, how much is removed where nothing is drawn."""
    return (LOW + (HIGH - LOW) * scores.sigmoid()).clamp(0.0, 1.0)


def expected_removals(log_alpha: Tensor) -> Tensor:
    """Expected number of components of which anything is removed."""
    return (log_alpha - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid().sum()


def information(log_p: Tensor, prior: Tensor) -> Tensor:
    """KL(probe || prior) in nats `[sentences]`: how far what it reads moves the probe from the prior.

    Unlike a loss, which can always grow, it is minimal where the probe predicts the prior.
    """
    return (log_p.exp() * (log_p - prior)).sum(dim=1)


def probe_metrics(log_p: Tensor, labels: Tensor, prior: Tensor) -> dict[str, Tensor]:
    """By metric, how well log-probabilities `[sentences, actions]` predict true actions `[sentences]`."""
    true = log_p.gather(1, labels[:, None])[:, 0]
    return {
        "bits": (true - prior[labels]) / np.log(2),
        "true": true.exp(),
        "accuracy": (log_p.argmax(dim=1) == labels).float(),
    }


def divergence(whole: Tensor, logits: Tensor) -> Tensor:
    """KL in nats from log-probabilities to logits, both `[..., vocabulary]`: `[...]`."""
    return (whole.exp() * (whole - logits.log_softmax(dim=-1))).sum(dim=-1)


@dataclass(frozen=True)
class Measured:
    """Effects of some masks on the same windows.

    Attributes:
        sums: By metric, sums `[masks, groups]` and counts `[groups]` of documents. `first_loss`, `rest_loss`,
            `other_loss`: losses of next tokens in nats, by the positions of `ScoredWindows`; `kept_kl`: KL in
            nats from the whole LM's next tokens, except sentences' first ones; of the final-layer probe:
            `information`, `bits` over the prior, the probability of the true label `true`, and `accuracy`.
        states: The activations that the probe reads `[masks, sentences, width]`.
        labels: The true labels `[sentences]`.
        document: The column of the sums that each sentence belongs to `[sentences]`.
    """

    sums: SumsByMetric
    states: Tensor
    labels: np.ndarray
    document: np.ndarray


@torch.no_grad()
def measure(
    masked: MaskedLM, windows: Windows, masks: Tensor, prior: Tensor, batch_size: int, task: Task
) -> Measured:
    """Runs windows with all components, and without those that each mask removes.

    Args:
        masked: The LM.
        windows: What it reads.
        masks: How much each mask removes of each component `[masks, components]`.
        prior: Log-probabilities of labels without a probe `[classes]`.
        batch_size: Windows in a forward pass.
        task: Advances with every mask of every batch.
    """
    documents, column = np.unique(masked.corpus.group[windows.document], return_inverse=True)
    sums: SumsByMetric = {}
    states, labels, document = [], [], []
    for rows in chunks(len(windows), batch_size):
        scored = masked.scored(windows[rows])
        whole = masked(scored, masked.nothing)[0].log_softmax(dim=-1)
        read = []
        for number, mask in enumerate(masks):
            logits, state = masked(scored, mask[None])
            log_p = masked.label_log_probabilities(state)
            for name, (values, counts) in _window_sums(scored, logits, whole, log_p, prior).items():
                if name not in sums:
                    sums[name] = np.zeros((len(masks), len(documents))), np.zeros(len(documents))
                np.add.at(sums[name][0][number], column[rows], values)
                if number == 0:
                    np.add.at(sums[name][1], column[rows], counts)
            read.append(state.cpu())
            task.advance()
        states.append(torch.stack(read))
        labels.append(scored.labels)
        document.append(column[rows][scored.row])
    return Measured(sums, torch.cat(states, dim=1), np.concatenate(labels), np.concatenate(document))


def _window_sums(
    scored: ScoredWindows, logits: Tensor, whole: Tensor, log_p: Tensor, prior: Tensor
) -> SumsByMetric:
    """Every metric summed over each window, and the number of tokens or sentences `[windows]`."""
    losses = token_losses(logits, scored.batch.targets)
    by_position = {
        "first_loss": (losses, scored.first),
        "rest_loss": (losses, scored.rest),
        "other_loss": (losses, scored.other),
        "kept_kl": (divergence(whole, logits), scored.kept),
    }
    sums: SumsByMetric = {
        name: ((values * mask).sum(1).double().cpu().numpy(), mask.sum(1).double().cpu().numpy())
        for name, (values, mask) in by_position.items()
    }
    labels = torch.from_numpy(scored.labels).to(log_p.device)
    by_sentence = {"information": information(log_p, prior)} | probe_metrics(log_p, labels, prior)
    for name, values in by_sentence.items():
        total = np.bincount(scored.row, values.double().cpu().numpy(), minlength=len(losses))
        sums[name] = total, sums["first_loss"][1]
    return sums


@dataclass(frozen=True)
class Candidate:
    """A learned mask.

    Attributes:
        penalty: On every removed component, in nats; None for the mask that removes nothing.
        gates: How much of each component is kept without noise `[components]`.
    """

    penalty: float | None
    gates: np.ndarray

    @property
    def removed(self) -> np.ndarray:
        """Which components are removed `[components]`, bool."""
        return self.gates <= 1 - REMOVED


def learn(
    masked: MaskedLM,
    windows: Windows,
    prior: Tensor,
    settings: SubnetworkSettings,
    penalty: float,
    seed: int,
    task: Task,
) -> Candidate:
    """Learns which components to remove, so that the probe is left with the prior and other tokens stay.

    Args:
        masked: The LM.
        windows: To learn on.
        prior: Log-probabilities of labels without a probe `[classes]`.
        settings: Steps, learning rate and weight of the tokens that are to stay.
        penalty: On every removed component, in nats.
        seed: Of noise and of the windows drawn, which do not depend on the penalty.
        task: Advances with every step.
    """
    noise, rows = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    size = min(BATCH_SIZE, len(windows))
    log_alpha = nn.Parameter(torch.full((len(masked.components),), START).to(masked.device))
    optimiser = torch.optim.Adam([log_alpha], lr=settings.learning_rate)
    for _ in range(settings.steps):
        scored = masked.scored(windows[rows.choice(len(windows), size, replace=False)])
        with torch.no_grad():
            whole = masked(scored, masked.nothing)[0].log_softmax(dim=-1)
        logits, states = masked(scored, draw_removal(log_alpha, size, noise))
        carried = information(masked.label_log_probabilities(states), prior).sum() / max(len(states), 1)
        loss = carried + settings.keep * divergence(whole[scored.kept], logits[scored.kept]).mean()
        count = expected_removals(log_alpha)
        optimiser.zero_grad()
        (loss + penalty * count).backward()
        optimiser.step()
        task.advance(note=f"loss {loss.item():.3f}, removed {count.item():.1f}")
    return Candidate(penalty, 1 - hard_sigmoid(log_alpha.detach()).cpu().numpy())


def objectives(sums: SumsByMetric, keep: float) -> tuple[np.ndarray, np.ndarray]:
    """The objective that masks are learned for, without the penalty, and each document's deviation from it.

    Returns:
        Values `[masks]`, and deviations `[masks, documents]`. The root of their summed squares is the value's
        standard error, that of differences of deviations the standard error of a difference.
    """
    value, deviation = np.zeros(()), np.zeros(())
    for name, weight in (("information", 1.0), ("kept_kl", keep)):
        total, counts = sums[name]
        ratio = total.sum(1) / max(counts.sum(), 1)
        value = value + weight * ratio
        deviation = deviation + weight * (total - ratio[:, None] * counts) / max(counts.sum(), 1)
    return value, deviation


def choose(candidates: Sequence[Candidate], sums: SumsByMetric, keep: float) -> int:
    """The number of the smallest mask within one standard error of the best one, by sums of `measure`.

    The error is that of the difference, since all masks are measured on the same documents.
    """
    value, deviation = objectives(sums, keep)
    best = int(value.argmin())
    error = np.linalg.norm(deviation - deviation[best], axis=1)
    removed = np.array([candidate.removed.sum() for candidate in candidates])
    # Of masks that remove as many, the better one.
    good = np.where(value <= value[best] + error, removed + value / (1 + value.max()), np.inf)
    return int(good.argmin())


def draw_random_masks(
    components: Sequence[Component], removed: np.ndarray, draws: int, seed: int
) -> np.ndarray:
    """Masks that remove as many random heads and parts of the adapter in every layer as a given one.

    All masks are bool: `removed` `[components]`, the result `[draws, components]`.
    """
    generator = np.random.default_rng(seed)
    groups: dict[tuple[str, int | None], list[int]] = {}
    for number, component in enumerate(components):
        groups.setdefault((component.kind, component.layer), []).append(number)
    masks = np.zeros((draws, len(components)), dtype=bool)
    for mask in masks:
        for members in groups.values():
            mask[generator.choice(members, int(removed[members].sum()), replace=False)] = True
    return masks


def best_removed_alone(objective: np.ndarray, count: int) -> np.ndarray:
    """Removes the `count` components with the lowest objective when removed alone `[components]`, bool."""
    mask = np.zeros(len(objective), dtype=bool)
    mask[np.argsort(objective, kind="stable")[:count]] = True
    return mask


def masked_states(
    masked: MaskedLM, windows: Windows, masks: Tensor, batch_size: int, task: Task
) -> tuple[Tensor, Tensor]:
    """What `measure` returns as states and labels, on the CPU, without the cost of logits."""
    states, labels = [], []
    for rows in chunks(len(windows), batch_size):
        scored = masked.scored(windows[rows])
        read = []
        for mask in masks:
            read.append(masked.states(scored, mask[None]).cpu())
            task.advance()
        states.append(torch.stack(read))
        labels.append(torch.from_numpy(scored.labels))
    return torch.cat(states, dim=1), torch.cat(labels)


def refit_probes(
    settings: ProbeSettings,
    classes: int,
    fitted_on: tuple[Tensor, Tensor],
    chosen_on: tuple[Tensor, Tensor],
    states: Tensor,
) -> Tensor:
    """Fits a new probe to what each mask leaves, which finds information that has only moved.

    Args:
        settings: Penalties and iterations.
        classes: Number of classes.
        fitted_on: Activations `[masks, examples, width]` and labels `[examples]`.
        chosen_on: The same to choose penalties on.
        states: Activations to predict from `[masks, sentences, width]`.

    Returns:
        Log-probabilities `[masks, sentences, classes]`.
    """
    probes = SoftmaxProbes(settings.l2, settings.max_iterations)
    (X, y), (X_chosen, y_chosen) = fitted_on, chosen_on
    return probes.fit(X, y, classes, X_chosen, y_chosen).log_probabilities(states)
