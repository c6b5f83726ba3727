"""MLP probes: one hidden layer, for information that is there but not linearly; a batch is trained together.

    log p(c | z) = log softmax(gelu(z W1 + b1) W2 + b2)_c,        z the standardised activations

All probes take minibatch steps of AdamW at once; each keeps its state after the epoch that was best on its
validation examples. They start as the class prior (W2 = 0) and share all draws, initial weights and order of
the examples, so that the result of a probe does not depend on the others in the batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional

from probekit.errors import ProbekitError
from probekit.probing.solvers.base import (
    absent_classes,
    check_validation,
    expand_labels,
    pieces,
    probe_slices,
    solver_dtype,
    standardised,
)


class MLPProbes:
    """A batch of probes with one hidden layer.

    Attributes:
        hidden_coef_: Weights on raw activations, [probes, width, hidden].
        hidden_intercept_: Intercepts for raw activations, [probes, hidden].
        coef_: Weights of the output, [probes, hidden, classes].
        intercept_: Its intercepts, [probes, classes].
        n_iter_: The epoch whose state was kept, [probes].
        converged_: Whether the validation loss stopped falling before the last epoch allowed, [probes].
        validation_loss_: Cross-entropy of the kept state on validation examples in nats, [probes].
        classes_: Number of classes.
    """

    def __init__(
        self,
        hidden: int = 128,
        *,
        seed: int = 0,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-2,
        batch_size: int = 256,
        max_epochs: int = 100,
        patience: int = 5,
    ) -> None:
        """Sets the size and the training.

        Args:
            hidden: Width of the hidden layer.
            seed: Seed of the initial weights and the order of examples.
            learning_rate: Learning rate of AdamW.
            weight_decay: Weight decay of AdamW, on weights but not on intercepts.
            batch_size: Examples in a step.
            max_epochs: Most passes over the examples.
            patience: A probe stops after so many epochs without a better validation loss.
        """
        if min(hidden, batch_size, max_epochs, patience) < 1:
            raise ProbekitError(
                f"hidden {hidden}, batch_size {batch_size}, max_epochs {max_epochs} and patience {patience} "
                "must all be 1 or more"
            )
        self.hidden, self.seed = hidden, seed
        self.learning_rate, self.weight_decay, self.batch_size = learning_rate, weight_decay, batch_size
        self.max_epochs, self.patience = max_epochs, patience

    def fit(self, X: Tensor, y: Tensor, classes: int, X_validation: Tensor, y_validation: Tensor) -> Self:
        """Fits all probes; the arguments are those of `SoftmaxProbes.fit`."""
        y, y_validation = expand_labels(X, y, classes), expand_labels(X_validation, y_validation, classes)
        width, examples = X.shape[2], X.shape[1] + X_validation.shape[1]
        elements = 2 * examples * width + 6 * self.hidden * (width + classes)
        parts = [
            self._fit_chunk(at.start, classes, X[at], y[at], X_validation[at], y_validation[at])
            for at in probe_slices(len(X), elements, X)
        ]
        layers, losses, epochs, converged = (list(part) for part in zip(*parts, strict=True))
        kept = (torch.cat(part) for part in zip(*layers, strict=True))
        self.hidden_coef_, self.hidden_intercept_, self.coef_, self.intercept_ = kept
        self.validation_loss_ = torch.cat(losses)
        self.n_iter_, self.converged_, self.classes_ = torch.cat(epochs), torch.cat(converged), classes
        return self

    def log_probabilities(self, X: Tensor) -> Tensor:
        """Log-probabilities [probes, examples, classes] in nats of activations [probes, examples, width]."""
        layers = _Layers(self.hidden_coef_, self.hidden_intercept_, self.coef_, self.intercept_)
        return torch.log_softmax(layers.logits(X.to(self.coef_.dtype)), -1)

    def _fit_chunk(
        self, first: int, classes: int, X: Tensor, y: Tensor, X_validation: Tensor, y_validation: Tensor
    ) -> tuple[_Layers, Tensor, Tensor, Tensor]:
        """Layers, validation losses, epochs and whether they converged, of the probes from `first` on."""
        Z, mean, scale = standardised(X.to(solver_dtype(X)), first)
        Z_validation = (X_validation.to(Z.dtype) - mean) / scale
        generator = torch.Generator().manual_seed(self.seed)
        layers = self._initial(Z, y, classes, generator)
        weights, intercepts = layers[::2], layers[1::2]
        groups: list[dict[str, Any]] = [
            {"params": weights, "weight_decay": self.weight_decay},
            {"params": intercepts},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=0.0)
        best, kept = Z.new_full((len(Z),), torch.inf), _Layers(*(layer.detach().clone() for layer in layers))
        epochs = torch.zeros(len(Z), dtype=torch.int64, device=Z.device)
        running = torch.ones_like(epochs, dtype=torch.bool)
        for epoch in range(1, self.max_epochs + 1):
            for rows in torch.randperm(Z.shape[1], generator=generator).to(Z.device).split(self.batch_size):
                logits = layers.logits(Z[:, rows]).flatten(0, 1)
                loss = functional.cross_entropy(logits, y[:, rows].flatten(), reduction="sum") / len(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            found = layers.losses(Z_validation, y_validation)
            better = running & (found < best)
            for old, new in zip(kept, layers, strict=True):
                old[better] = new.detach()[better]
            best, epochs = torch.where(better, found, best), torch.where(better, epoch, epochs)
            running = epoch - epochs < self.patience
            if not running.any():
                break
        check_validation(best, first)
        return kept.on_raw(mean, scale), best, epochs, ~running

    def _initial(self, Z: Tensor, y: Tensor, classes: int, generator: torch.Generator) -> _Layers:
        """Layers whose predictions are the class prior."""
        probes, _, width = Z.shape
        drawn = torch.rand(width, self.hidden, generator=generator, dtype=torch.float64)
        first = ((2 * drawn - 1) / math.sqrt(width)).to(Z).repeat(probes, 1, 1)
        counts = torch.stack([torch.bincount(row, minlength=classes) for row in y]).to(Z)
        weighed = counts + absent_classes(counts)
        prior = (weighed / weighed.sum(1, keepdim=True)).log()
        layers = first, Z.new_zeros(probes, self.hidden), Z.new_zeros(probes, self.hidden, classes), prior
        return _Layers(*(layer.requires_grad_() for layer in layers))


class _Layers(NamedTuple):
    """The parameters, with shapes as in `MLPProbes`."""

    hidden_coef: Tensor
    hidden_intercept: Tensor
    coef: Tensor
    intercept: Tensor

    def logits(self, X: Tensor) -> Tensor:
        """Logits [probes, examples, classes]."""
        hidden = functional.gelu(torch.baddbmm(self.hidden_intercept[:, None], X, self.hidden_coef))
        return torch.baddbmm(self.intercept[:, None], hidden, self.coef)

    def losses(self, X: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of each probe in nats, [probes]."""
        found = X.new_empty(y.shape)
        with torch.no_grad():
            for at in pieces(X, 2 * self.coef.shape[1] + 2 * self.coef.shape[2]):
                log_p = torch.log_softmax(_Layers(*(layer[at[0]] for layer in self)).logits(X[at]), -1)
                found[at] = -log_p.gather(2, y[at][..., None])[..., 0]
        return found.mean(1)

    def on_raw(self, mean: Tensor, scale: Tensor) -> _Layers:
        """The same layers on activations that are not standardised."""
        coef = self.hidden_coef / scale.mT
        intercept = self.hidden_intercept - torch.bmm(mean, coef)[:, 0]
        return self._replace(hidden_coef=coef, hidden_intercept=intercept)
