"""Compressed copies of an LM, to see what is lost: 8-bit weights, pruning, low rank.

What is compressed is the weights of the linear maps in the layers; embeddings, norms, biases and the head
stay as they are. Weights keep their shape and dtype: the LM computes what a compressed one would, and takes
as much memory as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from probekit.errors import ProbekitError
from probekit.models.pretrained import layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compressed(model: PreTrainedModel, how: str) -> PreTrainedModel:
    """Compresses a model in place.

    Args:
        model: The model.
        how: `int8`, `prune=SHARE` or `rank=NUMBER`, as `lm.compress`.

    Raises:
        ProbekitError: Its layers have no linear maps, or other weights beside them such as fused experts, or
            accelerate placed some on disk.
    """
    from transformers.pytorch_utils import Conv1D

    layers = layers_of(model)
    modules = [] if layers is None else [*layers[1].named_modules()]
    maps = [module for _, module in modules if isinstance(module, nn.Linear | Conv1D)]
    others = [
        f"{path}.{name}"
        for path, module in modules
        if not isinstance(module, nn.Linear | Conv1D)
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim > 1
    ]
    what = None
    if not maps:
        what = "holds its layers' weights in no linear maps of PyTorch"
    elif others:
        what = f"has weights in its layers that belong to no linear map of PyTorch, such as {others[0]}"
    elif any(module.weight.device.type == "meta" for module in maps):
        what = "has weights on disk"
    if what is not None:
        raise ProbekitError(f"lm.compress is {how!r}, but {type(model).__name__} {what}; leave it unset")
    with torch.no_grad():
        for module in maps:
            weight = module.weight.float()
            transposed = isinstance(module, Conv1D)  # of GPT-2, whose weights are [inputs, outputs]
            found = _compressed(weight.T if transposed else weight, how)
            module.weight.copy_(found.T if transposed else found)
    return model


def _compressed(weight: Tensor, how: str) -> Tensor:
    kind, _, amount = how.partition("=")
    if kind == "int8":
        return to_int8(weight)
    return pruned(weight, float(amount)) if kind == "prune" else of_rank(weight, int(amount))


def to_int8(weight: Tensor) -> Tensor:
    """Rounds weights `[outputs, inputs]` to 255 even levels, the last of them the output's largest weight."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return torch.where(step > 0, (weight / step).round() * step, weight)


def pruned(weight: Tensor, share: float) -> Tensor:
    """Sets a share of the weights of a matrix, those of least magnitude, to 0 (Han et al. 2015)."""
    smallest = weight.abs().flatten().argsort(stable=True)[: round(share * weight.numel())]
    return weight.flatten().index_fill(0, smallest, 0).view_as(weight)


def of_rank(weight: Tensor, rank: int) -> Tensor:
    """The matrix of a rank that is nearest to a matrix, which stays as it is where it has no higher one."""
    if rank >= min(weight.shape):
        return weight
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]
