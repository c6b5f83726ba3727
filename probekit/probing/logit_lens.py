"""The logit lens and the tuned lens: the LM's own final norm and unembedding, read at every layer.

Where the target is a token, the head says what the LM would predict if the layers after this one were left
out (nostalgebraist 2020); nothing is fitted. The tuned lens (Belrose et al. 2023, arXiv 2303.08112) puts an
affine map before the head,

    log p = log softmax(U norm(h + h A + b)),

which learns the last layer's distribution at the same token: A and b are zero at first, take steps of Adam on
the Kullback-Leibler divergence, and are kept as they were after the epoch that was best on validation
examples. Unlike the paper's, each position has a map of its own, and steps are taken on standardised
activations, because a few features of real LMs are a thousand times as large as the others.

All logits are those of the target's tokens alone, renormalised over them, so that they stand beside probes
with the same classes. At the last layer, right before the token, they are the LM's own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from probekit.models.depth_ensemble import final_norm
from probekit.probing.solvers.base import pieces, probe_slices, standardised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from probekit.models.frozen_lm import FrozenLM

BATCH, LEARNING_RATE, EPOCHS, PATIENCE = 256, 1e-3, 200, 3
"""Of the tuned lens: examples in a step, Adam's learning rate, most epochs, and how many without progress."""


