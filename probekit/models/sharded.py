"""An LM whose weights are sharded over processes, for one that does not fit a single GPU (PyTorch's FSDP2).

Every process holds a part of every weight; the weights of a block are put together while it computes. So no
process makes a forward pass that the others do not make with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from probekit import processes
from probekit.errors import ProbekitError
from probekit.models.language_model import Hook, allocated
from probekit.models.plain import PlainPass

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Shards an LM in place, block by block; all processes call this together.

    Gradients are summed over processes, as those of weights that are not sharded are.

    Args:
        model: On the CPU in the first process, whose weights are taken; without weights in the others.
        device: Where this process computes.

    Raises:
        ProbekitError: The weights are not those that the others expect by the LM's configuration.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import distribute_tensor

    if not processes.is_first():
        model = allocated(model)
    _check_alike(model, device)
    # Detached, they stay on the CPU when the model is moved.
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()}
    mesh = processes.mesh()
    for module in [*(blocks_of(model) or {}).values(), model]:
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The first process scatters what it has.
            parameter.copy_(distribute_tensor(whole.pop(name).to(device), mesh, parameter.placements))
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, 0)
    return model


def _check_alike(model: PreTrainedModel, device: torch.device) -> None:
    """Refuses to scatter weights to processes that expect others, such as a head of its own or none."""
    shapes = [(name, *parameter.shape) for name, parameter in model.named_parameters()]
    digest = zlib.crc32(repr(shapes).encode())
    if processes.total(digest, device) != processes.count() * digest:
        raise ProbekitError(
            f"lm.sharded is true, but the weights of {type(model).__name__} are not those that its "
            "config.json tells of; load it and save it again (save_pretrained), or give lm.sharded false"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are sharded."""
    return any(is_shard(parameter) for parameter in model.parameters())


def is_shard(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a process holds a part of a tensor alone."""
    return hasattr(tensor, "full_tensor")


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the first process, and none on the others; all call this together."""
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        whole = tensor.full_tensor().cpu() if is_shard(tensor) else tensor
        if processes.is_first():
            found[name] = whole
    return found


def sharded_like(whole: Tensor, own: Tensor) -> Tensor:
    """This process's part of a tensor that every process has whole, where another one is sharded."""
    if not is_shard(own):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def blocks_of(model: PreTrainedModel) -> dict[str, nn.Module] | None:
    """An LM's blocks by path, in their order; None where it does not list them in one place."""
    depth = model.config.get_text_config().num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return {f"{path}.{number}": block for number, block in enumerate(module)}
    return None


class ShardedPass(PlainPass):
    """Runs a sharded LM; a process that has nothing to run any more keeps up with those that have."""

    def __call__(
        self, tokens: Tensor, hooks: Sequence[Hook], reads: int, positions: Tensor | None = None
    ) -> None:
        """Runs hooks as `PlainPass` does, but always the whole LM: others wait for its last blocks."""
        processes.total(1.0, self.device)
        self._run(tokens, hooks, positions)

    def keep_up(self) -> None:
        """Goes along with calls that other processes make; every process calls this behind its own last."""
        nothing = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        with torch.no_grad():
            while processes.total(0.0, self.device):
                self._run(nothing, [])

    def _run(self, tokens: Tensor, hooks: Sequence[Hook], positions: Tensor | None = None) -> None:
        head = self._model.get_output_embeddings()
        # Nobody asked for logits, which can be larger than all activations.
        one = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :1],))
        try:
            self.logits(tokens, hooks, positions)
        finally:
            one.remove()
