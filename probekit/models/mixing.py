"""Mixing: from planner scores to an action embedding. One small class for each way, one table of variants.

The names and their use in training and evaluation follow arXiv 2410.12492, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from probekit.config import MixingSettings, ProbedName, VariantName

# Rows are taken by F.embedding and not by an index, whose gradient threads sum in no fixed order on a CPU.


class Mixing(Protocol):
    """How a sentence's scores become the action embedding that conditions its tokens.

    Attributes:
        needs_scores: Whether the planner has to run.
    """

    needs_scores: bool

    def __call__(
        self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: float | Tensor
    ) -> Tensor:
        """Action embeddings `[sentences, dimensions]`.

        Args:
            scores: Planner logits `[sentences, actions]` (empty where not needed).
            actions: True actions `[sentences]`.
            codebook: Action embeddings `[actions, dimensions]`.
            temperature: Divides the scores before a softmax.
        """
        ...


class Fixed:
    """One constant action for all: extra parameters, no information."""

    needs_scores = False

    def __call__(
        self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: float | Tensor
    ) -> Tensor:
        """Mixes as `Mixing` has it."""
        return codebook[0].expand(len(actions), -1)


class Uniform:
    """The mean of the codebook: the soft twin of `Fixed`."""

    needs_scores = False

    def __call__(
        self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: float | Tensor
    ) -> Tensor:
        """Mixes as `Mixing` has it."""
        return codebook.mean(dim=0).expand(len(actions), -1)


class Oracle:
    """The sentence's true action."""

    needs_scores = False

    def __call__(
        self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: float | Tensor
    ) -> Tensor:
        """Mixes as `Mixing` has it."""
        return F.embedding(actions, codebook)


class Predicted:
    """The planner's most probable action; no gradient reaches the planner."""

    needs_scores = True

    def __call__(
        self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: float | Tensor
    ) -> Tensor:
        """Mixes as `Mixing` has it."""
        return F.embedding(scores.argmax(dim=-1), codebook)


class Soft:
    """Soft mixing: the planner's probabilities weight the codebook; differentiable throughout."""

    needs_scores = True

    def __call__(
        self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: float | Tensor
    ) -> Tensor:
        """Mixes as `Mixing` has it."""
        return F.softmax(scores / temperature, dim=-1) @ codebook


class StraightThrough:
    """The most probable action forward, the gradient of soft mixing backward (Bengio et al. 2013)."""

    needs_scores = True

    def __call__(
        self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: float | Tensor
    ) -> Tensor:
        """Mixes as `Mixing` has it."""
        soft = F.softmax(scores / temperature, dim=-1)
        hard = F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(soft)
        # The difference is zero, for the scores' gradient; the value and the codebook's gradient are hard.
        return (hard + (soft - soft.detach())) @ codebook


class GumbelSoftmax:
    """A relaxed sample of an action (Jang et al. 2017, arXiv 1611.01144)."""

    needs_scores = True

    def __call__(
        self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: float | Tensor
    ) -> Tensor:
        """Mixes as `Mixing` has it."""
        noise = -torch.empty_like(scores).exponential_().log()
        return F.softmax((scores + noise) / temperature, dim=-1) @ codebook


class Mixed:
    """The planner's most probable action for a share of the sentences, the true one for the others.

    Which ones is drawn anew in every call, by a generator of its own: whatever the share, nothing else that
    is random in training changes (arXiv 2410.12492, Figure 4; 0 is `Oracle`, 1 is `Predicted`).

    Args:
        fraction: Probability that a sentence gets the planner's action.
        seed: Seed of the draws; None, as in `VARIANTS`: of this kind, but not to be used.
    """

    needs_scores = True

    def __init__(self, fraction: float, seed: int | None) -> None:
        self.fraction = fraction
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """What it draws from, whose state is kept with a training's."""
        return () if self._generator is None else (self._generator,)

    def __call__(
        self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: float | Tensor
    ) -> Tensor:
        """Mixes as `Mixing` has it."""
        if self._generator is None:
            raise TypeError("this mixing has no seed; training_mixing makes one that has")
        # Drawn on the CPU, so that every device gets the same draws.
        planned = torch.rand(len(actions), generator=self._generator) < self.fraction
        chosen = torch.where(planned.to(actions.device), scores.argmax(dim=-1), actions)
        return F.embedding(chosen, codebook)


@dataclass(frozen=True)
class Variant:
    """A way of choosing the action that is trained and compared.

    Attributes:
        training: Mixing in training.
        evaluation: Mixing in evaluation.
        joint: Whether the planner is trained together with the adapter.
    """

    training: Mixing
    evaluation: Mixing
    joint: bool = False

    @property
    def tempered(self) -> bool:
        """Whether it is trained with a softmax over scores, which has a temperature."""
        return isinstance(self.training, Soft | StraightThrough | GumbelSoftmax)

    @property
    def out_of_fold(self) -> bool:
        """Whether it is trained on out-of-fold scores where there are any: its planner stays frozen."""
        return self.training.needs_scores and not self.joint


# The base LM alone, "none", has no entry: it conditions on nothing.
VARIANTS: dict[VariantName, Variant] = {
    "fixed": Variant(Fixed(), Fixed()),
    "uniform": Variant(Uniform(), Uniform()),
    "oracle": Variant(Oracle(), Predicted()),
    "predicted": Variant(Predicted(), Predicted()),
    "mixed": Variant(Mixed(MixingSettings().fraction, seed=None), Predicted()),
    "straight-through": Variant(StraightThrough(), Predicted(), joint=True),
    "gumbel": Variant(GumbelSoftmax(), Soft(), joint=True),
    "soft": Variant(Soft(), Soft()),
    "joint": Variant(Soft(), Soft(), joint=True),
}


def evaluation_mixing(variant: VariantName | ProbedName) -> Mixing:
    """How a variant is evaluated; what no variant conditions is mixed like a constant, which nobody reads."""
    return VARIANTS[variant].evaluation if variant in VARIANTS else Fixed()


def training_mixing(variant: VariantName, settings: MixingSettings, seed: int) -> Mixing:
    """The mixing that a variant is trained with under some settings; what it draws is decided by the seed."""
    mixing = VARIANTS[variant].training
    return Mixed(settings.fraction, seed) if isinstance(mixing, Mixed) else mixing
