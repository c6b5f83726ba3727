"""What a subnetwork is compared with: others of as many components, and a probe that is fitted again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from probekit.config import ProbeSettings
from probekit.corpus.examples import Windows, chunks
from probekit.probing.solvers import SoftmaxProbes
from probekit.progress import Task
from probekit.subnetworks.components import Component
from probekit.subnetworks.masked import MaskedLM


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
        settings: Penalties, iterations and tolerance.
        classes: How many actions there are.
        fit: States `[masks, examples, width]` and actions `[examples]` to fit on.
        chosen: The same to choose penalties on.
        asked: The same states of the examples that are asked `[masks, sentences, width]`.

    Returns:
        Log-probabilities `[masks, sentences, actions]`.
    """
    probes = SoftmaxProbes(settings.l2, settings.max_iterations, settings.tolerance)
    (X, y), (X_chosen, y_chosen) = fit, chosen
    return probes.fit(X, y, classes, X_chosen, y_chosen).log_probabilities(asked)
