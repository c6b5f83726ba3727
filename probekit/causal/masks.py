"""What a subnetwork is compared with: others of as many components, and a probe that is fitted again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from probekit.causal import components as gates
from probekit.causal.components import Component, MaskedLM, Scored
from probekit.config import ProbeSettings, SubnetworkSettings
from probekit.data.windows import Windows, chunks
from probekit.models.planner_lm import token_losses
from probekit.probing.results import LinearProbe
from probekit.probing.solvers import SoftmaxProbes
from probekit.progress import Task

Sums = dict[str, tuple[np.ndarray, np.ndarray]]
"""By metric its sums `[masks, documents]`, and counts `[documents]`."""


@dataclass(frozen=True)
class Readout:
    """A probe of the next action, and what is known without one.

    Attributes:
        probe: Reads the last layer right before a sentence.
        prior: Log-probabilities of actions `[actions]`.
    """

    probe: LinearProbe
    prior: Tensor

    def told(self, states: Tensor) -> Tensor:
        """The probe's log-probabilities `[sentences, actions]` of states `[sentences, width]`."""
        # Minus infinity, of a class that was not there to fit on, times its probability is not 0.
        return self.probe.log_probabilities(states).clamp(min=-1e4)

    def information(self, told: Tensor) -> Tensor:
        """KL(told || prior) in nats `[sentences]`: how much the probe makes of what it reads.

        It is 0 where the probe tells the prior, so that less cannot be asked for, unlike a higher loss.
        """
        return (told.exp() * (told - self.prior)).sum(dim=1)


@dataclass(frozen=True)
class Measured:
    """What some masks leave, on the same windows.

    Attributes:
        sums: By metric. `first_loss`, `rest_loss`, `other_loss`: of the next token in nats, where `Scored`
            has it; `kept_kl`: KL in nats from the whole LM's next token, but for sentences' first ones; of
            the probe, `information`, `bits` over the prior, the probability of the true action `true`, and
            `accuracy`.
        states: What the probe reads `[masks, sentences, width]`.
        actions: The true actions `[sentences]`.
        document: Of every sentence, which column of the sums it is in `[sentences]`.
    """

    sums: Sums
    states: Tensor
    actions: np.ndarray
    document: np.ndarray


def measure(
    masked: MaskedLM, windows: Windows, masks: Tensor, readout: Readout, batch_size: int, task: Task
) -> Measured:
    """Runs windows once with all components and once with every mask.

    Args:
        masked: The LM.
        windows: Where.
        masks: What is removed `[masks, components]`.
        readout: The probe.
        batch_size: Windows in one forward pass.
        task: Told of every mask and batch.
    """
    documents, column = np.unique(windows.document, return_inverse=True)
    found: list[list[dict[str, np.ndarray]]] = [[] for _ in masks]
    counts: list[dict[str, np.ndarray]] = []
    states: list[Tensor] = []
    actions, rows_of = [], []
    for rows in chunks(len(windows), batch_size):
        scored = masked.scored(windows[rows])
        with torch.no_grad():
            whole = masked(scored, masked.nothing)[0].log_softmax(dim=-1)
            read = []
            for number, mask in enumerate(masks):
                logits, state = masked(scored, mask[None])
                found[number].append(_values(scored, logits, whole, readout, state))
                read.append(state.cpu())
                task.advance()
        states.append(torch.stack(read))
        counts.append(_counts(scored))
        actions.append(scored.actions)
        rows_of.append(rows.start + scored.row)

    def by_document(parts: Sequence[Mapping[str, np.ndarray]], name: str) -> np.ndarray:
        return np.bincount(column, np.concatenate([part[name] for part in parts]), minlength=len(documents))

    sums: Sums = {
        name: (np.stack([by_document(parts, name) for parts in found]), by_document(counts, name))
        for name in found[0][0]
    }
    return Measured(sums, torch.cat(states, dim=1), np.concatenate(actions), column[np.concatenate(rows_of)])


