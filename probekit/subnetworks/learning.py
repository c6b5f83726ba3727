"""Learning which components to remove: a few without which a probe reads nothing, and the LM does as before.

The three aims of Bayazit et al. (2023, arXiv 2310.03084), for components in place of weights: what a probe
makes of the last layer right before a sentence is to vanish, the next token's distribution everywhere else is
to stay the whole LM's, and few components are to be removed. The first two are divergences, in nats, which
are 0 at best: a loss that is to rise has no end, and would be bought with any damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from probekit.config import SubnetworkSettings
from probekit.corpus.examples import Windows
from probekit.progress import Task
from probekit.subnetworks import gates
from probekit.subnetworks.masked import MaskedLM
from probekit.subnetworks.measures import Measured, Readout, divergence

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
        settings: Steps, rate, batch size and the weight of what is to stay.
        penalty: On every removed component, in nats.
        seed: Of noise and of the windows drawn; equal seeds draw equally whatever the penalty.
        task: Told of every step.
    """
    noise, rows = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    size = min(settings.batch_size, len(windows))
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
