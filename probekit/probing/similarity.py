"""How similar the activations of two models are: linear CKA and Procrustes, for every pair of layers.

Both ask whether the same examples have the same geometry in both models, whatever the axes: neither changes
when the activations of a model are rotated, mirrored, shifted, or all multiplied by one number. Widths may
differ.

CKA is that of Kornblith et al. (2019) with the unbiased estimator of its three inner products (Song et al.
2012), as examples are seldom many more than features: of models that have nothing in common it is about 0,
where the plain one is far above. The Procrustes residual is the share of variance that is left after the best
rotation and scale, of the first principal components of each model; the narrower one is padded with zeros.
Its rotation is fitted to the examples that it is measured on, so that it has to be read beside its null.

The null permutes documents: those of the second model, each with its examples in their order, are laid beside
those of the first in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.progress import Progress
from probekit.statistics import jackknife, jackknife_blocks

COMPONENTS = 64
"""Principal components of each layer that Procrustes compares, all where there are fewer."""

LEAST_EXAMPLES, LEAST_DOCUMENTS = 20, 5
"""Fewer than these are refused."""


def compare_layers(
    first: Tensor, second: Tensor, document: np.ndarray, *, permutations: int, seed: int, progress: Progress
) -> pd.DataFrame:
    """Compares every layer of one model with every layer of another, on the same examples.

    Args:
        first: Activations `[layers, examples, width]`.
        second: Those of the other model; layers and width may be others.
        document: The document, or group of documents, of each example `[examples]`.
        permutations: How often documents are permuted.
        seed: Seed of the permutations.
        progress: Shows the permutations.

    Returns:
        A row for each pair: `layer` and `second_layer`, their numbers in the arguments; `cka`, at most
        1, and `procrustes`, from 0 to 1, each with `_low` and `_high` from a jackknife over documents,
        `_null`, the mean over permutations, and `_p`, the share of permutations that are as similar;
        `examples` and `documents`. All but the last two are missing where a layer does not vary.

    Raises:
        ProbekitError: There are too few examples or documents.
    """
    examples, documents = len(document), len(np.unique(document))
    if examples < LEAST_EXAMPLES or documents < LEAST_DOCUMENTS:
        raise ProbekitError(
            f"{examples} examples of {documents} documents or groups are too few to compare layers; give "
            f"{LEAST_EXAMPLES} examples of {LEAST_DOCUMENTS} at least"
        )
    models = [[_scaled(layer) for layer in values] for values in (first, second)]
    scores = [torch.stack([_principal_components(X) for X in layers]) for layers in models]
    grams = [torch.stack([X @ X.T for X in layers]) for layers in models]
    del models
    for gram in grams:
        gram.diagonal(dim1=1, dim2=2).zero_()
    blocks = [torch.from_numpy(rows) for rows in jackknife_blocks(document)]
    cka, residual = _cka(grams[0], grams[1], blocks), _procrustes(scores[0], scores[1], blocks)
    for gram in grams:
        _u_centre(gram)
    nulls: list[tuple[Tensor, Tensor]] = []
    rng = np.random.default_rng(seed)
    with progress.task("compare layers with documents permuted", total=permutations) as task:
        for _ in task.track(range(permutations)):
            order = _permuted(document, rng)
            cosine = _cosines(grams[0], grams[1][:, order][:, :, order])
            nulls.append((cosine, _residuals(scores[0], scores[1][:, order])))
    at = np.indices(cka.shape[1:]).reshape(2, -1)
    table = pd.DataFrame({"layer": at[0], "second_layer": at[1]})
    for name, values, null, sign in (
        ("cka", cka, torch.stack([of_cka for of_cka, _ in nulls]), 1),
        ("procrustes", residual, torch.stack([of_residual for _, of_residual in nulls]), -1),
    ):
        found = jackknife(values[0].flatten().numpy(), values[1:].flatten(1).numpy(), documents)
        table[name] = found.value
        table[f"{name}_low"] = found.low if sign == 1 else found.low.clip(min=0)
        table[f"{name}_high"] = found.high.clip(max=1)
        table[f"{name}_null"] = null.mean(0).flatten().numpy()
        as_alike = (sign * (null - values[0]) >= 0).sum(0)
        p = ((1 + as_alike) / (1 + permutations)).where(~values[0].isnan(), torch.nan)
        table[f"{name}_p"] = p.flatten().numpy()
    return table.assign(examples=examples, documents=documents)


def rotation_onto(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The map of Procrustes from one model's activations to another's, fitted to the same examples.

    Args:
        source: Activations `[examples, width]`.
        target: Those of the other model `[examples, width of the target]`.

    Returns:
        A matrix `[width, width of the target]` and a vector `[width of the target]`: `x @ matrix + vector`
        lies nearest to the target of all rotations with a scale and a shift; from a wider model the rotation
        keeps as many directions as the target has. Where widths are equal, directions in which the examples
        do not vary stay as they are. The matrix is zero if one of the models does not vary at all.
    """
    means = source.double().mean(0), target.double().mean(0)
    X, Y = source.double() - means[0], target.double() - means[1]
    cross = X.T @ Y
    if X.shape[1] == Y.shape[1]:
        cross += 1e-9 * torch.linalg.matrix_norm(cross) * torch.eye(X.shape[1])
    left, values, right = torch.linalg.svd(cross, full_matrices=False)
    kept = (X @ left).square().sum().clamp(min=torch.finfo(X.dtype).tiny)  # of a wider model, a part
    matrix = left @ right * (values.sum() / kept)
    return matrix, means[1] - means[0] @ matrix