def probe_values(told: Tensor, actions: Tensor, prior: Tensor) -> dict[str, Tensor]:
    """How well log-probabilities `[sentences, actions]` tell true actions, by metric `[sentences]`."""
    true = told.gather(1, actions[:, None])[:, 0]
    return {
        "bits": (true - prior[actions]) / np.log(2),
        "true": true.exp(),
        "accuracy": (told.argmax(dim=1) == actions).float(),
    }


def _values(
    scored: Scored, logits: Tensor, whole: Tensor, readout: Readout, state: Tensor
) -> dict[str, np.ndarray]:
    """Every metric summed over each window `[windows]`."""
    losses = token_losses(logits, scored.batch.targets)
    parts = {"first_loss": scored.first, "rest_loss": scored.rest, "other_loss": scored.other}
    found = {name: (losses * part).sum(1).double().cpu().numpy() for name, part in parts.items()}
    found["kept_kl"] = (divergence(whole, logits) * _kept(scored)).sum(1).double().cpu().numpy()
    told = readout.told(state)
    actions = torch.from_numpy(scored.actions).to(told.device)
    of_probe = {"information": readout.information(told)} | probe_values(told, actions, readout.prior)
    for name, values in of_probe.items():
        found[name] = np.bincount(scored.row, values.double().cpu().numpy(), minlength=len(losses))
    return found


def _counts(scored: Scored) -> dict[str, np.ndarray]:
    """Tokens or sentences of each window that every metric is summed over `[windows]`."""
    first, rest, other, kept = (
        part.sum(1).double().cpu().numpy()
        for part in (scored.first, scored.rest, scored.other, _kept(scored))
    )
    losses = {"first_loss": first, "rest_loss": rest, "other_loss": other, "kept_kl": kept}
    return losses | dict.fromkeys(("information", "bits", "true", "accuracy"), first)


def _kept(scored: Scored) -> Tensor:
    return scored.rest | scored.other


def divergence(whole: Tensor, logits: Tensor) -> Tensor:
    """KL in nats from log-probabilities to logits, both `[..., vocabulary]`: `[...]`."""
    return (whole.exp() * (whole - logits.log_softmax(dim=-1))).sum(dim=-1)


BATCH_SIZE = 16
"""Windows in each step of learning a mask."""

REMOVED = 0.5
"""A component is removed if, without noise, at least so much of it is."""


