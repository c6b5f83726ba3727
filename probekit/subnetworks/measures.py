"""What an LM without some components has lost, summed by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probekit.corpus.examples import Windows, chunks
from probekit.models.planned_lm import token_losses
from probekit.probing.saved import LinearProbe
from probekit.progress import Task
from probekit.subnetworks.masked import MaskedLM, Scored

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