def _scaled(activations: Tensor) -> Tensor:
    """Activations `[examples, width]` in float64, of mean 0 and total variance 1."""
    X = activations.double()
    X = X - X.mean(0)
    return X / X.square().sum().sqrt().clamp(min=torch.finfo(X.dtype).tiny)


def _principal_components(X: Tensor) -> Tensor:
    """The scores of all examples on the first components `[examples, components]`."""
    examples, width = X.shape
    kept = min(COMPONENTS, width, examples - 1)
    if width <= examples:
        return X @ torch.linalg.eigh(X.T @ X)[1][:, -kept:]
    values, vectors = torch.linalg.eigh(X @ X.T)
    return vectors[:, -kept:] * values[-kept:].clamp(min=0).sqrt()


def _cka(first: Tensor, second: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """CKA of all layers, of all examples and without each block `[1 + blocks, layers, layers]`."""
    inner = _inner_products(first, second, blocks)
    own = [_inner_products(gram, gram, blocks).diagonal(dim1=1, dim2=2) for gram in (first, second)]
    return inner / (own[0].clamp(min=0)[:, :, None] * own[1].clamp(min=0)[:, None]).sqrt()


def _inner_products(first: Tensor, second: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Unbiased inner products of Gram matrices without diagonals, of all and without each block.

    The estimator of Song et al. (2012, equation 5), up to a factor that CKA does not depend on.
    """

    def unbiased(total: Tensor, rows: Sequence[Tensor], examples: int) -> Tensor:
        sums = [row.sum(1) for row in rows]
        found = total + sums[0][:, None] * sums[1] / ((examples - 1) * (examples - 2))
        return found - 2 / (examples - 2) * rows[0] @ rows[1].T

    examples = first.shape[1]
    rows = [gram.sum(2) for gram in (first, second)]
    with_block = [_products(first[:, block], second[:, block]) for block in blocks]
    total = torch.stack(with_block).sum(0)
    found = [unbiased(total, rows, examples)]
    for block, product in zip(blocks, with_block, strict=True):
        own = [gram[:, block] for gram in (first, second)]
        left = [row - part.sum(1) for row, part in zip(rows, own, strict=True)]
        for row in left:
            row[:, block] = 0
        within = _products(*(part[:, :, block] for part in own))
        found.append(unbiased(total - 2 * product + within, left, examples - len(block)))
    return torch.stack(found)


def _products(first: Tensor, second: Tensor) -> Tensor:
    """Sums of products of all entries, for every pair of layers."""
    return first.flatten(1) @ second.flatten(1).T


def _u_centre(grams: Tensor) -> None:
    """Centres Gram matrices without diagonals in place, so that their products are unbiased as they are."""
    examples = grams.shape[1]
    rows = grams.sum(2) / (examples - 2)
    total = rows.sum(1) / (examples - 1)
    grams -= rows[:, :, None] + rows[:, None] - total[:, None, None]
    grams.diagonal(dim1=1, dim2=2).zero_()


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    return _products(first, second) / (first.flatten(1).norm(dim=1)[:, None] * second.flatten(1).norm(dim=1))


def _procrustes(first: Tensor, second: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """Residuals of all layers, of all examples and without each block `[1 + blocks, layers, layers]`."""
    examples = torch.arange(first.shape[1])
    left = [examples[~torch.isin(examples, block)] for block in blocks]
    return torch.stack([_residuals(first[:, rows], second[:, rows]) for rows in (examples, *left)])


def _residuals(first: Tensor, second: Tensor) -> Tensor:
    """Residuals `[layers, layers]` of scores `[layers, examples, components]`."""
    X, Y = (scores - scores.mean(1, keepdim=True) for scores in (first, second))
    sizes = X.square().sum((1, 2))[:, None] * Y.square().sum((1, 2))
    overlap = torch.stack([torch.linalg.svdvals(x.T @ Y).sum(1) for x in X])
    return (1 - overlap.square() / sizes).clamp(min=0)


def _permuted(document: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows of all documents, those of each together and in their order, documents in another order."""
    number = np.unique(document, return_inverse=True)[1]
    place = rng.permutation(number.max() + 1)
    return np.argsort(place[number], kind="stable")