@dataclass(frozen=True)
class Candidate:
    """A mask that was learned.

    Attributes:
        penalty: On every removed component, in nats; None for the mask that removes nothing.
        gates: How much of each component is kept, without noise `[components]`.
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
    readout: Readout,
    settings: SubnetworkSettings,
    penalty: float,
    seed: int,
    task: Task,
) -> Candidate:
    """Learns a mask.

    Args:
        masked: The LM.
        windows: To learn on.
        readout: The probe.
        settings: Steps, rate and the weight of what is to stay.
        penalty: On every removed component, in nats.
        seed: Of noise and of the windows drawn; equal seeds draw equally whatever the penalty.
        task: Told of every step.
    """
    noise, rows = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    size = min(BATCH_SIZE, len(windows))
    locations = nn.Parameter(gates.begun(len(masked.components)).to(masked.nothing.device))
    optimiser = torch.optim.Adam([locations], lr=settings.learning_rate)
    for _ in range(settings.steps):
        scored = masked.scored(windows[rows.choice(len(windows), size, replace=False)])
        with torch.no_grad():
            whole = masked(scored, masked.nothing)[0].log_softmax(dim=-1)
        logits, states = masked(scored, gates.drawn(locations, size, noise))
        kept = scored.rest | scored.other
        information = readout.information(readout.told(states)).sum() / max(len(states), 1)
        loss = information + settings.keep * divergence(whole[kept], logits[kept]).mean()
        count = gates.expected_count(locations)
        optimiser.zero_grad()
        (loss + penalty * count).backward()
        optimiser.step()
        task.advance(note=f"loss {loss.item():.3f}, removed {count.item():.1f}")
    return Candidate(penalty, 1 - gates.settled(locations.detach()).cpu().numpy())


def objectives(measured: Measured, keep: float) -> tuple[np.ndarray, np.ndarray]:
    """What masks are learned for but the penalty, and each document's part in how far it may be off.

    Returns:
        Values `[masks]`, and parts `[masks, documents]`: the root of their summed squares is a standard
        error, that of differences of parts one of a difference.
    """
    value, off = np.zeros(()), np.zeros(())
    for name, weight in (("information", 1.0), ("kept_kl", keep)):
        sums, counts = measured.sums[name]
        ratio = sums.sum(1) / max(counts.sum(), 1)
        value = value + weight * ratio
        off = off + weight * (sums - ratio[:, None] * counts) / max(counts.sum(), 1)
    return value, off


def choose(candidates: Sequence[Candidate], measured: Measured, keep: float) -> int:
    """The number of the mask that removes least of those within one standard error of the best.

    The error is that of the difference, for all were measured on the same documents.

    Args:
        candidates: The masks.
        measured: What they leave, on documents that they were not learned on.
        keep: The weight of what is to stay.
    """
    value, off = objectives(measured, keep)
    best = int(value.argmin())
    error = np.linalg.norm(off - off[best], axis=1)
    removed = np.array([candidate.removed.sum() for candidate in candidates])
    # Of masks that remove as many, the better one.
    good = np.where(value <= value[best] + error, removed + value / (1 + value.max()), np.inf)
    return int(good.argmin())


def draw_alike(components: Sequence[Component], removed: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """Random masks that remove as many heads and as many parts of the adapter in every layer.

    Args:
        components: All of them.
        removed: Which ones the mask removes that they stand beside `[components]`, bool.
        draws: How many.
        seed: Of the draws.

    Returns:
        `[draws, components]`, bool.
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


def first_alone(objective: np.ndarray, count: int) -> np.ndarray:
    """Removes as many components as asked for, those that are best removed alone `[components]`, bool.

    Args:
        objective: What is left when each is removed alone `[components]`; less is better.
        count: How many.
    """
    mask = np.zeros(len(objective), dtype=bool)
    mask[np.argsort(objective, kind="stable")[:count]] = True
    return mask


def states_of(
    masked: MaskedLM, windows: Windows, masks: Tensor, batch_size: int, task: Task
) -> tuple[Tensor, Tensor]:
    """What a probe reads without some components, and the true actions.

    Args:
        masked: The LM.
        windows: Where.
        masks: What is removed `[masks, components]`.
        batch_size: Windows in one forward pass.
        task: Told of every mask and batch.

    Returns:
        `[masks, sentences, width]` and `[sentences]`, on the CPU.
    """
    found, actions = [], []
    for rows in chunks(len(windows), batch_size):
        scored = masked.scored(windows[rows])
        read = []
        for mask in masks:
            read.append(masked.states(scored, mask[None]).cpu())
            task.advance()
        found.append(torch.stack(read))
        actions.append(torch.from_numpy(scored.actions))
    return torch.cat(found, dim=1), torch.cat(actions)


def refitted(
    settings: ProbeSettings,
    classes: int,
    fit: tuple[Tensor, Tensor],
    chosen: tuple[Tensor, Tensor],
    asked: Tensor,
) -> Tensor:
    """What probes tell that are fitted again without some components: whether information has only moved.

    Args:
        settings: Penalties and iterations.
        classes: How many actions there are.
        fit: States `[masks, examples, width]` and actions `[examples]` to fit on.
        chosen: The same to choose penalties on.
        asked: The same states of the examples that are asked `[masks, sentences, width]`.

    Returns:
        Log-probabilities `[masks, sentences, actions]`.
    """
    probes = SoftmaxProbes(settings.l2, settings.max_iterations)
    (X, y), (X_chosen, y_chosen) = fit, chosen
    return probes.fit(X, y, classes, X_chosen, y_chosen).log_probabilities(asked)
