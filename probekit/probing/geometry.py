"""The geometry of activations: how many directions they vary in, their cosines, and rogue features.

All of it is a function of sums over examples, from which a block of documents at a time is left out:
intervals are those of the jackknife. It corrects effective ranks, too, for how few the examples are: the rank
of a sample is too low, the more so the nearer the number of examples is to the width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probekit.errors import ProbekitError
from probekit.probing.arrays import Arrays, arrays_of, column_of
from probekit.statistics import jackknife, jackknife_blocks

GEOMETRY = "geometry.parquet"
"""The file in the folder of probes."""

ROGUE = 5.0
"""A feature is rogue if its root mean square is this many times the median one that is not zero."""

SHOWN_ROGUE = 5
"""So many rogue features are named, the largest first."""

LEAST_DOCUMENTS = 5
"""Activations of fewer documents or groups are refused."""


def geometry(activations: Arrays, groups: Any = None) -> pd.DataFrame:
    """Measures the geometry of every layer of some activations.

    Args:
        activations: What `probekit.activations` gave, an array of NumPy or PyTorch `[examples, width]` or
            `[layers, examples, width]`, or a .npy or .safetensors file of one.
        groups: What intervals resample, such as the document of each example `[examples]`; None: examples.

    Returns:
        A row for each layer, with `location`, `layer`, and the columns of `layer_geometry`. Ranks are
        missing, and a warning says so, where all examples are the same.

    Raises:
        ProbekitError: There are fewer examples than features, fewer than five groups, or groups are missing.
    """
    values, points = arrays_of(activations)
    examples = values.shape[1]
    group = np.arange(examples) if groups is None else pd.factorize(column_of(groups, "groups", examples))[0]
    check_enough(values.shape[1], values.shape[2], group)
    rows = [
        {"location": location, "layer": layer} | layer_geometry(own, group)
        for own, (location, layer) in zip(values, points, strict=True)
    ]
    table = pd.DataFrame(rows)
    for note in geometry_notes(table):
        warnings.warn(note, stacklevel=2)
    return table


def geometry_notes(table: pd.DataFrame) -> Iterator[str]:
    """A line that names the layers of a table of geometry that do not vary, if there are any."""
    constant = table.layer[table.effective_rank.isna()].unique()
    if len(constant):
        yield f"layers whose activations do not vary, and have no ranks: {', '.join(map(str, constant))}"


def check_enough(examples: int, width: int, group: np.ndarray) -> None:
    """Refuses too few examples, or examples of too few documents or groups."""
    if examples <= width:
        raise ProbekitError(
            f"{examples:,} examples are too few for the geometry of {width:,} features: they cannot vary in "
            f"all directions; give more than {width:,}, better {5 * width:,}"
        )
    if (groups := len(np.unique(group))) < LEAST_DOCUMENTS:
        raise ProbekitError(
            f"examples of {groups} documents or groups are too few for intervals of their geometry; give "
            f"{LEAST_DOCUMENTS} at least"
        )


def layer_geometry(activations: Tensor, group: np.ndarray) -> dict[str, Any]:
    """Measures the geometry of the activations of one layer.

    Args:
        activations: `[examples, width]`.
        group: The document or group of each example `[examples]`.

    Returns:
        With `_low` and `_high` each: `effective_rank`, the exponential of the entropy of the covariance's
        eigenvalues as shares of their sum (Roy and Vetterli 2007); `participation_ratio`, the square of their
        sum over the sum of their squares; `anisotropy`, the mean cosine of two examples of different groups
        (Ethayarajh 2019); `anisotropy_without`, that without the rogue features; `norm`, the mean length;
        `rogue_share`, the share of the squared length in rogue features (Timkey and van Schijndel 2021).
        `rogue`, the number of these, `rogue_features`, the largest by number; `width`, `examples`, `groups`.
    """
    X = activations.double().cpu()
    blocks = [torch.from_numpy(rows) for rows in jackknife_blocks(group)]
    squares = X.square().mean(0)
    rogue = (squares > ROGUE**2 * squares[squares > 0].median()).nonzero()[:, 0]
    rogue = rogue[squares[rogue].argsort(descending=True)]
    others = torch.ones(X.shape[1], dtype=torch.bool)
    others[rogue] = False
    groups = len(np.unique(group))
    length, in_rogue, in_all = _means([X.norm(dim=1), X[:, rogue].square().sum(1), X.square().sum(1)], blocks)
    with np.errstate(invalid="ignore"):  # zeros have no length
        share = in_rogue / in_all
    rank, ratio = _spectra(X, blocks)
    row: dict[str, Any] = {}
    for name, values, is_log in (
        ("effective_rank", rank, True),
        ("participation_ratio", ratio, True),
        ("anisotropy", _cosines(X, group, blocks), False),
        ("anisotropy_without", _cosines(X[:, others], group, blocks), False),
        ("norm", length, False),
        ("rogue_share", share, False),
    ):
        ends = np.array(jackknife(values[:1], values[1:, None], groups, corrected=is_log)[0][:3])
        ends = np.exp(ends).clip(max=X.shape[1]) if is_log else ends
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends.tolist(), strict=True))
    named = ", ".join(str(int(feature)) for feature in rogue[:SHOWN_ROGUE])
    row |= {"rogue": len(rogue), "rogue_features": named + (", …" if len(rogue) > SHOWN_ROGUE else "")}
    return row | {"width": X.shape[1], "examples": len(X), "groups": groups}


def _means(values: Sequence[Tensor], blocks: Sequence[Tensor]) -> Iterator[np.ndarray]:
    """Means of values `[examples]`, of all examples and without each block `[1 + blocks]`."""
    sizes = torch.tensor([0, *map(len, blocks)])
    for value in values:
        left_out = torch.stack([value.new_zeros(()), *(value[block].sum() for block in blocks)])
        yield ((value.sum() - left_out) / (len(value) - sizes)).numpy()


def _spectra(X: Tensor, blocks: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of effective rank and participation ratio, of all and without each block `[1 + blocks]`."""
    X = X - X.mean(0)
    scatter = X.T @ X
    ranks, ratios = [], []
    for block in (None, *blocks):
        of_block = X[:0] if block is None else X[block]
        total = of_block.sum(0)
        kept = scatter - of_block.T @ of_block - total[:, None] * total / (len(X) - len(of_block))
        share = torch.linalg.eigvalsh(kept).clamp(min=0)
        share /= share.sum()
        ranks.append(float(torch.special.entr(share).sum()))
        ratios.append(-float(share.square().sum().log()))
    return np.array(ranks), np.array(ratios)


def _cosines(X: Tensor, group: np.ndarray, blocks: Sequence[Tensor]) -> np.ndarray:
    """The mean cosine of examples of different groups, of all and without each block `[1 + blocks]`."""
    number, found = pd.factorize(group)
    code = torch.from_numpy(number)
    units = torch.nn.functional.normalize(X, dim=1)
    of_groups = units.new_zeros(len(found), X.shape[1]).index_add_(0, code, units)
    sizes = torch.bincount(code).double()
    cosines = []
    for block in (None, *blocks):
        kept = torch.ones(len(found), dtype=torch.bool)
        if block is not None:
            kept[code[block]] = False
        own, size = of_groups[kept], sizes[kept]
        pairs = size.sum().square() - size.square().sum()
        cosines.append(float((own.sum(0).square().sum() - own.square().sum()) / pairs))
    return np.array(cosines)
