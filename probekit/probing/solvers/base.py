"""What solvers share: batches of probes, pieces of them that bound the memory, standardised features."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from probekit.errors import ProbekitError

P = TypeVar("P", bound=tuple[Any, ...])

PIECE_BYTES = defaultdict(lambda: 1 << 30, cpu=1 << 25)
"""Working memory of a piece of a batch, by device type; on a CPU a piece should stay in the cache."""


def checked_penalties(name: str, penalties: Sequence[float]) -> tuple[float, ...]:
    """Penalties to try, of which there must be one at least, all above 0, and shrinkage at most 1."""
    most = 1.0 if name == "shrinkage" else float("inf")
    if not penalties or min(penalties) <= 0 or max(penalties) > most:
        above = "all above 0 and at most 1" if most == 1.0 else "all above 0"
        raise ProbekitError(f"{name} is {list(penalties)}; it must hold at least one penalty, {above}")
    return tuple(penalties)


def expand_labels(X: Tensor, y: Tensor, classes: int) -> Tensor:
    """The classes `y` of activations `X` [probes, examples, width] as [probes, examples], checked."""
    if X.ndim != 3 or not X.numel() or y.shape not in (X.shape[:2], X.shape[1:2]):
        raise ProbekitError(
            f"activations {list(X.shape)} must be [probes, examples, width], none of them 0, "
            f"and their classes {list(y.shape)} [probes, examples] or [examples]"
        )
    if y.min() < 0 or y.max() >= classes:
        raise ProbekitError(f"classes run from {y.min()} to {y.max()}; they must be 0 to {classes - 1}")
    return y.expand(X.shape[:2])


def solver_dtype(X: Tensor) -> torch.dtype:
    """The type in which activations are solved: float64 if they are float64, else float32."""
    return torch.float64 if X.dtype == torch.float64 else torch.float32


def probe_slices(probes: int, elements: int, like: Tensor) -> list[slice]:
    """Slices of probes whose working memory stays within bounds.

    Args:
        probes: Number of probes.
        elements: Numbers of working memory that one probe needs.
        like: A tensor on the device; the numbers are of its `solver_dtype`.
    """
    size = max(1, PIECE_BYTES[like.device.type] // (elements * solver_dtype(like).itemsize))
    return [slice(first, first + size) for first in range(0, probes, size)]


def pieces(X: Tensor, elements: int) -> Iterator[tuple[slice, slice]]:
    """Slices of probes and of examples that cover activations [probes, examples, width].

    Args:
        X: The activations.
        elements: Numbers of working memory that one example of a probe needs.
    """
    probes, examples, _ = X.shape
    size = max(1, PIECE_BYTES[X.device.type] // (elements * solver_dtype(X).itemsize))
    rows = min(size, examples)
    for first in range(0, probes, size // rows):
        for start in range(0, examples, rows):
            yield slice(first, first + size // rows), slice(start, start + rows)


def rows_of(parts: P, rows: Tensor) -> P:
    """A named tuple of some of the probes; what is None stays so."""
    chosen: list[Any] = [None if part is None else part[rows] for part in parts]
    return type(parts)(*chosen)


def joined(chunks: Sequence[P]) -> P:
    """The named tuple of all probes, from those of its chunks."""
    return type(chunks[0])(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [probes, width] and eigenvectors [probes, width, width] of symmetric matrices."""
    try:
        spectrum, basis = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # divide and conquer can fail where many eigenvalues are equal
        found = [scipy.linalg.eigh(one.cpu().numpy(), driver="ev") for one in matrix]
        spectrum, basis = (torch.from_numpy(np.stack(part)).to(matrix) for part in zip(*found, strict=True))
    return spectrum, basis


def log_softmax(X: Tensor, coef: Tensor, intercept: Tensor) -> Tensor:
    """Log-probabilities [probes, examples, classes] of linear probes, in the type of their weights."""
    return torch.log_softmax(torch.baddbmm(intercept[:, None], X.to(coef.dtype), coef), -1)


def losses(X: Tensor, y: Tensor, coef: Tensor, intercept: Tensor) -> Tensor:
    """Cross-entropy [probes, examples] in nats of linear probes at classes `y` [probes, examples]."""
    found = coef.new_empty(y.shape)
    for at in pieces(X, X.shape[2] + 2 * coef.shape[2]):
        log_p = log_softmax(X[at], coef[at[0]], intercept[at[0]])
        found[at] = -log_p.gather(2, y[at][..., None])[..., 0]
    return found


def check_validation(losses: Tensor, first: int = 0) -> None:
    """Refuses validation losses [probes, ...] that are not finite; names the probe, numbered from `first`."""
    if len(broken := (~losses.isfinite()).nonzero()):
        raise ProbekitError(f"probe {first + int(broken[0, 0])}: its validation loss is not finite")


def standardised(X: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """Standardises activations by each probe's own means and deviations.

    Args:
        X: Activations, [probes, examples, width].
        first: Number of the first of these probes, for the error.

    Returns:
        The standardised activations, the means and the scales they were divided by, [probes, 1, width].

    Raises:
        ProbekitError: An activation is not finite; names the probe.
    """
    mean = X.mean(1, keepdim=True)
    Z = X - mean
    scale = Z.square().mean(1, keepdim=True).sqrt()
    if len(broken := (~scale.isfinite()).nonzero()):
        raise ProbekitError(f"probe {first + int(broken[0, 0])}: its activations are not all finite")
    # A constant feature deviates from its mean by rounding, which must not be scaled up to a deviation of 1.
    # With an infinite scale it is exactly zero, and so are its weights.
    scale = torch.where(scale <= 16 * torch.finfo(X.dtype).eps * mean.abs(), torch.inf, scale)
    return Z.div_(scale), mean, scale


def absent_classes(counts: Tensor) -> Tensor:
    """The label of one more example, spread evenly over the classes without any; zeros where there are none.

    Args:
        counts: Examples of each class, [..., classes].
    """
    absent = (counts == 0).to(counts.dtype)
    return absent / absent.sum(-1, keepdim=True).clamp(min=1)