class LogitLens:
    """A batch of readers with the interface of solvers, all of them one head.

    Args:
        norm: The LM's final norm, in float32.
        weight: Rows of its unembedding [classes, width].
        bias: Their biases [classes], if it has any.

    Attributes:
        validation_loss_: Cross-entropy on validation examples in nats, [probes].
    """

    def __init__(self, norm: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        self._norm, self._weight, self._bias = norm, weight, bias

    @classmethod
    def of(cls, lm: FrozenLM, model: PreTrainedModel, tokens: np.ndarray) -> Self:
        """The head of a model.

        Args:
            lm: The LM whose hook points say where the norm is.
            model: The module that is read: this LM, tuned or with random weights.
            tokens: Ids of the tokens that are predicted [classes].

        Raises:
            ProbekitError: It has no final norm, or caps or scales its logits after the head.
        """
        norm, head = copy.deepcopy(final_norm(lm, model)).float(), model.get_output_embeddings()
        ids = torch.from_numpy(tokens).to(head.weight.device)
        bias = getattr(head, "bias", None)
        return cls(
            norm, head.weight.detach()[ids].float(), None if bias is None else bias.detach()[ids].float()
        )

    def tuned(self, teachers: Sequence[Tensor], seed: int) -> TunedLens:
        """Lenses that learn from the last layer's activations; see `TunedLens`."""
        return TunedLens(self._norm, self._weight, self._bias, teachers, seed)

    def fit(self, X: Tensor, y: Tensor, classes: int, X_validation: Tensor, y_validation: Tensor) -> Self:
        """Measures the loss on validation examples; the arguments are those of `SoftmaxProbes.fit`."""
        losses = X.new_zeros(len(X), dtype=torch.float64)
        y_validation = y_validation.expand(X_validation.shape[:2])
        for at in pieces(X_validation, X.shape[2] + 2 * classes):
            own = self._decoded(X_validation[at], at[0]).gather(2, y_validation[at][..., None])
            losses[at[0]] -= own.double().sum((1, 2))
        self.validation_loss_ = losses / X_validation.shape[1]
        return self

    def log_probabilities(self, X: Tensor) -> Tensor:
        """Log-probabilities [probes, examples, classes] in nats of activations [probes, examples, width]."""
        return self._decoded(X, slice(None))

    @torch.no_grad()
    def _decoded(self, X: Tensor, probes: slice) -> Tensor:
        """The same of some of the probes."""
        return self._head(X.float())

    def _head(self, X: Tensor) -> Tensor:
        return functional.linear(self._norm(X), self._weight, self._bias).log_softmax(-1)


class TunedLens(LogitLens):
    """A batch of tuned lenses.

    Args:
        norm: As for `LogitLens`.
        weight: As for `LogitLens`.
        bias: As for `LogitLens`.
        teachers: Activations of the last layer at the examples to fit on and at those to choose on, each
            [probes, examples, width].
        seed: Seed of the order of examples.

    Attributes:
        coef_: A on raw activations, [probes, width, width].
        intercept_: b for raw activations, [probes, width].
        n_iter_: The epoch whose state was kept, [probes]; 0 is the logit lens.
        divergence_: Kullback-Leibler divergence from the last layer on validation examples in nats, [probes].
    """

    def __init__(
        self, norm: nn.Module, weight: Tensor, bias: Tensor | None, teachers: Sequence[Tensor], seed: int
    ) -> None:
        super().__init__(norm, weight, bias)
        self._teachers, self._seed = teachers, seed

    def fit(self, X: Tensor, y: Tensor, classes: int, X_validation: Tensor, y_validation: Tensor) -> Self:
        """Fits all lenses to the teachers, not to labels; the arguments are those of `SoftmaxProbes.fit`."""
        elements = X.shape[2] * (6 * X.shape[2] + X.shape[1] + X_validation.shape[1])
        parts = [
            self._train(at.start, X[at], X_validation[at], *(teacher[at] for teacher in self._teachers))
            for at in probe_slices(len(X), elements, X)
        ]
        found = [torch.cat(part) for part in zip(*parts, strict=True)]
        self.coef_, self.intercept_, self.n_iter_, self.divergence_ = found
        self._teachers = ()
        return super().fit(X, y, classes, X_validation, y_validation)

    def _decoded(self, X: Tensor, probes: slice) -> Tensor:
        with torch.no_grad():
            return self._head(
                X.float() + torch.baddbmm(self.intercept_[probes, None], X.float(), self.coef_[probes])
            )

    def _train(
        self, first: int, X: Tensor, X_validation: Tensor, last: Tensor, last_validation: Tensor
    ) -> tuple[Tensor, ...]:
        """Coefficients, intercepts, epochs and divergences of the lenses from `first` on."""
        Z, mean, scale = standardised(X, first)
        Z_validation = (X_validation - mean) / scale
        spread = torch.where(scale.isinf(), 0.0, scale)
        A, b = (
            Z.new_zeros(len(Z), Z.shape[2], Z.shape[2]).requires_grad_(),
            torch.zeros_like(mean).requires_grad_(),
        )
        optimizer = torch.optim.Adam([A, b], lr=LEARNING_RATE)

        def divergences(raw: Tensor, Z: Tensor, last: Tensor) -> Tensor:
            p, q = self._head(last).detach(), self._head(raw + torch.baddbmm(b, Z, A) * spread)
            return functional.kl_div(q, p, reduction="none", log_target=True).sum((1, 2))

        @torch.no_grad()
        def measured() -> Tensor:
            found = torch.zeros(len(Z), device=Z.device)
            for rows in torch.arange(Z_validation.shape[1], device=Z.device).split(BATCH):
                found += divergences(X_validation[:, rows], Z_validation[:, rows], last_validation[:, rows])
            return found / Z_validation.shape[1]

        best, kept = measured(), (A.detach().clone(), b.detach().clone())
        epochs, generator = torch.zeros(len(Z), dtype=torch.int64), torch.Generator().manual_seed(self._seed)
        for epoch in range(1, EPOCHS + 1):
            for rows in torch.randperm(Z.shape[1], generator=generator).to(Z.device).split(BATCH):
                optimizer.zero_grad()
                (divergences(X[:, rows], Z[:, rows], last[:, rows]).sum() / len(rows)).backward()
                optimizer.step()
            found = measured()
            better = found < best - 1e-5  # not by rounding, which Adam would follow at the last layer
            for old, new in zip(kept, (A, b), strict=True):
                old[better] = new.detach()[better]
            best, epochs[better.cpu()] = torch.where(better, found, best), epoch
            if epoch - int(epochs.max()) >= PATIENCE:
                break
        coef = kept[0] / scale.mT * spread
        return coef, (kept[1] * spread - torch.bmm(mean, coef))[:, 0], epochs, best
