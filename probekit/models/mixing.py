"""Mixing: from planner scores to action embeddings. One small class for each mixing, one table of variants.

The names and their use in training and evaluation follow arXiv 2410.12492, section 3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from probekit.config import MixingSettings, ProbedName, VariantName

Temperature = float | Tensor

# Rows are taken by F.embedding, never by an index: on a CPU, threads add up the gradient of an index in no
# fixed order, and the bits of a run would differ.


class Mixing(ABC):
    """How a sentence's scores become the action embedding that conditions its tokens.

    Attributes:
        needs_scores: Whether the planner has to run.
        generators: Generators that it draws from, beside the global one.
    """

    needs_scores = True
    generators: tuple[torch.Generator, ...] = ()

    def __call__(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Temperature) -> Tensor:
        """Action embeddings `[sentences, dimensions]`.

        Args:
            scores: Planner logits `[sentences, actions]`; ignored unless `needs_scores`.
            actions: True actions `[sentences]`.
            codebook: Action embeddings `[actions, dimensions]`.
            temperature: Divides the scores before a softmax.
        """
        return self._mix(scores, actions, codebook, temperature)

    @abstractmethod
    def _mix(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Temperature) -> Tensor: ...


class Fixed(Mixing):
    """One constant action for all: extra parameters, no information."""

    needs_scores = False

    def _mix(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Temperature) -> Tensor:
        return codebook[0].expand(len(actions), -1)


class Uniform(Mixing):
    """The mean of the codebook: the soft twin of `Fixed`."""

    needs_scores = False

    def _mix(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Temperature) -> Tensor:
        return codebook.mean(dim=0).expand(len(actions), -1)


class Oracle(Mixing):
    """The sentence's true action."""

    needs_scores = False

    def _mix(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Temperature) -> Tensor:
        return F.embedding(actions, codebook)


class Predicted(Mixing):
    """The planner's most probable action; no gradient reaches the planner."""

    def _mix(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Temperature) -> Tensor:
        return F.embedding(scores.argmax(dim=-1), codebook)


class Soft(Mixing):
    """The planner's probabilities weight the codebook; differentiable throughout."""

    def _mix(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Temperature) -> Tensor:
        return F.softmax(scores / temperature, dim=-1) @ codebook


class StraightThrough(Mixing):
    """The most probable action forward, the gradient of soft mixing backward (Bengio et al. 2013)."""

    def _mix(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Temperature) -> Tensor:
        soft = F.softmax(scores / temperature, dim=-1)
        hard = F.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(soft)
        # The difference is zero, for the scores' gradient; the value and the codebook's gradient are hard.
        return (hard + (soft - soft.detach())) @ codebook


class GumbelSoftmax(Mixing):
    """A relaxed sample of an action (Jang et al. 2017, arXiv 1611.01144)."""

    def _mix(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Temperature) -> Tensor:
        noise = -torch.empty_like(scores).exponential_().log()
        return F.softmax((scores + noise) / temperature, dim=-1) @ codebook


class Mixed(Mixing):
    """The planner's most probable action for a share of the sentences, the true one for the others.

    Which ones is drawn anew in every call, by a generator of its own, so that the share changes nothing else
    that is random in training (arXiv 2410.12492, Figure 4; 0 is `Oracle`, 1 is `Predicted`).

    Args:
        fraction: Probability that a sentence gets the planner's action.
        seed: Seed of the draws.
    """

    def __init__(self, fraction: float, seed: int = 0) -> None:
        self.fraction = fraction
        self.generators = (torch.Generator().manual_seed(seed),)

    def _mix(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Temperature) -> Tensor:
        # Drawn on the CPU, so that every device gets the same draws.
        planned = torch.rand(len(actions), generator=self.generators[0]) < self.fraction
        chosen = torch.where(planned.to(actions.device), scores.argmax(dim=-1), actions)
        return F.embedding(chosen, codebook)


class Precomputed(Mixing):
    """Embeddings that are mixed already.

    Args:
        embeddings: `[sentences, dimensions]`.
    """

    needs_scores = False

    def __init__(self, embeddings: Tensor) -> None:
        self._embeddings = embeddings

    def _mix(self, scores: Tensor, actions: Tensor, codebook: Tensor, temperature: Temperature) -> Tensor:
        return self._embeddings


@dataclass(frozen=True)
class Variant:
    """A mixing that is trained and compared.

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


# Names are those of `config.types.VariantName`, without "none", the base LM alone: nothing conditions it.
VARIANTS: dict[VariantName, Variant] = {
    "fixed": Variant(Fixed(), Fixed()),
    "uniform": Variant(Uniform(), Uniform()),
    "oracle": Variant(Oracle(), Predicted()),
    "predicted": Variant(Predicted(), Predicted()),
    "mixed": Variant(Mixed(MixingSettings().fraction), Predicted()),
    "straight-through": Variant(StraightThrough(), Predicted(), joint=True),
    "gumbel": Variant(GumbelSoftmax(), Soft(), joint=True),
    "soft": Variant(Soft(), Soft()),
    "joint": Variant(Soft(), Soft(), joint=True),
}


def evaluation_mixing(variant: VariantName | ProbedName) -> Mixing:
    """The mixing that a variant is evaluated with; an LM that nothing conditions ignores it."""
    return VARIANTS[variant].evaluation if variant in VARIANTS else Fixed()


def training_mixing(variant: VariantName, settings: MixingSettings, seed: int) -> Mixing:
    """The mixing that a variant is trained with; the seed decides what it draws."""
    mixing = VARIANTS[variant].training
    return Mixed(settings.fraction, seed) if isinstance(mixing, Mixed) else mixing
